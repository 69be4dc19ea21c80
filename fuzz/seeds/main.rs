//! Makes the corpus that is kept: small inputs from which the fuzzers begin, of what sites say
//! and files hold when all is well. `fuzz/run` calls it where the corpus is missing; the names of
//! its files are what they are about.
//!
//!     cargo run --manifest-path fuzz/Cargo.toml --bin seeds

mod images;
mod reconciling;
mod talk;

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};

use fuzz_seeds::VERSION;
use serde::Serialize;
use site::chain::Chain;
use site::lease::{Lease, Title};
use site::peers::Peer;
use site::transport::PROTOCOL_VERSION;
use site::transport::framing::encode_frame;
use site::vm::Id;
use traces::encode_records;

use images::Images;
use talk::session;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const MAX: usize = 1 << 20;
const RAM: usize = 32 << 20;

fn main() -> Result<()> {
    assert_eq!(
        PROTOCOL_VERSION, VERSION,
        "look through the seeds, then raise VERSION"
    );
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    let images = Images::new()?;
    talk::conversations(&corpus, &images)?;
    talk::hub(&corpus, &images)?;
    talk::frames(&corpus, &images)?;
    state_files(&corpus, &images)?;
    records(&corpus)?;
    rfb(&corpus)?;
    keys(&corpus)?;
    reconciling::reconciling(&corpus)?;
    reconciling::streams(&corpus)?;
    reconciling::processes(&corpus)?;
    chains(&corpus, &images)?;
    Ok(())
}

fn put(corpus: &Path, target: &str, name: &str, bytes: &[u8]) -> Result<()> {
    let dir: PathBuf = corpus.join(target);
    fs::create_dir_all(&dir)?;
    Ok(fs::write(dir.join(name), bytes)?)
}

fn body<T: Serialize>(message: &T) -> Result<Vec<u8>> {
    let mut frame = Vec::new();
    encode_frame(message, &mut frame, MAX)?;
    Ok(frame.split_off(4))
}

