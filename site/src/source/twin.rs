//! The twin: the source's own replay.
//!
//! The target's replayed copy differs from the VM in addresses and times, scattered over
//! thousands of pages, and the source can't see that copy. But it can replay its log on a copy of
//! its own: where that differs from the VM, in words, is where the target's most likely differs
//! too. Those words are sent for the target to lay over its pages, each page checked by its hash.
//!
//! A twin is a help and never a condition: where the host has no room for it, or it fails, pages
//! are sent as without.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use replayer::{Options, ReplayReport};
use traces::{GuestTime, Record};
use vm_host::{RamMap, probe};

use crate::error::{Error, Result};
use crate::fork::{Fork, ForkFiles};
use crate::layout::TwinState;
use crate::local;
use crate::store::VmDir;
use crate::vm::{Id, VmRecord};
use crate::work::{Work, Workplace};

/// How much later than the target's replay the twin's may end.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);

/// Memory that must stay available beside the twin's.
const MARGIN: u64 = 512 << 20;

/// A replay at the source, beside the one at the target.
pub(super) struct Twin {
    fork: Fork,
    ram: PathBuf,
    disks: Vec<PathBuf>,
    /// The generation that it began with.
    base: u64,
    /// Records of the log that it has been given.
    given: usize,
}

impl Twin {
    /// Restores a fork of the base generation, if this host has room for one more VM.
    pub(super) async fn start(
        vm: &VmDir,
        record: &VmRecord,
        place: Workplace,
        transfer: Id,
        base: u64,
        options: Options,
        since: Option<Instant>,
    ) -> Result<Option<Self>> {
        let needed = record.hardware.memory_bytes().saturating_mul(2) + MARGIN;
        let free = probe::free_memory().map_err(Error::host("cannot measure memory"))?;
        if free < needed {
            tracing::info!(free, needed, "no twin: too little memory");
            return Ok(None);
        }
        let work =
            Work::prepare_fork(vm, record, place, transfer, (Some(base), Vec::new())).await?;
        let ram = work.ram_path();
        let disks = work.disk_paths();
        let files = ForkFiles {
            runtime: work.runtime().to_owned(),
            disks: disks.clone(),
            device: work.device().to_vec(),
        };
        let fork = Fork::start(vm, record, files, options, since).await?;
        Ok(Some(Self {
            fork,
            ram,
            disks,
            base,
            given: 0,
        }))
    }

    /// Gives it what it lacks of all that was recorded since its base. It outlives lines, over
    /// which the target may be sent the same once more.
    pub(super) fn play(&mut self, log: &[Record]) -> Result<()> {
        let new = beyond(&mut self.given, log);
        if !new.is_empty() {
            self.fork.play(new.to_vec())?;
        }
        Ok(())
    }

    /// Has it live until this recorded time, once it has played what it was given.
    pub(super) async fn catch_up(&mut self, at: GuestTime) -> Result<()> {
        self.fork.idle(at, PATIENCE)?;
        let caught_up = tokio::time::timeout(PATIENCE, self.fork.done()).await;
        let report = caught_up.unwrap_or_else(|_| Err(too_long()))?;
        tracing::info!(missed = report.missed.len(), "the twin is as old as the VM");
        in_step(&report)
    }

    /// Waits until it has played what it was given, for so long at most.
    pub(super) async fn settle(&mut self, patience: Option<Duration>) -> Result<()> {
        let settle = async {
            self.fork.settle()?;
            let report = self.fork.done().await?;
            tracing::info!(missed = report.missed.len(), "the twin is done");
            in_step(&report)
        };
        let Some(patience) = patience else {
            return settle.await;
        };
        let settled = tokio::time::timeout(patience, settle);
        settled.await.unwrap_or_else(|_| Err(too_long()))
    }

    /// Stops it; the state it leaves.
    pub(super) async fn stop(self, vm: &VmDir, record: &VmRecord) -> Result<TwinState> {
        let device = self.fork.freeze().await?;
        let (vm, record) = (vm.clone(), record.clone());
        local::blocking(move || {
            let ram = RamMap::open(&self.ram).map_err(Error::host("cannot read the twin's RAM"))?;
            TwinState::new(&vm, &record, self.base, ram, &self.disks, device)
        })
        .await
    }

    /// Ends it at once.
    pub(super) async fn kill(self) {
        if let Err(error) = self.fork.kill().await {
            tracing::warn!(error = error.chain(), "could not end the twin");
        }
    }
}

/// What of a log that grows is beyond so many records; none of it is from then on.
fn beyond<'a>(given: &mut usize, log: &'a [Record]) -> &'a [Record] {
    let new = log.get(*given..).unwrap_or_default();
    *given = log.len().max(*given);
    new
}

/// A twin that went astray tells nothing of the target's replay.
fn in_step(report: &ReplayReport) -> Result<()> {
    match &report.diverged {
        None => Ok(()),
        Some(why) => Err(Error::Refused(format!(
            "the replay at this site went astray: {why}"
        ))),
    }
}

fn too_long() -> Error {
    Error::Refused("the replay at this site takes too long".into())
}

#[cfg(test)]
mod tests {
    use traces::Event;

    use super::*;

    #[test]
    fn no_record_is_given_twice_though_the_target_was_sent_it_again() {
        let log: Vec<Record> = (0..5)
            .map(|micros| Record {
                at: GuestTime { micros },
                event: Event::Gap,
            })
            .collect();
        let mut given = 0;
        assert_eq!(beyond(&mut given, &log[..3]), &log[..3]);
        assert_eq!(beyond(&mut given, &log[..3]), &[]);
        // A line was cut, and the log is read anew.
        assert_eq!(beyond(&mut given, &log[..2]), &[]);
        assert_eq!(beyond(&mut given, &log), &log[3..]);
    }
}
