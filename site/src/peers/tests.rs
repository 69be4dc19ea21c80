use std::fs::Permissions as Mode;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use super::*;

fn peer(name: &str, key: &str) -> Peer {
    Peer::new(
        name.parse().unwrap(),
        "127.0.0.1:7707".parse().unwrap(),
        SiteKey::of_spki(key.as_bytes()),
    )
}

fn store() -> (tempfile::TempDir, PeerStore) {
    let dir = tempfile::tempdir().unwrap();
    let store = PeerStore::new(dir.path());
    (dir, store)
}

#[test]
fn peers_are_added_replaced_found_and_removed() {
    let (_dir, store) = store();
    assert!(store.list().unwrap().is_empty());
    let (office, home) = (peer("office", "1"), peer("home", "2"));
    assert_eq!(store.trust(office.clone(), None).unwrap().1, None);
    assert_eq!(store.trust(home, None).unwrap().1, None);
    let (office_now, before) = store.trust(peer("office", "3"), None).unwrap();
    assert_eq!(before, Some(office));
    let names: Vec<_> = store
        .list()
        .unwrap()
        .into_iter()
        .map(|p| p.name.0)
        .collect();
    assert_eq!(names, ["home", "office"]);
    assert_eq!(
        store.by_key(&SiteKey::of_spki(b"3")).unwrap(),
        Some(office_now)
    );
    assert_eq!(store.by_key(&SiteKey::of_spki(b"1")).unwrap(), None);
    assert_eq!(
        store.by_name(&"home".parse().unwrap()).unwrap(),
        peer("home", "2")
    );
    assert_eq!(
        store.remove(&"home".parse().unwrap()).unwrap(),
        peer("home", "2")
    );
    assert!(matches!(
        store.remove(&"home".parse().unwrap()),
        Err(PeerError::Unknown(_))
    ));
    assert!(matches!(
        store.by_name(&"home".parse().unwrap()),
        Err(PeerError::Unknown(_))
    ));
}

#[test]
fn a_key_has_one_name() {
    let (_dir, store) = store();
    store.trust(peer("office", "1"), None).unwrap();
    let error = store.trust(peer("work", "1"), None).unwrap_err();
    assert!(error.to_string().contains("as office"), "{error}");
    assert_eq!(store.list().unwrap(), [peer("office", "1")]);
}

#[test]
fn changes_at_once_are_all_kept() {
    let (_dir, store) = store();
    std::thread::scope(|scope| {
        for i in 0..8 {
            let store = &store;
            scope.spawn(move || {
                store
                    .trust(peer(&format!("p{i}"), &format!("{i}")), None)
                    .unwrap()
            });
        }
    });
    assert_eq!(store.list().unwrap().len(), 8);
}

#[test]
fn names_and_addresses_are_checked() {
    for good in ["a", "office-2", "A.b_c", &"x".repeat(63)] {
        assert!(good.parse::<PeerName>().is_ok(), "{good}");
    }
    for bad in [
        "",
        "-a",
        ".",
        "..",
        "a/b",
        "a b",
        "ü",
        "a\n",
        &"x".repeat(64),
    ] {
        assert!(bad.parse::<PeerName>().is_err(), "{bad:?}");
    }
    for good in ["127.0.0.1:1", "host.example:65535", "[::1]:7707"] {
        assert!(good.parse::<PeerAddr>().is_ok(), "{good}");
    }
    for bad in [
        "", "host", ":1", "h:0", "h:65536", "h:+1", "::1:7707", "[x]:1", "a b:1",
    ] {
        assert!(bad.parse::<PeerAddr>().is_err(), "{bad:?}");
    }
}

