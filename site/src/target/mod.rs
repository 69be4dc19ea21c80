//! The target's part of a migration, a seed, or a question.
//!
//! Until Commit the target holds a working folder and perhaps a fork of the VM, and nothing
//! else: when a conversation is called off or fails, both go. When its line is lost they wait for
//! a while for another attempt, see [`standby`].

mod check;
mod commit;
mod cost;
mod receive;
mod replay;
mod revive;
mod standby;
mod turn;
mod waiting;

use std::time::Duration;

use traces::GuestTime;

use crate::error::{Error, Result};
use crate::files::{self, FileLock};
use crate::fork::Fork;
use crate::generation::Manifest;
use crate::generations::seen;
use crate::line::{CALL_AGAIN, TargetLine};
use crate::local::{self};
use crate::peers::Peer;
use crate::phase::Phase;
use crate::protocol::{Hello, Kept, Plan, Purpose, Stage, ToSource, ToTarget, Welcome};
use crate::report::Strategy;
use crate::store::{Store, VmDir};
use crate::work::{KeptNote, Received, Work, Workplace};

use check::{check_allowed, check_host, superseded};
use cost::Meter;
use receive::{receive_file, receive_layout, receive_log, receive_rearrangement};
use turn::Turn;
use waiting::Waiting;

pub(crate) use check::check_known;
pub(crate) use revive::{clear_half_files, revive};
pub(crate) use standby::Standbys;

/// How long the source may take to say how the VM goes on, once it is here.
const RESUME_LIMIT: Duration = Duration::from_secs(10);

/// Talks with one peer until it is done.
pub(crate) async fn converse(store: &Store, standbys: &Standbys, mut line: TargetLine) {
    let peer = line.peer().name.to_string();
    let hello = match line.receive(Phase::Hello).await {
        Ok(ToTarget::Hello(hello)) => hello,
        Ok(_) => {
            tracing::warn!(peer, "a peer did not begin with hello");
            return;
        }
        Err(error) => {
            tracing::warn!(peer, error = error.chain(), "a peer said nothing");
            return;
        }
    };
    let name = hello.vm.name.clone();
    let purpose = hello.purpose.clone();
    tracing::info!(peer, vm = %name, ?purpose, "a peer calls");
    let session = match open(store, standbys, &line, *hello).await {
        Ok(session) => session,
        Err(error) => {
            tracing::warn!(peer, vm = %name, error = error.chain(), "refused");
            let answer = match error.superseded() {
                Some(fence) => ToSource::Superseded { fence },
                None => ToSource::Refused(error.chain()),
            };
            let _ = line.send(answer).await;
            line.close().await;
            return;
        }
    };
    if session.lock.is_some() && !session.follows() {
        line.set_patience(match session.hello.purpose {
            Purpose::Migrate => standby::PATIENCE,
            _ => CALL_AGAIN,
        });
    }
    let call = standbys.begin(&line, &session.hello);
    converse_on(session, standbys, line).await;
    standbys.end(&call);
}

/// Begins what is asked for, or goes on with what was kept of it.
async fn open(
    store: &Store,
    standbys: &Standbys,
    line: &TargetLine,
    hello: Hello,
) -> Result<Session> {
    check_allowed(line.peer(), &hello)?;
    if let Some(fence) = superseded(store, line.peer(), &hello).await? {
        let site = line.peer().name.to_string();
        return Err(Error::Superseded { site, fence });
    }
    match standbys.resume(line.peer(), &hello).await? {
        Some(kept) => Ok(*kept),
        None => Session::begin(store, line, hello).await,
    }
}

/// The conversation after its beginning.
async fn converse_on(mut session: Session, standbys: &Standbys, line: TargetLine) {
    let peer = line.peer().name.to_string();
    let name = session.vm.name().clone();
    let mut line = Some(line);
    let outcome = session.run(&mut line).await;
    if let Err(Ended { error, .. }) = &outcome {
        tracing::warn!(peer, vm = %name, error = error.chain(), "it ended early");
        if error.is_disconnect() && !error.is_called_off() && session.is_worth_keeping() {
            standbys.park(session);
            return;
        }
    }
    let cleaned = session.clean().await;
    if let Err(error) = cleaned {
        tracing::error!(vm = %name, error = error.chain(), "could not clean up");
    }
    // What was said last is to arrive.
    match outcome {
        Ok(()) => {
            if let Some(line) = line {
                line.close().await;
            }
        }
        Err(Ended {
            error,
            line: Some(mut line),
        }) => {
            let reason = error.chain();
            let _ = line
                .send(ToSource::Failed {
                    phase: session.phase,
                    reason,
                })
                .await;
            line.close().await;
        }
        Err(Ended { line: None, .. }) => {}
    }
}

