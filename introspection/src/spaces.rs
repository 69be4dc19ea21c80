//! The guest's processes, as their page tables tell: which page of RAM each of them sees where.
//!
//! Four levels of 512 entries, as x86-64 has them (Intel SDM volume 3, 4.5); the fifth is not
//! read. All top-level tables of Linux share the kernel's half, which tells them from other
//! pages. A process's name is the last string at the top of its stack, where `execve` puts the
//! name of the program (`AT_EXECFN`, `fs/exec.c`).

use std::collections::HashMap;

use crate::Linux;
use crate::physical::Physical;

const PAGE: u64 = 4096;
const ENTRIES: u64 = 512;
/// Entry is in use.
const PRESENT: u64 = 1;
/// It maps a large page, and no further table.
const LARGE: u64 = 1 << 7;
/// The address in an entry.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
/// Flags that the processor sets: accessed and dirty.
const TOUCHED: u64 = 0x60;

/// A guest has no more processes than this that matter.
const SPACES_MAX: usize = 4096;
/// Pages of all processes together, for each page of RAM: some are shared by many.
const SHARED_MOST: usize = 8;
/// The name is looked for in so many pages from the top.
const NAME_PAGES: usize = 64;
const NAME_MAX: usize = 512;

/// What one process sees.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AddressSpace {
    /// The program, as it was started.
    pub name: Vec<u8>,
    /// Which of its name it is, in the order of their tables.
    pub ordinal: u32,
    /// Virtual page number and page of the RAM file, by virtual page number.
    pub pages: Vec<(u64, u64)>,
}

impl AddressSpace {
    /// A number for its name and ordinal: the same in copies of a guest.
    pub fn key(&self) -> u64 {
        // FNV-1a: stable, and nobody gains by two that are equal.
        let bytes = self.name.iter().copied().chain(self.ordinal.to_le_bytes());
        bytes.fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
        })
    }
}

/// All processes of a guest that have a name.
pub fn address_spaces(linux: &Linux<'_>) -> Vec<AddressSpace> {
    let ram = &linux.ram;
    let mut budget = Budget::of(ram);
    let mut spaces = Vec::new();
    let mut counts: HashMap<Vec<u8>, u32> = HashMap::new();
    for top in tops(linux, |_| true) {
        let mut pages = Vec::new();
        walk(ram, top, &mut pages, &mut budget);
        if let Some(name) = name(ram, &pages) {
            let ordinal = counts.entry(name.clone()).or_default();
            spaces.push(AddressSpace {
                name,
                ordinal: *ordinal,
                pages,
            });
            *ordinal += 1;
            if spaces.len() == SPACES_MAX {
                break;
            }
        }
    }
    spaces
}

/// The offsets in RAM of what look like top-level tables of processes, among the pages to be
/// considered, which are given as offsets too.
pub(crate) fn tops<'a, F: Fn(usize) -> bool>(
    linux: &Linux<'a>,
    consider: F,
) -> impl Iterator<Item = usize> + use<'a, F> {
    let ram = linux.ram;
    let entry = move |page: usize, index: u64| {
        let at = page.checked_add(index as usize * 8)?;
        let bytes = ram.bytes().get(at..at.checked_add(8)?)?;
        Some(u64::from_le_bytes(bytes.try_into().ok()?) & !TOUCHED)
    };
    // Of the kernel's own: its image, and its view of all RAM.
    let [kernel] = linux.variables(["init_top_pgt"]);
    let marks: Vec<(u64, u64)> = (ENTRIES / 2..ENTRIES)
        .filter_map(|index| Some((index, entry(kernel?, index)?)))
        .filter(|(_, value)| value & PRESENT != 0)
        .collect();
    let last = marks.last().copied().filter(|mark| mark.0 == ENTRIES - 1);
    let pages = if last.is_some() { ram.bytes().len() } else { 0 };
    (0..pages).step_by(PAGE as usize).filter(move |page| {
        consider(*page)
            && Some(*page) != kernel
            && last.is_some_and(|last| entry(*page, last.0) == Some(last.1))
            && {
                // Later changes to the kernel's half need not have reached every table.
                let alike = marks
                    .iter()
                    .filter(|(index, value)| entry(*page, *index) == Some(*value));
                alike.count() * 4 >= marks.len() * 3
            }
    })
}

/// The pages of RAM that the user's half of a top-level table leads to.
pub(crate) fn upper_tables(ram: &Physical<'_>, top: usize) -> Vec<usize> {
    (0..ENTRIES / 2)
        .filter_map(|index| ram.offset(table(ram, top as u64, index)?))
        .map(|offset| offset / PAGE as usize)
        .collect()
}

/// What may be read in all. A forged table can lead to itself, and each level then multiplies the
/// work by 512; of true ones each is a page of RAM and read once.
struct Budget {
    tables: usize,
    pages: usize,
}

impl Budget {
    fn of(ram: &Physical<'_>) -> Self {
        let pages = ram.bytes().len() / PAGE as usize;
        Self {
            tables: pages,
            pages: pages.saturating_mul(SHARED_MOST),
        }
    }

