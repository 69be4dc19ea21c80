//! A kernel made up for tests: just the tables that are read, in a RAM of 192 KiB.

use crate::KERNEL_MAP;

/// Where the kernel lies in RAM; it was linked to lie at 0.
const BASE: u64 = 0x4000;

pub(crate) const CRNG: usize = 0xa000;
pub(crate) const READY: usize = 0xb000;
pub(crate) const JIFFIES: usize = 0xc000;
/// The figures of its scheduler, each with what it is for one processor; there are four.
pub(crate) const TURNS: usize = 0xc100;
/// The kernel's own top-level page table.
const TOP: usize = 0xd000;

/// Where a process's stack is, and the page below, in virtual pages and those of RAM.
pub(crate) const STACK: [(u64, u64); 2] = [(0x7_ffff_fffd, 0x14), (0x7_ffff_fffe, 0x15)];
/// Its name.
pub(crate) const NAME: &[u8] = b"/usr/bin/desk";

/// The time that it is.
pub(crate) const NOW: u64 = 0xffff_1234;

/// How large the RAM is.
pub(crate) const SIZE: usize = 0x30000;

/// Where the kernel's account of its pages is, and what its entries look like in Linux 6.1.
pub(crate) const MAP: usize = 0x18000;
pub(crate) const MAP_ENTRY: usize = 64;
pub(crate) const RESERVED: u64 = 1 << 12;
pub(crate) const SLAB: u64 = 1 << 9;
pub(crate) const SWAPBACKED: u64 = 1 << 19;
/// The text behind `VMCOREINFO`'s beginning.
pub(crate) const INFO: usize = 0x1018;
/// The image's text ends here, and the image.
pub(crate) const TEXT_END: usize = 0x6000;
pub(crate) const IMAGE_END: usize = 0x10000;
/// The lowest page of a kernel stack; the three that follow belong to it.
pub(crate) const KERNEL_STACK: usize = 0x24000;
/// A page that is in virtual memory after it, and one of a module's code.
pub(crate) const VMALLOC: usize = 0x28000;
pub(crate) const MODULE: usize = 0x29000;
/// Free from here on, with this many pages.
pub(crate) const FREE: (usize, u64) = (0x2c000, 4);
/// The list of memory nodes, what is kept of the only one, and in it of its first zone's free
/// blocks, by size.
pub(crate) const NODES: usize = 0x9000;
const NODE: usize = 0x9100;
const FREE_AREAS: usize = NODE + 256;
/// What its first zone has for each of two processors, and what that is without an offset.
pub(crate) const LISTS: [usize; 2] = [0x9e10, 0x9f00];
const PER_PROCESSOR: u64 = 0x100;
const PER_PROCESSOR_OFFSETS: usize = 0x9030;
const PROCESSORS: usize = 0x9040;
/// Not zero where free pages get a pattern.
pub(crate) const POISONING: usize = 0x9020;

/// Caches of `kmalloc` and one of something else, as addresses.
pub(crate) const CACHES: [u64; 2] = [DIRECT + 0xe100, DIRECT + 0xee00];
/// The table of the former, and the names of both.
pub(crate) const CACHE_TABLE: usize = 0x8000;
pub(crate) const CACHE_NAMES: [&str; 2] = ["kmalloc-1", "dentry"];
/// Where in a cache the address of its name is.
const CACHE_NAME: usize = 0x60;

/// The kernel's addresses of all RAM, of its large allocations, and of its account of pages.
const DIRECT: u64 = 0xffff_8880_0000_0000;
const LARGE: u64 = 0xffff_c900_0000_0000;
const ACCOUNT: u64 = 0xffff_ea00_0000_0000;
/// As Linux 6.1 has it.
const NUMBERS: &str = "LENGTH(mem_section)=4096\nSIZE(mem_section)=32\n\
    OFFSET(mem_section.section_mem_map)=0\nNUMBER(SECTION_SIZE_BITS)=27\nSIZE(page)=64\n\
    OFFSET(page.flags)=0\nOFFSET(page.mapping)=24\nOFFSET(page._mapcount)=48\n\
    OFFSET(page.private)=40\nOFFSET(page.compound_head)=8\nLENGTH(zone.free_area)=11\n\
    NUMBER(PG_private)=13\nNUMBER(PG_swapbacked)=19\nNUMBER(PG_slab)=9\n\
    NUMBER(PAGE_BUDDY_MAPCOUNT_VALUE)=-129\nNUMBER(PAGE_OFFLINE_MAPCOUNT_VALUE)=-257\n\
    OFFSET(page.lru)=8\nOFFSET(page._refcount)=52\nSIZE(zone)=1536\nSIZE(free_area)=88\nSIZE(list_head)=16\nOFFSET(zone.free_area)=256\n\
    OFFSET(free_area.free_list)=0\nLENGTH(free_area.free_list)=5\nLENGTH(node_data)=2\n\
    OFFSET(pglist_data.node_zones)=0\nOFFSET(pglist_data.nr_zones)=3328\n\
    NUMBER(pgtable_l5_enabled)=0\nNUMBER(KERNEL_IMAGE_SIZE)=1073741824\n";

