//! The codec against itself, byte by byte, and against noise.

use bytes::{BufMut, BytesMut};
use proptest::prelude::*;
use tokio_util::codec::Decoder;

use crate::codec::{ClientCodec, DecodeError, Framed};
use crate::messages::{CUT_TEXT_MAX, ClientMessage, Malformed};

fn decode_in_pieces(bytes: &[u8], cuts: &[usize]) -> Result<Vec<Framed>, DecodeError> {
    let (mut codec, mut buffer) = (ClientCodec::default(), BytesMut::new());
    let (mut messages, mut rest) = (Vec::new(), bytes);
    for cut in cuts.iter().copied().chain([bytes.len()]) {
        let (piece, left) = rest.split_at(cut.min(rest.len()));
        buffer.extend_from_slice(piece);
        rest = left;
        while let Some(framed) = codec.decode(&mut buffer)? {
            messages.push(framed);
        }
    }
    while let Some(framed) = codec.decode_eof(&mut buffer)? {
        messages.push(framed);
    }
    Ok(messages)
}

fn malformed(bytes: &[u8]) -> Malformed {
    match decode_in_pieces(bytes, &[]) {
        Err(DecodeError::Malformed(error)) => error,
        other => panic!("{other:?}"),
    }
}

/// A message and its bytes, written independently of the parser.
fn message() -> impl Strategy<Value = (ClientMessage, Vec<u8>)> {
    let padded = |kind: u8, length: usize| {
        let mut bytes = vec![0xa5; length];
        bytes[0] = kind;
        bytes
    };
    prop_oneof![
        Just((ClientMessage::SetPixelFormat, padded(0, 20))),
        Just((ClientMessage::FramebufferUpdateRequest, padded(3, 10))),
        Just((ClientMessage::EnableContinuousUpdates, padded(150, 10))),
        Just((ClientMessage::Xvp, padded(250, 4))),
        prop::collection::vec(any::<i32>(), 0..40).prop_map(|encodings| {
            let mut bytes = vec![2, 0];
            bytes.put_u16(encodings.len() as u16);
            for encoding in &encodings {
                bytes.put_i32(*encoding);
            }
            (ClientMessage::SetEncodings { encodings }, bytes)
        }),
        (any::<u32>(), any::<bool>()).prop_map(|(keysym, down)| {
            let mut bytes = vec![4, u8::from(down), 0, 0];
            bytes.put_u32(keysym);
            (ClientMessage::Key { keysym, down }, bytes)
        }),
        (any::<u16>(), any::<u16>(), any::<u8>()).prop_map(|(x, y, buttons)| {
            let mut bytes = vec![5, buttons];
            bytes.put_u16(x);
            bytes.put_u16(y);
            (ClientMessage::Pointer { x, y, buttons }, bytes)
        }),
        prop::collection::vec(any::<u8>(), 0..300).prop_map(|text| {
            let length = text.len() as u32;
            let mut bytes = vec![6, 0, 0, 0];
            bytes.put_u32(length);
            bytes.extend(text);
            (ClientMessage::CutText { length }, bytes)
        }),
        prop::collection::vec(any::<u8>(), 4..300).prop_map(|data| {
            let length = data.len() as u32;
            let mut bytes = vec![6, 0, 0, 0];
            bytes.put_i32(-length.cast_signed());
            bytes.extend(data);
            (ClientMessage::ExtendedCutText { length }, bytes)
        }),
        prop::collection::vec(any::<u8>(), 0..=64).prop_map(|payload| {
            let mut bytes = vec![248, 0, 0, 0, 0x80, 0, 0, 1, payload.len() as u8];
            bytes.extend(payload);
            (ClientMessage::Fence, bytes)
        }),
        (any::<u16>(), any::<u16>(), 0..4_u8).prop_map(|(width, height, screens)| {
            let mut bytes = vec![251, 0];
            bytes.put_u16(width);
            bytes.put_u16(height);
            bytes.extend([screens, 0]);
            bytes.resize(8 + 16 * usize::from(screens), 0);
            (ClientMessage::SetDesktopSize { width, height }, bytes)
        }),
        (any::<u32>(), any::<u32>(), any::<bool>()).prop_map(|(keysym, qnum, down)| {
            let mut bytes = vec![255, 0, 0, u8::from(down)];
            bytes.put_u32(keysym);
            bytes.put_u32(qnum);
            (ClientMessage::ExtendedKey { keysym, qnum, down }, bytes)
        }),
        prop_oneof![Just((0, 4)), Just((1, 4)), Just((2, 10))].prop_map(|(operation, length)| {
            let mut bytes = vec![255, 1, 0, operation];
            bytes.resize(length, 0);
            (ClientMessage::Audio, bytes)
        }),
    ]
}

