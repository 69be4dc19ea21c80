//! A second look for contents that the target should have had.
//!
//! What lies at its own address in the twin very likely does so at the target, and is looked for
//! there alone ([`crate::Known`]). Where the target's replay gave out pages in another order,
//! as one early event can make it do, thousands of pages are right and lie elsewhere. So where many
//! of those are lacking the source names them again, by a hash that tells them from all that the
//! target has: four or five bytes for each, in place of the page. It takes a round trip.
//!
//! Bounds: a seek names pages of the offer that were asked for, each once.

use crate::error::{Error, within};
use crate::offer::Offer;
use crate::page::PageIndex;
use crate::page_set::PageSet;
use crate::short::{MAX_BITS, all_distinct, pack_bits, short, unpack_bits};
use crate::tree::ImageTree;
use crate::wire::{Cursor, put_section, take_section};

const WHAT: &str = "a seek";

/// Contents that are to be looked for anywhere, by the lowest page of each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seek {
    pub(crate) pages: PageSet,
    pub(crate) bits: u32,
    /// In the order of `pages`.
    pub(crate) shorts: Vec<u64>,
}

impl Offer {
    /// What to look for again, of the pages that an answer to this offer asks for; `None` if that
    /// is not worth a round trip. `new` is the image that was offered.
    pub fn seek(&self, new: &ImageTree, asked: &[PageIndex]) -> Option<Seek> {
        let expected = self.expected();
        let asked = asked.iter().copied();
        let pages: PageSet = asked.filter(|page| expected.contains(*page)).collect();
        if pages.is_empty() || pages.len() < self.seek_from() {
            return None;
        }
        let mut bits = self.seek_bits(pages.len());
        loop {
            let shorts: Vec<u64> = pages
                .iter()
                .map(|page| short(&self.salt(), bits, &new.leaf(page)))
                .collect();
            if bits == MAX_BITS || all_distinct(shorts.clone()) {
                return Some(Seek {
                    pages,
                    bits,
                    shorts,
                });
            }
            bits = (bits + 8).min(MAX_BITS);
        }
    }
}

impl Seek {
    /// As bytes; send them with [`crate::blob_parts`].
    ///
    /// # Errors
    /// When zstd fails.
    pub fn encode(&self) -> Result<Vec<u8>, Error> {
        let mut out = vec![self.bits as u8];
        put_section(&mut out, &self.pages.encode())?;
        pack_bits(
            &mut out,
            self.shorts.iter().map(|short| (*short, self.bits)),
        );
        Ok(out)
    }

    /// The most bytes a seek about an image of so many pages takes, for [`crate::BlobAssembler`].
    pub const fn max_encoded_len(pages: u64) -> u64 {
        64 + set_limit(pages) + pages.saturating_mul(8)
    }

    /// Reads one that follows the answer to this offer.
    ///
    /// # Errors
    /// When it is malformed.
    pub fn decode(bytes: &[u8], offer: &Offer) -> Result<Self, Error> {
        let mut cursor = Cursor::new(WHAT, bytes);
        let [bits] = cursor.array()?.map(u32::from);
        if !(1..=MAX_BITS).contains(&bits) {
            return Err(cursor.malformed("short hashes of no possible length"));
        }
        let set = take_section(&mut cursor, set_limit(offer.pages()))?;
        let pages = PageSet::decode(&set, offer.pages())?;
        within("the number of contents", pages.len(), offer.distinct())?;
        let shorts = unpack_bits(&mut cursor, (0..pages.len()).map(|_| bits))?;
        cursor.end()?;
        Ok(Self {
            pages,
            bits,
            shorts,
        })
    }
}

/// A set at its longest.
const fn set_limit(pages: u64) -> u64 {
    32 + pages.saturating_mul(12)
}
