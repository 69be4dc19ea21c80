//! `make power-cuts`: what two sites find after a power cut, at any moment of their life with a VM.
//!
//! The real program moves a real (very small) VM between two state directories, each on an ext4 of
//! its own whose writes and flushes are noted by the disk below it. Then, for moments taken by
//! chance, images of both disks are made as a power cut would leave them: what was flushed is
//! there, and any part of what was not ([`cut`]). They are mounted, which replays their journals,
//! and looked at ([`look`]): generations are whole or absent, everything that a command had said
//! to be done is there, and at most one site has the VM. Each image is read by the real program,
//! and with some of them the sites go on ([`after`]): they agree on the owner, the VM runs there
//! and is refused at the other, and moves.
//!
//! The memory of both hosts is lost as well: all of `/dev/shm` that the program sees is a tmpfs of
//! this program's own, which is emptied.
//!
//! Promises that disks don't make are not relied on (a sector is whole or not there; nothing else
//! is). Not shown: file systems other than ext4, though the second site's is told to give up what
//! ext4 does for careless programs.

mod after;
mod chance;
mod cut;
mod disk;
mod guest;
mod look;
mod story;

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Parser;
use testkit::link::parse_delay;
use testkit::mounts::{self, Mounted, run};
use testkit::preload;
use testkit::site::{self, Site, qemus_on};

use chance::Chance;
use cut::{Durable, Fate};
use disk::{Disks, Event, Log};
use story::{Fact, Known, SITES, Story};

/// This host can't do it (as test programs of automake say it).
const SKIPPED: u8 = 77;
/// Each site's disk.
const DISK_BYTES: u64 = 512 << 20;
/// How each site's file system is mounted. The second neither writes a file's data before its name
/// nor helps a program that renames without making durable.
const OPTIONS: [&str; 2] = [
    "loop,noatime",
    "loop,noatime,data=writeback,noauto_da_alloc",
];
/// Where running guests' memory is.
const SHARED_MEMORY: &str = "/dev/shm";

/// Cuts the power of two sites at moments taken by chance, and looks at what they find.
#[derive(Parser)]
#[command(name = "power")]
struct Options {
    /// How many cuts
    #[arg(long, value_name = "N", default_value_t = 300)]
    cuts: usize,
    /// After every how many of them the sites go on
    #[arg(long, value_name = "N", default_value_t = 15)]
    go_on_each: usize,
    /// What chance begins with
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Begin no cut after so long
    #[arg(long, value_name = "TIME", value_parser = parse_delay)]
    within: Option<Duration>,
    /// Everything happens in this folder, in memory
    #[arg(long, value_name = "DIR", default_value = "target/power")]
    place: PathBuf,
    /// Has the program's fsyncs do nothing: what it promises can't hold then, which shows that this
    /// program would see it
    #[arg(long)]
    without_fsync: bool,
    /// Keeps the images of cuts that broke a promise in this folder
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,
}

fn main() -> ExitCode {
    let options = Options::parse();
    if let Some(lacking) = lacking() {
        eprintln!("skipped: {lacking}");
        return ExitCode::from(SKIPPED);
    }
    match begin(&options) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// What this host lacks, if anything.
fn lacking() -> Option<String> {
    if !rustix::process::getuid().is_root() {
        return Some("only root mounts images".into());
    }
    for device in ["/dev/fuse", "/dev/loop-control"] {
        if !Path::new(device).exists() {
            return Some(format!("there is no {device}"));
        }
    }
    let programs = ["mkfs.ext4", "e2fsck", "qemu-img"];
    let lacking = programs.into_iter().find(|program| {
        let tried = Command::new(program).arg("--version").output();
        tried.is_err()
    });
    lacking.map(|program| format!("there is no {program}"))
}

/// Whether all promises were kept.
fn begin(options: &Options) -> anyhow::Result<bool> {
    mounts::enter_namespace()?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        // Whatever ends it, dropping the future ends all processes.
        tokio::select! {
            outcome = cut_all(options) => outcome,
            _ = tokio::signal::ctrl_c() => Err(anyhow::anyhow!("interrupted")),
        }
    })
}

/// Where everything is.
struct Place {
    dir: PathBuf,
    // In the order in which they go.
    memory: Mounted,
    _all: Mounted,
}

impl Place {
    fn new(dir: &Path) -> anyhow::Result<Self> {
        std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let dir = dir.canonicalize()?;
        let all = Mounted::tmpfs("mode=700", &dir)?;
        Ok(Self {
            memory: Mounted::tmpfs("mode=1777", Path::new(SHARED_MEMORY))?,
            _all: all,
            dir,
        })
    }

    /// Where a site's file system is mounted.
    fn root(&self, site: usize) -> PathBuf {
        self.dir.join(SITES[site])
    }

    /// A site's disk as it was before anything happened.
    fn blank(&self, site: usize) -> PathBuf {
        self.dir.join(format!("{}.blank", SITES[site]))
    }

