//! The source's part of a migration, and of a seed.
//!
//! Whatever goes wrong before the lease has moved, [`migrate`] leaves the VM here, running if it
//! ran. The one moment at which that can't be known is between asking for the commit and hearing
//! that it was done; [`settle`] clears that up.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;
use vm_host::{Status, Vm};

use crate::error::{Error, Result};
use crate::exchange::{self, Sent};
use crate::generation::{GenerationId, Manifest};
use crate::lease::Lease;
use crate::line::{Line, LinkHistory};
use crate::local::{self, Live};
use crate::peers::Peer;
use crate::phase::Phase;
use crate::plan::{self, Estimates, Feasible};
use crate::progress::Progress;
use crate::protocol::{
    CommitRequest, Hello, ImageKind, Plan, Purpose, ToSource, ToTarget, Welcome,
};
use crate::recording;
use crate::report::{
    ByteReport, MigrationReport, PageReports, PhaseClock, ReplaySummary, Roots, Strategy,
};
use crate::state::{Base, State};
use crate::store::VmDir;
use crate::transport::Traffic;
use crate::vm::{Id, VmRecord};

/// Bytes that time the line: enough to see a thin one, few beside what follows.
const PROBE_BYTES: usize = 32 << 10;

/// The tail of the log that is typed while the target replays is replayed too, so often.
const TAIL_ROUNDS: usize = 3;

/// How to migrate.
#[derive(Clone, Copy, Debug, Default)]
pub struct MigrateOptions {
    /// Which way; `None` for what is predicted to be best.
    pub strategy: Option<Strategy>,
    /// Leave the VM paused at the target.
    pub paused: bool,
}

/// Moves a VM to another site.
///
/// # Errors
/// In all cases but [`Error::InDoubt`] the VM is here and as it was.
pub async fn migrate(
    vm: &VmDir,
    peer: &Peer,
    options: MigrateOptions,
    progress: &dyn Progress,
    cancel: &CancellationToken,
) -> Result<MigrationReport> {
    settle(vm).await?;
    let record = vm.record()?;
    let _lock = vm.lock()?;
    let fence = local::require_lease(vm)?;
    let qemu = local::attach_running(vm).await?;
    let was_running = local::guest_status(vm, &qemu).await? == Status::Running;
    let mut run = Migration {
        vm,
        record: &record,
        peer,
        options,
        progress,
        qemu: &qemu,
        qemu_version: local::qemu_version().await?,
        was_running,
        fence,
        transfer: Id::random()?,
        clock: PhaseClock::start(progress),
        stopped: false,
    };
    // Up to the commit, the user can stop it; the commit itself takes a round trip and is seen
    // through.
    let prepared = {
        let go = run.prepare();
        tokio::pin!(go);
        tokio::select! {
            biased;
            prepared = &mut go => Some(prepared),
            () = cancel.cancelled() => None,
        }
    };
    let outcome = match prepared {
        Some(Ok(prepared)) => Some(run.complete(prepared).await),
        Some(Err(error)) => Some(Err(error)),
        None => None,
    };
    let phase = run.clock.phase();
    let error = match outcome {
        Some(Ok(report)) => {
            return Ok(MigrationReport {
                seconds: run.clock.seconds(),
                ..report
            });
        }
        Some(Err(error)) => Error::Phase {
            phase,
            source: Box::new(error),
        },
        None => Error::Interrupted(phase),
    };
    let resume = was_running && run.stopped;
    undo(vm, &qemu, resume).await?;
    Err(error)
}

/// Puts things back after a migration that did not succeed.
async fn undo(vm: &VmDir, qemu: &Vm, resume: bool) -> Result<()> {
    let here = match vm.lease()? {
        Lease::Held { .. } => true,
        Lease::Offered { .. } => ask_target(vm, Some(qemu)).await?,
        Lease::Elsewhere { .. } => false,
    };
    if here && resume {
        local::resume_live(vm, qemu).await?;
    }
    Ok(())
}

/// Finds out who owns a VM whose hand-over was cut off, if that is not known.
///
/// # Errors
/// [`Error::InDoubt`] if the target can't be asked now.
pub async fn settle(vm: &VmDir) -> Result<()> {
    if vm.try_record()?.is_some() && matches!(vm.lease()?, Lease::Offered { .. }) {
        let _lock = vm.lock()?;
        let qemu = local::attach(vm).await?;
        ask_target(vm, qemu.as_ref()).await?;
    }
    Ok(())
}

