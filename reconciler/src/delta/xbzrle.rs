//! XBZRLE as QEMU has it (`docs/xbzrle.txt`): the number of unchanged bytes, the number of
//! changed ones and what they are now, and so on until nothing more changes. Numbers are
//! ULEB128 of at most two bytes. An unchanged page is nothing at all.
//!
//! There is more than one encoding of a page; this one makes each run as long as it can be.

use crate::error::Error;
use crate::page::{PAGE_SIZE, Page};
use crate::wire::{Cursor, put_varint};

const WHAT: &str = "XBZRLE delta";

pub(super) fn encode(old: &Page, new: &Page) -> Vec<u8> {
    let run = |from: usize, unchanged: bool| {
        let pairs = old[from..].iter().zip(&new[from..]);
        pairs
            .take_while(|(old, new)| (old == new) == unchanged)
            .count()
    };
    let mut out = Vec::new();
    let mut at = 0;
    loop {
        let unchanged = run(at, true);
        if at + unchanged == PAGE_SIZE {
            return out;
        }
        at += unchanged;
        let changed = run(at, false);
        put_varint(&mut out, unchanged as u64);
        put_varint(&mut out, changed as u64);
        out.extend_from_slice(&new[at..at + changed]);
        at += changed;
    }
}

pub(super) fn decode(bytes: &[u8], page: &mut Page) -> Result<(), Error> {
    let mut cursor = Cursor::new(WHAT, bytes);
    let mut at = 0;
    let mut first = true;
    while cursor.remaining() > 0 {
        let unchanged = cursor.varint()?;
        // Only at the beginning of a page may what changed begin at once.
        if unchanged == 0 && !first {
            return Err(cursor.malformed("two runs of changed bytes touch"));
        }
        first = false;
        let changed = cursor.varint()?;
        if changed == 0 {
            return Err(cursor.malformed("a run without bytes"));
        }
        let room = PAGE_SIZE - at;
        let (Ok(unchanged), Ok(changed)) = (usize::try_from(unchanged), usize::try_from(changed))
        else {
            return Err(cursor.malformed("a run past the end of the page"));
        };
        if unchanged > room || changed > room - unchanged {
            return Err(cursor.malformed("a run past the end of the page"));
        }
        at += unchanged;
        page[at..at + changed].copy_from_slice(cursor.bytes(changed as u64)?);
        at += changed;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::delta::PageDelta;
    use crate::page::ZERO_PAGE;

    fn page(at: usize, bytes: &[u8]) -> Page {
        let mut page = ZERO_PAGE;
        page[at..at + bytes.len()].copy_from_slice(bytes);
        page
    }

    /// The example of `docs/xbzrle.txt`.
    #[test]
    fn the_published_example_comes_out() {
        let old = page(
            1001,
            &[
                0x05, 0x06, 0x07, 0x08, 0x09, 0x0a, 0x0b, 0x0c, 0x0d, 0x0e, 0x0f, 0x10, 0x11, 0x12,
                0x13, 0x68, 0x00, 0x00, 0x6b, 0x00, 0x6d,
            ],
        );
        let new = page(
            1001,
            &[
                0x01, 0x02, 0x03, 0x04, 0x05, 0x06, 0x07, 0x08, 0x09, 0x0a, 0x0b, 0x0c, 0x0d, 0x0e,
                0x0f, 0x68, 0x00, 0x00, 0x67, 0x00, 0x69,
            ],
        );
        let published = [
            0xe9, 0x07, 0x0f, 0x01, 0x02, 0x03, 0x04, 0x05, 0x06, 0x07, 0x08, 0x09, 0x0a, 0x0b,
            0x0c, 0x0d, 0x0e, 0x0f, 0x03, 0x01, 0x67, 0x01, 0x01, 0x69,
        ];
        assert_eq!(encode(&old, &new), published);
        let mut decoded = old;
        decode(&published, &mut decoded).unwrap();
        assert!(decoded == new);
    }

    /// What QEMU's `tests/unit/test-xbzrle.c` checks.
    #[test]
    fn qemus_own_cases_hold() {
        assert!(encode(&ZERO_PAGE, &ZERO_PAGE).is_empty());
        let last = page(PAGE_SIZE - 1, &[1]);
        let encoded = encode(&ZERO_PAGE, &last);
        assert_eq!(encoded.len(), 2 + 2);
        let mut decoded = ZERO_PAGE;
        decode(&encoded, &mut decoded).unwrap();
        assert!(decoded == last);
        // Every other byte: longer than the page.
        let mut every_other = ZERO_PAGE;
        every_other
            .iter_mut()
            .step_by(2)
            .take(PAGE_SIZE / 2 - 1)
            .for_each(|byte| *byte = 1);
        assert_eq!(PageDelta::Xbzrle.encode(&ZERO_PAGE, &every_other), None);
    }

    #[test]
    fn runs_past_the_end_and_empty_ones_are_refused() {
        for wrong in [
            &[0x80, 0x80][..],
            &[0xff, 0x1f, 2, 1, 1],
            &[
                0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1, 1, 1,
            ],
            &[1, 0],
            &[1, 1, 7, 0, 1, 7],
            &[1],
            &[1, 2, 7],
        ] {
            let mut page = ZERO_PAGE;
            assert!(decode(wrong, &mut page).is_err(), "{wrong:x?}");
        }
        decode(&[0, 1, 7], &mut { ZERO_PAGE }).unwrap();
    }
}
