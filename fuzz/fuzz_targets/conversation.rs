//! A trusted site that turns: whatever it says, over a real line to a real agent, in whatever
//! order, the agent answers or hangs up, lets go of the VM once the site is trusted no longer, and
//! has nothing in its state directory but what a conversation may leave.
//!
//! The input is a list of messages: a length (two bytes, little endian), then so many bytes of a
//! frame. QEMU is a stand-in (`fuzz/stand-in-qemu`) that knows its version and its machines and
//! runs no guest; `qemu-img` is the real one.
#![no_main]

use std::fs::{self, File};
use std::sync::LazyLock;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use serde::ser::{Serialize, SerializeTuple, Serializer};
use site::Store;
use site::agent::Agent;
use site::identity::{Identity, SiteKey};
use site::peers::{Peer, PeerAddr};
use site::protocol::ToSource;
use site::transport::{PROTOCOL_VERSION, connect};
use tempfile::TempDir;
use tokio::runtime::Runtime;

/// Longer frames say no more.
const FRAME: usize = 64 << 10;

/// Bytes as they are: postcard writes a tuple's parts and nothing else.
struct Raw<'a>(&'a [u8]);

impl Serialize for Raw<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut tuple = serializer.serialize_tuple(self.0.len())?;
        for byte in self.0 {
            tuple.serialize_element(byte)?;
        }
        tuple.end()
    }
}

struct World {
    runtime: Runtime,
    store: Store,
    addr: PeerAddr,
    key: SiteKey,
    caller: Identity,
    peer: Peer,
    /// What the state directory holds before anybody calls.
    before: Vec<String>,
    _dir: TempDir,
}

static WORLD: LazyLock<World> = LazyLock::new(|| {
    assert!(
        std::env::var_os("REPLAY_MIGRATE_QEMU").is_some(),
        "fuzz/run sets the stand-in for QEMU"
    );
    assert_eq!(PROTOCOL_VERSION, fuzz_seeds::VERSION, "make the seeds anew");
    let dir = tempfile::tempdir().expect("a folder");
    let store = Store::open(dir.path().join("site")).expect("a site");
    let disk = dir.path().join("disk");
    fs::write(&disk, vec![0; fuzz_seeds::DISK]).expect("a disk");
    store.import_disk(&disk).expect("a base image");
    let caller = Identity::ephemeral().expect("a key");
    let unused: PeerAddr = "127.0.0.1:1".parse().expect("an address");
    let peer = Peer::new("caller".parse().expect("a name"), unused, caller.key());
    store.peers().trust(peer.clone(), None).expect("trusted");
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime");
    let agent = runtime
        .block_on(Agent::bind(&store, "127.0.0.1:0"))
        .expect("an agent");
    let addr = agent.local_addr().to_string();
    runtime.spawn(agent.run(std::future::pending()));
    World {
        runtime,
        key: store.identity().expect("a key").key(),
        before: names(store.root()),
        store,
        addr: addr.parse().expect("an address"),
        caller,
        peer,
        _dir: dir,
    }
});

fn names(dir: &std::path::Path) -> Vec<String> {
    let entries = fs::read_dir(dir).expect("a folder");
    let mut names: Vec<_> = entries
        .map(|entry| entry.expect("an entry").file_name())
        .map(|name| name.to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

async fn call(world: &World, input: &[u8]) {
    let connection = connect(
        &world.addr,
        &world.caller,
        &world.key,
        Duration::from_secs(20),
    )
    .await
    .expect("let in");
    let (mut sender, mut receiver) = connection.split();
    let listening = async {
        // Until the other end has had enough. That it says what is no message would be a finding.
        loop {
            match receiver.recv::<ToSource>().await {
                // For whoever looks at a finding.
                Ok(said) if std::env::var_os("FUZZ_SHOW").is_some() => eprintln!("{said:?}"),
                Ok(_) => {}
                Err(error) if error.is_disconnect() => return,
                Err(error) => panic!("{error:?}"),
            }
        }
    };
    let speaking = async {
        let mut rest = input;
        while let Some((len, after)) = rest.split_first_chunk::<2>() {
            let len = usize::from(u16::from_le_bytes(*len)).min(FRAME).min(after.len());
            if sender.send(&Raw(&after[..len])).await.is_err() {
                break;
            }
            rest = &after[len..];
        }
        let _ = sender.shutdown().await;
        sender
    };
    let both = async { tokio::join!(speaking, listening) };
    tokio::time::timeout(Duration::from_secs(120), both)
        .await
        .expect("an end");
}

fuzz_target!(|input: &[u8]| {
    let world = &*WORLD;
    world.runtime.block_on(call(world, input));
    // What waits for another call ends with the trust in who might make it.
    let peers = world.store.peers();
    peers.remove(&world.peer.name).expect("trusted no longer");
    // Cleared when the VM's lock is free; where there is nothing of the VM there was no lock.
    let vms = world.store.root().join("vms");
    for name in names(&vms) {
        let vm = vms.join(&name);
        if let Ok(lock) = File::open(vm.join("lock")) {
            lock.lock().expect("a lock");
        }
        let _ = fs::remove_dir_all(vm);
    }
    peers.trust(world.peer.clone(), None).expect("trusted again");
    let _ = fs::remove_dir_all(world.store.root().join("void"));
    let may = ["void", "deleted", "links.json"];
    for name in names(world.store.root()) {
        assert!(
            world.before.contains(&name) || may.contains(&name.as_str()),
            "{name} was not there before"
        );
    }
    let images = names(&world.store.root().join("images"));
    assert!((1..=2).contains(&images.len()), "more than the disk and its tree: {images:?}");
});