#[test]
fn what_cannot_be_believed_is_refused() {
    let (dir, store) = store();
    let path = dir.path().join("peers.json");
    store.trust(peer("office", "1"), None).unwrap();
    fs::set_permissions(&path, Mode::from_mode(0o666)).unwrap();
    assert!(matches!(store.list(), Err(PeerError::Exposed { .. })));
    fs::set_permissions(&path, Mode::from_mode(0o600)).unwrap();

    fs::write(&path, r#"{"version": 4, "sites": []}"#).unwrap();
    assert!(matches!(
        store.list(),
        Err(PeerError::Version { version: 4, .. })
    ));
    fs::write(&path, r#"{"version": 1, "peers": [{"name": "../x""#).unwrap();
    assert!(matches!(store.list(), Err(PeerError::Damaged { .. })));
    let text = serde_json::to_string(&Document {
        version: 1,
        peers: vec![peer("office", "1")],
    });
    fs::write(&path, text.unwrap().replace("office", "../x")).unwrap();
    assert!(matches!(store.list(), Err(PeerError::Damaged { .. })));
    // A damaged store is not overwritten by the next change.
    assert!(store.trust(peer("home", "2"), None).is_err());
    assert!(fs::read_to_string(&path).unwrap().contains("../x"));
}

#[test]
fn a_site_with_a_new_key_is_the_same_site() {
    let (_dir, store) = store();
    let key = |text: &str| SiteKey::of_spki(text.as_bytes());
    store.trust(peer("office", "1"), None).unwrap();
    store.trust(peer("office", "2"), None).unwrap();
    let (office, _) = store.trust(peer("office", "3"), None).unwrap();
    assert_eq!(office.former, [key("1"), key("2")]);
    assert!(office.had(&key("1")) && office.had(&key("3")) && !office.had(&key("4")));
    // What was its own lets nobody in, is nobody else's, and can be its own again.
    assert_eq!(store.by_key(&key("1")).unwrap(), None);
    assert_eq!(store.of_key(&key("1")).unwrap(), Some(office));
    assert!(matches!(
        store.trust(peer("home", "2"), None),
        Err(PeerError::KeyTaken(_))
    ));
    let (office, _) = store.trust(peer("office", "2"), None).unwrap();
    assert_eq!(office.former, [key("1"), key("3")]);
    for i in 10..40 {
        store.trust(peer("office", &i.to_string()), None).unwrap();
    }
    let office = store.by_name(&"office".parse().unwrap()).unwrap();
    assert_eq!(office.former.len(), Peer::FORMER);
    assert_eq!(office.former.last(), Some(&key("38")));
}

#[test]
fn permissions_stay_until_others_are_said() {
    let (dir, store) = store();
    let may = |text: &str| text.parse::<Permissions>().unwrap();
    let (office, _) = store.trust(peer("office", "1"), None).unwrap();
    assert_eq!(office.may, Permissions::default());
    store.trust(peer("office", "1"), Some(may("send"))).unwrap();
    // Another address or key is no reason to let it do more.
    let (office, _) = store.trust(peer("office", "2"), None).unwrap();
    assert_eq!(office.may, may("send"));
    office.require(Permission::Send).unwrap();
    let refused = office.require(Permission::Receive).unwrap_err().to_string();
    assert!(refused.contains("office may not receive"), "{refused}");
    // A file of the first version knows nothing of permissions: there was one kind of trust.
    let text = fs::read_to_string(dir.path().join("peers.json")).unwrap();
    let mut old: serde_json::Value = serde_json::from_str(&text).unwrap();
    old["version"] = 1.into();
    old["peers"][0].as_object_mut().unwrap().remove("may");
    fs::write(dir.path().join("peers.json"), old.to_string()).unwrap();
    assert_eq!(store.list().unwrap()[0].may, Permissions::default());
    // A permission that this program does not know is no reason to guess.
    old["peers"][0]["may"] = serde_json::json!(["send", "fly"]);
    fs::write(dir.path().join("peers.json"), old.to_string()).unwrap();
    assert!(matches!(store.list(), Err(PeerError::Damaged { .. })));
}

#[tokio::test]
async fn a_change_of_the_list_is_heard_of() {
    let (_dir, store) = store();
    store.trust(peer("office", "1"), None).unwrap();
    let mut watch = store.watch().unwrap();
    let quiet = tokio::time::timeout(Duration::from_millis(50), watch.changed()).await;
    assert!(quiet.is_err(), "nothing has changed yet");
    store.remove(&"office".parse().unwrap()).unwrap();
    watch.changed().await.unwrap();
}
