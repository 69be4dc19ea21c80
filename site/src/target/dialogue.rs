//! The target's turns of a conversation: each message in its place, and what it asks for.

use std::time::Duration;

use traces::GuestTime;

use super::check::check_known;
use super::receive::{receive_file, receive_layout, receive_log, receive_rearrangement};
use super::turn::Turn;
use super::{Ended, Session, standby};
use crate::error::{Error, Result};
use crate::generations::seen;
use crate::line::TargetLine;
use crate::phase::Phase;
use crate::protocol::{CommitRequest, Purpose, ToSource, ToTarget};
use crate::report::Strategy;
use crate::work::Work;

/// How long the source may take to say how the VM goes on, once it is here.
const RESUME_LIMIT: Duration = Duration::from_secs(10);

impl Session {
    /// The conversation after hello. The line is taken out where the images are received.
    pub(super) async fn run(&mut self, line: &mut Option<TargetLine>) -> Result<(), Ended> {
        let outcome = match line.as_mut() {
            Some(open) => {
                if let Purpose::Settle(transfer) = self.hello.purpose {
                    self.settle(open, transfer).await
                } else {
                    match self.welcome().await {
                        Ok(welcome) => {
                            match open.send(ToSource::Welcome(Box::new(welcome))).await {
                                Ok(()) if self.hello.purpose == Purpose::Supply => {
                                    self.supplied(open).await
                                }
                                Ok(()) => self.dialogue(line).await,
                                Err(error) => Err(error),
                            }
                        }
                        Err(error) => Err(error),
                    }
                }
            }
            None => Ok(()),
        };
        outcome.map_err(|error| Ended {
            error,
            line: line.take(),
        })
    }

    async fn dialogue(&mut self, slot: &mut Option<TargetLine>) -> Result<()> {
        loop {
            let Some(line) = slot.as_mut() else {
                return Ok(());
            };
            let message = match self.next(line).await {
                Ok(message) => message,
                // Seeds and questions end when the source has nothing more to say.
                Err(Error::Line {
                    source: crate::transport::WireError::Closed,
                    ..
                }) if self.hello.purpose != Purpose::Migrate || self.committed => {
                    return Ok(());
                }
                Err(error) => return Err(error),
            };
            self.check_place(&message)?;
            match message {
                ToTarget::Probe(_) => {
                    line.send(ToSource::Probed).await?;
                    line.flush().await?;
                }
                ToTarget::File(file) => {
                    self.phase = Phase::Base;
                    receive_file(&self.store, line, &self.hello.vm, file).await?;
                }
                ToTarget::Later { disk } => {
                    self.phase = Phase::Base;
                    self.begin_later(line, disk).await?;
                }
                ToTarget::Blocks(blocks) => {
                    self.take_blocks(blocks).await?;
                    line.send(ToSource::Took).await?;
                    line.flush().await?;
                }
                ToTarget::Rest { disk } => {
                    let absent = self.end_of_later(line, disk).await?;
                    self.later.insert(disk, absent);
                }
                ToTarget::Generation { manifest, base } => {
                    self.phase = Phase::Base;
                    if manifest.vm != self.hello.vm.id
                        || !self.hello.generations.contains(&manifest.identity())
                    {
                        return Err(line.unexpected(self.phase, "a generation it did not name"));
                    }
                    self.shipping = Some(*manifest);
                    self.received = None;
                    self.work = Some(self.prepare(base).await?);
                }
                ToTarget::Image(first) => {
                    let (Some(mut state), Some(line)) = (self.work.take(), slot.take()) else {
                        return Err(self.out_of_place("an image"));
                    };
                    self.phase = Phase::Device;
                    self.mixed = true;
                    if let Some(note) = self.note() {
                        state.keep_note(note);
                    }
                    let (state, line, received) = state.receive(line, first).await;
                    *slot = Some(line);
                    self.work = Some(state);
                    self.received = Some(received?);
                    self.phase = Phase::Verify;
                }
                ToTarget::Publish => self.publish(line).await?,
                ToTarget::Plan(chosen) => {
                    self.plan = Some(chosen);
                    self.phase = Phase::Base;
                }
                ToTarget::Prepare => self.prepare_planned().await?,
                ToTarget::Follow { part, at } => {
                    self.phase = Phase::Replay;
                    // Whoever follows calls again by themselves, and says how far they are.
                    line.set_patience(Duration::ZERO);
                    let records = receive_log(line, part, true).await?;
                    self.follow(records, GuestTime { micros: at }).await?;
                    // It may take a while until it is played; that the line lives is said at once.
                    line.send(ToSource::Probed).await?;
                    line.flush().await?;
                }
                ToTarget::CatchUp { at } => {
                    // The VM moves from here on.
                    line.set_patience(standby::PATIENCE);
                    let summary = self.catch_up(line, GuestTime { micros: at }).await?;
                    line.send(ToSource::Replayed(summary)).await?;
                    line.flush().await?;
                }
                ToTarget::Leave => return Ok(()),
                ToTarget::Log(part) => {
                    self.phase = Phase::Log;
                    let records = receive_log(line, part, false).await?;
                    self.phase = Phase::Replay;
                    let summary = self.replay(line, records).await?;
                    line.send(ToSource::Replayed(summary)).await?;
                    line.flush().await?;
                }
                ToTarget::Freeze => {
                    self.phase = Phase::Stop;
                    self.following = None;
                    if let Some(fork) = self.fork.take()
                        && let Some(state) = self.work.take()
                    {
                        self.work = Some(state.replayed(fork.freeze().await?).await?);
                    }
                }
                ToTarget::Layout(part) => {
                    let Some(state) = self.work.as_mut() else {
                        return Err(self.out_of_place("a layout"));
                    };
                    state.set_layout(receive_layout(line, part, state.ram_pages()).await?);
                }
                ToTarget::Rearrangement(part) => {
                    let Some(state) = self.work.as_mut() else {
                        return Err(self.out_of_place("the order of a device state"));
                    };
                    state.set_rearrangement(receive_rearrangement(line, part).await?);
                }
                ToTarget::Rounds => {
                    let (Some(work), Some(received)) = (self.work.as_mut(), self.received.take())
                    else {
                        return Err(self.out_of_place("rounds"));
                    };
                    self.phase = Phase::Rounds;
                    work.begin_rounds(received)?;
                }
                ToTarget::Changed { kind, part } => {
                    let (Some(work), Some(line)) = (self.work.take(), slot.take()) else {
                        return Err(self.out_of_place("pages"));
                    };
                    let (work, line) = work.receive_changed(line, kind, part).await?;
                    *slot = Some(line);
                    self.work = Some(work);
                }
                ToTarget::RoundEnd => {
                    let ended = match self.work.as_mut() {
                        Some(work) => work.end_round().await?,
                        None => None,
                    };
                    let Some((ram, disks)) = ended else {
                        return Err(self.out_of_place("the end of a round"));
                    };
                    line.send(ToSource::Rounded { ram, disks }).await?;
                    line.flush().await?;
                }
                ToTarget::Commit(request) => self.take_over(line, *request).await?,
                _ => return Err(self.out_of_place("a message")),
            }
        }
    }