proptest! {
    #[test]
    fn any_split_parses_the_same(
        sent in prop::collection::vec(message(), 0..12),
        cuts in prop::collection::vec(0..40_usize, 0..200),
    ) {
        let stream: Vec<u8> = sent.iter().flat_map(|(_, bytes)| bytes.clone()).collect();
        let got = decode_in_pieces(&stream, &cuts).unwrap();
        prop_assert_eq!(got.len(), sent.len());
        for (framed, (message, bytes)) in got.iter().zip(&sent) {
            prop_assert!(framed.message == *message);
            prop_assert_eq!(&framed.bytes[..], &bytes[..]);
        }
    }

    #[test]
    fn noise_neither_panics_nor_allocates_much(
        noise in prop::collection::vec(any::<u8>(), 0..200),
        kind in prop::sample::select(vec![0_u8, 2, 3, 4, 5, 6, 150, 248, 250, 251, 255]),
    ) {
        let (mut codec, mut buffer) = (ClientCodec::default(), BytesMut::new());
        buffer.put_u8(kind);
        buffer.extend_from_slice(&noise);
        while let Ok(Some(_)) = codec.decode(&mut buffer) {}
        prop_assert!(buffer.capacity() <= CUT_TEXT_MAX as usize + 4096);
    }

    #[test]
    fn a_cut_short_message_is_told_from_an_end((_, bytes) in message(), keep in any::<prop::sample::Index>()) {
        let keep = keep.index(bytes.len());
        let result = decode_in_pieces(&bytes[..keep], &[]);
        if keep == 0 {
            prop_assert_eq!(result.unwrap(), []);
        } else {
            prop_assert!(matches!(result, Err(DecodeError::Truncated)));
        }
    }
}

#[test]
fn what_cannot_be_read_on_is_refused() {
    assert_eq!(malformed(&[1]), Malformed::UnknownType(1));
    assert_eq!(malformed(b"GET / HTTP/1.1"), Malformed::UnknownType(b'G'));
    assert_eq!(malformed(&[255, 7]), Malformed::UnknownQemuSubtype(7));
    assert_eq!(
        malformed(&[255, 1, 0, 9]),
        Malformed::UnknownAudioOperation(9)
    );
    assert_eq!(
        malformed(&[248, 0, 0, 0, 0, 0, 0, 0, 65]),
        Malformed::FenceTooLong(65)
    );
}

#[test]
fn clipboards_are_bounded_before_they_are_read() {
    let header = |length: i32| {
        let mut bytes = vec![6, 0, 0, 0];
        bytes.put_i32(length);
        bytes
    };
    let limit = CUT_TEXT_MAX.cast_signed();
    assert_eq!(
        malformed(&header(limit + 1)),
        Malformed::CutTextTooLong(CUT_TEXT_MAX + 1)
    );
    assert_eq!(
        malformed(&header(i32::MIN)),
        Malformed::CutTextTooLong(1 << 31)
    );
    assert_eq!(
        malformed(&header(-3)),
        Malformed::ExtendedCutTextTooShort(3)
    );
    for length in [limit, -limit] {
        let mut bytes = header(length);
        bytes.resize(8 + CUT_TEXT_MAX as usize, 0);
        assert_eq!(decode_in_pieces(&bytes, &[3, 9, 70_000]).unwrap().len(), 1);
    }
}

#[test]
fn debug_shows_no_key() {
    let key = ClientMessage::Key {
        keysym: 0x41,
        down: true,
    };
    assert_eq!(format!("{key:?}"), "KeyEvent");
}
