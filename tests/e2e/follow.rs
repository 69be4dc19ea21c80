//! The target follows while the user works: the move itself has only the tail left to do.

use std::time::Duration;

use serde_json::Value;
use testkit::link::{Link, LinkProfile, Rate};
use testkit::robot::Robot;
use testkit::session::Session;
use testkit::site::{Running, Site, introduce};

use crate::common::{
    CHANCE_TAKEN_OUT, SOON, VM, World, assert_hardly_refetched, assert_same_images, eventually,
    program, qemus_on, work,
};

/// A fork is restored, or a line called again.
const LIMIT: Duration = Duration::from_secs(90);

async fn follows(follower: &mut Running, records: u64) {
    let line = follower
        .until("follow", LIMIT, |line| {
            line["following"] == "behind" && line["records"].as_u64() >= Some(records)
        })
        .await
        .unwrap();
    assert!(line.is_some(), "{}", follower.stderr());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_followed_vm_moves_without_another_replay_though_the_line_was_cut() {
    let world = World::with_vm().await;
    let (a, mut b) = (&world.a, world.b);
    let recorder = a.record(VM).await.unwrap();
    a.json(&["seed", VM, "--to", "b"]).await.unwrap();
    let agent = b.serve().await.unwrap();
    let profile = LinkProfile::symmetric(Rate::mbit(20), Duration::from_millis(20));
    let link = Link::start(agent.addr, profile).unwrap();
    a.trust("b", link.addr(), &agent.key).await.unwrap();
    let mut follower = a.spawn(&["follow", VM, "--to", "b"]).unwrap();
    follows(&mut follower, 0).await;
    work(&recorder).await;
    follows(&mut follower, 50).await;

    link.cut();
    let waits = follower.until("notice", LIMIT, |line| line["following"] == "waiting");
    assert!(waits.await.unwrap().is_some(), "{}", follower.stderr());
    // It waits at the target, and what is typed meanwhile comes later.
    assert_eq!(qemus_on(b.dir()), 1);
    let session: Session = "type \"typed while the line was cut\"".parse().unwrap();
    let mut robot = Robot::connect(&recorder.vnc).await.unwrap();
    session.play(&mut robot, None, |_, _| {}).await.unwrap();
    link.mend();
    follows(&mut follower, 100).await;
    assert_eq!(qemus_on(b.dir()), 1);

    // Only to a site that follows, or to none that is.
    let c = Site::new(program(), "c", world.dir.path().join("c"));
    let key = c.key().await.unwrap();
    a.trust("c", agent.addr, &key).await.unwrap();
    let elsewhere = a.run(&["migrate", VM, "--to", "c"]).await.unwrap();
    assert_eq!(elsewhere.code, Some(3), "{}", elsewhere.stderr);
    assert!(
        elsewhere.stderr.contains("followed at b"),
        "{}",
        elsewhere.stderr
    );

    let elsewhere = ["migrate", VM, "--to", "c", "--dry-run"];
    let elsewhere = a.run(&elsewhere).await.unwrap();
    assert_eq!(elsewhere.code, Some(3), "{}", elsewhere.stderr);

    // Whoever asks disturbs nobody, and hears that only the tail is left.
    let asked = a.json(&["migrate", VM, "--to", "b", "--dry-run"]).await;
    let asked = asked.unwrap();
    assert_eq!(asked["choice"], "replay", "{asked}");
    assert_eq!(asked["following"]["site"], "b", "{asked}");
    assert!(
        asked["following"]["records"].as_u64() >= Some(100),
        "{asked}"
    );
    let behind = asked["following"]["seconds_behind"].as_f64().unwrap();
    let before = asked["strategies"][0]["seconds_before"].as_f64().unwrap();
    assert!(before < behind + 1.0, "{asked}");
    let bytes = |nth: usize| asked["strategies"][nth]["bytes"].as_u64().unwrap();
    assert!(bytes(0) < bytes(1) && bytes(1) < bytes(2), "{asked}");

    // A checkpoint in between is no hindrance.
    a.json(&["checkpoint", VM]).await.unwrap();
    let report = a.json(&["migrate", VM, "--to", "b"]).await.unwrap();
    assert_eq!(report["strategy"], "replay");
    assert_hardly_refetched(&report);
    assert!(report["seconds"].get("hello").is_none(), "{report}");
    let standby = &report["replay"]["standby"];
    let cost = |name: &str| standby[name].as_f64().unwrap();
    assert!(cost("seconds") > 10.0, "{standby}");
    // Under emulation a second of the guest's is no less of the host's.
    assert!(cost("qemu_cpu_seconds") > 1.0, "{standby}");
    assert!(cost("process_bytes") > f64::from(16 << 20), "{standby}");
    assert!(cost("ram_bytes") > f64::from(64 << 20), "{standby}");
    assert!(
        report["pages"]["ram"]["patched"].as_u64().unwrap() > 0,
        "{report}"
    );
    let ended: Value = follower.finish(SOON).await.unwrap().last().unwrap();
    assert_eq!(ended["moved"]["verified"], report["verified"]);
    assert_same_images(a, &b);
    assert_eq!(b.state(VM).await.unwrap(), "running");
    assert_eq!(a.state(VM).await.unwrap(), "elsewhere");
    assert_eq!(qemus_on(a.dir()), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn following_ends_without_a_trace_and_a_killed_follower_is_no_hindrance() {
    let world = World::with_vm().await;
    let (a, b) = (&world.a, &world.b);
    let refused = a.run(&["follow", VM, "--to", "b"]).await.unwrap();
    assert_eq!(refused.code, Some(3), "{}", refused.stderr);
    assert!(refused.stderr.contains("record"), "{}", refused.stderr);

    let recorder = a.record(VM).await.unwrap();
    a.json(&["seed", VM, "--to", "b"]).await.unwrap();
    let mut follower = a.spawn(&["follow", VM, "--to", "b"]).unwrap();
    follows(&mut follower, 0).await;
    let again = a.run(&["follow", VM, "--to", "b"]).await.unwrap();
    assert_eq!(again.code, Some(3), "{}", again.stderr);
    let left = follower.stop().await.unwrap().success().unwrap();
    assert_eq!(left.last::<Value>().unwrap(), "left");
    eventually("no fork at the target", || qemus_on(b.dir()) == 0).await;
    assert_eq!(qemus_on(a.dir()), 1);

    let mut follower = a.spawn(&["follow", VM, "--to", "b"]).unwrap();
    follows(&mut follower, 0).await;
    work(&recorder).await;
    follower.kill();
    let _ = follower.finish(SOON).await;
    let replay = [
        "migrate",
        VM,
        "--to",
        "b",
        "--strategy",
        "replay",
        "--twin",
        "never",
    ];
    let report = a.json(&replay).await.unwrap();
    assert_hardly_refetched(&report);
    assert_same_images(a, b);
    assert_eq!(b.state(VM).await.unwrap(), "running");
    eventually("no QEMU at the source", || qemus_on(a.dir()) == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_whose_instructions_are_counted_is_followed_and_moves() {
    let mut world = World::new().await;
    introduce(&mut world.a, &mut world.b).await.unwrap();
    let guest = world.guest_without_chance().await;
    let (a, b) = (&world.a, &world.b);
    let mut create = vec!["vm", "create", VM, "--disk", &guest];
    create.extend(CHANCE_TAKEN_OUT);
    a.json(&create).await.unwrap();
    a.json(&["vm", "start", VM]).await.unwrap();
    let recorder = a.record_with(VM, &["--fresh-qemu"]).await.unwrap();
    a.json(&["seed", VM, "--to", "b"]).await.unwrap();
    let mut follower = a.spawn(&["follow", VM, "--to", "b"]).unwrap();
    // It begins to live later than its source, and sleeps through that.
    follows(&mut follower, 0).await;
    work(&recorder).await;
    follows(&mut follower, 50).await;
    let report = a.json(&["migrate", VM, "--to", "b"]).await.unwrap();
    assert_eq!(report["strategy"], "replay");
    assert_eq!(report["replay"]["missed"].as_u64(), Some(0), "{report}");
    assert_hardly_refetched(&report);
    assert_same_images(a, b);
    assert_eq!(b.state(VM).await.unwrap(), "running");
}
