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
    playing: bool,
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
        let work = Work::prepare_fork(vm, record, place, transfer, Some(base)).await?;
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
            playing: false,
        }))
    }

    /// Gives it the same piece of the log as the target.
    pub(super) fn play(&mut self, records: Vec<Record>) -> Result<()> {
        self.playing = true;
        self.fork.play(records)
    }

    /// Has it live until this recorded time, once it has played what it was given.
    pub(super) async fn catch_up(&mut self, at: GuestTime) -> Result<()> {
        self.fork.idle(at, PATIENCE)?;
        let caught_up = tokio::time::timeout(PATIENCE, self.fork.done()).await;
        let report = caught_up.unwrap_or_else(|_| Err(too_long()))?;
        self.playing = false;
        tracing::info!(missed = report.missed.len(), "the twin is as old as the VM");
        in_step(&report)
    }

    /// Waits until it has played what it was given, for so long at most.
    pub(super) async fn settle(&mut self, patience: Option<Duration>) -> Result<()> {
        let settle = async {
            if self.playing {
                self.fork.done().await?;
                self.playing = false;
                self.fork.settle()?;
                let report = self.fork.done().await?;
                tracing::info!(missed = report.missed.len(), "the twin is done");
                in_step(&report)?;
            }
            Ok(())
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
