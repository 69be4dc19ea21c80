//! What reconciling one image of a captured session takes, with and without a twin:
//!
//! `cargo run -p reconciler --example capture -- BASE SOURCE REPLAYED TWIN [DISK]`
//!
//! All are raw images: the base checkpoint's, the source's after a session, and what two
//! replays of the session made of the base, one at the target and one at the source. DISK
//! stands for what else both sites hold.

#![allow(clippy::unwrap_used)] // A tool for measuring may end where it cannot go on.

use std::fs;
use std::time::Instant;

use reconciler::{
    ApplyOptions, Codec, Effort, EncodeOptions, Holdings, ImageTree, OfferOptions, Options, Place,
    PlaceKind, ReadPages, Salt, SlicePages, SlicePagesMut, Source, no_progress,
    reconcile_in_memory,
};

fn main() {
    let images: Vec<Vec<u8>> = std::env::args()
        .skip(1)
        .map(|path| fs::read(path).unwrap())
        .collect();
    let readers: Vec<_> = images.iter().map(|bytes| SlicePages(bytes)).collect();
    let trees: Vec<_> = readers
        .iter()
        .map(|pages| ImageTree::build(pages, &no_progress).unwrap())
        .collect();
    let place = |kind, at: usize| Place {
        kind,
        tree: &trees[at],
        reader: &readers[at],
    };
    let mut places = vec![place(PlaceKind::Base, 0)];
    if images.len() > 4 {
        places.push(place(PlaceKind::Disk, 4));
    }
    let twins: [(&str, Option<&dyn ReadPages>); 2] =
        [("no twin", None), ("twin", Some(&readers[3]))];
    for (name, twin) in twins {
        for codec in [
            Codec::Zstd(3),
            Codec::Zstd(9),
            Codec::Lzma(Effort::Fast),
            Codec::Lzma(Effort::Normal),
            Codec::Lzma(Effort::Strong),
        ] {
            measure(name, twin, codec, &images, &trees, &places);
        }
    }
}

fn measure(
    name: &str,
    twin: Option<&dyn ReadPages>,
    codec: Codec,
    images: &[Vec<u8>],
    trees: &[ImageTree],
    places: &[Place<'_>],
) {
    let (base, image) = (SlicePages(&images[0]), SlicePages(&images[1]));
    let holdings = Holdings {
        base: &trees[0],
        base_reader: Some(&base),
        current: &trees[2],
        places,
    };
    let source = Source {
        image: &image,
        tree: &trees[1],
        base: &trees[0],
        base_reader: Some(&base),
        twin,
    };
    let options = Options {
        offer: OfferOptions {
            salt: Salt([7; 32]),
            candidates: holdings.candidates(),
            force_bits: None,
        },
        encode: EncodeOptions { codec, workers: 2 },
        apply: ApplyOptions::default(),
    };
    let mut built = images[2].clone();
    let begun = Instant::now();
    let (verified, stats) = reconcile_in_memory(
        source,
        &holdings,
        &mut SlicePagesMut(&mut built),
        &options,
        &mut |_| {},
    )
    .unwrap();
    assert!(built == images[1]);
    println!(
        "{name}, {codec:?}: {} bytes in {:.1} s\n  {:?}\n  first {:?}\n  asked for again in {} bytes\n  again {:?}\n  whole {:?}",
        stats.bytes(),
        begun.elapsed().as_secs_f64(),
        verified.counts(),
        stats.encoded,
        stats.retry_bytes,
        stats.resent,
        stats.whole,
    );
}
