//! The target's part of a migration, a seed, or a question.
//!
//! Until Commit the target holds a working folder and perhaps a fork of the VM, and nothing
//! else: when a conversation ends early, in whatever way, both go.

mod check;
mod commit;
mod receive;

use traces::Record;
use vm_host::Vm;

use crate::error::{Error, Result};
use crate::files::{self, FileLock};
use crate::fork::{Fork, ForkFiles, Played};
use crate::lease::Lease;
use crate::line::TargetLine;
use crate::local::{self};
use crate::phase::Phase;
use crate::protocol::{Hello, Plan, Purpose, ToSource, ToTarget, Welcome};
use crate::report::{ReplaySummary, Strategy};
use crate::store::{Store, VmDir};
use crate::work::{Received, Work};

use check::check_host;
use receive::{receive_file, receive_layout, receive_log};

/// How long the source may take to say how the VM goes on, once it is here.
const RESUME_LIMIT: std::time::Duration = std::time::Duration::from_secs(10);

/// Talks with one peer until it is done.
pub(crate) async fn converse(store: &Store, mut line: TargetLine) {
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
    let mut session = match Session::begin(store, &line, *hello).await {
        Ok(session) => session,
        Err(error) => {
            tracing::warn!(peer, vm = %name, error = error.chain(), "refused");
            let _ = line.send(ToSource::Refused(error.chain())).await;
            line.close().await;
            return;
        }
    };
    let outcome = session.run(&mut Some(line)).await;
    if let Err(Ended { error, line }) = &outcome {
        tracing::warn!(peer, vm = %name, error = error.chain(), "it ended early");
        let _ = line;
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
    fork: Option<Fork>,
    committed: bool,
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
            fork: None,
            committed: false,
            hello: hello.clone(),
        };
        if matches!(hello.purpose, Purpose::Settle(_) | Purpose::Estimate) {
            return Ok(session(None));
        }
        check_known(&vm, &hello)?;
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
        check_known(&self.vm, &self.hello)?;
        clean_leftovers(&self.vm).await?;
        local::drop_stale_live(&self.vm).await?;
        check_host(&self.store, &self.hello).await
    }

    async fn welcome(&self) -> Result<Welcome> {
        let mine: Vec<_> = match self.vm.try_record()? {
            Some(record) if record.id == self.hello.vm.id => self
                .vm
                .generations()?
                .iter()
                .map(crate::generation::Manifest::identity)
                .collect(),
            _ => Vec::new(),
        };
        let common = mine
            .into_iter()
            .filter(|id| self.hello.generations.contains(id))
            .collect();
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
        let mut work: Option<Work> = None;
        let mut received: Option<Received> = None;
        let mut shipping: Option<crate::generation::Manifest> = None;
        let mut plan: Option<Plan> = None;
        loop {
            let Some(line) = slot.as_mut() else {
                return Ok(());
            };
            let message = match line.receive(self.phase).await {
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
            self.check_place(&message, work.is_some(), received.is_some())?;
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
                    shipping = Some(*manifest);
                    received = None;
                    work = Some(self.prepare(base).await?);
                }
                ToTarget::Image(first) => {
                    let (Some(state), Some(line)) = (work.take(), slot.take()) else {
                        return Err(self.out_of_place("an image"));
                    };
                    self.phase = Phase::Device;
                    let (state, line, trees) = state.receive(line, first).await?;
                    self.phase = Phase::Verify;
                    *slot = Some(line);
                    work = Some(state);
                    received = Some(trees);
                }
                ToTarget::Publish => {
                    let (Some(state), Some(trees), Some(manifest)) =
                        (work.take(), received.take(), shipping.take())
                    else {
                        return Err(self.out_of_place("publish"));
                    };
                    self.phase = Phase::Base;
                    state.keep(trees, manifest).await?;
                    self.note_vm()?;
                    let line = self.line(slot)?;
                    line.send(ToSource::Published).await?;
                    line.flush().await?;
                }
                ToTarget::Plan(chosen) if self.hello.purpose == Purpose::Migrate => {
                    plan = Some(chosen);
                    self.phase = Phase::Base;
                }
                ToTarget::Prepare => {
                    let Some(plan) = plan else {
                        return Err(self.out_of_place("prepare"));
                    };
                    let base = self.base_of(&plan)?;
                    received = None;
                    work = Some(self.prepare(base).await?);
                }
                ToTarget::Log(part) => {
                    let replay = plan.is_some_and(|plan| plan.strategy == Strategy::Replay);
                    let (Some(state), true) = (&work, replay) else {
                        return Err(self.out_of_place("a log"));
                    };
                    self.phase = Phase::Log;
                    let records = receive_log(line, part).await?;
                    if self.fork.is_none() {
                        self.fork = Some(self.start_fork(state).await?);
                    }
                    self.phase = Phase::Replay;
                    let summary = self.replay(slot, records).await?;
                    let line = self.line(slot)?;
                    line.send(ToSource::Replayed(summary)).await?;
                    line.flush().await?;
                }
                ToTarget::Freeze => {
                    self.phase = Phase::Stop;
                    if let Some(fork) = self.fork.take()
                        && let Some(state) = work.take()
                    {
                        work = Some(state.replayed(fork.freeze().await?).await?);
                    }
                }
                ToTarget::Layout(part) => {
                    let Some(state) = work.as_mut() else {
                        return Err(self.out_of_place("a layout"));
                    };
                    state.set_layout(receive_layout(line, part, state.ram_pages()).await?);
                }
                ToTarget::Commit(request) => {
                    let (Some(state), Some(trees)) = (work.take(), received.take()) else {
                        return Err(self.out_of_place("commit"));
                    };
                    self.phase = Phase::Commit;
                    let kept = self.commit(state, trees, *request).await?;
                    let line = self.line(slot)?;
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
                    let line = self.line(slot)?;
                    line.send(ToSource::Resumed).await?;
                    line.flush().await?;
                }
                _ => return Err(self.out_of_place("a message")),
            }
        }
    }

    /// Whether a message may come now: what it is for, and what came before it.
    ///
    /// A question changes nothing; images are built while nobody else writes to them, and are
    /// not touched again once they are verified; and after a commit there is nothing to say.
    fn check_place(&self, message: &ToTarget, work: bool, received: bool) -> Result<()> {
        let migrates = self.hello.purpose == Purpose::Migrate;
        let possible = match message {
            ToTarget::Probe(_) => true,
            _ if self.lock.is_none() || self.committed => false,
            ToTarget::Generation { .. } | ToTarget::Prepare => self.fork.is_none(),
            ToTarget::Image(_) | ToTarget::Layout(_) => self.fork.is_none() && work && !received,
            ToTarget::Log(_) | ToTarget::Freeze => migrates && !received,
            ToTarget::Commit(_) => migrates && received,
            _ => true,
        };
        if possible {
            Ok(())
        } else {
            Err(self.out_of_place("a message"))
        }
    }

    fn line<'a>(&self, slot: &'a mut Option<TargetLine>) -> Result<&'a mut TargetLine> {
        slot.as_mut().ok_or_else(|| self.out_of_place("nothing"))
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

    async fn start_fork(&self, work: &Work) -> Result<Fork> {
        let files = ForkFiles {
            runtime: work.runtime().to_owned(),
            disks: work.disk_paths(),
            device: work.device().to_vec(),
        };
        Fork::start(
            &self.vm,
            &self.hello.vm,
            files,
            replayer::Options::default(),
        )
        .await
    }

    /// Replays one piece of the log, and tells the source how it gets on.
    async fn replay(
        &mut self,
        slot: &mut Option<TargetLine>,
        records: Vec<Record>,
    ) -> Result<ReplaySummary> {
        let Some(fork) = self.fork.as_mut() else {
            return Err(self.out_of_place("a replay"));
        };
        let Some(line) = slot.as_mut() else {
            return Err(self.out_of_place("a replay"));
        };
        fork.play(records).await?;
        let mut settling = false;
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
                Played::Done(_) if !settling => {
                    settling = true;
                    fork.settle().await?;
                }
                Played::Done(report) => return Ok(ReplaySummary::of(&report)),
            }
        }
    }

    /// Leaves nothing of a conversation but what it committed.
    async fn clean(&mut self) -> Result<()> {
        if let Some(fork) = self.fork.take() {
            fork.kill().await?;
        }
        if self.lock.is_none() {
            return Ok(());
        }
        clean_leftovers(&self.vm).await?;
        if self.vm.try_record()?.is_none() {
            files::remove_dir(self.vm.dir())?;
        }
        Ok(())
    }
}

