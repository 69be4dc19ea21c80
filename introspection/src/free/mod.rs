//! Which pages of a Linux guest are free, so surely that their content may be given up.
//!
//! [`kinds`](crate::kinds) names free pages too, but may be wrong, for nothing rests on it. Here a
//! page that is called free and is not would be a guest that breaks. So the kernel has to say it
//! twice: in its account of each page (`PageBuddy`, `struct page`), and in the number of blocks of
//! each size that its zones keep (`free_area[].nr_free`, the number that
//! `/proc/buddyinfo` shows). Both agree in a guest that stands still, unless a processor was
//! stopped within the allocator; then, or where anything is not understood, no page is free.
//!
//! Pages that wait in a processor's own lists are free as well, and the kernel counts those too:
//! [`waiting`].
//!
//! The kernel may rely on what a free page holds in two ways. With `init_on_free` it must be
//! zero, and with `page_poison` a pattern. So whoever drops pages makes them zero, and the pages
//! of a guest that poisons them are left alone.

mod waiting;

use std::ops::Range;

use crate::memory_map::{MemoryMap, State};
use crate::tables::Tables;
use crate::{Linux, Physical};
use waiting::Waiting;

const PAGE: u64 = 4096;
/// No kernel for x86-64 has more nodes (`MAX_NUMNODES`), or more zones in one (`MAX_NR_ZONES`).
const NODES_MOST: u64 = 1024;
const ZONES_MOST: u32 = 8;
/// Nor more sizes of blocks (`MAX_ORDER`).
const ORDERS_MOST: usize = 32;

/// Why no page of a guest is known to be free.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unsure {
    /// It is no Linux, or says too little of itself.
    #[error("the guest is no Linux that says which pages are free")]
    Unknown,
    /// What a free page holds is checked when it is used again.
    #[error("the guest's kernel checks what its free pages hold (page_poison)")]
    Poisoned,
    /// Its two accounts differ: a processor was at work on them when it was stopped, or they were
    /// not understood.
    #[error("the guest's kernel was giving out pages, or taking them back, when it was stopped")]
    Busy,
}

/// Where a guest's free pages are in its RAM: ranges of bytes, whole pages, in order and apart.
///
/// The guest must stand still.
///
/// # Errors
/// None are known, and why.
pub fn pages(ram: &[u8]) -> Result<Vec<Range<usize>>, Unsure> {
    let linux = Linux::find(Physical::new(ram)).ok_or(Unsure::Unknown)?;
    if poisons(&linux) {
        return Err(Unsure::Poisoned);
    }
    let tables = Tables::of(&linux).ok_or(Unsure::Unknown)?;
    let mut map = MemoryMap::of(&linux, tables).ok_or(Unsure::Unknown)?;
    let layout = Layout::of(&linux).ok_or(Unsure::Unknown)?;
    let zones = zones(&linux, tables).ok_or(Unsure::Unknown)?;
    let counted = counted(&linux, tables, &zones, &layout).ok_or(Unsure::Unknown)?;
    if counted.iter().all(|blocks| *blocks == 0) {
        return Err(Unsure::Unknown);
    }
    let (mut ranges, blocks) = accounted(linux.ram, &mut map).ok_or(Unsure::Busy)?;
    if blocks != counted {
        return Err(Unsure::Busy);
    }
    ranges.extend(waiting(&linux, tables, &mut map, &zones, &layout));
    Ok(merged(ranges))
}

/// The free pages that wait in processors' lists, as far as they are known.
pub(crate) fn waiting_pages<'a>(
    linux: &Linux<'a>,
    tables: Tables<'a>,
    map: &mut MemoryMap<'a>,
) -> Vec<Range<usize>> {
    let known = Layout::of(linux).zip(zones(linux, tables));
    known.map_or_else(Vec::new, |(layout, zones)| {
        waiting(linux, tables, map, &zones, &layout)
    })
}

