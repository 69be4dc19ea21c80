//! The fork at the target: replays a whole log once the user wants to move, or follows the user
//! while they work.

use std::time::{Duration, Instant};

use replayer::Options;
use traces::{GuestTime, Record};

use super::Session;
use super::cost::Meter;
use crate::error::{Error, Result};
use crate::fork::{Fork, ForkFiles, Played, following_from, pace_of};
use crate::line::TargetLine;
use crate::phase::Phase;
use crate::protocol::{ToSource, ToTarget};
use crate::report::ReplaySummary;
use crate::work::Work;

/// A source that is followed says something at least so often; after this it can't be heard any
/// more.
const SILENCE: Duration = Duration::from_secs(30);

/// How long a fork may idle to be as old as its source.
const CATCH_UP: Duration = Duration::from_secs(10);

impl Session {
    async fn start_fork(&self, options: Options, since: Option<Instant>) -> Result<Fork> {
        let Some(work) = &self.work else {
            return Err(self.out_of_place("a replay"));
        };
        let files = ForkFiles {
            runtime: work.runtime().to_owned(),
            disks: work.disk_paths(),
            device: work.device().to_vec(),
        };
        Fork::start(&self.vm, &self.hello.vm, files, options, since).await
    }

    /// Whether there is a fork that follows the source.
    pub(super) fn follows(&self) -> bool {
        self.following.is_some() && self.fork.is_some()
    }

    /// Queues a piece of the log for the fork that follows, and says how it gets on.
    pub(super) async fn follow(&mut self, records: Vec<Record>, at: GuestTime) -> Result<()> {
        if self.fork.is_none() {
            let (options, since) = (following_from(&records, at), Instant::now());
            let fork = self.start_fork(options, Some(since)).await?;
            let ram = self.work.as_ref().map(Work::ram_path).unwrap_or_default();
            self.meter = measured(Meter::start(fork.pid(), ram, since));
            self.fork = Some(fork);
        }
        self.pieces.push(&records, at)?;
        if let Some(fork) = self.fork.as_mut() {
            // Also an empty piece: when it is done, so is what came before it.
            fork.play(records)?;
        }
        self.given = self.pieces.records();
        self.following = Some(self.given);
        Ok(())
    }

    /// The next message; meanwhile the fork that follows says how it gets on.
    pub(super) async fn next_while_following(&mut self, line: &mut TargetLine) -> Result<ToTarget> {
        let silent = tokio::time::sleep(SILENCE);
        tokio::pin!(silent);
        loop {
            let Some(fork) = self.fork.as_mut() else {
                return line.receive(self.phase).await;
            };
            let report = tokio::select! {
                message = line.receive(Phase::Replay) => return message,
                () = &mut silent => return Err(Error::Line {
                    site: self.peer.name.to_string(),
                    source: crate::transport::WireError::Silent(SILENCE),
                }),
                played = fork.played(), if fork.pending() > 0 => match played? {
                    Played::Done(report) => report,
                    Played::Progress(_) => continue,
                },
            };
            let Some(at) = self.pieces.played() else {
                return Err(self.out_of_place("a piece of the log"));
            };
            let cost = match self.meter.as_mut() {
                Some(meter) => measured(meter.look().await),
                None => None,
            };
            line.send(ToSource::Following {
                records: self.following.unwrap_or_default(),
                at: at.micros,
                missed: report.missed.len() as u64,
                cost,
            })
            .await?;
            line.flush().await?;
        }
    }

    /// Has the fork that follows play all it has, and live until this recorded time.
    pub(super) async fn catch_up(
        &mut self,
        line: &mut TargetLine,
        at: GuestTime,
    ) -> Result<ReplaySummary> {
        let Some(fork) = self.fork.as_mut() else {
            return Err(self.out_of_place("a replay"));
        };
        fork.idle(at, CATCH_UP)?;
        let caught_up = tokio::select! {
            report = fork.done() => ReplaySummary::of(&report?),
            said = line.receive(Phase::Replay) => {
                said?;
                return Err(self.out_of_place("a message during the replay"));
            }
        };
        self.pieces.clear();
        // The user waits: memory is as it was some seconds ago.
        let cost = self.meter.as_ref().map(Meter::glance);
        Ok(ReplaySummary {
            standby: cost.and_then(measured),
            ..caught_up
        })
    }

    /// Replays one piece of the log, and what was queued before it, to the end, and tells the
    /// source how it gets on.
    pub(super) async fn replay(
        &mut self,
        line: &mut TargetLine,
        records: Vec<Record>,
    ) -> Result<ReplaySummary> {
        if self.fork.is_none() {
            let quick = self.plan.is_some_and(|plan| plan.quick);
            self.fork = Some(self.start_fork(pace_of(quick), None).await?);
        }
        // From here on nobody can go on with it on another line.
        self.following = None;
        let Some(fork) = self.fork.as_mut() else {
            return Err(self.out_of_place("a replay"));
        };
        self.given += records.len() as u64;
        fork.play(records)?;
        fork.settle()?;
        loop {
            let played = tokio::select! {
                played = fork.played() => played?,
                // The source has nothing to say now: this is how it is noticed that it went away.
                said = line.receive(Phase::Replay) => {
                    said?;
                    return Err(self.out_of_place("a message during the replay"));
                }
            };
            match played {
                Played::Progress(progress) => {
                    let done = progress.played.as_millis() as u64;
                    let total = progress.of_recorded.as_millis() as u64;
                    line.send(ToSource::Replaying { done, total }).await?;
                    line.flush().await?;
                }
                Played::Done(report) if fork.pending() == 0 => {
                    return Ok(ReplaySummary::of(&report));
                }
                Played::Done(_) => {}
            }
        }
    }
}

/// What it costs is good to know, and no condition.
fn measured<T>(outcome: Result<T>) -> Option<T> {
    outcome
        .map_err(|error| {
            tracing::warn!(
                error = error.chain(),
                "what following costs can't be measured"
            );
        })
        .ok()
}
