//! What the target asks for: the contents of the offer that it found nowhere. Both sides know
//! which these are if its replay did as the twin; where it did not is what is told.

use crate::error::Error;
use crate::offer::Offer;
use crate::page::PageIndex;
use crate::page_set::PageSet;
use crate::wire::{Cursor, put_section, take_section};

const WHAT: &str = "answer";
const RUNS: u8 = 0;
const BITMAP: u8 = 1;

/// The contents in one of two sets.
fn either(one: &PageSet, other: &PageSet) -> PageSet {
    one.difference(other).union(&other.difference(one))
}

/// Codes the contents asked for, as runs or as a bitmap, whichever is smaller once compressed.
pub(crate) fn encode_answer(lacking: &PageSet, offer: &Offer) -> Result<Vec<u8>, Error> {
    let surprising = either(lacking, &offer.unlikely());
    let mut runs = vec![RUNS];
    put_section(&mut runs, &surprising.encode())?;
    let mut bits = vec![0u8; offer.distinct().div_ceil(8) as usize];
    for content in surprising.iter() {
        bits[(content.0 / 8) as usize] |= 1 << (content.0 % 8);
    }
    let mut bitmap = vec![BITMAP];
    put_section(&mut bitmap, &bits)?;
    Ok(if runs.len() <= bitmap.len() {
        runs
    } else {
        bitmap
    })
}

impl Offer {
    /// The most bytes an answer to this offer takes, for [`crate::BlobAssembler`].
    pub fn max_answer_len(&self) -> u64 {
        64 + self.distinct().div_ceil(8)
    }

    /// Reads the answer to this offer: the pages to send, in the order to send them.
    pub fn decode_answer(&self, bytes: &[u8]) -> Result<Vec<PageIndex>, Error> {
        let mut cursor = Cursor::new(WHAT, bytes);
        let [kind] = cursor.array()?;
        let surprising = match kind {
            RUNS => {
                let section = take_section(&mut cursor, 32 + self.distinct().saturating_mul(12))?;
                PageSet::decode(&section, self.distinct())?
            }
            BITMAP => {
                let bits = take_section(&mut cursor, self.distinct().div_ceil(8))?;
                let set = (0..bits.len() as u64 * 8)
                    .filter(|i| bits[(i / 8) as usize] & (1 << (i % 8)) != 0);
                let set: PageSet = set.map(PageIndex).collect();
                if set.end() > self.distinct() {
                    return Err(cursor.malformed("it asks for what was not offered"));
                }
                set
            }
            _ => return Err(cursor.malformed("it is coded in an unknown way")),
        };
        cursor.end()?;
        let lacking = either(&surprising, &self.unlikely());
        let first = self.first_pages();
        Ok(lacking
            .iter()
            .map(|content| first[content.0 as usize])
            .collect())
    }
}
