//! Bringing a replayed image into the source's layout before it is compared.
//!
//! Programs that are timed a little otherwise allocate in another order: the same objects lie
//! some hundred bytes further in the heap, in other pages of RAM, and all pointers to them hold
//! other values. Not a page is the same then, though hardly anything in them is new. So the
//! source says which pages of its RAM belong where in which process, and names landmarks: words
//! that stand in one place only, whatever what moves is. The target finds these in its
//! replayed copy of the process. Between two of them it knows how far the content has moved, and
//! so it copies each page together from where it lies in the replay, and moves each pointer as
//! far as what it points at.
//!
//! The source chooses pages and landmarks by doing the same with its twin, see
//! [`crate::References::twin`], which shows what of it is worth while. What comes out is a guess
//! and treated as one: pages that are right are found by their hashes, others serve for patches.
//!
//! Invariant: [`Layout::realign`] depends on the layout and the image alone, so that both sides
//! can tell what it makes of which image. Bounds: a layout places at most a quarter
//! of the image's pages, and has at most two landmarks for each.

use std::collections::{HashMap, HashSet};

use rayon::prelude::*;

use crate::error::Error;
use crate::page::{PAGE_SIZE, Page, PageIndex, ReadPages, SlicePages};
use crate::page_set::PageSet;
use crate::patch::MOST_WORDS;
use crate::realign_landmarks::{Landmark, Shift, View, choose, landmarks};
use crate::tree::ImageTree;
use crate::wire::{Cursor, put_section, put_varint, take_section, unzigzag, zigzag};

/// A process's part of guest RAM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Space {
    /// Tells processes apart, and is the same in copies of a guest.
    pub key: u64,
    /// Virtual page number and page of the image, ascending.
    pub pages: Vec<(u64, u64)>,
}

/// RAM that is to be brought into another layout, or is what it is brought to.
#[derive(Clone, Copy)]
pub struct Processes<'a> {
    /// The image.
    pub ram: &'a [u8],
    /// What is in it.
    pub tree: &'a ImageTree,
    /// The processes in it.
    pub spaces: &'a [Space],
}

/// Pages with what is guessed to be in them.
pub type Realigned = Vec<(PageIndex, Box<Page>)>;

/// How one process of the source lies in its RAM.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Part {
    key: u64,
    /// By address.
    landmarks: Vec<Landmark>,
    /// Virtual page number and page of the image, by the former.
    pages: Vec<(u64, u64)>,
}

/// How the source's processes lie in its RAM.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    parts: Vec<Part>,
}

impl Layout {
    /// Says how `source` lies, as far as that helps a target whose replay went as `twin`'s; and
    /// what becomes of the twin's pages by it.
    pub fn between(
        source: Processes<'_>,
        twin: Processes<'_>,
        base: &ImageTree,
    ) -> (Self, Realigned) {
        let lacking = lacking(source.tree, twin.tree, base);
        let (changed, twin_changed) = (source.tree.differing(base), twin.tree.differing(base));
        let twins: HashMap<u64, &Space> =
            twin.spaces.iter().map(|space| (space.key, space)).collect();
        let mut taken = HashSet::new();
        let (mut layout, mut all) = (Self::default(), Vec::new());
        for space in source.spaces {
            let Some(other) = twins.get(&space.key) else {
                continue;
            };
            let wanted: Vec<(u64, u64)> = space
                .pages
                .iter()
                .copied()
                .filter(|(_, page)| lacking.contains(PageIndex(*page)) && taken.insert(*page))
                .collect();
            let room = (most_pages(source.tree.pages()) as usize).saturating_sub(all.len());
            if wanted.is_empty() || wanted.len() > room {
                continue;
            }
            let from = View::new(source.ram, space, &changed);
            let to = View::new(twin.ram, other, &twin_changed);
            let there = landmarks(&to);
            let mut part = Part {
                key: space.key,
                landmarks: choose(&landmarks(&from), &there, &wanted),
                pages: wanted,
            };
            let shift = Shift::new(&part.landmarks, &there);
            let guessed: Vec<_> = part
                .pages
                .par_iter()
                .map(|(number, page)| {
                    let guess = shift.page(&to, *number);
                    let wanted = page_of(source.ram, *page)?;
                    let there = page_of(twin.ram, *page)?;
                    let wrong = differing(wanted, &*guess);
                    (wrong < MOST_WORDS && wrong < differing(wanted, there))
                        .then_some((PageIndex(*page), guess))
                })
                .collect();
            part.pages = part
                .pages
                .iter()
                .zip(&guessed)
                .filter_map(|(page, guess)| guess.is_some().then_some(*page))
                .collect();
            if part.pages.is_empty() {
                continue;
            }
            // Others were for pages that are not in it any more, or are not moved at all.
            all.extend(guessed.into_iter().flatten());
            layout.parts.push(part);
        }
        (layout, all)
    }

