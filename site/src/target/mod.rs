//! The target's part of a migration, a seed, or a question.
//!
//! Until Commit the target holds a working folder and perhaps a fork of the VM, and nothing
//! else: when a conversation ends early, in whatever way, both go.

mod check;
mod commit;
mod cost;
mod receive;
mod replay;
mod standby;
mod turn;
mod waiting;

use tokio_util::sync::CancellationToken;
use traces::GuestTime;

use crate::error::{Error, Result};
use crate::files::{self, FileLock};
use crate::fork::Fork;
use crate::generation::Manifest;
use crate::generations::seen;
use crate::line::TargetLine;
use crate::local::{self};
use crate::phase::Phase;
use crate::protocol::{Hello, Plan, Purpose, ToSource, ToTarget, Welcome};
use crate::store::{Store, VmDir};
use crate::work::{Received, Work, Workplace};

use check::{check_allowed, check_host};
use cost::Meter;
use receive::{receive_file, receive_layout, receive_log, receive_rearrangement};
use turn::Turn;
use waiting::Waiting;

pub(crate) use check::check_known;
pub(crate) use standby::Standbys;

/// How long the source may take to say how the VM goes on, once it is here.
const RESUME_LIMIT: std::time::Duration = std::time::Duration::from_secs(10);

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
    let begun = match check_allowed(line.peer(), &hello) {
        Ok(()) => standbys.resume(line.peer(), &hello).await,
        Err(error) => Err(error),
    };
    let begun = match begun {
        Ok(Some(standby)) => Ok(*standby),
        Ok(None) => Session::begin(store, &line, *hello).await,
        Err(error) => Err(error),
    };
    let mut session = match begun {
        Ok(session) => session,
        Err(error) => {
            tracing::warn!(peer, vm = %name, error = error.chain(), "refused");
            let _ = line.send(ToSource::Refused(error.chain())).await;
            line.close().await;
            return;
        }
    };
    let transfer = session.hello.transfer;
    let caller = line.peer().clone();
    session.superseded = standbys.begin(&caller, transfer);
    converse_on(session, standbys, line).await;
    standbys.end(&caller, transfer);
}

/// The conversation after its beginning.
async fn converse_on(mut session: Session, standbys: &Standbys, line: TargetLine) {
    let peer = line.peer().name.to_string();
    let name = session.vm.name().clone();
    let outcome = session.run(&mut Some(line)).await;
    if let Err(Ended { error, .. }) = &outcome {
        tracing::warn!(peer, vm = %name, error = error.chain(), "it ended early");
        if error.is_disconnect() && session.follows() {
            standbys.park(session);
            return;
        }
    }
    let cleaned = session.clean().await;
    if let Err(error) = cleaned {
        tracing::error!(vm = %name, error = error.chain(), "could not clean up");
    }
    if let Err(Ended {
        error,
        line: Some(mut line),
    }) = outcome
    {
        let reason = error.chain();
        let _ = line
            .send(ToSource::Failed {
                phase: session.phase,
                reason,
            })
            .await;
        line.close().await;
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
    peer: crate::peers::Peer,
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
    /// The pieces that it has not played yet.
    pieces: Waiting,
    /// Measures what following costs.
    meter: Option<Meter>,
    committed: bool,
    /// Another call takes the place of this one.
    superseded: CancellationToken,
}

impl Session {
    /// Checks what would fail later; what it says is for the person at the source.
    async fn begin(store: &Store, line: &TargetLine, hello: Hello) -> Result<Self> {
        hello.validate()?;
        let vm = store.vm(&hello.vm.name);
        let session = |lock| Self {
            store: store.clone(),
            vm: vm.clone(),
            peer: line.peer().clone(),
            phase: Phase::Hello,
            lock,
            plan: None,
            shipping: None,
            work: None,
            received: None,
            fork: None,
            following: None,
            pieces: Waiting::default(),
            meter: None,
            committed: false,
            superseded: CancellationToken::new(),
            hello: hello.clone(),
        };
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
                    let (Some(state), Some(line)) = (self.work.take(), slot.take()) else {
                        return Err(self.out_of_place("an image"));
                    };
                    self.phase = Phase::Device;
                    let (state, line, trees) = state.receive(line, first).await?;
                    self.phase = Phase::Verify;
                    *slot = Some(line);
                    self.work = Some(state);
                    self.received = Some(trees);
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
                    self.received = None;
                    self.work = Some(self.prepare(base).await?);
                }
                ToTarget::Follow { part, at } => {
                    self.phase = Phase::Replay;
                    let records = receive_log(line, part, true).await?;
                    self.follow(records, GuestTime { micros: at }).await?;
                    // It may take a while until it is played; that the line lives is said at once.
                    line.send(ToSource::Probed).await?;
                    line.flush().await?;
                }
                ToTarget::CatchUp { at } => {
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