/// Asks the target of an offered VM whether it took it, and notes the answer: whether the VM is
/// here.
async fn ask_target(vm: &VmDir, qemu: Option<&Vm>) -> Result<bool> {
    let Lease::Offered {
        fence,
        transfer,
        to,
        to_name,
    } = vm.lease()?
    else {
        return Ok(true);
    };
    let in_doubt = |source: Error| Error::InDoubt {
        vm: vm.name().to_string(),
        site: to_name.clone(),
        source: Some(Box::new(source)),
    };
    let ask = async {
        let peer = vm.store().peers().by_key(&to)?.ok_or_else(|| {
            Error::Refused(format!(
                "{to_name} is no longer a trusted site; `site trust` it again"
            ))
        })?;
        let record = vm.record()?;
        let mut line = Line::connect(vm.store(), &peer).await?;
        let hello = hello(
            vm,
            &record,
            Purpose::Settle(transfer),
            transfer,
            fence,
            1,
            "",
        )?;
        line.send(ToTarget::Hello(Box::new(hello))).await?;
        match line.recv(Phase::Commit).await? {
            ToSource::Settled { taken } => Ok(taken),
            _ => Err(line.unexpected(Phase::Commit, "no answer to the question who owns the VM")),
        }
    };
    let taken = ask.await.map_err(in_doubt)?;
    if taken {
        hand_over(
            vm,
            qemu,
            Lease::Elsewhere {
                fence: fence + 1,
                owner: to,
                owner_name: to_name,
            },
        )
        .await?;
    } else {
        Lease::Held {
            fence,
            transfer: None,
        }
        .store(&vm.lease_path())?;
    }
    Ok(!taken)
}

/// Lets go of a VM that another site has: its QEMU ends, never to run this state again.
async fn hand_over(vm: &VmDir, qemu: Option<&Vm>, lease: Lease) -> Result<()> {
    lease.store(&vm.lease_path())?;
    recording::moved(vm).await?;
    if let Some(qemu) = qemu {
        qemu.quit()
            .await
            .map_err(Error::host(format!("cannot end the QEMU of {}", vm.name())))?;
    }
    Ok(())
}

fn hello(
    vm: &VmDir,
    record: &VmRecord,
    purpose: Purpose,
    transfer: Id,
    fence: u64,
    next: u64,
    qemu: &str,
) -> Result<Hello> {
    Ok(Hello {
        purpose,
        vm: record.clone(),
        transfer,
        fence,
        generations: vm.generations()?.iter().map(Manifest::identity).collect(),
        next,
        qemu: qemu.to_owned(),
    })
}

/// The beginning that all purposes share: hello, welcome, how fast the line is.
async fn begin(line: &mut Line, vm: &VmDir, hello: Hello) -> Result<(Welcome, f64)> {
    let ours = hello.generations.clone();
    line.send(ToTarget::Hello(Box::new(hello))).await?;
    let ToSource::Welcome(welcome) = line.recv(Phase::Hello).await? else {
        return Err(line.unexpected(Phase::Hello, "no welcome"));
    };
    if let Some(strange) = welcome.common.iter().find(|theirs| !ours.contains(theirs)) {
        return Err(line.unexpected(
            Phase::Hello,
            format!(
                "it holds a generation {} that is not this site's",
                strange.number
            ),
        ));
    }
    // An empty probe gives the round trip, a full one the rate.
    let mut times = [Duration::ZERO; 2];
    for (time, size) in times.iter_mut().zip([0, PROBE_BYTES]) {
        let begun = Instant::now();
        line.send(ToTarget::Probe(vec![0; size])).await?;
        match line.recv(Phase::Hello).await? {
            ToSource::Probed => *time = begun.elapsed(),
            _ => return Err(line.unexpected(Phase::Hello, "no answer to a probe")),
        }
    }
    let transfer = times[1]
        .saturating_sub(times[0])
        .max(Duration::from_micros(10));
    let probed = (PROBE_BYTES * 8) as f64 / transfer.as_secs_f64();
    // Slow start makes a fast, long line look thin in so short a probe; what was once reached
    // over it counts as well.
    let rate = probed.max(
        LinkHistory::load(vm.store())?
            .rate(line.peer())
            .unwrap_or(0.0),
    );
    tracing::info!(rtt = ?times[0], rate, "line measured");
    Ok((*welcome, rate))
}

