use std::os::unix::fs::MetadataExt;

use super::*;
use crate::disks;
use crate::generation::{GenerationId, ImageInfo, Manifest};
use crate::identity::SiteKey;
use crate::local::Live;
use crate::peers::Peer;
use crate::plan::Feasible;
use crate::protocol::Welcome;
use crate::report::Strategy;
use crate::store::Store;
use crate::vm::{BaseFile, Id, VmRecord};

mod merging;

const RAM: u64 = 1 << 20;

/// A VM with one disk and no generation yet, that this site holds.
fn vm(root: &Path) -> (VmDir, VmRecord) {
    let store = Store::open(root.join("site")).unwrap();
    let image = root.join("disk.raw");
    fs::write(&image, vec![7; 1 << 16]).unwrap();
    let disk: BaseFile = store.import_disk(&image).unwrap();
    let vm = store.vm(&"desk".parse().unwrap());
    let record = VmRecord {
        disks: vec![disk],
        ..VmRecord::example()
    };
    let lease = Lease::Held {
        fence: 3,
        transfer: None,
    };
    vm.create(&record, &lease).unwrap();
    (vm, record)
}

/// Files as a generation has them, without a manifest.
fn unfinished(vm: &VmDir, record: &VmRecord, number: u64, on: Option<u64>) {
    let files = vm.generation(number);
    files::make_dir(files.dir()).unwrap();
    fs::write(files.ram(), vec![number as u8; RAM as usize]).unwrap();
    fs::write(files.device(), b"device").unwrap();
    fs::write(files.dir().join("ram.tree"), b"tree").unwrap();
    fs::write(files.dir().join("disk0.tree"), b"tree").unwrap();
    disks::overlay_on(vm, record, on, 0, &files.disk(0)).unwrap();
}

fn generation(vm: &VmDir, record: &VmRecord, number: u64, on: Option<u64>) -> Manifest {
    unfinished(vm, record, number, on);
    let image = |byte| ImageInfo {
        bytes: 1,
        root: reconciler::Root([byte; 32]),
    };
    let manifest = Manifest::new(
        record.id,
        number,
        on,
        record.hardware.clone(),
        String::new(),
        [image(number as u8), image(0)],
        vec![image(number as u8)],
    );
    vm.generation(number).publish(&manifest).unwrap();
    manifest
}

/// 1 <- 2 <- 3, each with a log.
fn line(vm: &VmDir, record: &VmRecord) -> Vec<Manifest> {
    let on = [None, Some(1), Some(2)];
    let made = (1..)
        .zip(on)
        .map(|(number, on)| {
            fs::write(vm.log_path(number), b"log").unwrap();
            generation(vm, record, number, on)
        })
        .collect();
    files::remove_dir(&vm.dir().join("live")).unwrap();
    made
}

fn whole(vm: &VmDir) -> Vec<u64> {
    let all = vm.generations().unwrap();
    all.iter().map(|manifest| manifest.generation).collect()
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = files_in(dir)
        .unwrap()
        .iter()
        .map(|path| path.file_name().unwrap().to_str().unwrap().to_owned())
        .collect();
    names.sort();
    names
}

/// Every overlay's chain can be read, down to the base image.
fn assert_readable(vm: &VmDir, number: u64) {
    let image = disks::DiskImage::open(&vm.generation(number).disk(0)).unwrap();
    assert_eq!(image.bytes(), 1 << 16);
}

fn trust(vm: &VmDir, name: &str) -> Peer {
    let elsewhere = tempfile::tempdir().unwrap();
    let key: SiteKey = Store::open(elsewhere.path())
        .unwrap()
        .identity()
        .unwrap()
        .key();
    let addr = "127.0.0.1:1".parse().unwrap();
    let peer = Peer::new(name.parse().unwrap(), addr, key);
    vm.store().peers().trust(peer.clone(), None).unwrap();
    peer
}

async fn prune_all(vm: &VmDir) -> Pruned {
    prune(vm, Limits::default(), false).await.unwrap()
}

