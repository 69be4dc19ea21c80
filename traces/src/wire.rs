//! Records in one piece, to send over a connection that is already private and authenticated.
//!
//! ```text
//! version   1 byte
//! records   as in `coding.rs`
//! ```
//!
//! What arrives is hostile until it is decoded: nothing is allocated before it is bounded.

use crate::coding::{self, Context, Limits};
use crate::{Error, Record};

const VERSION: u8 = 1;

impl Default for Limits {
    /// A long working day of busy typing and pointing.
    fn default() -> Self {
        Self {
            records: 8 << 20,
            bytes: 32 << 20,
        }
    }
}

/// Codes and compresses records.
pub fn encode_records(records: &[Record]) -> Result<Vec<u8>, Error> {
    let mut bytes = vec![VERSION];
    bytes.extend(coding::encode(records, &mut Context::default())?);
    Ok(bytes)
}

/// Undoes [`encode_records`]; what exceeds `limits` is refused before it takes memory.
pub fn decode_records(bytes: &[u8], limits: Limits) -> Result<Vec<Record>, Error> {
    match bytes.split_first() {
        Some((&VERSION, coded)) => coding::decode(coded, &mut Context::default(), limits),
        _ => Err(Error::Malformed {
            what: "their coding is of a version unknown here",
        }),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::pack::pack;
    use crate::testing::{any_records, busy_minute};

    proptest! {
        #[test]
        fn any_records_survive(records in any_records(60)) {
            let bytes = encode_records(&records).unwrap();
            prop_assert_eq!(decode_records(&bytes, Limits::default()).unwrap(), records);
        }

        #[test]
        fn arbitrary_bytes_do_no_harm(mut bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let limits = Limits { records: 1000, bytes: 1 << 16 };
            let _ = decode_records(&bytes, limits);
            if let Some(first) = bytes.first_mut() {
                *first = VERSION;
            }
            let _ = decode_records(&bytes, limits);
        }

        #[test]
        fn broken_bytes_do_no_harm(
            records in any_records(30),
            at in any::<prop::sample::Index>(),
            bit in 0..8,
        ) {
            let mut bytes = encode_records(&records).unwrap();
            let at = at.index(bytes.len());
            bytes[at] ^= 1_u8 << bit;
            let _ = decode_records(&bytes, Limits::default());
        }
    }

    #[test]
    fn a_bomb_is_refused_before_it_takes_memory() {
        let mut bytes = vec![VERSION, 0];
        coding::put(&mut bytes, u64::MAX);
        bytes.extend(pack(&[0; 100], &[]).unwrap());
        let found = decode_records(&bytes, Limits::default());
        assert!(matches!(
            found,
            Err(Error::TooMuch {
                found: u64::MAX,
                unit: "bytes",
                ..
            })
        ));
    }

    #[test]
    fn a_frame_longer_than_it_says_is_refused() {
        let mut bytes = vec![VERSION, 0];
        coding::put(&mut bytes, 10);
        bytes.extend(pack(&vec![0; 100_000], &[]).unwrap());
        assert!(matches!(
            decode_records(&bytes, Limits::default()),
            Err(Error::Malformed { .. })
        ));
    }

    #[test]
    fn a_busy_minute_is_smaller_in_one_piece() {
        let bytes = encode_records(&busy_minute(7)).unwrap();
        eprintln!("a busy minute on the wire: {} B", bytes.len());
        assert!(bytes.len() < 20_000, "{}", bytes.len());
    }
}
