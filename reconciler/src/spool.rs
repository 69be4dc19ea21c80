//! Pages set aside because they are both copied from and overwritten.
//!
//! The new image grows in place over the replayed one. A page that is copied elsewhere and
//! then overwritten is read first and kept: in memory up to a bound, beyond it in an unnamed
//! temporary file.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::os::unix::fs::FileExt;

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
    /// Reads these pages of the image, holding at most `memory` bytes in memory.
    pub(crate) fn fill(
        image: &dyn ReadPages,
        pages: &PageSet,
        memory: usize,
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
            let mut out = BufWriter::with_capacity(1 << 20, tempfile::tempfile().map_err(failed)?);
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