#[tokio::test]
async fn what_is_pruned_keeps_disks_that_others_rest_on() {
    let dir = tempfile::tempdir().unwrap();
    let (vm, record) = vm(dir.path());
    line(&vm, &record);
    let told = prune(&vm, Limits::default(), true).await.unwrap();
    assert_eq!(whole(&vm), [1, 2, 3], "a dry run changes nothing");
    let used = |number| fs::metadata(vm.generation(number).ram()).unwrap().blocks() * 512;
    let ram = used(1) + used(2);
    let done = prune_all(&vm).await;
    assert_eq!((told.freed, told.left), (done.freed, done.left));
    assert!(done.freed >= ram && ram >= 2 * RAM, "{done:?}");
    let fates: Vec<_> = done.taken.iter().map(|t| (t.generation, t.fate)).collect();
    assert_eq!(fates, [(1, Fate::Disks), (2, Fate::Disks)]);
    assert_eq!(done.logs, [1, 2]);
    assert_eq!(whole(&vm), [3]);
    let merged = Merged {
        disk: 0,
        into: 2,
        from: vec![1],
    };
    assert_eq!(told.merged, std::slice::from_ref(&merged));
    assert_eq!(done.merged, [merged]);
    assert_eq!(vm.line().unwrap(), [2, 3]);
    let left = ["disk0.qcow2", "pruned.json"];
    assert_eq!(names(vm.generation(2).dir()), left);
    assert_readable(&vm, 3);
    let again = prune_all(&vm).await;
    assert!(again.taken.is_empty() && again.logs.is_empty(), "{again:?}");
    assert_eq!(again.freed, 0);
    assert!(again.merged.is_empty());
}

#[tokio::test]
async fn what_a_peer_has_and_the_run_began_with_stays() {
    let dir = tempfile::tempdir().unwrap();
    let (vm, record) = vm(dir.path());
    let made = line(&vm, &record);
    generation(&vm, &record, 4, Some(3));
    generation(&vm, &record, 5, Some(4));
    let b = trust(&vm, "b");
    seen::met(&vm, &b, &[made[0].identity()]).unwrap();
    let live = Live {
        generation: Some(4),
        overlays: Vec::new(),
        ran: true,
    };
    files::make_dir(&vm.live_dir()).unwrap();
    live.store(&vm).unwrap();
    let listed = list(&vm).await.unwrap();
    let relied: Vec<_> = listed.iter().map(|l| l.relied_on_by.clone()).collect();
    assert_eq!(relied[0], [Reliance::Peer("b".into())]);
    assert!(relied[1].is_empty());
    assert_eq!(relied[2], [Reliance::Log]);
    assert_eq!(relied[3], [Reliance::Run]);
    assert_eq!(relied[4], [Reliance::Newest]);
    assert_eq!(listed[1].below, [3]);
    assert_eq!(listed[1].prune, Fate::Disks);
    prune_all(&vm).await;
    assert_eq!(whole(&vm), [1, 3, 4, 5]);
    // A replay from 1 goes through 2.
    assert!(vm.log_path(2).exists());
    // Another content under that number is not what the peer has.
    let other = GenerationId {
        number: 3,
        ..made[0].identity()
    };
    seen::met(&vm, &b, &[other]).unwrap();
    prune_all(&vm).await;
    assert_eq!(whole(&vm), [3, 4, 5]);
    assert!(!vm.log_path(2).exists());
}

#[tokio::test]
async fn a_stale_copy_is_not_kept_for_its_logs() {
    let dir = tempfile::tempdir().unwrap();
    let (vm, record) = vm(dir.path());
    line(&vm, &record);
    generation(&vm, &record, 4, None);
    let b = trust(&vm, "b");
    let elsewhere = Lease::Elsewhere {
        fence: 4,
        owner: b.key,
        owner_name: "b".into(),
    };
    elsewhere.store(&vm.lease_path()).unwrap();
    let done = prune_all(&vm).await;
    assert!(done.taken.iter().all(|taken| taken.fate == Fate::Go));
    assert_eq!(names(&vm.dir().join("generations")), ["4"]);
    assert!(names(&vm.dir().join("log")).is_empty());
}

