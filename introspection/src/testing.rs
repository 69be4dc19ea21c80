//! A kernel made up for tests: just the tables that are read, in a RAM of 128 KiB.

use crate::KERNEL_MAP;

/// Where the kernel lies in RAM; it was linked to lie at 0.
const BASE: u64 = 0x4000;

pub(crate) const CRNG: usize = 0xa000;
pub(crate) const READY: usize = 0xb000;
pub(crate) const JIFFIES: usize = 0xc000;
/// The kernel's own top-level page table.
const TOP: usize = 0xd000;

/// Where a process's stack is, and the page below, in virtual pages and those of RAM.
pub(crate) const STACK: [(u64, u64); 2] = [(0x7_ffff_fffd, 0x14), (0x7_ffff_fffe, 0x15)];
/// Its name.
pub(crate) const NAME: &[u8] = b"/usr/bin/desk";

/// The time that it is.
pub(crate) const NOW: u64 = 0xffff_1234;

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
    let mut ram = vec![0; 0x20000];
    let mut put = |at: usize, bytes: &[u8]| ram[at..at + bytes.len()].copy_from_slice(bytes);
    let (table, index) = token_tables();
    let symbols = [
        ("Tstartup", 0x4000),
        ("bbase_crng", CRNG),
        ("dcrng_init", READY),
        ("Djiffies_64", JIFFIES),
        ("Dinit_top_pgt", TOP),
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
        ("kallsyms_num_syms", 0x5000, 5_u32.to_le_bytes().to_vec()),
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
    let mut text = format!("OSRELEASE=6.1.0-test\nNUMBER(phys_base)={BASE}\n");
    for (name, at, bytes) in parts {
        put(at, &bytes);
        let address = KERNEL_MAP + at as u64 - BASE;
        text += &format!("SYMBOL({name})={address:x}\n");
    }
    put(0x1018, text.as_bytes());
    put(CRNG, &[0x5e; 32]);
    put(CRNG + 32, &(NOW - 5 * 250).to_le_bytes());
    put(READY, &2_u32.to_le_bytes());
    put(JIFFIES, &NOW.to_le_bytes());
    // A process: four tables, and a stack with its name at the top.
    let kernel = 0x0123_4063_u64.to_le_bytes();
    put(TOP + 511 * 8, &kernel);
    put(0x10000 + 511 * 8, &kernel);
    let mut table = 0x10000;
    for (level, next) in [(27, 0x11000), (18, 0x12000), (9, 0x13000)] {
        let index = (STACK[0].0 >> level) as usize & 511;
        put(table + index * 8, &(next as u64 | 0x67).to_le_bytes());
        table = next;
    }
    for (number, page) in STACK {
        let entry = 1 << 63 | page << 12 | 0x67;
        put(table + (number as usize & 511) * 8, &entry.to_le_bytes());
    }
    let end = 0x16000 - 9;
    put(end - NAME.len(), NAME);
    ram
}