/// An entry of the kernel's account of pages.
#[derive(Clone, Copy)]
pub(crate) struct Entry {
    pub(crate) flags: u64,
    /// Has its lowest bit set in pages that belong to one before.
    pub(crate) head: u64,
    pub(crate) mapping: u64,
    pub(crate) private: u64,
    pub(crate) mapcount: i32,
}

/// In use, for nothing that is known.
pub(crate) const USED: Entry = Entry {
    flags: 0,
    head: 0,
    mapping: 0,
    private: 0,
    mapcount: -1,
};

impl Entry {
    /// Writes it for the page at this offset.
    pub(crate) fn put(self, ram: &mut [u8], page: usize) {
        let at = MAP + page / 4096 * MAP_ENTRY;
        let fields = [
            (0, self.flags),
            (8, self.head),
            (24, self.mapping),
            (40, self.private),
        ];
        for (offset, value) in fields {
            ram[at + offset..][..8].copy_from_slice(&value.to_le_bytes());
        }
        ram[at + 48..][..4].copy_from_slice(&self.mapcount.to_le_bytes());
    }

    /// Puts pages into one of a processor's lists, which counts so many then.
    pub(crate) fn wait(
        self,
        ram: &mut [u8],
        lists: usize,
        list: usize,
        pages: &[usize],
        counted: u32,
    ) {
        let head = DIRECT + (lists + 24 + list * 16) as u64;
        let entries = pages.iter().map(|page| {
            self.put(ram, *page);
            ACCOUNT + (*page / 4096 * MAP_ENTRY) as u64 + 8
        });
        let ring: Vec<u64> = std::iter::once(head).chain(entries).collect();
        let place = |at: u64| {
            let at = at
                .checked_sub(ACCOUNT)
                .map_or(at.wrapping_sub(DIRECT), |at| at + MAP as u64);
            at as usize
        };
        for (number, at) in ring.iter().enumerate() {
            let next = ring[(number + 1) % ring.len()];
            ram[place(*at)..][..8].copy_from_slice(&next.to_le_bytes());
            ram[place(next) + 8..][..8].copy_from_slice(&at.to_le_bytes());
        }
        ram[lists + 4..][..4].copy_from_slice(&counted.to_le_bytes());
    }

    /// One that belongs to the page at this offset.
    pub(crate) fn tail_of(page: usize) -> Self {
        Self {
            head: ACCOUNT + (page / 4096 * MAP_ENTRY) as u64 + 1,
            ..USED
        }
    }
}

/// The table's tokens: one a letter, so that names are written as they are.
fn token_tables() -> (Vec<u8>, Vec<u8>) {
    let (mut table, mut index) = (Vec::new(), Vec::new());
    for byte in 0..=255_u8 {
        index.extend_from_slice(&(table.len() as u16).to_le_bytes());
        table.extend_from_slice(&[byte.max(1), 0]);
    }
    (table, index)
}

