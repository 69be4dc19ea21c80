//! Any base, any source, any replayed image: the result is the source, bit for bit, or a clear
//! error; never an image that passes for the source and is not.

#![allow(clippy::unwrap_used)] // Outside #[test] functions, yet a test.

use proptest::prelude::*;
use reconciler::{
    ApplyOptions, EncodeOptions, Error, Holdings, ImageTree, Message, OfferOptions, Options,
    PAGE_SIZE, Place, PlaceKind, Salt, SlicePages, SlicePagesMut, Source, Stats, no_progress,
    reconcile_in_memory,
};

/// A change to an image, as guests and replays make them.
#[derive(Clone, Debug)]
enum Edit {
    /// New content; equal seeds give equal pages, seed 0 the zero page.
    Fill {
        page: usize,
        seed: u8,
    },
    /// A few bytes change.
    Touch {
        page: usize,
        at: usize,
        byte: u8,
    },
    /// A page appears elsewhere as well.
    Copy {
        from: usize,
        to: usize,
        pages: usize,
    },
    /// Two pages change places.
    Swap {
        a: usize,
        b: usize,
    },
    Resize {
        pages: usize,
    },
}

fn edits(max: usize) -> impl Strategy<Value = Vec<Edit>> {
    let edit = prop_oneof![
        4 => (any::<usize>(), 0u8..12).prop_map(|(page, seed)| Edit::Fill { page, seed }),
        4 => (any::<usize>(), any::<usize>(), any::<u8>())
            .prop_map(|(page, at, byte)| Edit::Touch { page, at, byte }),
        2 => (any::<usize>(), any::<usize>(), 1usize..8)
            .prop_map(|(from, to, pages)| Edit::Copy { from, to, pages }),
        2 => (any::<usize>(), any::<usize>()).prop_map(|(a, b)| Edit::Swap { a, b }),
        1 => (0usize..40).prop_map(|pages| Edit::Resize { pages }),
    ];
    prop::collection::vec(edit, 0..max)
}

fn page(seed: u8) -> Vec<u8> {
    let mut out = vec![0; PAGE_SIZE];
    if seed != 0 {
        // Compressible in part, as guests' pages are.
        for (i, byte) in out.iter_mut().enumerate().take(2000) {
            *byte = (i as u8).wrapping_mul(seed) ^ (i >> 6) as u8;
        }
        out[0] = seed;
    }
    out
}

fn edited(image: &[u8], edits: &[Edit]) -> Vec<u8> {
    let mut image = image.to_vec();
    for edit in edits {
        let pages = image.len() / PAGE_SIZE;
        let at = |index: usize| (index % pages) * PAGE_SIZE;
        match *edit {
            Edit::Resize { pages } => image.resize(pages * PAGE_SIZE, 0),
            _ if pages == 0 => {}
            Edit::Fill { page: to, seed } => {
                image[at(to)..at(to) + PAGE_SIZE].copy_from_slice(&page(seed));
            }
            Edit::Touch {
                page,
                at: byte_at,
                byte,
            } => image[at(page) + byte_at % PAGE_SIZE] = byte,
            Edit::Copy {
                from,
                to,
                pages: count,
            } => {
                for i in 0..count {
                    let from = at(from.wrapping_add(i));
                    image.copy_within(from..from + PAGE_SIZE, at(to.wrapping_add(i)));
                }
            }
            Edit::Swap { a, b } => {
                let first = image[at(a)..at(a) + PAGE_SIZE].to_vec();
                image.copy_within(at(b)..at(b) + PAGE_SIZE, at(a));
                image[at(b)..at(b) + PAGE_SIZE].copy_from_slice(&first);
            }
        }
    }
    image
}

fn tree(bytes: &[u8]) -> ImageTree {
    ImageTree::build(&SlicePages(bytes), &no_progress).unwrap()
}

/// Everything one reconciliation starts from.
#[derive(Clone, Debug)]
struct Case {
    base: Vec<u8>,
    source: Vec<u8>,
    replayed: Vec<u8>,
    disk: Vec<u8>,
    salt: u8,
    force_bits: Option<u32>,
    deltas: bool,
    spool_memory: usize,
}

fn cases() -> impl Strategy<Value = Case> {
    let images = (
        prop::collection::vec(0u8..12, 0..40),
        edits(12),
        edits(12),
        edits(6),
        prop::collection::vec(0u8..16, 0..10),
    );
    let how = (
        any::<u8>(),
        prop_oneof![3 => Just(None), 1 => (4u32..10).prop_map(Some)],
        any::<bool>(),
        prop_oneof![Just(0), Just(2 * PAGE_SIZE), Just(64 << 20)],
    );
    (images, how).prop_map(|((base, common, used, strayed, disk), how)| {
        let base: Vec<u8> = base.into_iter().flat_map(page).collect();
        let after = edited(&base, &common);
        let (salt, force_bits, deltas, spool_memory) = how;
        Case {
            source: edited(&after, &used),
            replayed: edited(&after, &strayed),
            disk: disk.into_iter().flat_map(page).collect(),
            base,
            salt,
            force_bits,
            deltas,
            spool_memory,
        }
    })
}

