//! Hubs: a standby that is not reached from where the VM runs is brought up to date by way of a third site,
//! which can't read what it holds.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;
use testkit::robot::Robot;
use testkit::sector::{KEY_COUNT, KEYS, START};
use testkit::site::{Site, introduce, newest_generation, whole_generation};

use crate::common::{
    VM, assert_hardly_refetched, assert_same_images, boot_sector, eventually, program, start_sector,
};

struct Sites {
    a: Site,
    hub: Site,
    b: Site,
    /// Bound first, it goes last: what runs in it is ended before.
    _dir: TempDir,
}

/// In the middle of the firmware, which lies in memory and stays as it is.
const FIRMWARE: usize = 0xf_8000;

/// Where nobody listens.
const NOWHERE: &str = "127.0.0.1:1";

/// A VM at A; A and B reach the hub and not one another. B has the image of the disk.
async fn sites() -> Sites {
    let dir = tempfile::tempdir().unwrap();
    let site = |name: &str| Site::new(program(), name, dir.path().join(name));
    let (mut a, mut hub, mut b) = (site("a"), site("hub"), site("b"));
    introduce(&mut a, &mut hub).await.unwrap();
    introduce(&mut b, &mut hub).await.unwrap();
    for (one, other) in [(&a, &b), (&b, &a)] {
        let key = other.key().await.unwrap();
        one.trust(other.name(), NOWHERE.parse().unwrap(), &key)
            .await
            .unwrap();
    }
    let disk = boot_sector(dir.path(), &KEYS, &[]);
    let disk_there = disk.to_str().unwrap();
    b.json(&["vm", "create", "other", "--disk", disk_there])
        .await
        .unwrap();
    start_sector(&a, &disk).await;
    let ram = a.live_ram(VM).await.unwrap();
    eventually("the sector is run", || {
        std::fs::read(&ram).unwrap()[START..].starts_with(&KEYS[..16])
    })
    .await;
    Sites {
        a,
        hub,
        b,
        _dir: dir,
    }
}

async fn epoch(a: &Site) -> Value {
    let done = a.json(&["sync", VM, "--to", "b@hub", "--once"]).await;
    done.unwrap()
}

async fn collect(b: &Site) -> Value {
    b.json(&["collect", "--from", "hub"]).await.unwrap()
}

/// What is there can't be taken; why.
async fn refused(b: &Site) -> String {
    let words = ["collect", "--from", "hub"];
    let finished = b.run(&words).await.unwrap();
    assert_eq!(finished.code, Some(3), "{}", finished.stderr);
    let lines = finished.lines.iter();
    let mut told = lines.map(|line| serde_json::from_str::<Value>(line).unwrap());
    let told = told.find(|line| line["refused"].is_array()).unwrap();
    assert_eq!(told["collected"], serde_json::json!([]), "{told}");
    told["refused"][0].as_str().unwrap().to_owned()
}

/// Changes a byte of a file.
fn change(path: &Path, at: usize) {
    let mut content = std::fs::read(path).unwrap();
    content[at] ^= 1;
    std::fs::write(path, content).unwrap();
}

fn files_below(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).unwrap();
    let paths = entries.map(|entry| entry.unwrap().path());
    let files = paths.flat_map(|path| {
        if path.is_dir() {
            files_below(&path)
        } else {
            vec![path]
        }
    });
    files.collect()
}

fn parcels(hub: &Site) -> Vec<PathBuf> {
    let mut parcels = files_below(&hub.dir().join("hub"));
    parcels.retain(|path| path.extension().is_some_and(|ending| ending == "parcel"));
    parcels
}

