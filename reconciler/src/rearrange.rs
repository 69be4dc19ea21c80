//! Bringing the bytes of a replayed device state into the source's order before it is compared.
//!
//! QEMU writes a device state as one stream, and what it writes is not always in the same
//! order: after a restore the lists of virtio-gpu's resources and scanouts run the other way
//! round, and a queue with an element more moves all that follows by some bytes. No page of such
//! a stream is the same then, though hardly a byte of it is new. So the source says from where
//! in the replayed stream to copy each part of its own: the COPY instructions of VCDIFF
//! (RFC 3284, section 5), without its ADD. Every byte is copied from somewhere; those that are new come
//! out wrong, and are mended as all pages are that are not right.
//!
//! The source finds the parts in what its own replay left, see [`crate::References::twin`], which
//! is all it knows of the target's.
//!
//! Invariant: [`Rearrangement::apply`] depends on the instructions and the stream alone. Bounds:
//! [`Rearrangement::MOST`] instructions; whatever they are, each byte is written once.

use std::collections::HashMap;

use crate::error::Error;
use crate::wire::{Cursor, put_section, put_varint, take_section, unzigzag, zigzag};

/// Parts are found by blocks of so many bytes.
const BLOCK: usize = 32;

/// A shorter part is left as it is. Screens are full of rows that stand elsewhere, too; where
/// they do in one replay they need not in another, and a patch tells them as well.
const SHORTEST: usize = 256;

/// From a place of the new stream to the next instruction's, the old stream is copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Copied {
    /// Where, in the new stream.
    at: u64,
    /// From where, in the old one.
    from: u64,
}

/// How to put a stream of bytes together from another one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rearrangement {
    /// Ascending by place.
    copies: Vec<Copied>,
}

impl Rearrangement {
    /// It never has more instructions.
    pub const MOST: usize = 1 << 16;

    /// The longest encoding: two numbers for each instruction.
    pub const MAX_ENCODED_LEN: u64 = 1024 + Self::MOST as u64 * 20;

    /// How to put `new` together from `old`, nearly; empty if `old` is like it in its own order.
    pub fn between(new: &[u8], old: &[u8]) -> Self {
        if new == old {
            return Self::default();
        }
        let blocks = blocks(old);
        let mut copies = Vec::new();
        // Where the part begins that is being copied, and from where.
        let (mut at, mut from) = (0, 0);
        loop {
            let same = same(&new[at..], old.get(from..).unwrap_or_default());
            (at, from) = (at + same, from + same);
            let Some(next) = resume(new, old, (at, from), &blocks) else {
                break;
            };
            if next.0.wrapping_sub(at) != next.1.wrapping_sub(from) {
                if copies.len() == Self::MOST {
                    break;
                }
                copies.push(Copied {
                    at: next.0 as u64,
                    from: next.1 as u64,
                });
            }
            (at, from) = next;
        }
        Self { copies }
    }

    /// Puts a stream of `len` bytes together. What lies beyond the end of `old` is zero.
    pub fn apply(&self, old: &[u8], len: usize) -> Vec<u8> {
        let mut new = vec![0; len];
        let mut copy = |at: u64, end: u64, from: u64| {
            let clamp =
                |place: u64, end: usize| usize::try_from(place).map_or(end, |it| it.min(end));
            let into = &mut new[clamp(at, len)..clamp(end, len)];
            let from = &old[clamp(from, old.len())..];
            let count = into.len().min(from.len());
            into[..count].copy_from_slice(&from[..count]);
        };
        let (mut at, mut from) = (0, 0);
        for next in &self.copies {
            copy(at, next.at, from);
            (at, from) = (next.at, next.from);
        }
        copy(at, len as u64, from);
        new
    }

    /// Whether it changes nothing.
    pub fn is_empty(&self) -> bool {
        self.copies.is_empty()
    }

    /// How many instructions it has.
    pub fn len(&self) -> usize {
        self.copies.len()
    }

    /// As bytes.
    ///
    /// # Errors
    /// When zstd fails.
    pub fn encode(&self) -> Result<Vec<u8>, Error> {
        let mut numbers = Vec::new();
        put_varint(&mut numbers, self.copies.len() as u64);
        let (mut at, mut from) = (0, 0_u64);
        for next in &self.copies {
            put_varint(&mut numbers, next.at - at);
            // Mostly it goes on close by.
            let on = from.wrapping_add(next.at - at);
            put_varint(&mut numbers, zigzag(next.from.wrapping_sub(on)));
            (at, from) = (next.at, next.from);
        }
        let mut out = Vec::new();
        put_section(&mut out, &numbers)?;
        Ok(out)
    }

    /// Reads what another site wrote.
    ///
    /// # Errors
    /// When it is malformed, or has more instructions than any may have.
    pub fn decode(bytes: &[u8]) -> Result<Self, Error> {
        let mut cursor = Cursor::new("a rearrangement", bytes);
        let numbers = take_section(&mut cursor, Self::MAX_ENCODED_LEN)?;
        cursor.end()?;
        let mut numbers = Cursor::new("a rearrangement", &numbers);
        let count = numbers.varint()?;
        let too_many = numbers.malformed("it has more parts than any stream");
        let count = usize::try_from(count)
            .ok()
            .filter(|count| *count <= Self::MOST)
            .ok_or(too_many)?;
        let (mut at, mut from) = (0_u64, 0_u64);
        let mut copies = Vec::new();
        for _ in 0..count {
            let step = numbers.varint()?;
            at = at
                .checked_add(step)
                .ok_or(numbers.malformed("a part is beyond the last address"))?;
            from = from
                .wrapping_add(step)
                .wrapping_add(unzigzag(numbers.varint()?));
            copies.push(Copied { at, from });
        }
        numbers.end()?;
        Ok(Self { copies })
    }
}