    /// What becomes of a replayed image by it.
    pub fn realign(&self, replayed: Processes<'_>, base: &ImageTree) -> Realigned {
        let changed = replayed.tree.differing(base);
        let spaces: HashMap<u64, &Space> = replayed
            .spaces
            .iter()
            .map(|space| (space.key, space))
            .collect();
        let mut all = Vec::new();
        for part in &self.parts {
            let Some(space) = spaces.get(&part.key) else {
                continue;
            };
            let view = View::new(replayed.ram, space, &changed);
            let shift = Shift::new(&part.landmarks, &landmarks(&view));
            all.par_extend(
                part.pages
                    .par_iter()
                    .map(|(number, page)| (PageIndex(*page), shift.page(&view, *number))),
            );
        }
        all
    }

    /// Whether it says nothing.
    pub fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// How many pages it places.
    pub fn pages(&self) -> usize {
        self.parts.iter().map(|part| part.pages.len()).sum()
    }

    /// How many landmarks it names.
    pub fn landmarks(&self) -> usize {
        self.parts.iter().map(|part| part.landmarks.len()).sum()
    }

    /// As bytes.
    pub fn encode(&self) -> Result<Vec<u8>, Error> {
        let mut numbers = Vec::new();
        // Hashes don't compress; they stand apart from what does.
        let mut hashes = Vec::new();
        put_varint(&mut numbers, self.parts.len() as u64);
        for part in &self.parts {
            hashes.extend_from_slice(&part.key.to_le_bytes());
            put_varint(&mut numbers, part.landmarks.len() as u64);
            let mut last = 0;
            for landmark in &part.landmarks {
                put_varint(&mut numbers, (landmark.at - last) / 8);
                last = landmark.at;
                hashes.extend_from_slice(&landmark.hash.to_le_bytes());
            }
            put_varint(&mut numbers, part.pages.len() as u64);
            let mut last = (0, 0_u64);
            for (number, page) in &part.pages {
                put_varint(&mut numbers, number - last.0);
                put_varint(&mut numbers, zigzag(page.wrapping_sub(last.1)));
                last = (*number, *page);
            }
        }
        let mut out = Vec::new();
        put_section(&mut out, &numbers)?;
        put_section(&mut out, &hashes)?;
        Ok(out)
    }

    /// The longest encoding of a layout of an image of this size.
    pub fn max_encoded_len(pages: u64) -> u64 {
        1024 + Self::max_section(pages) * 2
    }

    /// Each page and each landmark is some numbers of at most ten bytes.
    fn max_section(pages: u64) -> u64 {
        1024 + pages.saturating_mul(64)
    }

