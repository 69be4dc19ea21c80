//! Pages set aside because they are both copied from and overwritten.
//!
//! The new image grows in place over the replayed one. A page that is copied elsewhere and
//! then overwritten is read first and kept: in memory up to a bound, beyond it in an unnamed
//! temporary file.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::error::Error;
use crate::page::{PAGE_SIZE, Page, PageIndex, ReadPages, ZERO_PAGE};
use crate::page_set::PageSet;

pub(crate) struct Spool {
    /// Ascending; the position is the slot.
    pages: Vec<PageIndex>,
    memory: Vec<u8>,
    in_memory: usize,
    file: Option<File>,
}

impl Spool {
    /// Reads these pages of the image, holding at most `memory` bytes in memory and the rest in a
    /// file without a name in `dir`.
    pub(crate) fn fill(
        image: &dyn ReadPages,
        pages: &PageSet,
        memory: usize,
        dir: &Path,
    ) -> Result<Self, Error> {
        let pages: Vec<_> = pages.iter().collect();
        let in_memory = pages.len().min(memory / PAGE_SIZE);
        let mut spool = Self {
            memory: Vec::with_capacity(in_memory * PAGE_SIZE),
            pages,
            in_memory,
            file: None,
        };
        let mut page = ZERO_PAGE;
        let mut read = |index| {
            image
                .read(index, &mut page)
                .map(|()| page)
                .map_err(|source| Error::Read {
                    image: "the replayed image",
                    page: index,
                    source,
                })
        };
        for &index in &spool.pages[..in_memory] {
            spool.memory.extend_from_slice(&read(index)?);
        }
        if in_memory < spool.pages.len() {
            let failed = |source| Error::Spool { source };
            let file = tempfile::tempfile_in(dir).map_err(failed)?;
            let mut out = BufWriter::with_capacity(1 << 20, file);
            for &index in &spool.pages[in_memory..] {
                out.write_all(&read(index)?).map_err(failed)?;
            }
            let file = out
                .into_inner()
                .map_err(|error| failed(error.into_error()))?;
            spool.file = Some(file);
        }
        Ok(spool)
    }

    /// A page as it was; false when it was not set aside.
    pub(crate) fn read(&self, index: PageIndex, into: &mut Page) -> Result<bool, Error> {
        let Ok(slot) = self.pages.binary_search(&index) else {
            return Ok(false);
        };
        if let Some(held) = self.memory.get(slot * PAGE_SIZE..(slot + 1) * PAGE_SIZE) {
            into.copy_from_slice(held);
        } else if let Some(file) = &self.file {
            let at = (slot - self.in_memory) as u64 * PAGE_SIZE as u64;
            file.read_exact_at(into, at)
                .map_err(|source| Error::Spool { source })?;
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::SlicePages;

    #[test]
    fn what_does_not_fit_into_memory_lies_in_the_folder_that_was_said() {
        let image: Vec<u8> = (0..8).flat_map(|page| [page; PAGE_SIZE]).collect();
        let pages: PageSet = [1, 2, 5].into_iter().map(PageIndex).collect();
        let dir = tempfile::tempdir().unwrap();
        let fill = |memory, dir: &Path| Spool::fill(&SlicePages(&image), &pages, memory, dir);
        let spool = fill(PAGE_SIZE, dir.path()).unwrap();
        let mut page = ZERO_PAGE;
        for index in [1, 2, 5] {
            assert!(spool.read(PageIndex(index), &mut page).unwrap());
            assert_eq!(page, [index as u8; PAGE_SIZE]);
        }
        assert!(!spool.read(PageIndex(3), &mut page).unwrap());
        // It has no name there, and goes with its process.
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);

        let gone = dir.path().join("gone");
        assert!(
            fill(3 * PAGE_SIZE, &gone).is_ok(),
            "nothing to be set aside"
        );
        assert!(matches!(fill(0, &gone), Err(Error::Spool { .. })));
    }
}
