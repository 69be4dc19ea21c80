//! Replaying a log here, to see how it goes: on a fork that is thrown away.

use std::path::Path;

use replayer::Options;
use traces::Log;

use crate::error::{Error, Result};
use crate::fork::{Fork, ForkFiles, Played};
use crate::phase::Phase;
use crate::progress::Progress;
use crate::report::ReplaySummary;
use crate::store::VmDir;
use crate::vm::Id;
use crate::work::{Work, Workplace};

/// Replays a log of a VM on a fork of the generation that the log continues, and throws the fork
/// away, however it ends.
pub async fn replay_and_discard(
    vm: &VmDir,
    log: &Path,
    speed: f64,
    progress: &dyn Progress,
) -> Result<ReplaySummary> {
    let record = vm.record()?;
    let log = Log::read(log, &vm.store().log_key()?)
        .map_err(Error::log(format!("cannot read the log {}", log.display())))
        .and_then(|read| {
            read.header
                .expect(log, record.id.0, read.header.id.generation)
                .map_err(Error::log("this log can't be replayed here"))?;
            Ok(read)
        })
        // Nothing has been touched yet.
        .map_err(|error| Error::Refused(error.chain()))?;
    let number = log.header.id.generation;
    if vm.generation(number).load_manifest()?.is_none() {
        return Err(Error::Refused(format!(
            "the log continues generation {number} of {}, which is not here any more",
            vm.name()
        )));
    }
    // Held against a migration that arrives: both work in the same place.
    let _lock = vm.lock()?;
    Workplace::Incoming.clear(vm).await?;
    let outcome = async {
        progress.phase(Phase::Replay);
        let work = Work::prepare_fork(
            vm,
            &record,
            Workplace::Incoming,
            Id::random()?,
            Some(number),
        )
        .await?;
        let files = ForkFiles {
            runtime: work.runtime().to_owned(),
            disks: work.disk_paths(),
            device: work.device().to_vec(),
        };
        let options = Options {
            speed,
            ..Options::default()
        };
        let mut fork = Fork::start(vm, &record, files, options).await?;
        let played = async {
            fork.play(log.records)?;
            while let Played::Progress(so_far) = fork.played().await? {
                progress.advance(
                    Phase::Replay,
                    so_far.played.as_millis() as u64,
                    Some(so_far.of_recorded.as_millis() as u64),
                );
            }
            fork.settle()?;
            Ok(ReplaySummary::of(&fork.done().await?))
        };
        let summary = played.await;
        fork.kill().await?;
        summary
    };
    let outcome = outcome.await;
    Workplace::Incoming.clear(vm).await?;
    outcome
}
