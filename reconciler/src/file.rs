//! Images that are raw files, such as those of a capture.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use rustix::fs::{SeekFrom, seek};

use crate::page::{
    PAGE_SIZE, Page, PageIndex, ReadPages, WritePages, ZERO_PAGE, is_zero, pages_for,
};

/// A raw file as an image. Holes are known to be zero without reading them; a last partial
/// page counts as padded with zeros.
///
/// The length is taken when it is opened. The file's own position is not used for reading, but
/// looking for holes moves it: give each `FilePages` a file opened for it.
#[derive(Debug)]
pub struct FilePages {
    file: File,
    bytes: u64,
}

impl FilePages {
    /// Takes a file, opened for writing too if it is to be written.
    pub fn new(file: File) -> io::Result<Self> {
        let bytes = file.metadata()?.len();
        Ok(Self { file, bytes })
    }

    /// Makes the image as long as this many pages; what is added is zero.
    pub fn resize(&mut self, pages: u64) -> io::Result<()> {
        self.bytes = pages.saturating_mul(PAGE_SIZE as u64);
        self.file.set_len(self.bytes)
    }

    /// The file.
    pub fn into_file(self) -> File {
        self.file
    }
}

impl ReadPages for FilePages {
    fn pages(&self) -> u64 {
        pages_for(self.bytes)
    }

    fn read(&self, index: PageIndex, into: &mut Page) -> io::Result<()> {
        self.read_many(index, into)
    }

    fn read_many(&self, first: PageIndex, into: &mut [u8]) -> io::Result<()> {
        let start = first.0.saturating_mul(PAGE_SIZE as u64);
        let held = self.bytes.saturating_sub(start).min(into.len() as u64) as usize;
        self.file.read_exact_at(&mut into[..held], start)?;
        into[held..].fill(0);
        Ok(())
    }

    fn known_zero(&self, first: PageIndex, count: u64) -> bool {
        let start = first.0.saturating_mul(PAGE_SIZE as u64);
        match seek(self.file.as_fd(), SeekFrom::Data(start)) {
            Ok(data) => data >= start.saturating_add(count.saturating_mul(PAGE_SIZE as u64)),
            // No data up to the end of the file.
            Err(rustix::io::Errno::NXIO) => true,
            // Whoever cannot say reads.
            Err(_) => false,
        }
    }
}

impl WritePages for FilePages {
    fn write(&mut self, index: PageIndex, page: &Page) -> io::Result<()> {
        let start = index.0.saturating_mul(PAGE_SIZE as u64);
        let held = self.bytes.saturating_sub(start).min(PAGE_SIZE as u64) as usize;
        if held == 0 || page[held..].iter().any(|&byte| byte != 0) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "content past the end of the image",
            ));
        }
        self.file.write_all_at(&page[..held], start)
    }

    fn write_zero(&mut self, index: PageIndex) -> io::Result<()> {
        // What is zero already, perhaps as a hole, stays as it is.
        let mut page = ZERO_PAGE;
        self.read(index, &mut page)?;
        if is_zero(&page) {
            Ok(())
        } else {
            self.write(index, &ZERO_PAGE)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::{ImageTree, no_progress};

    #[test]
    fn a_sparse_file_is_its_bytes() {
        let mut image = FilePages::new(tempfile::tempfile().unwrap()).unwrap();
        image.resize(3000).unwrap();
        let mut expected = ImageTree::zero(3000).unwrap();
        for (index, byte) in [(0, 1), (1500, 2), (2999, 3)] {
            let page = [byte; PAGE_SIZE];
            image.write(PageIndex(index), &page).unwrap();
            expected
                .set(PageIndex(index), crate::page::PageHash::of(&page))
                .unwrap();
        }
        assert!(image.known_zero(PageIndex(256), 256));
        assert!(!image.known_zero(PageIndex(1400), 256));
        assert_eq!(
            ImageTree::build(&image, &no_progress).unwrap().root(),
            expected.root()
        );
        image.write_zero(PageIndex(1500)).unwrap();
        expected
            .set(PageIndex(1500), crate::page::PageHash::ZERO)
            .unwrap();
        assert_eq!(
            ImageTree::build(&image, &no_progress).unwrap().root(),
            expected.root()
        );
        assert!(image.write(PageIndex(3000), &ZERO_PAGE).is_err());
    }

    #[test]
    fn a_partial_last_page_is_padded() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[7; PAGE_SIZE + 5], 0).unwrap();
        let mut image = FilePages::new(file).unwrap();
        let mut page = ZERO_PAGE;
        image.read(PageIndex(1), &mut page).unwrap();
        assert_eq!((page[4], page[5], image.pages()), (7, 0, 2));
        page[5] = 1;
        assert!(image.write(PageIndex(1), &page).is_err());
    }
}
