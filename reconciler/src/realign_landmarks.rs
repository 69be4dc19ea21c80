//! Landmarks of a process's memory, and how far what lies between two of them has moved.
//!
//! There are two kinds. A *pair* is two words that are no pointers and no small numbers, wherever
//! they stand. A heap of little objects that point at one another has hardly any; but in front of
//! each of its pieces the C library keeps its size (glibc, `malloc/malloc.c`), and such a
//! *piece* is told from others by its size and the words that follow, whatever they point at.

use rayon::prelude::*;

use crate::page::{PAGE_SIZE, Page, PageIndex};
use crate::page_set::PageSet;
use crate::realign::Space;

const WORDS: u64 = PAGE_SIZE as u64 / 8;

/// Landmarks of one process, at 16 bytes each: more are thinned out.
const MOST: usize = 4 << 20;
/// Places that are looked at before it is known which stand in one place only.
const PLACES_MOST: usize = 4 * MOST;

/// Numbers up to this are everywhere, and mark no place.
const SMALL: u64 = 0xffff;

/// Values from here to [`POINTER_END`] may be pointers of a program, which move.
const POINTER: u64 = 1 << 32;
/// The end of a program's addresses with four levels of page tables.
const POINTER_END: u64 = 1 << 47;

/// So many words from its size on mark a piece of the heap. On three captures 5 to 12 made no
/// difference.
const PIECE: usize = 5;
/// So many of these have to say something: to be neither zero nor a pointer that moves.
const SAYING: usize = 3;
/// What points no further than this is taken to point at what moves along.
const NEAR: u64 = 1 << 30;

/// What moved by itself has to be this long for its landmarks to be worth their bytes; glibc fills
/// a hole with whatever fits, so that heaps are full of what is shorter.
const LONG: u64 = 256;

/// A landmark every so many bytes, even where nothing seems to have moved.
const SPACING: u64 = 4096;

/// What is further from any landmark than this is taken not to have moved.
const REACH: u64 = 1 << 20;

/// Words that stand together in one place of a process only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Landmark {
    /// The address of the first.
    pub at: u64,
    /// Of all of them.
    pub hash: u32,
}

/// A process's memory.
pub(crate) struct View<'a> {
    ram: &'a [u8],
    space: &'a Space,
    /// Pages of the image that are not the base's: only those are looked for landmarks.
    changed: &'a PageSet,
}

impl<'a> View<'a> {
    pub(crate) fn new(ram: &'a [u8], space: &'a Space, changed: &'a PageSet) -> Self {
        Self {
            ram,
            space,
            changed,
        }
    }

    /// The words of a virtual page.
    fn words(&self, number: u64) -> Option<&'a [[u8; 8]]> {
        let pages = &self.space.pages;
        let found = pages.binary_search_by_key(&number, |page| page.0).ok()?;
        self.words_of(pages[found].1)
    }

    fn words_of(&self, page: u64) -> Option<&'a [[u8; 8]]> {
        let start = usize::try_from(page).ok()?.checked_mul(PAGE_SIZE)?;
        let bytes = self.ram.get(start..start.checked_add(PAGE_SIZE)?)?;
        Some(bytes.as_chunks().0)
    }

    fn has(&self, number: u64) -> bool {
        let pages = &self.space.pages;
        pages.binary_search_by_key(&number, |page| page.0).is_ok()
    }
}

/// A word that can be part of a landmark: it stays as it is when things move.
fn marks(word: u64) -> bool {
    word > SMALL && !(POINTER..POINTER_END).contains(&word)
}

/// The hash of the pair that begins with the first of these words, if it is one.
fn pair(words: &[[u8; 8]]) -> Option<u32> {
    let [first, second] = words.first_chunk::<2>()?.map(u64::from_le_bytes);
    (marks(first) && marks(second)).then(|| hash(first, second))
}

