//! Page streams from a source, over three rounds: whatever comes, no more pages are written than
//! were asked for, and only the source's image passes. Also a target's list of patches that do
//! not fit.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use reconciler::{
    Applier, ApplyOptions, Holdings, ImageTree, Offer, OfferOptions, PAGE_SIZE, PageChunk, Retry,
    Salt, SlicePages, SlicePagesMut, StreamId, Unpatched, Verification, no_progress, resolve,
};

const PAGES: usize = 8;

struct Scene {
    source: Vec<u8>,
    base: ImageTree,
    offer: Offer,
}

static SCENE: LazyLock<Scene> = LazyLock::new(|| {
    let source: Vec<u8> = (1..=PAGES as u8)
        .flat_map(|seed| [seed; PAGE_SIZE])
        .collect();
    let tree = ImageTree::build(&SlicePages(&source), &no_progress).expect("in memory");
    let base = ImageTree::zero(PAGES as u64).expect("a few pages");
    let options = OfferOptions {
        salt: Salt([1; 32]),
        candidates: 1,
        force_bits: None,
        seek_from: OfferOptions::SEEK_FROM,
    };
    let offer = Offer::new(&tree, &base, &options).expect("a few pages");
    Scene {
        source,
        base,
        offer,
    }
});

const STREAMS: [StreamId; 6] = [
    StreamId::Kinds,
    StreamId::Literal,
    StreamId::Delta,
    StreamId::Masks,
    StreamId::Words,
    StreamId::Mappings,
];

fuzz_target!(|bytes: &[u8]| {
    let scene = &*SCENE;
    if let Ok(unpatched) = Unpatched::decode(bytes, &scene.offer, 3) {
        assert!(unpatched.pages().len() <= 3);
        assert!(Unpatched::decode(&unpatched.encode(), &scene.offer, 3).is_ok());
    }
    let holdings = Holdings {
        base: &scene.base,
        base_reader: None,
        current: &scene.base,
        places: &[],
    };
    let mut image = vec![0; PAGES * PAGE_SIZE];
    let mut built = SlicePagesMut(&mut image);
    let resolution = resolve(&scene.offer, &holdings).expect("of the same base");
    let options = ApplyOptions::default();
    let mut applier = Applier::new(&scene.offer, resolution, &holdings, &mut built, &options)
        .expect("an image of the right size");
    // Chunks: which stream (6 ends a round), a length, so many bytes.
    let mut rest = bytes;
    let mut rounds = 0;
    while let Some((&[stream, len], after)) = rest.split_first_chunk() {
        let Some(&stream) = STREAMS.get(usize::from(stream)) else {
            rest = &rest[1..];
            rounds += 1;
            match applier.retry() {
                Ok(Retry::Lines(unpatched)) => assert!(unpatched.pages().len() <= PAGES),
                Ok(Retry::Whole(pages)) => assert!(pages.len() <= PAGES as u64),
                Ok(Retry::Complete) => break,
                Err(_) => return,
            }
            assert!(rounds < 3, "asked for more often than is promised");
            continue;
        };
        let (taken, after) = after.split_at(usize::from(len).min(after.len()));
        rest = after;
        let chunk = PageChunk {
            stream,
            bytes: taken.to_vec(),
        };
        if applier.push(&chunk).is_err() {
            return;
        }
    }
    let Ok(applied) = applier.finish() else {
        return;
    };
    let verified = applied.verify(&SlicePages(&image), &no_progress);
    if let Ok(Verification::Verified(_)) = verified {
        assert!(image == scene.source);
    }
});