    /// A site's disk after a power cut.
    fn cut(&self, site: usize) -> PathBuf {
        self.dir.join(format!("{}.cut", SITES[site]))
    }

    fn mount(&self, site: usize, image: &Path) -> anyhow::Result<Mounted> {
        let words = ["-t", "ext4", "-o", OPTIONS[site]].map(OsStr::new);
        let words = [&words[..], &[image.as_os_str()]].concat();
        Mounted::new(&words, &self.root(site))
    }

    /// Nothing that was in memory is there any more.
    fn forget_memory(&self) -> anyhow::Result<()> {
        for entry in std::fs::read_dir(self.memory.dir())? {
            std::fs::remove_dir_all(entry?.path())?;
        }
        Ok(())
    }
}

fn make_disk(image: &Path) -> anyhow::Result<()> {
    std::fs::File::create(image)
        .and_then(|file| file.set_len(DISK_BYTES))
        .with_context(|| format!("cannot make {}", image.display()))?;
    // All of it is written now: nothing is left to be initialised later.
    let words = "-q -m 0 -J size=8 -E lazy_itable_init=0,lazy_journal_init=0,nodiscard";
    run(
        "mkfs.ext4",
        words.split(' ').map(OsStr::new).chain([image.as_os_str()]),
    )
}

/// Both sites at their places; their state directories may not be there.
fn sites_at(place: &Place) -> anyhow::Result<[Site; 2]> {
    let program = site::program()?;
    // Not the mount point itself, in which mkfs has made a folder of its own.
    Ok([0, 1].map(|site| Site::new(&program, SITES[site], place.root(site).join("site"))))
}

/// Ends all processes of the sites; what they wrote stays.
fn end_all(sites: &mut [Site; 2]) {
    for site in sites {
        site.kill_agent();
        for qemu in qemus_on(site.dir()) {
            qemu.kill();
        }
    }
}

async fn cut_all(options: &Options) -> anyhow::Result<bool> {
    let begun = Instant::now();
    let place = Place::new(&options.place)?;
    let mut sites = sites_at(&place)?;
    if options.without_fsync {
        let library = preload::build(&place.dir, "without_fsync", include_str!("without_fsync.c"))?;
        for site in &mut sites {
            site.set_env("LD_PRELOAD", &library);
        }
    }
    let told = tell(&place, &mut sites).await;
    end_all(&mut sites);
    let events = told?;
    let (writes, flushes) = count(&events);
    println!(
        "{writes} writes and {flushes} flushes in {:.0} s",
        begun.elapsed().as_secs_f64()
    );
    let mut disks = Vec::new();
    for site in 0..2 {
        disks.push(Durable::new(&place.blank(site), site)?);
    }
    let mut broken = 0;
    let mut done = 0;
    for (number, moment) in moments(&events, options).into_iter().enumerate() {
        if options
            .within
            .is_some_and(|within| begun.elapsed() > within)
        {
            println!("the time is over");
            break;
        }
        let mut chance = Chance::new(options.seed.wrapping_add(number as u64 + 1) << 32);
        let mut fates = Vec::new();
        for (site, disk) in disks.iter_mut().enumerate() {
            let fate = Fate::any(&mut chance);
            let left = disk.cut(&events, moment, fate, &mut chance, &place.cut(site))?;
            fates.push(format!("{fate:?} ({} KiB)", left >> 10));
        }
        if let Some(keep) = &options.keep {
            keep_images(&place, keep)?;
        }
        let known = Known::after(&events[..moment]);
        let goes_on = number % options.go_on_each == options.go_on_each - 1;
        let wrong = judge(&place, &mut sites, &known, goes_on).await;
        done += 1;
        if wrong.is_empty() {
            continue;
        }
        broken += 1;
        println!(
            "cut {number}, after event {moment}, of the last writes {}:",
            fates.join(" and ")
        );
        for violation in wrong {
            println!("  {violation}");
        }
        if let Some(keep) = &options.keep {
            println!(
                "  the images are in {}",
                keep_broken(keep, number)?.display()
            );
        }
    }
    println!(
        "{done} power cuts in {:.0} s; {broken} broke a promise",
        begun.elapsed().as_secs_f64()
    );
    Ok(broken == 0)
}

/// Has the sites live, and notes what their disks are told.
async fn tell(place: &Place, sites: &mut [Site; 2]) -> anyhow::Result<Vec<Event<Fact>>> {
    let log = Log::new();
    let images = [0, 1].map(|site| place.dir.join(format!("{}.disk", SITES[site])));
    for (site, image) in images.iter().enumerate() {
        make_disk(image)?;
        cut::copy(&std::fs::File::open(image)?, &place.blank(site))?;
    }
    let served = place.dir.join("disks");
    std::fs::create_dir(&served)?;
    let disks = Disks::serve(&served, &images, &log)?;
    let mut mounted = Vec::new();
    for site in 0..2 {
        mounted.push(place.mount(site, &disks.path(site))?);
    }
    let image = place.dir.join("guest");
    guest::write_disk(&image)?;
    let mut story = Story {
        sites,
        log: &log,
        disk: &image,
    };
    let told = story.tell().await;
    let events = log.take();
    end_all(sites);
    for mounted in mounted {
        release(mounted).await?;
    }
    drop(disks);
    for image in images {
        std::fs::remove_file(image)?;
    }
    place.forget_memory()?;
    told.map(|()| events)
}