/// Where each block of a stream first stands. Blocks of one repeated byte are left out: they
/// stand everywhere, and say nothing.
fn blocks(old: &[u8]) -> HashMap<&[u8; BLOCK], usize> {
    let mut places = HashMap::new();
    for (index, block) in old.as_chunks::<BLOCK>().0.iter().enumerate() {
        if block.iter().any(|byte| *byte != block[0]) {
            places.entry(block).or_insert(index * BLOCK);
        }
    }
    places
}

/// The next place at which the streams are the same: as they lie for a block, or in another way
/// for [`SHORTEST`] bytes, whichever comes first.
fn resume(
    new: &[u8],
    old: &[u8],
    (at, from): (usize, usize),
    blocks: &HashMap<&[u8; BLOCK], usize>,
) -> Option<(usize, usize)> {
    let end = new.len().checked_sub(BLOCK)?;
    for place in at..=end {
        let block = new[place..].first_chunk::<BLOCK>()?;
        let straight = from + (place - at);
        if old.get(straight..straight + BLOCK) == Some(block) {
            return Some((place, straight));
        }
        if let Some(found) = blocks.get(block) {
            // It may have begun before the block did.
            let room = (place - at).min(*found);
            let before = new[place - room..place]
                .iter()
                .rev()
                .zip(old[found - room..*found].iter().rev())
                .take_while(|(a, b)| a == b)
                .count();
            if before + same(&new[place..], &old[*found..]) >= SHORTEST {
                return Some((place - before, found - before));
            }
        }
    }
    None
}

/// How many bytes are the same from the beginning.
fn same(a: &[u8], b: &[u8]) -> usize {
    const STEP: usize = 256;
    let steps = a.chunks_exact(STEP).zip(b.chunks_exact(STEP));
    let whole = steps.take_while(|(a, b)| a == b).count() * STEP;
    let rest = a[whole..].iter().zip(&b[whole..]);
    whole + rest.take_while(|(a, b)| a == b).count()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Bytes without order.
    fn noise(seed: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let mut hasher = blake3::Hasher::new();
        hasher.update(&seed.to_le_bytes());
        hasher.finalize_xof().fill(&mut bytes);
        bytes
    }

    fn wrong(new: &[u8], old: &[u8]) -> (usize, usize) {
        let told = Rearrangement::between(new, old);
        let read = Rearrangement::decode(&told.encode().unwrap()).unwrap();
        assert_eq!(read, told);
        let made = read.apply(old, new.len());
        let wrong = made.iter().zip(new).filter(|(a, b)| a != b).count();
        (told.len(), wrong)
    }

    #[test]
    fn what_stands_in_another_order_is_found() {
        let parts = [noise(1, 5000), noise(2, 301), noise(3, 70_003)];
        let old = parts.concat();
        let new = [&parts[2][..], &parts[0][..], &parts[1][..]].concat();
        let (copies, wrong) = wrong(&new, &old);
        // The first two follow each other as before.
        assert_eq!((copies, wrong), (2, 0));
    }

    #[test]
    fn what_is_moved_by_some_bytes_is_found_and_what_is_new_costs_no_instruction() {
        let old = noise(1, 100_000);
        let mut new = [&old[..40_000], b"an element more", &old[40_000..]].concat();
        for place in [100, 20_000, 70_000] {
            new[place] ^= 1;
        }
        let (copies, wrong) = wrong(&new, &old);
        assert_eq!(copies, 1);
        assert!(wrong <= 3 + 15, "{wrong}");
    }

    #[test]
    fn the_same_stream_needs_nothing() {
        let old = noise(1, 10_000);
        assert!(Rearrangement::between(&old, &old).is_empty());
        assert_eq!(wrong(&old[..9_000], &old), (0, 0));
        assert_eq!(wrong(&[], &old), (0, 0));
        assert_eq!(wrong(&[1; 10_000], &[]), (0, 10_000));
    }

    #[test]
    fn more_parts_than_any_stream_has_are_refused() {
        let mut numbers = Vec::new();
        put_varint(&mut numbers, Rearrangement::MOST as u64 + 1);
        for _ in 0..=Rearrangement::MOST {
            numbers.extend_from_slice(&[1, 2]);
        }
        let mut bytes = Vec::new();
        put_section(&mut bytes, &numbers).unwrap();
        assert!(Rearrangement::decode(&bytes).is_err());
    }

    proptest! {
        #[test]
        fn any_instructions_do_no_harm(
            copies in proptest::collection::vec((0..5000_u64, any::<u64>()), 0..50),
            len in 0..10_000_usize,
        ) {
            let mut at = 0;
            let copies = copies.into_iter().map(|(step, from)| {
                at += step;
                Copied { at, from }
            });
            let told = Rearrangement { copies: copies.collect() };
            let read = Rearrangement::decode(&told.encode().unwrap()).unwrap();
            prop_assert_eq!(&read, &told);
            prop_assert_eq!(read.apply(&noise(1, 4096), len).len(), len);
        }

        #[test]
        fn parts_in_any_order_come_out_right(
            parts in proptest::collection::vec((any::<u64>(), 300..2000_usize), 1..12),
            order in any::<u64>(),
        ) {
            let parts: Vec<_> = parts.iter().map(|(seed, len)| noise(*seed, *len)).collect();
            let mut shuffled = parts.clone();
            shuffled.sort_by_key(|part| blake3::hash(&[part, &order.to_le_bytes()[..]].concat()).to_hex());
            let (_, wrong) = wrong(&shuffled.concat(), &parts.concat());
            prop_assert_eq!(wrong, 0);
        }
    }
}
