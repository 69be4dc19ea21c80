//! Who has a VM is shown by a chain of signed hand-overs: it outlives new keys and lost sites, also for
//! a site that was told of neither.

use serde_json::Value;
use tempfile::TempDir;
use testkit::site::{Site, introduce};

use crate::common::{
    VM, assert_same_images, boot_sector, eventually, program, qemus_on, start_sector,
};

/// Waits for ever: cli; hlt; jmp to the hlt.
const CODE: [u8; 4] = [0xfa, 0xf4, 0xeb, 0xfd];

struct Sites {
    a: Site,
    b: Site,
    c: Site,
    _dir: TempDir,
}

/// Three sites that trust each other, and a VM that runs at A.
async fn sites() -> Sites {
    let dir = tempfile::tempdir().unwrap();
    let site = |name: &str| Site::new(program(), name, dir.path().join(name));
    let (mut a, mut b, mut c) = (site("a"), site("b"), site("c"));
    introduce(&mut a, &mut b).await.unwrap();
    introduce(&mut b, &mut c).await.unwrap();
    introduce(&mut c, &mut a).await.unwrap();
    start_sector(&a, &boot_sector(dir.path(), &CODE, &[])).await;
    a.json(&["checkpoint", VM]).await.unwrap();
    Sites { a, b, c, _dir: dir }
}

async fn migrate(from: &Site, to: &Site) {
    let words = ["migrate", VM, "--to", to.name()];
    let report = from.json(&words).await.unwrap();
    assert_eq!(report["vm"], VM, "{report}");
    assert_eq!(to.state(VM).await.unwrap(), "running");
    assert_eq!(from.state(VM).await.unwrap(), "elsewhere");
    assert_same_images(from, to);
}

async fn fence(site: &Site) -> u64 {
    let status = site.status(VM).await.unwrap();
    status["lease"]["fence"].as_u64().unwrap()
}

/// What this site's command line says to it, which it refuses.
async fn refused(site: &Site, words: &[&str]) -> String {
    let finished = site.run(words).await.unwrap();
    assert_eq!(finished.code, Some(3), "{words:?}: {}", finished.stderr);
    finished.stderr
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_key_takes_over_from_the_old_one_in_the_chain() {
    // What is named first goes last: the folder.
    let Sites { _dir, mut a, b, c } = sites().await;
    // C has a stale copy, and hears nothing of what becomes of the VM.
    a.json(&["seed", VM, "--to", "c"]).await.unwrap();
    migrate(&a, &b).await;
    migrate(&b, &a).await;
    a.stop_serving();
    let rotated = a.json(&["site", "id", "--rotate"]).await.unwrap();
    let agent = a.serve().await.unwrap();
    assert_eq!(rotated["key"], agent.key.as_str());
    // Until it is told, B does not know who calls.
    refused(&a, &["migrate", VM, "--to", "b"]).await;
    assert_eq!(a.state(VM).await.unwrap(), "running");
    for site in [&b, &c] {
        site.trust("a", agent.addr, &agent.key).await.unwrap();
    }
    // The old key signed the chain so far, and the new one goes on with it.
    migrate(&a, &b).await;
    migrate(&b, &c).await;
    migrate(&c, &a).await;
    assert_eq!(fence(&b).await + 1, fence(&c).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stale_copy_believes_in_a_takeover_once_a_person_says_so() {
    let Sites { _dir, a, b, mut c } = sites().await;
    a.json(&["seed", VM, "--to", "b"]).await.unwrap();
    migrate(&a, &c).await;
    // C is gone for good, as far as B knows, which goes on with its stale copy.
    c.stop_serving();
    let beyond = (fence(&b).await + 1000).to_string();
    let refused_fence = refused(&b, &["vm", "start", VM]).await;
    assert!(refused_fence.contains("takeover"), "{refused_fence}");
    b.json(&["vm", "takeover", VM, "--fence", &beyond, "--yes"])
        .await
        .unwrap();
    b.json(&["vm", "start", VM]).await.unwrap();

    // A never had that from C, whose VM it was.
    let to_a = ["migrate", VM, "--to", "a"];
    let said = refused(&b, &to_a).await;
    assert!(
        said.contains("vm takeover") && said.contains("--by"),
        "{said}"
    );
    assert_eq!(b.state(VM).await.unwrap(), "running");
    let unsure = refused(&a, &["vm", "takeover", VM, "--by", "b"]).await;
    assert!(unsure.contains("--yes"), "{unsure}");
    refused(&b, &to_a).await;
    a.json(&["vm", "takeover", VM, "--by", "b", "--yes"])
        .await
        .unwrap();
    migrate(&b, &a).await;
    assert_eq!(fence(&a).await, fence(&b).await);

    // C comes back, and its copy is stale: the chain of those that have the VM leads on from it.
    c.serve_again().await.unwrap();
    eventually("C's VM has ended", || qemus_on(c.dir()) == 0).await;
    let stale: Value = c.status(VM).await.unwrap();
    assert_eq!(stale["lease"]["state"], "elsewhere", "{stale}");
}
