//! Makes the corpus that is kept: small inputs from which the fuzzers begin, of what sites say
//! and files hold when all is well. `fuzz/run` calls it where the corpus is missing; the names of
//! its files are what they are about.
//!
//!     cargo run --manifest-path fuzz/Cargo.toml --bin seeds

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};

use fuzz_seeds::{DISK, VERSION};
use reconciler::{
    Codec, EncodeOptions, ImageTree, NodesRequest, Offer, OfferOptions, PAGE_SIZE, PageSet,
    References, Salt, SlicePages, blob_parts, encode_pages, no_progress,
};
use serde::Serialize;
use site::Phase;
use site::generation::{ImageInfo, Manifest};
use site::lease::Lease;
use site::peers::Peer;
use site::protocol::{
    CommitRequest, Hello, ImageHead, ImageKind, ImageOutcome, Kept, Plan, Purpose, Stage, ToSource,
    ToTarget, Welcome,
};
use site::report::{ReplaySummary, StandbyCost, Strategy};
use site::transport::PROTOCOL_VERSION;
use site::transport::framing::encode_frame;
use site::vm::{BaseFile, FileHash, Id, VmRecord};
use traces::{Anchor, Event, GuestTime, Record, Region, encode_records};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const MAX: usize = 1 << 20;
const RAM: usize = 32 << 20;

fn main() -> Result<()> {
    assert_eq!(PROTOCOL_VERSION, VERSION, "look through the seeds, then raise VERSION");
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    let images = Images::new()?;
    conversations(&corpus, &images)?;
    frames(&corpus, &images)?;
    state_files(&corpus, &images)?;
    records(&corpus)?;
    rfb(&corpus)?;
    keys(&corpus)?;
    reconciling(&corpus)?;
    Ok(())
}

fn put(corpus: &Path, target: &str, name: &str, bytes: &[u8]) -> Result<()> {
    let dir: PathBuf = corpus.join(target);
    fs::create_dir_all(&dir)?;
    Ok(fs::write(dir.join(name), bytes)?)
}

/// A small VM's state: a page of device state, a disk as its base, and RAM with some pages.
struct Images {
    device: Vec<u8>,
    disk: Vec<u8>,
    ram: Vec<u8>,
    record: VmRecord,
}

fn tree(bytes: &[u8]) -> Result<ImageTree> {
    Ok(ImageTree::build(&SlicePages(bytes), &no_progress)?)
}

impl Images {
    fn new() -> Result<Self> {
        let disk = vec![0; DISK];
        let mut ram = vec![0; RAM];
        for (page, byte) in [(3, 1), (4, 1), (500, 2), (8000, 3)] {
            ram[page * PAGE_SIZE..(page + 1) * PAGE_SIZE].fill(byte);
        }
        let mut hardware = vm_host::Hardware::new("pc-q35-7.2");
        hardware.memory_mib = 32;
        let record = VmRecord {
            id: Id([1; 16]),
            name: "desk".parse()?,
            hardware,
            disks: vec![BaseFile {
                hash: FileHash(*blake3::hash(&disk).as_bytes()),
                bytes: DISK as u64,
            }],
            boot: None,
            ready_marker: None,
            replay_friendly: false,
        };
        Ok(Self {
            device: vec![7; PAGE_SIZE],
            disk,
            ram,
            record,
        })
    }

    fn each(&self) -> [(ImageKind, &[u8]); 3] {
        [
            (ImageKind::Device, &self.device),
            (ImageKind::Disk(0), &self.disk),
            (ImageKind::Ram, &self.ram),
        ]
    }

    fn manifest(&self, generation: u64) -> Result<Manifest> {
        let info = |bytes: &[u8]| -> Result<ImageInfo> {
            Ok(ImageInfo {
                bytes: bytes.len() as u64,
                root: tree(bytes)?.root(),
            })
        };
        let mut manifest = Manifest::new(
            self.record.id,
            generation,
            None,
            self.record.hardware.clone(),
            "7.2.0".into(),
            [info(&self.ram)?, info(&self.device)?],
            vec![info(&self.disk)?],
        );
        // The same in every run.
        manifest.created = 1_700_000_000;
        Ok(manifest)
    }

    fn hello(&self, purpose: Purpose) -> Hello {
        Hello {
            purpose,
            vm: self.record.clone(),
            transfer: Id([3; 16]),
            fence: 1,
            generations: Vec::new(),
            next: 1,
            qemu: "7.2.0".into(),
            follows: false,
        }
    }

    /// All images, as a source sends them to a target that has the disk alone.
    fn sent(&self) -> Result<Vec<ToTarget>> {
        let mut messages = Vec::new();
        let options = OfferOptions {
            salt: Salt([1; 32]),
            candidates: 1 << 14,
            force_bits: None,
            seek_from: OfferOptions::SEEK_FROM,
        };
        for (kind, bytes) in self.each() {
            messages.push(ToTarget::Image(ImageHead {
                kind,
                bytes: bytes.len() as u64,
            }));
            let base = base_of(kind, bytes)?;
            let offer = Offer::new(&tree(bytes)?, &base, &options)?.encode()?;
            messages.extend(blob_parts(&offer).map(ToTarget::Offer));
        }
        for (kind, bytes) in self.each() {
            let base = base_of(kind, bytes)?;
            messages.extend(pages_of(bytes, &tree(bytes)?.differing(&base))?);
        }
        Ok(messages)
    }
}

