//! The kernel's table of its own symbols, as `/proc/kallsyms` shows it.
//!
//! Names are packed: each is a length and as many bytes, each of which stands for a piece of text
//! from a table of 256. Addresses are 32-bit offsets to a common base; on x86-64 those of per-CPU
//! variables are not negative and absolute, all others count down from the base
//! (`kernel/kallsyms.c` and `scripts/kallsyms.c` of Linux 6.x).

use crate::physical::Physical;
use crate::vmcoreinfo::Vmcoreinfo;

/// More symbols than any kernel has.
const SYMBOLS_MAX: u32 = 1 << 20;

/// A name is no longer (`KSYM_NAME_LEN`, and the letter of its type).
const NAME_MAX: usize = 513;

/// Where the parts of the table are, as physical addresses.
#[derive(Debug)]
pub(crate) struct Kallsyms {
    count: u32,
    relative_base: u64,
    offsets: u64,
    names: u64,
    tokens: Vec<Vec<u8>>,
}

impl Kallsyms {
    pub(crate) fn locate(ram: &Physical<'_>, info: &Vmcoreinfo) -> Option<Self> {
        let count = ram.u32(info.symbol("kallsyms_num_syms")?)?;
        if count == 0 || count > SYMBOLS_MAX {
            return None;
        }
        let index = ram.read(info.symbol("kallsyms_token_index")?, 512)?;
        let table = info.symbol("kallsyms_token_table")?;
        let tokens = index
            .as_chunks()
            .0
            .iter()
            .map(|at| token(ram, table.checked_add(u64::from(u16::from_le_bytes(*at)))?))
            .collect::<Option<_>>()?;
        Some(Self {
            count,
            relative_base: ram.u64(info.symbol("kallsyms_relative_base")?)?,
            offsets: info.symbol("kallsyms_offsets")?,
            names: info.symbol("kallsyms_names")?,
            tokens,
        })
    }

    /// The virtual addresses of symbols, each the first of its name.
    pub(crate) fn addresses<const N: usize>(
        &self,
        ram: &Physical<'_>,
        wanted: [&str; N],
    ) -> [Option<u64>; N] {
        let mut found = [None; N];
        let mut at = self.names;
        let mut name = Vec::with_capacity(NAME_MAX);
        for index in 0..self.count {
            let Some(next) = self.expand(ram, at, &mut name) else {
                break;
            };
            at = next;
            // The first letter is the symbol's type.
            let position = wanted
                .iter()
                .position(|wanted| name.get(1..) == Some(wanted.as_bytes()));
            if let Some(position) = position
                && found[position].is_none()
            {
                found[position] = self.address(ram, index);
                if found.iter().all(Option::is_some) {
                    break;
                }
            }
        }
        found
    }

    /// Unpacks the name at this address; the address of the next one.
    fn expand(&self, ram: &Physical<'_>, at: u64, name: &mut Vec<u8>) -> Option<u64> {
        name.clear();
        let byte = |at| Some(ram.read(at, 1)?[0]);
        let mut length = usize::from(byte(at)?);
        let mut from = at.checked_add(1)?;
        // A second byte where seven bits don't do.
        if length & 0x80 != 0 {
            length = (length & 0x7f) | usize::from(byte(from)?) << 7;
            from = from.checked_add(1)?;
        }
        if length == 0 || length > NAME_MAX {
            return None;
        }
        for piece in ram.read(from, length)? {
            name.extend_from_slice(&self.tokens[usize::from(*piece)]);
            if name.len() > NAME_MAX {
                return None;
            }
        }
        from.checked_add(length as u64)
    }

    fn address(&self, ram: &Physical<'_>, index: u32) -> Option<u64> {
        let offset = ram.u32(self.offsets.checked_add(u64::from(index) * 4)?)?;
        let offset = offset.cast_signed();
        if offset >= 0 {
            return Some(u64::from(offset.unsigned_abs()));
        }
        Some(
            self.relative_base
                .wrapping_sub(1)
                .wrapping_sub_signed(i64::from(offset)),
        )
    }
}

/// A piece of text, which ends with a zero.
fn token(ram: &Physical<'_>, at: u64) -> Option<Vec<u8>> {
    let mut text = Vec::new();
    for offset in 0..NAME_MAX as u64 {
        match ram.read(at.checked_add(offset)?, 1)?[0] {
            0 => return Some(text),
            byte => text.push(byte),
        }
    }
    None
}
