//! The target's part of a migration, a seed, or a question.
//!
//! Until Commit the target holds a working folder and perhaps a fork of the VM, and nothing
//! else: when a conversation ends early, in whatever way, both go.

use traces::Record;
use vm_host::{Accelerator, Network, Vm, probe, programs};

use crate::error::{Error, Result};
use crate::files::{self, FileLock};
use crate::fork::{Fork, ForkFiles, Played};
use crate::lease::Lease;
use crate::line::TargetLine;
use crate::local::{self, blocking};
use crate::phase::Phase;
use crate::protocol::{CommitRequest, Hello, Plan, Purpose, ToSource, ToTarget, Welcome};
use crate::report::{ReplaySummary, Strategy};
use crate::store::{Store, VmDir};
use crate::vm::{BaseFile, Id, VmRecord};
use crate::work::{Received, Work};

/// The most records a log segment may hold, and bytes before it is unpacked.
const LOG_LIMITS: traces::Limits = traces::Limits {
    records: 8 << 20,
    bytes: 32 << 20,
};

/// Bytes of a log segment as sent.
const LOG_BYTES: u64 = 64 << 20;

/// Room that must stay free beside a VM's own needs.
const MARGIN: u64 = 64 << 20;

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
        let known = vm.try_record()?;
        if known.as_ref().is_some_and(|known| known.id != hello.vm.id) {
            return Err(Error::Refused(format!(
                "there is another VM called {} here; rename or delete one of them",
                vm.name()
            )));
        }
        if known.is_some() {
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
        }
        check_host(store, &hello).await?;
        files::make_dir(&vm.incoming())?;
        let lock = vm.lock()?;
        clean_leftovers(&vm).await?;
        Ok(session(Some(lock)))
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
                ToTarget::Commit(request) => {
                    let (Some(state), Some(trees)) = (work.take(), received.take()) else {
                        return Err(self.out_of_place("commit"));
                    };
                    self.phase = Phase::Commit;
                    let kept = self.commit(state, trees, *request).await?;
                    let line = self.line(slot)?;
                    line.send(ToSource::Committed).await?;
                    line.flush().await?;
                    self.phase = Phase::Resume;
                    let paused = match line.receive(self.phase).await {
                        Ok(ToTarget::Resume { paused }) => paused,
                        // The VM is here now, whatever became of the source: it goes on.
                        _ => false,
                    };
                    self.resume(kept, paused).await?;
                    let line = self.line(slot)?;
                    line.send(ToSource::Resumed).await?;
                    line.flush().await?;
                }
                _ => return Err(self.out_of_place("a message")),
            }
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
        loop {
            match fork.played().await? {
                Played::Progress(progress) => {
                    let done = progress.played.as_millis() as u64;
                    let total = progress.of_recorded.as_millis() as u64;
                    line.send(ToSource::Replaying { done, total }).await?;
                    line.flush().await?;
                }
                Played::Done(report) => return Ok(ReplaySummary::of(&report)),
            }
        }
    }

    /// Takes the VM over. When this returns, it is this site's for good.
    async fn commit(
        &mut self,
        work: Work,
        received: Received,
        request: CommitRequest,
    ) -> Result<crate::work::Kept> {
        let CommitRequest { manifest, fence } = request;
        let hello = &self.hello;
        if manifest.vm != hello.vm.id
            || manifest.generation != hello.next
            || manifest.hardware != hello.vm.hardware
            || fence != hello.fence + 1
        {
            return Err(self.out_of_place("a commit of another state"));
        }
        if is_void(&self.vm, hello.transfer) {
            return Err(Error::Refused(
                "this hand-over was given up meanwhile".into(),
            ));
        }
        let kept = work.keep(received, manifest).await?;
        self.note_vm()?;
        Lease::Held {
            fence,
            transfer: Some(self.hello.transfer),
        }
        .store(&self.vm.lease_path())?;
        self.committed = true;
        tracing::info!(vm = %self.vm.name(), generation = kept.manifest.generation, "taken over");
        Ok(kept)
    }

    /// Writes down what the VM is, if it is new here.
    fn note_vm(&self) -> Result<()> {
        if self.vm.try_record()?.is_none() {
            let lease = Lease::Elsewhere {
                fence: self.hello.fence,
                owner: self.peer.key,
                owner_name: self.peer.name.to_string(),
            };
            self.vm.create(&self.hello.vm, &lease)?;
        }
        Ok(())
    }

    /// Starts the VM on the images that were received.
    async fn resume(&self, kept: crate::work::Kept, paused: bool) -> Result<()> {
        let record = &self.hello.vm;
        let live = local::lay_overlays(&self.vm, record, Some(&kept.manifest))?;
        let runtime = self.vm.runtime_dir("live")?;
        files::remove_dir(&runtime)?;
        files::make_dir(&runtime)?;
        let ram = runtime.join("ram.img");
        std::fs::rename(&kept.ram, &ram).map_err(Error::file("move into place", &ram))?;
        let launch = local::launch(
            &self.vm,
            record,
            &record.hardware,
            &runtime,
            live.overlay_paths(&self.vm),
            Network::Connected,
            Accelerator::Auto,
            true,
        );
        let what = || {
            format!(
                "cannot go on with {}; `vm start` tries again",
                self.vm.name()
            )
        };
        let qemu = Vm::start(&launch).await.map_err(Error::host(what()))?;
        let device = kept.generation.load_device()?;
        let loaded = qemu
            .load_device_state(&device)
            .await
            .map_err(Error::host(what()));
        let resumed = match loaded {
            Ok(()) if paused => Ok(()),
            Ok(()) => local::resume_live(&self.vm, &qemu).await,
            Err(error) => Err(error),
        };
        if resumed.is_err() {
            let _ = qemu.kill().await;
            files::remove_dir(&self.vm.live_dir())?;
        }
        resumed
    }

    /// Answers whether a hand-over took place; if it did not, it never will.
    async fn settle(&mut self, line: &mut TargetLine, transfer: Id) -> Result<()> {
        self.phase = Phase::Commit;
        let known = self
            .vm
            .try_record()?
            .is_some_and(|record| record.id == self.hello.vm.id);
        let taken = known
            && match self.vm.lease()? {
                Lease::Held {
                    transfer: Some(by),
                    fence,
                } => by == transfer || fence > self.hello.fence,
                // It was taken, and handed on since.
                lease => lease.fence() > self.hello.fence,
            };
        if !taken {
            void(&self.vm, transfer)?;
        }
        line.send(ToSource::Settled { taken }).await?;
        line.flush().await
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

/// A hand-over that the source gave up must not be committed later, by a conversation that is
/// still open here.
fn void(vm: &VmDir, transfer: Id) -> Result<()> {
    let dir = vm.store().root().join("void");
    files::make_dir(&dir)?;
    files::write_atomic(&dir.join(transfer.to_string()), b"")
}

fn is_void(vm: &VmDir, transfer: Id) -> bool {
    vm.store()
        .root()
        .join("void")
        .join(transfer.to_string())
        .exists()
}

/// What this host must have for the VM, checked before anything is sent.
async fn check_host(store: &Store, hello: &Hello) -> Result<()> {
    let machine = hello.vm.hardware.machine.clone();
    let machines = blocking(|| {
        programs::machine_types(&programs::qemu())
            .map_err(Error::host("cannot ask QEMU for its machine types"))
    })
    .await?;
    if !machines.iter().any(|known| known.name == machine) {
        let newest = machines.first().map_or("none", |known| known.name.as_str());
        return Err(Error::Refused(format!(
            "the QEMU here has no machine type {machine}; its newest is {newest}. Install a newer \
             QEMU here (the source's is {})",
            hello.qemu
        )));
    }
    // The VM's RAM twice: the generation that arrives lies on disk, what runs on tmpfs.
    let memory = hello.vm.hardware.memory_bytes();
    let runtime = store.vm(&hello.vm.name).runtime_dir("incoming")?;
    let shared = runtime.parent().unwrap_or(&runtime);
    let free = free_space(shared)?;
    if free < memory + MARGIN {
        return Err(Error::Refused(format!(
            "{} needs {} MiB for its memory, and {} has {} MiB free",
            hello.vm.name,
            memory >> 20,
            shared.display(),
            free >> 20
        )));
    }
    let available = probe::free_memory().map_err(Error::host("cannot measure memory"))?;
    if available < memory + MARGIN {
        return Err(Error::Refused(format!(
            "{} needs {} MiB of memory, and this host has {} MiB available",
            hello.vm.name,
            memory >> 20,
            available >> 20
        )));
    }
    let lacking: u64 = hello
        .vm
        .base_files()
        .iter()
        .filter(|file| store.base_file(file.hash).is_none())
        .map(|file| file.bytes)
        .sum();
    let free = free_space(store.root())?;
    if free < memory + lacking + MARGIN {
        return Err(Error::Refused(format!(
            "{} needs {} MiB on the disk with {}, and there are {} MiB free",
            hello.vm.name,
            (memory + lacking + MARGIN) >> 20,
            store.root().display(),
            free >> 20
        )));
    }
    Ok(())
}

fn free_space(dir: &std::path::Path) -> Result<u64> {
    probe::free_space(dir).map_err(Error::host("cannot measure free space"))
}

async fn receive_log(line: &mut TargetLine, first: reconciler::BlobPart) -> Result<Vec<Record>> {
    let malformed = || Error::reconcile("the log sent is malformed");
    let mut assembler = reconciler::BlobAssembler::new(LOG_BYTES);
    let mut part = first;
    let bytes = loop {
        if let Some(bytes) = assembler.push(&part).map_err(malformed())? {
            break bytes;
        }
        part = match line.receive(Phase::Log).await? {
            ToTarget::Log(part) => part,
            _ => return Err(line.unexpected(Phase::Log, "half a log")),
        };
    };
    traces::decode_records(&bytes, LOG_LIMITS).map_err(Error::log("the log sent is malformed"))
}

/// Receives a base file; it is kept only if its content has the announced hash.
async fn receive_file(
    store: &Store,
    line: &mut TargetLine,
    vm: &VmRecord,
    file: BaseFile,
) -> Result<()> {
    use std::io::Write;
    if !vm.base_files().contains(&file) {
        return Err(line.unexpected(Phase::Base, "a file that the VM does not need"));
    }
    let images = store.root().join("images");
    let partial = tempfile::Builder::new()
        .prefix(".receive-")
        .tempdir_in(&images)
        .map_err(Error::file("write to", &images))?;
    let path = partial.path().join("file");
    let out = std::fs::File::create(&path).map_err(Error::file("create", &path))?;
    let mut out = zstd::stream::write::Decoder::new(SparseWriter::new(out, file.bytes))
        .map_err(Error::file("write", &path))?;
    loop {
        match line.receive(Phase::Base).await? {
            ToTarget::Data(chunk) => {
                out.write_all(&chunk).map_err(Error::file("write", &path))?;
            }
            ToTarget::DataEnd => break,
            _ => return Err(line.unexpected(Phase::Base, "half a file")),
        }
    }
    out.flush()
        .and_then(|()| out.into_inner().finish())
        .map_err(Error::file("write", &path))?;
    let store = store.clone();
    let kept = blocking(move || {
        let kept = store.adopt(&path)?;
        drop(partial);
        Ok(kept)
    })
    .await?;
    if kept == file {
        Ok(())
    } else {
        Err(line.unexpected(Phase::Base, "a file with another content than announced"))
    }
}

/// Writes a file of a known length and leaves holes for zeros.
struct SparseWriter {
    file: std::fs::File,
    at: u64,
    length: u64,
}

impl SparseWriter {
    fn new(file: std::fs::File, length: u64) -> Self {
        Self {
            file,
            at: 0,
            length,
        }
    }

    fn finish(self) -> std::io::Result<()> {
        self.file.set_len(self.at)
    }
}

impl std::io::Write for SparseWriter {
    fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
        use std::os::unix::fs::FileExt;
        // Never more than was announced, however much a small stream unpacks to.
        if self.at + buf.len() as u64 > self.length {
            return Err(std::io::Error::other(
                "there is more of it than was announced",
            ));
        }
        let page = 4096 - (self.at % 4096) as usize;
        let count = page.min(buf.len());
        if buf[..count].iter().any(|byte| *byte != 0) {
            self.file.write_all_at(&buf[..count], self.at)?;
        }
        self.at += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
