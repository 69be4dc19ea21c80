//! Guest-physical memory: where an address lies in the file that is the guest's RAM.

/// RAM as QEMU's q35 machine lays it out: one file, of which the part that has no room below the
/// devices is moved up to 4 GiB (`pc_q35_init` in QEMU's `hw/i386/pc_q35.c`).
#[derive(Clone, Copy, Debug)]
pub struct Physical<'a> {
    bytes: &'a [u8],
    below: u64,
}

/// Above all devices of the first 4 GiB.
const HIGH: u64 = 1 << 32;

impl<'a> Physical<'a> {
    /// The RAM of a guest.
    pub fn new(bytes: &'a [u8]) -> Self {
        let size = bytes.len() as u64;
        let below = if size >= 0xb000_0000 {
            0x8000_0000
        } else {
            size
        };
        Self { bytes, below }
    }

    /// All of it, in the file's order.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// The offset in the file of a physical address.
    pub fn offset(&self, address: u64) -> Option<usize> {
        let offset = if address < self.below {
            address
        } else {
            address.checked_sub(HIGH)?.checked_add(self.below)?
        };
        (offset < self.bytes.len() as u64).then_some(offset as usize)
    }

    /// The physical address of an offset in the file.
    pub fn address(&self, offset: usize) -> u64 {
        let offset = offset as u64;
        if offset < self.below {
            offset
        } else {
            HIGH + (offset - self.below)
        }
    }

    /// So many bytes from a physical address on, where all of them are in one piece of RAM.
    pub fn read(&self, address: u64, length: usize) -> Option<&'a [u8]> {
        let start = self.offset(address)?;
        let last = self.offset(address.checked_add((length as u64).checked_sub(1)?)?)?;
        (last - start == length - 1).then(|| self.bytes.get(start..=last))?
    }

    /// A number of four bytes.
    pub fn u32(&self, address: u64) -> Option<u32> {
        Some(u32::from_le_bytes(self.read(address, 4)?.try_into().ok()?))
    }

    /// A number of eight bytes.
    pub fn u64(&self, address: u64) -> Option<u64> {
        Some(u64::from_le_bytes(self.read(address, 8)?.try_into().ok()?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_read_past_the_end() {
        let ram = [7; 8192];
        let physical = Physical::new(&ram);
        assert_eq!(physical.read(8190, 2), Some(&ram[..2]));
        assert_eq!(physical.read(8190, 3), None);
        assert_eq!(physical.read(0, 0), None);
        assert_eq!(physical.read(u64::MAX, 2), None);
        assert_eq!(physical.u64(0), Some(0x0707_0707_0707_0707));
    }

    #[test]
    fn what_has_no_room_below_the_devices_is_above_them() {
        // The sizes are what counts: no byte of it is touched.
        let physical = Physical {
            bytes: &[0; 4096],
            below: 1024,
        };
        assert_eq!(physical.offset(1023), Some(1023));
        assert_eq!(physical.offset(1024), None);
        assert_eq!(physical.offset(HIGH), Some(1024));
        assert_eq!(physical.offset(HIGH + 3072), None);
        for offset in [0, 1023, 1024, 4095] {
            assert_eq!(physical.offset(physical.address(offset)), Some(offset));
        }
        assert_eq!(physical.read(1023, 2), None, "torn apart");
    }
}