/// What a target has of an image that has only the disks: zeros, and no device state at all.
fn base_of(kind: ImageKind, image: &[u8]) -> Result<ImageTree> {
    let pages = match kind {
        ImageKind::Device => 0,
        ImageKind::Disk(_) | ImageKind::Ram => image.len() / PAGE_SIZE,
    };
    Ok(ImageTree::zero(pages as u64)?)
}

/// These pages as they are.
fn pages_of(image: &[u8], pages: &PageSet) -> Result<Vec<ToTarget>> {
    let pages: Vec<_> = pages.iter().collect();
    let options = EncodeOptions {
        codec: Codec::for_line(1 << 40),
        workers: 0,
    };
    let mut messages = Vec::new();
    let mut sink = |chunk| {
        messages.push(ToTarget::Pages(chunk));
        Ok(())
    };
    let against = References::default();
    encode_pages(&SlicePages(image), against, &pages, options, &mut sink)?;
    messages.push(ToTarget::PagesEnd);
    Ok(messages)
}

fn body<T: Serialize>(message: &T) -> Result<Vec<u8>> {
    let mut frame = Vec::new();
    encode_frame(message, &mut frame, MAX)?;
    Ok(frame.split_off(4))
}

fn conversation(corpus: &Path, name: &str, messages: &[ToTarget]) -> Result<()> {
    let mut bytes = Vec::new();
    for message in messages {
        let body = body(message)?;
        bytes.extend(u16::try_from(body.len())?.to_le_bytes());
        bytes.extend(body);
    }
    put(corpus, "conversation", name, &bytes)
}

fn session() -> Vec<Record> {
    let at = |millis: u64, event| Record {
        at: GuestTime {
            micros: millis * 1000,
        },
        event,
    };
    let (width, height) = (1280, 800);
    let region = Region {
        x: 5,
        y: 6,
        width: 64,
        height: 32,
    };
    vec![
        at(0, Event::Screen { width, height }),
        at(10, Event::Pointer { x: 300, y: 100 }),
        at(20, Event::Pointer { x: 310, y: 105 }),
        at(
            90,
            Event::Anchor(Anchor {
                region,
                tiles: vec![1, 2, 3, 4, 5, 6, 7, 8],
            }),
        ),
        at(100, Event::Button { code: 272, down: true }),
        at(180, Event::Button { code: 272, down: false }),
        at(900, Event::Key { code: 30, down: true }),
        at(980, Event::Key { code: 30, down: false }),
        at(1500, Event::Wheel { vertical: -1, horizontal: 0 }),
        at(2000, Event::Gap),
        at(9000, Event::Redacted),
    ]
}

fn conversations(corpus: &Path, images: &Images) -> Result<()> {
    let hello = |purpose| ToTarget::Hello(Box::new(images.hello(purpose)));
    let plan = |strategy| {
        ToTarget::Plan(Plan {
            strategy,
            base: None,
            quick: false,
        })
    };
    let probe = || ToTarget::Probe(vec![0; 64]);
    conversation(corpus, "estimate", &[hello(Purpose::Estimate), probe()])?;
    let settle = Purpose::Settle(Id([9; 16]));
    conversation(corpus, "settle", &[hello(settle), probe()])?;

    let mut migration = vec![
        hello(Purpose::Migrate),
        probe(),
        plan(Strategy::Full),
        ToTarget::Prepare,
    ];
    migration.extend(images.sent()?);
    migration.push(ToTarget::Commit(Box::new(CommitRequest {
        manifest: images.manifest(1)?,
        fence: 2,
    })));
    migration.push(ToTarget::Resume { paused: true });
    conversation(corpus, "migration", &migration)?;

    // The device state comes once more when the VM stands still; here it ends with a round.
    let mut live = vec![
        hello(Purpose::Migrate),
        probe(),
        plan(Strategy::Live),
        ToTarget::Prepare,
    ];
    live.extend(images.sent()?);
    live.push(ToTarget::Rounds);
    let mut later = images.ram.clone();
    later[3 * PAGE_SIZE..4 * PAGE_SIZE].fill(9);
    let changed = tree(&later)?.differing(&tree(&images.ram)?);
    live.extend(blob_parts(&changed.encode()).map(|part| ToTarget::Changed {
        kind: ImageKind::Ram,
        part,
    }));
    live.extend(pages_of(&later, &changed)?);
    live.push(ToTarget::RoundEnd);
    conversation(corpus, "live", &live)?;

    let manifest = images.manifest(4)?;
    let seeding = Hello {
        generations: vec![manifest.identity()],
        next: 5,
        ..images.hello(Purpose::Seed)
    };
    let mut seed = vec![
        ToTarget::Hello(Box::new(seeding)),
        ToTarget::File(images.record.disks[0]),
        ToTarget::Data(zstd::encode_all(&images.disk[..], 3)?),
        ToTarget::DataEnd,
        ToTarget::Generation {
            manifest: Box::new(manifest),
            base: None,
        },
    ];
    seed.extend(images.sent()?);
    seed.push(ToTarget::Publish);
    conversation(corpus, "seed", &seed)?;

    let log = encode_records(&session())?;
    let mut replay = vec![
        hello(Purpose::Migrate),
        plan(Strategy::Replay),
        ToTarget::Prepare,
    ];
    replay.extend(blob_parts(&log).map(ToTarget::Log));
    replay.push(ToTarget::Freeze);
    conversation(corpus, "replay", &replay)?;

    let following = Hello {
        follows: true,
        ..images.hello(Purpose::Migrate)
    };
    let mut follow = vec![
        ToTarget::Hello(Box::new(following)),
        plan(Strategy::Replay),
        ToTarget::Prepare,
        probe(),
    ];
    follow.extend(blob_parts(&log).map(|part| ToTarget::Follow { part, at: 2_000_000 }));
    follow.extend([ToTarget::CatchUp { at: 9_000_000 }, ToTarget::Leave]);
    conversation(corpus, "follow", &follow)
}

