//! A VM's state outlives a stop, and its QEMU outlives our processes.

use testkit::site::{Difference, compare_files, newest_generation};

use crate::common::{VM, World, qemus_on, start_vm, work};

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_vm_goes_on_where_it_was() {
    let world = World::new().await;
    let site = &world.a;
    start_vm(site).await;
    let first = site.json(&["checkpoint", VM]).await.unwrap();
    let recorder = site.record(VM).await.unwrap();
    work(&recorder).await;
    let recorded = recorder.process.stop().await.unwrap().success().unwrap();
    let recorded: serde_json::Value = recorded.last().unwrap();
    assert_eq!(recorded["ended"], "stopped");
    assert!(recorded["generation"].as_u64() > first["generation"].as_u64());
    assert!(recorded["records"].as_u64().unwrap() > 100);

    let shot = |name: &str| world.dir.path().join(name);
    let take = async |name: &str| {
        let path = shot(name);
        site.json(&["vm", "screenshot", VM, "--out", &path.to_string_lossy()])
            .await
            .unwrap();
        std::fs::read(path).unwrap()
    };
    site.json(&["vm", "pause", VM]).await.unwrap();
    assert_eq!(site.state(VM).await.unwrap(), "paused");
    let before = take("before.png").await;
    site.json(&["vm", "stop", VM]).await.unwrap();
    assert_eq!(site.state(VM).await.unwrap(), "stopped");
    assert_eq!(qemus_on(site.dir()), 0);

    site.json(&["vm", "start", VM, "--paused"]).await.unwrap();
    assert_eq!(site.state(VM).await.unwrap(), "paused");
    let (_, generation) = newest_generation(site.dir(), VM).unwrap();
    let ram = site.live_ram(VM).await.unwrap();
    let difference = compare_files(&generation.join("ram.img"), &ram).unwrap();
    assert_eq!(difference, Difference::None);
    assert!(take("after.png").await == before, "the screens differ");
    site.json(&["vm", "resume", VM]).await.unwrap();
    assert_eq!(site.state(VM).await.unwrap(), "running");
}

#[tokio::test(flavor = "multi_thread")]
async fn qemu_is_found_again_after_its_keeper_died() {
    let world = World::new().await;
    let site = &world.a;
    start_vm(site).await;
    let pid = site.status(VM).await.unwrap()["pid"].clone();
    let recorder = site.record(VM).await.unwrap();
    recorder.process.kill();
    drop(recorder);
    let status = site.status(VM).await.unwrap();
    assert_eq!(status["state"], "running");
    assert_eq!(status["pid"], pid);
    // What the dead recorder held is free again.
    let recorder = site.record(VM).await.unwrap();
    work(&recorder).await;
    let redact = ["log", "redact", VM, "--from", "0s", "--to", "1h"];
    let early = site.run(&redact).await.unwrap();
    assert_eq!(early.code, Some(3), "{}", early.stderr);
    let recorded = recorder.process.stop().await.unwrap().success().unwrap();
    let recorded: serde_json::Value = recorded.last().unwrap();
    let redacted = site.json(&redact).await.unwrap();
    let records = recorded["records"].as_u64().unwrap();
    assert!(
        records > 0 && redacted["removed"].as_u64() == Some(records),
        "{redacted}"
    );
}
