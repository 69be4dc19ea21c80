//! Pages, their content hashes, and where they are read from and written to.
//!
//! Guest RAM, disks and device state are all arrays of 4 KiB pages here. A page past the end
//! of an image counts as zero, so images of different lengths compare without special cases.

use std::fmt;
use std::io;

use serde::{Deserialize, Serialize};

/// Bytes in a page.
pub const PAGE_SIZE: usize = 4096;
/// The most pages an image may have: 4 TiB.
pub const MAX_PAGES: u64 = 1 << 30;

/// The content of a page.
pub type Page = [u8; PAGE_SIZE];

/// The page that holds only zeros.
pub static ZERO_PAGE: Page = [0; PAGE_SIZE];

/// Where a page lies in its image, counted in pages from the start.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct PageIndex(pub u64);

impl fmt::Display for PageIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Whether a page holds only zeros.
///
/// A comparison with a constant becomes `memcmp`, which is fast at every optimisation level
/// and stops at the first byte that is not zero.
#[inline]
pub fn is_zero(page: &Page) -> bool {
    page == &ZERO_PAGE
}

/// BLAKE3 of a page's 4096 bytes: names the content, wherever it lies.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PageHash(pub [u8; 32]);

impl PageHash {
    /// The hash of [`ZERO_PAGE`].
    pub const ZERO: Self = Self([
        0xb6, 0xfb, 0x73, 0xfc, 0x46, 0x93, 0x8c, 0x98, 0x1e, 0x2b, 0x0b, 0x4b, 0x1e, 0xf2, 0x82,
        0xad, 0xcf, 0xc8, 0x98, 0x54, 0xd0, 0x1b, 0xfe, 0x39, 0x72, 0xfd, 0xc4, 0x78, 0x5b, 0x41,
        0xb2, 0xc7,
    ]);

    /// Hashes a page.
    #[inline]
    pub fn of(page: &Page) -> Self {
        if is_zero(page) {
            Self::ZERO
        } else {
            Self(*blake3::hash(page).as_bytes())
        }
    }

    /// Whether this is the hash of the zero page.
    #[inline]
    pub fn is_zero(&self) -> bool {
        *self == Self::ZERO
    }
}

impl fmt::Debug for PageHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for byte in &self.0[..6] {
            write!(f, "{byte:02x}")?;
        }
        f.write_str("..")
    }
}

/// An image that can be read page by page, from several threads at once.
pub trait ReadPages: Sync {
    /// How many pages the image has.
    fn pages(&self) -> u64;

    /// Reads one page; beyond the end of the image, zeros.
    fn read(&self, index: PageIndex, into: &mut Page) -> io::Result<()>;

    /// Reads consecutive pages; `into` must be a multiple of [`PAGE_SIZE`] long.
    fn read_many(&self, first: PageIndex, into: &mut [u8]) -> io::Result<()> {
        for (i, page) in into.as_chunks_mut::<PAGE_SIZE>().0.iter_mut().enumerate() {
            self.read(PageIndex(first.0 + i as u64), page)?;
        }
        Ok(())
    }

    /// The whole image, where it lies in memory; spares copying. May end inside a page.
    fn as_slice(&self) -> Option<&[u8]> {
        None
    }

    /// True only when all these pages are surely zero without looking, as in a hole of a
    /// sparse file.
    fn known_zero(&self, _first: PageIndex, _count: u64) -> bool {
        false
    }
}

/// An image that can be written page by page.
pub trait WritePages {
    /// Writes one page. The image is already as long as it will be.
    fn write(&mut self, index: PageIndex, page: &Page) -> io::Result<()>;

    /// Writes consecutive pages; `pages` must be a multiple of [`PAGE_SIZE`] long.
    fn write_many(&mut self, first: PageIndex, pages: &[u8]) -> io::Result<()> {
        for (i, page) in pages.as_chunks::<PAGE_SIZE>().0.iter().enumerate() {
            self.write(PageIndex(first.0 + i as u64), page)?;
        }
        Ok(())
    }

    /// Makes one page zero; an implementation may punch a hole.
    fn write_zero(&mut self, index: PageIndex) -> io::Result<()> {
        self.write(index, &ZERO_PAGE)
    }
}

