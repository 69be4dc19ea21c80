use proptest::prelude::*;

use super::*;
use crate::codec::Codec;
use crate::encode::{EncodeOptions, EncodeStats, References, encode_pages};
use crate::page::{SlicePages, SlicePagesMut};
use crate::tree::no_progress;

const PAGES: usize = 24;

const HOW: EncodeOptions = EncodeOptions {
    codec: Codec::Zstd(3),
    workers: 0,
};

struct Bytes(Vec<u8>);

impl ReadPages for Bytes {
    fn pages(&self) -> u64 {
        SlicePages(&self.0).pages()
    }
    fn read(&self, index: PageIndex, into: &mut Page) -> io::Result<()> {
        SlicePages(&self.0).read(index, into)
    }
}

fn tree_of(bytes: &[u8]) -> ImageTree {
    ImageTree::build(&SlicePages(bytes), &no_progress).unwrap()
}

fn shadow_over(base: Option<&[u8]>) -> Shadow {
    let tree = base.map_or_else(|| ImageTree::zero(PAGES as u64).unwrap(), tree_of);
    let base = base.map(|base| Box::new(Bytes(base.to_vec())) as Box<dyn ReadPages + Send + Sync>);
    Shadow::over(base, tree, tempfile::tempfile().unwrap()).unwrap()
}

fn capture(image: &[u8], shadow: &Shadow) -> Captured {
    let mut captured = Captured::of(PAGES as u64);
    for (index, page) in (0..).map(PageIndex).zip(image.as_chunks::<PAGE_SIZE>().0) {
        let hash = PageHash::of(page);
        if shadow.with_tree(|tree| tree.leaf(index)) != hash {
            captured.push(index, hash, page).unwrap();
        }
    }
    captured
}

fn encode(captured: &Captured, shadow: &Shadow) -> (Vec<PageChunk>, EncodeStats) {
    let mut chunks = Vec::new();
    let against = References::base(Some(shadow));
    let mut sink = |chunk| {
        chunks.push(chunk);
        Ok(())
    };
    let stats = encode_pages(captured, against, captured.indices(), HOW, &mut sink).unwrap();
    (chunks, stats)
}

/// A round from end to end.
fn round(image: &[u8], shadow: &Shadow, target: &mut [u8], tree: &mut ImageTree) -> EncodeStats {
    let captured = capture(image, shadow);
    let (chunks, stats) = encode(&captured, shadow);
    let set: PageSet = captured.indices().iter().copied().collect();
    let mut incoming = Incoming::new(&set, PAGES as u64).unwrap();
    for chunk in &chunks {
        incoming
            .push(chunk, &mut SlicePagesMut(target), tree)
            .unwrap();
    }
    incoming.finish().unwrap();
    shadow.keep(&captured).unwrap();
    stats
}

fn edits() -> impl Strategy<Value = Vec<(usize, usize, u8)>> {
    prop::collection::vec((0..PAGES * PAGE_SIZE, 1usize..6000, any::<u8>()), 0..12)
}

fn edit(image: &mut [u8], edits: &[(usize, usize, u8)]) {
    for (at, len, byte) in edits {
        let end = (at + len).min(image.len());
        image[*at..end].fill(*byte);
    }
}

proptest! {
    #[test]
    fn after_any_rounds_the_shadow_is_what_the_target_has(
        base in prop::option::of(edits()),
        rounds in prop::collection::vec(edits(), 1..5),
    ) {
        let mut image = vec![0; PAGES * PAGE_SIZE];
        if let Some(base) = &base {
            edit(&mut image, base);
        }
        let mut target = image.clone();
        let shadow = shadow_over(base.as_ref().map(|_| &target[..]));
        let mut tree = shadow.tree();
        for changes in &rounds {
            edit(&mut image, changes);
            round(&image, &shadow, &mut target, &mut tree);
            prop_assert!(target == image);
            prop_assert_eq!(shadow.tree(), tree_of(&image));
            prop_assert_eq!(&tree, &shadow.tree());
            let mut page = ZERO_PAGE;
            for (index, wanted) in (0..).map(PageIndex).zip(image.as_chunks::<PAGE_SIZE>().0) {
                shadow.read(index, &mut page).unwrap();
                prop_assert!(page == *wanted);
            }
        }
    }

    #[test]
    fn damaged_pages_are_refused_or_show_in_the_tree(
        changes in edits(),
        chunk: prop::sample::Index,
        at: prop::sample::Index,
        byte: u8,
    ) {
        let mut image = vec![0; PAGES * PAGE_SIZE];
        edit(&mut image, &changes);
        let shadow = shadow_over(None);
        let captured = capture(&image, &shadow);
        prop_assume!(!captured.is_empty());
        let (mut chunks, _) = encode(&captured, &shadow);
        let damaged = chunk.get_mut(&mut chunks);
        let damaged: &mut PageChunk = damaged;
        let at = at.index(damaged.bytes.len());
        damaged.bytes[at] = byte;
        let set: PageSet = captured.indices().iter().copied().collect();
        let mut incoming = Incoming::new(&set, PAGES as u64).unwrap();
        let (mut target, mut tree) = (vec![0; image.len()], shadow.tree());
        let taken = chunks.iter().try_for_each(|chunk| {
            incoming.push(chunk, &mut SlicePagesMut(&mut target), &mut tree)
        });
        if taken.and_then(|()| incoming.finish()).is_ok() {
            prop_assert_eq!(tree == tree_of(&image), target == image);
        }
    }
}

#[test]
fn a_page_sent_again_takes_what_changed_in_it() {
    let mut image = vec![0; PAGES * PAGE_SIZE];
    blake3::Hasher::new().finalize_xof().fill(&mut image);
    let mut target = vec![0; image.len()];
    let shadow = shadow_over(None);
    let mut tree = shadow.tree();
    let first = round(&image, &shadow, &mut target, &mut tree);
    assert_eq!((first.literal_pages, first.delta_pages), (24, 0));
    assert_eq!(shadow.held(), 24);
    for page in image.as_chunks_mut::<PAGE_SIZE>().0 {
        page[100] ^= 0x55;
    }
    let second = round(&image, &shadow, &mut target, &mut tree);
    assert_eq!((second.literal_pages, second.delta_pages), (0, 24));
    assert!(second.bytes() * 100 < first.bytes(), "{second:?}");
    assert_eq!(round(&image, &shadow, &mut target, &mut tree).bytes(), 0);
    assert!(target == image);
}

#[test]
fn pages_beyond_the_image_are_refused() {
    let beyond = PageSet::from_range(PAGES as u64 - 1..PAGES as u64 + 1);
    assert!(Incoming::new(&beyond, PAGES as u64).is_err());
    let mut captured = Captured::of(2);
    let page = [1; PAGE_SIZE];
    let hash = PageHash::of(&page);
    captured.push(PageIndex(1), hash, &page).unwrap();
    assert!(captured.push(PageIndex(2), hash, &page).is_err());
    assert!(captured.push(PageIndex(0), hash, &page).is_err());
    assert!(captured.read(PageIndex(0), &mut ZERO_PAGE.clone()).is_err());
}

#[test]
fn pages_that_do_not_come_are_missed() {
    let incoming = Incoming::new(&PageSet::from_range(3..5), PAGES as u64).unwrap();
    assert!(incoming.finish().is_err());
}
