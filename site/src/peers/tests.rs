use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;

use super::*;

fn peer(name: &str, key: &str) -> Peer {
    Peer {
        name: name.parse().unwrap(),
        addr: "127.0.0.1:7707".parse().unwrap(),
        key: SiteKey::of_spki(key.as_bytes()),
    }
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
    assert_eq!(store.trust(peer("office", "1")).unwrap(), None);
    assert_eq!(store.trust(peer("home", "2")).unwrap(), None);
    assert_eq!(
        store.trust(peer("office", "3")).unwrap(),
        Some(peer("office", "1"))
    );
    let names: Vec<_> = store
        .list()
        .unwrap()
        .into_iter()
        .map(|p| p.name.0)
        .collect();
    assert_eq!(names, ["home", "office"]);
    assert_eq!(
        store.by_key(&SiteKey::of_spki(b"3")).unwrap(),
        Some(peer("office", "3"))
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
    store.trust(peer("office", "1")).unwrap();
    let error = store.trust(peer("work", "1")).unwrap_err();
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
                    .trust(peer(&format!("p{i}"), &format!("{i}")))
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
    store.trust(peer("office", "1")).unwrap();
    fs::set_permissions(&path, Permissions::from_mode(0o666)).unwrap();
    assert!(matches!(store.list(), Err(PeerError::Exposed { .. })));
    fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();

    fs::write(&path, r#"{"version": 2, "sites": []}"#).unwrap();
    assert!(matches!(
        store.list(),
        Err(PeerError::Version { version: 2, .. })
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
    assert!(store.trust(peer("home", "2")).is_err());
    assert!(fs::read_to_string(&path).unwrap().contains("../x"));
}
