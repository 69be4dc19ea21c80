//! The small change of the wire: variable-length integers, bounded decompression, and blobs
//! cut into parts that fit a frame.

use std::io::Read;

use serde::{Deserialize, Serialize};

use crate::error::{Error, within};

/// The most bytes in one part or chunk; well below the 1 MiB that a frame may hold.
pub const MAX_CHUNK: usize = 256 << 10;

/// Appends an integer in LEB128, as postcard and protocol buffers do.
pub(crate) fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// A difference of two numbers, wrapping, such that a small one of either sign is a small number.
pub(crate) const fn zigzag(difference: u64) -> u64 {
    let signed = difference.cast_signed();
    ((signed << 1) ^ (signed >> 63)).cast_unsigned()
}

/// The difference that [`zigzag`] has made a number of.
pub(crate) const fn unzigzag(value: u64) -> u64 {
    (value >> 1) ^ (value & 1).wrapping_neg()
}

/// Reads what others wrote, never past its end.
pub(crate) struct Cursor<'a> {
    what: &'static str,
    rest: &'a [u8],
}

impl<'a> Cursor<'a> {
    pub(crate) const fn new(what: &'static str, bytes: &'a [u8]) -> Self {
        Self { what, rest: bytes }
    }

    pub(crate) const fn malformed(&self, why: &'static str) -> Error {
        Error::malformed(self.what, why)
    }

    pub(crate) const fn remaining(&self) -> usize {
        self.rest.len()
    }

    pub(crate) fn varint(&mut self) -> Result<u64, Error> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let (&byte, rest) = self
                .rest
                .split_first()
                .ok_or(self.malformed("it ends early"))?;
            self.rest = rest;
            let bits = u64::from(byte & 0x7f);
            if shift == 63 && bits > 1 {
                return Err(self.malformed("an integer does not fit 64 bits"));
            }
            // One coding for each value, so that equal sets are equal bytes.
            if shift > 0 && byte == 0 {
                return Err(self.malformed("an integer is longer than it needs to be"));
            }
            value |= bits << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err(self.malformed("an integer does not fit 64 bits"))
    }

    pub(crate) fn bytes(&mut self, len: u64) -> Result<&'a [u8], Error> {
        let len = usize::try_from(len)
            .ok()
            .filter(|&len| len <= self.rest.len());
        let Some(len) = len else {
            return Err(self.malformed("it ends early"));
        };
        let (taken, rest) = self.rest.split_at(len);
        self.rest = rest;
        Ok(taken)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], Error> {
        let Some((taken, rest)) = self.rest.split_first_chunk::<N>() else {
            return Err(self.malformed("it ends early"));
        };
        self.rest = rest;
        Ok(*taken)
    }

    pub(crate) fn end(&self) -> Result<(), Error> {
        if self.rest.is_empty() {
            Ok(())
        } else {
            Err(self.malformed("bytes follow its end"))
        }
    }
}

const STORED: u8 = 0;
const ZSTD: u8 = 1;
const SECTION_LEVEL: i32 = 9;

/// Appends a section: compressed when that is smaller.
pub(crate) fn put_section(out: &mut Vec<u8>, raw: &[u8]) -> Result<(), Error> {
    let packed = zstd::bulk::compress(raw, SECTION_LEVEL).map_err(|source| Error::Encode {
        stream: "index",
        source,
    })?;
    let (tag, body) = if packed.len() < raw.len() {
        (ZSTD, &packed[..])
    } else {
        (STORED, raw)
    };
    out.push(tag);
    put_varint(out, raw.len() as u64);
    put_varint(out, body.len() as u64);
    out.extend_from_slice(body);
    Ok(())
}

/// Reads a section of at most `limit` bytes once unpacked.
pub(crate) fn take_section(cursor: &mut Cursor<'_>, limit: u64) -> Result<Vec<u8>, Error> {
    let [tag] = cursor.array()?;
    let raw_len = cursor.varint()?;
    within("a section", raw_len, limit)?;
    let body_len = cursor.varint()?;
    let body = cursor.bytes(body_len)?;
    let raw = match tag {
        STORED => body.to_vec(),
        ZSTD => {
            // Grows with what really comes out, so a lie about the length costs nothing.
            let mut raw = Vec::new();
            zstd::stream::read::Decoder::with_buffer(body)
                .and_then(|decoder| decoder.take(raw_len + 1).read_to_end(&mut raw))
                .map_err(|source| Error::Decode {
                    stream: "index",
                    source,
                })?;
            raw
        }
        _ => return Err(cursor.malformed("a section is packed in an unknown way")),
    };
    if raw.len() as u64 == raw_len {
        Ok(raw)
    } else {
        Err(cursor.malformed("a section is not as long as it says"))
    }
}

