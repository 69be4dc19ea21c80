//! Which kernel objects a slab page holds, by the name of its cache: `dentry`, `vm_area_struct`.
//!
//! A slab's `struct page` has a pointer to its cache, and that one to its name (`struct slab` in
//! `mm/slab.h`, `struct kmem_cache` in `include/linux/slub_def.h`). Where in them is written
//! nowhere that a guest without debugging information has. But some caches are known beforehand:
//! those of `kmalloc`, which the kernel keeps in a table of a known name, and which are called
//! `kmalloc-` and a size. Where all of those have such a name, that is where names are; and where
//! slabs point at one of those, that is where slabs point at their cache.

use std::collections::{HashMap, HashSet};

use crate::kinds::{Kind, PageKinds};
use crate::memory_map::MemoryMap;
use crate::physical::Physical;
use crate::tables::Tables;
use crate::{Linux, kinds};

const PAGE: u64 = 4096;

/// The table's first row: a cache for each power of two up to 8 KiB, and two for sizes between.
const KNOWN_MOST: usize = 14;
/// So many of them are not by chance.
const KNOWN_LEAST: usize = 6;
/// A name is within so many words of a cache's beginning.
const CACHE_WORDS: u64 = 32;
/// Slab pages are asked for their cache up to this number, to learn where it is.
const SAMPLE: usize = 4096;
/// No kernel has more caches.
const CACHES_MAX: usize = 4096;
const NAME_MAX: u64 = 64;

/// The caches of a RAM's slab pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slabs {
    names: Vec<String>,
    /// One more than the number of a page's name; 0 for none.
    pages: Vec<u16>,
    /// Where those caches are that have a name, as virtual addresses.
    caches: Vec<u64>,
}

impl Slabs {
    /// The name of the cache that a page belongs to, by its place in the RAM file.
    pub fn name(&self, page: u64) -> Option<&str> {
        let number = self
            .pages
            .get(usize::try_from(page).ok()?)?
            .checked_sub(1)?;
        self.names.get(usize::from(number)).map(String::as_str)
    }

    /// The addresses of all caches that have pages.
    pub(crate) fn caches(&self) -> &[u64] {
        &self.caches
    }

    /// The names of all caches that have pages, each once.
    pub fn names(&self) -> &[String] {
        &self.names
    }
}

/// The caches of all slab pages; `None` where the kernel doesn't show where it keeps them.
pub fn of(linux: &Linux<'_>, kinds: &PageKinds) -> Option<Slabs> {
    let memory = Kernel {
        ram: linux.ram,
        tables: Tables::of(linux)?,
    };
    let mut map = MemoryMap::of(linux, memory.tables)?;
    let known = memory.known(linux)?;
    let name_at = memory.name_place(&known)?;
    let slabs: Vec<usize> = (0..kinds.all().len())
        .filter(|page| kinds.all()[*page] == Kind::Slab)
        .collect();
    let physical = |page: usize| linux.ram.address(page * PAGE as usize);
    let known: HashSet<u64> = known.into_iter().collect();
    let mut hits = vec![0; map.words() as usize];
    for page in slabs.iter().take(SAMPLE) {
        for (number, hits) in hits.iter_mut().enumerate() {
            let word = map.word(physical(*page), number as u64);
            *hits += usize::from(word.is_some_and(|word| known.contains(&word)));
        }
    }
    let (cache_at, most) = hits.into_iter().enumerate().max_by_key(|(_, hits)| *hits)?;
    if most == 0 {
        return None;
    }
    let mut found = Slabs {
        names: Vec::new(),
        pages: vec![0; kinds.all().len()],
        caches: Vec::new(),
    };
    // Caches by address, and names by number: some caches are called alike.
    let mut caches: HashMap<u64, u16> = HashMap::new();
    for page in slabs {
        let Some(cache) = map.word(physical(page), cache_at as u64) else {
            continue;
        };
        let number = match caches.get(&cache) {
            Some(number) => *number,
            None if caches.len() == CACHES_MAX => 0,
            None => {
                let name = memory.name(cache, name_at);
                let number = name.map_or(0, |name| {
                    let same = found.names.iter().position(|known| *known == name);
                    same.unwrap_or_else(|| {
                        found.names.push(name);
                        found.names.len() - 1
                    }) as u16
                        + 1
                });
                caches.insert(cache, number);
                if number > 0 {
                    found.caches.push(cache);
                }
                number
            }
        };
        found.pages[page] = number;
    }
    Some(found)
}

