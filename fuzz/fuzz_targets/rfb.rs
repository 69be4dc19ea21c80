//! What a viewer sends: the same messages in whatever pieces it arrives, each message's bytes
//! those that came, none lost between them.
#![no_main]

use bytes::BytesMut;
use libfuzzer_sys::fuzz_target;
use recorder::ClientCodec;
use tokio_util::codec::Decoder;

/// The bytes of every message, and whether the stream went wrong after them.
fn messages(bytes: &[u8], piece: usize) -> (Vec<Vec<u8>>, bool) {
    let mut codec = ClientCodec::default();
    let mut buffer = BytesMut::new();
    let mut found = Vec::new();
    for piece in bytes.chunks(piece) {
        buffer.extend_from_slice(piece);
        loop {
            match codec.decode(&mut buffer) {
                Ok(Some(framed)) => found.push(framed.bytes.to_vec()),
                Ok(None) => break,
                Err(_) => return (found, true),
            }
        }
    }
    assert_eq!(
        found.iter().map(Vec::len).sum::<usize>() + buffer.len(),
        bytes.len()
    );
    (found, false)
}

fuzz_target!(|bytes: &[u8]| {
    let Some((&piece, bytes)) = bytes.split_first() else {
        return;
    };
    let whole = messages(bytes, bytes.len().max(1));
    let pieces = messages(bytes, usize::from(piece).max(1));
    assert_eq!(whole, pieces);
    assert!(bytes.starts_with(&whole.0.concat()));
});
