//! Pruning takes room back, and nothing that is needed: the VM starts, roams, and comes back by
//! what both sites still have.

use std::cmp::Reverse;
use std::collections::BTreeSet;
use std::path::Path;

use serde_json::{Value, json};
use testkit::qmp::Qmp;
use testkit::sector::KEYS;
use testkit::site::Site;

use crate::common::{
    VM, World, assert_hardly_refetched, assert_same_images, boot_sector, program, start_sector,
};

async fn listed(site: &Site) -> Vec<Value> {
    let listed = site.json(&["generations", "list", VM]).await.unwrap();
    listed.as_array().unwrap().clone()
}

/// The numbers of the generations that are there as a whole.
async fn whole(site: &Site) -> BTreeSet<u64> {
    listed(site)
        .await
        .iter()
        .filter(|one| one["kind"] == "whole")
        .map(|one| one["generation"].as_u64().unwrap())
        .collect()
}

async fn checkpoint(site: &Site) -> u64 {
    let made = site.json(&["checkpoint", VM]).await.unwrap();
    made["generation"].as_u64().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_pruned_is_missed_by_nobody() {
    let world = World::with_vm().await;
    let (a, b) = (&world.a, &world.b);
    let unknown = a.run(&["generations", "prune", "other"]).await.unwrap();
    assert_eq!(unknown.code, Some(3), "{}", unknown.stderr);

    let mut made = Vec::new();
    for _ in 0..2 {
        made.push(checkpoint(a).await);
    }
    let common = checkpoint(a).await;
    a.json(&["seed", VM, "--to", "b"]).await.unwrap();
    made.push(checkpoint(a).await);
    let newest = checkpoint(a).await;

    // B has one of them, and A runs on the newest; both are known without asking B.
    let list = listed(a).await;
    let of = |number: u64| {
        let found = list.iter().find(|one| one["generation"] == number);
        found.unwrap().clone()
    };
    assert_eq!(of(common)["relied_on_by"][0]["peer"], "b", "{list:?}");
    assert_eq!(of(common)["prune"], "stay");
    assert_eq!(of(made[0])["prune"], "disks");
    assert!(of(newest)["bytes"]["ram"].as_u64().unwrap() > 0);
    let before = whole(a).await;
    let prune = ["generations", "prune", VM];
    let told = a
        .json(&[&prune[..], &["--dry-run"]].concat())
        .await
        .unwrap();
    assert_eq!(whole(a).await, before);
    let done = a.json(&prune).await.unwrap();
    assert_eq!(told["freed"], done["freed"]);
    // Of three generations at least, each with the RAM of a desktop.
    assert!(done["freed"].as_u64().unwrap() > 100 << 20, "{done}");
    assert_eq!(whole(a).await, [common, newest].into());

    // The VM goes on, stops, and starts where it was.
    assert_eq!(a.state(VM).await.unwrap(), "running");
    a.json(&["vm", "stop", VM]).await.unwrap();
    a.json(&prune).await.unwrap();
    a.json(&["vm", "start", VM]).await.unwrap();
    assert_eq!(a.state(VM).await.unwrap(), "running");

    let base = ["--strategy", "base"];
    let to = |site| [&["migrate", VM, "--to", site][..], &base].concat();
    let there = a.json(&to("b")).await.unwrap();
    assert_eq!(there["generation_from"], common);
    assert_hardly_refetched(&there);
    assert_same_images(a, b);

    // Both prune, and go on from what both have.
    let moved = there["generation_to"].as_u64().unwrap();
    a.json(&prune).await.unwrap();
    assert_eq!(whole(a).await, [moved].into());
    checkpoint(b).await;
    let last = checkpoint(b).await;
    b.json(&prune).await.unwrap();
    let at_b = whole(b).await;
    assert!(at_b.contains(&moved) && at_b.contains(&last), "{at_b:?}");
    let back = b.json(&to("a")).await.unwrap();
    assert_eq!(back["generation_from"], moved);
    assert_hardly_refetched(&back);
    assert_same_images(a, b);
    assert_eq!(a.state(VM).await.unwrap(), "running");
}

/// The overlays that QEMU has open, each with the generation that it is the disk of, the topmost first.
async fn chain(qmp: &mut Qmp) -> Vec<(String, Option<u64>)> {
    let nodes = qmp.ask("query-named-block-nodes", json!({ "flat": true }));
    let nodes = nodes.await.unwrap();
    let overlays = nodes.as_array().unwrap().iter();
    let overlays = overlays.filter(|node| node["drv"] == "qcow2");
    let mut chain: Vec<_> = overlays
        .map(|node| {
            let folder = Path::new(node["file"].as_str().unwrap()).parent().unwrap();
            let number = folder.file_name().unwrap().to_str().unwrap().parse();
            (node["node-name"].as_str().unwrap().to_owned(), number.ok())
        })
        .collect();
    chain.sort_by_key(|(_, number)| Reverse(number.unwrap_or(u64::MAX)));
    chain
}

#[tokio::test(flavor = "multi_thread")]
async fn a_merge_whose_process_was_killed_is_in_nobodys_way() {
    let dir = tempfile::tempdir().unwrap();
    let a = Site::new(program(), "a", dir.path().join("a"));
    let disk = boot_sector(dir.path(), &KEYS, &[]);
    start_sector(&a, &disk).await;
    let mut made = Vec::new();
    for _ in 0..2 {
        made.push(checkpoint(&a).await);
    }
    // QEMU has them open by the names that they have now.
    a.json(&["vm", "stop", VM]).await.unwrap();
    a.json(&["vm", "start", VM]).await.unwrap();

    // As `generations prune` begins it, and then is killed.
    let socket = a.live_ram(VM).await.unwrap().with_file_name("control.qmp");
    let mut qmp = Qmp::connect(&socket).await.unwrap();
    let before = chain(&mut qmp).await;
    let node_of = |number: u64| {
        let found = before.iter().find(|(_, other)| *other == Some(number));
        let (name, _) = found.unwrap_or_else(|| panic!("{number} in {before:?}"));
        name
    };
    let [lower, upper] = made[..] else {
        panic!("{made:?}");
    };
    let merge = json!({
        "job-id": format!("merge-0-{upper}-{lower}"),
        "device": before[0].0,
        "top-node": node_of(upper),
        "base-node": node_of(lower),
        "backing-file": format!("../../generations/{upper}/disk0.qcow2"),
        "auto-dismiss": false,
    });
    qmp.ask("block-commit", merge).await.unwrap();
    drop(qmp);

    checkpoint(&a).await;
    let mut qmp = Qmp::connect(&socket).await.unwrap();
    let jobs = qmp.ask("query-jobs", json!({})).await.unwrap();
    assert_eq!(jobs, json!([]));
    let after: Vec<_> = chain(&mut qmp).await;
    drop(qmp);
    // One more by the checkpoint, and one less by what was merged.
    assert_eq!(after.len(), before.len(), "{before:?}, then {after:?}");
    let disk = |number: u64| {
        let generations = a.dir().join("vms").join(VM).join("generations");
        generations.join(number.to_string()).join("disk0.qcow2")
    };
    assert!(disk(upper).exists() && !disk(lower).exists());
    let pruned = a.json(&["generations", "prune", VM]).await.unwrap();
    assert_eq!(pruned["unmerged"], Value::Null, "{pruned}");
    a.json(&["vm", "stop", VM]).await.unwrap();
    a.json(&["vm", "start", VM]).await.unwrap();
    assert_eq!(a.state(VM).await.unwrap(), "running");
}
