//! What real sites have said, kept for each version of the protocol in `tests/wire/vN/`
//! (`testkit/src/bin/wire.rs` records them: `make wire`).
//!
//! What today's version was recorded as saying is read and written again to the byte. So a change of the
//! wire, however small and in whichever type, fails here until [`PROTOCOL_VERSION`] is raised and the
//! new version is recorded beside the old ones. Those stay: their first words are answered with the
//! version that is spoken here, and nothing else.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use reconciler::{BlobPart, NodesReply, NodesRequest};
use serde::{Deserialize, Serialize};
use testkit::tap::Speaker;
use testkit::wire::{Entry, What, pack, unpack};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::connect::ConnectError;
use super::framing::{decode, encode_frame};
use super::lasting::Record;
use super::tls::{client_config, server_config};
use super::{Limits, Listener, PROTOCOL_VERSION, connect};
use crate::Phase;
use crate::generation::GenerationId;
use crate::hub::Shelf;
use crate::identity::Identity;
use crate::peers::{Peer, PeerStore};
use crate::protocol::{Blocks, Hello, Kept, Plan, Purpose, Stage, ToSource, ToTarget, Welcome};
use crate::report::{ReplaySummary, StandbyCost, Strategy};
use crate::vm::{BaseFile, BootFiles, FileHash, Id, VmRecord};

const SOON: Duration = Duration::from_secs(10);

/// The oldest version of which there are recordings.
const OLDEST: u16 = 6;

/// What is seldom said, made here: by a guest with an operating system, or when not all goes well.
const RARE: &str = "rare.zst";

fn dir(version: u16) -> PathBuf {
    let all = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/wire");
    all.join(format!("v{version}"))
}

/// The recordings of a version, by name.
fn recordings(version: u16) -> Vec<(String, Vec<Entry>)> {
    let dir = dir(version);
    let files = fs::read_dir(&dir).unwrap_or_else(|error| {
        panic!(
            "the wire of version {version} is not recorded in {}: run `make wire` ({error})",
            dir.display()
        )
    });
    let mut all: Vec<_> = files
        .map(|file| {
            let path = file.unwrap().path();
            let packed = fs::read(&path).unwrap();
            assert!(packed.len() <= 50_000, "{}", path.display());
            (path.display().to_string(), unpack(&packed).unwrap())
        })
        .collect();
    all.sort_by(|one, other| one.0.cmp(&other.0));
    assert!(!all.is_empty());
    all
}

/// What is read of it, written again.
fn again<'a, T: Deserialize<'a> + Serialize>(said: &'a [u8]) -> Result<Vec<u8>, String> {
    let message: T = decode(said).map_err(|error| error.to_string())?;
    Ok(written(&message))
}

fn written<T: Serialize>(message: &T) -> Vec<u8> {
    let mut frame = Vec::new();
    encode_frame(message, &mut frame, Limits::default().max_frame).unwrap();
    frame.split_off(4)
}

#[test]
fn what_is_said_is_what_was_recorded() {
    let mut kinds = [BTreeSet::new(), BTreeSet::new()];
    for (name, entries) in recordings(PROTOCOL_VERSION) {
        for (number, Entry { by, what, bytes }) in entries.iter().enumerate() {
            let again = match (what, by) {
                (What::Preamble, _) => {
                    let [low, high] = PROTOCOL_VERSION.to_le_bytes();
                    Ok([&super::MAGIC[..], &[low, high, 0, 0]].concat())
                }
                (What::Record, _) => again::<Record<'_>>(bytes),
                (What::Message, Speaker::Caller) => {
                    kinds[0].insert(bytes[0]);
                    again::<ToTarget>(bytes)
                }
                (What::Message, Speaker::Called) => {
                    kinds[1].insert(bytes[0]);
                    again::<ToSource>(bytes)
                }
            };
            assert_eq!(
                again.as_ref(),
                Ok(bytes),
                "the wire has changed: {name}, entry {number} ({what:?}, {by:?}). Raise \
                 PROTOCOL_VERSION, and record the new one with `make wire`"
            );
        }
    }
    // What is not recorded would change unseen.
    assert_all::<ToTarget>(&kinds[0]);
    assert_all::<ToSource>(&kinds[1]);
}

