//! Synthetic guests: 60 % of pages in use, half of them text-like, half records of small integers
//! and pointers. The same in every run.

use reconciler::PAGE_SIZE;

/// xorshift: the same image in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

fn fill(page: &mut [u8], random: &mut Random) {
    const WORDS: [&[u8]; 8] = [
        b"the ",
        b"page ",
        b"of ",
        b"static ",
        b"int ",
        b"return ",
        b"\0\0\0\0",
        b"linux\n",
    ];
    if random.next() & 1 == 0 {
        let mut at = 0;
        while at < page.len() {
            let word = WORDS[(random.next() % 8) as usize];
            let len = word.len().min(page.len() - at);
            page[at..at + len].copy_from_slice(&word[..len]);
            at += len;
        }
    } else {
        for record in page.as_chunks_mut::<32>().0 {
            let pointer = 0xffff_8880_0000_0000 | (random.next() & 0x3fff_ffc0);
            record[..8].copy_from_slice(&pointer.to_le_bytes());
            record[8] = random.next() as u8;
            record[16..18].copy_from_slice(&(random.next() as u16).to_le_bytes());
        }
    }
}

/// A guest's RAM.
pub(crate) fn guest(pages: usize) -> Vec<u8> {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut bytes = vec![0; pages * PAGE_SIZE];
    for page in bytes.chunks_mut(PAGE_SIZE) {
        if random.next() % 10 < 6 {
            fill(page, &mut random);
        }
    }
    bytes
}

/// Every `step`-th page changes: a few words, or altogether.
pub(crate) fn used(base: &[u8], step: u64, seed: u64) -> Vec<u8> {
    let mut random = Random(seed);
    let mut bytes = base.to_vec();
    for page in bytes.chunks_mut(PAGE_SIZE) {
        match random.next() % (step * 2) {
            0 => fill(page, &mut random),
            1 => {
                for _ in 0..8 {
                    let at = (random.next() as usize % 512) * 8;
                    page[at..at + 8].copy_from_slice(&random.next().to_le_bytes());
                }
            }
            _ => {}
        }
    }
    bytes
}
