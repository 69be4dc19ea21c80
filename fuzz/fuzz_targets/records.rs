//! Input records from a peer: the limits hold whatever the bytes say, and what is read can be
//! written and read again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use traces::{Limits, decode_records, encode_records};

const LIMITS: Limits = Limits {
    records: 1000,
    bytes: 64 << 10,
};

fuzz_target!(|bytes: &[u8]| {
    if let Ok(records) = decode_records(bytes, LIMITS) {
        assert!(records.len() <= LIMITS.records);
        // Records out of the order of time may be refused when written.
        if let Ok(again) = encode_records(&records) {
            assert!(decode_records(&again, LIMITS).is_ok_and(|read| read == records));
        }
    }
});