/// These are all the kinds of messages that there are.
fn assert_all<T: for<'a> Deserialize<'a>>(kinds: &BTreeSet<u8>) {
    let known: BTreeSet<_> = (0..0x80)
        // No such kind; of others a message is whole, or cut off.
        .filter(|kind| {
            let read = postcard::from_bytes::<T>(&[*kind]);
            !matches!(read, Err(postcard::Error::SerdeDeCustom))
        })
        .collect();
    let lacking: Vec<_> = known.difference(kinds).collect();
    assert!(lacking.is_empty(), "not recorded: {lacking:?}");
    assert!(known.len() > 10);
}

/// What is seldom said.
fn rare() -> Vec<Entry> {
    let part = |byte: u8| BlobPart {
        bytes: vec![byte; 3],
        last: true,
    };
    let mut boot = BootFiles {
        kernel: BaseFile {
            hash: FileHash([5; 32]),
            bytes: 70_000,
        },
        initrd: None,
        append: "quiet".into(),
    };
    boot.initrd = Some(boot.kernel);
    let id = Id([1; 16]);
    let record = VmRecord {
        id,
        disks: vec![boot.kernel],
        boot: Some(boot),
        ready_marker: Some("ready".into()),
        replay_friendly: true,
        ..VmRecord::example()
    };
    let plan = |strategy| Plan {
        strategy,
        base: Some(GenerationId {
            number: 300,
            digest: [6; 32],
        }),
        quick: true,
    };
    let hello = Hello {
        vm: record,
        fence: 300,
        next: 2,
        follows: true,
        ..Hello::example(Purpose::Settle(Id([3; 16])))
    };
    let to_target = [
        ToTarget::Hello(Box::new(hello)),
        ToTarget::Leave,
        ToTarget::Layout(part(1)),
        ToTarget::Rearrangement(part(2)),
        ToTarget::Seek(part(3)),
        ToTarget::Nodes(NodesReply {
            children: vec![4; 64],
        }),
        ToTarget::Plan(plan(Strategy::Replay)),
        ToTarget::Plan(plan(Strategy::Base)),
        ToTarget::Plan(plan(Strategy::Full)),
        ToTarget::Plan(plan(Strategy::Live)),
        ToTarget::Blocks(Blocks {
            disk: 1,
            runs: vec![(300, 2), (1 << 20, 1)],
            bytes: vec![8; 3],
        }),
    ];
    let welcome = |stage| {
        ToSource::Welcome(Box::new(Welcome {
            common: vec![],
            lacks: vec![FileHash([5; 32])],
            qemu: "7.2.0".into(),
            standby: Some(300),
            kept: Some(Kept {
                plan: plan(Strategy::Live),
                stage,
            }),
        }))
    };
    let summary = ReplaySummary {
        diverged: Some("it did".into()),
        standby: Some(StandbyCost::default()),
        ..ReplaySummary::default()
    };
    let mut to_source = vec![
        welcome(Stage::Prepared),
        welcome(Stage::Replaying { records: 300 }),
        welcome(Stage::Frozen),
        ToSource::Refused("no room".into()),
        ToSource::Replaying {
            done: 300,
            total: 400,
        },
        ToSource::Replayed(summary),
        ToSource::Following {
            records: 300,
            at: 1 << 40,
            missed: 1,
            cost: Some(StandbyCost::default()),
        },
        ToSource::Differs(NodesRequest {
            level: 1,
            nodes: vec![0, 300],
        }),
        ToSource::Unpatched(part(5)),
        ToSource::Whole(part(6)),
        ToSource::Refetch(part(7)),
        ToSource::Want {
            disk: 1,
            first: 300,
            count: 32,
        },
        ToSource::Shelf(Box::new(Shelf {
            key: None,
            receipt: None,
            parcels: Vec::new(),
        })),
        ToSource::Content(vec![9; 3]),
    ];
    to_source.extend(Phase::ALL.map(|phase| ToSource::Failed {
        phase,
        reason: "no".into(),
    }));
    let entry = |by, bytes: Vec<u8>| Entry {
        by,
        what: What::Message,
        bytes,
    };
    let said = to_target
        .iter()
        .map(|said| entry(Speaker::Caller, written(said)));
    let answered = to_source
        .iter()
        .map(|said| entry(Speaker::Called, written(said)));
    said.chain(answered).collect()
}

/// `make fuzz` would refuse to run, long after.
#[test]
fn the_seeds_of_fuzzing_speak_this_version() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/src/lib.rs");
    let said = format!("pub const VERSION: u16 = {PROTOCOL_VERSION};");
    assert!(
        fs::read_to_string(path).unwrap().contains(&said),
        "look through fuzz/seeds, raise VERSION in fuzz/src/lib.rs, and make the seeds anew (fuzz/seeds/main.rs)"
    );
}