struct Migration<'a> {
    vm: &'a VmDir,
    record: &'a VmRecord,
    peer: &'a Peer,
    options: MigrateOptions,
    progress: &'a dyn Progress,
    qemu: &'a Vm,
    qemu_version: String,
    was_running: bool,
    fence: u64,
    transfer: Id,
    clock: PhaseClock<'a>,
    /// Whether this migration has paused the guest.
    stopped: bool,
}

/// All that is sent and verified, before anything is decided.
struct Prepared {
    line: Line,
    live: Live,
    state: Arc<State>,
    manifest: Manifest,
    strategy: Strategy,
    base: Option<GenerationId>,
    sent: Vec<Sent>,
    bytes: ByteReport,
    verified: Roots,
    replay: Option<ReplaySummary>,
}

impl Migration<'_> {
    /// Everything up to the commit.
    async fn prepare(&mut self) -> Result<Prepared> {
        self.clock.enter(Phase::Hello);
        let live = live(self.vm)?;
        let next = local::next_generation(self.vm)?;
        let mut line = Line::connect(self.vm.store(), self.peer).await?;
        let hello = hello(
            self.vm,
            self.record,
            Purpose::Migrate,
            self.transfer,
            self.fence,
            next,
            &self.qemu_version,
        )?;
        let (welcome, rate) = begin(&mut line, self.vm, hello).await?;

        self.clock.enter(Phase::Plan);
        let feasible = Feasible::of(self.vm, &live, &welcome)?;
        let strategy = if let Some(strategy) = self.options.strategy {
            strategy
        } else {
            let estimates =
                plan::estimate(self.vm, self.record, &live, feasible.clone(), rate).await?;
            self.progress.note(&estimates.why());
            estimates.choice
        };
        let base = feasible.base_for(self.vm, strategy)?;
        line.send(ToTarget::Plan(Plan { strategy, base })).await?;

        self.clock.enter(Phase::Base);
        let base_bytes = self.ship_base(&mut line, &welcome, base, rate).await?;
        let mut bytes = ByteReport {
            base: base_bytes,
            ..ByteReport::default()
        };
        let base_images = {
            let (vm, record) = (self.vm.clone(), self.record.clone());
            let number = base.map(|base| base.number);
            Arc::new(local::blocking(move || Base::load(&vm, &record, number)).await?)
        };
        line.send(ToTarget::Prepare).await?;
        line.flush().await?;

        let mut replay = None;
        if strategy == Strategy::Replay
            && let Some(base) = base
        {
            let (summary, log) = self.replay(&mut line, base).await?;
            replay = Some(summary);
            bytes.log = log;
        }

        self.clock.enter(Phase::Stop);
        self.stopped = true;
        self.clock.down();
        let what = |what: &str| format!("cannot {what} {}", self.vm.name());
        self.qemu
            .pause()
            .await
            .map_err(Error::host(what("pause")))?;
        line.send(ToTarget::Freeze).await?;
        line.flush().await?;
        let device = self
            .qemu
            .save_device_state()
            .await
            .map_err(Error::host(what("save the devices of")))?;
        let state = {
            let (vm, record, live) = (self.vm.clone(), self.record.clone(), live.clone());
            let ram = self.vm.runtime_dir("live")?.join("ram.img");
            let work = move || {
                let overlays = live.overlay_paths(&vm);
                State::of_paused(&vm, &record, live.generation, &ram, &overlays, device)
            };
            Arc::new(local::blocking(work).await?)
        };

        let clock = &mut self.clock;
        let sent = exchange::send_images(
            &mut line,
            &state,
            &base_images,
            rate,
            &mut |phase| {
                clock.enter(phase);
            },
            self.progress,
        )
        .await?;
        account(&mut bytes, &sent);

        self.clock.enter(Phase::Verify);
        let (infos, disks) = state.infos();
        let verified = Roots {
            ram: infos[0].root,
            disk: disks.iter().map(|disk| disk.root).collect(),
            device: infos[1].root,
        };

        let manifest = Manifest::new(
            self.record.id,
            next,
            live.generation,
            self.record.hardware.clone(),
            self.qemu_version.clone(),
            infos,
            disks,
        );
        Ok(Prepared {
            line,
            live,
            state,
            manifest,
            strategy,
            base,
            sent,
            bytes,
            verified,
            replay,
        })
    }

    /// The commit, and what comes after it.
    async fn complete(&mut self, prepared: Prepared) -> Result<MigrationReport> {
        let Prepared {
            mut line,
            live,
            state,
            manifest,
            strategy,
            base,
            sent,
            mut bytes,
            verified,
            replay,
        } = prepared;
        self.clock.enter(Phase::Commit);
        self.commit(&mut line, &manifest).await?;
        self.clock.enter(Phase::Resume);
        let paused = self.options.paused || !self.was_running;
        line.send(ToTarget::Resume { paused }).await?;
        match line.recv(Phase::Resume).await? {
            ToSource::Resumed => self.clock.up(),
            _ => return Err(line.unexpected(Phase::Resume, "no word that the VM runs")),
        }
        finish_traffic(&mut bytes, &line.traffic());
        line.close().await;
        LinkHistory::load(self.vm.store())?.note(self.vm.store(), self.peer, &sent)?;
        let report = MigrationReport {
            vm: self.vm.name().clone(),
            strategy,
            generation_from: base.map(|base| base.number),
            generation_to: manifest.generation,
            bytes,
            pages: pages(&sent),
            seconds: std::collections::BTreeMap::new(),
            verified,
            refetched: sent.iter().map(|sent| sent.outcome.refetched).sum(),
            replay,
        };
        plan::note_outcome(self.vm, &report)?;
        if let Err(error) = keep(self.vm, self.qemu, &live, state, manifest).await {
            // The VM is at the target already; only the stale copy here is missing.
            tracing::warn!(error = error.chain(), "no stale copy was kept here");
        }
        Ok(report)
    }

    /// Sends the base files and the generation that the target lacks; the bytes it took.
    async fn ship_base(
        &mut self,
        line: &mut Line,
        welcome: &Welcome,
        base: Option<GenerationId>,
        rate: f64,
    ) -> Result<u64> {
        let traffic = line.traffic();
        let before = traffic.sent();
        ship_files(line, self.vm, self.record, welcome, self.progress).await?;
        if let Some(base) = base
            && !welcome.common.contains(&base)
        {
            ship_generation(
                line,
                self.vm,
                self.record,
                base.number,
                welcome,
                rate,
                self.progress,
            )
            .await?;
        }
        Ok(traffic.sent() - before)
    }

    /// Ships the log and has it replayed, then the tail that was typed meanwhile.
    async fn replay(
        &mut self,
        line: &mut Line,
        base: GenerationId,
    ) -> Result<(ReplaySummary, u64)> {
        let mut sent_records = 0;
        let mut log_bytes = 0;
        let mut total: Option<ReplaySummary> = None;
        for _ in 0..TAIL_ROUNDS {
            self.clock.enter(Phase::Log);
            recording::flush(self.vm).await?;
            let records = {
                let vm = self.vm.clone();
                local::blocking(move || recording::records_since(&vm, base.number)).await?
            };
            let new = records.get(sent_records..).unwrap_or_default();
            if new.is_empty() && total.is_some() {
                break;
            }
            let segment = traces::encode_records(new).map_err(Error::log("cannot pack the log"))?;
            sent_records = records.len();
            log_bytes += segment.len() as u64;
            for part in reconciler::blob_parts(&segment) {
                line.send(ToTarget::Log(part)).await?;
            }
            line.flush().await?;
            self.clock.enter(Phase::Replay);
            let summary = loop {
                match line.recv(Phase::Replay).await? {
                    ToSource::Replaying { done, total } => {
                        self.progress.advance(Phase::Replay, done, Some(total));
                    }
                    ToSource::Replayed(summary) => break summary,
                    _ => return Err(line.unexpected(Phase::Replay, "no word of the replay")),
                }
            };
            // A report is of all pieces so far.
            total = Some(summary);
        }
        // The first round always replays, if only an empty log.
        Ok((total.unwrap_or_default(), log_bytes))
    }

    /// The step that decides. From the moment the lease is offered until the answer, this site
    /// does not run the VM.
    async fn commit(&mut self, line: &mut Line, manifest: &Manifest) -> Result<()> {
        Lease::Offered {
            fence: self.fence,
            transfer: self.transfer,
            to: self.peer.key,
            to_name: self.peer.name.to_string(),
        }
        .store(&self.vm.lease_path())?;
        let request = CommitRequest {
            manifest: manifest.clone(),
            fence: self.fence + 1,
        };
        line.send(ToTarget::Commit(Box::new(request))).await?;
        match line.recv(Phase::Commit).await? {
            ToSource::Committed => Lease::Elsewhere {
                fence: self.fence + 1,
                owner: self.peer.key,
                owner_name: self.peer.name.to_string(),
            }
            .store(&self.vm.lease_path()),
            _ => Err(line.unexpected(Phase::Commit, "no word that it took the VM")),
        }
    }
}

