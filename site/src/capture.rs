//! A capture: the states of a session as plain images, for benchmarks and for research.
//!
//! `base` is the generation that the log continues, `source` the VM as it stands when it is asked
//! for, `replayed` and `twin` what two replays of the log make of the base; `replayed-3` and so on
//! where more were asked for, and `quick-1` and so on what quick ones do. What a way of
//! reconciling is worth can be judged on these in seconds.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use reconciler::{PAGE_SIZE, PageIndex, ReadPages};
use replayer::Pace;
use serde::{Deserialize, Serialize};
use traces::{GuestTime, Record};
use vm_host::{Status, Vm};

use crate::disks::DiskImage;
use crate::error::{Error, Result};
use crate::fork::{Fork, ForkFiles, Played};
use crate::local::{self, Live};
use crate::phase::Phase;
use crate::progress::Progress;
use crate::report::ReplaySummary;
use crate::store::VmDir;
use crate::vm::{Id, VmRecord};
use crate::work::{Work, Workplace};
use crate::{files, generations, recording};

/// A replay that is behind the recording is let go on for this much longer at most.
const IDLE_LIMIT: Duration = Duration::from_secs(120);

/// Pages of a disk read at once.
const AT_ONCE: u64 = 256;

/// What to capture.
#[derive(Clone, Debug)]
pub struct CaptureOptions {
    /// The folder to make.
    pub out: PathBuf,
    /// How much quicker than life pauses pass while it is replayed.
    pub speed: f64,
    /// Whether they are waited out.
    pub pace: Pace,
    /// How often it is replayed so: the second stands for the source's own replay.
    pub replays: u8,
    /// How often it is replayed quickly besides.
    pub quick_replays: u8,
}

impl CaptureOptions {
    /// The replays: the folder of what each leaves, and its pace.
    fn all(&self) -> impl Iterator<Item = (String, Pace)> {
        let plain = (1..=self.replays).map(|number| {
            let name = match number {
                1 => "replayed".to_owned(),
                2 => "twin".to_owned(),
                more => format!("replayed-{more}"),
            };
            (name, self.pace.clone())
        });
        let at_most = (self.speed > 1.0).then_some(self.speed);
        let quick = (1..=self.quick_replays)
            .map(move |number| (format!("quick-{number}"), Pace::quick(at_most)));
        plain.chain(quick)
    }
}

/// `capture.json`: what is in the folder.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Capture {
    /// The format's version.
    pub version: u32,
    /// The VM.
    pub vm: String,
    /// Its QEMU.
    pub qemu: String,
    /// The kernel command line, if it is booted by its kernel: it tells how the guest was set up.
    pub append: Option<String>,
    /// The generation that `base` is.
    pub generation: u64,
    /// Guest time from `base` to `source`, in microseconds.
    pub micros: u64,
    /// Events and anchors in the log.
    pub records: usize,
    /// The replays, in the order in which they were made.
    pub replays: Vec<CapturedReplay>,
}

/// A replay of a captured session.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CapturedReplay {
    /// The folder with what it left.
    pub state: String,
    /// How it went.
    #[serde(flatten)]
    pub summary: ReplaySummary,
}

impl Capture {
    /// The version of the format that is written.
    pub const VERSION: u32 = 1;
}

/// Captures the session that is being recorded. The VM stands still while it is copied, and goes
/// on before the log is replayed.
pub async fn capture(
    vm: &VmDir,
    options: &CaptureOptions,
    progress: &dyn Progress,
) -> Result<Capture> {
    let record = vm.record()?;
    crate::arriving::require_whole(vm, &record)?;
    if options.out.exists() {
        return Err(Error::Refused(format!(
            "{} is there already; name a folder that is not",
            options.out.display()
        )));
    }
    let _lock = vm.lock_soon().await?;
    local::require_lease(vm)?;
    let qemu = local::attach_running(vm).await?;
    generations::finish_cut_off(vm, &qemu).await?;
    let live = Live::of_running(vm, &qemu).await?;
    let recorded = live
        .generation
        .filter(|number| vm.log_path(*number).exists());
    let Some(generation) = recorded else {
        return Err(Error::Refused(format!(
            "nothing was recorded since the last generation of {}: run `replay-migrate record {}` \
             and use the desktop first",
            vm.name(),
            vm.name()
        )));
    };
    Workplace::Incoming.clear(vm).await?;
    let captured = capture_into(vm, &record, &qemu, &live, generation, options, progress).await;
    if captured.is_err() {
        // Half of it is of no use, and would be in the way of another try.
        files::remove_dir(&options.out)?;
    }
    captured
}

async fn capture_into(
    vm: &VmDir,
    record: &VmRecord,
    qemu: &Vm,
    live: &Live,
    generation: u64,
    options: &CaptureOptions,
    progress: &dyn Progress,
) -> Result<Capture> {
    let source = options.out.join("source");
    make_dirs(&source)?;
    progress.phase(Phase::Stop);
    let was_running = local::guest_status(vm, qemu).await? == Status::Running;
    let copied = copy_live(vm, qemu, live, &source).await;
    if was_running {
        local::resume_live(vm, qemu).await?;
    }
    let until = copied?;
    let base = options.out.join("base");
    copy_generation(vm, generation, &base).await?;
    let records = {
        let vm = vm.clone();
        local::blocking(move || recording::records_since(&vm, generation)).await?
    };
    let until = until
        .or_else(|| records.last().map(|last| last.at))
        .unwrap_or_default();
    let mut replays = Vec::new();
    let past = Past {
        generation,
        records,
        until,
    };
    for (state, pace) in options.all() {
        let playing = replayer::Options {
            speed: match pace {
                Pace::Recorded => options.speed,
                _ => 1.0,
            },
            pace,
            ..replayer::Options::default()
        };
        let into = options.out.join(&state);
        let replayed = replay(vm, record, &past, playing, progress, &into).await;
        Workplace::Incoming.clear(vm).await?;
        replays.push(CapturedReplay {
            state,
            summary: replayed?,
        });
    }
    let capture = Capture {
        version: Capture::VERSION,
        vm: vm.name().to_string(),
        qemu: local::qemu_version().await?,
        append: record.boot.as_ref().map(|boot| boot.append.clone()),
        generation,
        micros: until.micros,
        records: past.records.len(),
        replays,
    };
    files::write_json(&options.out.join("capture.json"), &capture)?;
    Ok(capture)
}