fn frames(corpus: &Path, images: &Images) -> Result<()> {
    let mut to_target = Vec::new();
    let hello = images.hello(Purpose::Migrate);
    for message in [
        ToTarget::Hello(Box::new(hello)),
        ToTarget::Probe(vec![0; 16]),
        ToTarget::Generation {
            manifest: Box::new(images.manifest(1)?),
            base: Some(1),
        },
        ToTarget::CatchUp { at: 1 << 40 },
    ] {
        encode_frame(&message, &mut to_target, MAX)?;
    }
    put(corpus, "frames", "to_target", &to_target)?;
    let mut to_source = Vec::new();
    let manifest = images.manifest(1)?;
    for message in [
        ToSource::Welcome(Box::new(Welcome {
            common: vec![manifest.identity()],
            lacks: vec![images.record.disks[0].hash],
            qemu: "7.2.0".into(),
            standby: Some(7),
            kept: Some(Kept {
                plan: Plan {
                    strategy: Strategy::Replay,
                    base: None,
                    quick: false,
                },
                stage: Stage::Replaying { records: 7 },
            }),
        })),
        ToSource::Superseded { fence: 9 },
        ToSource::Refused("no room".into()),
        ToSource::Replayed(ReplaySummary {
            diverged: Some("it did".into()),
            standby: Some(StandbyCost::default()),
            ..ReplaySummary::default()
        }),
        ToSource::Following {
            records: 1,
            at: 2,
            missed: 3,
            cost: None,
        },
        ToSource::Verified(ImageOutcome {
            root: manifest.ram.root,
            pages: vec![("literal".into(), 4)],
            refetched: 0,
        }),
        ToSource::Differs(NodesRequest {
            level: 1,
            nodes: vec![0, 1],
        }),
        ToSource::Settled { taken: true },
        ToSource::Failed {
            phase: Phase::Ram,
            reason: "no".into(),
        },
    ] {
        encode_frame(&message, &mut to_source, MAX)?;
    }
    put(corpus, "frames", "to_source", &to_source)
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
    let peers = serde_json::json!({ "version": 2, "peers": [peer] });
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
    put(corpus, "log", "changed", &[0xff, 0xff, 90, 0, 1, 120, 0, 0x80])
}

fn rfb(corpus: &Path) -> Result<()> {
    // How it is cut into pieces, then SetPixelFormat, SetEncodings, requests, keys, the pointer,
    // a clipboard, and QEMU's own message for keys (RFC 6143 section 7.5).
    let mut viewer = vec![3];
    viewer.extend([0, 0, 0, 0, 32, 24, 0, 1, 0, 255, 0, 255, 0, 255, 16, 8, 0, 0, 0, 0]);
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
    server.extend([0, 0, 0, 1, 0, 0, 0, 0, 0, 4, 0, 2, 0xff, 0xff, 0xff, 0x21, 2]);
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

/// What the reconciler's own targets begin with.
fn reconciling(corpus: &Path) -> Result<()> {
    let image: Vec<u8> = (0..40_u8)
        .flat_map(|page| vec![page / 2; PAGE_SIZE])
        .collect();
    let (new, base) = (tree(&image)?, ImageTree::zero(40)?);
    let options = OfferOptions {
        salt: Salt([1; 32]),
        candidates: 1,
        force_bits: None,
        seek_from: OfferOptions::SEEK_FROM,
    };
    let offer = Offer::new(&new, &base, &options)?.encode()?;
    // All of it is the offer.
    put(corpus, "offer", "offer", &[&[255], &offer[..]].concat())?;
    let encoded = new.encode();
    let tree = &encoded[..encoded.len() - 32];
    put(corpus, "tree", "tree", tree)?;
    let pages: PageSet = new.differing(&base);
    put(corpus, "page_set", "pages", &pages.encode())
}