/// A piece of a message that is too large for one frame.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlobPart {
    /// At most [`MAX_CHUNK`] bytes.
    #[serde(with = "serde_bytes")]
    pub bytes: Vec<u8>,
    /// No part follows.
    pub last: bool,
}

/// Cuts a message into parts, at least one.
pub fn blob_parts(blob: &[u8]) -> impl Iterator<Item = BlobPart> + '_ {
    let count = blob.len().div_ceil(MAX_CHUNK).max(1);
    (0..count).map(move |i| {
        let end = blob.len().min((i + 1) * MAX_CHUNK);
        BlobPart {
            bytes: blob[i * MAX_CHUNK..end].to_vec(),
            last: i + 1 == count,
        }
    })
}

/// Puts a message together again.
#[derive(Debug)]
pub struct BlobAssembler {
    bytes: Vec<u8>,
    limit: u64,
    complete: bool,
}

impl BlobAssembler {
    /// Accepts at most `limit` bytes in all.
    pub const fn new(limit: u64) -> Self {
        Self {
            bytes: Vec::new(),
            limit,
            complete: false,
        }
    }

    /// Takes the next part; the whole message after the last one.
    pub fn push(&mut self, part: &BlobPart) -> Result<Option<Vec<u8>>, Error> {
        if self.complete {
            return Err(Error::malformed("message", "a part follows the last one"));
        }
        within(
            "a part of a message",
            part.bytes.len() as u64,
            MAX_CHUNK as u64,
        )?;
        within(
            "a message",
            (self.bytes.len() + part.bytes.len()) as u64,
            self.limit,
        )?;
        self.bytes.extend_from_slice(&part.bytes);
        self.complete = part.last;
        Ok(part.last.then(|| std::mem::take(&mut self.bytes)))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_integer_has_one_coding() {
        for overlong in [&[0x80, 0x00][..], &[0xff, 0x80, 0x00]] {
            assert!(
                Cursor::new("test", overlong).varint().is_err(),
                "{overlong:x?}"
            );
        }
        assert_eq!(Cursor::new("test", &[0x80, 0x01]).varint().unwrap(), 128);
    }

    proptest! {
        #[test]
        fn varints_come_back(value: u64) {
            let mut out = Vec::new();
            put_varint(&mut out, value);
            let mut cursor = Cursor::new("test", &out);
            prop_assert_eq!(cursor.varint().unwrap(), value);
            cursor.end().unwrap();
        }

        #[test]
        fn sections_come_back_and_garbage_is_refused(
            raw in prop::collection::vec(0u8..3, 0..5000),
            garbage in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            let mut out = Vec::new();
            put_section(&mut out, &raw).unwrap();
            let mut cursor = Cursor::new("test", &out);
            prop_assert_eq!(take_section(&mut cursor, 5000).unwrap(), raw.clone());
            let too_small = take_section(&mut Cursor::new("test", &out), raw.len() as u64 / 2);
            prop_assert_eq!(too_small.is_err(), !raw.is_empty());
            if let Ok(section) = take_section(&mut Cursor::new("test", &garbage), 1000) {
                prop_assert!(section.len() <= 1000);
            }
        }
    }

    #[test]
    fn blobs_come_back_and_stay_within_their_limit() {
        for len in [0, 1, MAX_CHUNK, MAX_CHUNK + 1, 3 * MAX_CHUNK] {
            let blob: Vec<u8> = (0..len).map(|i| (i % 251) as u8).collect();
            let mut assembler = BlobAssembler::new(len as u64);
            let mut whole = None;
            for part in blob_parts(&blob) {
                assert!(whole.is_none());
                whole = assembler.push(&part).unwrap();
            }
            assert_eq!(whole.unwrap(), blob);
        }
        let part = BlobPart {
            bytes: vec![0; 11],
            last: false,
        };
        assert!(BlobAssembler::new(10).push(&part).is_err());
    }
}
