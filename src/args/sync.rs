//! What `sync` understands.

use std::time::Duration;

use clap::{Args, ValueEnum};

use super::values::{duration, size};

/// By what epochs are shipped.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum By {
    State,
    Log,
    Less,
}

#[derive(Debug, Args)]
pub(crate) struct SyncArgs {
    /// The VM
    pub(crate) name: String,
    /// A standby; may be given more than once. SITE@HUB leaves it at another site, sealed, from where
    /// the standby fetches it (`collect`): the hub can't read it. Always by state
    #[arg(long, value_name = "SITE[@HUB]", required = true)]
    pub(crate) to: Vec<String>,
    /// Make a generation so long after the last. With other reasons, whichever comes first [default:
    /// 5m, where no reason is given]
    #[arg(long, value_parser = duration, value_name = "TIME")]
    pub(crate) every: Option<Duration>,
    /// And once so much of RAM and disk has changed, as far as a sample of a page in 32 tells
    #[arg(long, value_parser = size, value_name = "SIZE")]
    pub(crate) after: Option<u64>,
    /// And once the guest has used less than a tenth of a processor for so long, after it did more
    #[arg(long, value_parser = duration, value_name = "TIME")]
    pub(crate) when_idle: Option<Duration>,
    /// And once the last viewer has left that looks on through the recorder
    #[arg(long)]
    pub(crate) when_left: bool,
    /// And once keys were pressed through the recorder with which a desktop is locked: Ctrl+Alt+L, the logo
    /// key with L, or the key that is there for it
    #[arg(long)]
    pub(crate) when_locked: bool,
    /// What to ship: `state`, what differs since the standby's generation; `log`, what was recorded since
    /// (`record`), which the standby replays, and what differs then; `less`, whichever is expected to take
    /// fewer bytes. A replay takes processors of the standby, and up to as long as the epoch
    #[arg(long, value_enum, default_value_t = By::State)]
    pub(crate) by: By,
    /// Send no faster than this to all standbys together: 2mbit, 500kbit
    #[arg(long, value_parser = benches::rate_of, value_name = "RATE")]
    pub(crate) cap: Option<u64>,
    /// Besides the generations that somebody relies on, keep so many of the newest here
    #[arg(long, value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) keep: u32,
    /// End once all standbys have one new generation
    #[arg(long, conflicts_with_all = ["every", "after", "when_idle", "when_left", "when_locked"])]
    pub(crate) once: bool,
}
