//! The kernel's account of each page of RAM: one `struct page` a page.
//!
//! On x86-64 they are an array in virtual memory, cut into sections of physical memory, each of
//! which says where the array would begin if it began with page 0 (`struct mem_section` and
//! `sparse_encode_mem_map` in `mm/sparse.c`). Where a field lies and which bit means what is in
//! VMCOREINFO, for the sake of makedumpfile, which leaves out pages by it
//! (`Documentation/admin-guide/kdump/vmcoreinfo.rst`). Nothing but the meaning of a few bits is
//! taken from elsewhere: of `page->mapping`, and the places of two neighbours, see below.

use std::ops::Range;

use crate::Linux;
use crate::physical::Physical;
use crate::tables::Tables;
use crate::vmcoreinfo::Vmcoreinfo;

const PAGE: u64 = 4096;
/// A pointer to the array has flags in its lowest bits.
const POINTER: u64 = !(PAGE - 1);
/// `SECTION_HAS_MEM_MAP`.
const HAS_MAP: u64 = 1 << 1;

/// Of `page->mapping`: the kinds of pointers, see `PAGE_MAPPING_FLAGS`.
const MAPPING_FLAGS: u64 = 3;
const MAPPING_MOVABLE: u64 = 2;
/// Addresses of the kernel begin here, with five levels of tables.
const KERNEL_HALF: u64 = 0xff00_0000_0000_0000;

/// A block of free pages is no larger than `1 << ORDER_MOST` pages in any kernel.
const ORDER_MOST: u64 = 20;

/// What a page is, as far as its `struct page` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// It and so many pages from it on, always a power of two.
    Free(u64),
    Slab,
    Table,
    Anonymous,
    /// Of a file that lies on a disk.
    File,
    /// Of a file that lies in memory only.
    Shared,
    /// Never given to the allocator.
    Reserved,
    /// The same as the page before it that has this physical address.
    As(u64),
    /// In use for something else.
    Used,
}

/// The array, and how to read it.
#[derive(Debug)]
pub(crate) struct MemoryMap<'a> {
    ram: Physical<'a>,
    tables: Tables<'a>,
    sections: Sections,
    fields: Fields,
    marks: Marks,
    /// The page of the array that was read last: virtual and physical address.
    last: Option<(u64, u64)>,
    /// The section that was read last, by number, and where the array would begin.
    section: Option<(u64, Option<u64>)>,
}

#[derive(Debug)]
struct Sections {
    roots: u64,
    root_count: u64,
    size: u64,
    map: u64,
    shift: u32,
}

/// Offsets in a `struct page`, in bytes.
#[derive(Debug)]
struct Fields {
    size: u64,
    flags: u64,
    mapping: u64,
    mapcount: u64,
    private: u64,
    head: Option<u64>,
}

/// Which bits mean what.
#[derive(Debug)]
struct Marks {
    buddy: PageType,
    table: Option<PageType>,
    slab: Slab,
    swapbacked: Option<u64>,
    reserved: Option<u64>,
    orders: u64,
}

/// Slab pages had a flag, and have a type since Linux 6.10.
#[derive(Debug)]
enum Slab {
    Flag(u64),
    Type(PageType),
}

/// How `page_type`, which shares its place with `_mapcount`, says what a page is: by a bit that is
/// missing in a negative number, or since Linux 6.12 by the highest byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PageType {
    Missing(u32),
    Byte(u8),
}

impl PageType {
    /// From a number of VMCOREINFO.
    fn of(number: i64) -> Option<Self> {
        let value = number as u32;
        if value.trailing_zeros() >= 24 {
            let byte = (value >> 24) as u8;
            return (0xf0..0xff).contains(&byte).then_some(Self::Byte(byte));
        }
        let bit = !value;
        bit.is_power_of_two().then_some(Self::Missing(bit))
    }

    fn is(self, value: u32) -> bool {
        match self {
            Self::Missing(bit) => value & (1 << 31 | bit) == 1 << 31,
            Self::Byte(byte) => (value >> 24) as u8 == byte,
        }
    }

    /// Of page tables, which is not listed: it follows that of offline pages as that follows
    /// free ones, in all kernels since 5.10 (`include/linux/page-flags.h`).
    fn table(buddy: Self, offline: Self) -> Option<Self> {
        match (buddy, offline) {
            (Self::Missing(buddy), Self::Missing(offline)) if offline == buddy << 1 => {
                Some(Self::Missing(offline << 1)).filter(|table| *table != Self::Missing(0))
            }
            (Self::Missing(buddy), Self::Missing(offline)) if offline == buddy >> 1 => {
                Some(Self::Missing(offline >> 1)).filter(|table| *table != Self::Missing(0))
            }
            (Self::Byte(buddy), Self::Byte(offline)) if offline == buddy + 1 => {
                Some(Self::Byte(offline + 1))
            }
            _ => None,
        }
    }
}