fn live(vm: &VmDir) -> Result<Live> {
    Live::load(vm)?.ok_or_else(|| Error::Damaged {
        path: vm.live_dir(),
        reason: "the VM runs, but what its disks rest on is not noted".into(),
    })
}

async fn ship_files(
    line: &mut Line,
    vm: &VmDir,
    record: &VmRecord,
    welcome: &Welcome,
    progress: &dyn Progress,
) -> Result<()> {
    for file in record.base_files() {
        if welcome.lacks.contains(&file.hash) {
            progress.note(&format!(
                "{} lacks the base file {}; sending it",
                line.peer().name,
                file.hash
            ));
            line.send(ToTarget::File(file)).await?;
            exchange::send_file(line, &vm.store().base_path(file.hash), progress).await?;
        }
    }
    Ok(())
}

async fn ship_generation(
    line: &mut Line,
    vm: &VmDir,
    record: &VmRecord,
    number: u64,
    welcome: &Welcome,
    rate: f64,
    progress: &dyn Progress,
) -> Result<Vec<Sent>> {
    let manifest = vm.generation(number).load_manifest()?.ok_or_else(|| {
        Error::Refused(format!(
            "generation {number} of {} is not there any more",
            vm.name()
        ))
    })?;
    let common = welcome
        .common
        .iter()
        .rfind(|id| id.number < number)
        .map(|id| id.number);
    let (state, base) = {
        let (vm, record, manifest) = (vm.clone(), record.clone(), manifest.clone());
        local::blocking(move || {
            Ok((
                Arc::new(State::of_generation(&vm, &manifest)?),
                Arc::new(Base::load(&vm, &record, common)?),
            ))
        })
        .await?
    };
    line.send(ToTarget::Generation {
        manifest: Box::new(manifest),
        base: common,
    })
    .await?;
    let sent = exchange::send_images(line, &state, &base, rate, &mut |_| {}, progress).await?;
    line.send(ToTarget::Publish).await?;
    match line.recv(Phase::Base).await? {
        ToSource::Published => Ok(sent),
        _ => Err(line.unexpected(Phase::Base, "no word that it kept the generation")),
    }
}

