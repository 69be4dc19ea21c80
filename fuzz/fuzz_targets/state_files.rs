//! Files of a state directory, and of a capture, that somebody else may have written: whatever
//! is in them, they are read or refused, and what was read can be written and read again. The
//! first byte says which file it is.
#![no_main]

use std::fs;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use serde::Serialize;
use serde::de::DeserializeOwned;
use site::capture::Capture;
use site::generation::{GenerationFiles, Manifest};
use site::hub;
use site::identity::SiteKey;
use site::lease::Lease;
use site::peers::{Peer, PeerStore};
use site::vm::{Id, VmRecord};
use site::{Store, VmDir};
use tempfile::TempDir;

static DIR: LazyLock<TempDir> = LazyLock::new(|| tempfile::tempdir().expect("a folder"));

/// What was read, written and read again, is the same.
fn again<T: Serialize + DeserializeOwned>(value: &T) {
    let once = serde_json::to_string(value).expect("it was text before");
    let read: T = serde_json::from_str(&once).expect("just written");
    assert_eq!(serde_json::to_string(&read).expect("as before"), once);
}

fn vm(store: &Store) -> VmDir {
    let vm = store.vm(&"desk".parse().expect("a name"));
    fs::create_dir_all(vm.dir()).expect("a folder");
    vm
}

fuzz_target!(|bytes: &[u8]| {
    let Some((&which, content)) = bytes.split_first() else {
        return;
    };
    let dir = DIR.path();
    let put = |path: std::path::PathBuf| fs::write(path, content).expect("written");
    match which % 7 {
        0 => {
            put(dir.join("manifest.json"));
            if let Ok(Some(manifest)) = GenerationFiles::at(dir).load_manifest() {
                again::<Manifest>(&manifest);
                manifest.identity();
            }
        }
        1 => {
            put(dir.join("peers.json"));
            if let Ok(peers) = PeerStore::new(dir).list() {
                again::<Vec<Peer>>(&peers);
                assert!(peers.iter().all(|peer| peer.had(&peer.key)));
            }
        }
        2 => {
            let root = dir.join("site");
            fs::create_dir_all(&root).expect("a folder");
            put(root.join("site.json"));
            let _ = Store::open(&root);
            fs::remove_file(root.join("site.json")).expect("it is there");
        }
        3 => {
            let store = Store::open(dir.join("vms")).expect("a site");
            let vm = vm(&store);
            put(vm.dir().join("vm.json"));
            if let Ok(Some(record)) = vm.try_record() {
                again::<VmRecord>(&record);
                let _ = record.validate();
                assert!(record.base_files().len() <= record.disks.len() + 2);
            }
        }
        4 => {
            let store = Store::open(dir.join("vms")).expect("a site");
            let vm = vm(&store);
            put(vm.dir().join("lease.json"));
            if let Ok(lease) = vm.lease() {
                again::<Lease>(&lease);
            }
        }
        5 => {
            if let Ok(capture) = serde_json::from_slice::<Capture>(content) {
                again(&capture);
            }
        }
        _ => {
            let store = Store::open(dir.join("vms")).expect("a site");
            let key = SiteKey::of_spki(b"office").to_string();
            let below = store.root().join("hub").join(key).join(Id([7; 16]).to_string());
            fs::create_dir_all(&below).expect("a folder");
            put(below.join("1-x.parcel"));
            put(below.join("receipt.bin"));
            // Nobody has signed any of it for that site.
            assert!(hub::lies(&store).expect("listed").is_empty());
        }
    }
});
