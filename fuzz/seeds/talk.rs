//! What sites say to each other: whole conversations, and single frames.

use std::io::Write;
use std::path::Path;

use fuzz_seeds::VERSION;
use reconciler::{NodesRequest, PAGE_SIZE, blob_parts};
use site::Phase;
use site::hub::seal::{Sealer, SealingKey};
use site::hub::{Collect, Head, Receipt};
use site::identity::Signature;
use site::protocol::{
    CommitRequest, Hello, ImageKind, ImageOutcome, Kept, Plan, Purpose, Stage, ToSource, ToTarget,
    Welcome,
};
use site::report::{ReplaySummary, StandbyCost, Strategy};
use site::transport::framing::encode_frame;
use site::vm::Id;
use traces::{Anchor, Event, GuestTime, Record, Region, encode_records};

use crate::images::{Images, pages_of, tree};
use crate::{MAX, Result, body, put};

pub(crate) fn conversation(corpus: &Path, name: &str, messages: &[ToTarget]) -> Result<()> {
    let mut bytes = Vec::new();
    for message in messages {
        let body = body(message)?;
        bytes.extend(u16::try_from(body.len())?.to_le_bytes());
        bytes.extend(body);
    }
    put(corpus, "conversation", name, &bytes)
}

pub(crate) fn session() -> Vec<Record> {
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
        at(
            100,
            Event::Button {
                code: 272,
                down: true,
            },
        ),
        at(
            180,
            Event::Button {
                code: 272,
                down: false,
            },
        ),
        at(
            900,
            Event::Key {
                code: 30,
                down: true,
            },
        ),
        at(
            980,
            Event::Key {
                code: 30,
                down: false,
            },
        ),
        at(
            1500,
            Event::Wheel {
                vertical: -1,
                horizontal: 0,
            },
        ),
        at(2000, Event::Gap),
        at(9000, Event::Redacted),
    ]
}

pub(crate) fn conversations(corpus: &Path, images: &Images) -> Result<()> {
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
    let called = fuzz_seeds::called(tempfile::tempdir()?.path())?.key();
    let link = images
        .chain()
        .hand_over(images.record.id, called, &images.caller);
    migration.push(ToTarget::Commit(Box::new(CommitRequest {
        manifest: images.manifest(1)?,
        fence: 2,
        link: link.ok_or("the caller has it")?,
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
    follow.extend(blob_parts(&log).map(|part| ToTarget::Follow {
        part,
        at: 2_000_000,
    }));
    follow.extend([ToTarget::CatchUp { at: 9_000_000 }, ToTarget::Leave]);
    conversation(corpus, "follow", &follow)
}

/// With a hub: the caller leaves something there for itself, and asks for what is there.
pub(crate) fn hub(corpus: &Path, images: &Images) -> Result<()> {
    let caller = &images.caller;
    let generation = images.manifest(1)?.identity();
    let head = Head {
        version: VERSION,
        vm: images.record.id,
        from: None,
        to: generation,
        recipient: caller.key(),
        by: caller.public(),
        key: [0; 32],
        signature: Signature::NONE,
    };
    let key = SealingKey::of(caller);
    let (head, mut sealer) = Sealer::new(caller, &key, head, Vec::new())?;
    sealer.write_all(&[7; 1000])?;
    let sealed = sealer.finish()?;
    let name = head.name();
    let deposit = [
        ToTarget::Deposit {
            vm: head.vm,
            to: head.recipient,
        },
        ToTarget::Parcel {
            head: Box::new(head),
            bytes: sealed.len() as u64,
            replaces: true,
        },
        ToTarget::Data(sealed),
        ToTarget::DataEnd,
    ];
    conversation(corpus, "deposit", &deposit)?;
    let vm = images.record.id;
    let collect = [
        ToTarget::Collect(Box::new(Collect {
            key,
            makers: vec![caller.key()],
            receipts: vec![Receipt::sign(caller, vm, vec![generation])],
            useless: vec![name],
        })),
        ToTarget::Fetch(name),
    ];
    conversation(corpus, "collect", &collect)
}

pub(crate) fn frames(corpus: &Path, images: &Images) -> Result<()> {
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
        ToSource::Superseded {
            fence: 1,
            chain: images.chain(),
        },
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
