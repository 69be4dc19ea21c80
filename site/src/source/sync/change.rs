//! How much a running guest has changed since its last generation: by a sample of its RAM, for
//! QEMU tells nobody what it writes, and by what its disks' overlays take.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use reconciler::{PAGE_SIZE, ZERO_PAGE};

use crate::error::{Error, Result};

/// Of so many pages one is looked at: of 768 MiB, 24 MiB of either image.
const STRIDE: u64 = 32;

/// Compares a running guest with its last generation, another page of each stride each time.
pub(super) struct Change {
    turn: u64,
}

impl Change {
    pub(super) fn new() -> Self {
        Self { turn: 0 }
    }

    /// Bytes that have changed: of RAM about as many, in whole pages, and of disks at least what
    /// was written for the first time.
    pub(super) fn since(
        &mut self,
        ram: &Path,
        generation: &Path,
        overlays: &[PathBuf],
    ) -> Result<u64> {
        self.turn = (self.turn + 1) % STRIDE;
        let pages = changed(ram, generation, self.turn)?;
        let mut bytes = pages * STRIDE * PAGE_SIZE as u64;
        for overlay in overlays {
            let taken = fs::metadata(overlay).map_err(Error::file("measure", overlay))?;
            bytes += taken.blocks() * 512;
        }
        Ok(bytes)
    }
}

/// Sampled pages that differ.
fn changed(ram: &Path, generation: &Path, turn: u64) -> Result<u64> {
    let open = |path: &Path| File::open(path).map_err(Error::file("open", path));
    let (now, then) = (open(ram)?, open(generation)?);
    let length = now.metadata().map_err(Error::file("measure", ram))?.len();
    let (mut one, mut other) = (ZERO_PAGE, ZERO_PAGE);
    let mut differ = 0;
    for page in (turn..length / PAGE_SIZE as u64).step_by(STRIDE as usize) {
        let at = page * PAGE_SIZE as u64;
        now.read_exact_at(&mut one, at)
            .map_err(Error::file("read", ram))?;
        then.read_exact_at(&mut other, at)
            .map_err(Error::file("read", generation))?;
        differ += u64::from(one != other);
    }
    Ok(differ)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_tells_about_how_much_has_changed() {
        const PAGES: usize = 4096;
        let dir = tempfile::tempdir().unwrap();
        let [now, then] = ["now", "then"].map(|name| dir.path().join(name));
        let mut ram = vec![1; PAGES * PAGE_SIZE];
        fs::write(&then, &ram).unwrap();
        for page in 0..1024 {
            ram[page * PAGE_SIZE + page] = 2;
        }
        fs::write(&now, &ram).unwrap();
        let overlay = dir.path().join("overlay");
        fs::write(&overlay, vec![3; 1 << 20]).unwrap();
        File::open(&overlay).unwrap().sync_all().unwrap();

        let mut change = Change::new();
        let all: Vec<_> = (0..STRIDE)
            .map(|_| change.since(&now, &then, &[]).unwrap())
            .collect();
        assert!(
            all.iter().all(|bytes| *bytes == 1024 * PAGE_SIZE as u64),
            "{all:?}"
        );
        let disk = change.since(&then, &then, &[overlay]).unwrap();
        assert!((1 << 20..2 << 20).contains(&disk), "{disk}");
    }
}
