//! What `migrate` understands.

use std::time::Duration;

use clap::{Args, ValueEnum};

use super::values::duration;

#[derive(Debug, Args)]
pub(crate) struct MigrateArgs {
    /// The VM
    pub(crate) name: String,
    /// The site to move it to
    #[arg(long, value_name = "SITE")]
    pub(crate) to: String,
    /// How: by predicted time, or as said
    #[arg(long, value_enum, default_value_t = StrategyArg::Auto)]
    pub(crate) strategy: StrategyArg,
    /// When this site replays as well, which saves bytes
    #[arg(long, value_enum, default_value_t = TwinArg::Beside)]
    pub(crate) twin: TwinArg,
    /// Replay without waiting out the time in which the user thought: as fast as the guest can,
    /// for some more bytes. A site that follows has replayed already
    #[arg(long)]
    pub(crate) quick: bool,
    /// Make the guest's free pages zero before it moves, which saves bytes where a Linux guest
    /// doesn't clear what it frees: what they hold is not preserved, and the new generation says so
    #[arg(long)]
    pub(crate) drop_free: bool,
    /// With `live`: stop the VM once it is expected to stand still for no longer than this. Where
    /// that can't be reached, it is stopped when another round gains nothing
    #[arg(long, value_parser = duration, value_name = "TIME", default_value = "1s")]
    pub(crate) downtime: Duration,
    /// With `live`: no more rounds than these
    #[arg(long, value_name = "N", default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) rounds: u32,
    /// With `live`: first replay the log on the stale copy at the target, while the VM runs
    #[arg(long)]
    pub(crate) replay_first: bool,
    /// Where the target lacks the images that the disks rest on: let the VM go on there once what its guest
    /// has of them in memory is there. The rest follows while it runs, what it waits for first; until all is
    /// there it needs this site. With `full`, or `live` to a site without a stale copy
    #[arg(long)]
    pub(crate) post_copy: bool,
    /// Say what each strategy would cost, and stop
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Leave the VM paused at the target
    #[arg(long)]
    pub(crate) paused: bool,
    /// Call the target again for so long when the line is lost. After that it is exit code 4: the
    /// VM goes on here, the target keeps what it has for some minutes, and the same command goes
    /// on with that
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    pub(crate) give_up_after: u32,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum StrategyArg {
    /// What is predicted to be quickest
    Auto,
    /// Replay the log on the stale copy, then reconcile
    Replay,
    /// Reconcile against the stale copy
    Base,
    /// Send everything but what is in the read-only base images
    Full,
    /// Send while the VM runs, against the stale copy if there is one, and again what changes
    Live,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum TwinArg {
    /// At the same time as the target
    Beside,
    /// After the target, where both share processors
    After,
    /// Not at all
    Never,
}
