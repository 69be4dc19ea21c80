use std::fs;
use std::path::Path;

use proptest::prelude::{ProptestConfig, prop, proptest};
use reconciler::Page;

use super::*;
use crate::measure::{Options, measure};
use crate::report::{Report, Row, codec_of};

/// A page that does not compress, the same for the same seed.
fn noise(seed: u64) -> Page {
    let mut page = [0; PAGE_SIZE];
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for word in page.as_chunks_mut::<8>().0 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        *word = state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes();
    }
    page
}

/// The page with other words at these places.
fn but(mut page: Page, words: impl IntoIterator<Item = usize>, with: u8) -> Page {
    for word in words {
        page.as_chunks_mut::<8>().0[word] = [with; 8];
    }
    page
}

fn write(dir: &Path, name: &str, ram: &[Page]) {
    let dir = dir.join(name);
    fs::create_dir_all(&dir).unwrap();
    fs::write(dir.join("ram.img"), ram.as_flattened()).unwrap();
    fs::write(dir.join("device.bin"), [1; PAGE_SIZE]).unwrap();
}

/// All ways that have a base, with zstd at level 3.
fn report(dir: &Path, kinds: Option<&[Kind]>) -> Report {
    let options = Options {
        strategies: vec![Strategy::Base, Strategy::Replay, Strategy::Twin],
        codecs: vec![codec_of("zstd:3").unwrap()],
        deltas: Vec::new(),
        rates: Vec::new(),
        runs: 1,
        replayed: "replayed".into(),
        twin: "twin".into(),
        drop_free: false,
    };
    let kinds_of = |_: &[u8]| kinds.map(<[Kind]>::to_vec);
    measure(dir, &options, &kinds_of, &mut |_| ()).unwrap()
}

fn ram(report: &Report, strategy: Strategy) -> &Row {
    let mut rows = report.rows.iter();
    let found = rows.find(|row| row.strategy == strategy && row.image == "ram");
    found.unwrap()
}

fn of(report: &Report, kind: &str, strategy: Strategy) -> KindWay {
    let row = report.kinds.iter().find(|row| row.kind == kind).unwrap();
    let way = row.ways.iter().find(|way| way.strategy == strategy);
    way.unwrap().clone()
}

fn add(mut sum: KindPages, more: KindPages) -> KindPages {
    sum.zero += more.zero;
    sum.same += more.same;
    sum.elsewhere += more.elsewhere;
    sum.literal += more.literal;
    sum.delta += more.delta;
    sum.patched += more.patched;
    sum.lines += more.lines;
    sum
}

/// What the kinds sum up to is what was done.
fn check(report: &Report) {
    let (together, kinds) = report.kinds.split_last().unwrap();
    let changed: u64 = kinds.iter().map(|row| row.changed).sum();
    assert_eq!(changed, together.changed);
    for (index, all) in together.ways.iter().enumerate() {
        let row = ram(report, all.strategy);
        let counts = &row.pages;
        let told = KindPages {
            zero: counts.zero,
            same: counts.same,
            elsewhere: counts.moved.values().sum::<u64>() + counts.repeated,
            literal: counts.literal,
            delta: counts.delta,
            patched: counts.patched,
            lines: counts.lines,
        };
        assert_eq!(all.pages, told, "{}", all.strategy);
        let pages = kinds.iter().map(|row| row.ways[index].pages);
        assert_eq!(pages.fold(KindPages::default(), add), told);
        let bytes = &row.bytes;
        let payload = [
            bytes.literals,
            bytes.deltas,
            bytes.patches,
            bytes.lines,
            bytes.kinds,
        ];
        assert_eq!(all.bytes, payload.iter().sum::<u64>());
    }
}

