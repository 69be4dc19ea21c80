//! Replaying a log here, to see how it goes: on a fork that is thrown away.

use std::path::{Path, PathBuf};

pub use replayer::Pace;
use replayer::{Divergence, Miss, Options, ReplayReport};
use serde::Serialize;
use traces::Log;

use crate::error::{Error, Result};
use crate::files;
use crate::fork::{Fork, ForkFiles, Played};
use crate::phase::Phase;
use crate::progress::Progress;
use crate::report::ReplaySummary;
use crate::store::VmDir;
use crate::vm::Id;
use crate::work::{Work, Workplace};

/// How to replay a log.
#[derive(Clone, Debug)]
pub struct ReplayOptions {
    /// How much quicker than life pauses pass.
    pub speed: f64,
    /// Whether they are waited out.
    pub pace: Pace,
    /// A folder to keep pictures of the first misses in. They are of the user's screen: only this
    /// user can read them.
    pub pictures: Option<PathBuf>,
}

/// How it went.
#[derive(Clone, Debug, Serialize)]
pub struct Replayed {
    /// In short.
    #[serde(flatten)]
    pub summary: ReplaySummary,
    /// Pauses that were not waited out, in seconds.
    pub saved_seconds: f64,
    /// Where it was given up, if it was.
    pub diverged: Option<Divergence>,
    /// Interactions that were left out because it was.
    pub skipped: usize,
    /// Each miss.
    pub misses: Vec<Miss>,
    /// Pictures kept, two a miss.
    pub pictures: usize,
}

impl Replayed {
    fn of(report: ReplayReport) -> Self {
        Self {
            summary: ReplaySummary::of(&report),
            saved_seconds: report.saved.as_secs_f64(),
            diverged: report.diverged,
            skipped: report.skipped,
            misses: report.missed,
            pictures: 0,
        }
    }

    /// Writes what was seen, and what is known of what was expected.
    fn keep_pictures(&mut self, dir: &Path) -> Result<()> {
        files::make_dir(dir)?;
        for miss in &self.misses {
            let Some(pictures) = &miss.pictures else {
                continue;
            };
            let millis = miss.at.micros / 1000;
            let both = [("seen", &pictures.seen), ("expected", &pictures.expected)];
            for (kind, picture) in both {
                let path = dir.join(format!("miss-{millis:09}-ms-{kind}.png"));
                let png = picture.png().map_err(Error::file("draw", &path))?;
                files::write_atomic(&path, &png)?;
                self.pictures += 1;
            }
        }
        Ok(())
    }
}

/// Replays a log of a VM on a fork of the generation that the log continues, and throws the fork
/// away, however it ends.
pub async fn replay_and_discard(
    vm: &VmDir,
    log: &Path,
    options: &ReplayOptions,
    progress: &dyn Progress,
) -> Result<Replayed> {
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
            (Some(number), Vec::new()),
        )
        .await?;
        let files = ForkFiles {
            runtime: work.runtime().to_owned(),
            disks: work.disk_paths(),
            device: work.device().to_vec(),
        };
        let playing = Options {
            speed: options.speed,
            pace: options.pace.clone(),
            ..Options::default()
        };
        let mut fork = Fork::start(vm, &record, files, playing, None).await?;
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
            fork.done().await
        };
        let summary = played.await;
        fork.kill().await?;
        summary
    };
    let outcome: Result<ReplayReport> = outcome.await;
    Workplace::Incoming.clear(vm).await?;
    let mut replayed = Replayed::of(outcome?);
    if let Some(dir) = &options.pictures {
        replayed.keep_pictures(dir)?;
    }
    Ok(replayed)
}