    /// Reads one of an image of so many pages.
    pub fn decode(bytes: &[u8], pages: u64) -> Result<Self, Error> {
        let mut cursor = Cursor::new("a layout", bytes);
        let numbers = take_section(&mut cursor, Self::max_section(pages))?;
        let hashes = take_section(&mut cursor, Self::max_section(pages))?;
        cursor.end()?;
        let (mut numbers, mut hashes) = (
            Cursor::new("a layout", &numbers),
            Cursor::new("a layout's hashes", &hashes),
        );
        let too_many =
            || Error::malformed("a layout", "it has more pages or landmarks than its image");
        let (mut all_pages, mut all_landmarks) = (0, 0);
        let most = most_pages(pages);
        let count = numbers.varint()?;
        if count > pages {
            return Err(too_many());
        }
        let mut parts = Vec::new();
        for _ in 0..count {
            let mut part = Part {
                key: u64::from_le_bytes(hashes.array()?),
                ..Part::default()
            };
            let count = numbers.varint()?;
            all_landmarks += count.min(most * 2 + 1);
            if all_landmarks > most * 2 {
                return Err(too_many());
            }
            let mut last = 0_u64;
            for _ in 0..count {
                last = on(last, numbers.varint()?, 8)?;
                part.landmarks.push(Landmark {
                    at: last,
                    hash: u32::from_le_bytes(hashes.array()?),
                });
            }
            let count = numbers.varint()?;
            all_pages += count.min(most + 1);
            if all_pages > most {
                return Err(too_many());
            }
            let mut last = (0_u64, 0_u64);
            for _ in 0..count {
                last.0 = on(last.0, numbers.varint()?, 1)?;
                last.1 = last.1.wrapping_add(unzigzag(numbers.varint()?));
                if last.1 >= pages {
                    return Err(Error::malformed(
                        "a layout",
                        "it names a page beyond its image",
                    ));
                }
                part.pages.push(last);
            }
            parts.push(part);
        }
        numbers.end()?;
        hashes.end()?;
        Ok(Self { parts })
    }
}

/// A layout places so many pages of an image at most; each costs memory while it is realigned.
fn most_pages(pages: u64) -> u64 {
    pages / 4
}

/// So many steps further: what is told in order can't go back.
fn on(last: u64, steps: u64, step: u64) -> Result<u64, Error> {
    steps
        .checked_mul(step)
        .and_then(|further| last.checked_add(further))
        .ok_or(Error::malformed(
            "a layout",
            "it goes beyond the last address",
        ))
}

/// Pages of the source that a target which replayed like the twin can't find.
fn lacking(source: &ImageTree, twin: &ImageTree, base: &ImageTree) -> PageSet {
    let changed = twin.differing(base);
    let known: HashSet<_> = changed.iter().map(|page| twin.leaf(page)).collect();
    source
        .differing(base)
        .iter()
        .filter(|page| {
            let hash = source.leaf(*page);
            !hash.is_zero() && !known.contains(&hash)
        })
        .collect()
}

fn page_of(ram: &[u8], page: u64) -> Option<&[u8]> {
    let start = usize::try_from(page).ok()?.checked_mul(PAGE_SIZE)?;
    ram.get(start..start.checked_add(PAGE_SIZE)?)
}

fn differing(a: &[u8], b: &[u8]) -> usize {
    let words = |bytes| <[u8]>::as_chunks::<8>(bytes).0;
    words(a)
        .iter()
        .zip(words(b))
        .filter(|(a, b)| a != b)
        .count()
}

/// An image with some pages replaced by others.
pub struct Overlaid<'a> {
    under: SlicePages<'a>,
    pages: HashMap<u64, &'a Page>,
}

impl<'a> Overlaid<'a> {
    /// Lays pages over an image.
    pub fn new(under: &'a [u8], pages: &'a [(PageIndex, Box<Page>)]) -> Self {
        Self {
            under: SlicePages(under),
            pages: pages
                .iter()
                .map(|(index, page)| (index.0, &**page))
                .collect(),
        }
    }
}

impl ReadPages for Overlaid<'_> {
    fn pages(&self) -> u64 {
        self.under.pages()
    }

    fn read(&self, index: PageIndex, page: &mut Page) -> std::io::Result<()> {
        match self.pages.get(&index.0) {
            Some(over) => {
                page.copy_from_slice(*over);
                Ok(())
            }
            None => self.under.read(index, page),
        }
    }
}

#[cfg(test)]
#[path = "realign_tests.rs"]
mod tests;