#[test]
fn what_is_seldom_said_is_what_was_recorded() {
    let rare_then = unpack(&fs::read(dir(PROTOCOL_VERSION).join(RARE)).unwrap()).unwrap();
    assert!(
        rare() == rare_then,
        "the wire has changed: raise PROTOCOL_VERSION, and record the new one with `make wire`"
    );
}

/// A part of `make wire`.
#[test]
#[ignore = "it writes a recording"]
fn record_what_is_seldom_said() {
    let dir = dir(PROTOCOL_VERSION);
    fs::create_dir_all(&dir).unwrap();
    fs::write(dir.join(RARE), pack(&rare()).unwrap()).unwrap();
}

/// What was said up to the first message of this side, that one included.
fn first_words(entries: &[Entry], side: Speaker) -> Vec<u8> {
    let mut said = Vec::new();
    for Entry { by, what, bytes } in entries {
        match what {
            _ if *by != side => {}
            What::Preamble => said.extend(bytes),
            What::Record => {
                said.extend(u32::try_from(bytes.len()).unwrap().to_le_bytes());
                said.extend(bytes);
            }
            What::Message => break,
        }
    }
    said
}

struct Sites {
    _dir: tempfile::TempDir,
    here: Identity,
    there: Identity,
    peers: PeerStore,
}

impl Sites {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let [here, there] = [(); 2].map(|()| Identity::ephemeral().unwrap());
        let peers = PeerStore::new(dir.path());
        for (name, key) in [("here", here.key()), ("there", there.key())] {
            let addr = "127.0.0.1:1".parse().unwrap();
            let peer = Peer::new(name.parse().unwrap(), addr, key);
            peers.trust(peer, None).unwrap();
        }
        Self {
            _dir: dir,
            here,
            there,
            peers,
        }
    }
}

#[tokio::test]
async fn callers_of_older_versions_are_told_which_one_is_spoken_here() {
    for version in OLDEST..PROTOCOL_VERSION {
        let sites = Sites::new();
        let mut listener = Listener::bind("127.0.0.1:0", &sites.here, sites.peers)
            .await
            .unwrap();
        let to = listener.local_addr();
        for (name, entries) in recordings(version) {
            let said = first_words(&entries, Speaker::Caller);
            let call = async {
                let config = client_config(&sites.there, sites.here.key()).unwrap();
                let stream = TcpStream::connect(to).await.unwrap();
                let domain = to.ip().into();
                let connector = TlsConnector::from(config);
                let mut stream = connector.connect(domain, stream).await.unwrap();
                stream.write_all(&said).await.unwrap();
                let mut heard = Vec::new();
                // Hung up, in whatever way.
                let _ = tokio::time::timeout(SOON, stream.read_to_end(&mut heard)).await;
                heard
            };
            let heard = tokio::select! {
                heard = call => heard,
                accepted = listener.accept() => panic!("{name}: let in {:?}", accepted.peer),
            };
            let [low, high] = PROTOCOL_VERSION.to_le_bytes();
            assert_eq!(
                heard,
                [&super::MAGIC[..], &[low, high, 0, 0]].concat(),
                "{name}"
            );
        }
    }
}

#[tokio::test]
async fn sites_of_older_versions_are_refused_with_both_versions_named() {
    for version in OLDEST..PROTOCOL_VERSION {
        let sites = Sites::new();
        let (_, entries) = recordings(version).swap_remove(0);
        let said = first_words(&entries, Speaker::Called);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap().to_string().parse().unwrap();
        let acceptor = TlsAcceptor::from(server_config(&sites.there, sites.peers).unwrap());
        let answer = async {
            let (stream, _) = listener.accept().await.unwrap();
            let mut stream = acceptor.accept(stream).await.unwrap();
            stream.write_all(&said).await.unwrap();
            stream.flush().await.unwrap();
            let mut heard = Vec::new();
            let _ = stream.read_to_end(&mut heard).await;
        };
        let key = sites.there.key();
        let call = connect(&addr, &sites.here, &key, SOON);
        let (called, ()) = tokio::join!(call, answer);
        let error = called.unwrap_err();
        assert!(
            matches!(error, ConnectError::Version { theirs, ours: PROTOCOL_VERSION, .. }
                if theirs == version),
            "{error:?}"
        );
        let both = format!("version {version}, this is {PROTOCOL_VERSION}");
        assert!(error.to_string().contains(&both), "{error}");
    }
}