/// An image that is built in place: what it held before is read from it as well.
pub trait Image: ReadPages + WritePages {
    /// This image, for reading only.
    fn reader(&self) -> &dyn ReadPages;
}

impl<T: ReadPages + WritePages> Image for T {
    fn reader(&self) -> &dyn ReadPages {
        self
    }
}

/// How many pages `bytes` take.
pub const fn pages_for(bytes: u64) -> u64 {
    bytes.div_ceil(PAGE_SIZE as u64)
}

fn read_slice(bytes: &[u8], index: PageIndex, into: &mut Page) {
    let start = usize::try_from(index.0)
        .unwrap_or(usize::MAX)
        .saturating_mul(PAGE_SIZE);
    let rest = bytes.get(start..).unwrap_or_default();
    let held = rest.len().min(PAGE_SIZE);
    into[..held].copy_from_slice(&rest[..held]);
    into[held..].fill(0);
}

/// Pages in memory, such as mapped guest RAM. A last partial page counts as padded with zeros.
#[derive(Clone, Copy)]
pub struct SlicePages<'a>(pub &'a [u8]);

impl<'a> SlicePages<'a> {
    /// These bytes as an image.
    pub const fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }
}

impl ReadPages for SlicePages<'_> {
    fn pages(&self) -> u64 {
        pages_for(self.0.len() as u64)
    }
    fn read(&self, index: PageIndex, into: &mut Page) -> io::Result<()> {
        read_slice(self.0, index, into);
        Ok(())
    }
    fn as_slice(&self) -> Option<&[u8]> {
        Some(self.0)
    }
}

/// Pages in memory that are built in place.
///
/// When the slice ends inside a page, what would be written past its end must be zero.
pub struct SlicePagesMut<'a>(pub &'a mut [u8]);

impl<'a> SlicePagesMut<'a> {
    /// These bytes as an image to build.
    pub const fn new(bytes: &'a mut [u8]) -> Self {
        Self(bytes)
    }
}

impl ReadPages for SlicePagesMut<'_> {
    fn pages(&self) -> u64 {
        pages_for(self.0.len() as u64)
    }
    fn read(&self, index: PageIndex, into: &mut Page) -> io::Result<()> {
        read_slice(self.0, index, into);
        Ok(())
    }
    fn as_slice(&self) -> Option<&[u8]> {
        Some(self.0)
    }
}

impl WritePages for SlicePagesMut<'_> {
    fn write(&mut self, index: PageIndex, page: &Page) -> io::Result<()> {
        let start = usize::try_from(index.0)
            .unwrap_or(usize::MAX)
            .saturating_mul(PAGE_SIZE);
        let rest = self
            .0
            .get_mut(start..)
            .filter(|rest| !rest.is_empty())
            .ok_or_else(|| {
                io::Error::new(
                    io::ErrorKind::InvalidInput,
                    "the page is past the end of the image",
                )
            })?;
        let held = rest.len().min(PAGE_SIZE);
        if page[held..].iter().any(|&byte| byte != 0) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the last page has content past the end of the image",
            ));
        }
        rest[..held].copy_from_slice(&page[..held]);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_zero_hash_is_that_of_the_zero_page() {
        assert_eq!(PageHash::ZERO.0, *blake3::hash(&ZERO_PAGE).as_bytes());
        assert!(PageHash::of(&ZERO_PAGE).is_zero());
        let mut page = ZERO_PAGE;
        page[PAGE_SIZE - 1] = 1;
        assert!(!is_zero(&page) && !PageHash::of(&page).is_zero());
    }

    #[test]
    fn a_partial_last_page_is_padded_and_cannot_overflow() {
        let mut bytes = vec![7u8; PAGE_SIZE + 10];
        let mut image = SlicePagesMut(&mut bytes);
        assert_eq!(image.pages(), 2);
        let mut page = [9; PAGE_SIZE];
        image.read(PageIndex(1), &mut page).unwrap();
        assert_eq!(
            (&page[..10], &page[10..]),
            (&[7u8; 10][..], &[0u8; PAGE_SIZE - 10][..])
        );
        image.read(PageIndex(2), &mut page).unwrap();
        assert!(is_zero(&page));
        page[11] = 1;
        assert!(image.write(PageIndex(1), &page).is_err());
        assert!(image.write(PageIndex(2), &ZERO_PAGE).is_err());
    }
}
