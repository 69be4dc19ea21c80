//! What each page of a guest's RAM is used for, without asking the guest.
//!
//! A page of file cache is also on a disk, a free one matters to nobody, page tables and kernel
//! objects have a structure of their own, and a report that says which of them differ between
//! two copies of a guest tells what it would pay to do better. Linux keeps an account of each
//! page (`struct page`), and tells crash dumps how to read it: `memory_map` reads that.
//! What it doesn't tell apart, the kernel's own tables do, which say what lies where in its
//! address space (`Documentation/arch/x86/x86_64/mm.rst`).
//!
//! Promised is that a guest of any other kind, or one that lies, gets no kinds or wrong ones, in
//! time and memory that depend on the size of its RAM alone. So kinds may choose how something is
//! done, never whether it is right.
//!
//! No kind of its own has a framebuffer: in QEMU it is the display adapter's memory, not RAM.

use std::fmt;
use std::ops::{Index, IndexMut};

use crate::memory_map::{MemoryMap, State};
use crate::physical::Physical;
use crate::tables::Tables;
use crate::{Linux, free, spaces, survey};

const PAGE: usize = 4096;

/// What a page is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Kind {
    /// In a block of the buddy allocator, or waiting to be used again by one processor (its page
    /// lists, see [`crate::free`]).
    Free,
    /// Of a file that lies on a disk.
    FileCache,
    /// Of a file in memory only (tmpfs), which all shared memory is.
    SharedMemory,
    /// Of processes: heap, stacks, what they changed of files.
    Anonymous,
    /// Of processes or the kernel.
    PageTable,
    /// Kernel objects.
    Slab,
    /// Of the kernel image or a module.
    KernelText,
    /// Of the kernel image or a module, constants included.
    KernelData,
    /// One of a thread, or kept for the next.
    KernelStack,
    /// Large kernel allocations that are contiguous in virtual memory alone.
    Vmalloc,
    /// The kernel's account of its pages, from which all this is read.
    MemoryMap,
    /// Taken while booting, before there was an allocator, or no memory to the kernel.
    Reserved,
    /// In use by the kernel, for all that is known.
    Other,
}

impl Kind {
    /// All of them, in the order of tables.
    pub const ALL: [Self; 13] = [
        Self::Free,
        Self::FileCache,
        Self::SharedMemory,
        Self::Anonymous,
        Self::PageTable,
        Self::Slab,
        Self::KernelText,
        Self::KernelData,
        Self::KernelStack,
        Self::Vmalloc,
        Self::MemoryMap,
        Self::Reserved,
        Self::Other,
    ];
}

impl fmt::Display for Kind {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(match self {
            Self::Free => "free",
            Self::FileCache => "file cache",
            Self::SharedMemory => "shared memory",
            Self::Anonymous => "anonymous",
            Self::PageTable => "page table",
            Self::Slab => "slab",
            Self::KernelText => "kernel text",
            Self::KernelData => "kernel data",
            Self::KernelStack => "kernel stack",
            Self::Vmalloc => "vmalloc",
            Self::MemoryMap => "memory map",
            Self::Reserved => "reserved",
            Self::Other => "other",
        })
    }
}

/// Something of each kind: pages, bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ByKind<T>([T; Kind::ALL.len()]);

impl<T> ByKind<T> {
    /// In the order of [`Kind::ALL`].
    pub fn iter(&self) -> impl Iterator<Item = (Kind, &T)> {
        Kind::ALL.into_iter().zip(&self.0)
    }
}

impl<T> Index<Kind> for ByKind<T> {
    type Output = T;

    fn index(&self, kind: Kind) -> &T {
        &self.0[kind as usize]
    }
}

impl<T> IndexMut<Kind> for ByKind<T> {
    fn index_mut(&mut self, kind: Kind) -> &mut T {
        &mut self.0[kind as usize]
    }
}

/// The kind of each page of a RAM, a byte a page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageKinds {
    kinds: Vec<Kind>,
}

impl PageKinds {
    /// Of a page, by its place in the RAM file; [`Kind::Other`] beyond its end.
    pub fn kind(&self, page: u64) -> Kind {
        usize::try_from(page)
            .ok()
            .and_then(|page| self.kinds.get(page).copied())
            .unwrap_or(Kind::Other)
    }

    /// Of all pages, in the file's order.
    pub fn all(&self) -> &[Kind] {
        &self.kinds
    }

    /// How many of these pages are of which kind.
    pub fn count(&self, pages: impl IntoIterator<Item = u64>) -> ByKind<u64> {
        let mut counts = ByKind::default();
        for page in pages {
            counts[self.kind(page)] += 1;
        }
        counts
    }

