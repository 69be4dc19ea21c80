//! Sets of pages as sorted runs.
//!
//! Guests change memory and disks in stretches, so runs are short to write down: on the wire
//! each is two variable-length integers, the gap before it and its length.

use std::ops::Range;

use crate::error::{Error, within};
use crate::page::PageIndex;
use crate::wire::{Cursor, put_varint};

/// A set of page indices (or of ordinals into a list of pages).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PageSet {
    /// Sorted, not empty, and never touching one another.
    runs: Vec<Range<u64>>,
    len: u64,
}

impl PageSet {
    /// The set without members.
    pub const fn new() -> Self {
        Self {
            runs: Vec::new(),
            len: 0,
        }
    }

    /// All pages from `range.start` up to `range.end`.
    pub fn from_range(range: Range<u64>) -> Self {
        let mut set = Self::new();
        set.push_run(range);
        set
    }

    /// Collects indices in any order; duplicates are fine.
    pub fn from_unsorted(mut indices: Vec<u64>) -> Self {
        indices.sort_unstable();
        indices.dedup();
        let mut set = Self::new();
        for index in indices {
            set.push_run(index..index + 1);
        }
        set
    }

    /// How many pages are in it.
    pub const fn len(&self) -> u64 {
        self.len
    }

    /// Whether no page is in it.
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The runs, ascending.
    pub fn runs(&self) -> &[Range<u64>] {
        &self.runs
    }

    /// The pages, ascending.
    pub fn iter(&self) -> impl Iterator<Item = PageIndex> + '_ {
        self.runs.iter().cloned().flatten().map(PageIndex)
    }

    /// Whether a page is in it.
    pub fn contains(&self, index: PageIndex) -> bool {
        let after = self.runs.partition_point(|run| run.start <= index.0);
        after > 0 && index.0 < self.runs[after - 1].end
    }

    /// One past the highest page; 0 when empty.
    pub fn end(&self) -> u64 {
        self.runs.last().map_or(0, |run| run.end)
    }

    /// Appends a page that lies after all others. Earlier ones are ignored when already in.
    pub(crate) fn push(&mut self, index: PageIndex) {
        self.push_run(index.0..index.0 + 1);
    }

    /// Appends a run; what it shares with the end of the set is cut off.
    pub(crate) fn push_run(&mut self, run: Range<u64>) {
        let start = run.start.max(self.end());
        if start >= run.end {
            return;
        }
        self.len += run.end - start;
        match self.runs.last_mut() {
            Some(last) if last.end == start => last.end = run.end,
            _ => self.runs.push(start..run.end),
        }
    }

    /// The pages in either set.
    #[must_use]
    pub fn union(&self, other: &Self) -> Self {
        let mut out = Self::new();
        let (mut a, mut b) = (self.runs.iter().peekable(), other.runs.iter().peekable());
        loop {
            let first = match (a.peek(), b.peek()) {
                (Some(x), Some(y)) if x.start <= y.start => a.next(),
                (Some(_), None) => a.next(),
                (_, Some(_)) => b.next(),
                (None, None) => return out,
            };
            if let Some(run) = first {
                out.push_run(run.clone());
            }
        }
    }

    /// The pages in this set that are not in `other`.
    #[must_use]
    pub fn difference(&self, other: &Self) -> Self {
        let mut out = Self::new();
        let mut j = 0;
        for run in &self.runs {
            let mut start = run.start;
            while other.runs.get(j).is_some_and(|cut| cut.end <= start) {
                j += 1;
            }
            let mut k = j;
            while let Some(cut) = other.runs.get(k).filter(|cut| cut.start < run.end) {
                if cut.start > start {
                    out.push_run(start..cut.start);
                }
                start = start.max(cut.end);
                k += 1;
            }
            out.push_run(start..run.end.max(start));
        }
        out
    }

    /// Appends the coded set.
    pub(crate) fn encode_into(&self, out: &mut Vec<u8>) {
        put_varint(out, self.runs.len() as u64);
        let mut end = 0;
        for run in &self.runs {
            put_varint(out, run.start - end);
            put_varint(out, run.end - run.start - 1);
            end = run.end;
        }
    }

    /// The set as bytes: the number of runs, then for each its gap and its length less one.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        self.encode_into(&mut out);
        out
    }

    /// Reads a set whose members are all below `limit`. There is one coding for each set;
    /// any other is refused.
    pub fn decode(bytes: &[u8], limit: u64) -> Result<Self, Error> {
        let mut cursor = Cursor::new("page set", bytes);
        let set = Self::decode_from(&mut cursor, limit)?;
        cursor.end()?;
        Ok(set)
    }

    pub(crate) fn decode_from(cursor: &mut Cursor<'_>, limit: u64) -> Result<Self, Error> {
        let count = cursor.varint()?;
        // Each run takes at least two bytes: a lie about the count is found before allocating.
        within("the number of runs", count, cursor.remaining() as u64 / 2)?;
        let mut set = Self {
            runs: Vec::with_capacity(count as usize),
            len: 0,
        };
        for i in 0..count {
            let gap = cursor.varint()?;
            if i > 0 && gap == 0 {
                return Err(cursor.malformed("two runs touch"));
            }
            let start = set.end().checked_add(gap).filter(|&start| start < limit);
            let start = start.ok_or(cursor.malformed("a page past the end"))?;
            let more = cursor.varint()?;
            if more >= limit - start {
                return Err(cursor.malformed("a page past the end"));
            }
            set.push_run(start..start + more + 1);
        }
        Ok(set)
    }
}

impl FromIterator<PageIndex> for PageSet {
    fn from_iter<I: IntoIterator<Item = PageIndex>>(indices: I) -> Self {
        Self::from_unsorted(indices.into_iter().map(|index| index.0).collect())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn set(members: &BTreeSet<u64>) -> PageSet {
        PageSet::from_unsorted(members.iter().copied().collect())
    }

    proptest! {
        #[test]
        fn behaves_as_a_set(
            a in prop::collection::btree_set(0u64..60, 0..40),
            b in prop::collection::btree_set(0u64..60, 0..40),
        ) {
            let (x, y) = (set(&a), set(&b));
            prop_assert_eq!(x.len(), a.len() as u64);
            prop_assert_eq!(x.union(&y), set(&a.union(&b).copied().collect()));
            prop_assert_eq!(x.difference(&y), set(&a.difference(&b).copied().collect()));
            for i in 0..60 {
                prop_assert_eq!(x.contains(PageIndex(i)), a.contains(&i));
            }
            prop_assert_eq!(PageSet::decode(&x.encode(), 60).unwrap(), x.clone());
            prop_assert_eq!(PageSet::decode(&x.encode(), x.end()).is_ok(), true);
            if x.end() > 0 {
                prop_assert!(PageSet::decode(&x.encode(), x.end() - 1).is_err());
            }
        }

        #[test]
        fn any_bytes_decode_canonically_or_not_at_all(
            bytes in prop::collection::vec(prop_oneof![0u8..4, any::<u8>()], 0..40),
        ) {
            if let Ok(set) = PageSet::decode(&bytes, 1000) {
                prop_assert!(set.end() <= 1000);
                // Padded integers aside, there is one coding only.
                prop_assert!(set.encode().len() <= bytes.len());
            }
        }
    }
}
