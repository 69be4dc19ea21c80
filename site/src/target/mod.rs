//! The target's part of a migration, a seed, or a question.
//!
//! Until Commit the target holds a working folder and perhaps a fork of the VM, and nothing
//! else: when a conversation is called off or fails, both go. When its line is lost they wait for
//! a while for another attempt, see [`standby`].

mod check;
mod commit;
mod cost;
mod dialogue;
mod parcel;
mod receive;
mod replay;
mod revive;
mod standby;
mod supply;
mod turn;
mod waiting;

use std::collections::BTreeMap;

use reconciler::PageSet;

use crate::arriving::Arrivals;
use crate::error::{Error, Result};
use crate::files::{self, FileLock};
use crate::fork::Fork;
use crate::generation::Manifest;
use crate::generations::seen;
use crate::hub;
use crate::leftovers;
use crate::line::{CALL_AGAIN, TargetLine};
use crate::local;
use crate::peers::Peer;
use crate::phase::Phase;
use crate::protocol::{Hello, Kept, Plan, Purpose, Stage, ToSource, ToTarget, Welcome};
use crate::store::{Store, VmDir};
use crate::vm::{BaseFile, VmName};
use crate::work::{KeptNote, Received, Work, Workplace};

use check::{check_allowed, check_host, superseded};
use cost::Meter;
use waiting::Waiting;

pub(crate) use check::check_known;
pub(crate) use parcel::take_parcel;
pub(crate) use revive::revive;
pub(crate) use standby::Standbys;

/// Talks with one peer until it is done; the VM of which a generation may have come.
pub(crate) async fn converse(
    store: &Store,
    standbys: &Standbys,
    arrivals: &Arrivals,
    hub_room: u64,
    mut line: TargetLine,
) -> Option<VmName> {
    let peer = line.peer().name.to_string();
    let hello = match line.receive(Phase::Hello).await {
        Ok(ToTarget::Hello(hello)) => hello,
        Ok(first @ (ToTarget::Deposit { .. } | ToTarget::Collect(_))) => {
            Box::pin(hub::serve(store, hub_room, line, first)).await;
            return None;
        }
        Ok(_) => {
            tracing::warn!(peer, "a peer did not begin with hello");
            return None;
        }
        Err(error) => {
            tracing::warn!(peer, error = error.chain(), "a peer said nothing");
            return None;
        }
    };
    let name = hello.vm.name.clone();
    let purpose = hello.purpose.clone();
    tracing::info!(peer, vm = %name, ?purpose, "a peer calls");
    let session = match open(store, standbys, &line, *hello).await {
        Ok(session) => Session {
            arrivals: arrivals.clone(),
            ..session
        },
        Err(error) => {
            tracing::warn!(peer, vm = %name, error = error.chain(), "refused");
            let answer = match error.superseded() {
                Some((fence, chain)) => ToSource::Superseded {
                    fence,
                    chain: chain.clone(),
                },
                None => ToSource::Refused(error.chain()),
            };
            let _ = line.send(answer).await;
            line.close().await;
            return None;
        }
    };
    if session.hello.purpose == Purpose::Supply {
        line.set_patience(CALL_AGAIN);
    } else if session.lock.is_some() && !session.follows() {
        line.set_patience(match session.hello.purpose {
            Purpose::Migrate => standby::PATIENCE,
            _ => CALL_AGAIN,
        });
    }
    let call = standbys.begin(&line, &session.hello);
    Box::pin(converse_on(session, standbys, line)).await;
    standbys.end(&call);
    (purpose == Purpose::Seed).then_some(name)
}

/// Begins what is asked for, or goes on with what was kept of it.
async fn open(
    store: &Store,
    standbys: &Standbys,
    line: &TargetLine,
    hello: Hello,
) -> Result<Session> {
    check_allowed(line.peer(), &hello)?;
    if let Some((fence, chain)) = superseded(store, line.peer(), &hello).await? {
        return Err(Error::Superseded {
            site: line.peer().name.to_string(),
            fence,
            chain: Box::new(chain),
        });
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
    /// Disk images that are on their way here.
    arrivals: Arrivals,
    /// Of each disk whose image comes after the VM, the pages that come then.
    later: BTreeMap<u8, PageSet>,
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
            arrivals: Arrivals::default(),
            later: BTreeMap::new(),
            hello,
        }
    }

    /// Checks what would fail later; what it says is for the person at the source.
    async fn begin(store: &Store, line: &TargetLine, hello: Hello) -> Result<Self> {
        hello.validate()?;
        let vm = store.vm(&hello.vm.name);
        let session = |lock| Self::new(&vm, line.peer().clone(), hello.clone(), lock);
        if !matches!(hello.purpose, Purpose::Migrate | Purpose::Seed) {
            return Ok(session(None));
        }
        check_known(&vm, &hello, line.peer())?;
        vm.make()?;
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
            .filter(|_| self.hello.purpose == Purpose::Migrate && self.shipping.is_none())
            // What the two agreed upon of the images is not kept.
            .filter(|_| self.later.is_empty())?;
        let hello = self.hello.clone();
        Some(KeptNote::new(self.peer.key, hello, plan, standby::PATIENCE))
    }

    /// Whether another attempt could go on with what is here.
    fn is_worth_keeping(&self) -> bool {
        self.hello.purpose == Purpose::Migrate
            && !self.committed
            && self.later.is_empty()
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
        let disks = self.hello.vm.disks.iter().zip(0_u8..);
        // Only a working copy of the bare images can do with less than all of them.
        let later = |index| self.later.get(&index).filter(|_| base.is_none());
        let absent: Vec<_> = disks
            .clone()
            .map(|(_, index)| later(index).cloned())
            .collect();
        for file in self.hello.vm.base_files() {
            let comes =
                |(disk, index): (&BaseFile, u8)| disk.hash == file.hash && later(index).is_some();
            if self.store.base_file(file.hash).is_none() && !disks.clone().any(comes) {
                return Err(Error::Refused(format!(
                    "the base file {} is not here",
                    file.hash
                )));
            }
        }
        let absent = absent.into_iter().map(Option::unwrap_or_default).collect();
        let (vm, transfer) = (&self.hello.vm, self.hello.transfer);
        Work::prepare(&self.vm, vm, transfer, base, absent).await
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
            leftovers::remove_vm(&self.vm)?;
        }
        Ok(())
    }
}