/// Why a conversation ended early, with the line if it can still carry the reason.
struct Ended {
    error: Error,
    line: Option<TargetLine>,
}

struct Session {
    store: Store,
    vm: VmDir,
    hello: Hello,
    peer: Peer,
    phase: Phase,
    lock: Option<FileLock>,
    plan: Option<Plan>,
    /// The generation that is being shipped.
    shipping: Option<Manifest>,
    work: Option<Work>,
    received: Option<Received>,
    fork: Option<Fork>,
    /// Records that a replay has which follows the source.
    following: Option<u64>,
    /// Records that the fork has, whether or not it follows.
    given: u64,
    /// Images have begun to come into the working copy.
    mixed: bool,
    /// The pieces that it has not played yet.
    pieces: Waiting,
    /// Measures what following costs.
    meter: Option<Meter>,
    committed: bool,
}

impl Session {
    /// A conversation that has just begun.
    fn new(vm: &VmDir, peer: Peer, hello: Hello, lock: Option<FileLock>) -> Self {
        Self {
            store: vm.store().clone(),
            vm: vm.clone(),
            peer,
            phase: Phase::Hello,
            lock,
            plan: None,
            shipping: None,
            work: None,
            received: None,
            fork: None,
            following: None,
            given: 0,
            mixed: false,
            pieces: Waiting::default(),
            meter: None,
            committed: false,
            hello,
        }
    }

    /// Checks what would fail later; what it says is for the person at the source.
    async fn begin(store: &Store, line: &TargetLine, hello: Hello) -> Result<Self> {
        hello.validate()?;
        let vm = store.vm(&hello.vm.name);
        let session = |lock| Self::new(&vm, line.peer().clone(), hello.clone(), lock);
        if matches!(hello.purpose, Purpose::Settle(_) | Purpose::Estimate) {
            return Ok(session(None));
        }
        check_known(&vm, &hello, line.peer())?;
        files::make_dir(&vm.incoming())?;
        let lock = vm.lock_soon().await?;
        let mut session = session(Some(lock));
        if let Err(error) = session.make_room().await {
            session.clean().await?;
            return Err(error);
        }
        Ok(session)
    }

    /// With the lock held: checks once more what may have changed before, and clears away what
    /// others left.
    async fn make_room(&self) -> Result<()> {
        check_known(&self.vm, &self.hello, &self.peer)?;
        Workplace::Incoming.clear(&self.vm).await?;
        local::drop_stale_live(&self.vm).await?;
        check_host(&self.store, &self.hello).await
    }

    /// What there is of the attempt that this is about, for another call.
    fn kept(&self) -> Option<Kept> {
        let (plan, work) = (self.plan?, self.work.as_ref()?);
        let stage = if self.fork.is_some() {
            Stage::Replaying {
                records: self.given,
            }
        } else if self.mixed || work.has_replayed() {
            Stage::Frozen
        } else {
            Stage::Prepared
        };
        Some(Kept { plan, stage })
    }

    /// What is noted of it for an agent that comes after this one; nothing, where nobody could go
    /// on with it.
    fn note(&self) -> Option<KeptNote> {
        let plan = self
            .plan
            .filter(|_| self.hello.purpose == Purpose::Migrate && self.shipping.is_none())?;
        let hello = self.hello.clone();
        Some(KeptNote::new(self.peer.key, hello, plan, standby::PATIENCE))
    }

    /// Whether another attempt could go on with what is here.
    fn is_worth_keeping(&self) -> bool {
        self.hello.purpose == Purpose::Migrate
            && !self.committed
            && self.shipping.is_none()
            && self.kept().is_some()
    }

    /// Goes on with what an earlier line left.
    async fn go_on(&mut self) -> Result<()> {
        self.received = None;
        if std::mem::take(&mut self.mixed)
            && let Some(work) = self.work.take()
        {
            self.work = Some(work.take_stock().await?);
        }
        Ok(())
    }

