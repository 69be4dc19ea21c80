//! Guest RAM, mapped: the file that QEMU has as the guest's memory, as a slice of ours.
//!
//! This is where the project's `unsafe` mappings are. The danger of a mapped file is that
//! someone else changes it behind a reference: [`RamMap`] is for a VM that stands still.

#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::ops::{Deref, DerefMut, Range};
use std::path::Path;

use memmap2::{Mmap, MmapMut};
use rustix::fs::{FallocateFlags, fallocate};

use crate::Result;
use crate::error::Context as _;

/// Guest RAM, to read.
///
/// Map it while the VM is paused or gone, and drop it before the VM goes on: what is read while
/// the guest writes is of no defined moment.
#[derive(Debug)]
pub struct RamMap(Mmap);

impl RamMap {
    /// Maps a RAM file.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).context("open", path)?;
        // SAFETY: the file is private to the site (mode 0600) and changed by its QEMU and by
        // us alone. Callers read it while the VM stands still, as the type demands; QEMU never
        // shrinks it, so that no access faults. A torn read of bytes has no invalid value, and
        // whatever is derived from them is checked against hashes before it is relied on.
        let map = unsafe { Mmap::map(&file) }.context("map", path)?;
        Ok(Self(map))
    }
}

impl Deref for RamMap {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

/// Makes ranges of a RAM file zero, for all who have it mapped, the guest among them; what they took
/// of memory is given back. In bytes; the guest stands still.
///
/// # Errors
/// The file can't be written, or its file system has no holes. Some ranges may be zero then.
pub fn clear_ram(path: &Path, ranges: &[Range<usize>]) -> Result<()> {
    let file = OpenOptions::new().write(true).open(path);
    let file = file.context("open", path)?;
    let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    for range in ranges.iter().filter(|range| !range.is_empty()) {
        let cleared = fallocate(&file, hole, range.start as u64, range.len() as u64);
        cleared
            .map_err(std::io::Error::from)
            .context("clear pages of", path)?;
    }
    Ok(())
}

/// Guest RAM, to write: for a VM that isn't started yet, or waits for its device state.
#[derive(Debug)]
pub struct RamMapMut(MmapMut);

impl RamMapMut {
    /// Maps an existing RAM file.
    pub fn open(path: &Path) -> Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .context("open", path)?;
        Self::map(&file, path)
    }

    /// Makes a RAM file of zeroes, replacing what was there, and maps it.
    pub fn create(path: &Path, bytes: u64) -> Result<Self> {
        use std::os::unix::fs::OpenOptionsExt as _;
        let mut options = OpenOptions::new();
        options
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600);
        let file = options.open(path).context("create", path)?;
        file.set_len(bytes).context("size", path)?;
        Self::map(&file, path)
    }

    fn map(file: &File, path: &Path) -> Result<Self> {
        // SAFETY: as in `RamMap::open`; the exclusive reference is to a file that no guest runs
        // on yet, so that we are the only ones to change it.
        let map = unsafe { MmapMut::map_mut(file) }.context("map", path)?;
        Ok(Self(map))
    }

    /// Waits until everything written is in the file, should it be on a disk.
    pub fn sync(&self, path: &Path) -> Result<()> {
        self.0.flush().context("write", path)
    }
}

impl Deref for RamMapMut {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl DerefMut for RamMapMut {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cleared_pages_are_zero_for_who_has_them_mapped_and_others_stay() {
        const PAGE: usize = 4096;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ram");
        std::fs::write(&path, vec![7; 8 * PAGE]).unwrap();
        let map = RamMap::open(&path).unwrap();
        clear_ram(
            &path,
            &[PAGE..3 * PAGE, 4 * PAGE..4 * PAGE, 5 * PAGE..6 * PAGE],
        )
        .unwrap();
        assert_eq!(map.len(), 8 * PAGE);
        for (number, page) in map.chunks(PAGE).enumerate() {
            let expected = if matches!(number, 1 | 2 | 5) { 0 } else { 7 };
            assert!(page.iter().all(|byte| *byte == expected), "page {number}");
        }
        assert!(clear_ram(&dir.path().join("none"), &[]).is_err());
    }

    #[test]
    fn what_is_written_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ram");
        let mut write = RamMapMut::create(&path, 1 << 20).unwrap();
        write[4096..4101].copy_from_slice(b"guest");
        write.sync(&path).unwrap();
        let read = RamMap::open(&path).unwrap();
        assert_eq!(read.len(), 1 << 20);
        assert_eq!(&read[4096..4101], b"guest");
        assert!(RamMap::open(&dir.path().join("missing")).is_err());
    }
}
