//! VMCOREINFO: lines of text that a kernel keeps for whoever reads its memory from outside.

use std::collections::HashMap;

use memchr::memmem;

use crate::KERNEL_MAP;

/// The kernel keeps it within a page (`VMCOREINFO_BYTES`).
const LENGTH_MAX: usize = 4096;

/// Places where the beginning of the text may stand by chance, or as a copy, are tried up to
/// this number.
const CANDIDATES_MAX: usize = 64;

const BEGINNING: &[u8] = b"OSRELEASE=";

/// What of it is of use here.
#[derive(Debug)]
pub(crate) struct Vmcoreinfo {
    release: String,
    symbols: HashMap<String, u64>,
    /// Sizes, offsets, lengths and numbers, by all that stands before the `=`.
    numbers: HashMap<String, i64>,
    phys_base: u64,
}

/// All texts in RAM that could be it.
pub(crate) fn candidates(ram: &[u8]) -> impl Iterator<Item = Vmcoreinfo> {
    memmem::find_iter(ram, BEGINNING)
        .take(CANDIDATES_MAX)
        .filter_map(|start| {
            let end = ram.len().min(start + LENGTH_MAX);
            Vmcoreinfo::parse(ram.get(start..end)?)
        })
}

impl Vmcoreinfo {
    /// Reads it from the beginning of `bytes`, up to the first that is no text.
    fn parse(bytes: &[u8]) -> Option<Self> {
        let text = bytes.split(|byte| *byte == 0).next()?;
        let text = std::str::from_utf8(text).ok()?;
        let mut info = Self {
            release: String::new(),
            symbols: HashMap::new(),
            numbers: HashMap::new(),
            phys_base: 0,
        };
        let mut based = false;
        for line in text.lines() {
            let Some((key, value)) = line.split_once('=') else {
                continue;
            };
            if key == "OSRELEASE" {
                value.clone_into(&mut info.release);
            } else if key == "NUMBER(phys_base)" {
                // Negative where the kernel lies below where it was linked to.
                info.phys_base = value.parse::<i64>().ok()?.cast_unsigned();
                based = true;
            } else if let Some(name) = key
                .strip_prefix("SYMBOL(")
                .and_then(|name| name.strip_suffix(')'))
            {
                let address = u64::from_str_radix(value, 16).ok()?;
                info.symbols.insert(name.to_owned(), address);
            } else if let Ok(number) = value.parse() {
                info.numbers.insert(key.to_owned(), number);
            }
        }
        based.then_some(info)
    }

    pub(crate) fn release(&self) -> &str {
        &self.release
    }

    /// The physical address of a symbol that is listed here.
    pub(crate) fn symbol(&self, name: &str) -> Option<u64> {
        self.image_address(*self.symbols.get(name)?)
    }

    /// The value of a symbol as it is listed: most are virtual addresses.
    pub(crate) fn listed(&self, name: &str) -> Option<u64> {
        self.symbols.get(name).copied()
    }

    /// A number, by all that stands before the `=`: `SIZE(page)`.
    pub(crate) fn number(&self, key: &str) -> Option<i64> {
        self.numbers.get(key).copied()
    }

    /// The physical address of one in the kernel image.
    pub(crate) fn image_address(&self, address: u64) -> Option<u64> {
        let within = address.checked_sub(KERNEL_MAP)?;
        Some(within.wrapping_add(self.phys_base))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &[u8] = b"OSRELEASE=6.1.0\nSYMBOL(kallsyms_names)=ffffffffb1bbdac0\n\
        NUMBER(phys_base)=-165675008\nnonsense\nLENGTH(x)=4\n\0rest";

    #[test]
    fn it_is_found_among_other_things() {
        let mut ram = vec![0xff; 3 << 12];
        ram[100..110].copy_from_slice(BEGINNING);
        ram[5000..5000 + TEXT.len()].copy_from_slice(TEXT);
        let found: Vec<_> = candidates(&ram).collect();
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].release(), "6.1.0");
        assert_eq!(found[0].symbol("kallsyms_names"), Some(0x27db_dac0));
        assert_eq!(found[0].symbol("other"), None);
        assert_eq!(
            found[0].listed("kallsyms_names"),
            Some(0xffff_ffff_b1bb_dac0)
        );
        assert_eq!(found[0].number("LENGTH(x)"), Some(4));
        assert_eq!(found[0].number("x"), None);
    }

    #[test]
    fn half_of_it_is_nothing() {
        assert!(Vmcoreinfo::parse(b"OSRELEASE=6.1.0\n").is_none());
        assert!(Vmcoreinfo::parse(b"OSRELEASE=6\nNUMBER(phys_base)=x\n").is_none());
        let bad = b"OSRELEASE=6\nNUMBER(phys_base)=1\nSYMBOL(a)=zz\n";
        assert!(Vmcoreinfo::parse(bad).is_none());
    }

    #[test]
    fn addresses_below_the_kernel_are_none_of_its() {
        let info = Vmcoreinfo::parse(TEXT).unwrap();
        assert_eq!(info.image_address(KERNEL_MAP - 1), None);
    }
}
