//! Pointers of a page into its own neighbourhood, written as distances.
//!
//! Kernel objects are full of pointers to themselves: an empty list's head points at itself, a
//! mutex's waiters too, and an inode holds a dozen of each. As addresses they are all different,
//! and so no two objects of a slab page are alike, though they hold the same. Written as the
//! distance from where they stand they are the same numbers in every object. (Executables are
//! packed this way: the branch filters of the .xz file format, 5.3.2, turn relative addresses
//! into absolute ones, for the same end.)
//!
//! The one thing to know for it is where RAM lies in the kernel's address space: an [`Mapping`],
//! the address of the first page were all of RAM laid out from it. Nobody needs to understand the
//! guest for that: where many words in many pages, each taken from its page's place in the image,
//! come out at one number, that number is it. Linux has two, its direct map of all memory and the
//! memory map (`struct page`), both randomised while booting
//! (`Documentation/arch/x86/x86_64/mm.rst`).
//!
//! Measured on the pages of slabs and the memory map that are sent as they are, in kB, with the
//! base alone (8,485 pages) and with a twin (656); *planes* are the first bytes of all words,
//! then the second ones, which was the best of what knows no addresses:
//!
//! | | as they are | planes | relative |
//! |---|---|---|---|
//! | LZMA, base | 2,441 | 2,007 | 1,274 |
//! | zstd 3, base | 3,916 | 2,696 | 1,788 |
//! | LZMA, twin | 242 | 241 | 165 |
//! | zstd 3, twin | 348 | 327 | 221 |
//!
//! Of blocks of 4 KiB, 32 KiB, 1 MiB, 16 MiB and all of RAM, which pointers may point into, 32 KiB
//! was best by 2 to 14 %: the largest slabs are that long. Pointers to what is further away come
//! again elsewhere, and are left as they are.
//!
//! Promised: for any mappings [`Mappings::undo`] undoes [`Mappings::apply`], so that a wrong guess
//! costs bytes and nothing else. Words of no such pointers stay as they are, unless they point at
//! the 32 KiB from the mapping on, which change places with the block.

use std::collections::HashMap;

use crate::encode::read;
use crate::error::{Error, within};
use crate::page::{PAGE_SIZE, Page, PageIndex, ReadPages, ZERO_PAGE};
use crate::wire::Cursor;

/// Pointers within an aligned block of this size are relative.
const BLOCK: u64 = 32 << 10;
/// No image has more mappings.
const MOST: usize = 4;
/// So many pages are looked at, to find them.
const SAMPLE: usize = 256;
/// A mapping is one if of all words looked at one in so many points where it says...
const ONE_WORD_IN: usize = 256;
/// ...and there are some in so many blocks: pages of one block that are full of one pointer say the
/// same.
const LEAST_BLOCKS: usize = 4;

/// The addresses at which an image lies in its guest's address space.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Mappings {
    /// Multiples of [`BLOCK`]; the first `count` of them.
    at: [u64; MOST],
    count: usize,
}

impl Mappings {
    /// Finds those of an image, among the pages to be sent of it.
    pub(crate) fn find(image: &dyn ReadPages, pages: &[PageIndex]) -> Result<Self, Error> {
        let mut found: HashMap<u64, Seen> = HashMap::new();
        let step = pages.len().div_ceil(SAMPLE).max(1);
        let mut page = ZERO_PAGE;
        let mut words = 0;
        for &index in pages.iter().step_by(step) {
            read(image, "the new image", index, &mut page)?;
            let start = index.0.wrapping_mul(PAGE_SIZE as u64);
            let block = start / BLOCK;
            for word in page
                .as_chunks()
                .0
                .iter()
                .map(|word| u64::from_le_bytes(*word))
            {
                // Everything is around zero, and it is no address.
                if word >> 32 == 0 {
                    continue;
                }
                let seen = found
                    .entry(word.wrapping_sub(start) & !(BLOCK - 1))
                    .or_default();
                seen.words += 1;
                if seen.blocks == 0 || seen.last != block {
                    seen.last = block;
                    seen.blocks += 1;
                }
            }
            words += PAGE_SIZE / 8;
        }
        let mut found: Vec<(u64, Seen)> = found
            .into_iter()
            .filter(|(_, seen)| seen.words * ONE_WORD_IN >= words && seen.blocks >= LEAST_BLOCKS)
            .collect();
        found.sort_unstable_by_key(|(at, seen)| (std::cmp::Reverse(seen.words), *at));
        let mut mappings = Self::default();
        for (at, _) in found.into_iter().take(MOST) {
            mappings.at[mappings.count] = at;
            mappings.count += 1;
        }
        Ok(mappings)
    }

