//! What a reconciliation starts from, and how it is run in one process.

use proptest::prelude::*;
use reconciler::{
    ApplyOptions, Codec, Effort, EncodeOptions, Error, Governor, Holdings, ImageTree, Known,
    Message, OfferOptions, Options, Overlapped, PAGE_SIZE, Place, PlaceKind, Salt, SlicePages,
    SlicePagesMut, Source, Stats, no_progress, reconcile_in_memory, reconcile_overlapped,
};

/// A change to an image, as guests and replays make them.
#[derive(Clone, Debug)]
pub(crate) enum Edit {
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

pub(crate) fn edits(max: usize) -> impl Strategy<Value = Vec<Edit>> {
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

pub(crate) fn page(seed: u8) -> Vec<u8> {
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

pub(crate) fn edited(image: &[u8], edits: &[Edit]) -> Vec<u8> {
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

pub(crate) fn tree(bytes: &[u8]) -> ImageTree {
    ImageTree::build(&SlicePages(bytes), &no_progress).unwrap()
}

/// Everything one reconciliation starts from.
#[derive(Clone, Debug)]
pub(crate) struct Case {
    pub(crate) base: Vec<u8>,
    pub(crate) source: Vec<u8>,
    pub(crate) replayed: Vec<u8>,
    pub(crate) disk: Vec<u8>,
    pub(crate) salt: u8,
    pub(crate) force_bits: Option<u32>,
    pub(crate) deltas: bool,
    pub(crate) twin: Option<Vec<u8>>,
    /// What the source knows of the target, a bit each: that it holds the base, the disk, a
    /// replay like the twin's, and nothing else; the last two may be wrong.
    pub(crate) known: u8,
    pub(crate) spool_memory: usize,
}

/// Bits of shorts that no accident is to be expected with.
pub(crate) const SURE: u32 = 50;

pub(crate) fn cases() -> impl Strategy<Value = Case> {
    let images = (
        prop::collection::vec(0u8..12, 0..40),
        edits(12),
        edits(12),
        edits(6),
        prop::collection::vec(0u8..16, 0..10),
        prop::option::of((0usize..3, edits(4))),
        prop::collection::vec((any::<usize>(), 0usize..512, 1u8..8), 0..20),
    );
    let how = (
        any::<u8>(),
        prop_oneof![2 => Just(None), 2 => Just(Some(SURE)), 1 => (4u32..10).prop_map(Some)],
        any::<bool>(),
        0u8..16,
        prop_oneof![Just(0), Just(2 * PAGE_SIZE), Just(64 << 20)],
    );
    (images, how).prop_map(|(images, how)| {
        let (base, common, used, strayed, disk, twin, volatile) = images;
        let base: Vec<u8> = base.into_iter().flat_map(page).collect();
        let after = edited(&base, &common);
        let (salt, force_bits, deltas, known, spool_memory) = how;
        let disk: Vec<u8> = disk.into_iter().flat_map(page).collect();
        let mut source = edited(&after, &used);
        let mut replayed = edited(&after, &strayed);
        let mut twin = twin.map(|(near, edits)| {
            let from = [&source, &replayed, &disk][near];
            let mut twin = edited(from, &edits);
            twin.resize(source.len(), 0);
            twin
        });
        for (page, word, images) in volatile {
            change(&mut source, (page, word), images & 1);
            change(&mut replayed, (page, word), images & 2);
            change(
                twin.as_mut().unwrap_or(&mut Vec::new()),
                (page, word),
                images & 4,
            );
        }
        Case {
            base,
            source,
            replayed,
            disk,
            salt,
            force_bits,
            deltas,
            twin,
            known,
            spool_memory,
        }
    })
}

/// Puts a value of its own into a word, as times and addresses are; 0 changes nothing.
pub(crate) fn change(image: &mut [u8], (page, word): (usize, usize), value: u8) {
    let pages = image.len() / PAGE_SIZE;
    if value > 0 && pages > 0 {
        image[(page % pages) * PAGE_SIZE + word * 8 + 3] = 0xf0 | value;
    }
}

/// The image that came out, and what it took.
pub(crate) fn run(
    case: &Case,
    spoil: &mut dyn FnMut(Message<'_>),
) -> (Vec<u8>, Result<Stats, Error>) {
    run_over(case, None, spoil)
}

/// The same, if there is a rate with both ends at work at once over a line that carries so many
/// bits a second; then nothing is spoiled.
pub(crate) fn run_over(
    case: &Case,
    bits_per_second: Option<u64>,
    spoil: &mut dyn FnMut(Message<'_>),
) -> (Vec<u8>, Result<Stats, Error>) {
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
            seek_from: match case.salt {
                128.. => OfferOptions::SEEK_FROM,
                few => u64::from(few % 3),
            },
        },
        encode: EncodeOptions {
            codec: if case.salt.is_multiple_of(2) {
                Codec::Zstd(3)
            } else {
                Codec::Lzma(Effort::Fast)
            },
            workers: u32::from(case.salt % 3),
        },
        apply: ApplyOptions {
            spool_memory: case.spool_memory,
            ..ApplyOptions::default()
        },
    };
    let twin = case.twin.as_deref().map(SlicePages);
    let known = |bit: u8| case.known >> bit & 1 == 1;
    let shared = [(known(0), &base_tree), (known(1), &disk_tree)];
    let shared: Vec<_> = shared
        .iter()
        .filter_map(|(is, tree)| is.then_some(*tree))
        .collect();
    let twin_tree = case.twin.as_deref().filter(|_| known(2)).map(tree);
    let twins: Vec<_> = twin_tree.iter().collect();
    let from = Source {
        image: &source,
        tree: &source_tree,
        base: &base_tree,
        base_reader: case.deltas.then_some(&base as _),
        twin: twin.as_ref().map(|twin| twin as _),
        known: Known {
            shared: &shared,
            twin: &twins,
            nothing_else: known(3),
        },
    };
    let mut image = case.replayed.clone();
    image.resize(case.source.len(), 0);
    let built = &mut SlicePagesMut(&mut image);
    let done = match bits_per_second {
        None => reconcile_in_memory(from, &holdings, built, &options, spoil),
        Some(bits_per_second) => {
            let governor = Governor::for_line(bits_per_second, options.encode.workers);
            let how = Overlapped {
                governor: &governor,
                bits_per_second,
            };
            reconcile_overlapped(from, &holdings, built, &options, &how)
        }
    };
    let stats = done.map(|(verified, stats)| {
        assert_eq!(verified.root(), source_tree.root());
        stats
    });
    (image, stats)
}