    fn table(&mut self) -> Option<()> {
        self.tables = self.tables.checked_sub(1)?;
        Some(())
    }

    fn page(&mut self) -> Option<()> {
        self.pages = self.pages.checked_sub(1)?;
        Some(())
    }
}

/// The user's half below a top-level table, in the order of addresses, as far as the budget goes.
fn walk(
    ram: &Physical<'_>,
    top: usize,
    pages: &mut Vec<(u64, u64)>,
    budget: &mut Budget,
) -> Option<()> {
    for first in 0..ENTRIES / 2 {
        let Some(second) = table(ram, top as u64, first) else {
            continue;
        };
        budget.table()?;
        for (index, third) in tables(ram, second) {
            let upper = (first << 27) | (index << 18);
            budget.table()?;
            for (index, fourth) in tables(ram, third) {
                budget.table()?;
                let upper = upper | (index << 9);
                for index in 0..ENTRIES {
                    let Some(entry) = ram.u64(fourth + index * 8) else {
                        break;
                    };
                    if entry & PRESENT == 0 {
                        continue;
                    }
                    if let Some(offset) = ram.offset(entry & ADDRESS) {
                        budget.page()?;
                        pages.push((upper | index, offset as u64 / PAGE));
                    }
                }
            }
        }
    }
    Some(())
}

/// The table that an entry leads to, from a table at an offset of the RAM file.
fn table(ram: &Physical<'_>, offset: u64, index: u64) -> Option<u64> {
    let at = (offset + index * 8) as usize;
    let bytes = ram.bytes().get(at..at + 8)?;
    follow(u64::from_le_bytes(bytes.try_into().ok()?))
}

fn tables(ram: &Physical<'_>, table: u64) -> Vec<(u64, u64)> {
    (0..ENTRIES)
        .filter_map(|index| Some((index, follow(ram.u64(table + index * 8)?)?)))
        .collect()
}

fn follow(entry: u64) -> Option<u64> {
    (entry & PRESENT != 0 && entry & LARGE == 0).then_some(entry & ADDRESS)
}

fn name(ram: &Physical<'_>, pages: &[(u64, u64)]) -> Option<Vec<u8>> {
    pages.iter().rev().take(NAME_PAGES).find_map(|(_, page)| {
        let start = page.checked_mul(PAGE)? as usize;
        let bytes = ram.bytes().get(start..start.checked_add(PAGE as usize)?)?;
        // Eight zeroes end the stack, and one the string before them.
        let text = bytes.strip_suffix(&[0; 9])?;
        let begin = text.iter().rposition(|byte| *byte == 0)? + 1;
        let text = text.get(begin..)?;
        let plausible = (2..NAME_MAX).contains(&text.len())
            && text.iter().all(|byte| (0x20..0x7f).contains(byte));
        plausible.then(|| text.to_vec())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    #[test]
    fn a_process_is_found_by_its_tables_and_named_by_its_stack() {
        let mut ram = testing::kernel();
        let spaces = |ram: &[u8]| address_spaces(&Linux::find(Physical::new(ram)).unwrap());
        let found = spaces(&ram);
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].name, testing::NAME);
        assert_eq!(found[0].ordinal, 0);
        assert_eq!(found[0].pages, testing::STACK);
        // A second of its name, and one whose stack has no name.
        let table = ram[0x10000..0x11000].to_vec();
        ram[0x17000..0x18000].copy_from_slice(&table);
        let found = spaces(&ram);
        assert_eq!(found.len(), 2);
        assert_eq!(found[1].ordinal, 1);
        assert_ne!(found[0].key(), found[1].key());
        ram[0x15000..0x16000].fill(0xff);
        assert_eq!(spaces(&ram), []);
    }

    #[test]
    fn tables_that_lead_to_themselves_are_not_followed_for_ever() {
        let mut ram = testing::kernel();
        // 256 * 512 * 512 ways lead to a last table, which has nothing in it, or everything.
        for last in [0, 0x11067_u64] {
            for (table, next) in [(0x10000, 0x11067), (0x11000, 0x12067), (0x12000, 0x13067)] {
                fill(&mut ram, table, next);
            }
            fill(&mut ram, 0x13000, last);
            let linux = Linux::find(Physical::new(&ram)).unwrap();
            let mut budget = Budget::of(&linux.ram);
            let (tables, most) = (budget.tables, budget.pages);
            let mut pages = Vec::new();
            assert_eq!(walk(&linux.ram, 0x10000, &mut pages, &mut budget), None);
            assert!(budget.tables == 0 && tables == ram.len() / 4096 || budget.pages == 0);
            assert!(pages.len() <= most);
        }
    }

    fn fill(ram: &mut [u8], table: usize, entry: u64) {
        for at in (table..table + 4096).step_by(8) {
            ram[at..at + 8].copy_from_slice(&entry.to_le_bytes());
        }
    }
}
