//! What the target has where a patch did not fit: a hash for each line of the page.
//!
//! A page whose patch did not fit is wrong in a few words only, for the words that the two
//! replays disagree about are not all in the patch. Sent whole such a page costs 250 to 300
//! bytes. So the target keeps it as its best guess, and tells a byte of a keyed hash for each
//! line of 128 bytes, 32 bytes a page; the source sends the lines whose hashes differ, as a
//! patch of all their words.
//!
//! Measured on what patches left of two 768 MiB desktops (2,106 pages, of which half were
//! wrong in 9 words or fewer, and 6,552): whole they took 539 kB and 1,961 kB, told by lines
//! 299 kB and 1,014 kB, hashes included. Lines of 64 bytes took 322 and 1,023 kB, of 32 bytes
//! 407 and 1,247 kB; with 6 bits a line in place of 8 more pages had to be sent whole than the
//! bits were worth. Syndromes of a Reed-Solomon code over the lines, which tell up to 16 lines
//! in 32 bytes, saved another twentieth and were not worth their algebra.
//!
//! **Collisions.** A line that differs passes for the same with odds of 1 in 256, so of pages
//! with five wrong lines one in 50 does not come out right. The page's short hash shows it, and
//! such a page is sent whole in a third round; the image's root is compared at the end in any
//! case. The hash is BLAKE3 keyed with the transfer's salt, over the page's index and the
//! line's content: nobody who makes content in the guest can aim at it.

use crate::error::{Error, within};
use crate::offer::Offer;
use crate::page::{PAGE_SIZE, Page, PageIndex};
use crate::page_set::PageSet;
use crate::patch::{Mask, WORD};
use crate::short::Salt;
use crate::wire::Cursor;

/// Bytes of a line.
const LINE: usize = 128;
/// Lines of a page.
const LINES: usize = PAGE_SIZE / LINE;

/// For each line of a page a byte of its hash.
type Hashes = [u8; LINES];

/// Pages whose patches did not fit, and hashes of what the target has in their place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unpatched {
    key: LineKey,
    /// Ascending.
    pages: Vec<PageIndex>,
    /// One for each of them.
    hashes: Vec<Hashes>,
}

impl Unpatched {
    pub(crate) fn new(salt: Salt) -> Self {
        Self {
            key: LineKey::new(salt),
            pages: Vec::new(),
            hashes: Vec::new(),
        }
    }

    /// Adds a page above all before it.
    pub(crate) fn push(&mut self, index: PageIndex, guess: &Page) {
        debug_assert!(self.pages.last().is_none_or(|&last| last < index));
        self.pages.push(index);
        self.hashes.push(self.key.hashes(index, guess));
    }

    /// The pages, ascending.
    pub fn pages(&self) -> &[PageIndex] {
        &self.pages
    }

    /// The most bytes that [`Unpatched::encode`] makes of this many pages of a larger image.
    pub const fn max_encoded_len(pages: u64, image_pages: u64) -> u64 {
        Offer::max_encoded_len(image_pages) + pages * LINES as u64
    }

    /// For the wire: the pages as [`PageSet::encode`] tells them, then 32 bytes for each.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        let pages: PageSet = self.pages.iter().copied().collect();
        pages.encode_into(&mut out);
        out.extend_from_slice(self.hashes.as_flattened());
        out
    }

    /// Reads an answer to pages sent from this offer, at most `most` of them as patches.
    pub fn decode(bytes: &[u8], offer: &Offer, most: u64) -> Result<Self, Error> {
        let mut cursor = Cursor::new("list of patches that do not fit", bytes);
        let pages = PageSet::decode_from(&mut cursor, offer.pages())?;
        within("a list of patches that do not fit", pages.len(), most)?;
        if cursor.remaining() as u64 != pages.len() * LINES as u64 {
            return Err(cursor.malformed("it has not one hash for each line"));
        }
        let hashes = cursor.bytes(pages.len() * LINES as u64)?;
        Ok(Self {
            key: LineKey::new(offer.salt()),
            pages: pages.iter().collect(),
            hashes: hashes.as_chunks().0.to_vec(),
        })
    }

    /// The words of the lines in which the target's guess differs from `page`; none if that
    /// cannot be told.
    pub(crate) fn differing(&self, index: PageIndex, page: &Page) -> Option<Mask> {
        let at = self.pages.binary_search(&index).ok()?;
        let own = self.key.hashes(index, page);
        let lines = own.iter().zip(&self.hashes[at]).map(|(a, b)| a != b);
        let mut mask = Mask::NONE;
        // A bit for each word, so as many bytes as a line has eights of words.
        let bytes = LINE / WORD / 8;
        for (bits, differs) in mask.0.chunks_exact_mut(bytes).zip(lines) {
            bits.fill(if differs { 0xff } else { 0 });
        }
        Some(mask)
    }
}