/// Unmounts; who was killed just now still has files open.
async fn release(mounted: Mounted) -> anyhow::Result<()> {
    const LIMIT: Duration = Duration::from_secs(20);
    const STEP: Duration = Duration::from_millis(20);
    let end = Instant::now() + LIMIT;
    let mut mounted = mounted;
    loop {
        match mounted.unmount() {
            Ok(()) => return Ok(()),
            Err((back, error)) if Instant::now() < end => {
                mounted = back;
                drop(error);
                tokio::time::sleep(STEP).await;
            }
            Err((_, error)) => return Err(error),
        }
    }
}

fn count<R>(events: &[Event<R>]) -> (usize, usize) {
    let writes = events
        .iter()
        .filter(|event| matches!(event, Event::Write { .. }));
    let flushes = events
        .iter()
        .filter(|event| matches!(event, Event::Flush { .. }));
    (writes.count(), flushes.count())
}

/// When the power is cut, in order: half of them after any event, half of them between any two
/// flushes, as most writes are of the long files.
fn moments<R>(events: &[Event<R>], options: &Options) -> Vec<usize> {
    let mut chance = Chance::new(options.seed);
    let flushes: Vec<_> = events
        .iter()
        .enumerate()
        .filter(|(_, event)| matches!(event, Event::Flush { .. }))
        .map(|(index, _)| index + 1)
        .chain([events.len()])
        .collect();
    let mut moments: Vec<_> = (0..options.cuts)
        .map(|_| {
            if chance.coin() {
                return chance.below(events.len() + 1);
            }
            let end = chance.below(flushes.len());
            let begin = end.checked_sub(1).map_or(0, |before| flushes[before]);
            begin + chance.below(flushes[end] - begin + 1)
        })
        .collect();
    moments.sort_unstable();
    moments
}

/// What is wrong after a cut.
async fn judge(
    place: &Place,
    sites: &mut [Site; 2],
    known: &Known,
    goes_on: bool,
) -> look::Violations {
    match found(place, sites, known, goes_on).await {
        Ok(wrong) => wrong,
        Err(error) => vec![format!("{error:#}")],
    }
}

async fn found(
    place: &Place,
    sites: &mut [Site; 2],
    known: &Known,
    goes_on: bool,
) -> anyhow::Result<look::Violations> {
    let mut mounted = Vec::new();
    for site in 0..2 {
        mounted.push(place.mount(site, &place.cut(site))?);
    }
    let looks = |sites: &[Site; 2]| {
        let dirs = sites.each_ref().map(|site| site.dir().to_owned());
        let known = known.clone();
        tokio::task::spawn_blocking(move || {
            look::files(dirs.each_ref().map(PathBuf::as_path), &known)
        })
    };
    let mut wrong = looks(sites).await?;
    let said = |went: anyhow::Result<()>| went.err().map(|error| format!("{error:#}"));
    wrong.extend(said(after::reads(sites, known).await));
    if goes_on && wrong.is_empty() {
        let went = said(after::goes_on(sites, known).await);
        if went.is_some() {
            for site in &*sites {
                eprintln!("-- agent of {}:\n{}", site.name(), site.agent_log());
            }
        }
        wrong.extend(went);
    }
    end_all(sites);
    for mounted in mounted {
        release(mounted).await?;
    }
    place.forget_memory()?;
    for (site, name) in SITES.iter().enumerate() {
        // That the file system itself is sound shows that cuts are of the kind that it stands.
        let check = ["-f", "-n"].map(OsStr::new);
        let image = place.cut(site);
        if let Err(error) = run("e2fsck", check.into_iter().chain([image.as_os_str()])) {
            wrong.push(format!("the file system of {name} is damaged: {error:#}"));
        }
    }
    Ok(wrong)
}

/// Keeps both images for as long as it is not known whether they are sound.
fn keep_images(place: &Place, keep: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(keep)?;
    for (site, name) in SITES.iter().enumerate() {
        let sparse = ["--sparse=always"].map(OsStr::new);
        let to = keep.join(name);
        let words = [place.cut(site), to];
        run(
            "cp",
            sparse
                .into_iter()
                .chain(words.iter().map(|path| path.as_os_str())),
        )?;
    }
    Ok(())
}

fn keep_broken(keep: &Path, number: usize) -> anyhow::Result<PathBuf> {
    let dir = keep.join(format!("cut-{number}"));
    std::fs::create_dir_all(&dir)?;
    for site in SITES {
        std::fs::rename(keep.join(site), dir.join(site))?;
    }
    Ok(dir)
}