#[tokio::test]
async fn disks_of_a_checkpoint_that_failed_stay_under_the_vm_that_runs_on_them() {
    let dir = tempfile::tempdir().unwrap();
    let (vm, record) = vm(dir.path());
    line(&vm, &record);
    unfinished(&vm, &record, 4, Some(3));
    unfinished(&vm, &record, 5, Some(3));
    let top = vm.live_dir().join("disk0-4.qcow2");
    files::make_dir(&vm.live_dir()).unwrap();
    disks::overlay_on(&vm, &record, Some(4), 0, &top).unwrap();
    let live = Live {
        generation: Some(3),
        overlays: vec!["disk0-4.qcow2".into()],
        ran: true,
    };
    live.store(&vm).unwrap();
    prune_all(&vm).await;
    assert_eq!(whole(&vm), [3]);
    assert_eq!(names(vm.generation(4).dir()), ["disk0.qcow2"]);
    disks::DiskImage::open(&top).unwrap();
    // Its number stays taken: an overlay of the last run may bear it.
    assert!(names(vm.generation(5).dir()).is_empty());
    assert_eq!(crate::local::next_generation(&vm).unwrap(), 6);
}

/// 1 <- 2, 3 <- 4 and 5 <- 6, with logs up to 3: of every fate there is one.
fn three_lines(root: &Path) -> VmDir {
    let (vm, record) = vm(root);
    for (number, on) in (1..).zip([None, Some(1), None, Some(3), None, Some(5)]) {
        generation(&vm, &record, number, on);
    }
    for number in 1..=3 {
        fs::write(vm.log_path(number), b"log").unwrap();
    }
    vm
}

/// All files of the line, and their sizes.
fn tree(vm: &VmDir) -> Vec<(PathBuf, u64)> {
    let mut files = Vec::new();
    let line = vm.dir().join("generations");
    for folder in files_in(&line).unwrap() {
        files.push((folder.strip_prefix(&line).unwrap().to_owned(), 0));
        for file in files_in(&folder).unwrap() {
            let name = file.strip_prefix(&line).unwrap().to_owned();
            files.push((name, fs::metadata(&file).unwrap().len()));
        }
    }
    files.sort();
    files
}

#[tokio::test]
async fn a_pruning_that_is_killed_at_any_step_is_finished_by_the_next() {
    let dir = tempfile::tempdir().unwrap();
    let unpruned = three_lines(dir.path());
    let copy = || {
        let dir = tempfile::tempdir().unwrap();
        let copied = std::process::Command::new("cp")
            .arg("-a")
            .args([unpruned.store().root(), dir.path()])
            .status();
        assert!(copied.unwrap().success());
        let store = Store::open(dir.path().join("site")).unwrap();
        (store.vm(unpruned.name()), dir)
    };
    let (vm, _dir) = copy();
    let done = prune_all(&vm).await;
    let fates: Vec<_> = done.taken.iter().map(|taken| taken.fate).collect();
    assert_eq!(fates, [Fate::Go, Fate::Go, Fate::Note, Fate::Disks]);
    assert_eq!(whole(&vm), [3, 6]);
    let expected = tree(&vm);
    for killed in 0.. {
        let (vm, _dir) = copy();
        let survey = Survey::of(&vm, &[survey::RUN]).unwrap();
        let decision = decided(&vm, &survey, Limits::default()).unwrap();
        let steps = steps(&vm, &survey, &decision).unwrap();
        for step in steps.iter().take(killed) {
            take(&vm, step).unwrap();
        }
        for number in whole(&vm) {
            // As `line` makes them: nothing is missing of a generation that still is one.
            assert_eq!(
                names(vm.generation(number).dir()).len(),
                6,
                "after {killed} steps"
            );
            assert_readable(&vm, number);
        }
        prune_all(&vm).await;
        assert_eq!(tree(&vm), expected, "after {killed} steps");
        if killed > steps.len() {
            assert!(killed > 12, "{killed}");
            break;
        }
    }
}