/// After the hand-over: what stood still here becomes the stale copy of the next return.
async fn keep(
    vm: &VmDir,
    qemu: &Vm,
    live: &Live,
    state: Arc<State>,
    manifest: Manifest,
) -> Result<()> {
    hand_over(vm, Some(qemu), vm.lease()?).await?;
    let (vm, live) = (vm.clone(), live.clone());
    local::blocking(move || {
        let files = vm.generation(manifest.generation);
        crate::files::make_dir(files.dir())?;
        for (index, overlay) in live.overlay_paths(&vm).iter().enumerate() {
            let kept = files.disk(index);
            std::fs::hard_link(overlay, &kept).map_err(Error::file("link", &kept))?;
        }
        let ram = vm.runtime_dir("live")?.join("ram.img");
        crate::files::copy_sparse(&ram, &files.ram())?;
        let device = files.device();
        std::fs::write(&device, state.device()).map_err(Error::file("write", &device))?;
        files.save_trees(state.tree(ImageKind::Ram), &state.disk_trees())?;
        files.publish(&manifest)?;
        crate::files::remove_dir(&vm.live_dir())?;
        crate::files::remove_dir(&vm.runtime_dir("live")?)
    })
    .await
}

/// What seeding a site took.
#[derive(Clone, Debug, serde::Serialize)]
pub struct SeedReport {
    /// The generation that the site has now.
    pub generation: u64,
    /// The generation that both had before.
    pub generation_from: Option<u64>,
    /// What crossed the socket.
    pub bytes: ByteReport,
    /// Seconds in all.
    pub seconds: f64,
}

