use proptest::prelude::*;

use super::*;
use crate::tree::no_progress;

/// Words of a page.
const WORDS: usize = PAGE_SIZE / 8;

const BASE: u64 = 0x5555_5555_0000;

/// A guest of one process, whose pages lie in RAM in an order of their own.
struct Guest {
    ram: Vec<u8>,
    spaces: Vec<Space>,
    tree: ImageTree,
}

impl Guest {
    /// `heap` begins at [`BASE`]; page `n` of it is page `order(n)` of RAM.
    fn new(heap: &[u64], order: impl Fn(u64) -> u64) -> Self {
        let mut ram = vec![0; 64 * PAGE_SIZE];
        let mut pages = Vec::new();
        for (number, words) in heap.chunks(WORDS).enumerate() {
            let page = order(number as u64);
            let start = page as usize * PAGE_SIZE;
            for (index, word) in words.iter().enumerate() {
                ram[start + index * 8..start + index * 8 + 8].copy_from_slice(&word.to_le_bytes());
            }
            pages.push((BASE / PAGE_SIZE as u64 + number as u64, page));
        }
        let tree = ImageTree::build(&SlicePages(&ram), &no_progress).unwrap();
        Self {
            ram,
            spaces: vec![Space { key: 7, pages }],
            tree,
        }
    }

    fn processes(&self) -> Processes<'_> {
        Processes {
            ram: &self.ram,
            tree: &self.tree,
            spaces: &self.spaces,
        }
    }
}

/// A heap of little objects, each with content of its own and a pointer to the one before; the
/// first lies `gap` words from the start, and `late` words more come before object 300.
fn heap(gap: usize, late: usize) -> Vec<u64> {
    let mut words = vec![0; gap];
    let mut before = 0;
    for object in 0..900_u64 {
        if object == 300 {
            words.resize(words.len() + late, 0);
        }
        let at = BASE + words.len() as u64 * 8;
        let content = object.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1 << 63;
        words.extend([object, content, content ^ 0x00ff_00ff, before]);
        before = at;
    }
    words.resize(9 * WORDS, 0);
    words
}

/// A heap as glibc lays it out, of pieces that hold nothing but small numbers and pointers to one
/// another; `gap` words come first, and `late` more before piece 300. Both are even.
fn pieces(gap: usize, late: usize) -> Vec<u64> {
    let mut words = vec![0; gap];
    let (mut before, mut seed) = (BASE, 1_u64);
    for piece in 0..700_u64 {
        if piece == 300 {
            words.resize(words.len() + late, 0);
        }
        seed = seed.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        let size = 32 + (seed >> 60) / 4 * 16;
        let at = BASE + (words.len() as u64 + 2) * 8;
        words.extend([0, size | 1, before, seed >> 50, 0, seed >> 40 & 0xff]);
        words.resize(words.len() + size as usize / 8 - 4, 0);
        before = at;
    }
    words.resize(9 * WORDS, 0);
    words
}

fn base() -> ImageTree {
    ImageTree::zero(64).unwrap()
}

#[test]
fn a_heap_that_lies_otherwise_is_brought_in_place_with_its_pointers() {
    is_brought_in_place([heap(0, 6), heap(10, 0), heap(26, 2)]);
}

#[test]
fn a_heap_without_a_pair_of_numbers_is_told_by_the_sizes_of_its_pieces() {
    is_brought_in_place([pieces(0, 6), pieces(10, 0), pieces(26, 2)]);
}

/// Brings the last of three heaps to where the first is, told by what has become of the second.
fn is_brought_in_place([source, twin, replayed]: [Vec<u64>; 3]) {
    let source = Guest::new(&source, |page| page + 3);
    let twin = Guest::new(&twin, |page| 40 - page);
    let replayed = Guest::new(&replayed, |page| (page * 7) % 63);
    let (layout, guessed) = Layout::between(source.processes(), twin.processes(), &base());
    assert_eq!(guessed.len(), layout.pages());
    let layout = Layout::decode(&layout.encode().unwrap(), 64).unwrap();
    let realigned = layout.realign(replayed.processes(), &base());
    let wrong: usize = realigned
        .iter()
        .map(|(index, page)| differing(page_of(&source.ram, index.0).unwrap(), &**page))
        .sum();
    let before: usize = realigned
        .iter()
        .map(|(index, _)| {
            let there = page_of(&replayed.ram, index.0).unwrap();
            differing(page_of(&source.ram, index.0).unwrap(), there)
        })
        .sum();
    assert!(realigned.len() >= 6, "{} pages", realigned.len());
    assert!(wrong * 20 < before, "{wrong} words wrong, {before} before");
}

#[test]
fn what_the_source_tells_of_the_twin_is_what_the_target_would_make_of_it() {
    let source = Guest::new(&heap(0, 6), |page| page + 3);
    let twin = Guest::new(&heap(10, 0), |page| 40 - page);
    let (layout, mut guessed) = Layout::between(source.processes(), twin.processes(), &base());
    let mut again = layout.realign(twin.processes(), &base());
    guessed.sort();
    again.sort();
    assert_eq!(guessed, again);
}

#[test]
fn where_nothing_moved_nothing_is_said() {
    let source = Guest::new(&heap(0, 0), |page| page);
    let (layout, guessed) = Layout::between(source.processes(), source.processes(), &base());
    assert!(layout.is_empty() && guessed.is_empty());
}

#[test]
fn a_layout_of_too_many_pages_is_refused() {
    let part = |pages: u64| Layout {
        parts: vec![Part {
            key: 1,
            landmarks: Vec::new(),
            pages: (0..pages).map(|page| (page, page % 64)).collect(),
        }],
    };
    let decode = |layout: &Layout| Layout::decode(&layout.encode().unwrap(), 64);
    assert_eq!(decode(&part(16)).unwrap(), part(16));
    assert!(decode(&part(17)).is_err());
    let mut beyond = part(2);
    beyond.parts[0].pages[1].1 = 64;
    assert!(decode(&beyond).is_err());
}

proptest! {
    #[test]
    fn any_layout_can_be_told(
        marks in prop::collection::vec((0..1_u64 << 44, any::<u32>()), 0..30),
        pages in prop::collection::btree_map(0..1_u64 << 36, 0..64_u64, 0..16),
        key: u64,
    ) {
        let mut landmarks: Vec<_> =
            marks.into_iter().map(|(at, hash)| Landmark { at: at * 8, hash }).collect();
        landmarks.sort_by_key(|mark| mark.at);
        let layout = Layout {
            parts: vec![Part { key, landmarks, pages: pages.into_iter().collect() }],
        };
        let told = Layout::decode(&layout.encode().unwrap(), 64).unwrap();
        prop_assert_eq!(told, layout);
    }

    /// Whatever a peer says: it is refused, or realigns to something, without harm.
    #[test]
    fn nonsense_does_no_harm(
        bytes in prop::collection::vec(any::<u8>(), 0..200),
        marks in prop::collection::vec((any::<u64>(), any::<u32>()), 0..20),
        pages in prop::collection::vec((any::<u64>(), 0..64_u64), 1..16),
    ) {
        let _ = Layout::decode(&bytes, 64);
        let mut landmarks: Vec<_> =
            marks.into_iter().map(|(at, hash)| Landmark { at: at & !7, hash }).collect();
        landmarks.sort_by_key(|mark| mark.at);
        let layout = Layout { parts: vec![Part { key: 7, landmarks, pages: pages.clone() }] };
        let guest = Guest::new(&heap(3, 0), |page| page);
        prop_assert_eq!(layout.realign(guest.processes(), &base()).len(), pages.len());
    }
}
