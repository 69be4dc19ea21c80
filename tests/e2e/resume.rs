//! A move whose line is cut, or one of whose processes is killed, goes on where it was.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use serde_json::Value;
use testkit::link::{Link, LinkProfile, Rate};
use testkit::site::{Running, Site};

use crate::common::{
    VM, World, assert_hardly_refetched, assert_same_images, eventually, qemus_on, work,
};

/// A phase that has not begun by then never will.
const PHASE_LIMIT: Duration = Duration::from_secs(300);

/// Without a twin: one guest less on a busy host, and more pages to send.
const REPLAY: [&str; 8] = [
    "migrate",
    VM,
    "--to",
    "b",
    "--strategy",
    "replay",
    "--twin",
    "never",
];

/// A VM at A that was recorded, its stale copy at B, and a thin line between.
async fn behind_a_line(world: &mut World) -> Link {
    let recorder = world.a.record(VM).await.unwrap();
    world.a.json(&["seed", VM, "--to", "b"]).await.unwrap();
    work(&recorder).await;
    let agent = world.b.serve().await.unwrap();
    let profile = LinkProfile::symmetric(Rate::mbit(5), Duration::from_millis(20));
    let link = Link::start(agent.addr, profile).unwrap();
    world.a.trust("b", link.addr(), &agent.key).await.unwrap();
    link
}

async fn reach(migration: &mut Running, phase: &str) {
    let reached = migration
        .until("reach the phase", PHASE_LIMIT, |line| {
            line["phase"] == phase
        })
        .await
        .unwrap();
    assert!(
        reached.is_some(),
        "no phase {phase}: {}",
        migration.stderr()
    );
}

/// Waits until the target's fork replays.
async fn replays(migration: &mut Running) {
    let goes_on =
        |line: &Value| line["phase"] == "replay" && line["done"].as_u64().is_some_and(|at| at > 0);
    let found = migration.until("replay", PHASE_LIMIT, goes_on).await;
    assert!(found.unwrap().is_some(), "{}", migration.stderr());
}

/// Waits until something was noted.
async fn noted(migration: &mut Running, words: &str) {
    let last = Mutex::new(Value::Null);
    let said = |line: &Value| {
        *last.lock().unwrap() = line.clone();
        line["note"]
            .as_str()
            .is_some_and(|note| note.contains(words))
    };
    let found = migration.until("say so", PHASE_LIMIT, said).await.unwrap();
    let (last, stderr) = (last.into_inner().unwrap(), migration.stderr());
    assert!(found.is_some(), "no {words:?}, at last {last}: {stderr}");
}

/// Waits until the line is back and a phase has begun, in whichever order: what the source does
/// alone goes on without a line, and another cut before it is back would be the same one.
async fn back_and_in(migration: &mut Running, phase: &str) {
    let (back, begun) = (AtomicBool::new(false), AtomicBool::new(false));
    let both = |line: &Value| {
        let note = line["note"].as_str();
        back.fetch_or(note.is_some_and(|it| it.contains("is back")), Relaxed);
        begun.fetch_or(line["phase"] == phase, Relaxed);
        back.load(Relaxed) && begun.load(Relaxed)
    };
    let found = migration.until("go on", PHASE_LIMIT, both).await.unwrap();
    assert!(found.is_some(), "{phase}: {}", migration.stderr());
}

async fn done(migration: Running) -> Value {
    let ended = migration.finish(PHASE_LIMIT).await.unwrap();
    ended.success().unwrap().last().unwrap()
}

