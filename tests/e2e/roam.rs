//! A desktop roams: there by replay, and back.

use serde_json::Value;

use crate::common::{VM, World, assert_hardly_refetched, assert_same_images, qemus_on, work};

#[tokio::test(flavor = "multi_thread")]
async fn a_desktop_roams_there_by_replay_and_back_by_base() {
    let world = World::with_vm().await;
    let (a, b) = (&world.a, &world.b);
    let recorder = a.record(VM).await.unwrap();
    let generation = recorder.begun["generation"].as_u64().unwrap();
    let seeded = a.json(&["seed", VM, "--to", "b"]).await.unwrap();
    assert_eq!(seeded["generation"].as_u64(), Some(generation));
    work(&recorder).await;

    let replay = ["migrate", VM, "--to", "b", "--strategy", "replay"];
    // One replay after the other, as both sites share this machine.
    let there = a.json(&[&replay[..], &["--twin", "after"]].concat()).await;
    let there = there.unwrap();
    assert_eq!(there["strategy"], "replay");
    assert_eq!(there["generation_from"].as_u64(), Some(generation));
    assert_eq!(there["generation_to"].as_u64(), Some(generation + 1));
    assert_hardly_refetched(&there);
    assert!(there["replay"]["events"].as_u64().unwrap() > 100, "{there}");
    assert!(there["bytes"]["log"].as_u64().unwrap() > 0);
    // Both replays took place: without the source's own there are no patches.
    let ram = &there["pages"]["ram"];
    assert!(ram["patched"].as_u64().unwrap() > 0, "{ram}");
    let recorded: Value = recorder
        .process
        .finish(crate::common::SOON)
        .await
        .unwrap()
        .last()
        .unwrap();
    assert_eq!(recorded["ended"], "moved");
    assert_same_images(a, b);

    assert_eq!(b.state(VM).await.unwrap(), "running");
    let here = a.json(&["vm", "list"]).await.unwrap();
    assert_eq!(here[0]["state"], "elsewhere");
    assert_eq!(here[0]["lease"]["owner_name"], "b");
    assert_eq!(qemus_on(a.dir()), 0);
    let refused = a.run(&["vm", "start", VM]).await.unwrap();
    assert_eq!(refused.code, Some(3), "{}", refused.stderr);

    let back = b
        .json(&["migrate", VM, "--to", "a", "--strategy", "base"])
        .await
        .unwrap();
    assert_eq!(back["strategy"], "base");
    assert_eq!(back["generation_from"], there["generation_to"]);
    assert_hardly_refetched(&back);
    assert_same_images(a, b);
    assert_eq!(a.state(VM).await.unwrap(), "running");
    assert_eq!(b.state(VM).await.unwrap(), "elsewhere");
    assert_eq!(qemus_on(b.dir()), 0);
}