/// Ships the newest generation of a VM to another site.
pub async fn seed(vm: &VmDir, peer: &Peer, progress: &dyn Progress) -> Result<SeedReport> {
    let begun = Instant::now();
    settle(vm).await?;
    let record = vm.record()?;
    let _lock = vm.lock()?;
    let newest = vm.generations()?.pop().ok_or_else(|| {
        Error::Refused(format!(
            "{0} has no generation yet; make one with `replay-migrate checkpoint {0}` or `record {0}`",
            vm.name()
        ))
    })?;
    progress.phase(Phase::Hello);
    let mut line = Line::connect(vm.store(), peer).await?;
    let traffic = line.traffic();
    let fence = vm.lease()?.fence();
    let next = newest.generation + 1;
    let hello = hello(
        vm,
        &record,
        Purpose::Seed,
        Id::random()?,
        fence,
        next,
        &newest.qemu,
    )?;
    let (welcome, rate) = begin(&mut line, vm, hello).await?;
    progress.phase(Phase::Base);
    ship_files(&mut line, vm, &record, &welcome, progress).await?;
    let mut bytes = ByteReport::default();
    if !welcome.common.contains(&newest.identity()) {
        let number = newest.generation;
        let sent =
            ship_generation(&mut line, vm, &record, number, &welcome, rate, progress).await?;
        account(&mut bytes, &sent);
        LinkHistory::load(vm.store())?.note(vm.store(), peer, &sent)?;
    }
    finish_traffic(&mut bytes, &traffic);
    line.close().await;
    Ok(SeedReport {
        generation: newest.generation,
        generation_from: welcome.common.last().map(|id| id.number),
        bytes,
        seconds: begun.elapsed().as_secs_f64(),
    })
}

/// Predicts what each strategy would cost, and changes nothing.
pub async fn dry_run(vm: &VmDir, peer: &Peer, progress: &dyn Progress) -> Result<Estimates> {
    settle(vm).await?;
    let record = vm.record()?;
    let fence = local::require_lease(vm)?;
    local::attach_running(vm).await?;
    progress.phase(Phase::Hello);
    let mut line = Line::connect(vm.store(), peer).await?;
    let next = local::next_generation(vm)?;
    let hello = hello(
        vm,
        &record,
        Purpose::Estimate,
        Id::random()?,
        fence,
        next,
        &local::qemu_version().await?,
    )?;
    let (welcome, rate) = begin(&mut line, vm, hello).await?;
    line.close().await;
    progress.phase(Phase::Plan);
    let live = live(vm)?;
    let feasible = Feasible::of(vm, &live, &welcome)?;
    plan::estimate(vm, &record, &live, feasible, rate).await
}

fn account(bytes: &mut ByteReport, sent: &[Sent]) {
    for image in sent {
        bytes.hashes += image.hashes;
        match image.kind {
            ImageKind::Device => bytes.device += image.payload,
            ImageKind::Disk(_) => bytes.disk += image.payload,
            ImageKind::Ram => bytes.ram += image.payload,
        }
    }
}

fn finish_traffic(bytes: &mut ByteReport, traffic: &Traffic) {
    bytes.sent = traffic.sent();
    bytes.received = traffic.received();
}

fn pages(sent: &[Sent]) -> PageReports {
    let mut reports = PageReports::default();
    for image in sent {
        let report = match image.kind {
            ImageKind::Device => &mut reports.device,
            ImageKind::Disk(_) => &mut reports.disk,
            ImageKind::Ram => &mut reports.ram,
        };
        for (recipe, count) in &image.outcome.pages {
            *report.entry(recipe.clone()).or_default() += count;
        }
    }
    reports
}
