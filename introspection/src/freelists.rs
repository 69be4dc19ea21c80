//! In which order the slab allocator gives out the places of a new slab.
//!
//! Linux begins at a random one and follows a random order that it keeps for each cache
//! (`CONFIG_SLAB_FREELIST_RANDOM`, `shuffle_freelist` in `mm/slub.c`). A replay draws the same random
//! numbers as the original did, but not always for the same purpose: a process that starts a
//! little earlier takes the one that was meant for a slab, and from there on all slabs begin
//! elsewhere. A cache without such an order gives out its places one after the other, and draws
//! no numbers for it.
//!
//! Where in a `struct kmem_cache` the order is kept is written nowhere that a guest without
//! debugging information has. But nothing else looks like it: an array of the offsets of all
//! places of a slab, each once (`init_cache_random_seq`), of which size and number are in the
//! same structure (`size`, and `oo`: the order of a slab's pages and its number of places).

use std::collections::HashSet;

use crate::slabs::Kernel;
use crate::tables::Tables;
use crate::{Linux, Physical, kinds, slabs};

const PAGE: u32 = 4096;
/// The structure takes 200 to 500 bytes; the address of the order is within these. So may be that
/// of the cache behind it, which is as good.
const CACHE_WORDS: u64 = 64;
/// The most pages of a slab (`MAX_ORDER` of the page allocator), as a power of two.
const ORDER_MAX: u32 = 10;
/// How the number of places is told from the order of pages (`OO_SHIFT`).
const PLACES_BITS: u32 = 16;

/// Offsets in RAM of the addresses of those orders, 8 bytes each, of all caches that have slabs,
/// and of those that lie right behind one.
///
/// Where such a word is zero, the cache has no random order. None are found in a guest that is
/// no Linux of this kind, or has none.
pub fn random_orders(ram: &[u8]) -> Vec<usize> {
    let found = || {
        let linux = Linux::find(Physical::new(ram))?;
        let kinds = kinds::of(&linux)?;
        let caches = slabs::of(&linux, &kinds)?;
        let kernel = Kernel {
            ram: linux.ram,
            tables: Tables::of(&linux)?,
        };
        let mut orders: Vec<usize> = caches
            .caches()
            .iter()
            .flat_map(|cache| orders_of(&kernel, *cache))
            .collect();
        orders.sort_unstable();
        orders.dedup();
        Some(orders)
    };
    found().unwrap_or_default()
}

/// Where in RAM the address of this cache's order is, and that of the cache behind it.
fn orders_of(kernel: &Kernel<'_>, cache: u64) -> Vec<usize> {
    let address = |number: u64| cache.checked_add(number * 8);
    let words: Vec<u64> = (0..CACHE_WORDS)
        .map_while(|number| kernel.word(address(number)?))
        .collect();
    let slabs = layouts(&words);
    let is_order = |at: u64| {
        slabs
            .iter()
            .any(|(size, places)| is_order(kernel, at, *size, *places))
    };
    let place = |number: usize| {
        let at = kernel.tables.translate(address(number as u64)?)?;
        kernel.ram.offset(at)
    };
    let words = words.iter().enumerate();
    words
        .filter(|(_, word)| is_order(**word))
        .filter_map(|(number, _)| place(number))
        .collect()
}

/// What size and number of a slab's places may be, by the numbers of a structure.
fn layouts(words: &[u64]) -> HashSet<(u32, u32)> {
    let halves = || {
        words
            .iter()
            .flat_map(|word| [*word as u32, (*word >> 32) as u32])
    };
    let sizes: HashSet<u32> = halves()
        .filter(|size| size % 8 == 0 && (8..=PAGE << (ORDER_MAX - 1)).contains(size))
        .collect();
    let mut found = HashSet::new();
    for word in halves() {
        let (order, places) = (word >> PLACES_BITS, word & ((1 << PLACES_BITS) - 1));
        if order > ORDER_MAX || places < 2 {
            continue;
        }
        let fits = |size: &&u32| (PAGE << order) / **size == places;
        found.extend(sizes.iter().filter(fits).map(|size| (*size, places)));
    }
    found
}

/// Whether the offsets of so many places of this size are there, each once.
fn is_order(kernel: &Kernel<'_>, at: u64, size: u32, places: u32) -> bool {
    let mut seen = vec![false; places as usize];
    (0..u64::from(places)).all(|number| {
        let bytes = at.checked_add(number * 4).and_then(|at| {
            let at = kernel.tables.translate(at)?;
            kernel.ram.read(at, 4)?.try_into().ok()
        });
        let Some(offset) = bytes.map(u32::from_le_bytes) else {
            return false;
        };
        let place = seen.get_mut((offset / size) as usize);
        offset % size == 0 && place.is_some_and(|seen| !std::mem::replace(seen, true))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{self, CACHES, Entry, USED};

    /// Where the order of the first cache is, in its place, and what it is.
    const PLACE: usize = 0xe100 + 0x80;
    const ORDER: usize = 0xb100;

    fn kernel(order: [u32; 4]) -> Vec<u8> {
        let mut ram = testing::kernel();
        for (cache, page) in [(CACHES[0], 0x14000), (CACHES[1], 0x16000)] {
            let slab = Entry {
                flags: testing::SLAB,
                head: cache,
                ..USED
            };
            slab.put(&mut ram, page);
        }
        let mut put = |at: usize, bytes: &[u8]| ram[at..at + bytes.len()].copy_from_slice(bytes);
        put(0xe100 + 0x18, &1024_u32.to_le_bytes());
        put(0xe100 + 0x28, &4_u32.to_le_bytes());
        put(PLACE, &(CACHES[0] - 0xe100 + ORDER as u64).to_le_bytes());
        for (number, offset) in order.into_iter().enumerate() {
            put(ORDER + number * 4, &offset.to_le_bytes());
        }
        ram
    }

    #[test]
    fn a_random_order_is_found_by_what_it_is() {
        let mut ram = kernel([2048, 0, 3072, 1024]);
        assert_eq!(random_orders(&ram), [PLACE]);
        ram[PLACE..PLACE + 8].fill(0);
        assert_eq!(random_orders(&ram), []);
    }

    #[test]
    fn what_is_no_order_is_left_alone() {
        for other in [
            [2048, 0, 2048, 1024],
            [2048, 0, 3072, 4096],
            [2048, 0, 3072, 1025],
            [0; 4],
        ] {
            assert_eq!(random_orders(&kernel(other)), [], "{other:?}");
        }
        assert_eq!(random_orders(&[0; 4096]), []);
    }
}
