//! What a trusted site may do is said, shown and kept to; no guest is needed for that.

use tempfile::TempDir;
use testkit::site::Site;

use crate::common::{VM, program};

struct Sites {
    a: Site,
    b: Site,
    _dir: TempDir,
}

/// Two sites, and a VM at A that was never started.
async fn sites() -> Sites {
    let dir = tempfile::tempdir().unwrap();
    let site = |name: &str| Site::new(program(), name, dir.path().join(name));
    let (a, b) = (site("a"), site("b"));
    let disk = dir.path().join("disk.img");
    std::fs::write(&disk, vec![0; 1 << 20]).unwrap();
    let disk = disk.to_str().unwrap();
    a.json(&["vm", "create", VM, "--disk", disk]).await.unwrap();
    Sites { a, b, _dir: dir }
}

async fn refused(site: &Site, words: &[&str], needles: &[&str]) {
    let finished = site.run(words).await.unwrap();
    assert_eq!(finished.code, Some(3), "{words:?}: {}", finished.stderr);
    for needle in needles {
        assert!(finished.stderr.contains(needle), "{}", finished.stderr);
    }
}

#[tokio::test]
async fn what_a_site_may_is_said_shown_and_kept_to() {
    let mut sites = sites().await;
    let agent = sites.b.serve().await.unwrap();
    let addr = agent.addr.to_string();
    let (a, b) = (&sites.a, &sites.b);
    let trust = ["site", "trust", "b", &addr, &agent.key];
    let may = |what| [&trust[..], &["--may", what]].concat();

    // Everything, unless something else is said.
    let all = serde_json::json!(["send", "receive", "follow", "hold"]);
    assert_eq!(a.json(&trust).await.unwrap()["may"], all);
    a.json(&may("send")).await.unwrap();
    let listed = a.json(&["site", "list"]).await.unwrap();
    assert_eq!(listed[0]["may"], serde_json::json!(["send"]));
    for words in [
        &["migrate", VM, "--to", "b"][..],
        &["migrate", VM, "--to", "b", "--dry-run"],
        &["seed", VM, "--to", "b"],
        &["follow", VM, "--to", "b"],
    ] {
        refused(a, words, &["b may not receive", "--may"]).await;
    }
    a.json(&may("receive")).await.unwrap();
    refused(a, &["follow", VM, "--to", "b"], &["b may not follow"]).await;
    let finished = a.run(&may("fly")).await.unwrap();
    assert_eq!(finished.code, Some(2), "{}", finished.stderr);

    // Said again without it, it stays; B's own list is another matter.
    let again = a.json(&trust).await.unwrap();
    assert_eq!(again["may"], serde_json::json!(["receive"]));
    assert_eq!(
        b.json(&["site", "list"]).await.unwrap(),
        serde_json::json!([])
    );
}

#[tokio::test]
async fn what_is_held_for_whom_is_the_hubs_to_say() {
    let mut sites = sites().await;
    let hub = sites.b.serve().await.unwrap();
    let addr = hub.addr.to_string();
    let (a, b) = (&sites.a, &sites.b);
    let known = ["site", "trust", "b", &addr, &hub.key, "--may", "nothing"];
    a.json(&known).await.unwrap();
    let key = a.key().await.unwrap();
    let trust = ["site", "trust", "a", "127.0.0.1:1", &key];
    let collect = ["collect", "--from", "b"];
    for (may, code) in [("send", Some(3)), ("hold", Some(0)), ("nothing", Some(3))] {
        let may = [&trust[..], &["--may", may]].concat();
        b.json(&may).await.unwrap();
        let finished = a.run(&collect).await.unwrap();
        assert_eq!(finished.code, code, "{may:?}: {}", finished.stderr);
        if code == Some(3) {
            assert!(finished.stderr.contains("--may"), "{}", finished.stderr);
        }
    }
    // What was left there for it by others is thrown away by its name or its key.
    for site in ["a", &key] {
        let gone = b.json(&["hub", "drop", "--for", site]).await.unwrap();
        assert_eq!(gone["dropped"], 0, "{gone}");
    }
    refused(b, &["hub", "drop", "--for", "nobody"], &["nobody"]).await;
    refused(a, &["sync", VM, "--to", "b@b", "--once"], &["b"]).await;
}

#[tokio::test]
async fn a_new_key_is_made_while_nobody_serves_and_the_old_one_lets_nobody_in() {
    let mut sites = sites().await;
    let agent = sites.b.serve().await.unwrap();
    refused(&sites.b, &["site", "id", "--rotate"], &["serve"]).await;
    assert_eq!(sites.b.key().await.unwrap(), agent.key);
    sites.b.stop_serving();
    let rotated = sites.b.json(&["site", "id", "--rotate"]).await.unwrap();
    let key = rotated["key"].as_str().unwrap();
    assert_ne!(key, agent.key);
    assert_eq!(rotated["was"], agent.key);
    assert_eq!(sites.b.key().await.unwrap(), key);

    // At A the name stands for the site, and its former key is remembered.
    let addr = agent.addr.to_string();
    let a = &sites.a;
    a.json(&["site", "trust", "b", &addr, &agent.key])
        .await
        .unwrap();
    let now = a.json(&["site", "trust", "b", &addr, key]).await.unwrap();
    assert_eq!(now["former"], serde_json::json!([agent.key]));
    refused(a, &["site", "trust", "c", &addr, &agent.key], &["b"]).await;
}