    fn all(&self) -> &[u64] {
        &self.at[..self.count]
    }

    pub(crate) const fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Makes pointers of a page relative.
    pub(crate) fn apply(&self, index: PageIndex, page: &mut Page) {
        for mapping in self.all() {
            let near = Near::new(*mapping, index);
            near.each_word(page, |word, own| {
                if near.points_near(word) {
                    near.distance(word, own)
                } else if near.is_distance(word) {
                    near.pointer(word, own)
                } else {
                    word
                }
            });
        }
    }

    /// Makes them pointers again.
    pub(crate) fn undo(&self, index: PageIndex, page: &mut Page) {
        for mapping in self.all().iter().rev() {
            let near = Near::new(*mapping, index);
            // In the block from the mapping on a word is both; that it is a distance goes first
            // here, as it comes last there.
            near.each_word(page, |word, own| {
                if near.is_distance(word) {
                    near.pointer(word, own)
                } else if near.points_near(word) {
                    near.distance(word, own)
                } else {
                    word
                }
            });
        }
    }

    /// For the wire: eight bytes each.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let all = self.all().iter();
        all.flat_map(|mapping| mapping.to_le_bytes()).collect()
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, Error> {
        within(
            "the length of mappings",
            bytes.len() as u64,
            8 * MOST as u64,
        )?;
        let mut cursor = Cursor::new("mappings", bytes);
        let mut mappings = Self::default();
        while cursor.remaining() > 0 {
            let mapping = u64::from_le_bytes(cursor.array()?);
            if mapping % BLOCK != 0 {
                return Err(cursor.malformed("a mapping is no block's beginning"));
            }
            mappings.at[mappings.count] = mapping;
            mappings.count += 1;
        }
        Ok(mappings)
    }
}

/// How often a mapping was seen.
#[derive(Clone, Copy, Default)]
struct Seen {
    words: usize,
    blocks: usize,
    /// The block that it was last seen in.
    last: u64,
}

/// The neighbourhood of a page, for one mapping.
#[derive(Clone, Copy)]
struct Near {
    /// Where the page lies.
    page: u64,
    /// The block that it lies in.
    block: u64,
    /// Distances are written as addresses from here on: their upper bytes are a pointer's, like
    /// those around them.
    mapping: u64,
}

impl Near {
    fn new(mapping: u64, index: PageIndex) -> Self {
        let page = mapping.wrapping_add(index.0.wrapping_mul(PAGE_SIZE as u64));
        Self {
            page,
            block: page & !(BLOCK - 1),
            mapping,
        }
    }

    const fn points_near(&self, word: u64) -> bool {
        word.wrapping_sub(self.block) < BLOCK
    }

    const fn is_distance(&self, word: u64) -> bool {
        word.wrapping_sub(self.mapping) < BLOCK
    }

    const fn distance(&self, word: u64, own: u64) -> u64 {
        self.mapping | (word.wrapping_sub(own) & (BLOCK - 1))
    }

    const fn pointer(&self, word: u64, own: u64) -> u64 {
        self.block | (word.wrapping_add(own) & (BLOCK - 1))
    }

