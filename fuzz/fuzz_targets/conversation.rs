//! A trusted site that turns: whatever it says, over a real line to a real agent, in whatever
//! order, the agent answers or hangs up, lets go of the VM once the site is trusted no longer, and
//! has nothing in its state directory but what a conversation may leave.
//!
//! The input is a list of messages: a length (two bytes, little endian), then so many bytes of one. They
//! go as a line's stream, which ends in order or, where the input's length is odd, is cut off. QEMU is a stand-in (`fuzz/stand-in-qemu`) that knows its version and its machines and
//! runs no guest; `qemu-img` is the real one.
#![no_main]

use std::fs::{self, File};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use serde::{Deserialize, Serialize};
use site::Store;
use site::agent::Agent;
use site::identity::{Identity, SiteKey};
use site::peers::{Peer, PeerAddr};
use site::protocol::ToSource;
use site::transport::framing::{decode, frame_len};
use site::transport::{PROTOCOL_VERSION, connect};
use tempfile::TempDir;
use tokio::runtime::Runtime;

/// No message is longer.
const LARGEST: usize = (1 << 20) + (64 << 10);

/// No record carries more of the stream.
const PIECE: usize = 16 << 10;

/// What travels on a connection, see "A line and its connections" in `docs/protocol.md`.
#[derive(Serialize, Deserialize)]
enum Record {
    Begin([u8; 16]),
    Resume([u8; 16], u64),
    Resumed(u64),
    Unknown,
    Data(#[serde(with = "serde_bytes")] Vec<u8>),
    Ack(u64),
    Farewell,
    HangUp,
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
    fuzz_seeds::called(store.root()).expect("a key");
    let disk = dir.path().join("disk");
    fs::write(&disk, vec![0; fuzz_seeds::DISK]).expect("a disk");
    store.import_disk(&disk).expect("a base image");
    let keys = dir.path().join("caller");
    fs::create_dir(&keys).expect("a folder");
    let caller = fuzz_seeds::caller(&keys).expect("a key");
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

/// Another one for each line.
fn name() -> [u8; 16] {
    static LINES: AtomicU64 = AtomicU64::new(0);
    let mut name = [0; 16];
    name[..8].copy_from_slice(&LINES.fetch_add(1, Relaxed).to_le_bytes());
    name
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
        let mut stream = Vec::new();
        loop {
            match receiver.recv::<Record>().await {
                Ok(Record::Data(bytes)) => stream.extend(bytes),
                Ok(_) => continue,
                Err(error) if error.is_disconnect() => return,
                Err(error) => panic!("{error:?}"),
            }
            while let Some(len) = frame_len(&stream, LARGEST)
                .expect("no longer than any")
                .filter(|len| stream.len() >= 4 + len)
            {
                let said: ToSource = decode(&stream[4..4 + len]).expect("a message");
                // For whoever looks at a finding.
                if std::env::var_os("FUZZ_SHOW").is_some() {
                    eprintln!("{said:?}");
                }
                stream.drain(..4 + len);
            }
        }
    };
    let speaking = async {
        let mut stream = Vec::new();
        let mut rest = input;
        while let Some((len, after)) = rest.split_first_chunk::<2>() {
            let len = usize::from(u16::from_le_bytes(*len)).min(after.len());
            stream.extend((len as u32).to_le_bytes());
            stream.extend(&after[..len]);
            rest = &after[len..];
        }
        let mut records = vec![Record::Begin(name())];
        records.extend(stream.chunks(PIECE).map(|piece| Record::Data(piece.to_vec())));
        if input.len() % 2 == 0 {
            records.push(Record::Farewell);
        }
        for record in &records {
            if sender.send(record).await.is_err() {
                break;
            }
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
    let _ = fs::remove_dir_all(world.store.root().join("hub"));
    let may = ["void", "deleted", "links.json"];
    for name in names(world.store.root()) {
        assert!(
            world.before.contains(&name) || may.contains(&name.as_str()),
            "{name} was not there before"
        );
    }
    // Who takes in a file holds a lock, whose file stays.
    let mut images = names(&world.store.root().join("images"));
    images.retain(|name| name != ".import.lock");
    assert!((1..=2).contains(&images.len()), "more than the disk and its tree: {images:?}");
});