    /// How many of all pages are of which kind.
    pub fn totals(&self) -> ByKind<u64> {
        let mut counts = ByKind::default();
        for kind in &self.kinds {
            counts[*kind] += 1;
        }
        counts
    }

    /// How many pages are of which kind of those that differ between two RAMs, one of which these
    /// are the kinds of; what only one of them has counts as zeroes.
    pub fn differing(&self, one: &[u8], other: &[u8]) -> ByKind<u64> {
        let pages = one.len().max(other.len()).div_ceil(PAGE);
        let page = |ram: &'_ [u8], page: usize| {
            let start = ram.len().min(page * PAGE);
            start..ram.len().min(start + PAGE)
        };
        self.count((0..pages).filter_map(|number| {
            let (a, b) = (&one[page(one, number)], &other[page(other, number)]);
            let common = a.len().min(b.len());
            let rest = a[common..].iter().chain(&b[common..]);
            let same = a[..common] == b[..common] && rest.into_iter().all(|byte| *byte == 0);
            (!same).then_some(number as u64)
        }))
    }
}

/// The kinds of all pages of a guest that stands still; `None` if it is no Linux that says enough
/// of itself.
pub fn classify(ram: Physical<'_>) -> Option<PageKinds> {
    of(&Linux::find(ram)?)
}

/// The same, of a kernel that was found already.
pub fn of(linux: &Linux<'_>) -> Option<PageKinds> {
    let tables = Tables::of(linux)?;
    let mut map = MemoryMap::of(linux, tables)?;
    let mut kinds = accounted(&linux.ram, &mut map);
    // It knows of no page that is in use: it is none.
    let unknown = |kind: &Kind| matches!(kind, Kind::Other | Kind::Reserved);
    if kinds.iter().all(unknown) {
        return None;
    }
    for range in free::waiting_pages(linux, tables, &mut map) {
        if let Some(waiting) = kinds.get_mut(range.start / PAGE..range.end / PAGE) {
            waiting.fill(Kind::Free);
        }
    }
    image(linux, &mut kinds);
    survey::name(linux, tables, &mut map, &mut kinds);
    processes(linux, &mut kinds);
    Some(PageKinds { kinds })
}

/// What the account of pages says.
fn accounted(ram: &Physical<'_>, map: &mut MemoryMap<'_>) -> Vec<Kind> {
    let mut kinds = vec![Kind::Other; ram.bytes().len() / PAGE];
    let mut page = 0;
    while page < kinds.len() {
        let physical = ram.address(page * PAGE);
        let mut length = 1;
        kinds[page] = match map.state(physical) {
            // Holes too have an account, mostly.
            None | Some(State::Reserved) => Kind::Reserved,
            Some(State::Free(pages)) => {
                // As much of the block as lies in RAM in one piece.
                let last = physical.saturating_add((pages - 1) * PAGE as u64);
                let end = ram.offset(last).map_or(0, |last| last / PAGE + 1);
                if end as u64 == page as u64 + pages && end <= kinds.len() {
                    length = pages as usize;
                }
                Kind::Free
            }
            Some(State::As(head)) => ram
                .offset(head)
                .map(|head| head / PAGE)
                .filter(|head| *head < page)
                .map_or(Kind::Other, |head| kinds[head]),
            Some(State::Slab) => Kind::Slab,
            Some(State::Table) => Kind::PageTable,
            Some(State::Anonymous) => Kind::Anonymous,
            Some(State::File) => Kind::FileCache,
            Some(State::Shared) => Kind::SharedMemory,
            Some(State::Used) => Kind::Other,
        };
        let kind = kinds[page];
        kinds[page..page + length].fill(kind);
        page += length;
    }
    kinds
}

/// Names the kernel image's pages, except those that it gave away after booting.
fn image(linux: &Linux<'_>, kinds: &mut [Kind]) {
    let [start, text_end, end] = linux.variables(["_text", "_etext", "_end"]);
    let mut name = |from: Option<usize>, to: Option<usize>, kind| {
        let range = from
            .zip(to)
            .map(|(from, to)| from / PAGE..to.div_ceil(PAGE));
        let pages = range.and_then(|range| kinds.get_mut(range));
        for page in pages.into_iter().flatten() {
            if *page == Kind::Reserved {
                *page = kind;
            }
        }
    };
    name(start, text_end, Kind::KernelText);
    name(text_end, end, Kind::KernelData);
}

