//! A guest that writes memory all the time moves while it runs.

use serde_json::Value;
use testkit::robot::Robot;
use testkit::site::Site;
use testkit::workload::Workload;

use crate::common::{VM, World, assert_hardly_refetched, assert_same_images, qemus_on, work};

/// Pages that the guest's program goes through, in two seconds or more.
const PAGES: u32 = 4096;

async fn keep_busy(site: &Site) {
    let writer = Workload::Writer {
        pages: PAGES,
        per_second: PAGES / 2,
        words: 8,
    };
    let mut robot = Robot::connect(&site.vnc(VM).await.unwrap()).await.unwrap();
    writer.start(&mut robot).await.unwrap();
}

/// Rounds took place in which the program's pages were found, and each told as a difference.
fn assert_live(report: &Value) {
    assert_eq!(report["strategy"], "live");
    assert_hardly_refetched(report);
    let live = &report["live"];
    let rounds = live["rounds"].as_array().unwrap();
    assert!(rounds.len() >= 2, "{live}");
    let of = |round: &Value, what: &str| round[what].as_f64().unwrap();
    for round in &rounds[1..] {
        // A scan takes some time: the program writes hundreds of pages meanwhile.
        assert!(of(round, "pages") > 200.0, "{live}");
        assert!(of(round, "deltas") * 2.0 > of(round, "pages"), "{live}");
        assert!(
            of(round, "bytes") * 10.0 < of(round, "pages") * 4096.0,
            "{live}"
        );
        assert!(of(round, "expected_downtime") > 0.0, "{live}");
    }
    assert!(live["last_pages"].as_u64().unwrap() > 0, "{live}");
    let (downtime, total) = (
        of(&report["seconds"], "downtime"),
        of(&report["seconds"], "total"),
    );
    let usable = of(&report["seconds"], "usable");
    assert!(downtime > 0.0 && downtime < usable, "{report}");
    assert!(usable < total, "{report}");
    assert!(of(&report["seconds"], "rounds") > 0.0, "{report}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_writes_all_the_time_moves_live_there_and_back() {
    let world = World::with_vm().await;
    let (a, b) = (&world.a, &world.b);
    keep_busy(a).await;
    let asked = a.json(&["migrate", VM, "--to", "b", "--dry-run"]).await;
    let asked = asked.unwrap();
    let all = asked["strategies"].as_array().unwrap();
    let of = |name: &str| all.iter().find(|one| one["strategy"] == name).unwrap();
    let (full, rounds) = (of("full"), of("live"));
    // It sends more, and stands still for less.
    assert!(rounds["bytes"].as_u64() > full["bytes"].as_u64(), "{asked}");
    assert!(rounds["seconds_before"].as_f64() > full["seconds_before"].as_f64());
    assert_ne!(asked["choice"], "live");
    let foreseen = rounds["bytes"].as_u64().unwrap();
    // From nothing: B has the read-only images alone.
    let live = ["migrate", VM, "--strategy", "live", "--downtime", "500ms"];
    let there = a.json(&[&live[..], &["--to", "b"]].concat()).await.unwrap();
    println!("{there:#}");
    assert_eq!(there["generation_from"], Value::Null);
    assert_live(&there);
    let sent = there["bytes"]["sent"].as_u64().unwrap();
    assert!(
        (foreseen / 3..foreseen * 3).contains(&sent),
        "{foreseen}: {sent}"
    );
    let copied = there["live"]["rounds"][0]["bytes"].as_u64().unwrap();
    let last = there["live"]["last_bytes"].as_u64().unwrap();
    assert!(last * 10 < copied, "{there}");
    assert_same_images(a, b);
    assert_eq!(b.state(VM).await.unwrap(), "running");
    assert_eq!(a.state(VM).await.unwrap(), "elsewhere");
    assert_eq!(qemus_on(a.dir()), 0);

    // Against the stale copy that A keeps; no more than two rounds.
    let some = [&live[..], &["--to", "a", "--rounds", "2"]].concat();
    let back = b.json(&some).await.unwrap();
    println!("{back:#}");
    assert_eq!(back["generation_from"], there["generation_to"]);
    assert_live(&back);
    assert!(
        back["live"]["rounds"].as_array().unwrap().len() <= 3,
        "{back}"
    );
    assert_same_images(a, b);
    assert_eq!(a.state(VM).await.unwrap(), "running");
    assert_eq!(qemus_on(b.dir()), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn rounds_begin_with_what_a_replay_made_of_the_stale_copy() {
    let world = World::with_vm().await;
    let (a, b) = (&world.a, &world.b);
    let recorder = a.record(VM).await.unwrap();
    let generation = recorder.begun["generation"].as_u64().unwrap();
    a.json(&["seed", VM, "--to", "b"]).await.unwrap();
    work(&recorder).await;
    let live = ["migrate", VM, "--to", "b", "--strategy", "live"];
    let there = a.json(&[&live[..], &["--replay-first"]].concat()).await;
    let there = there.unwrap();
    println!("{there:#}");
    assert_eq!(there["generation_from"].as_u64(), Some(generation));
    assert!(there["replay"]["events"].as_u64().unwrap() > 100, "{there}");
    let rounds = there["live"]["rounds"].as_array().unwrap();
    assert!(rounds.len() >= 2, "{there}");
    assert_same_images(a, b);
    assert_eq!(b.state(VM).await.unwrap(), "running");
}