/// The image that came out, and what it took.
fn run(case: &Case, spoil: &mut dyn FnMut(Message<'_>)) -> (Vec<u8>, Result<Stats, Error>) {
    let (base_tree, disk_tree) = (tree(&case.base), tree(&case.disk));
    let (source_tree, replayed_tree) = (tree(&case.source), tree(&case.replayed));
    let (base, disk, source) = (
        SlicePages(&case.base),
        SlicePages(&case.disk),
        SlicePages(&case.source),
    );
    let places = [
        Place {
            kind: PlaceKind::Base,
            tree: &base_tree,
            reader: &base,
        },
        Place {
            kind: PlaceKind::Disk,
            tree: &disk_tree,
            reader: &disk,
        },
    ];
    let holdings = Holdings {
        base: &base_tree,
        base_reader: Some(&base),
        current: &replayed_tree,
        places: &places,
    };
    let options = Options {
        offer: OfferOptions {
            salt: Salt([case.salt; 32]),
            candidates: holdings.candidates(),
            force_bits: case.force_bits,
        },
        encode: EncodeOptions {
            level: 3,
            workers: u32::from(case.salt % 3),
        },
        apply: ApplyOptions {
            spool_memory: case.spool_memory,
        },
    };
    let from = Source {
        image: &source,
        tree: &source_tree,
        base: &base_tree,
        base_reader: case.deltas.then_some(&base as _),
    };
    let mut image = case.replayed.clone();
    image.resize(case.source.len(), 0);
    let done = reconcile_in_memory(
        from,
        &holdings,
        &mut SlicePagesMut(&mut image),
        &options,
        spoil,
    );
    let stats = done.map(|(verified, stats)| {
        assert_eq!(verified.root(), source_tree.root());
        stats
    });
    (image, stats)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn the_result_is_the_source(case in cases()) {
        let (image, stats) = run(&case, &mut |_| {});
        let stats = stats.unwrap();
        prop_assert!(image == case.source);
        if case.force_bits.is_none() {
            prop_assert_eq!(stats.pages.refetched, 0);
        }
        // Every page that differs from the base is accounted for, by one recipe.
        let differing = tree(&case.source).differing(&tree(&case.base)).len();
        let pages = &stats.pages;
        let moved: u64 = pages.moved.values().sum();
        let built = pages.zero + pages.same + moved + pages.repeated + pages.literal + pages.delta;
        prop_assert_eq!(built, differing);
    }

    #[test]
    fn damage_on_the_way_never_passes(
        case in cases(),
        which in 0usize..6,
        at: prop::sample::Index,
        bit in 0u32..8,
        lose: bool,
    ) {
        let mut message = 0;
        let (image, stats) = run(&case, &mut |sent| {
            let (Message::Offer(bytes) | Message::Answer(bytes) | Message::Pages(bytes)) = sent;
            if message == which && !bytes.is_empty() {
                let at = at.index(bytes.len());
                if lose {
                    bytes.truncate(at);
                } else {
                    bytes[at] ^= 1 << bit;
                }
            }
            message += 1;
        });
        match stats {
            Ok(_) => prop_assert!(image == case.source),
            Err(error) => prop_assert!(!error.to_string().is_empty()),
        }
    }
}

/// Twelve pages at the target that are not what the source has.
fn unlike(salt: u8, force_bits: Option<u32>) -> Case {
    let pages = |seeds: std::ops::Range<u8>| seeds.flat_map(page).collect::<Vec<u8>>();
    Case {
        base: vec![0; 8 * PAGE_SIZE],
        source: pages(1..9),
        replayed: vec![0; 8 * PAGE_SIZE],
        disk: pages(100..140),
        salt,
        force_bits,
        deltas: false,
        spool_memory: 0,
    }
}

#[test]
fn a_collision_is_healed_and_counted() {
    // 8 contents, 40 candidates, 8 bits: most salts make a disk page pass for a source page.
    let mut healed = 0;
    for salt in 0..20 {
        let (image, stats) = run(&unlike(salt, Some(8)), &mut |_| {});
        let stats = stats.unwrap();
        assert!(image == unlike(salt, None).source);
        assert_eq!(stats.pages.refetched > 0, stats.repair_bytes > 0);
        healed += stats.pages.refetched;
    }
    assert!(healed > 0, "no salt forced a collision");
    let (_, stats) = run(&unlike(0, None), &mut |_| {});
    assert_eq!(stats.unwrap().pages.literal, 8);
}

#[test]
fn a_base_of_another_generation_is_refused() {
    let case = unlike(1, None);
    let (_, stats) = run(&case, &mut |sent| {
        if let Message::Offer(bytes) = sent {
            // Behind magic, version and page count lies the base's root.
            bytes[6] ^= 1;
        }
    });
    assert!(matches!(stats, Err(Error::WrongBase)), "{stats:?}");
}

#[test]
fn each_recipe_is_used_where_it_is_cheapest() {
    let seeds = |list: &[u8]| {
        list.iter()
            .flat_map(|&seed| page(seed))
            .collect::<Vec<u8>>()
    };
    let mut touched = page(4);
    touched[9] ^= 0xff;
    let mut source = seeds(&[1, 2, 7, 0, 1]);
    source.extend(&touched);
    source.extend(seeds(&[9, 60, 60, 11]));
    let case = Case {
        // same, moved in RAM, changed, cleared, strayed, touched, disk, new, new again, kept
        base: seeds(&[1, 2, 3, 5, 1, 4, 8, 8, 8, 11]),
        source,
        replayed: seeds(&[1, 2, 7, 5, 3, 4, 8, 8, 8, 12]),
        disk: seeds(&[9]),
        salt: 1,
        force_bits: None,
        deltas: true,
        spool_memory: 0,
    };
    let (image, stats) = run(&case, &mut |_| {});
    assert!(image == case.source);
    let pages = stats.unwrap().pages;
    assert_eq!((pages.same, pages.zero, pages.reverted), (1, 1, 2));
    assert_eq!((pages.delta, pages.literal, pages.repeated), (1, 1, 1));
    assert_eq!(
        pages.moved.into_iter().collect::<Vec<_>>(),
        [(PlaceKind::Disk, 1)]
    );
}