impl<'a> MemoryMap<'a> {
    /// Finds it; `None` where anything is missing without which free pages, files and anonymous
    /// memory can't be told apart.
    pub(crate) fn of(linux: &Linux<'a>, tables: Tables<'a>) -> Option<Self> {
        let info = &linux.info;
        Some(Self {
            ram: linux.ram,
            tables,
            sections: Sections::of(info)?,
            fields: Fields::of(info)?,
            marks: Marks::of(info)?,
            last: None,
            section: None,
        })
    }

    /// The virtual addresses of the array's part for so many bytes of physical memory.
    pub(crate) fn span(&mut self, memory: u64) -> Option<Range<u64>> {
        let start = self.origin(0)?;
        let length = (memory / PAGE).checked_mul(self.fields.size)?;
        Some(start..start.checked_add(length)?)
    }

    /// What it says of a page; `None` where it has no such page.
    pub(crate) fn state(&mut self, physical: u64) -> Option<State> {
        let page = self.page(physical)?;
        let number = physical / PAGE;
        let mark = |bit: Option<u64>, flags: u64| bit.is_some_and(|bit| flags & bit != 0);
        if let Some(head) = self.fields.head {
            let head = self.u64(page.checked_add(head)?)?;
            if head & 1 != 0 {
                return Some(self.tail(page, number, head - 1));
            }
        }
        let flags = self.u64(page.checked_add(self.fields.flags)?)?;
        let kind = self.u32(page.checked_add(self.fields.mapcount)?)?;
        let slab = match self.marks.slab {
            Slab::Flag(bit) => flags & bit != 0,
            Slab::Type(slab) => slab.is(kind),
        };
        if slab {
            return Some(State::Slab);
        }
        if self.marks.buddy.is(kind) {
            let order = self.u64(page.checked_add(self.fields.private)?)?;
            let pages = 1 << order.min(ORDER_MOST);
            let whole = order < self.marks.orders && number.is_multiple_of(pages);
            return Some(State::Free(if whole { pages } else { 1 }));
        }
        if self.marks.table.is_some_and(|table| table.is(kind)) {
            return Some(State::Table);
        }
        if mark(self.marks.reserved, flags) {
            return Some(State::Reserved);
        }
        let mapping = self.u64(page.checked_add(self.fields.mapping)?)?;
        // Anything else that lies here is no pointer, such as the marks of lists.
        if mapping < KERNEL_HALF {
            return Some(State::Used);
        }
        Some(match mapping & MAPPING_FLAGS {
            0 if mark(self.marks.swapbacked, flags) => State::Shared,
            0 => State::File,
            MAPPING_MOVABLE => State::Used,
            _ => State::Anonymous,
        })
    }

    /// The virtual address of a page's `struct page`.
    pub(crate) fn entry(&mut self, physical: u64) -> Option<u64> {
        self.page(physical)
    }

    /// The physical address of the page whose `struct page` is there, if it is one.
    pub(crate) fn page_of(&mut self, entry: u64) -> Option<u64> {
        // One array of all memory: each section says where it would begin.
        let number = entry.checked_sub(self.origin(0)?)? / self.fields.size;
        let physical = number.checked_mul(PAGE)?;
        (self.page(physical)? == entry).then_some(physical)
    }

    /// How many words of eight bytes a `struct page` has.
    pub(crate) fn words(&self) -> u64 {
        self.fields.size / 8
    }

    /// A word of the `struct page` of a page, or of the one that it belongs to.
    pub(crate) fn word(&mut self, physical: u64, number: u64) -> Option<u64> {
        let mut page = self.page(physical)?;
        if let Some(head) = self.fields.head {
            let head = self.u64(page.checked_add(head)?)?;
            if head & 1 != 0 {
                page = head - 1;
            }
        }
        self.u64(page.checked_add(number * 8)?)
    }

    /// Of a page that belongs to the one before it whose `struct page` is at `head`.
    fn tail(&self, page: u64, number: u64, head: u64) -> State {
        let distance = page.wrapping_sub(head) / self.fields.size;
        match number.checked_sub(distance) {
            Some(first) if distance != 0 => State::As(first * PAGE),
            _ => State::Used,
        }
    }

    /// The virtual address of a page's `struct page`.
    fn page(&mut self, physical: u64) -> Option<u64> {
        let offset = (physical / PAGE).checked_mul(self.fields.size)?;
        self.origin(physical)?.checked_add(offset)
    }

    /// Where the array would begin, had it all pages below this one.
    fn origin(&mut self, physical: u64) -> Option<u64> {
        let number = physical >> self.sections.shift;
        match self.section {
            Some((last, origin)) if last == number => origin,
            _ => {
                let origin = self.section(number);
                self.section = Some((number, origin));
                origin
            }
        }
    }

