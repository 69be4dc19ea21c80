//! Free pages that wait in a processor's own lists, to be used again by it.
//!
//! They belong to no block of the buddy allocator, and what they hold is as much garbage; a
//! desktop that has just closed a window has megabytes of them. Each zone has such lists for each
//! processor (`struct per_cpu_pages`). Where in a zone they are, and where in that structure the
//! lists begin, is written nowhere that a guest without debugging information has. But nothing
//! else looks like it: some numbers, and behind them a row of list heads, each of which leads
//! through accounts of pages (`page->lru`) that nobody uses (`_refcount` 0), in both directions,
//! back to itself; and one of the first two numbers is how many pages that are altogether.
//!
//! A processor that was stopped while it changed its lists has a number that is not theirs: its
//! pages are left alone, as is what is not understood.

use crate::memory_map::{MemoryMap, State};
use crate::tables::Tables;
use crate::{Linux, Physical};

const PAGE: u64 = 4096;
/// No guest has more processors.
const PROCESSORS_MOST: u32 = 512;
/// Lists begin within so many bytes of the structure's beginning.
const LISTS_WITHIN: u64 = 64;
/// There are lists for this many kinds of pages of each size (`MIGRATE_PCPTYPES`).
const TYPES: usize = 3;
/// Of sizes up to 8 pages (`PAGE_ALLOC_COSTLY_ORDER`), since Linux 5.13; and then for huge pages.
const SIZES: usize = 4;
const HUGE: u32 = 9;
/// Those for huge pages are two at most.
const LISTS_MOST: usize = TYPES * SIZES + 2;

/// Where such lists may be.
pub(super) struct Waiting<'a, 'b> {
    ram: Physical<'a>,
    tables: Tables<'a>,
    map: &'b mut MemoryMap<'a>,
    /// What a processor's own variables lie apart from where they are said to.
    processors: Vec<u64>,
    /// Of `lru` and `_refcount` in a `struct page`.
    lru: u64,
    count: u64,
}

/// A block of pages: its physical address, and how many pages it has, as a power of two.
type Block = (u64, u32);

impl<'a, 'b> Waiting<'a, 'b> {
    /// `None` where this kernel says too little of itself.
    pub(super) fn of(
        linux: &Linux<'a>,
        tables: Tables<'a>,
        map: &'b mut MemoryMap<'a>,
    ) -> Option<Self> {
        let [offsets, processors] = linux.variables(["__per_cpu_offset", "nr_cpu_ids"]);
        let (offsets, processors) = (offsets?, processors?);
        let processors = linux.ram.u32(linux.ram.address(processors))?;
        let processors = (0..processors.min(PROCESSORS_MOST))
            .map(|number| {
                linux
                    .ram
                    .u64(linux.ram.address(offsets + number as usize * 8))
            })
            .collect::<Option<Vec<_>>>()?;
        let number = |key: &str| u64::try_from(linux.info.number(key)?).ok();
        Some(Self {
            ram: linux.ram,
            tables,
            map,
            processors,
            lru: number("OFFSET(page.lru)")?,
            count: number("OFFSET(page._refcount)")?,
        })
    }

    /// The blocks that wait in a zone of which these are the addresses of some words.
    pub(super) fn in_zone(&mut self, words: impl Iterator<Item = u64>) -> Vec<Block> {
        // What a processor has of its own is said as the same address for all.
        let addresses: Vec<u64> = words.filter_map(|word| self.word(word)).collect();
        for address in addresses {
            let of_each: Option<Vec<_>> = (0..self.processors.len())
                .map(|number| self.of_processor(address.wrapping_add(self.processors[number])))
                .collect();
            if let Some(lists) = of_each
                && !lists.is_empty()
            {
                return lists.into_iter().flatten().collect();
            }
        }
        Vec::new()
    }

    /// What waits by this structure: nothing, if its lists are being changed; `None` if it is none.
    fn of_processor(&mut self, at: u64) -> Option<Vec<Block>> {
        for first in (8..LISTS_WITHIN).step_by(8) {
            let heads: Vec<u64> = (0..LISTS_MOST as u64)
                .map_while(|number| at.checked_add(first + number * 16))
                .take_while(|head| self.is_head(*head))
                .collect();
            if heads.len() < TYPES {
                continue;
            }
            let mut blocks = Vec::new();
            for (number, head) in heads.into_iter().enumerate() {
                let order = match number / TYPES {
                    size if size < SIZES => size as u32,
                    _ => HUGE,
                };
                let Some(list) = self.list(head, order) else {
                    return Some(Vec::new());
                };
                blocks.extend(list);
            }
            let pages: u64 = blocks.iter().map(|(_, order)| 1 << order).sum();
            let numbers = self.word(at)?;
            // The first is a lock since Linux 6.0.
            let counted = [numbers as u32, (numbers >> 32) as u32].map(u64::from);
            if !counted.contains(&pages) {
                blocks.clear();
            }
            return Some(blocks);
        }
        None
    }