fn waiting<'a>(
    linux: &Linux<'a>,
    tables: Tables<'a>,
    map: &mut MemoryMap<'a>,
    zones: &[u64],
    layout: &Layout,
) -> Vec<Range<usize>> {
    let Some(mut waiting) = Waiting::of(linux, tables, map) else {
        return Vec::new();
    };
    let mut ranges = Vec::new();
    for zone in zones {
        let words = (0..layout.areas).step_by(8);
        let blocks = waiting.in_zone(words.filter_map(|word| zone.checked_add(word)));
        ranges.extend(blocks.into_iter().filter_map(|(physical, order)| {
            let start = linux.ram.offset(physical)?;
            Some(start..start + ((PAGE as usize) << order))
        }));
    }
    ranges
}

/// In order, and one range where one ends and another begins.
fn merged(mut ranges: Vec<Range<usize>>) -> Vec<Range<usize>> {
    ranges.sort_unstable_by_key(|range| range.start);
    let mut merged: Vec<Range<usize>> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match merged.last_mut() {
            Some(last) if last.end >= range.start => last.end = last.end.max(range.end),
            _ => merged.push(range),
        }
    }
    merged
}

/// Whether pages are filled with a pattern when they are freed (`mm/page_poison.c`).
fn poisons(linux: &Linux<'_>) -> bool {
    // The first number of a static key tells whether it is on.
    let keys = linux.variables(["_page_poisoning_enabled", "_page_poisoning_enabled_early"]);
    let [key, early] = keys.map(|at| Some(linux.ram.address(at?)));
    let on = |number: Option<u32>| number.is_some_and(|number| number != 0);
    let early = early.and_then(|at| linux.ram.read(at, 1));
    on(key.and_then(|at| linux.ram.u32(at))) || early.is_some_and(|early| early != [0])
}

/// Where in a zone what is, in bytes.
struct Layout {
    /// The numbers of free blocks, `step` apart, so many of them.
    counters: u64,
    step: u64,
    orders: usize,
    /// The areas that they are in; what a zone has for each processor stands before.
    areas: u64,
}

impl Layout {
    fn of(linux: &Linux<'_>) -> Option<Self> {
        let number = |key: &str| u64::try_from(linux.info.number(key)?).ok();
        let step = number("SIZE(free_area)")?;
        let areas = number("OFFSET(zone.free_area)")?;
        let orders = usize::try_from(number("LENGTH(zone.free_area)")?).ok()?;
        // Lists of pages, and behind them how many there are (`struct free_area`).
        let lists = number("LENGTH(free_area.free_list)")?;
        let lists = lists.checked_mul(number("SIZE(list_head)")?)?;
        let counter = number("OFFSET(free_area.free_list)")?.checked_add(lists)?;
        let sane = orders <= ORDERS_MOST
            && counter.checked_add(8)? <= step
            && step <= PAGE
            && areas <= PAGE;
        sane.then_some(Self {
            counters: areas + counter,
            step,
            orders,
            areas,
        })
    }
}

/// The addresses of all zones.
fn zones(linux: &Linux<'_>, tables: Tables<'_>) -> Option<Vec<u64>> {
    let number = |key: &str| u64::try_from(linux.info.number(key)?).ok();
    let size = number("SIZE(zone)")?;
    let first = number("OFFSET(pglist_data.node_zones)")?;
    let count = number("OFFSET(pglist_data.nr_zones)")?;
    let mut zones = Vec::new();
    for node in nodes(linux)? {
        let count = tables.translate(node.checked_add(count)?)?;
        for index in 0..linux.ram.u32(count)?.min(ZONES_MOST) {
            let offset = size.checked_mul(u64::from(index))?.checked_add(first)?;
            zones.push(node.checked_add(offset)?);
        }
    }
    Some(zones)
}

/// How many free blocks of each size all zones have, of `1 << index` pages.
fn counted(
    linux: &Linux<'_>,
    tables: Tables<'_>,
    zones: &[u64],
    layout: &Layout,
) -> Option<[u64; ORDERS_MOST]> {
    let mut blocks = [0_u64; ORDERS_MOST];
    for zone in zones {
        for (order, blocks) in blocks.iter_mut().enumerate().take(layout.orders) {
            let counter = layout.counters + layout.step * order as u64;
            let counter = tables.translate(zone.checked_add(counter)?)?;
            *blocks = blocks.checked_add(linux.ram.u64(counter)?)?;
        }
    }
    Some(blocks)
}