/// A kernel that was seeded five seconds ago.
pub(crate) fn kernel() -> Vec<u8> {
    let mut ram = vec![0; SIZE];
    let mut put = |at: usize, bytes: &[u8]| ram[at..at + bytes.len()].copy_from_slice(bytes);
    let (table, index) = token_tables();
    let symbols = [
        ("T_text", 0x4000),
        ("T_etext", TEXT_END),
        ("bbase_crng", CRNG),
        ("dcrng_init", READY),
        ("Djiffies_64", JIFFIES),
        ("Dinit_top_pgt", TOP),
        ("Dvmalloc_base", 0xc008),
        ("B_end", IMAGE_END),
        ("Bkmalloc_caches", CACHE_TABLE),
        ("dsysctl_sched_latency", TURNS),
        ("dnormalized_sysctl_sched_latency", TURNS + 4),
        ("dsysctl_sched_min_granularity", TURNS + 8),
        ("dnormalized_sysctl_sched_min_granularity", TURNS + 12),
        ("dsysctl_sched_wakeup_granularity", TURNS + 16),
        ("dnormalized_sysctl_sched_wakeup_granularity", TURNS + 20),
        ("D_page_poisoning_enabled", POISONING),
        ("d__per_cpu_offset", PER_PROCESSOR_OFFSETS),
        ("Dnr_cpu_ids", PROCESSORS),
    ];
    let mut names = Vec::new();
    let mut offsets = Vec::new();
    for (name, at) in symbols {
        names.push(name.len() as u8);
        names.extend_from_slice(name.as_bytes());
        // Counted down from the base, see `Kallsyms::address`.
        let offset = -1 - (at as u64 - BASE).cast_signed();
        offsets.extend_from_slice(&(offset as i32).to_le_bytes());
    }
    let parts: [(&str, usize, Vec<u8>); 6] = [
        ("kallsyms_num_syms", 0x5000, 18_u32.to_le_bytes().to_vec()),
        (
            "kallsyms_relative_base",
            0x5008,
            KERNEL_MAP.to_le_bytes().to_vec(),
        ),
        ("kallsyms_offsets", 0x5100, offsets),
        ("kallsyms_names", 0x5200, names),
        ("kallsyms_token_table", 0x6000, table),
        ("kallsyms_token_index", 0x7000, index),
    ];
    let mut text = format!("OSRELEASE=6.1.0-test\nNUMBER(phys_base)={BASE}\n{NUMBERS}");
    text += &format!("SYMBOL(mem_section)={:x}\n", DIRECT + 0x1a000);
    let top = KERNEL_MAP + TOP as u64 - BASE;
    text += &format!("SYMBOL(init_top_pgt)={top:x}\n");
    let nodes = KERNEL_MAP + NODES as u64 - BASE;
    text += &format!("SYMBOL(node_data)={nodes:x}\n");
    for (name, at, bytes) in parts {
        put(at, &bytes);
        let address = KERNEL_MAP + at as u64 - BASE;
        text += &format!("SYMBOL({name})={address:x}\n");
    }
    put(INFO, text.as_bytes());
    put(0xc008, &LARGE.to_le_bytes());
    put(CRNG, &[0x5e; 32]);
    put(CRNG + 32, &(NOW - 5 * 250).to_le_bytes());
    put(READY, &2_u32.to_le_bytes());
    put(JIFFIES, &NOW.to_le_bytes());
    for (index, figure) in [6_000_000_u32, 750_000, 1_000_000].into_iter().enumerate() {
        put(TURNS + index * 8, &(3 * figure).to_le_bytes());
        put(TURNS + index * 8 + 4, &figure.to_le_bytes());
    }
    // The kernel's half of all top-level tables, and what it leads to: all RAM in one large page,
    // and tables of small ones.
    for top in [TOP, 0x10000] {
        let mut link = |address: u64, next: u64| put(top + slot(address, 39) * 8, &entry(next));
        link(DIRECT, 0x1b063);
        link(LARGE, 0x1c063);
        link(ACCOUNT, 0x1f063);
        link(KERNEL_MAP, 0x22063);
    }
    let modules = KERNEL_MAP + (1 << 30);
    let links: [(usize, u64, u32, u64); 14] = [
        (0x1b000, DIRECT, 30, 0xe3),
        (0x1c000, LARGE, 30, 0x1d063),
        (0x1d000, LARGE, 21, 0x1e063),
        (0x1e000, LARGE + 0x4000, 12, KERNEL_STACK as u64 | 0x63),
        (
            0x1e000,
            LARGE + 0x5000,
            12,
            (KERNEL_STACK + 0x1000) as u64 | 0x63,
        ),
        (
            0x1e000,
            LARGE + 0x6000,
            12,
            (KERNEL_STACK + 0x2000) as u64 | 0x63,
        ),
        (
            0x1e000,
            LARGE + 0x7000,
            12,
            (KERNEL_STACK + 0x3000) as u64 | 0x63,
        ),
        (0x1e000, LARGE + 0x9000, 12, VMALLOC as u64 | 1 << 63 | 0x63),
        (0x1f000, ACCOUNT, 30, 0x20063),
        (0x20000, ACCOUNT, 21, 0x21063),
        (0x21000, ACCOUNT, 12, MAP as u64 | 0x63),
        (0x22000, modules, 30, 0x23063),
        (0x23000, modules, 21, 0x2a063),
        (0x2a000, modules, 12, MODULE as u64 | 0x61),
    ];
    for (table, address, shift, next) in links {
        put(table + slot(address, shift) * 8, &entry(next));
    }
    put(KERNEL_STACK, &0x57ac_6e9d_u64.to_le_bytes());
    // The sections of memory: a root, and in it one that lists the account.
    put(0x1a000, &(DIRECT + 0x1a800).to_le_bytes());
    put(0x1a800, &(ACCOUNT | 0xf).to_le_bytes());
    // Caches, and their names; the first place of the table is empty.
    for number in 1..=14 {
        let (cache, name) = (0xe000 + number * 0x100, 0xf000 + number * 0x40);
        let text = if number < 14 {
            put(CACHE_TABLE + number * 8, &entry(DIRECT + cache as u64));
            format!("kmalloc-{number}")
        } else {
            CACHE_NAMES[1].to_owned()
        };
        put(name, text.as_bytes());
        put(cache + CACHE_NAME, &entry(DIRECT + name as u64));
    }
    // Its memory: one node with two zones, of which the second is empty.
    put(NODES, &(DIRECT + NODE as u64).to_le_bytes());
    put(NODE + 3328, &2_u32.to_le_bytes());
    put(PROCESSORS, &2_u32.to_le_bytes());
    put(NODE + 0x40, &PER_PROCESSOR.to_le_bytes());
    for (processor, lists) in LISTS.into_iter().enumerate() {
        let offset = DIRECT + lists as u64 - PER_PROCESSOR;
        put(PER_PROCESSOR_OFFSETS + processor * 8, &offset.to_le_bytes());
        // A lock, a number of pages, some limits; and lists of which each is empty.
        put(lists + 8, &[0x3f, 0, 0, 0, 0x20, 0, 0, 0, 1, 0, 0, 0]);
        for head in (lists + 24..).step_by(16).take(13) {
            let at = DIRECT + head as u64;
            put(head, &at.to_le_bytes());
            put(head + 8, &at.to_le_bytes());
        }
    }
    let order = FREE.1.trailing_zeros() as usize;
    put(FREE_AREAS + order * 88 + 80, &1_u64.to_le_bytes());
    // A process: four tables, and a stack with its name at the top.
    let mut table = 0x10000;
    for (level, next) in [(27, 0x11000), (18, 0x12000), (9, 0x13000)] {
        let index = (STACK[0].0 >> level) as usize & 511;
        put(table + index * 8, &entry(next as u64 | 0x67));
        table = next;
    }
    for (number, page) in STACK {
        let value = 1 << 63 | page << 12 | 0x67;
        put(table + (number as usize & 511) * 8, &entry(value));
    }
    let end = 0x16000 - 9;
    put(end - NAME.len(), NAME);
    account(&mut ram);
    ram
}

/// The kernel's account of its pages.
fn account(ram: &mut [u8]) {
    let reserved = Entry {
        flags: RESERVED,
        ..USED
    };
    for page in (0..SIZE).step_by(4096) {
        let early = page < IMAGE_END || (MAP..0x24000).contains(&page);
        if early { reserved } else { USED }.put(ram, page);
    }
    for (_, page) in STACK {
        let anonymous = Entry {
            flags: SWAPBACKED,
            mapping: DIRECT + 0x701,
            mapcount: 0,
            ..USED
        };
        anonymous.put(ram, page as usize * 4096);
    }
    let table = Entry {
        mapcount: !0x200,
        ..USED
    };
    table.put(ram, 0x12000);
    table.put(ram, 0x13000);
    let free = Entry {
        mapcount: !0x80,
        private: u64::from(FREE.1.trailing_zeros()),
        ..USED
    };
    free.put(ram, FREE.0);
}

fn entry(value: u64) -> [u8; 8] {
    value.to_le_bytes()
}

fn slot(address: u64, shift: u32) -> usize {
    (address >> shift) as usize & 511
}