    fn each_word(&self, page: &mut Page, change: impl Fn(u64, u64) -> u64) {
        let mut own = self.page;
        for word in page.as_chunks_mut::<8>().0 {
            *word = change(u64::from_le_bytes(*word), own).to_le_bytes();
            own = own.wrapping_add(8);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::page::SlicePages;

    const DIRECT: u64 = 0xffff_88f1_0000_0000;

    fn mappings(at: &[u64]) -> Mappings {
        Mappings::decode(
            &at.iter()
                .flat_map(|at| at.to_le_bytes())
                .collect::<Vec<_>>(),
        )
        .unwrap()
    }

    /// A page of objects of 256 bytes, each with two empty lists and a number of its own.
    fn objects(index: u64) -> Page {
        let mut page = ZERO_PAGE;
        for (object, bytes) in page.as_chunks_mut::<256>().0.iter_mut().enumerate() {
            for list in [0, 64] {
                let own = DIRECT + index * PAGE_SIZE as u64 + object as u64 * 256 + list;
                for at in [list, list + 8] {
                    bytes[at as usize..][..8].copy_from_slice(&own.to_le_bytes());
                }
            }
            bytes[128] = object as u8;
        }
        page
    }

    fn image(pages: u64) -> Vec<u8> {
        (0..pages).flat_map(objects).collect()
    }

    #[test]
    fn objects_become_alike() {
        let mappings = mappings(&[DIRECT]);
        for index in [0, 7, 8, 1 << 20] {
            let mut page = objects(index);
            mappings.apply(PageIndex(index), &mut page);
            let mut all = page.as_chunks::<256>().0.iter();
            let first = all.next().unwrap();
            assert!(all.all(|other| other[..128] == first[..128]));
            mappings.undo(PageIndex(index), &mut page);
            assert!(page == objects(index));
        }
    }

    #[test]
    fn mappings_are_found_where_many_pages_have_such_pointers() {
        let pages: Vec<_> = (0..64).map(PageIndex).collect();
        let find = |image: &[u8]| Mappings::find(&SlicePages(image), &pages).unwrap();
        assert_eq!(find(&image(64)), mappings(&[DIRECT]));
        // Pages full of one pointer, and text, are none.
        let mut other = vec![b'x'; 64 * PAGE_SIZE];
        for word in other[..8 * PAGE_SIZE].as_chunks_mut::<8>().0 {
            *word = DIRECT.to_le_bytes();
        }
        assert!(find(&other).is_empty());
        assert!(find(&vec![0; 64 * PAGE_SIZE]).is_empty());
    }

    #[test]
    fn too_many_and_unaligned_mappings_are_refused() {
        assert!(Mappings::decode(&[0; 8 * MOST]).is_ok());
        for bytes in [&[0; 8 * MOST + 8][..], &[0; 7], &[1, 0, 0, 0, 0, 0, 0, 0]] {
            assert!(Mappings::decode(bytes).is_err(), "{bytes:x?}");
        }
    }

    proptest! {
        #[test]
        fn any_page_comes_back(
            at in prop::collection::vec(0..1_u64 << 49, 0..=MOST),
            index in prop_oneof![0..20_u64, any::<u64>()],
            words in prop::collection::vec((0..512_usize, 0..MOST, -40_000..40_000_i64, any::<bool>()), 0..200),
            noise: u64,
        ) {
            let at: Vec<u64> = at.iter().map(|at| at.wrapping_mul(BLOCK)).collect();
            let mappings = mappings(&at);
            let mut page = ZERO_PAGE;
            for (place, mapping, distance, near) in words {
                // Close to the page, or close to the mapping.
                let about = at.get(mapping).copied().unwrap_or(noise);
                let about = if near {
                    about.wrapping_add(index.wrapping_mul(PAGE_SIZE as u64))
                } else {
                    about
                };
                let word = about.wrapping_add_signed(distance);
                page[place * 8..][..8].copy_from_slice(&word.to_le_bytes());
            }
            let mut changed = page;
            mappings.apply(PageIndex(index), &mut changed);
            mappings.undo(PageIndex(index), &mut changed);
            prop_assert!(changed == page);
            prop_assert_eq!(Mappings::decode(&mappings.encode()).unwrap(), mappings);
        }
    }
}
