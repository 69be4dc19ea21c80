//! Any base, any source, any replayed image: the result is the source, bit for bit, or a clear
//! error; never an image that passes for the source and is not.

#![allow(clippy::unwrap_used)] // Outside #[test] functions, yet a test.

use proptest::prelude::*;
use reconciler::{
    Applier, ApplyOptions, Codec, Effort, EncodeOptions, Error, Holdings, ImageTree, Known,
    Message, Offer, OfferOptions, Options, PAGE_SIZE, PageChunk, PageSet, Place, PlaceKind,
    References, Retry, Salt, SlicePages, SlicePagesMut, Source, Stats, Unpatched, Verification,
    encode_pages, no_progress, reconcile_in_memory, resolve,
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
    twin: Option<Vec<u8>>,
    /// What the source knows of the target, a bit each: that it holds the base, the disk, a
    /// replay like the twin's, and nothing else; the last two may be wrong.
    known: u8,
    spool_memory: usize,
}

/// Bits of shorts that no accident is to be expected with.
const SURE: u32 = 50;

fn cases() -> impl Strategy<Value = Case> {
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
fn change(image: &mut [u8], (page, word): (usize, usize), value: u8) {
    let pages = image.len() / PAGE_SIZE;
    if value > 0 && pages > 0 {
        image[(page % pages) * PAGE_SIZE + word * 8 + 3] = 0xf0 | value;
    }
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
            codec: if case.salt.is_multiple_of(2) {
                Codec::Zstd(3)
            } else {
                Codec::Lzma(Effort::Fast)
            },
            workers: u32::from(case.salt % 3),
        },
        apply: ApplyOptions {
            spool_memory: case.spool_memory,
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
        if case.force_bits == Some(SURE) {
            prop_assert_eq!(stats.pages.refetched, 0);
        }
        // Every page that differs from the base is accounted for, by one recipe.
        let differing = tree(&case.source).differing(&tree(&case.base)).len();
        let pages = &stats.pages;
        let moved: u64 = pages.moved.values().sum();
        let sent = pages.literal + pages.delta + pages.patched + pages.lines;
        let built = pages.zero + pages.same + moved + pages.repeated + sent;
        prop_assert_eq!(built, differing);
        prop_assert_eq!(stats.encoded.patch_pages, pages.patched + pages.patch_failed);
        let resent = &stats.resent;
        let resent = resent.literal_pages + resent.delta_pages + resent.line_pages;
        prop_assert_eq!(resent, pages.patch_failed);
        prop_assert_eq!(stats.resent.line_pages, pages.lines + pages.lines_failed);
        let whole = stats.whole.literal_pages + stats.whole.delta_pages;
        prop_assert_eq!(whole, pages.lines_failed);
        prop_assert_eq!(stats.retry_bytes > 0, pages.patch_failed > 0);
    }

    #[test]
    fn damage_on_the_way_never_passes(
        case in cases(),
        which in 0usize..10,
        at: prop::sample::Index,
        bit in 0u32..8,
        lose: bool,
    ) {
        let mut message = 0;
        let (image, stats) = run(&case, &mut |sent| {
            let (Message::Offer(bytes)
            | Message::Answer(bytes)
            | Message::Retry(bytes)
            | Message::Pages(bytes)) = sent;
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
        twin: None,
        known: 0,
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
        twin: None,
        known: 0,
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

/// A source of so many pages of text, and what two replays of it came to: each with its own
/// values in three words of each page, which `elsewhere` puts in other places at the target.
fn replays(pages: usize, elsewhere: usize) -> Case {
    let texts = (0..pages).flat_map(|i| {
        let mut text = page(7);
        text[8..16].copy_from_slice(&(i as u64).to_le_bytes());
        text
    });
    let mut source: Vec<u8> = texts.collect();
    let (mut twin, mut replayed) = (source.clone(), source.clone());
    for i in 0..pages {
        for word in [5, 6, 400] {
            change(&mut source, (i, word), 1);
            change(&mut twin, (i, word), 2);
            change(&mut replayed, (i, word + elsewhere), 3);
        }
    }
    Case {
        base: vec![0; source.len()],
        source,
        replayed,
        disk: Vec::new(),
        salt: 0,
        force_bits: None,
        deltas: true,
        twin: Some(twin),
        known: 0,
        spool_memory: 0,
    }
}

#[test]
fn the_twin_tells_which_words_are_volatile() {
    let case = replays(600, 0);
    let (image, stats) = run(&case, &mut |_| {});
    let stats = stats.unwrap();
    assert!(image == case.source);
    assert_eq!((stats.pages.patched, stats.pages.patch_failed), (600, 0));
    let without = Case { twin: None, ..case };
    let (_, all) = run(&without, &mut |_| {});
    assert!(stats.bytes() < all.unwrap().bytes());
}

#[test]
fn a_patch_is_laid_over_every_page_of_its_content() {
    let mut case = replays(3, 0);
    let first = case.source[..PAGE_SIZE].to_vec();
    case.source[2 * PAGE_SIZE..].copy_from_slice(&first);
    let (image, stats) = run(&case, &mut |_| {});
    let pages = stats.unwrap().pages;
    assert!(image == case.source);
    assert_eq!((pages.patched, pages.repeated), (2, 1));
}

#[test]
fn patches_that_do_not_fit_are_mended_line_by_line() {
    let case = replays(600, 1);
    let (image, stats) = run(&case, &mut |_| {});
    let stats = stats.unwrap();
    assert!(image == case.source);
    let pages = &stats.pages;
    assert_eq!((pages.patched, pages.patch_failed), (0, 600));
    // Of two wrong lines one in 256 each passes for right; then the page comes whole.
    assert!(pages.lines > 560, "{pages:?}");
    assert_eq!(pages.lines + pages.literal, 600);
    assert_eq!(stats.resent.line_pages, pages.lines + pages.lines_failed);
    assert_eq!(stats.whole.literal_pages, pages.lines_failed);
    assert_eq!(pages.refetched, 0);
}

#[test]
fn a_guess_that_is_mostly_wrong_is_no_help() {
    let mut case = replays(20, 0);
    for word in (0..512).step_by(16) {
        change(&mut case.replayed, (7, word), 4);
    }
    let (image, stats) = run(&case, &mut |_| {});
    let stats = stats.unwrap();
    assert!(image == case.source);
    let pages = &stats.pages;
    assert_eq!((pages.patched, pages.patch_failed), (19, 1));
    assert_eq!((pages.lines, pages.literal), (0, 1));
}

/// What goes over the wire for these pages of an image.
fn encoded(
    image: &[u8],
    twin: Option<&[u8]>,
    unpatched: Option<&Unpatched>,
    pages: &PageSet,
) -> Vec<PageChunk> {
    let twin = twin.map(SlicePages);
    let references = References {
        base: None,
        twin: twin.as_ref().map(|twin| twin as _),
        unpatched,
    };
    let how = EncodeOptions {
        codec: Codec::Zstd(1),
        workers: 0,
    };
    let pages: Vec<_> = pages.iter().collect();
    let mut chunks = Vec::new();
    encode_pages(&SlicePages(image), references, &pages, how, &mut |chunk| {
        chunks.push(chunk);
        Ok(())
    })
    .unwrap();
    chunks
}

/// Three rounds of pages from sources that may lie, each about page 3 of 5.
fn rounds(sources: [&[u8]; 3], case: &Case) -> (Vec<u8>, Result<Verification, Error>) {
    let base = tree(&case.base);
    let current = tree(&case.replayed);
    let options = OfferOptions {
        salt: Salt([1; 32]),
        candidates: 100,
        force_bits: None,
    };
    let offer = Offer::new(&tree(&case.source), &base, &options).unwrap();
    let holdings = Holdings {
        base: &base,
        base_reader: None,
        current: &current,
        places: &[],
    };
    let mut image = case.replayed.clone();
    let mut built = SlicePagesMut(&mut image);
    let resolution = resolve(&offer, &holdings).unwrap();
    let options = ApplyOptions::default();
    let mut applier = Applier::new(&offer, resolution, &holdings, &mut built, options).unwrap();
    assert!(applier.retry().is_err(), "no page has come");
    let push = |applier: &mut Applier<'_>, chunks: Vec<PageChunk>| {
        for chunk in chunks {
            applier.push(&chunk).unwrap();
        }
    };
    let twin = case.twin.as_deref();
    push(
        &mut applier,
        encoded(sources[0], twin, None, &PageSet::from_range(0..5)),
    );
    let mut ended = None;
    for round in 0..sources.len() {
        let three = PageSet::from_range(3..4);
        let unpatched = match applier.retry() {
            Ok(Retry::Complete) => break,
            Ok(Retry::Lines(unpatched)) => {
                assert_eq!((round, unpatched.pages().len()), (0, 1));
                Some(Unpatched::decode(&unpatched.encode(), &offer, 1).unwrap())
            }
            Ok(Retry::Whole(pages)) => {
                assert_eq!((round, &pages), (1, &three));
                None
            }
            Err(error) => {
                ended = Some(error);
                break;
            }
        };
        assert_eq!(applier.failed(), PageSet::default());
        let next = sources[round + 1];
        // A source that goes on patching where it was asked for the whole page.
        let twin = twin.filter(|_| round == 1 && next != case.source);
        push(
            &mut applier,
            encoded(next, twin, unpatched.as_ref(), &three),
        );
    }
    let applied = ended.map_or_else(|| applier.finish(), Err);
    let verified = applied.and_then(|applied| applied.verify(&SlicePages(&image), &no_progress));
    (image, verified)
}

#[test]
fn a_page_that_does_not_fit_comes_by_lines_then_whole_then_not_at_all() {
    let case = replays(5, 0);
    let lies = [9, 10, 11].map(|value| {
        let mut lie = case.source.clone();
        change(&mut lie, (3, 6), value);
        lie
    });
    let truth = &case.source[..];
    // What is left of a patch that did not fit are two right words of three.
    for honest in [[&lies[0], truth, truth], [&lies[0], &lies[1], truth]] {
        let (image, verified) = rounds(honest, &case);
        assert!(
            matches!(verified, Ok(Verification::Verified(_))),
            "{verified:?}"
        );
        assert!(image == case.source);
    }
    let (image, verified) = rounds([&lies[0], &lies[0], truth], &case);
    assert!(
        matches!(verified, Ok(Verification::Mismatch(_))),
        "{verified:?}"
    );
    assert!(image == lies[0]);
    let (_, verified) = rounds([&lies[0], &lies[1], &lies[2]], &case);
    assert!(
        matches!(verified, Err(Error::Unpatched { pages: 1 })),
        "{verified:?}"
    );
}
