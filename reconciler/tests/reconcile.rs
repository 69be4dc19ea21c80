//! Any base, any source, any replayed image: the result is the source, bit for bit, or a clear
//! error; never an image that passes for the source and is not.

#![allow(clippy::unwrap_used)] // Outside #[test] functions, yet a test.

use proptest::prelude::*;
use reconciler::{
    Applier, ApplyOptions, Codec, EncodeOptions, Error, Holdings, Message, Offer, OfferOptions,
    PAGE_SIZE, PageChunk, PageSet, PlaceKind, References, Retry, Salt, SlicePages, SlicePagesMut,
    Unpatched, Verification, encode_pages, no_progress, resolve,
};

mod common;

use common::*;

/// What goes over the wire.
fn bytes_of(sent: Message<'_>) -> &mut Vec<u8> {
    let (Message::Offer(bytes)
    | Message::Answer(bytes)
    | Message::Seek(bytes)
    | Message::Retry(bytes)
    | Message::Pages(bytes)) = sent;
    bytes
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
    fn both_ends_at_once_make_the_source_too(case in cases(), thin: bool) {
        let rate = if thin { 5_000_000 } else { 10_000_000_000 };
        let (image, stats) = run_over(&case, Some(rate), &mut |_| {});
        let stats = stats.unwrap();
        prop_assert!(image == case.source);
        // What goes over is the same as where both take turns.
        let (_, in_turn) = run(&case, &mut |_| {});
        prop_assert_eq!(stats.pages, in_turn.unwrap().pages);
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
            let bytes = bytes_of(sent);
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

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn what_is_likely_there_and_is_not_comes_however_much_it_is(
        wrong in prop::collection::btree_set(0_usize..300, 0..300),
        salt: u8,
        damage in prop::option::of((0_usize..6, any::<prop::sample::Index>(), 0_u32..8)),
    ) {
        let case = likely(300, wrong.iter().copied(), salt);
        let mut message = 0;
        let (image, stats) = run(&case, &mut |sent| {
            let bytes = bytes_of(sent);
            if let Some((which, at, bit)) = damage
                && message == which
                && !bytes.is_empty()
            {
                let at = at.index(bytes.len());
                bytes[at] ^= 1 << bit;
            }
            message += 1;
        });
        match stats {
            Ok(stats) => {
                prop_assert!(image == case.source);
                let pages = &stats.pages;
                if damage.is_none() && pages.refetched == 0 {
                    prop_assert_eq!(pages.same, 300 - wrong.len() as u64);
                }
            }
            Err(error) => prop_assert!(damage.is_some() && !error.to_string().is_empty()),
        }
    }
}

/// A twin that has all that the source has, and a replay that has not these pages.
fn likely(pages: usize, wrong: impl Iterator<Item = usize>, salt: u8) -> Case {
    let mut case = replays(pages, 0);
    case.salt = salt;
    case.twin = Some(case.source.clone());
    case.replayed = case.source.clone();
    for page in wrong {
        change(&mut case.replayed, (page, 5), 3);
    }
    case.known = 0b0100;
    case
}

#[test]
fn few_that_are_not_where_the_twin_has_them_are_told_without_a_hash_of_each() {
    let case = likely(600, (0..600).step_by(15), 128);
    let mut seeks = 0;
    let (image, stats) = run(&case, &mut |sent| {
        seeks += usize::from(matches!(sent, Message::Seek(_)));
    });
    let stats = stats.unwrap();
    assert!(image == case.source);
    // What they are is known well enough to check a patch, which comes line by line.
    let pages = &stats.pages;
    assert_eq!(
        (pages.same, pages.lines, pages.literal, seeks),
        (560, 40, 0, 0)
    );
    // Hashes of 16 bits would be 1,200.
    assert!(stats.offer_bytes < 600, "{}", stats.offer_bytes);
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
fn what_a_replay_put_elsewhere_is_looked_for_again() {
    let mut case = replays(600, 0);
    // As the source's own replay has it, page by page; the target's has all of it, from the back.
    case.twin = Some(case.source.clone());
    let pages: Vec<&[u8]> = case.source.chunks(PAGE_SIZE).rev().collect();
    case.replayed = pages.concat();
    case.known = 0b0100;
    let mut seeks = 0;
    let (image, stats) = run(&case, &mut |sent| {
        seeks += usize::from(matches!(sent, Message::Seek(_)));
    });
    let stats = stats.unwrap();
    assert!(image == case.source);
    assert_eq!(seeks, 1);
    let moved: u64 = stats.pages.moved.values().sum();
    assert_eq!((moved, stats.pages.literal + stats.pages.delta), (600, 0));
    // A page is not sent that is there; naming it again took some bytes.
    assert!(stats.bytes() < 600 * 12, "{stats:?}");
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
        seek_from: OfferOptions::SEEK_FROM,
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
    let mut applier = Applier::new(&offer, resolution, &holdings, &mut built, &options).unwrap();
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

/// Pages of objects, each with a pointer to itself and numbers that `noise` makes, as a kernel whose
/// memory lies at `mapping` has them.
fn objects(mapping: u64, noise: impl Fn(u64) -> u64) -> Vec<u8> {
    let words = (0..64 * PAGE_SIZE as u64 / 8).map(|word| match word % 16 {
        0..8 => mapping + word * 8,
        8 => noise(word),
        _ => 0,
    });
    words.flat_map(u64::to_le_bytes).collect()
}

#[test]
fn objects_that_point_at_themselves_are_sent_once_in_every_way() {
    const MAPPING: u64 = 0xffff_88f1_0000_0000;
    let number = |word| 77 + word / 5000;
    let source = objects(MAPPING, number);
    let elsewhere = objects(0x7f00_0000_0000_1003, number);
    let case = |source: &[u8], twin: Option<Vec<u8>>| Case {
        base: objects(MAPPING, |word| (word % 1024 == 8).into()),
        source: source.to_vec(),
        // Wrong where the twin tells, and in the second half elsewhere as well.
        replayed: objects(MAPPING, |word| {
            let object = word / 16;
            let told = object.is_multiple_of(6);
            let not_told = object > 1024 && object % 29 == 1;
            number(word) + u64::from(told || not_told)
        }),
        disk: Vec::new(),
        salt: 3,
        force_bits: None,
        deltas: false,
        twin,
        known: 0,
        spool_memory: 0,
    };
    let whole = |source: &[u8], deltas| {
        let case = Case {
            deltas,
            ..case(source, None)
        };
        let (image, stats) = run(&case, &mut |_| {});
        assert!(image == source);
        stats.unwrap().encoded
    };
    let (near, far) = (whole(&source, false), whole(&elsewhere, false));
    assert_eq!(near.literal_pages, 64);
    assert!(near.bytes() * 4 < far.bytes(), "{near:?} {far:?}");
    assert!(whole(&source, true).delta_pages > 0);
    let twin = objects(MAPPING, |word| {
        number(word) + u64::from((word / 16).is_multiple_of(3))
    });
    let (image, stats) = run(&case(&source, Some(twin)), &mut |_| {});
    assert!(image == source);
    let pages = stats.unwrap().pages;
    assert!(pages.patched > 0 && pages.lines > 0, "{pages:?}");
}