#[test]
fn every_recipe_counts_for_the_kind_of_its_page() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    let zero = [0; PAGE_SIZE];
    // Word 9 is what two replays disagree about; word 300 is what only one of them gets wrong.
    let base = [1, 2, 3, 4, 5, 6, 7, 8, 9].map(noise);
    let source = vec![
        noise(1),
        noise(12),
        noise(13),
        noise(1),
        zero,
        noise(16),
        noise(17),
        noise(12),
        but(noise(9), [400], 1),
    ];
    let replay = |with: u8, wrong: &[usize]| {
        let mut pages = base.to_vec();
        pages[2] = but(noise(13), [9], with);
        let words = wrong.iter().copied().chain([9]);
        pages[5] = but(noise(16), words, with);
        pages[6] = noise(17);
        pages
    };
    write(at, "base", &base);
    write(at, "source", &source);
    write(at, "replayed", &replay(3, &[300]));
    write(at, "twin", &replay(2, &[]));
    let kinds = [
        Kind::KernelText,
        Kind::Anonymous,
        Kind::Slab,
        Kind::PageTable,
        Kind::Free,
        Kind::Slab,
        Kind::FileCache,
        Kind::SharedMemory,
        Kind::KernelData,
    ];
    let report = report(at, Some(&kinds));
    check(&report);
    assert_eq!(report.kinds.len(), Kind::ALL.len() + 1);
    let row = |kind: &str| {
        let mut rows = report.kinds.iter();
        rows.find(|row| row.kind == kind).unwrap()
    };
    let pages = |kind| (row(kind).pages, row(kind).changed);
    assert_eq!(pages("kernel text"), (1, 0));
    assert_eq!(pages("slab"), (2, 2));
    assert_eq!(pages(TOGETHER), (9, 8));
    assert_eq!(row("kernel text").changed_zstd_bytes, 0);
    let slab = row("slab").changed_zstd_bytes as usize;
    assert!(
        (2 * PAGE_SIZE..2 * PAGE_SIZE + 64).contains(&slab),
        "{slab}"
    );
    // A page that is zero, or that was there before, is next to nothing.
    assert!(row("free").changed_zstd_bytes < 64);
    let repeated = row(TOGETHER).changed_zstd_bytes as usize;
    // Of seven pages one is there twice.
    assert!(
        (6 * PAGE_SIZE..6 * PAGE_SIZE + 64).contains(&repeated),
        "{repeated}"
    );

    let none = KindPages::default();
    let literal = KindPages { literal: 1, ..none };
    let elsewhere = KindPages {
        elsewhere: 1,
        ..none
    };
    for strategy in [Strategy::Base, Strategy::Replay, Strategy::Twin] {
        let pages = |kind| of(&report, kind, strategy).pages;
        assert_eq!(pages("kernel text"), none);
        assert_eq!(pages("anonymous"), literal);
        assert_eq!(pages("shared memory"), elsewhere);
        assert_eq!(pages("page table"), elsewhere);
        assert_eq!(pages("free"), KindPages { zero: 1, ..none });
        assert_eq!(pages("kernel data"), KindPages { delta: 1, ..none });
        assert_eq!(of(&report, "free", strategy).bytes, 0);
        assert!(of(&report, "anonymous", strategy).bytes > PAGE_SIZE as u64);
        assert!((1..300).contains(&of(&report, "kernel data", strategy).bytes));
    }
    let slab = |strategy| of(&report, "slab", strategy);
    let literals = KindPages { literal: 2, ..none };
    assert_eq!(slab(Strategy::Base).pages, literals);
    assert_eq!(slab(Strategy::Replay).pages, literals);
    let mended = KindPages {
        patched: 1,
        lines: 1,
        ..none
    };
    assert_eq!(slab(Strategy::Twin).pages, mended);
    // A mask and a word each, and a line or two of one.
    assert!((128..500).contains(&slab(Strategy::Twin).bytes));
    assert_eq!(of(&report, "file cache", Strategy::Base).pages, literal);
    let same = KindPages { same: 1, ..none };
    assert_eq!(of(&report, "file cache", Strategy::Twin).pages, same);
}

/// Seeds of a page in base, source, replayed and twin, its kind, and in how many words of it
/// replays go wrong.
type Seeds = (u64, u64, u64, u64, usize, usize);

fn images(pages: &[Seeds], of: &dyn Fn(&Seeds) -> Page) -> Vec<Page> {
    pages.iter().map(of).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Whatever changed, and whatever kinds pages have.
    #[test]
    fn kinds_sum_up_to_what_was_done(
        pages in prop::collection::vec(
            (0_u64..8, 0_u64..8, 0_u64..8, 0_u64..8, 0_usize..13, 0_usize..40),
            1..40,
        ),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let page = |seed: u64| if seed == 0 { [0; PAGE_SIZE] } else { noise(seed) };
        write(dir.path(), "base", &images(&pages, &|p| page(p.0)));
        write(dir.path(), "source", &images(&pages, &|p| page(p.1)));
        // Some words of the source's page, or another page.
        let replay = |seed: u64, source: u64, words: usize| match seed {
            0..4 => but(page(source), (0..words).map(|word| word * 7), seed as u8),
            other => page(other),
        };
        write(dir.path(), "replayed", &images(&pages, &|p| replay(p.2, p.1, p.5)));
        write(dir.path(), "twin", &images(&pages, &|p| replay(p.3, p.1, p.5 / 2)));
        let kinds: Vec<Kind> = pages.iter().map(|p| Kind::ALL[p.4]).collect();
        check(&report(dir.path(), Some(&kinds)));
    }
}

#[test]
fn a_guest_without_kinds_has_no_rows() {
    let dir = tempfile::tempdir().unwrap();
    for (name, seed) in [("base", 1), ("source", 2), ("replayed", 3), ("twin", 4)] {
        write(dir.path(), name, &[noise(seed)]);
    }
    assert!(report(dir.path(), None).kinds.is_empty());
    let beyond = report(dir.path(), Some(&[]));
    // A page that has none counts as used for all that is known.
    assert_eq!(of(&beyond, "other", Strategy::Base).pages.literal, 1);
}
