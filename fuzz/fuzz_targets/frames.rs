//! Messages from a peer. A frame longer than the limit is refused, a stream that ends is told
//! from one that is wrong, and what is read can be written and read again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use serde_bytes::ByteBuf;
use site::transport::framing::{FrameReader, Limits, WireError, decode, encode_frame, frame_len};

/// Something of everything that messages are made of.
type Message = Vec<(u32, String, Option<ByteBuf>, Result<i64, bool>)>;

const MAX: usize = 4096;

fuzz_target!(|bytes: &[u8]| {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let mut reader = FrameReader::new(
            bytes,
            Limits {
                max_frame: MAX,
                idle: None,
            },
        );
        let mut rest = bytes;
        loop {
            let expected = frame_len(rest, MAX);
            match reader.recv::<Message>().await {
                Ok(message) => {
                    let mut again = Vec::new();
                    // A number may have been coded in more bytes than it takes.
                    encode_frame(&message, &mut again, MAX).expect("no longer than it was");
                    assert_eq!(
                        decode::<Message>(&again[4..]).expect("just written"),
                        message
                    );
                }
                Err(WireError::Malformed(_) | WireError::Trailing { .. }) => {}
                Err(WireError::TooLong { len, max }) => {
                    assert!(expected.is_err() && len > max);
                    return;
                }
                Err(WireError::Closed) => return assert!(rest.is_empty()),
                Err(WireError::Truncated { have, want }) => {
                    assert_eq!(have, rest.len());
                    return assert!(have < want);
                }
                Err(other) => panic!("{other:?}"),
            }
            let len = expected.expect("within the limit").expect("whole");
            rest = &rest[4 + len..];
        }
    });
});
