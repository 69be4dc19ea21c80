//! What the kernel's own page tables say of pages: in which part of its address space they are
//! (`Documentation/arch/x86/x86_64/mm.rst` of Linux), and which are tables.

use crate::kinds::Kind;
use crate::memory_map::MemoryMap;
use crate::physical::Physical;
use crate::tables::{Mapping, Tables, Visitor};
use crate::{KERNEL_MAP, Linux};

const PAGE: usize = 4096;

/// Of the kernel's addresses, those of modules end here, and the kernel image's begin
/// `KERNEL_IMAGE_SIZE` before them (1 GiB where the kernel is moved at random).
const MODULES_END: u64 = 0xffff_ffff_ff00_0000;
const IMAGE_SIZE: u64 = 1 << 30;

/// The lowest word of a kernel stack (`STACK_END_MAGIC`), and how many pages it has, which is
/// what its address is a multiple of too (`THREAD_ALIGN`).
const STACK_END: u64 = 0x57ac_6e9d;
const STACK_PAGES: usize = 4;

/// Names the pages that nothing more certain is known of.
pub(crate) fn name(
    linux: &Linux<'_>,
    tables: Tables<'_>,
    map: &mut MemoryMap<'_>,
    kinds: &mut [Kind],
) {
    let mut survey = Survey {
        ram: linux.ram,
        regions: Regions::of(linux, map),
        stack: Stack::default(),
        kinds,
    };
    tables.walk(&mut survey);
}

/// The parts of the kernel's address space that say what lies in them.
#[derive(Debug)]
struct Regions {
    vmalloc: Option<u64>,
    map: (u64, u64),
    modules: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Region {
    Vmalloc,
    MemoryMap,
    Modules,
}

impl Regions {
    fn of(linux: &Linux<'_>, map: &mut MemoryMap<'_>) -> Self {
        let ram = &linux.ram;
        let [base] = linux.variables(["vmalloc_base"]);
        let size = linux.info.number("NUMBER(KERNEL_IMAGE_SIZE)");
        let size = size.map_or(IMAGE_SIZE, i64::cast_unsigned);
        let memory = ram
            .address(ram.bytes().len().saturating_sub(1))
            .saturating_add(1);
        let map = map.span(memory).unwrap_or(0..0);
        Self {
            vmalloc: base.and_then(|base| ram.u64(ram.address(base))),
            map: (map.start, map.end),
            modules: KERNEL_MAP.saturating_add(size),
        }
    }

    fn of_address(&self, address: u64) -> Option<Region> {
        // The map may begin and end within 2 MiB.
        let map = self.map.0 & !0x1f_ffff..self.map.1;
        if map.contains(&address) {
            return Some(Region::MemoryMap);
        }
        if (self.modules..MODULES_END).contains(&address) {
            return Some(Region::Modules);
        }
        // They are in this order, always.
        let vmalloc = self
            .vmalloc
            .is_some_and(|base| (base..self.map.0).contains(&address));
        vmalloc.then_some(Region::Vmalloc)
    }
}

/// Names what the kernel's own tables tell of.
struct Survey<'a> {
    ram: Physical<'a>,
    regions: Regions,
    stack: Stack,
    kinds: &'a mut [Kind],
}

/// What could become a stack, page by page.
#[derive(Default)]
struct Stack {
    start: u64,
    pages: Vec<usize>,
}

impl Survey<'_> {
    /// Names a page that nothing more certain is known of.
    fn name(&mut self, page: usize, kind: Kind) {
        if let Some(known) = self.kinds.get_mut(page)
            && matches!(*known, Kind::Other | Kind::Vmalloc)
        {
            *known = kind;
        }
    }

    fn stack(&mut self, address: u64, page: usize) {
        let size = (STACK_PAGES * PAGE) as u64;
        if address.is_multiple_of(size) {
            let bottom = self.ram.u64(self.ram.address(page * PAGE));
            self.stack.start = address;
            self.stack.pages.clear();
            if bottom == Some(STACK_END) {
                self.stack.pages.push(page);
            }
            return;
        }
        let next = self.stack.start + (self.stack.pages.len() * PAGE) as u64;
        if self.stack.pages.is_empty() || address != next {
            self.stack.pages.clear();
            return;
        }
        self.stack.pages.push(page);
        if self.stack.pages.len() == STACK_PAGES {
            for page in std::mem::take(&mut self.stack.pages) {
                self.name(page, Kind::KernelStack);
            }
        }
    }
}

impl Visitor for Survey<'_> {
    fn table(&mut self, physical: u64) {
        let Some(page) = self.ram.offset(physical) else {
            return;
        };
        // The first ones are part of the image, or were taken while booting.
        if let Some(known) = self.kinds.get_mut(page / PAGE)
            && matches!(*known, Kind::Other | Kind::Reserved | Kind::KernelData)
        {
            *known = Kind::PageTable;
        }
    }

    fn wants(&self, address: u64) -> bool {
        self.regions.of_address(address).is_some()
    }

    fn mapped(&mut self, mapping: Mapping) {
        let Some(region) = self.regions.of_address(mapping.address) else {
            return;
        };
        for number in 0..mapping.pages {
            let Some(page) = self.ram.offset(mapping.physical + number * PAGE as u64) else {
                continue;
            };
            let page = page / PAGE;
            match region {
                Region::MemoryMap => {
                    if let Some(known) = self.kinds.get_mut(page)
                        && matches!(*known, Kind::Other | Kind::Reserved)
                    {
                        *known = Kind::MemoryMap;
                    }
                }
                Region::Modules if mapping.executable => self.name(page, Kind::KernelText),
                Region::Modules => self.name(page, Kind::KernelData),
                Region::Vmalloc => {
                    self.name(page, Kind::Vmalloc);
                    self.stack(mapping.address + number * PAGE as u64, page);
                }
            }
        }
    }
}