    /// Whether what leads from here in both directions leads back at once.
    fn is_head(&self, at: u64) -> bool {
        let ends = || {
            let (next, last) = (self.word(at)?, self.word(at.checked_add(8)?)?);
            let back = self.word(next.checked_add(8)?)? == at;
            Some(back && self.word(last)? == at)
        };
        ends().unwrap_or(false)
    }

    /// The blocks of a list, if all of it is as it should be.
    fn list(&mut self, head: u64, order: u32) -> Option<Vec<Block>> {
        let most = self.ram.bytes().len() as u64 / PAGE;
        let mut blocks = Vec::new();
        let (mut before, mut at) = (head, self.word(head)?);
        while at != head {
            if self.word(at.checked_add(8)?)? != before || blocks.len() as u64 == most {
                return None;
            }
            let entry = at.checked_sub(self.lru)?;
            let page = self.map.page_of(entry)?;
            // The pages of a block are as free as the first one.
            for number in 0..1_u64 << order {
                let page = page.checked_add(number * PAGE)?;
                let entry = self.map.entry(page)?;
                let used = self.word(entry.checked_add(self.count & !7)?)?;
                let used = (used >> (self.count % 8 * 8)) as u32;
                if used != 0 || self.map.state(page)? != State::Used {
                    return None;
                }
            }
            // All of it is in RAM, in one piece.
            self.ram.read(page, (PAGE << order) as usize)?;
            blocks.push((page, order));
            (before, at) = (at, self.word(at)?);
        }
        Some(blocks)
    }

    fn word(&self, address: u64) -> Option<u64> {
        // What spans two pages may lie in two places.
        if !address.is_multiple_of(8) {
            return None;
        }
        self.ram.u64(self.tables.translate(address)?)
    }
}

#[cfg(test)]
mod tests {
    use crate::free::pages;
    use crate::testing::{self, FREE, LISTS, MAP, MAP_ENTRY, USED};

    /// Where free pages begin, and how many there are.
    fn free(ram: &[u8]) -> Vec<(usize, usize)> {
        let ranges = pages(ram).unwrap().into_iter();
        ranges
            .map(|range| (range.start, range.len() / 4096))
            .collect()
    }

    const BLOCK: (usize, usize) = (FREE.0, FREE.1 as usize);

    #[test]
    fn pages_that_wait_are_free_by_any_processor_and_of_any_size() {
        let mut ram = testing::kernel();
        USED.wait(&mut ram, LISTS[0], 1, &[0x17000, 0x16000], 2);
        // Of the third size: four pages.
        USED.wait(&mut ram, LISTS[1], 6, &[0x28000], 4);
        for page in [0x29000, 0x2a000, 0x2b000] {
            USED.put(&mut ram, page);
        }
        assert_eq!(free(&ram), [(0x16000, 2), (0x28000, 8)]);
    }

    #[test]
    fn lists_that_are_being_changed_have_no_free_pages_and_others_have() {
        let mut ram = testing::kernel();
        USED.wait(&mut ram, LISTS[0], 0, &[0x16000, 0x17000], 1);
        assert_eq!(free(&ram), [BLOCK], "one is counted, two are there");
        USED.wait(&mut ram, LISTS[1], 0, &[0x28000], 1);
        assert_eq!(free(&ram), [(0x28000, 1), BLOCK]);

        let mut ram = testing::kernel();
        USED.wait(&mut ram, LISTS[0], 0, &[0x16000, 0x17000], 2);
        let back = MAP + 0x17 * MAP_ENTRY + 16;
        ram[back] ^= 0x40;
        assert_eq!(free(&ram), [BLOCK], "it doesn't lead back");
    }

    #[test]
    fn a_page_that_somebody_uses_waits_for_nobody() {
        let mut ram = testing::kernel();
        USED.wait(&mut ram, LISTS[0], 0, &[0x16000, 0x17000], 2);
        ram[MAP + 0x16 * MAP_ENTRY + 52] = 1;
        assert_eq!(free(&ram), [BLOCK]);

        let mut ram = testing::kernel();
        let file = testing::Entry {
            mapping: 0xffff_8880_0000_0700,
            ..USED
        };
        file.wait(&mut ram, LISTS[0], 0, &[0x16000], 1);
        assert_eq!(free(&ram), [BLOCK]);
    }
}