fn state_files(corpus: &Path, images: &Images) -> Result<()> {
    let file = |which: u8, name: &str, text: String| {
        let bytes = [&[which], text.as_bytes()].concat();
        put(corpus, "state_files", name, &bytes)
    };
    file(0, "manifest", serde_json::to_string(&images.manifest(1)?)?)?;
    let key = site::identity::SiteKey::of_spki(b"office");
    let mut peer = Peer::new("office".parse()?, "office.example:7707".parse()?, key);
    peer.former = vec![site::identity::SiteKey::of_spki(b"before")];
    let peers = serde_json::json!({ "version": 3, "peers": [peer] });
    file(1, "peers", peers.to_string())?;
    let old = serde_json::json!({ "version": 1, "peers": [
        { "name": "home", "addr": "[::1]:1", "key": key.to_string() }
    ] });
    file(1, "peers_of_version_1", old.to_string())?;
    file(2, "site", r#"{"version":1}"#.into())?;
    file(3, "vm", serde_json::to_string(&images.record)?)?;
    let leases = [
        Lease::Held {
            fence: 3,
            transfer: Some(Id([3; 16])),
        },
        Lease::Offered {
            fence: 3,
            transfer: Id([3; 16]),
            to: key,
            to_name: "office".into(),
            was_running: true,
        },
        Lease::Elsewhere {
            fence: 4,
            owner: key,
            owner_name: "office".into(),
        },
    ];
    for (number, lease) in leases.iter().enumerate() {
        let name = format!("lease{number}");
        file(4, &name, serde_json::to_string(lease)?)?;
    }
    let mut title = Title {
        lease: leases[2].clone(),
        chain: images.chain(),
        taken_by: Some(key),
    };
    title.chain.hand_over(images.record.id, key, &images.caller);
    file(4, "chain", serde_json::to_string(&title)?)?;
    let capture = serde_json::json!({
        "version": 1, "vm": "desk", "qemu": "7.2.0", "append": null, "generation": 3,
        "micros": 90_000_000, "records": 400, "replays": [{
            "state": "replayed", "events": 1, "matched": 1, "missed": 0, "seconds": 1.5,
            "recorded_seconds": 2.5, "came_to_rest": true, "diverged": null, "skipped": 0,
            "standby": null
        }]
    });
    file(5, "capture", capture.to_string())
}

fn records(corpus: &Path) -> Result<()> {
    let all = session();
    put(corpus, "records", "session", &encode_records(&all)?)?;
    put(corpus, "records", "keys", &encode_records(&all[6..8])?)?;
    put(corpus, "records", "none", &encode_records(&[])?)?;
    // Where it is cut off, then bytes that are changed and how.
    put(corpus, "log", "whole", &[0xff, 0xff])?;
    put(corpus, "log", "cut", &[200, 0])?;
    put(
        corpus,
        "log",
        "changed",
        &[0xff, 0xff, 90, 0, 1, 120, 0, 0x80],
    )
}

fn rfb(corpus: &Path) -> Result<()> {
    // How it is cut into pieces, then SetPixelFormat, SetEncodings, requests, keys, the pointer,
    // a clipboard, and QEMU's own message for keys (RFC 6143 section 7.5).
    let mut viewer = vec![3];
    viewer.extend([
        0, 0, 0, 0, 32, 24, 0, 1, 0, 255, 0, 255, 0, 255, 16, 8, 0, 0, 0, 0,
    ]);
    viewer.extend([2, 0, 0, 2, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0x21]);
    viewer.extend([3, 1, 0, 0, 0, 0, 5, 0, 3, 32]);
    viewer.extend([4, 1, 0, 0, 0, 0, 0, 0x61]);
    viewer.extend([5, 1, 1, 44, 0, 100]);
    viewer.extend([6, 0, 0, 0, 0, 0, 0, 2, b'h', b'i']);
    viewer.extend([255, 0, 0, 1, 0, 0, 0, 0x61, 0, 0, 0, 30]);
    put(corpus, "rfb", "viewer", &viewer)?;

    // After the opening: an update of one rectangle, another size, a bell, a clipboard.
    let mut server = vec![1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 16, 0, 8, 0, 0, 0, 0];
    server.extend([9; 16 * 8 * 4]);
    server.extend([
        0, 0, 0, 1, 0, 0, 0, 0, 0, 4, 0, 2, 0xff, 0xff, 0xff, 0x21, 2,
    ]);
    server.extend([3, 0, 0, 0, 0, 0, 0, 1, b'x']);
    put(corpus, "rfb_server", "update", &server)?;
    let refused = b"\0RFB 003.008\n\0\0\0\0\x04full";
    put(corpus, "rfb_server", "refused", refused)?;
    let password = b"\0RFB 003.008\n\x02\x02\x13";
    put(corpus, "rfb_server", "password", password)
}

fn keys(corpus: &Path) -> Result<()> {
    let key = site::identity::SiteKey::of_spki(b"office");
    put(corpus, "keys", "key", key.to_string().as_bytes())?;
    put(corpus, "keys", "id", key.id().to_string().as_bytes())?;
    put(corpus, "keys", "name", b"office-2")?;
    put(corpus, "keys", "address", b"[::1]:7707")
}

/// Chains of hand-overs of the VM of the target `chain`.
fn chains(corpus: &Path, images: &Images) -> Result<()> {
    let (vm, caller) = (images.record.id, &images.caller);
    let mut chain = Chain::start(vm, 1, caller);
    put(corpus, "chain", "start", &body(&chain)?)?;
    chain.hand_over(vm, caller.key(), caller);
    chain.hand_over(vm, site::identity::SiteKey::of_spki(b"office"), caller);
    put(corpus, "chain", "handed_over", &body(&chain)?)?;
    chain.take_over(vm, 3, 1003, caller);
    put(corpus, "chain", "taken_over", &body(&chain)?)
}