#[tokio::test]
async fn nobody_is_pruned_under() {
    let dir = tempfile::tempdir().unwrap();
    let (vm, record) = vm(dir.path());
    line(&vm, &record);
    let refused = async |vm: &VmDir| {
        let outcome = prune(vm, Limits::default(), false).await;
        assert!(matches!(outcome, Err(Error::Refused(_))), "{outcome:?}");
        assert_eq!(whole(vm), [1, 2, 3]);
    };
    let locked = vm.lock().unwrap();
    refused(&vm).await;
    drop(locked);
    let following = source::following_lock(&vm).unwrap();
    refused(&vm).await;
    drop(following);
    let b = trust(&vm, "b");
    let offered = Lease::Offered {
        fence: 3,
        transfer: Id([2; 16]),
        to: b.key,
        to_name: "b".into(),
        was_running: true,
    };
    offered.store(&vm.lease_path()).unwrap();
    refused(&vm).await;
}

#[tokio::test]
async fn what_the_dead_left_goes_and_what_may_be_asked_for_stays() {
    let dir = tempfile::tempdir().unwrap();
    let (vm, record) = vm(dir.path());
    line(&vm, &record);
    let store = vm.store().clone();
    let arriving = vm.incoming().join("dead");
    files::make_dir(&arriving).unwrap();
    disks::overlay_on(&vm, &record, Some(1), 0, &arriving.join("disk0.qcow2")).unwrap();
    files::make_dir(&store.void_dir()).unwrap();
    let void = store.void_dir().join("x");
    fs::write(&void, b"").unwrap();
    let deleted = store.deleted_path(record.id);
    files::make_dir(deleted.parent().unwrap()).unwrap();
    let lease = |fence| Lease::Held {
        fence,
        transfer: None,
    };
    // It had come further when it was deleted.
    lease(4).store(&deleted).unwrap();
    let agent = store.agent_lock().unwrap();
    assert!(agent.is_some());
    let done = prune_all(&vm).await;
    assert_eq!(done.leftovers, [vm.incoming()]);
    assert!(!arriving.exists() && void.exists() && deleted.exists());
    drop(agent);
    lease(3).store(&deleted).unwrap();
    prune_all(&vm).await;
    assert!(!void.exists() && !deleted.exists());
}

#[tokio::test]
async fn a_chain_that_can_not_be_followed_stops_it() {
    let dir = tempfile::tempdir().unwrap();
    let (vm, record) = vm(dir.path());
    line(&vm, &record);
    fs::write(vm.generation(2).disk(0), b"garbage, but long enough").unwrap();
    let outcome = prune(&vm, Limits::default(), false).await;
    assert!(matches!(outcome, Err(Error::Damaged { .. })), "{outcome:?}");
    assert_eq!(whole(&vm), [1, 2, 3]);
}

#[tokio::test]
async fn a_file_that_is_shared_is_worth_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (vm, record) = vm(dir.path());
    line(&vm, &record);
    fs::hard_link(vm.generation(1).ram(), dir.path().join("cache")).unwrap();
    let listed = list(&vm).await.unwrap();
    assert!(listed[0].bytes.ram >= RAM);
    let done = prune_all(&vm).await;
    let freed: Vec<_> = done.taken.iter().map(|taken| taken.freed).collect();
    assert!(freed[0] < RAM && freed[1] >= RAM, "{freed:?}");
}

#[tokio::test]
async fn a_pruned_generation_that_comes_again_takes_its_place_again() {
    let dir = tempfile::tempdir().unwrap();
    let (vm, record) = vm(dir.path());
    let made = line(&vm, &record);
    prune_all(&vm).await;
    let disk = vm.generation(2).disk(0);
    let before = fs::metadata(&disk).unwrap().ino();
    let received = Manifest {
        parent: None,
        ..made[1].clone()
    };
    let placed = make_place(&vm, None, received.clone()).unwrap();
    assert_eq!(placed.parent, Some(1), "its disks rest on what they did");
    assert_eq!(fs::metadata(&disk).unwrap().ino(), before);
    // Another state of that number can't be: 3 rests on the disks of this one.
    let other = Manifest {
        disks: made[0].disks.clone(),
        ..received.clone()
    };
    let refused = make_place(&vm, None, other);
    assert!(matches!(refused, Err(Error::Refused(_))), "{refused:?}");
    assert_readable(&vm, 3);
    for (from, name) in [("ram.img", "ram.img"), ("device.bin", "device.bin")] {
        let from = vm.generation(3).dir().join(from);
        fs::copy(from, vm.generation(2).dir().join(name)).unwrap();
    }
    for name in ["ram.tree", "disk0.tree"] {
        fs::write(vm.generation(2).dir().join(name), b"tree").unwrap();
    }
    vm.generation(2).publish(&placed).unwrap();
    unmark(&vm.generation(2)).unwrap();
    assert_eq!(whole(&vm), [2, 3]);
}