/// The key of one transfer's hashes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct LineKey([u8; 32]);

impl LineKey {
    /// Another than the salt itself, which keys the short hashes.
    fn new(salt: Salt) -> Self {
        Self(blake3::derive_key("replay-migrate lines v1", &salt.0))
    }

    fn hashes(&self, index: PageIndex, page: &Page) -> Hashes {
        let mut of_page = blake3::Hasher::new_keyed(&self.0);
        of_page.update(&index.0.to_le_bytes());
        let key = of_page.finalize();
        let mut hashes = [0; LINES];
        let lines = page.as_chunks::<LINE>().0;
        for (at, (hash, line)) in hashes.iter_mut().zip(lines).enumerate() {
            // Any byte of a keyed hash is as good as another: lines with equal content in one
            // page need not have equal hashes, and do not.
            *hash = blake3::keyed_hash(key.as_bytes(), line).as_bytes()[at];
        }
        hashes
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::offer::OfferOptions;
    use crate::page::{SlicePages, ZERO_PAGE};
    use crate::tree::{ImageTree, no_progress};

    /// An offer of so many pages of ones.
    fn offer(pages: u64) -> Offer {
        let bytes = vec![1; pages as usize * PAGE_SIZE];
        let tree = ImageTree::build(&SlicePages(&bytes), &no_progress).unwrap();
        let options = OfferOptions {
            salt: Salt([3; 32]),
            candidates: 1,
            force_bits: None,
            seek_from: OfferOptions::SEEK_FROM,
        };
        Offer::new(&tree, &ImageTree::zero(pages).unwrap(), &options).unwrap()
    }

    #[test]
    fn lines_that_differ_are_told_by_their_words() {
        let mut unpatched = Unpatched::new(Salt([3; 32]));
        let mut guess = ZERO_PAGE;
        guess[LINE - 1] = 1;
        guess[PAGE_SIZE - LINE] = 1;
        unpatched.push(PageIndex(4), &guess);
        unpatched.push(PageIndex(6), &ZERO_PAGE);
        let again = Unpatched::decode(&unpatched.encode(), &offer(8), 2).unwrap();
        assert_eq!(again, unpatched);
        let mask = again.differing(PageIndex(4), &ZERO_PAGE).unwrap();
        assert_eq!(mask.words(), 2 * LINE / WORD);
        assert_eq!([&mask.0[..2], &mask.0[62..]], [[0xff; 2]; 2]);
        assert_eq!(again.differing(PageIndex(6), &ZERO_PAGE), Some(Mask::NONE));
        assert_eq!(again.differing(PageIndex(5), &ZERO_PAGE), None);
    }

    #[test]
    fn hashes_too_few_too_many_or_of_pages_not_sent_are_refused() {
        let mut unpatched = Unpatched::new(Salt([3; 32]));
        for page in 0..3 {
            unpatched.push(PageIndex(page), &ZERO_PAGE);
        }
        let bytes = unpatched.encode();
        assert!(bytes.len() as u64 <= Unpatched::max_encoded_len(3, 3));
        assert!(Unpatched::decode(&bytes, &offer(3), 3).is_ok());
        assert!(Unpatched::decode(&bytes, &offer(3), 2).is_err());
        assert!(Unpatched::decode(&bytes, &offer(2), 3).is_err());
        for wrong in [&bytes[..bytes.len() - 1], &[&bytes[..], &[0]].concat()] {
            assert!(Unpatched::decode(wrong, &offer(3), 3).is_err());
        }
    }

    proptest! {
        #[test]
        fn any_bytes_end_well_or_in_an_error(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(unpatched) = Unpatched::decode(&bytes, &offer(40), 5) {
                prop_assert!(unpatched.pages().len() <= 5);
                prop_assert!(unpatched.pages().is_sorted());
            }
        }
    }
}
