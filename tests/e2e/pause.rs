//! What is typed while recording is paused reaches the guest and no log, and the VM moves all the
//! same.

use std::path::Path;

use testkit::robot::Robot;
use testkit::sector::{KEY_COUNT, KEYS};
use testkit::site::{Site, introduce};

use crate::common::{SOON, VM, assert_same_images, boot_sector, eventually, program, start_sector};

/// Waits until the guest has taken so many keys.
async fn taken(ram: &Path, keys: u8) {
    let what = format!("the guest has taken {keys} keys");
    eventually(&what, || std::fs::read(ram).unwrap()[KEY_COUNT] == keys).await;
}

async fn recording(site: &Site) -> serde_json::Value {
    let status = site.status(VM).await.unwrap();
    status["recording"]["paused"].clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_typed_in_a_pause_is_in_no_log_and_the_vm_moves_all_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let [mut a, mut b] = ["a", "b"].map(|name| Site::new(program(), name, dir.path().join(name)));
    introduce(&mut a, &mut b).await.unwrap();
    start_sector(&a, &boot_sector(dir.path(), &KEYS, &[])).await;
    let pause = ["record", VM, "--pause"];
    let early = a.run(&pause).await.unwrap();
    assert_eq!(early.code, Some(3), "{}", early.stderr);

    let ram = a.live_ram(VM).await.unwrap();
    // The firmware looks for disks first.
    eventually("the sector is run", || {
        std::fs::read(&ram).unwrap()[0x7c00..].starts_with(&KEYS)
    })
    .await;
    let recorder = a.record(VM).await.unwrap();
    a.json(&["seed", VM, "--to", "b"]).await.unwrap();
    assert_eq!(recording(&a).await, false);
    let mut robot = Robot::connect(&recorder.vnc).await.unwrap();
    robot.type_text("abc").await.unwrap();
    taken(&ram, 3).await;
    for _ in 0..2 {
        let paused = a.json(&pause).await.unwrap();
        assert_eq!(paused["paused"], true);
    }
    assert_eq!(recording(&a).await, true);
    robot.type_text("secret").await.unwrap();
    taken(&ram, 9).await;
    a.json(&["record", VM, "--resume"]).await.unwrap();
    assert_eq!(recording(&a).await, false);
    robot.type_text("de").await.unwrap();
    taken(&ram, 11).await;

    let moved = a
        .json(&["migrate", VM, "--to", "b", "--strategy", "replay"])
        .await
        .unwrap();
    assert_eq!(moved["strategy"], "replay");
    drop(robot);
    let recorded = recorder.process.finish(SOON).await.unwrap();
    let recorded: serde_json::Value = recorded.success().unwrap().last().unwrap();
    assert_eq!(recorded["ended"], "moved");
    let shown = a.json(&["log", "show", VM]).await.unwrap();
    assert_eq!(shown["counts"]["keys"], 5, "{shown}");
    assert_eq!(shown["counts"]["gaps"], 1, "{shown}");
    assert_same_images(&a, &b);
    taken(&b.live_ram(VM).await.unwrap(), 11).await;
    assert_eq!(b.state(VM).await.unwrap(), "running");
}
