//! XBRLE (VEE 2011): both pages XORed, then runs of equal bytes in that, each as its length
//! and its byte. The paper leaves open how lengths are written: here in LEB128. Changed bytes
//! that differ from one another take two bytes each; that is what XBZRLE mends.

use crate::error::Error;
use crate::page::Page;
use crate::wire::{Cursor, put_varint};

const WHAT: &str = "XBRLE delta";

pub(super) fn encode(old: &Page, new: &Page) -> Vec<u8> {
    let xor: Page = std::array::from_fn(|at| old[at] ^ new[at]);
    let mut out = Vec::new();
    for run in xor.chunk_by(|a, b| a == b) {
        put_varint(&mut out, run.len() as u64);
        out.push(run[0]);
    }
    out
}

pub(super) fn decode(bytes: &[u8], page: &mut Page) -> Result<(), Error> {
    let mut cursor = Cursor::new(WHAT, bytes);
    let mut rest = &mut page[..];
    while !rest.is_empty() {
        let len = usize::try_from(cursor.varint()?).ok();
        let len = len.filter(|&len| (1..=rest.len()).contains(&len));
        let Some(len) = len else {
            return Err(cursor.malformed("a run past the end of the page"));
        };
        let [byte] = cursor.array()?;
        let (run, after) = rest.split_at_mut(len);
        for old in run {
            *old ^= byte;
        }
        rest = after;
    }
    cursor.end()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::{PAGE_SIZE, ZERO_PAGE};

    #[test]
    fn runs_of_the_xor_are_told() {
        let old = [7; PAGE_SIZE];
        let mut new = old;
        new[100..300].fill(5);
        let encoded = encode(&old, &new);
        assert_eq!(encoded, [100, 0, 200, 1, 2, 0xd4, 0x1d, 0]);
        let mut page = old;
        decode(&encoded, &mut page).unwrap();
        assert!(page == new);
    }

    #[test]
    fn what_does_not_make_one_page_is_refused() {
        for wrong in [
            &[][..],
            &[100, 0],
            &[0x81, 0x20, 0],
            &[0x80, 0x20, 0, 1],
            &[0, 0],
        ] {
            let mut page = ZERO_PAGE;
            assert!(decode(wrong, &mut page).is_err(), "{wrong:x?}");
        }
        decode(&[0x80, 0x20, 9], &mut { ZERO_PAGE }).unwrap();
    }
}
