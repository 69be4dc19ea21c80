//! A recording that begins in a new QEMU, as its replays do, takes nothing from the guest.

use testkit::robot::Robot;
use testkit::sector::{KEY_COUNT, KEYS};
use testkit::site::{Difference, Site, compare_files, newest_generation};

use crate::common::{VM, boot_sector, eventually, program, qemus_on, start_sector};

#[tokio::test(flavor = "multi_thread")]
async fn a_recording_begins_in_a_fresh_qemu_and_a_killed_one_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let a = Site::new(program(), "a", dir.path().join("a"));
    start_sector(&a, &boot_sector(dir.path(), &KEYS, &[])).await;
    let ram = a.live_ram(VM).await.unwrap();
    let read = || std::fs::read(&ram).unwrap();
    // The firmware looks for disks first.
    eventually("the sector is run", || read()[0x7c00..].starts_with(&KEYS)).await;
    let pid = async || a.status(VM).await.unwrap()["pid"].as_u64().unwrap();
    let fresh = ["--fresh-qemu"];

    let first = pid().await;
    let recorder = a.record_with(VM, &fresh).await.unwrap();
    let second = pid().await;
    assert_ne!(first, second);
    assert_eq!(qemus_on(a.dir()), 1, "the old one has ended");
    assert_eq!(a.state(VM).await.unwrap(), "running");
    let mut robot = Robot::connect(&recorder.vnc).await.unwrap();
    robot.type_text("abc").await.unwrap();
    eventually("the guest has taken the keys", || read()[KEY_COUNT] == 3).await;
    drop(robot);
    let recorded = recorder.process.stop().await.unwrap().success().unwrap();
    let recorded: serde_json::Value = recorded.last().unwrap();
    let log = recorded["log"].as_str().unwrap();
    let replayed = a.json(&["replay", VM, "--log", log]).await.unwrap();
    assert!(replayed["events"].as_u64().unwrap() >= 6, "{replayed}");

    // One that stands still goes on standing still.
    a.json(&["vm", "pause", VM]).await.unwrap();
    let recorder = a.record_with(VM, &fresh).await.unwrap();
    assert_ne!(second, pid().await);
    assert_eq!(a.state(VM).await.unwrap(), "paused");
    let (_, generation) = newest_generation(a.dir(), VM).unwrap();
    let difference = compare_files(&generation.join("ram.img"), &ram).unwrap();
    assert_eq!(difference, Difference::None);
    recorder.process.stop().await.unwrap().success().unwrap();
    a.json(&["vm", "resume", VM]).await.unwrap();

    // Killed once the old QEMU has a generation to end at: whatever it had come to, the guest
    // goes on, if need be with `vm start`.
    for round in 0..3 {
        let before = newest_generation(a.dir(), VM).unwrap().0;
        let args = ["record", VM, "--fresh-qemu", "--listen", "127.0.0.1:0"];
        let record = a.spawn(&args).unwrap();
        eventually("a generation is made", || {
            newest_generation(a.dir(), VM).unwrap().0 > before
        })
        .await;
        record.kill();
        drop(record);
        let state = a.state(VM).await.unwrap();
        if state == "stopped" {
            a.json(&["vm", "start", VM]).await.unwrap();
        }
        assert_eq!(a.state(VM).await.unwrap(), "running", "{round}: {state}");
        assert_eq!(qemus_on(a.dir()), 1);
        assert_eq!(read()[KEY_COUNT], 3, "{round}: {state}");
    }
}
