//! A desktop roams: there by replay, and back.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde_json::Value;

use crate::common::{VM, World, assert_hardly_refetched, assert_same_images, qemus_on, work};

/// Leaves in a paused guest what one that doesn't clear what it frees would: the demo's does. The
/// number of pages.
fn leave_in_free_pages(ram: &Path) -> u64 {
    const PAGE: usize = 4096;
    let content = fs::read(ram).unwrap();
    let free = introspection::free::pages(&content).unwrap();
    // The kernel gives out small blocks first, and this is the middle of a large one.
    let largest = free.iter().max_by_key(|range| range.len()).unwrap();
    let middle = (largest.start + largest.len() / 2) / PAGE;
    let file = File::options().write(true).open(ram).unwrap();
    for page in middle..middle + 8 {
        let left = b"what somebody once typed";
        file.write_all_at(left, (page * PAGE) as u64).unwrap();
    }
    8
}

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

    b.json(&["vm", "pause", VM]).await.unwrap();
    let left = leave_in_free_pages(&b.live_ram(VM).await.unwrap());
    b.json(&["vm", "resume", VM]).await.unwrap();
    let base = ["migrate", VM, "--to", "a", "--strategy", "base"];
    let back = b.json(&[&base[..], &["--drop-free"]].concat()).await;
    let back = back.unwrap();
    assert_eq!(back["strategy"], "base");
    let dropped = back["free_dropped"].as_u64().unwrap();
    assert!(dropped >= left, "{dropped} pages dropped of {left}");
    assert_eq!(back["generation_from"], there["generation_to"]);
    assert_hardly_refetched(&back);
    assert_same_images(a, b);
    assert_eq!(a.state(VM).await.unwrap(), "running");
    assert_eq!(b.state(VM).await.unwrap(), "elsewhere");
    assert_eq!(qemus_on(b.dir()), 0);
}