/// Whether a VM that a peer offers may come here, by what is known of it here.
fn check_known(vm: &VmDir, hello: &Hello) -> Result<()> {
    let Some(known) = vm.try_record()? else {
        return Ok(());
    };
    if known.id != hello.vm.id {
        return Err(Error::Refused(format!(
            "there is another VM called {} here; rename or delete one of them",
            vm.name()
        )));
    }
    if known != hello.vm {
        return Err(Error::Refused(format!(
            "{0} was described otherwise when it was here last (its hardware, disks or kernel): \
             remove the stale copy here with `replay-migrate vm delete {0}`",
            vm.name()
        )));
    }
    match vm.lease()? {
        Lease::Held { .. } => {
            return Err(Error::Refused(format!(
                "{} belongs here: this site holds its lease, so it can't be sent here",
                vm.name()
            )));
        }
        Lease::Offered { to_name, .. } => {
            return Err(Error::Refused(format!(
                "the hand-over of {} from here to {to_name} is not settled; run `vm resume \
                 {}` here first",
                vm.name(),
                vm.name()
            )));
        }
        Lease::Elsewhere { fence, .. } if fence > hello.fence => {
            return Err(Error::Refused(format!(
                "{} was handed on since (number {fence} is known here, {} was said): what \
                 is offered is not the newest",
                vm.name(),
                hello.fence
            )));
        }
        Lease::Elsewhere { .. } => {}
    }
    Ok(())
}

/// Ends a fork that an agent left behind when it died, and removes its folders.
pub(crate) async fn clean_leftovers(vm: &VmDir) -> Result<()> {
    let runtime = vm.runtime_dir("incoming")?;
    if runtime.exists() {
        if let Some(qemu) = Vm::attach(&runtime)
            .await
            .map_err(Error::host("cannot reach a fork left behind"))?
        {
            qemu.kill()
                .await
                .map_err(Error::host("cannot end a fork left behind"))?;
        }
        files::remove_dir(&runtime)?;
    }
    files::remove_dir(&vm.incoming())
}
