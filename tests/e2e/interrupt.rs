//! Ctrl-C at any moment leaves the VM running where it was, and nothing at the target.

use std::time::Duration;

use testkit::link::{Link, LinkProfile, Rate};
use testkit::site::Site;

use crate::common::{VM, World, assert_hardly_refetched, eventually, qemus_on, work};

/// A phase that has not begun by then never will.
const PHASE_LIMIT: Duration = Duration::from_secs(120);

/// Interrupts a migration once it is in a phase, and sees what is left.
async fn interrupted(from: &Site, to: &Site, strategy: &str, phase: &str) {
    let command = ["migrate", VM, "--to", "b", "--strategy", strategy];
    let mut migration = from.spawn(&command).unwrap();
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
    let ended = migration.stop().await.unwrap();
    assert_eq!(ended.code, Some(4), "in {phase}: {}", ended.stderr);
    assert_eq!(from.state(VM).await.unwrap(), "running", "after {phase}");
    eventually("no QEMU at the target", || qemus_on(to.dir()) == 0).await;
    let incoming = to.dir().join("vms").join(VM).join("incoming");
    eventually("nothing arriving at the target", || !incoming.exists()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ctrl_c_in_any_phase_leaves_the_vm_running_and_the_target_clean() {
    let world = World::with_vm().await;
    let (a, mut b) = (&world.a, world.b);
    // Slow enough that every phase can be caught.
    let agent = b.serve().await.unwrap();
    let profile = LinkProfile::symmetric(Rate::mbit(20), Duration::from_millis(20));
    let link = Link::start(agent.addr, profile).unwrap();
    a.trust("b", link.addr(), &agent.key).await.unwrap();
    interrupted(a, &b, "full", "hello").await;
    interrupted(a, &b, "full", "ram").await;
    eventually("the VM unknown at the target", || {
        !b.dir().join("vms").join(VM).exists()
    })
    .await;

    a.trust("b", agent.addr, &agent.key).await.unwrap();
    let recorder = a.record(VM).await.unwrap();
    a.json(&["seed", VM, "--to", "b"]).await.unwrap();
    work(&recorder).await;
    a.trust("b", link.addr(), &agent.key).await.unwrap();
    for phase in ["replay", "stop", "ram"] {
        interrupted(a, &b, "replay", phase).await;
    }
    let report = a
        .json(&["migrate", VM, "--to", "b", "--strategy", "replay"])
        .await
        .unwrap();
    assert_hardly_refetched(&report);
    assert_eq!(b.state(VM).await.unwrap(), "running");
    assert_eq!(a.state(VM).await.unwrap(), "elsewhere");
}
