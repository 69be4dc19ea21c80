//! Recordings of the wire: what two sites said, in the pieces that are kept as test vectors.
//!
//! A recording is a list of entries, in zstd: who spoke (0 the caller, 1 the called), what it is (0 the
//! preamble, 1 a record, 2 a message), a length (u32, little endian), so many bytes. Records and
//! messages stand there without the length that precedes them on the wire. It is all that was said
//! on one connection, but for the bulk of it: of each kind of record and message the first few that
//! are small.
//!
//! What a message is, is not known here; how messages are found in what was said is, in the form
//! that it has had since version 6 (`docs/protocol.md`): frames of records, of which those of kind 4
//! carry bytes of a stream that is frames of messages.

use std::collections::HashMap;
use std::io;

use crate::tap::{Heard, Speaker};

/// Of each kind so many are kept.
const OF_A_KIND: usize = 3;
/// None is kept that takes more, packed.
const LARGEST: usize = 4 << 10;
/// Made once, read for ever.
const LEVEL: i32 = 19;
/// The kind of record that carries bytes of the stream.
const DATA: u8 = 4;

/// What an entry of a recording is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum What {
    /// The first bytes of a side.
    Preamble,
    /// What travels on a connection.
    Record,
    /// What the sites say.
    Message,
}

/// An entry of a recording.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Who spoke.
    pub by: Speaker,
    /// What it is.
    pub what: What,
    /// What was said, without a length before it.
    pub bytes: Vec<u8>,
}

/// What is said so far of something that comes in pieces with a length before each.
#[derive(Default)]
struct Frames(Vec<u8>);

impl Frames {
    fn next(&mut self) -> Option<Vec<u8>> {
        let len = u32::from_le_bytes(*self.0.first_chunk()?) as usize;
        if self.0.len() < 4 + len {
            return None;
        }
        let frame = self.0[4..4 + len].to_vec();
        self.0.drain(..4 + len);
        Some(frame)
    }
}

/// One side of a connection.
#[derive(Default)]
struct Side {
    preamble: Vec<u8>,
    records: Frames,
    messages: Frames,
}

/// All that was said on a connection, in pieces.
pub fn entries(heard: &Heard) -> Vec<Entry> {
    let mut sides = [Side::default(), Side::default()];
    let mut entries = Vec::new();
    for (by, bytes) in heard {
        let side = &mut sides[index(*by)];
        let mut bytes = &bytes[..];
        if side.preamble.len() < 8 {
            let (first, rest) = bytes.split_at(bytes.len().min(8 - side.preamble.len()));
            side.preamble.extend(first);
            bytes = rest;
            if side.preamble.len() == 8 {
                entries.push(Entry {
                    by: *by,
                    what: What::Preamble,
                    bytes: side.preamble.clone(),
                });
            }
        }
        side.records.0.extend(bytes);
        while let Some(record) = side.records.next() {
            if let Some(data) = data_of(&record) {
                side.messages.0.extend(data);
            }
            entries.push(Entry {
                by: *by,
                what: What::Record,
                bytes: record,
            });
            while let Some(message) = side.messages.next() {
                entries.push(Entry {
                    by: *by,
                    what: What::Message,
                    bytes: message,
                });
            }
        }
    }
    entries
}

/// The bytes of the stream that a record carries: after its kind, their number as a varint.
fn data_of(record: &[u8]) -> Option<&[u8]> {
    let (&kind, rest) = record.split_first()?;
    let len = rest.iter().position(|byte| byte & 0x80 == 0)? + 1;
    (kind == DATA).then(|| &rest[len..])
}

fn index(by: Speaker) -> usize {
    match by {
        Speaker::Caller => 0,
        Speaker::Called => 1,
    }
}

/// The version that the caller speaks.
pub fn version(entries: &[Entry]) -> Option<u16> {
    let first = entries
        .iter()
        .find(|entry| entry.by == Speaker::Caller && entry.what == What::Preamble)?;
    Some(u16::from_le_bytes([first.bytes[4], first.bytes[5]]))
}

/// The first few small ones of each kind.
pub fn without_bulk(entries: Vec<Entry>) -> Vec<Entry> {
    let mut seen: HashMap<_, usize> = HashMap::new();
    let mut keeps = |entry: &Entry| {
        let small = zstd::encode_all(&entry.bytes[..], 3).is_ok_and(|all| all.len() <= LARGEST);
        let kind = (index(entry.by), entry.what, entry.bytes.first().copied());
        let seen = seen.entry(kind).or_default();
        *seen += usize::from(small);
        small && *seen <= OF_A_KIND
    };
    entries.into_iter().filter(|entry| keeps(entry)).collect()
}

/// A recording as it is kept.
pub fn pack(entries: &[Entry]) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    for Entry {
        by,
        what,
        bytes: said,
    } in entries
    {
        let what = match what {
            What::Preamble => 0,
            What::Record => 1,
            What::Message => 2,
        };
        bytes.extend([index(*by) as u8, what]);
        bytes.extend((said.len() as u32).to_le_bytes());
        bytes.extend(said);
    }
    zstd::encode_all(&bytes[..], LEVEL)
}

/// A recording that was kept.
pub fn unpack(packed: &[u8]) -> io::Result<Vec<Entry>> {
    let wrong = || io::Error::new(io::ErrorKind::InvalidData, "no recording of the wire");
    let bytes = zstd::decode_all(packed)?;
    let mut rest = &bytes[..];
    let mut entries = Vec::new();
    while !rest.is_empty() {
        let (head, after) = rest.split_first_chunk::<6>().ok_or_else(wrong)?;
        let by = match head[0] {
            0 => Speaker::Caller,
            1 => Speaker::Called,
            _ => return Err(wrong()),
        };
        let what = match head[1] {
            0 => What::Preamble,
            1 => What::Record,
            2 => What::Message,
            _ => return Err(wrong()),
        };
        let len = u32::from_le_bytes([head[2], head[3], head[4], head[5]]) as usize;
        let (said, after) = after.split_at_checked(len).ok_or_else(wrong)?;
        rest = after;
        entries.push(Entry {
            by,
            what,
            bytes: said.to_vec(),
        });
    }
    Ok(entries)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_said_is_found_in_whatever_pieces_it_came_and_comes_back() {
        let message = [&[3, 0, 0, 0][..], b"ask"].concat();
        let mut said = b"RPLM\x07\0\0\0".to_vec();
        for data in [&message[..2], &message[2..]] {
            let record = [&[DATA, data.len() as u8], data].concat();
            said.extend((record.len() as u32).to_le_bytes());
            said.extend(record);
        }
        for size in 1..said.len() {
            let pieces = said.chunks(size);
            let heard: Heard = pieces
                .map(|piece| (Speaker::Caller, piece.to_vec()))
                .collect();
            let all = entries(&heard);
            let whats: Vec<_> = all.iter().map(|entry| entry.what).collect();
            assert_eq!(
                whats,
                [What::Preamble, What::Record, What::Record, What::Message]
            );
            assert_eq!(all[3].bytes, b"ask");
            assert_eq!(version(&all), Some(7));
            let kept = unpack(&pack(&all).unwrap()).unwrap();
            assert_eq!(kept, all);
        }
        let many = vec![
            Entry {
                by: Speaker::Called,
                what: What::Message,
                bytes: vec![1],
            };
            9
        ];
        assert_eq!(without_bulk(many).len(), OF_A_KIND);
    }
}