#[test]
fn what_was_given_up_makes_way_unless_it_is_used() {
    let dir = tempfile::tempdir().unwrap();
    let (vm, record) = vm(dir.path());
    let made = line(&vm, &record);
    let newest = made[2].clone();
    assert!(make_place(&vm, Some(1), newest.clone()).is_err(), "held");
    let elsewhere = Lease::Elsewhere {
        fence: 4,
        owner: vm.store().identity().unwrap().key(),
        owner_name: "b".into(),
    };
    elsewhere.store(&vm.lease_path()).unwrap();
    assert!(make_place(&vm, Some(3), newest.clone()).is_err());
    assert!(make_place(&vm, Some(1), made[1].clone()).is_err());
    make_place(&vm, Some(1), newest).unwrap();
    assert_eq!(whole(&vm), [1, 2]);
}

#[tokio::test]
async fn a_replay_goes_through_what_was_pruned_and_never_past_a_gap() {
    let dir = tempfile::tempdir().unwrap();
    let (vm, record) = vm(dir.path());
    let made = line(&vm, &record);
    let b = trust(&vm, "b");
    seen::met(&vm, &b, &[made[0].identity()]).unwrap();
    let live = Live {
        generation: Some(3),
        overlays: Vec::new(),
        ran: true,
    };
    let welcome = Welcome {
        common: vec![made[0].identity()],
        lacks: Vec::new(),
        qemu: String::new(),
        standby: None,
        kept: None,
    };
    let replayed_from = || {
        let feasible = Feasible::of(&vm, &live, &welcome).unwrap();
        let base = feasible.base_for(&vm, Strategy::Replay).unwrap();
        base.unwrap().number
    };
    prune_all(&vm).await;
    assert_eq!(whole(&vm), [1, 3]);
    assert_eq!(replayed_from(), 1);
    // Not recorded from 2 to 3: what was typed on 1 does not lead to 3.
    fs::remove_file(vm.log_path(2)).unwrap();
    assert_eq!(replayed_from(), 3);
}

#[tokio::test]
async fn pruning_takes_what_the_dead_have_left() {
    for agent_serves in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let (vm, _) = vm(dir.path());
        let images = vm.store().root().join("images");
        let (received, taken_in) = (images.join(".receive-a"), images.join(".import-a"));
        let half = vm
            .dir()
            .join(format!("lease.json.{}.partial", std::process::id()));
        for folder in [&received, &taken_in] {
            fs::create_dir(folder).unwrap();
        }
        fs::write(&half, "{").unwrap();
        // An agent receives as long as it lives.
        let _agent = agent_serves.then(|| vm.store().agent_lock().unwrap());
        let done = prune_all(&vm).await;
        let mut left = vec![taken_in, half];
        left.extend((!agent_serves).then(|| received.clone()));
        assert_eq!(done.leftovers.len(), left.len(), "{done:?}");
        for path in left {
            assert!(done.leftovers.contains(&path) && !path.exists(), "{path:?}");
        }
        assert_eq!(received.exists(), agent_serves);
    }
}

#[test]
fn the_order_is_that_of_numbers() {
    let dir = tempfile::tempdir().unwrap();
    let (vm, record) = vm(dir.path());
    line(&vm, &record);
    // The clock was set back by days between any two of them.
    for (number, created) in [(1, u64::MAX), (2, 5 * 86_400), (3, 0)] {
        let files = vm.generation(number);
        let manifest = Manifest {
            created,
            ..vm.manifest(number).unwrap()
        };
        files::write_json(&files.manifest(), &manifest).unwrap();
    }
    let line = vm.generations().unwrap();
    let numbers: Vec<_> = line.iter().map(|manifest| manifest.generation).collect();
    assert_eq!(numbers, [1, 2, 3]);
    assert_eq!(crate::local::next_generation(&vm).unwrap(), 4);
}