/// The hash of the piece whose size, as far as can be told, is the first of these words, at `at`.
fn piece(at: u64, words: &[[u8; 8]]) -> Option<u32> {
    let words = words.first_chunk::<PIECE>()?.map(u64::from_le_bytes);
    // Pieces are aligned to 16 bytes, and begin behind their size.
    if at % 16 != 8 || !(1..=SMALL).contains(&words[0]) {
        return None;
    }
    let moves = |word: u64| (POINTER..POINTER_END).contains(&word) && word.abs_diff(at) < NEAR;
    let saying = words.iter().filter(|word| **word != 0 && !moves(**word));
    if saying.count() < SAYING {
        return None;
    }
    let mixed = words.iter().fold(0, |mixed: u64, word| {
        let value = if moves(*word) { POINTER } else { *word };
        let mixed = (mixed ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        mixed ^ mixed >> 29
    });
    Some((mixed.wrapping_mul(0xd6e8_feb8_6659_fd93) >> 32) as u32)
}

fn hash(first: u64, second: u64) -> u32 {
    // As good as it has to be: what two places share is no landmark, and a wrong one is found
    // out by its neighbours.
    let mixed = first.wrapping_mul(0x9e37_79b9_7f4a_7c15)
        ^ second.wrapping_mul(0xc2b2_ae3d_27d4_eb4f).rotate_left(31);
    (mixed.wrapping_mul(0xd6e8_feb8_6659_fd93) >> 32) as u32
}

/// All landmarks of a process, by hash.
pub(crate) fn landmarks(view: &View<'_>) -> Vec<Landmark> {
    let changed = |page: &&(u64, u64)| view.changed.contains(PageIndex(page.1));
    let pages = view.space.pages.iter().filter(changed).count();
    // The hash decides which stay, so that both sides keep nearly the same.
    let mut mask = 0;
    while pages.saturating_mul(WORDS as usize) >> u32::count_ones(mask) > PLACES_MOST {
        mask = mask << 1 | 1;
    }
    let mut all: Vec<Landmark> = view
        .space
        .pages
        .par_iter()
        .filter(changed)
        .flat_map_iter(|(number, page)| {
            let words = view.words_of(*page).unwrap_or_default();
            let start = number.wrapping_mul(PAGE_SIZE as u64);
            (0..words.len()).filter_map(move |index| {
                let words = words.get(index..)?;
                let at = start.wrapping_add(index as u64 * 8);
                // Never both: one begins with a large number, the other with a small one.
                let hash = pair(words).or_else(|| piece(at, words))?;
                (hash & mask == 0).then_some(Landmark { at, hash })
            })
        })
        .collect();
    all.par_sort_unstable_by_key(|landmark| landmark.hash);
    // Only what stands in one place.
    let mut unique = Vec::with_capacity(all.len() / 2);
    for group in all.chunk_by(|a, b| a.hash == b.hash) {
        if let [one] = group {
            unique.push(*one);
        }
    }
    while unique.len() > MOST {
        mask = mask << 1 | 1;
        unique.retain(|landmark| landmark.hash & mask == 0);
    }
    unique
}

/// Landmarks of the source to tell: where what has moved begins and ends, and some between.
/// `wanted` are the pages that they are for, by address.
pub(crate) fn choose(
    source: &[Landmark],
    twin: &[Landmark],
    wanted: &[(u64, u64)],
) -> Vec<Landmark> {
    let mut common: Vec<(Landmark, u64)> = source
        .iter()
        .filter_map(|mark| Some((*mark, place(twin, mark.hash)?.wrapping_sub(mark.at))))
        .collect();
    common.sort_unstable_by_key(|(mark, _)| mark.at);
    drop_strays(&mut common, |(_, moved)| *moved);
    let common: Vec<(Landmark, u64)> = common
        .chunk_by(|a, b| a.1 == b.1)
        .filter(|same| {
            let ends = same.first().zip(same.last());
            ends.is_some_and(|((first, _), (last, _))| last.at - first.at >= LONG)
        })
        .flatten()
        .copied()
        .collect();
    let near = |at: u64| {
        let number = at / PAGE_SIZE as u64;
        let from = wanted.partition_point(|(page, _)| page + 1 < number);
        wanted
            .get(from)
            .is_some_and(|(page, _)| *page <= number + 1)
    };
    let mut chosen: Vec<Landmark> = Vec::new();
    for (index, (mark, moved)) in common.iter().enumerate() {
        let moves = |other: Option<&(Landmark, u64)>| other.is_none_or(|other| other.1 != *moved);
        let edge = moves(index.checked_sub(1).and_then(|before| common.get(before)))
            || moves(common.get(index + 1));
        let far = chosen
            .last()
            .is_none_or(|last| mark.at - last.at >= SPACING);
        if (edge || far) && near(mark.at) {
            chosen.push(*mark);
        }
    }
    // Not more than the decoder takes; a heap that is in such a state gains nothing from it.
    chosen.truncate(wanted.len() * 2);
    chosen
}

/// Where a landmark is, among those of a process by hash.
fn place(marks: &[Landmark], hash: u32) -> Option<u64> {
    let at = marks.binary_search_by_key(&hash, |mark| mark.hash).ok()?;
    Some(marks[at].at)
}

/// Leaves out what moved otherwise than both neighbours: most likely two different things.
fn drop_strays<T>(marks: &mut Vec<T>, moved: impl Fn(&T) -> u64) {
    let moves: Vec<u64> = marks.iter().map(moved).collect();
    let mut index = 0;
    marks.retain(|_| {
        let (before, after) = (index.max(1) - 1, (index + 1).min(moves.len() - 1));
        let alone = moves[index] != moves[before] && moves[index] != moves[after];
        let inner = index > 0 && index + 1 < moves.len();
        index += 1;
        !(alone && inner)
    });
}

/// How far things have moved, by address; what lies between two landmarks as the nearer one.
#[derive(Debug)]
struct Moves(Vec<(u64, u64)>);

impl Moves {
    fn at(&self, address: u64) -> u64 {
        let after = self.0.partition_point(|(at, _)| *at <= address);
        let left = after.checked_sub(1).and_then(|at| self.0.get(at));
        let right = self.0.get(after);
        let nearest = match (left, right) {
            (Some(left), Some(right)) if address - left.0 > right.0 - address => right,
            (Some(left), _) => left,
            (None, Some(right)) => right,
            (None, None) => return 0,
        };
        if nearest.0.abs_diff(address) > REACH {
            return 0;
        }
        nearest.1
    }
}

/// What leads from one layout to another.
#[derive(Debug)]
pub(crate) struct Shift {
    /// From an address of the source to the one here.
    here: Moves,
    /// From an address here to the source's.
    back: Moves,
}

impl Shift {
    /// From the source's landmarks, by address, and those of the process here, by hash.
    pub(crate) fn new(told: &[Landmark], found: &[Landmark]) -> Self {
        let mut common: Vec<(u64, u64)> = told
            .iter()
            .filter_map(|mark| Some((mark.at, place(found, mark.hash)?.wrapping_sub(mark.at))))
            .collect();
        drop_strays(&mut common, |(_, moved)| *moved);
        let mut back: Vec<(u64, u64)> = common
            .iter()
            .map(|(at, moved)| (at.wrapping_add(*moved), moved.wrapping_neg()))
            .collect();
        back.sort_unstable();
        Self {
            here: Moves(common),
            back: Moves(back),
        }
    }

    /// What the source has in a virtual page, as far as it can be told from here.
    pub(crate) fn page(&self, view: &View<'_>, number: u64) -> Box<Page> {
        let mut page = Box::new([0; PAGE_SIZE]);
        let start = number.wrapping_mul(PAGE_SIZE as u64);
        let mut last: (u64, Option<&[[u8; 8]]>) = (u64::MAX, None);
        for (index, word) in page.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            let address = start.wrapping_add(index as u64 * 8);
            let from = address.wrapping_add(self.here.at(address));
            let holds = from / PAGE_SIZE as u64;
            if last.0 != holds {
                last = (holds, view.words(holds));
            }
            let Some(words) = last.1 else { continue };
            let value = u64::from_le_bytes(words[(from / 8 % WORDS) as usize]);
            let pointer =
                (POINTER..POINTER_END).contains(&value) && view.has(value / PAGE_SIZE as u64);
            let value = if pointer {
                value.wrapping_add(self.back.at(value))
            } else {
                value
            };
            *word = value.to_le_bytes();
        }
        page
    }
}