/// It has moved, whole, and nothing is left over.
async fn moved(a: &Site, b: &Site, report: &Value) {
    assert_hardly_refetched(report);
    assert_same_images(a, b);
    assert_eq!(b.state(VM).await.unwrap(), "running");
    assert_eq!(a.state(VM).await.unwrap(), "elsewhere");
    eventually("no QEMU at the source", || qemus_on(a.dir()) == 0).await;
    assert!(!a.dir().join("vms").join(VM).join("moving.json").exists());
    assert!(!b.dir().join("vms").join(VM).join("incoming").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_line_that_is_cut_in_every_phase_costs_a_move_only_time() {
    let mut world = World::with_vm().await;
    let link = behind_a_line(&mut world).await;
    let (a, b) = (&world.a, &world.b);
    let mut migration = a.spawn(&REPLAY).unwrap();
    let phases = ["plan", "replay", "stop", "device", "ram", "commit"];
    reach(&mut migration, phases[0]).await;
    for (index, phase) in phases.into_iter().enumerate() {
        if phase == "replay" {
            replays(&mut migration).await;
        }
        if phase == "ram" {
            // Pages are on their way.
            let before = link.bytes_up();
            eventually("pages", || link.bytes_up() > before + (64 << 10)).await;
        }
        link.cut();
        noted(&mut migration, "calling again").await;
        link.mend();
        let Some(next) = phases.get(index + 1) else {
            break;
        };
        if phase == "replay" {
            noted(&mut migration, "is back").await;
            // The fork has gone on meanwhile, and is the same.
            assert!(qemus_on(b.dir()) == 1);
            reach(&mut migration, next).await;
        } else {
            back_and_in(&mut migration, next).await;
        }
    }
    let report = done(migration).await;
    moved(a, b, &report).await;
    let (sent, resent) = (&report["bytes"]["sent"], &report["bytes"]["resent"]);
    let (sent, resent) = (sent.as_u64().unwrap(), resent.as_u64().unwrap());
    // What arrived beyond what was to be said: handshakes, and half a record at each cut.
    let once = sent - resent;
    let arrived = link.bytes_up();
    eprintln!("sent {sent}, of it again {resent}; arrived {arrived}, to be said {once}");
    // Of a move of this size one cut is 2 % at most.
    let cuts = phases.len() as u64;
    let more = cuts * (once / 50).max(8 << 10);
    assert!(arrived <= once + more, "{arrived} arrived of {once}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_does_not_stand_still_for_long_without_a_line() {
    let mut world = World::with_vm().await;
    let link = behind_a_line(&mut world).await;
    let (a, b) = (&world.a, &world.b);
    let mut migration = a.spawn(&REPLAY).unwrap();
    reach(&mut migration, "ram").await;
    let before = link.bytes_up();
    eventually("pages", || link.bytes_up() > before + (64 << 10)).await;
    link.cut();
    noted(&mut migration, "was cut off").await;
    assert_eq!(a.state(VM).await.unwrap(), "running");
    link.mend();
    noted(&mut migration, "going on with what b has kept: the copy").await;
    let report = done(migration).await;
    moved(a, b, &report).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_move_that_was_given_up_goes_on_with_the_same_command() {
    let mut world = World::with_vm().await;
    let link = behind_a_line(&mut world).await;
    let (a, b) = (&world.a, &world.b);
    let impatient = [&REPLAY[..], &["--give-up-after", "2"]].concat();
    let mut migration = a.spawn(&impatient).unwrap();
    replays(&mut migration).await;
    link.cut();
    let ended = migration.finish(PHASE_LIMIT).await.unwrap();
    assert_eq!(ended.code, Some(4), "{}", ended.stderr);
    assert!(
        ended.stderr.contains("the same command"),
        "{}",
        ended.stderr
    );
    assert_eq!(a.state(VM).await.unwrap(), "running");
    assert_eq!(qemus_on(b.dir()), 1, "the replay goes on");
    link.mend();
    let mut migration = a.spawn(&impatient).unwrap();
    noted(&mut migration, "going on with what b has kept: its replay").await;
    let report = done(migration).await;
    moved(a, b, &report).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_migrate_that_is_killed_leaves_the_guest_running_and_its_work_to_the_next() {
    let mut world = World::with_vm().await;
    let _link = behind_a_line(&mut world).await;
    for whose in ["the agent's", "the next command's"] {
        if whose == "the next command's" {
            world.a.stop_serving();
        }
        let a = &world.a;
        let mut migration = a.spawn(&REPLAY).unwrap();
        reach(&mut migration, "ram").await;
        migration.kill();
        drop(migration);
        if whose == "the agent's" {
            let note = a.dir().join("vms").join(VM).join("moving.json");
            let goes_on = || {
                let noted: Value = serde_json::from_slice(&std::fs::read(&note).unwrap()).unwrap();
                noted["paused"] == false
            };
            eventually("the agent puts it right", goes_on).await;
        }
        assert_eq!(a.state(VM).await.unwrap(), "running", "{whose}");
    }
    let (a, b) = (&world.a, &world.b);
    let mut migration = a.spawn(&REPLAY).unwrap();
    noted(&mut migration, "going on with what b has kept: the copy").await;
    let report = done(migration).await;
    moved(a, b, &report).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_whose_agent_is_killed_goes_on_with_what_arrived() {
    let mut world = World::with_vm().await;
    let link = behind_a_line(&mut world).await;
    let a = &world.a;
    let mut migration = a.spawn(&REPLAY).unwrap();
    // In a replay: nobody knows any more what the fork was given.
    replays(&mut migration).await;
    world.b.kill_agent();
    world.b.serve_again().await.unwrap();
    assert_eq!(qemus_on(world.b.dir()), 0, "the fork is cleared away");
    noted(&mut migration, "was cut off").await;
    reach(&mut migration, "ram").await;
    let before = link.bytes_up();
    eventually("pages", || link.bytes_up() > before + (64 << 10)).await;
    world.b.kill_agent();
    world.b.serve_again().await.unwrap();
    noted(&mut migration, "going on with what b has kept: the copy").await;
    let report = done(migration).await;
    moved(a, &world.b, &report).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn agents_agree_on_the_owner_by_themselves() {
    let mut world = World::with_vm().await;
    let _link = behind_a_line(&mut world).await;
    let (a, b) = (&world.a, &world.b);
    let mut migration = a.spawn(&REPLAY).unwrap();
    reach(&mut migration, "commit").await;
    migration.kill();
    drop(migration);
    let lease = |site: &Site| -> Value {
        let path = site.dir().join("vms").join(VM).join("lease.json");
        serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
    };
    eventually("it is settled", || lease(a)["state"] != "offered").await;
    let (here, there) = (a.state(VM).await.unwrap(), b.state(VM).await.unwrap());
    match here.as_str() {
        "running" => assert_eq!(there, "elsewhere"),
        "elsewhere" => {
            assert_eq!(there, "running");
            eventually("no QEMU at the source", || qemus_on(a.dir()) == 0).await;
        }
        other => panic!("{other} here, {there} there"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_of_a_lost_site_is_taken_over_and_its_copy_is_stale_for_ever() {
    let mut world = World::with_vm().await;
    let a = &world.a;
    a.json(&["migrate", VM, "--to", "b", "--strategy", "full"])
        .await
        .unwrap();
    assert_eq!(world.b.state(VM).await.unwrap(), "running");
    // B is out of reach, and its VM with it.
    world.b.kill_agent();
    let a = &world.a;
    let refused = a.run(&["vm", "start", VM]).await.unwrap();
    assert_eq!(refused.code, Some(3), "{}", refused.stderr);
    assert!(refused.stderr.contains("takeover"), "{}", refused.stderr);
    let fence = |status: &Value| status["lease"]["fence"].as_u64().unwrap();
    let known = fence(&a.status(VM).await.unwrap());
    let beyond = (known + 1000).to_string();
    let few = a
        .run(&["vm", "takeover", VM, "--fence", "3", "--yes"])
        .await;
    let few = few.unwrap();
    assert_eq!(few.code, Some(3));
    assert!(few.stderr.contains(&beyond), "{}", few.stderr);
    let unsure = a.run(&["vm", "takeover", VM, "--fence", &beyond]).await;
    let unsure = unsure.unwrap();
    assert_eq!(unsure.code, Some(3));
    assert!(
        unsure.stderr.contains("old") && unsure.stderr.contains("--yes"),
        "{}",
        unsure.stderr
    );
    assert_eq!(a.state(VM).await.unwrap(), "elsewhere");
    a.json(&["vm", "takeover", VM, "--fence", &beyond, "--yes"])
        .await
        .unwrap();
    a.json(&["vm", "start", VM]).await.unwrap();
    assert_eq!(a.state(VM).await.unwrap(), "running");
    // B comes back, and learns of it without being told by anybody.
    assert_eq!(world.b.state(VM).await.unwrap(), "running");
    world.b.serve_again().await.unwrap();
    let b = &world.b;
    eventually("B's VM has ended", || qemus_on(b.dir()) == 0).await;
    let stale = b.run(&["vm", "start", VM]).await.unwrap();
    assert_eq!(stale.code, Some(3), "{}", stale.stderr);
    assert!(stale.stderr.contains("runs at a"), "{}", stale.stderr);
    assert_eq!(fence(&b.status(VM).await.unwrap()).to_string(), beyond);
    // The stale copy is as good as any other.
    a.json(&["migrate", VM, "--to", "b", "--strategy", "base"])
        .await
        .unwrap();
    assert_eq!(b.state(VM).await.unwrap(), "running");
    assert_same_images(a, b);
}
