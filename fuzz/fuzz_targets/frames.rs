//! Messages from a peer, of the types that travel: a frame longer than the limit is refused, a
//! stream that ends is told from one that is wrong, and what is read can be written and read
//! again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use serde::Serialize;
use serde::de::DeserializeOwned;
use site::protocol::{ToSource, ToTarget};
use site::transport::framing::{FrameReader, Limits, WireError, decode, encode_frame, frame_len};

const MAX: usize = 4096;

/// Encoded once more: a number may have come in more bytes than it takes.
fn encoded<T: Serialize>(message: &T) -> Vec<u8> {
    let mut bytes = Vec::new();
    encode_frame(message, &mut bytes, MAX).expect("no longer than it was");
    bytes.split_off(4)
}

async fn read<T: Serialize + DeserializeOwned>(bytes: &[u8]) {
    let limits = Limits {
        max_frame: MAX,
        idle: None,
    };
    let mut reader = FrameReader::new(bytes, limits);
    let mut rest = bytes;
    loop {
        let expected = frame_len(rest, MAX);
        match reader.recv::<T>().await {
            Ok(message) => {
                let once = encoded(&message);
                let again = decode::<T>(&once).expect("just written");
                assert_eq!(encoded(&again), once);
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
}

fuzz_target!(|bytes: &[u8]| {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        read::<ToTarget>(bytes).await;
        read::<ToSource>(bytes).await;
    });
});
