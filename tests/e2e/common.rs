//! Sites with a guest, ready to be tested.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use testkit::robot::Robot;
use testkit::sector;
use testkit::session::{SHORT, Session};
use testkit::site::{Difference, Recorder, Site, compare_disks, compare_files, newest_generation};
use tokio::sync::{OnceCell, Semaphore, SemaphorePermit};

/// The VM of every test.
pub(crate) const VM: &str = "desk";
/// What only has to end does so within this.
pub(crate) const SOON: Duration = Duration::from_secs(30);
/// Cleaning up after a conversation that was cut off takes a moment.
const CLEAN_LIMIT: Duration = Duration::from_secs(30);

/// Two guests at once are what two processors carry.
static GUESTS: Semaphore = Semaphore::const_new(2);
static GUEST: OnceCell<String> = OnceCell::const_new();

pub(crate) fn program() -> PathBuf {
    env!("CARGO_BIN_EXE_replay-migrate").into()
}

/// Sites of a test. The sites go before their folder does.
pub(crate) struct World {
    pub(crate) a: Site,
    pub(crate) b: Site,
    pub(crate) dir: TempDir,
    _turn: SemaphorePermit<'static>,
}

/// The folder of the guest, built and booted once for all.
pub(crate) async fn guest() -> &'static str {
    let build = async {
        let dir = tempfile::tempdir().unwrap();
        let site = Site::new(program(), "builder", dir.path());
        site.build_guest(&[]).await.unwrap()
    };
    GUEST.get_or_init(|| build).await
}

/// All that `vm create` knows against chance.
pub(crate) const CHANCE_TAKEN_OUT: &[&str] = &["--replay-friendly", "--icount"];

impl World {
    /// Sites A and B, which have the guest's read-only files and no VM.
    pub(crate) async fn new() -> Self {
        let turn = GUESTS.acquire().await.unwrap();
        let guest = guest().await;
        let dir = tempfile::tempdir().unwrap();
        let site = |name: &str| Site::new(program(), name, dir.path().join(name));
        let world = Self {
            a: site("a"),
            b: site("b"),
            dir,
            _turn: turn,
        };
        world
            .b
            .json(&["vm", "create", "images", "--disk", guest])
            .await
            .unwrap();
        world
            .b
            .json(&["vm", "delete", "images", "--yes"])
            .await
            .unwrap();
        world
    }

    /// The folder of the guest, booted once with [`CHANCE_TAKEN_OUT`] as well.
    pub(crate) async fn guest_without_chance(&self) -> String {
        let site = Site::new(program(), "builder", self.dir.path().join("builder"));
        site.build_guest(CHANCE_TAKEN_OUT).await.unwrap()
    }

    /// As [`Self::new`], with both agents up, and the VM running at A.
    pub(crate) async fn with_vm() -> Self {
        let mut world = Self::new().await;
        testkit::site::introduce(&mut world.a, &mut world.b)
            .await
            .unwrap();
        start_vm(&world.a).await;
        world
    }
}

/// Makes and starts the VM.
pub(crate) async fn start_vm(site: &Site) {
    site.json(&["vm", "create", VM, "--disk", guest().await])
        .await
        .unwrap();
    site.json(&["vm", "start", VM]).await.unwrap();
    assert_eq!(site.state(VM).await.unwrap(), "running");
}

/// A user works for a quarter of a minute through the recorder.
pub(crate) async fn work(recorder: &Recorder) {
    let session: Session = SHORT.parse().unwrap();
    let mut robot = Robot::connect(&recorder.vnc).await.unwrap();
    session.play(&mut robot, None, |_, _| {}).await.unwrap();
}

/// One migration in a hundred or so has to mend a page: hashes are as short as that allows.
pub(crate) fn assert_hardly_refetched(report: &serde_json::Value) {
    let pages = report["refetched"].as_u64();
    assert!(pages.is_some_and(|pages| pages <= 2), "{report}");
}

/// The newest generations of both sites are the same, byte by byte.
pub(crate) fn assert_same_images(one: &Site, other: &Site) {
    let (number, left) = newest_generation(one.dir(), VM).unwrap();
    let (other_number, right) = newest_generation(other.dir(), VM).unwrap();
    assert_eq!(number, other_number);
    for file in ["ram.img", "device.bin"] {
        let difference = compare_files(&left.join(file), &right.join(file)).unwrap();
        assert_eq!(difference, Difference::None, "{file}");
    }
    let difference = compare_disks(&left.join("disk0.qcow2"), &right.join("disk0.qcow2")).unwrap();
    assert_eq!(difference, Difference::None, "disk");
}

/// How many QEMUs have a file of this folder open.
pub(crate) fn qemus_on(dir: &Path) -> usize {
    testkit::site::qemus_on(dir).len()
}

/// Waits until a condition of the outside world holds.
pub(crate) async fn eventually(what: &str, holds: impl Fn() -> bool) {
    let end = Instant::now() + CLEAN_LIMIT;
    while !holds() {
        assert!(
            Instant::now() < end,
            "after {} s still not: {what}",
            CLEAN_LIMIT.as_secs()
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// A disk of one sector that a PC's firmware runs: a guest that is up in seconds.
pub(crate) fn boot_sector(dir: &Path, code: &[u8], after: &[u8]) -> PathBuf {
    let path = dir.join("disk.raw");
    sector::write_disk(&path, code, after).unwrap();
    path
}

/// Makes and starts a VM with such a disk.
pub(crate) async fn start_sector(site: &Site, disk: &Path) {
    let disk = disk.to_str().unwrap();
    let small = ["--memory", "64", "--no-network"];
    let create = [&["vm", "create", VM, "--disk", disk][..], &small].concat();
    site.json(&create).await.unwrap();
    site.json(&["vm", "start", VM]).await.unwrap();
}