/// The keys that had been typed when a site's newest generation was made.
fn keys_at(site: &Site) -> u8 {
    let (_, dir) = newest_generation(site.dir(), VM).unwrap();
    std::fs::read(dir.join("ram.img")).unwrap()[KEY_COUNT]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_is_brought_up_to_date_by_way_of_a_hub_that_reads_nothing() {
    let Sites {
        _dir,
        a,
        hub,
        mut b,
    } = sites().await;
    let early = a
        .run(&["sync", VM, "--to", "b@hub", "--once"])
        .await
        .unwrap();
    assert_eq!(early.code, Some(3), "{}", early.stderr);
    assert!(early.stderr.contains("collect --from"), "{}", early.stderr);
    let nothing = collect(&b).await;
    assert_eq!(nothing["collected"], serde_json::json!([]), "{nothing}");

    // B has nothing of the VM but the image of its disk.
    let first = epoch(&a).await;
    let lies = hub.json(&["hub", "list"]).await.unwrap();
    assert_eq!(lies[0]["recipient"], "b", "{lies}");
    assert_eq!(lies[0]["by"], "a", "{lies}");
    assert!(lies[0]["from"].is_null(), "{lies}");
    let held = std::fs::read(&parcels(&hub)[0]).unwrap();
    let record = std::fs::read_to_string(a.dir().join("vms").join(VM).join("vm.json")).unwrap();
    assert!(record.contains(VM));
    for secret in [VM.as_bytes(), &KEYS[..16], b"pc-q35", b"qemu"] {
        let found = memchr::memmem::find(&held, secret);
        assert_eq!(found, None, "{}", String::from_utf8_lossy(secret));
    }
    let came = collect(&b).await;
    assert_eq!(came["collected"][0]["vm"], VM, "{came}");
    assert_eq!(came["collected"][0]["by"], "a", "{came}");
    assert_same_images(&a, &b);
    assert_eq!(b.state(VM).await.unwrap(), "elsewhere");
    assert!(
        files_below(&a.dir().join("vms"))
            .iter()
            .all(|path| !path.to_string_lossy().contains("packing"))
    );

    // Two epochs wait: what B takes follows one from the other.
    let recorder = a.record(VM).await.unwrap();
    for keys in ["abc", "de"] {
        let mut robot = Robot::connect(&recorder.vnc).await.unwrap();
        robot.type_text(keys).await.unwrap();
        let next = epoch(&a).await;
        let ratio = next["bytes_sent"].as_f64().unwrap() / first["bytes_sent"].as_f64().unwrap();
        assert!(ratio < 0.25, "{next} after {first}");
    }
    assert_eq!(parcels(&hub).len(), 2);
    let came = collect(&b).await;
    assert_eq!(came["collected"].as_array().unwrap().len(), 2, "{came}");
    assert_eq!(keys_at(&b), 5);
    assert_same_images(&a, &b);
    collect(&b).await;
    assert_eq!(parcels(&hub).len(), 0, "B has said that it has them");

    // What the hub changes is refused, and the next epoch goes on from what B has.
    let before = newest_generation(b.dir(), VM).unwrap().0;
    let mut robot = Robot::connect(&recorder.vnc).await.unwrap();
    robot.type_text("f").await.unwrap();
    epoch(&a).await;
    let parcel = parcels(&hub).remove(0);
    change(
        &parcel,
        std::fs::metadata(&parcel).unwrap().len() as usize / 2,
    );
    let why = refused(&b).await;
    assert!(why.contains("changed on its way"), "{why}");
    assert_eq!(newest_generation(b.dir(), VM).unwrap().0, before);
    assert_eq!(parcels(&hub).len(), 0, "it is of no use to anybody");
    robot.type_text("g").await.unwrap();
    epoch(&a).await;
    collect(&b).await;
    assert_eq!(keys_at(&b), 7);
    assert_same_images(&a, &b);

    // What has gone bad at B is not gone on from: the next epoch but one is told against an older one, or the image.
    let (bad, damaged) = newest_generation(b.dir(), VM).unwrap();
    change(&damaged.join("ram.img"), FIRMWARE);
    robot.type_text("h").await.unwrap();
    epoch(&a).await;
    refused(&b).await;
    robot.type_text("i").await.unwrap();
    epoch(&a).await;
    let lies = hub.json(&["hub", "list"]).await.unwrap();
    assert_ne!(lies[0]["from"], bad, "{lies}");
    collect(&b).await;
    assert_eq!(keys_at(&b), 9);
    assert_same_images(&a, &b);

    // Once there is a line, B is a standby like any other.
    drop(robot);
    b.stop_serving();
    let agent = b.serve_again().await.unwrap();
    a.trust("b", agent.addr, &agent.key).await.unwrap();
    let moved = a.json(&["switch", VM, "--to", "b"]).await.unwrap();
    assert_hardly_refetched(&moved);
    assert_eq!(b.state(VM).await.unwrap(), "running");
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_is_killed_what_comes_by_way_of_a_hub_is_whole() {
    /// Spread over packing, sending, fetching and applying.
    const KILLS: u32 = 12;
    const STEP: Duration = Duration::from_millis(83);
    let Sites {
        _dir,
        a,
        mut hub,
        b,
    } = sites().await;
    collect(&b).await;
    for kill in 0..KILLS {
        let sync = a.spawn(&["sync", VM, "--to", "b@hub", "--every", "1s"]);
        let fetch = b.spawn(&["collect", "--from", "hub", "--every", "100ms"]);
        let (sync, fetch) = (sync.unwrap(), fetch.unwrap());
        // Chance is what is wanted here: no moment is better than another.
        tokio::time::sleep(STEP * (kill + 3)).await;
        match kill % 3 {
            0 => sync.kill(),
            1 => fetch.kill(),
            _ => {
                hub.kill_agent();
                hub.serve_again().await.unwrap();
            }
        }
        sync.kill();
        fetch.kill();
        for site in [&a, &b] {
            let line = site.dir().join("vms").join(VM).join("generations");
            let folders = std::fs::read_dir(line).into_iter().flatten();
            let folders = folders.map(|folder| folder.unwrap().path());
            for folder in folders.filter(|folder| folder.join("manifest.json").exists()) {
                whole_generation(&folder).unwrap();
            }
        }
    }
    let made = newest_generation(a.dir(), VM).unwrap().0;
    assert!(made > 2, "only {made} generations were begun");
    epoch(&a).await;
    collect(&b).await;
    assert_same_images(&a, &b);
    assert_eq!(a.state(VM).await.unwrap(), "running");
    // Nothing is left of what the dead were at.
    assert!(!a.dir().join("vms").join(VM).join("packing").exists());
    let half = |path: &PathBuf| path.to_string_lossy().contains(".coming");
    hub.stop_serving();
    hub.serve_again().await.unwrap();
    assert_eq!(
        files_below(&hub.dir().join("hub"))
            .iter()
            .filter(|path| half(path))
            .count(),
        0
    );
}
