//! Standbys: sites that have a whole generation at any time, and soon a newer one.

use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;
use testkit::robot::{Chord, Robot, VncAddr};
use testkit::sector::{COUNTER, COUNTS, KEY_COUNT, KEYS, START};
use testkit::site::{Running, Site, introduce, newest_generation, whole_generation};
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;

use crate::common::{
    SOON, VM, assert_hardly_refetched, assert_same_images, boot_sector, eventually, program,
    start_sector,
};

struct Sites {
    a: Site,
    b: Site,
    c: Site,
    _dir: TempDir,
}

/// Three sites, and a VM at A that runs this.
async fn sites(code: &[u8]) -> Sites {
    let dir = tempfile::tempdir().unwrap();
    let site = |name: &str| Site::new(program(), name, dir.path().join(name));
    let (mut a, mut b, mut c) = (site("a"), site("b"), site("c"));
    introduce(&mut a, &mut b).await.unwrap();
    introduce(&mut a, &mut c).await.unwrap();
    start_sector(&a, &boot_sector(dir.path(), code, &[])).await;
    let ram = a.live_ram(VM).await.unwrap();
    // The firmware looks for disks first.
    eventually("the sector is run", || {
        std::fs::read(&ram).unwrap()[START..].starts_with(&code[..16])
    })
    .await;
    Sites { a, b, c, _dir: dir }
}

async fn type_keys(vnc: &VncAddr, keys: &str) {
    let mut robot = Robot::connect(vnc).await.unwrap();
    robot.type_text(keys).await.unwrap();
}

fn at(ram: &Path, byte: usize) -> u8 {
    std::fs::read(ram).unwrap()[byte]
}

/// The keys that had been typed when a site's newest generation was made.
fn keys_at(site: &Site) -> Option<u8> {
    let (_, dir) = newest_generation(site.dir(), VM).ok()?;
    Some(std::fs::read(dir.join("ram.img")).ok()?[KEY_COUNT])
}

/// Waits for an event of this kind that `wanted` picks.
async fn event(sync: &mut Running, kind: &str, wanted: impl Fn(&Value) -> bool) -> Value {
    let found = sync
        .until("tell", SOON, |line| line["sync"] == kind && wanted(line))
        .await
        .unwrap();
    found.unwrap()
}

/// The folders of all generations of a site.
fn generations(site: &Site) -> Vec<PathBuf> {
    let dir = site.dir().join("vms").join(VM).join("generations");
    let entries = std::fs::read_dir(dir).into_iter().flatten();
    let dirs = entries.map(|entry| entry.unwrap().path());
    dirs.filter(|dir| dir.join("manifest.json").exists())
        .collect()
}