    /// Lets the working copy for a plan begin.
    async fn prepare_planned(&mut self) -> Result<()> {
        let Some(plan) = self.plan else {
            return Err(self.out_of_place("prepare"));
        };
        let base = self.base_of(&plan)?;
        self.mixed = false;
        self.received = None;
        let mut work = self.prepare(base).await?;
        tracing::debug!("there is a working copy");
        if plan.strategy != Strategy::Replay {
            work.hash_ahead();
        }
        self.work = Some(work);
        Ok(())
    }

    /// A generation that was shipped ahead is whole: it is kept.
    async fn publish(&mut self, line: &mut TargetLine) -> Result<()> {
        let (Some(state), Some(trees), Some(manifest)) =
            (self.work.take(), self.received.take(), self.shipping.take())
        else {
            return Err(self.out_of_place("publish"));
        };
        self.phase = Phase::Base;
        let kept = state.keep(trees, manifest).await?;
        self.note_vm(check_known(&self.vm, &self.hello, &self.peer)?)?;
        seen::shared(&self.vm, &self.peer, kept.manifest.identity())?;
        line.send(ToSource::Published).await?;
        line.flush().await
    }

    /// The VM becomes this site's, and goes on here.
    async fn take_over(&mut self, line: &mut TargetLine, request: CommitRequest) -> Result<()> {
        let (Some(state), Some(trees)) = (self.work.take(), self.received.take()) else {
            return Err(self.out_of_place("commit"));
        };
        self.phase = Phase::Commit;
        let kept = self.commit(state, trees, request).await?;
        // The VM is here now, whatever became of the source: it goes on.
        let told = match line.send(ToSource::Committed).await {
            Ok(()) => line.flush().await,
            Err(error) => Err(error),
        };
        self.phase = Phase::Resume;
        let paused = told.is_ok()
            && matches!(
                // The user waits: a line that went silent just now is not waited for.
                tokio::time::timeout(RESUME_LIMIT, line.receive(self.phase)).await,
                Ok(Ok(ToTarget::Resume { paused: true }))
            );
        self.resume(kept, paused).await?;
        line.send(ToSource::Resumed).await?;
        line.flush().await
    }

    /// The next message; a replay that follows meanwhile says how it gets on.
    async fn next(&mut self, line: &mut TargetLine) -> Result<ToTarget> {
        if self.following.is_some() {
            self.next_while_following(line).await
        } else {
            line.receive(self.phase).await
        }
    }

    /// Whether a message may come now.
    fn check_place(&self, message: &ToTarget) -> Result<()> {
        let turn = Turn {
            purpose: &self.hello.purpose,
            follows: self.hello.follows,
            locked: self.lock.is_some(),
            strategy: self.plan.map(|plan| plan.strategy),
            work: self.work.is_some(),
            received: self.received.is_some(),
            rounds: self.work.as_ref().is_some_and(Work::in_rounds),
            fork: self.fork.is_some(),
            following: self.following.is_some(),
            committed: self.committed,
        };
        if turn.allows(message) {
            Ok(())
        } else {
            Err(self.out_of_place("a message"))
        }
    }

    pub(super) fn out_of_place(&self, what: &str) -> Error {
        Error::Protocol {
            site: self.peer.name.to_string(),
            phase: self.phase,
            what: format!("{what} where it has no place"),
        }
    }
}