/// Names the tables of processes that have no type: the two or three highest levels, before
/// Linux 6.16.
fn processes(linux: &Linux<'_>, kinds: &mut [Kind]) {
    let unnamed: Vec<bool> = kinds.iter().map(|kind| *kind == Kind::Other).collect();
    let consider = |offset: usize| unnamed.get(offset / PAGE) == Some(&true);
    for top in spaces::tops(linux, consider) {
        let upper = spaces::upper_tables(&linux.ram, top);
        for page in upper.into_iter().chain([top / PAGE]) {
            if let Some(known) = kinds.get_mut(page)
                && *known == Kind::Other
            {
                *known = Kind::PageTable;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{self, Entry, USED};

    fn found(ram: &[u8]) -> PageKinds {
        classify(Physical::new(ram)).unwrap()
    }

    #[test]
    fn every_page_of_a_kernel_is_named() {
        let kinds = found(&testing::kernel());
        let at = |offset: usize| kinds.kind((offset / PAGE) as u64);
        let expected = [
            (0, Kind::Reserved),
            (0x4000, Kind::KernelText),
            (testing::TEXT_END, Kind::KernelData),
            (testing::CRNG, Kind::KernelData),
            // The kernel's top-level table, which is part of its image.
            (0xd000, Kind::PageTable),
            // A process's, the upper two of which are told by no type.
            (0x10000, Kind::PageTable),
            (0x11000, Kind::PageTable),
            (0x12000, Kind::PageTable),
            (0x13000, Kind::PageTable),
            (0x14000, Kind::Anonymous),
            (0x15000, Kind::Anonymous),
            (0x16000, Kind::Other),
            (testing::MAP, Kind::MemoryMap),
            (0x1a000, Kind::Reserved),
            (0x1b000, Kind::PageTable),
            (0x21000, Kind::PageTable),
            (testing::KERNEL_STACK, Kind::KernelStack),
            (testing::KERNEL_STACK + 0x3000, Kind::KernelStack),
            (testing::VMALLOC, Kind::Vmalloc),
            (testing::MODULE, Kind::KernelText),
            (testing::FREE.0 - PAGE, Kind::Other),
            (testing::FREE.0, Kind::Free),
            (testing::SIZE - PAGE, Kind::Free),
            (testing::SIZE, Kind::Other),
        ];
        for (offset, kind) in expected {
            assert_eq!(at(offset), kind, "at {offset:#x}");
        }
        assert_eq!(kinds.all().len(), testing::SIZE / PAGE);
        assert_eq!(kinds.totals()[Kind::Free], testing::FREE.1);
    }

    #[test]
    fn files_in_memory_and_on_disks_are_told_from_each_other_and_from_the_rest() {
        let file = Entry {
            mapping: 0xffff_8880_0000_0700,
            ..USED
        };
        let cases = [
            (file, Kind::FileCache),
            (
                Entry {
                    flags: testing::SWAPBACKED,
                    ..file
                },
                Kind::SharedMemory,
            ),
            // Merged with others of the same content.
            (
                Entry {
                    mapping: file.mapping | 3,
                    ..file
                },
                Kind::Anonymous,
            ),
            // Of a driver that can move it.
            (
                Entry {
                    mapping: file.mapping | 2,
                    ..file
                },
                Kind::Other,
            ),
            // The mark of a list, no pointer.
            (
                Entry {
                    mapping: 0xdead_0000_0000_0400,
                    ..file
                },
                Kind::Other,
            ),
            // What a slab writes there means something else.
            (
                Entry {
                    flags: testing::SLAB,
                    ..file
                },
                Kind::Slab,
            ),
        ];
        for (entry, kind) in cases {
            let mut ram = testing::kernel();
            entry.put(&mut ram, 0x16000);
            assert_eq!(found(&ram).kind(0x16), kind);
        }
    }

    #[test]
    fn pages_that_belong_to_one_before_are_of_its_kind() {
        let mut ram = testing::kernel();
        let slab = Entry {
            flags: testing::SLAB,
            ..USED
        };
        slab.put(&mut ram, 0x14000);
        for tail in [0x15000, 0x16000, 0x17000] {
            Entry::tail_of(0x14000).put(&mut ram, tail);
        }
        // To itself, or to one that comes later, it can't belong.
        Entry::tail_of(testing::FREE.0).put(&mut ram, 0x2b000);
        let kinds = found(&ram);
        assert_eq!(kinds.all()[0x14..0x18], [Kind::Slab; 4]);
        assert_eq!(kinds.kind(0x2b), Kind::Other);
    }

    #[test]
    fn a_block_that_reaches_beyond_ram_is_one_page() {
        let mut ram = testing::kernel();
        let free = Entry {
            mapcount: !0x80,
            private: 3,
            ..USED
        };
        free.put(&mut ram, 0x28000);
        assert_eq!(found(&ram).all()[0x28..], [Kind::Free; 8]);
        // Not where a block of eight can begin; and more than there is.
        for (page, order) in [(0x2c000, 3), (0x20000, 5), (0x20000, u64::MAX)] {
            let mut ram = testing::kernel();
            let private = order;
            Entry { private, ..free }.put(&mut ram, page);
            let kinds = found(&ram);
            assert_eq!(kinds.kind(page as u64 / 4096), Kind::Free);
            assert_ne!(kinds.kind(page as u64 / 4096 + 1), Kind::Free);
        }
    }

    #[test]
    fn a_stack_without_its_mark_or_with_a_hole_is_none() {
        let mut unmarked = testing::kernel();
        unmarked[testing::KERNEL_STACK] ^= 1;
        let mut torn = testing::kernel();
        // The entry of its third page.
        torn[0x1e000 + 6 * 8] ^= 1;
        for ram in [unmarked, torn] {
            let kinds = found(&ram);
            assert_eq!(kinds.totals()[Kind::KernelStack], 0);
            assert_eq!(
                kinds.kind(testing::KERNEL_STACK as u64 / 4096),
                Kind::Vmalloc
            );
        }
    }

    #[test]
    fn without_an_account_of_pages_there_are_no_kinds() {
        assert_eq!(classify(Physical::new(&[0; 8192])), None);
        let whole = testing::kernel();
        let text = String::from_utf8_lossy(&whole[testing::INFO..testing::INFO + 0x1000]);
        let needed = [
            "SYMBOL(mem_section)",
            "LENGTH(mem_section)",
            "SIZE(page)",
            "OFFSET(page.flags)",
            "OFFSET(page.mapping)",
            "OFFSET(page._mapcount)",
            "NUMBER(PG_slab)",
            "NUMBER(PAGE_BUDDY_MAPCOUNT_VALUE)",
        ];
        for line in needed {
            let mut ram = whole.clone();
            ram[testing::INFO + text.find(line).unwrap()] = b'-';
            assert_eq!(classify(Physical::new(&ram)), None, "without {line}");
        }
        // The rest only makes it say less.
        let helpful = [
            "OFFSET(page.compound_head)",
            "NUMBER(PG_private)",
            "NUMBER(PG_swapbacked)",
            "NUMBER(PAGE_OFFLINE_MAPCOUNT_VALUE)",
            "NUMBER(KERNEL_IMAGE_SIZE)",
        ];
        for line in helpful {
            let mut ram = whole.clone();
            ram[testing::INFO + text.find(line).unwrap()] = b'-';
            assert_eq!(found(&ram).totals()[Kind::Anonymous], 2, "without {line}");
        }
    }

    #[test]
    fn a_map_that_is_not_there_gives_no_kinds() {
        let mut ram = testing::kernel();
        // No section has a map.
        ram[0x1a800] = 0;
        assert_eq!(classify(Physical::new(&ram)), None);
    }

    #[test]
    fn tables_that_lead_to_themselves_are_not_followed_for_ever() {
        let mut ram = testing::kernel();
        // Each entry of the table of large allocations' tables leads to that very table.
        for table in [0x1c000, 0x1d000] {
            for at in (table..table + 4096).step_by(8) {
                ram[at..at + 8].copy_from_slice(&0x1d063_u64.to_le_bytes());
            }
        }
        assert_eq!(found(&ram).kind(0x14), Kind::Anonymous);
    }

    #[test]
    fn what_differs_is_counted_by_kind() {
        let ram = testing::kernel();
        let kinds = found(&ram);
        let mut other = ram.clone();
        other[testing::CRNG] ^= 1;
        other[0x14000] ^= 1;
        other[0x15fff] ^= 1;
        other.truncate(testing::FREE.0 + 100);
        let differing = kinds.differing(&ram, &other);
        assert_eq!(differing, kinds.differing(&other, &ram));
        assert_eq!(differing[Kind::KernelData], 1);
        assert_eq!(differing[Kind::Anonymous], 2);
        assert_eq!(differing.iter().map(|(_, pages)| pages).sum::<u64>(), 3);
        assert_eq!(kinds.differing(&ram, &ram), ByKind::default());
    }

    #[test]
    fn kinds_are_in_the_order_of_tables() {
        for (index, kind) in Kind::ALL.into_iter().enumerate() {
            assert_eq!(kind as usize, index);
        }
    }
}
