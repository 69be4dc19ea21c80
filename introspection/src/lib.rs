//! What a Linux guest's RAM says of itself, read from outside: no agent in the guest, and no
//! symbols brought along.
//!
//! A kernel notes where its own tables are for the sake of crash dumps (VMCOREINFO, see
//! `Documentation/admin-guide/kdump/vmcoreinfo.rst` of Linux), the table of its symbols among
//! them since Linux 6.0. [`Linux::find`] reads both out of RAM.
//!
//! All of it is the guest's to forge: nothing here trusts a length, an address or a number, and
//! whatever is not as it should be makes [`Linux::find`] find nothing. What is found may only
//! ever serve to do better, never to be right; [`free`] alone is more than that, and says why it
//! may be.

pub mod entropy;
pub mod free;
pub mod freelists;
mod kallsyms;
pub mod kinds;
mod memory_map;
mod physical;
pub mod slabs;
mod spaces;
mod survey;
mod tables;
#[cfg(test)]
mod testing;
pub mod turns;
mod vmcoreinfo;

use kallsyms::Kallsyms;
pub use physical::Physical;
pub use spaces::{AddressSpace, address_spaces};
use vmcoreinfo::Vmcoreinfo;

/// Where the kernel image is mapped in the kernel's address space, before it is moved at random
/// (`__START_KERNEL_map`).
const KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;

/// A Linux kernel, x86-64, found in a guest's RAM.
#[derive(Debug)]
pub struct Linux<'a> {
    ram: Physical<'a>,
    info: Vmcoreinfo,
    symbols: Kallsyms,
}

impl<'a> Linux<'a> {
    /// Looks for a kernel.
    pub fn find(ram: Physical<'a>) -> Option<Self> {
        vmcoreinfo::candidates(ram.bytes()).find_map(|info| {
            let symbols = Kallsyms::locate(&ram, &info)?;
            Some(Self { ram, info, symbols })
        })
    }

    /// Its release, as `uname -r` says.
    pub fn release(&self) -> &str {
        self.info.release()
    }

    /// The offsets in RAM of kernel variables; `None` for what this kernel doesn't have, or what
    /// doesn't lie in RAM.
    pub fn variables<const N: usize>(&self, names: [&str; N]) -> [Option<usize>; N] {
        let addresses = self.symbols.addresses(&self.ram, names);
        addresses.map(|address| self.ram.offset(self.info.image_address(address?)?))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_kernel_is_found_with_its_variables() {
        let ram = testing::kernel();
        let linux = Linux::find(Physical::new(&ram)).unwrap();
        assert_eq!(linux.release(), "6.1.0-test");
        assert_eq!(
            linux.variables(["jiffies_64", "missing", "base_crng"]),
            [Some(testing::JIFFIES), None, Some(testing::CRNG)]
        );
    }

    #[test]
    fn where_there_is_none_none_is_found() {
        assert!(Linux::find(Physical::new(&[])).is_none());
        assert!(Linux::find(Physical::new(&[0; 4096])).is_none());
    }

    proptest! {
        /// A guest may write what it likes: nothing is read outside RAM, and it always ends.
        #[test]
        fn a_forged_kernel_does_no_harm(
            forged in prop::collection::vec((0..testing::SIZE, any::<u8>()), 1..200),
        ) {
            let mut ram = testing::kernel();
            for (at, byte) in forged {
                ram[at] = byte;
            }
            if let Some(linux) = Linux::find(Physical::new(&ram)) {
                let found = linux.variables(["jiffies_64", "base_crng", "missing"]);
                prop_assert!(found.into_iter().flatten().all(|at| at < ram.len()));
                for space in address_spaces(&linux) {
                    let within = |page: &(u64, u64)| page.1 < (ram.len() / 4096) as u64;
                    prop_assert!(space.pages.iter().all(within));
                    prop_assert!(space.pages.is_sorted_by(|a, b| a.0 < b.0));
                }
                if let Some(kinds) = kinds::of(&linux) {
                    prop_assert_eq!(kinds.all().len(), ram.len() / 4096);
                    slabs::of(&linux, &kinds);
                }
                for range in free::pages(&ram).into_iter().flatten() {
                    prop_assert!(range.end <= ram.len() && range.start % 4096 == 0);
                }
                let orders = freelists::random_orders(&ram);
                prop_assert!(orders.iter().all(|at| at + 8 <= ram.len()));
            }
            if let Some(generator) = entropy::find(&ram) {
                for (at, bytes) in [generator.hold(), generator.release()] {
                    prop_assert!(at + bytes.len() <= ram.len());
                }
            }
        }
    }
}
