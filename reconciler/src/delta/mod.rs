//! The delta codecs of the papers, by name: one page told by what differs from an older one.
//!
//! They are here to be compared with on the same pages (`bench reconcile`), and to be used
//! where a page travels alone. A migration takes page by page whichever of literal and XOR has
//! fewer words, and compresses either with its like ([`crate::encode_pages`]). On the 24,999
//! pages that a desktop's session of 87 s left in RAM and the base lacks, 102 MB of which 33 MB
//! changed, that took 10.7 MB with zstd 3 and 7.5 MB with LZMA fast; XBRLE and zstd 3 took
//! 11.5, XBZRLE 10.8, word-wise XOR 10.6 and changed bytes 10.5.
//!
//! | name | from |
//! |---|---|
//! | [`PageDelta::Xbrle`] | Svärd, Hudzia, Tordsson, Elmroth, VEE 2011: XOR, then runs of equal bytes |
//! | [`PageDelta::Xbzrle`] | QEMU, `docs/xbzrle.txt`: runs of unchanged bytes, and changed bytes |
//! | [`PageDelta::WordXor`] | the XOR of 8-byte words that changed, and which those are |
//! | [`PageDelta::ChangedBytes`] | VMsync: the bytes that changed, and which those are |
//!
//! Promises: what is decoded is the page that was encoded, given the same older page; decoders
//! allocate nothing and end in an error on what no encoder makes.

mod xbrle;
mod xbzrle;

use crate::error::Error;
use crate::page::{PAGE_SIZE, Page};
use crate::wire::Cursor;

/// A way to tell a page by an older one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageDelta {
    /// Runs of equal bytes in the XOR of both.
    Xbrle,
    /// Lengths of what did not change, and what did.
    Xbzrle,
    /// A bit for each 8-byte word, and the XOR of those that changed.
    WordXor,
    /// A bit for each byte, and those that changed.
    ChangedBytes,
}

impl PageDelta {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Xbrle, Self::Xbzrle, Self::WordXor, Self::ChangedBytes];

    /// As it is written.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Xbrle => "xbrle",
            Self::Xbzrle => "xbzrle",
            Self::WordXor => "word-xor",
            Self::ChangedBytes => "changed-bytes",
        }
    }

    /// Tells `new` to whoever has `old`; `None` where that takes as much as a page.
    pub fn encode(self, old: &Page, new: &Page) -> Option<Vec<u8>> {
        let encoded = match self {
            Self::Xbrle => xbrle::encode(old, new),
            Self::Xbzrle => xbzrle::encode(old, new),
            Self::WordXor => encode_parts::<8>(old, new, |old, new| {
                std::array::from_fn(|at| old[at] ^ new[at])
            }),
            Self::ChangedBytes => encode_parts::<1>(old, new, |_, new| *new),
        };
        (encoded.len() < PAGE_SIZE).then_some(encoded)
    }

    /// Makes of the older page in `page` what was encoded. After an error `page` is neither.
    pub fn decode(self, bytes: &[u8], page: &mut Page) -> Result<(), Error> {
        match self {
            Self::Xbrle => xbrle::decode(bytes, page),
            Self::Xbzrle => xbzrle::decode(bytes, page),
            Self::WordXor => decode_parts::<8>("word-xor delta", bytes, page, |old, told| {
                for (old, told) in old.iter_mut().zip(told) {
                    *old ^= told;
                }
            }),
            Self::ChangedBytes => {
                decode_parts::<1>("changed-bytes delta", bytes, page, |old, told| *old = *told)
            }
        }
    }
}

/// A bit for each part of `N` bytes, set where it changed, then what is told of those parts.
fn encode_parts<const N: usize>(
    old: &Page,
    new: &Page,
    tell: impl Fn(&[u8; N], &[u8; N]) -> [u8; N],
) -> Vec<u8> {
    let mut out = vec![0; PAGE_SIZE / N / 8];
    let parts = old.as_chunks::<N>().0.iter().zip(new.as_chunks::<N>().0);
    for (at, (old, new)) in parts.enumerate() {
        if old != new {
            out[at / 8] |= 1 << (at % 8);
            out.extend_from_slice(&tell(old, new));
        }
    }
    out
}

fn decode_parts<const N: usize>(
    what: &'static str,
    bytes: &[u8],
    page: &mut Page,
    apply: impl Fn(&mut [u8; N], &[u8; N]),
) -> Result<(), Error> {
    let mut cursor = Cursor::new(what, bytes);
    let changed = cursor.bytes((PAGE_SIZE / N / 8) as u64)?;
    for (at, part) in page.as_chunks_mut::<N>().0.iter_mut().enumerate() {
        if changed[at / 8] >> (at % 8) & 1 == 1 {
            apply(part, &cursor.array()?);
        }
    }
    cursor.end()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::page::ZERO_PAGE;

    fn edited(page: &Page, edits: &[(usize, usize, u8)]) -> Page {
        let mut page = *page;
        for (at, len, byte) in edits {
            let end = (at + len).min(PAGE_SIZE);
            page[*at..end].fill(*byte);
        }
        page
    }

    fn edits() -> impl Strategy<Value = Vec<(usize, usize, u8)>> {
        prop::collection::vec((0..PAGE_SIZE, 1usize..600, any::<u8>()), 0..40)
    }

    proptest! {
        #[test]
        fn pages_come_back(before in edits(), after in edits()) {
            let old = edited(&ZERO_PAGE, &before);
            let new = edited(&old, &after);
            for delta in PageDelta::ALL {
                let Some(encoded) = delta.encode(&old, &new) else {
                    continue;
                };
                prop_assert!(encoded.len() < PAGE_SIZE);
                let mut page = old;
                delta.decode(&encoded, &mut page).unwrap();
                prop_assert!(page == new, "{}", delta.name());
                let mut page = old;
                let cut = &encoded[..encoded.len().saturating_sub(1)];
                if cut.len() < encoded.len() {
                    prop_assert!(delta.decode(cut, &mut page).is_err(), "{}", delta.name());
                }
            }
        }

        #[test]
        fn any_bytes_end_well_or_in_an_error(
            bytes in prop::collection::vec(prop_oneof![0u8..9, any::<u8>()], 0..700),
        ) {
            for delta in PageDelta::ALL {
                let mut page = ZERO_PAGE;
                if delta.decode(&bytes, &mut page).is_ok()
                    && let Some(again) = delta.encode(&ZERO_PAGE, &page)
                {
                    let mut same = ZERO_PAGE;
                    delta.decode(&again, &mut same).unwrap();
                    prop_assert!(same == page);
                }
            }
        }
    }

    #[test]
    fn what_differs_everywhere_is_no_delta() {
        let new = std::array::from_fn(|at| (at * 7 + 1) as u8 | 1);
        for delta in PageDelta::ALL {
            assert_eq!(delta.encode(&ZERO_PAGE, &new), None, "{}", delta.name());
        }
    }

    #[test]
    fn one_word_that_changed_takes_what_it_says() {
        let mut new = ZERO_PAGE;
        new[16..24].copy_from_slice(&[1, 2, 3, 4, 5, 6, 7, 8]);
        let lens = PageDelta::ALL.map(|delta| delta.encode(&ZERO_PAGE, &new).unwrap().len());
        // Ten runs, two of them short; a gap, a length and the word; bits and the word.
        assert_eq!(lens, [2 + 8 * 2 + 3, 10, 64 + 8, 512 + 8]);
    }
}
