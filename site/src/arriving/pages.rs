//! Which pages of an image are there: one bit each.

use std::ops::Range;
use std::path::Path;

use reconciler::PageSet;

use crate::error::{Error, Result};
use crate::files;

/// A bit for each page of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Pages {
    words: Vec<u64>,
    length: u64,
    set: u64,
}

const BITS: u64 = u64::BITS as u64;

impl Pages {
    pub(super) fn none(count: u64) -> Self {
        Self {
            words: vec![0; count.div_ceil(BITS) as usize],
            length: count,
            set: 0,
        }
    }

    pub(super) fn all(count: u64) -> Self {
        let mut pages = Self::none(count);
        (0..count).for_each(|page| pages.set(page));
        pages
    }

    /// Those that were noted; nothing, where nothing was.
    pub(super) fn load(path: &Path, count: u64) -> Result<Option<Self>> {
        let bytes = match std::fs::read(path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            read => read.map_err(Error::file("read", path))?,
        };
        let (words, rest) = bytes.as_chunks::<8>();
        let mut pages = Self {
            words: words.iter().map(|word| u64::from_le_bytes(*word)).collect(),
            length: count,
            set: 0,
        };
        pages.set = pages
            .words
            .iter()
            .map(|word| u64::from(word.count_ones()))
            .sum();
        let beyond = match (count % BITS, pages.words.last()) {
            (0, _) | (_, None) => 0,
            (used, Some(last)) => last >> used,
        };
        if !rest.is_empty() || pages.words.len() as u64 != count.div_ceil(BITS) || beyond != 0 {
            return Err(Error::Damaged {
                path: path.to_owned(),
                reason: "it is of another length than the image".into(),
            });
        }
        Ok(Some(pages))
    }

    pub(super) fn store(&self, path: &Path) -> Result<()> {
        let bytes: Vec<u8> = self
            .words
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .collect();
        files::write_atomic(path, &bytes)
    }

    pub(super) fn set(&mut self, page: u64) {
        if page >= self.length {
            return;
        }
        let word = &mut self.words[(page / BITS) as usize];
        let bit = 1 << (page % BITS);
        self.set += u64::from(*word & bit == 0);
        *word |= bit;
    }

    fn has(&self, page: u64) -> bool {
        let word = self.words.get((page / BITS) as usize);
        word.is_some_and(|word| word & (1 << (page % BITS)) != 0)
    }

    /// How many are set.
    pub(super) fn count(&self) -> u64 {
        self.set
    }

    pub(super) fn is_full(&self) -> bool {
        self.set == self.length
    }

    /// The first in a range that is not set.
    pub(super) fn first_absent(&self, range: Range<u64>) -> Option<u64> {
        let end = range.end.min(self.length);
        (range.start..end).find(|&page| !self.has(page))
    }

    /// Those that are not set.
    pub(super) fn absent(&self) -> PageSet {
        let absent = (0..self.length).filter(|&page| !self.has(page));
        absent.map(reconciler::PageIndex).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{any, prop};
    use proptest::{prop_assert, prop_assert_eq, proptest};

    use super::*;

    proptest! {
        #[test]
        fn what_is_set_is_there_and_comes_back(
            count in 1_u64..300,
            set in prop::collection::vec(any::<u16>(), 0..200),
        ) {
            let mut pages = Pages::none(count);
            let set: std::collections::BTreeSet<u64> =
                set.into_iter().map(|page| u64::from(page) % count).collect();
            for &page in &set {
                pages.set(page);
            }
            prop_assert_eq!(pages.count(), set.len() as u64);
            prop_assert_eq!(pages.is_full(), set.len() as u64 == count);
            let absent: Vec<u64> = (0..count).filter(|page| !set.contains(page)).collect();
            prop_assert_eq!(pages.first_absent(0..count + 9), absent.first().copied());
            prop_assert_eq!(pages.absent().iter().map(|p| p.0).collect::<Vec<_>>(), absent);
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("pages");
            prop_assert_eq!(Pages::load(&path, count).unwrap(), None);
            pages.store(&path).unwrap();
            prop_assert_eq!(Pages::load(&path, count).unwrap(), Some(pages));
            prop_assert!(Pages::load(&path, count + 64).is_err());
        }
    }
}