/// The addresses of what the kernel keeps of each node's memory (`pg_data_t`).
fn nodes(linux: &Linux<'_>) -> Option<Vec<u64>> {
    if let Some(only) = linux.info.listed("contig_page_data") {
        return Some(vec![only]);
    }
    let list = linux.info.symbol("node_data")?;
    let length = linux.info.number("LENGTH(node_data)")?;
    let length = u64::try_from(length).ok()?.min(NODES_MOST);
    let mut nodes = Vec::new();
    for index in 0..length {
        let node = linux.ram.u64(list.checked_add(index * 8)?)?;
        if node != 0 {
            nodes.push(node);
        }
    }
    Some(nodes)
}

/// The free pages by the account of each page, and how many blocks of each size they are.
fn accounted(
    ram: Physical<'_>,
    map: &mut MemoryMap<'_>,
) -> Option<(Vec<Range<usize>>, [u64; ORDERS_MOST])> {
    let mut ranges: Vec<Range<usize>> = Vec::new();
    let mut blocks = [0_u64; ORDERS_MOST];
    let mut at = 0;
    while at < ram.bytes().len() {
        let physical = ram.address(at);
        let Some(State::Free(pages)) = map.state(physical) else {
            at += PAGE as usize;
            continue;
        };
        let length = usize::try_from(pages.checked_mul(PAGE)?).ok()?;
        // A block that RAM ends or is moved within is none.
        ram.read(physical, length)?;
        *blocks.get_mut(pages.trailing_zeros() as usize)? += 1;
        ranges.push(at..at + length);
        at += length;
    }
    Some((ranges, blocks))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{self, Entry, USED};

    const FREE: Range<usize> = testing::FREE.0..testing::FREE.0 + testing::FREE.1 as usize * 4096;

    #[test]
    fn pages_are_free_that_the_kernel_says_are_twice() {
        assert_eq!(pages(&testing::kernel()), Ok(vec![FREE]));
    }

    #[test]
    fn one_block_more_or_less_than_the_zones_have_and_none_is_free() {
        let mut ram = testing::kernel();
        USED.put(&mut ram, testing::FREE.0);
        assert_eq!(pages(&ram), Err(Unsure::Busy));

        let mut ram = testing::kernel();
        let free = Entry {
            mapcount: !0x80,
            private: 0,
            ..USED
        };
        free.put(&mut ram, 0x16000);
        assert_eq!(pages(&ram), Err(Unsure::Busy));

        // The same pages, in blocks of another size.
        let mut ram = testing::kernel();
        for page in 0..testing::FREE.1 as usize {
            free.put(&mut ram, testing::FREE.0 + page * 4096);
        }
        assert_eq!(pages(&ram), Err(Unsure::Busy));
    }

    #[test]
    fn a_block_that_goes_beyond_ram_is_none() {
        let mut ram = testing::kernel();
        let free = Entry {
            mapcount: !0x80,
            private: 4,
            ..USED
        };
        // Of 16 pages, and aligned to as many, with 16 left: cut off its last four.
        free.put(&mut ram, 0x20000);
        ram.truncate(0x2c000);
        assert_eq!(pages(&ram), Err(Unsure::Busy));
    }

    #[test]
    fn pages_with_a_pattern_are_left_alone() {
        let mut ram = testing::kernel();
        ram[testing::POISONING] = 1;
        assert_eq!(pages(&ram), Err(Unsure::Poisoned));
    }

    #[test]
    fn a_guest_that_says_nothing_of_its_zones_has_no_free_pages() {
        let mut ram = testing::kernel();
        let text = b"OFFSET(zone.free_area)";
        let at = memchr::memmem::find(&ram, text).unwrap();
        ram[at] = b'X';
        assert_eq!(pages(&ram), Err(Unsure::Unknown));
        assert_eq!(pages(&[0; 8192]), Err(Unsure::Unknown));

        // None of its nodes has any memory.
        let mut ram = testing::kernel();
        ram[testing::NODES..testing::NODES + 16].fill(0);
        assert_eq!(pages(&ram), Err(Unsure::Unknown));
    }
}