/// How many overlays a site keeps in the line of generations.
fn disks(site: &Site) -> usize {
    let line = site.dir().join("vms").join(VM).join("generations");
    let folders = std::fs::read_dir(line).unwrap();
    let disks = folders.map(|folder| folder.unwrap().path().join("disk0.qcow2"));
    disks.filter(|disk| disk.exists()).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn standbys_are_brought_up_to_date_and_one_is_switched_to() {
    let Sites { _dir, a, b, mut c } = sites(&KEYS).await;
    // QEMU drops what is typed while the guest stands still for an epoch; the recorder has it wait.
    let recorder = a.record(VM).await.unwrap();
    let vnc = &recorder.vnc;
    let switch = ["switch", VM, "--to", "b"];
    let early = a.run(&switch).await.unwrap();
    assert_eq!(early.code, Some(3), "{}", early.stderr);
    assert!(early.stderr.contains("sync"), "{}", early.stderr);

    let words = ["sync", VM, "--to", "b", "--to", "c", "--every", "1s"];
    let mut sync = a.spawn(&words).unwrap();
    let first = event(&mut sync, "epoch", |_| true).await;
    assert_eq!(first["why"], "first");
    let both = a.run(&words).await.unwrap();
    assert_eq!(both.code, Some(3), "{}", both.stderr);
    type_keys(vnc, "abc").await;
    eventually("both have what was typed", || {
        [&b, &c].map(keys_at) == [Some(3); 2]
    })
    .await;
    assert_eq!(b.state(VM).await.unwrap(), "elsewhere");

    // One that is out of reach holds up nobody, and skips what it missed.
    c.stop_serving();
    type_keys(vnc, "de").await;
    eventually("B has it", || keys_at(&b) == Some(5)).await;
    event(&mut sync, "waiting", |line| line["site"] == "c").await;
    assert_eq!(keys_at(&c), Some(3));
    for _ in 0..2 {
        event(&mut sync, "epoch", |_| true).await;
    }
    let missed = newest_generation(c.dir(), VM).unwrap().0;
    c.serve_again().await.unwrap();
    let caught_up = event(&mut sync, "shipped", |line| line["site"] == "c").await;
    assert_eq!(caught_up["generation_from"].as_u64(), Some(missed));
    assert!(caught_up["generation"].as_u64().unwrap() > missed + 1);
    eventually("C has it", || keys_at(&c) == Some(5)).await;

    // While it stands still there is nothing new, and when it goes on there is.
    a.json(&["vm", "pause", VM]).await.unwrap();
    let (paused, _) = newest_generation(a.dir(), VM).unwrap();
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert!(newest_generation(a.dir(), VM).unwrap().0 <= paused + 1);
    a.json(&["vm", "resume", VM]).await.unwrap();
    type_keys(vnc, "x").await;
    eventually("both have it", || [&b, &c].map(keys_at) == [Some(6); 2]).await;

    // One that is gone for long is no reason to keep what the others have had.
    c.stop_serving();
    for _ in 0..4 {
        event(&mut sync, "shipped", |line| line["site"] == "b").await;
    }
    eventually("few are left", || generations(&a).len() <= 4).await;
    c.serve_again().await.unwrap();

    // What only was on its way is not kept, at either end, and neither are its disks.
    for site in [&a, &b, &c] {
        eventually("few are left", || generations(site).len() <= 3).await;
        eventually("chains are short", || disks(site) <= 5).await;
    }
    type_keys(vnc, "fg").await;
    let moved = a.json(&switch).await.unwrap();
    assert_eq!(moved["strategy"], "live");
    assert_hardly_refetched(&moved);
    assert!(moved["generation_from"].as_u64().unwrap() > missed);
    assert_same_images(&a, &b);
    assert_eq!(keys_at(&b), Some(8));
    assert_eq!(b.state(VM).await.unwrap(), "running");
    assert_eq!(a.state(VM).await.unwrap(), "elsewhere");
    let ended = sync.finish(SOON).await.unwrap().success().unwrap();
    let ended: Value = ended.last().unwrap();
    assert_eq!(ended["ended"], "moved", "{ended}");
    assert!(ended["epochs"].as_u64().unwrap() >= 3, "{ended}");
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_that_is_typed_through_the_recorder_is_lost_in_an_epoch() {
    let Sites { _dir, a, b, .. } = sites(&KEYS).await;
    let recorder = a.record(VM).await.unwrap();
    let words = ["sync", VM, "--to", "b", "--every", "1s"];
    let mut sync = a.spawn(&words).unwrap();
    let mut robot = Robot::connect(&recorder.vnc).await.unwrap();
    let mut typed = 0;
    for _ in 0..4 {
        // The guest stands still somewhere in these.
        event(&mut sync, "shipped", |_| true).await;
        for _ in 0..20 {
            robot.type_text("x").await.unwrap();
            typed += 1;
        }
    }
    eventually("B has all of it", || keys_at(&b) == Some(typed)).await;
    sync.stop().await.unwrap();
    drop(robot);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_epoch_goes_by_log_where_one_was_kept() {
    let Sites { _dir, a, b, .. } = sites(&KEYS).await;
    let words = ["sync", VM, "--to", "b", "--every", "2s", "--by", "log"];
    let mut sync = a.spawn(&words).unwrap();
    let unrecorded = event(&mut sync, "shipped", |_| true).await;
    assert!(unrecorded["by_log"].is_null(), "{unrecorded}");
    let recorder = a.record(VM).await.unwrap();
    // An epoch may begin between any two keys.
    let played = Cell::new(0);
    let by_log = |events: u64| {
        move |line: &Value, played: &Cell<u64>| {
            let replay = &line["by_log"]["replay"];
            played.set(played.get() + replay["events"].as_u64().unwrap_or_default());
            played.get() >= events
        }
    };
    type_keys(&recorder.vnc, "abc").await;
    let (all, later) = (by_log(6), by_log(10));
    let shipped = event(&mut sync, "shipped", |line| all(line, &played)).await;
    assert!(shipped["bytes"]["log"].as_u64().unwrap() > 0, "{shipped}");
    assert_eq!(keys_at(&b), Some(3));
    // From the middle of the log on, too.
    type_keys(&recorder.vnc, "de").await;
    event(&mut sync, "shipped", |line| later(line, &played)).await;
    assert_eq!(keys_at(&b), Some(5));
    // Where something is missing, it goes by state.
    a.json(&["record", VM, "--pause"]).await.unwrap();
    type_keys(&recorder.vnc, "f").await;
    a.json(&["record", VM, "--resume"]).await.unwrap();
    event(&mut sync, "shipped", |line| line["by_log"].is_null()).await;
    eventually("B has it all the same", || keys_at(&b) == Some(6)).await;
    sync.stop().await.unwrap();
    let once = ["sync", VM, "--to", "b", "--once", "--by", "less"];
    a.json(&once).await.unwrap();
    assert_same_images(&a, &b);
    assert_eq!(a.state(VM).await.unwrap(), "running");
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_is_killed_a_standby_is_whole() {
    /// Spread over an epoch and its shipping.
    const KILLS: u64 = 12;
    const STEP: Duration = Duration::from_millis(97);
    let Sites { _dir, a, mut b, .. } = sites(&COUNTS).await;
    let words = ["sync", VM, "--to", "b", "--every", "1s"];
    for kill in 0..KILLS {
        let sync = a.spawn(&words).unwrap();
        // Chance is what is wanted here: no moment is better than another.
        tokio::time::sleep(STEP * (kill % 7) as u32 + STEP).await;
        if kill % 2 == 1 {
            b.kill_agent();
            b.serve_again().await.unwrap();
        }
        sync.kill();
        for site in [&a, &b] {
            for generation in generations(site) {
                whole_generation(&generation).unwrap();
            }
        }
    }
    let made = newest_generation(a.dir(), VM).unwrap().0;
    assert!(made > 2, "only {made} generations were begun");
    // A checkpoint that was killed leaves no guest that stands still.
    let ram = a.live_ram(VM).await.unwrap();
    let before = at(&ram, COUNTER);
    eventually("it counts", || at(&ram, COUNTER) != before).await;
    let once = a.json(&["sync", VM, "--to", "b", "--once"]).await;
    let once = once.unwrap();
    assert_eq!(once["ended"], "done", "{once}");
    assert_same_images(&a, &b);
    assert_eq!(a.state(VM).await.unwrap(), "running");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_epoch_begins_when_something_has_happened() {
    let Sites { _dir, a, b, c } = sites(&KEYS).await;
    let recorder = a.record(VM).await.unwrap();
    let words = [
        "sync",
        VM,
        "--to",
        "b",
        "--when-left",
        "--when-locked",
        "--cap",
        "100mbit",
    ];
    let mut sync = a.spawn(&words).unwrap();
    event(&mut sync, "shipped", |_| true).await;
    type_keys(&recorder.vnc, "abc").await;
    let left = event(&mut sync, "epoch", |_| true).await;
    assert_eq!(left["why"], "left");
    event(&mut sync, "shipped", |_| true).await;
    assert_eq!(keys_at(&b), Some(3));
    // Locked by the keyboard, while the user looks on.
    let mut robot = Robot::connect(&recorder.vnc).await.unwrap();
    robot
        .key(&Chord::parse("ctrl+alt+l").unwrap())
        .await
        .unwrap();
    let locked = event(&mut sync, "epoch", |_| true).await;
    assert_eq!(locked["why"], "locked");
    drop(robot);
    let left = event(&mut sync, "epoch", |_| true).await;
    assert_eq!(left["why"], "left");
    // Made by somebody else, it is shipped as well. Firmware may count what locks a desktop.
    let all = keys_at(&a).unwrap() + 1;
    type_keys(&recorder.vnc, "d").await;
    a.json(&["checkpoint", VM]).await.unwrap();
    event(&mut sync, "shipped", |_| keys_at(&b) == Some(all)).await;
    // Somebody has it hold still, and somebody else wants that as well.
    let vm = site::Store::open(a.dir()).unwrap().vm(&VM.parse().unwrap());
    let socket = vm.runtime_dir("sync").unwrap().join("sync.sock");
    let mut first = UnixStream::connect(socket).await.unwrap();
    assert_eq!(first.read_u8().await.unwrap(), b'h');
    let seed = a.json(&["seed", VM, "--to", "c"]);
    tokio::time::timeout(SOON, seed).await.unwrap().unwrap();
    drop(first);
    let stopped: Value = sync.stop().await.unwrap().last().unwrap();
    assert_eq!(stopped["ended"], "stopped", "{stopped}");
    assert_eq!(keys_at(&c), Some(all));
    assert_eq!(a.state(VM).await.unwrap(), "running");
}
