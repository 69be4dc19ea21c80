//! One file per command.

mod bench;
mod capture;
mod checkpoint;
mod doctor;
mod follow;
mod generations;
mod guest;
mod hub;
mod log;
mod migrate;
mod record;
mod replay;
mod seed;
mod serve;
mod site;
mod supply;
mod sync;
mod vm;

use std::path::PathBuf;

use ::site::peers::Peer;
use ::site::recording::RecordOptions;
use ::site::{Store, VmDir, moving};
use anyhow::Context;

use crate::args::{Args, Command};
use crate::output::Output;

/// Runs the command that was asked for.
pub(crate) async fn run(args: Args, output: &Output) -> anyhow::Result<()> {
    let dir = match args.site {
        Some(dir) => dir,
        None => default_site()?,
    };
    let keys = args.keys;
    let store = || Store::open_with(&dir, keys.as_deref());
    match args.command {
        Command::Doctor => doctor::run(&dir, output),
        Command::Guest(command) => guest::run(command, output).await,
        Command::Serve {
            listen,
            keep_logs,
            keep_generations,
            hub_room,
            require_encryption,
        } => {
            let options = serve::Options {
                listen: &listen,
                keep_logs,
                keep_generations,
                hub_room,
                require_encryption,
            };
            serve::run(&store()?, options, output).await
        }
        Command::Site(command) => site::run(&dir, keys.as_deref(), command, output).await,
        Command::Vm(command) => vm::run(&store()?, command, output).await,
        Command::Checkpoint { name } => {
            checkpoint::run(&vm_of(&store()?, &name).await?, output).await
        }
        Command::Generations(command) => generations::run(&store()?, command, output).await,
        Command::Record {
            name,
            listen,
            evdev,
            long_turns,
            fresh_qemu,
            pause,
            resume,
        } => {
            if pause || resume {
                return record::set_paused(&vm_of(&store()?, &name).await?, pause, output).await;
            }
            let options = RecordOptions {
                listen,
                evdev,
                long_turns,
                fresh_qemu,
            };
            record::run(&vm_of(&store()?, &name).await?, &options, output).await
        }
        Command::Supply { name } => supply::run(&store()?, &name, output).await,
        Command::Seed { name, to } => seed::run(&store()?, &name, &to, output).await,
        Command::Follow { name, to, no_twin } => {
            Box::pin(follow::run(&store()?, &name, &to, !no_twin, output)).await
        }
        Command::Migrate(args) => migrate::run(&store()?, &args, output).await,
        Command::Sync(args) => Box::pin(sync::run(&store()?, &args, output)).await,
        Command::Collect {
            from,
            every,
            keep_generations,
        } => {
            let keep = match keep_generations {
                0 => usize::MAX,
                keep => keep as usize,
            };
            Box::pin(hub::collect(&store()?, &from, every, keep, output)).await
        }
        Command::Hub(command) => hub::run(&store()?, &command, output),
        Command::Switch { name, to, downtime } => {
            Box::pin(sync::switch(&store()?, &name, &to, downtime, output)).await
        }
        Command::Replay { name, log, options } => {
            replay::run(&vm_of(&store()?, &name).await?, &log, options, output).await
        }
        Command::Capture(args) => {
            capture::run(&vm_of(&store()?, &args.name).await?, args, output).await
        }
        Command::Bench(command) => bench::run(command, output).await,
        Command::Log(command) => log::run(&store()?, command, output).await,
    }
}

/// The VM of this name; it need not exist. What a move of it that was killed has left is put
/// right.
async fn vm_of(store: &Store, name: &str) -> anyhow::Result<VmDir> {
    let vm = store.vm(&name.parse()?);
    if let Err(error) = moving::recover(&vm).await {
        tracing::warn!(
            error = error.chain(),
            "a move that was killed is not put right yet"
        );
    }
    if let Err(error) = moving::let_others_finish(&vm).await {
        tracing::warn!(
            error = error.chain(),
            "whether somebody lets go of it is unclear"
        );
    }
    Ok(vm)
}

/// The trusted site of this name.
fn peer_of(store: &Store, name: &str) -> anyhow::Result<Peer> {
    let name = name.parse().map_err(::site::Error::from)?;
    Ok(store.peers().by_name(&name).map_err(::site::Error::from)?)
}

fn default_site() -> anyhow::Result<PathBuf> {
    Ok(data_home()?.join("replay-migrate").join("site"))
}

/// `$XDG_DATA_HOME`, or its default under the home directory.
fn data_home() -> anyhow::Result<PathBuf> {
    let set = |name| {
        std::env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    set("XDG_DATA_HOME")
        .or_else(|| set("HOME").map(|home| home.join(".local/share")))
        .context(
            "neither XDG_DATA_HOME nor HOME is set; say where this site's state is: --site DIR",
        )
}
