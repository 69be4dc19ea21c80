//! The way of a migration. Logs, progress, timings, tests and fault injection use these names.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A phase of a migration, in the order in which they come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Versions, identity, what the target holds; refuses here what would fail later.
    Hello,
    /// Chooses the strategy by estimated bytes and seconds.
    Plan,
    /// Ships the base generation, if the target lacks it.
    Base,
    /// Ships the log.
    Log,
    /// The target replays the log on a fork of its stale copy.
    Replay,
    /// Pages go over while the VM runs, and again when they change.
    Rounds,
    /// The source pauses: downtime starts.
    Stop,
    /// Reconciles the device state.
    Device,
    /// Reconciles the disks.
    Disk,
    /// Reconciles the guest's RAM.
    Ram,
    /// Roots compared; what differs is refetched.
    Verify,
    /// The lease moves.
    Commit,
    /// The target starts the VM from the reconciled images: downtime ends.
    Resume,
    /// The rest of the disk images goes over, with post-copy.
    Rest,
}

impl Phase {
    /// All phases, in order.
    pub const ALL: [Self; 14] = [
        Self::Hello,
        Self::Plan,
        Self::Base,
        Self::Log,
        Self::Replay,
        Self::Rounds,
        Self::Stop,
        Self::Device,
        Self::Disk,
        Self::Ram,
        Self::Verify,
        Self::Commit,
        Self::Resume,
        Self::Rest,
    ];

    /// Its name, as reports and logs write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Hello => "hello",
            Self::Plan => "plan",
            Self::Base => "base",
            Self::Log => "log",
            Self::Replay => "replay",
            Self::Rounds => "rounds",
            Self::Stop => "stop",
            Self::Device => "device",
            Self::Disk => "disk",
            Self::Ram => "ram",
            Self::Verify => "verify",
            Self::Commit => "commit",
            Self::Resume => "resume",
            Self::Rest => "rest",
        }
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
