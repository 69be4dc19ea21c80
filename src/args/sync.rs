//! What `sync` understands.

use std::time::Duration;

use clap::Args;

use super::values::{duration, size};

#[derive(Debug, Args)]
pub(crate) struct SyncArgs {
    /// The VM
    pub(crate) name: String,
    /// A standby; may be given more than once
    #[arg(long, value_name = "SITE", required = true)]
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
    /// Send no faster than this to all standbys together: 2mbit, 500kbit
    #[arg(long, value_parser = benches::rate_of, value_name = "RATE")]
    pub(crate) cap: Option<u64>,
    /// Besides the generations that somebody relies on, keep so many of the newest here
    #[arg(long, value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) keep: u32,
    /// End once all standbys have one new generation
    #[arg(long, conflicts_with_all = ["every", "after", "when_idle", "when_left"])]
    pub(crate) once: bool,
}