    async fn welcome(&self) -> Result<Welcome> {
        let mine: Vec<_> = match self.vm.try_record()? {
            Some(record) if record.id == self.hello.vm.id => self
                .vm
                .generations()?
                .iter()
                .map(Manifest::identity)
                .collect(),
            _ => Vec::new(),
        };
        let common: Vec<_> = mine
            .into_iter()
            .filter(|id| self.hello.generations.contains(id))
            .collect();
        if self.lock.is_some() {
            seen::met(&self.vm, &self.peer, &common)?;
        }
        let lacks = self
            .hello
            .vm
            .base_files()
            .iter()
            .filter(|file| self.store.base_file(file.hash).is_none())
            .map(|file| file.hash)
            .collect();
        Ok(Welcome {
            common,
            lacks,
            qemu: local::qemu_version().await?,
            standby: self.following,
            kept: self.kept(),
        })
    }

    /// The conversation after hello. The line is taken out where the images are received.
    async fn run(&mut self, line: &mut Option<TargetLine>) -> Result<(), Ended> {
        let outcome = match line.as_mut() {
            Some(open) => {
                if let Purpose::Settle(transfer) = self.hello.purpose {
                    self.settle(open, transfer).await
                } else {
                    match self.welcome().await {
                        Ok(welcome) => {
                            match open.send(ToSource::Welcome(Box::new(welcome))).await {
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
                ToTarget::Publish => {
                    let (Some(state), Some(trees), Some(manifest)) =
                        (self.work.take(), self.received.take(), self.shipping.take())
                    else {
                        return Err(self.out_of_place("publish"));
                    };
                    self.phase = Phase::Base;
                    let kept = state.keep(trees, manifest).await?;
                    self.note_vm()?;
                    seen::shared(&self.vm, &self.peer, kept.manifest.identity())?;
                    line.send(ToSource::Published).await?;
                    line.flush().await?;
                }
                ToTarget::Plan(chosen) => {
                    self.plan = Some(chosen);
                    self.phase = Phase::Base;
                }
                ToTarget::Prepare => {
                    let Some(plan) = self.plan else {
                        return Err(self.out_of_place("prepare"));
                    };
                    let base = self.base_of(&plan)?;
                    self.mixed = false;
                    self.received = None;
                    let mut work = self.prepare(base).await?;
                    if plan.strategy != Strategy::Replay {
                        work.hash_ahead();
                    }
                    self.work = Some(work);
                }
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
                ToTarget::Commit(request) => {
                    let (Some(state), Some(trees)) = (self.work.take(), self.received.take())
                    else {
                        return Err(self.out_of_place("commit"));
                    };
                    self.phase = Phase::Commit;
                    let kept = self.commit(state, trees, *request).await?;
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
                    line.flush().await?;
                }
                _ => return Err(self.out_of_place("a message")),
            }
        }
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

    fn out_of_place(&self, what: &str) -> Error {
        Error::Protocol {
            site: self.peer.name.to_string(),
            phase: self.phase,
            what: format!("{what} where it has no place"),
        }
    }

    /// The generation that a plan rests on, checked against what is here.
    fn base_of(&self, plan: &Plan) -> Result<Option<u64>> {
        let Some(base) = plan.base else {
            return Ok(None);
        };
        let here = self.vm.generation(base.number).load_manifest()?;
        if here.is_none_or(|here| here.identity() != base) {
            return Err(Error::Refused(format!(
                "generation {} of {} is not here, or is another one: seed it again",
                base.number,
                self.vm.name()
            )));
        }
        Ok(Some(base.number))
    }

    async fn prepare(&self, base: Option<u64>) -> Result<Work> {
        for file in self.hello.vm.base_files() {
            if self.store.base_file(file.hash).is_none() {
                return Err(Error::Refused(format!(
                    "the base file {} is not here",
                    file.hash
                )));
            }
        }
        Work::prepare(&self.vm, &self.hello.vm, self.hello.transfer, base).await
    }

    /// Leaves nothing of a conversation but what it committed.
    async fn clean(&mut self) -> Result<()> {
        if let Some(fork) = self.fork.take() {
            fork.kill().await?;
        }
        if self.lock.is_none() {
            return Ok(());
        }
        Workplace::Incoming.clear(&self.vm).await?;
        if self.vm.try_record()?.is_none() {
            files::remove_dir(self.vm.dir())?;
        }
        Ok(())
    }
}