/// Copies the VM as it stands; the guest time since the last generation, where it is recorded.
async fn copy_live(vm: &VmDir, qemu: &Vm, live: &Live, into: &Path) -> Result<Option<GuestTime>> {
    let what = |what: &str| format!("cannot {what} {}", vm.name());
    qemu.pause().await.map_err(Error::host(what("pause")))?;
    let at = recording::flush(vm).await?;
    let device = qemu
        .save_device_state()
        .await
        .map_err(Error::host(what("save the devices of")))?;
    let overlays = live.overlay_paths(vm);
    let ram = vm.runtime_dir("live")?.join("ram.img");
    copy_state(ram, overlays, device, into).await?;
    Ok(at)
}

async fn copy_generation(vm: &VmDir, number: u64, into: &Path) -> Result<()> {
    let files = vm.generation(number);
    let manifest = vm.manifest(number)?;
    let disks = (0..manifest.disks.len()).map(|index| files.disk(index));
    make_dirs(into)?;
    copy_state(files.ram(), disks.collect(), files.load_device()?, into).await
}

/// What was recorded.
struct Past {
    /// On top of this generation.
    generation: u64,
    records: Vec<Record>,
    /// When the VM was copied.
    until: GuestTime,
}

/// Replays the log on a fork; one that waits as the user did goes on for as long as the source.
async fn replay(
    vm: &VmDir,
    record: &VmRecord,
    past: &Past,
    playing: replayer::Options,
    progress: &dyn Progress,
    into: &Path,
) -> Result<ReplaySummary> {
    progress.phase(Phase::Replay);
    let work = Work::prepare_fork(
        vm,
        record,
        Workplace::Incoming,
        Id::random()?,
        (Some(past.generation), Vec::new()),
    )
    .await?;
    let files = ForkFiles {
        runtime: work.runtime().to_owned(),
        disks: work.disk_paths(),
        device: work.device().to_vec(),
    };
    let as_recorded = playing.speed <= 1.0 && playing.pace == Pace::Recorded;
    let mut fork = Fork::start(vm, record, files, playing, None).await?;
    let played = async {
        fork.play(past.records.clone())?;
        while let Played::Progress(so_far) = fork.played().await? {
            progress.advance(
                Phase::Replay,
                so_far.played.as_millis() as u64,
                Some(so_far.of_recorded.as_millis() as u64),
            );
        }
        if as_recorded {
            fork.idle(past.until, IDLE_LIMIT)?;
        } else {
            fork.settle()?;
        }
        Ok(ReplaySummary::of(&fork.done().await?))
    };
    let summary = match played.await {
        Ok(summary) => summary,
        Err(error) => {
            fork.kill().await?;
            return Err(error);
        }
    };
    let device = fork.freeze().await?;
    make_dirs(into)?;
    copy_state(work.ram_path(), work.disk_paths(), device, into).await?;
    Ok(summary)
}

/// Makes a state's folder. It holds what the user sees and types, and so does what is around it.
fn make_dirs(dir: &Path) -> Result<()> {
    dir.parent().map_or(Ok(()), files::make_dir)?;
    files::make_dir(dir)
}

/// Writes a state as plain images: `ram.img`, `disk.img` (`disk1.img` and so on for more of
/// them) and `device.bin`.
async fn copy_state(ram: PathBuf, disks: Vec<PathBuf>, device: Vec<u8>, into: &Path) -> Result<()> {
    let into = into.to_owned();
    local::blocking(move || {
        files::copy_sparse(&ram, &into.join("ram.img"))?;
        for (index, disk) in disks.iter().enumerate() {
            let name = match index {
                0 => "disk.img".to_owned(),
                more => format!("disk{more}.img"),
            };
            copy_disk(&DiskImage::open(disk)?, &into.join(name))?;
        }
        let path = into.join("device.bin");
        fs::write(&path, &device).map_err(Error::file("write", &path))
    })
    .await
}

/// Writes a disk as its guest sees it, sparse.
fn copy_disk(disk: &DiskImage, to: &Path) -> Result<()> {
    let file = File::create(to).map_err(Error::file("create", to))?;
    file.set_len(disk.pages() * PAGE_SIZE as u64)
        .map_err(Error::file("size", to))?;
    let mut buffer = vec![0; AT_ONCE as usize * PAGE_SIZE];
    let mut first = 0;
    while first < disk.pages() {
        let count = AT_ONCE.min(disk.pages() - first);
        let into = &mut buffer[..count as usize * PAGE_SIZE];
        disk.read_many(PageIndex(first), into)
            .map_err(Error::file("copy a disk to", to))?;
        for (index, page) in into.chunks(PAGE_SIZE).enumerate() {
            if page.iter().any(|byte| *byte != 0) {
                file.write_all_at(page, (first + index as u64) * PAGE_SIZE as u64)
                    .map_err(Error::file("write", to))?;
            }
        }
        first += count;
    }
    Ok(())
}
