//! From a fresh process to a QEMU that does what its launch says, or a reason why not.

use std::io;
use std::path::Path;
use std::time::Duration;

use crate::hardware::{Launch, Network};
use crate::process::Process;
use crate::qmp::{Qmp, commands};
use crate::runtime::Paths;
use crate::{Error, Result, programs};

/// How long QEMU may take from its start to its first answer. It maps RAM lazily and opens
/// files; on a loaded host, loading its libraries takes most of the time.
const START_LIMIT: Duration = Duration::from_secs(60);
/// How long a QEMU that closed its connection may take to be gone.
const DYING_LIMIT: Duration = Duration::from_secs(10);

/// How often a QEMU that starts is called: between its bind and its listen nothing can be waited
/// for but time.
pub(crate) const SOCKET_POLL: Duration = Duration::from_millis(5);

/// Whether nobody listens at a control socket.
pub(crate) fn is_not_there_yet(error: &Error) -> bool {
    let Error::Io { source, .. } = error else {
        return false;
    };
    matches!(
        source.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
    )
}

/// A lost connection has a reason: QEMU's death, which has one too.
pub(crate) async fn blame(process: &Process, name: &str, doing: &str, error: Error) -> Error {
    if !matches!(error, Error::Disconnected { .. } | Error::Io { .. }) {
        return error;
    }
    match tokio::time::timeout(DYING_LIMIT, process.death()).await {
        Ok(death) => Error::Died {
            name: name.to_owned(),
            doing: doing.to_owned(),
            death,
        },
        Err(_) => error,
    }
}

/// From a fresh process to a QEMU that does what its launch says.
pub(crate) async fn bring_up(
    process: &Process,
    launch: &Launch,
    paths: &Paths,
) -> Result<(Qmp, Vec<u32>)> {
    let connect = async {
        loop {
            match Qmp::connect(&paths.control, START_LIMIT).await {
                Err(error) if is_not_there_yet(&error) => tokio::time::sleep(SOCKET_POLL).await,
                outcome => return outcome,
            }
        }
    };
    let set_up = async {
        let limit = START_LIMIT;
        let qmp = tokio::time::timeout(limit, connect)
            .await
            .map_err(|_| Error::Timeout {
                doing: "starting".into(),
                limit,
            })??;
        qmp.learn_run_state().await?;
        let vcpus = vcpu_threads(&qmp).await?;
        if !launch.incoming {
            apply_network(&qmp, launch).await?;
            qmp.execute(qapi::qmp::cont {}).await?;
        }
        Ok((qmp, vcpus))
    };
    tokio::select! {
        outcome = set_up => match outcome {
            Err(error) => Err(blame(process, &launch.name, "start", error).await),
            outcome => outcome,
        },
        death = process.death() => {
            Err(Error::Died { name: launch.name.clone(), doing: "start".into(), death })
        }
    }
}

/// Pulls the plug, where the launch says so. Device state brings its own link state along, so
/// this is done after it was loaded.
pub(crate) async fn apply_network(qmp: &Qmp, launch: &Launch) -> Result<()> {
    if launch.hardware.network && launch.network == Network::Unplugged {
        qmp.execute(qapi::qmp::set_link {
            name: "nic0".into(),
            up: false,
        })
        .await?;
    }
    Ok(())
}

pub(crate) async fn vcpu_threads(qmp: &Qmp) -> Result<Vec<u32>> {
    let cpus = qmp.execute(commands::QueryCpusFast {}).await?;
    Ok(cpus.into_iter().map(|cpu| cpu.thread_id).collect())
}

/// Puts QEMU's words on frequent mistakes into ours.
pub(crate) fn explain_start(error: Error, qemu: &Path, launch: &Launch) -> Error {
    let Error::Died { death, .. } = &error else {
        return error;
    };
    let machine = &launch.hardware.machine;
    if !death.last_words.contains("unsupported machine type") {
        return error;
    }
    let (Ok(version), Ok(newest)) = (programs::version(qemu), programs::default_machine(qemu))
    else {
        return error;
    };
    Error::UnknownMachine {
        machine: machine.clone(),
        version: version.to_string(),
        newest,
        needed: machine.trim_start_matches("pc-q35-").to_owned(),
    }
}