/// The kernel's memory, by virtual address.
pub(crate) struct Kernel<'a> {
    pub(crate) ram: Physical<'a>,
    pub(crate) tables: Tables<'a>,
}

impl Kernel<'_> {
    pub(crate) fn word(&self, address: u64) -> Option<u64> {
        self.ram.u64(self.tables.translate(address)?)
    }

    /// The addresses of caches whose names are known.
    fn known(&self, linux: &Linux<'_>) -> Option<Vec<u64>> {
        let [table] = linux.variables(["kmalloc_caches"]);
        let row = self
            .ram
            .read(self.ram.address(table?), KNOWN_MOST * 8)?
            .as_chunks()
            .0
            .iter()
            .map(|word| u64::from_le_bytes(*word))
            .filter(|cache| *cache != 0)
            .collect::<Vec<_>>();
        (row.len() >= KNOWN_LEAST).then_some(row)
    }

    /// In which word of a cache its name is.
    fn name_place(&self, known: &[u64]) -> Option<u64> {
        (0..CACHE_WORDS).find(|number| {
            known.iter().all(|cache| {
                let name = self.name(*cache, *number);
                name.is_some_and(|name| name.starts_with("kmalloc-"))
            })
        })
    }

    /// The name of a cache, if it is one.
    fn name(&self, cache: u64, place: u64) -> Option<String> {
        let start = self.word(cache.checked_add(place * 8)?)?;
        let mut name = String::new();
        for offset in 0..NAME_MAX {
            let byte = *self
                .ram
                .read(self.tables.translate(start.checked_add(offset)?)?, 1)?
                .first()?;
            match byte {
                0 => return (!name.is_empty()).then_some(name),
                0x21..0x7f => name.push(char::from(byte)),
                _ => return None,
            }
        }
        None
    }
}

/// The same, of a guest of which nothing is known yet.
pub fn find(ram: Physical<'_>) -> Option<Slabs> {
    let linux = Linux::find(ram)?;
    of(&linux, &kinds::of(&linux)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{self, CACHE_NAMES, CACHE_TABLE, CACHES, Entry, USED};

    fn slab(cache: u64) -> Entry {
        Entry {
            flags: testing::SLAB,
            // Linux 6.1 has it where others have the page that they belong to.
            head: cache,
            ..USED
        }
    }

    /// Two slabs, one of which has two pages.
    fn kernel() -> Vec<u8> {
        let mut ram = testing::kernel();
        slab(CACHES[0]).put(&mut ram, 0x14000);
        slab(CACHES[1]).put(&mut ram, 0x16000);
        Entry::tail_of(0x16000).put(&mut ram, 0x17000);
        ram
    }

    #[test]
    fn slabs_are_named_by_their_cache() {
        let slabs = find(Physical::new(&kernel())).unwrap();
        assert_eq!(slabs.name(0x14), Some(CACHE_NAMES[0]));
        assert_eq!(slabs.name(0x15), None);
        assert_eq!(slabs.name(0x16), Some(CACHE_NAMES[1]));
        assert_eq!(slabs.name(0x17), Some(CACHE_NAMES[1]));
        assert_eq!(slabs.name(u64::MAX), None);
        assert_eq!(slabs.names(), CACHE_NAMES);
    }

    #[test]
    fn where_no_known_cache_is_seen_no_slab_is_named() {
        let mut unseen = kernel();
        slab(CACHES[1]).put(&mut unseen, 0x14000);
        let mut few = kernel();
        few[CACHE_TABLE + 6 * 8..CACHE_TABLE + 14 * 8].fill(0);
        let mut misnamed = kernel();
        misnamed[0xf0c0] = b'x';
        for ram in [unseen, few, misnamed] {
            assert_eq!(find(Physical::new(&ram)), None);
        }
    }

    #[test]
    fn a_slab_of_no_cache_has_no_name() {
        let mut ram = kernel();
        for cache in [0, 2, CACHES[1] + 8, 0xdead_0000_0000_0100] {
            slab(cache).put(&mut ram, 0x16000);
            let slabs = find(Physical::new(&ram)).unwrap();
            assert_eq!(slabs.name(0x16), None);
            assert_eq!(slabs.name(0x14), Some(CACHE_NAMES[0]));
        }
    }
}