    fn section(&self, number: u64) -> Option<u64> {
        let sections = &self.sections;
        let per_root = PAGE / sections.size;
        let root = number / per_root;
        if root >= sections.root_count {
            return None;
        }
        let read = |address| self.ram.u64(self.tables.translate(address)?);
        let section = read(sections.roots.checked_add(root * 8)?)?
            .checked_add(number % per_root * sections.size)?;
        let map = read(section.checked_add(sections.map)?)?;
        (map & HAS_MAP != 0).then_some(map & POINTER)
    }

    fn u64(&mut self, address: u64) -> Option<u64> {
        let physical = self.physical(address)?;
        self.ram.u64(physical)
    }

    fn u32(&mut self, address: u64) -> Option<u32> {
        let physical = self.physical(address)?;
        self.ram.u32(physical)
    }

    fn physical(&mut self, address: u64) -> Option<u64> {
        let start = address & POINTER;
        let physical = match self.last {
            Some((last, physical)) if last == start => physical,
            _ => self.tables.translate(start)?,
        };
        self.last = Some((start, physical));
        physical.checked_add(address - start)
    }
}

impl Sections {
    fn of(info: &Vmcoreinfo) -> Option<Self> {
        let number = |key| u64::try_from(info.number(key)?).ok();
        let sections = Self {
            // The kernel allocates the array of roots, and lists where it is.
            roots: info.listed("mem_section")?,
            root_count: number("LENGTH(mem_section)")?,
            size: number("SIZE(mem_section)")?,
            map: number("OFFSET(mem_section.section_mem_map)")?,
            shift: number("NUMBER(SECTION_SIZE_BITS)")? as u32,
        };
        let sane = (1..=PAGE).contains(&sections.size)
            && sections.map < sections.size
            && (12..64).contains(&sections.shift);
        sane.then_some(sections)
    }
}

impl Fields {
    fn of(info: &Vmcoreinfo) -> Option<Self> {
        let number = |key| u64::try_from(info.number(key)?).ok();
        let fields = Self {
            size: number("SIZE(page)")?,
            flags: number("OFFSET(page.flags)")?,
            mapping: number("OFFSET(page.mapping)")?,
            mapcount: number("OFFSET(page._mapcount)")?,
            private: number("OFFSET(page.private)")?,
            head: number("OFFSET(page.compound_head)"),
        };
        let all = [
            fields.flags,
            fields.mapping,
            fields.mapcount,
            fields.private,
            fields.head.unwrap_or(0),
        ];
        let sane = (1..=PAGE).contains(&fields.size) && all.iter().all(|at| *at < fields.size);
        sane.then_some(fields)
    }
}

impl Marks {
    fn of(info: &Vmcoreinfo) -> Option<Self> {
        let bit = |key| 1_u64.checked_shl(u32::try_from(info.number(key)?).ok()?);
        let kind = |key| PageType::of(info.number(key)?);
        let buddy = kind("NUMBER(PAGE_BUDDY_MAPCOUNT_VALUE)")?;
        let table = kind("NUMBER(PAGE_OFFLINE_MAPCOUNT_VALUE)")
            .and_then(|offline| PageType::table(buddy, offline));
        let slab = match kind("NUMBER(PAGE_SLAB_MAPCOUNT_VALUE)") {
            Some(slab) => Slab::Type(slab),
            None => Slab::Flag(bit("NUMBER(PG_slab)")?),
        };
        Some(Self {
            buddy,
            table,
            slab,
            swapbacked: bit("NUMBER(PG_swapbacked)"),
            // Not listed, but always the one before (`include/linux/page-flags.h`).
            reserved: bit("NUMBER(PG_private)").map(|private| private >> 1),
            orders: u64::try_from(info.number("LENGTH(zone.free_area)")?).ok()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_of_pages_are_read_as_each_kernel_writes_them() {
        // Linux 6.1, 6.11, 6.12: free, offline; what a page table, a free page and one that is
        // mapped once look like.
        let kernels = [
            (!0x80, !0x100, !0x200_u32, !0x80_u32),
            (!0x4000_0000, !0x2000_0000, !0x1000_0000, !0x4000_0000),
            (0xf0 << 24, 0xf1 << 24, 0xf200_0000, 0xf000_0000),
        ];
        for (buddy, offline, page_table, free) in kernels {
            let buddy = PageType::of(buddy).unwrap();
            let table = PageType::table(buddy, PageType::of(offline).unwrap()).unwrap();
            assert!(buddy.is(free) && !buddy.is(page_table));
            assert!(table.is(page_table) && !table.is(free));
            for mapped in [0, 1, u32::MAX] {
                assert!(!buddy.is(mapped) && !table.is(mapped));
            }
        }
        assert_eq!(PageType::of(0), None);
        assert_eq!(PageType::of(-1), None);
        assert_eq!(PageType::of(-4), None, "two bits are missing");
    }
}
