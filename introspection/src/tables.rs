//! The kernel's own page tables: where its virtual addresses lie, and which pages are tables.
//!
//! Four or five levels of 512 entries (Intel SDM volume 3, 4.5; five where VMCOREINFO says
//! `pgtable_l5_enabled`). A walk reads no more tables than RAM has pages, and reports no more
//! pages than [`MAPPED_MOST`] times as many, whatever the tables say.

use crate::Linux;
use crate::physical::Physical;

const PAGE: u64 = 4096;
/// Entry is in use.
const PRESENT: u64 = 1;
/// It maps a large page, and no further table.
const LARGE: u64 = 1 << 7;
/// What it leads to may not be executed.
const NO_EXECUTE: u64 = 1 << 63;
/// The address in an entry.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// The kernel sees a page at a few addresses; all the others are forged.
const MAPPED_MOST: u64 = 8;

/// The kernel's page tables.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tables<'a> {
    ram: Physical<'a>,
    top: u64,
    levels: u32,
}

/// A piece of the kernel's address space.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mapping {
    pub(crate) address: u64,
    pub(crate) physical: u64,
    /// In pages: 1, or more where the page is a large one.
    pub(crate) pages: u64,
    pub(crate) executable: bool,
}

/// What is told of a walk.
pub(crate) trait Visitor {
    /// A page of RAM, by physical address, is a table.
    fn table(&mut self, physical: u64);
    /// Whether pages around this address are to be reported; asked for each 2 MiB at least.
    fn wants(&self, address: u64) -> bool;
    /// A page that is mapped, in the order of addresses.
    fn mapped(&mut self, mapping: Mapping);
}

/// What may still be visited.
struct Budget {
    tables: u64,
    pages: u64,
}

impl<'a> Tables<'a> {
    pub(crate) fn of(linux: &Linux<'a>) -> Option<Self> {
        let top = ["init_top_pgt", "swapper_pg_dir"]
            .into_iter()
            .find_map(|name| linux.info.symbol(name))?;
        let five = linux.info.number("NUMBER(pgtable_l5_enabled)") == Some(1);
        Some(Self {
            ram: linux.ram,
            top,
            levels: if five { 5 } else { 4 },
        })
    }

    /// The physical address of one of the kernel's.
    pub(crate) fn translate(&self, address: u64) -> Option<u64> {
        let mut table = self.top;
        for level in (1..=self.levels).rev() {
            let shift = shift(level);
            let entry = self
                .ram
                .u64(table.checked_add(index(address, shift) * 8)?)?;
            if entry & PRESENT == 0 {
                return None;
            }
            if level == 1 || is_large(entry, level) {
                let within = (1 << shift) - 1;
                return Some((entry & ADDRESS & !within) | (address & within));
            }
            table = entry & ADDRESS;
        }
        None
    }

    /// Visits all of the kernel's half, as far as the budget goes.
    pub(crate) fn walk(&self, visitor: &mut impl Visitor) {
        let pages = self.ram.bytes().len() as u64 / PAGE;
        let mut budget = Budget {
            tables: pages,
            pages: pages.saturating_mul(MAPPED_MOST),
        };
        // Addresses of the upper half have all bits set above those of the tables.
        let upper = !0 << shift(self.levels + 1);
        self.descend(self.top, self.levels, upper, true, visitor, &mut budget);
    }

    fn descend(
        &self,
        table: u64,
        level: u32,
        base: u64,
        executable: bool,
        visitor: &mut impl Visitor,
        budget: &mut Budget,
    ) -> Option<()> {
        let Some(bytes) = self.ram.read(table, PAGE as usize) else {
            return Some(());
        };
        budget.tables = budget.tables.checked_sub(1)?;
        visitor.table(table);
        if level == 1 && !visitor.wants(base) {
            return Some(());
        }
        let (shift, first) = (shift(level), if level == self.levels { 256 } else { 0 });
        for (index, entry) in bytes.as_chunks().0.iter().enumerate().skip(first) {
            let entry = u64::from_le_bytes(*entry);
            if entry & PRESENT == 0 {
                continue;
            }
            let address = base | (index as u64) << shift;
            let executable = executable && entry & NO_EXECUTE == 0;
            if level != 1 && !is_large(entry, level) {
                let next = entry & ADDRESS;
                self.descend(next, level - 1, address, executable, visitor, budget)?;
            } else if visitor.wants(address) {
                let pages = 1 << (shift - 12);
                budget.pages = budget.pages.checked_sub(pages)?;
                visitor.mapped(Mapping {
                    address,
                    physical: entry & ADDRESS & !((1 << shift) - 1),
                    pages,
                    executable,
                });
            }
        }
        Some(())
    }
}

/// How far an address is shifted for its index in a table; 1 is the last level.
fn shift(level: u32) -> u32 {
    12 + 9 * (level - 1)
}

fn index(address: u64, shift: u32) -> u64 {
    (address >> shift) & 511
}

/// Large pages there are of 2 MiB and 1 GiB.
fn is_large(entry: u64, level: u32) -> bool {
    entry & LARGE != 0 && (2..=3).contains(&level)
}
