//! A tree as a file: what a site keeps beside each generation, so that a migration does not
//! begin with reading the base.
//!
//! Magic, version, page count, the chunks that are not zero, for each a bitmap of the pages
//! that are not zero and their hashes; last a BLAKE3 of all of it.

use std::sync::Arc;

use crate::error::{Error, within};
use crate::page::{MAX_PAGES, PageHash};
use crate::page_set::PageSet;
use crate::tree::{Chunk, FAN_OUT, ImageTree};
use crate::wire::{Cursor, put_varint};

const MAGIC: &[u8; 8] = b"RMTREE\r\n";
const VERSION: u64 = 1;
const WHAT: &str = "image tree";
const CHECKSUM: usize = 32;

impl ImageTree {
    /// The tree as bytes to keep.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        put_varint(&mut out, VERSION);
        put_varint(&mut out, self.pages());
        let mut stored = PageSet::new();
        for (i, _) in self
            .chunks()
            .iter()
            .enumerate()
            .filter(|(_, chunk)| chunk.is_some())
        {
            stored.push(crate::page::PageIndex(i as u64));
        }
        stored.encode_into(&mut out);
        for chunk in self.chunks().iter().flatten() {
            let mut bitmap = [0u8; FAN_OUT / 8];
            for (i, _) in chunk
                .leaves
                .iter()
                .enumerate()
                .filter(|(_, leaf)| !leaf.is_zero())
            {
                bitmap[i / 8] |= 1 << (i % 8);
            }
            out.extend_from_slice(&bitmap);
            for leaf in chunk.leaves.iter().filter(|leaf| !leaf.is_zero()) {
                out.extend_from_slice(&leaf.0);
            }
        }
        let checksum = blake3::hash(&out);
        out.extend_from_slice(checksum.as_bytes());
        out
    }

    /// Reads a tree of at most `max_pages` pages.
    pub fn decode(bytes: &[u8], max_pages: u64) -> Result<Self, Error> {
        let Some((body, checksum)) = bytes.split_last_chunk::<CHECKSUM>() else {
            return Err(Error::malformed(WHAT, "it is too short"));
        };
        let mut cursor = Cursor::new(WHAT, body);
        if &cursor.array()? != MAGIC {
            return Err(cursor.malformed("it does not begin as one"));
        }
        if cursor.varint()? != VERSION {
            return Err(cursor.malformed("it is of an unknown version"));
        }
        if blake3::hash(body).as_bytes() != checksum {
            return Err(cursor.malformed("its checksum does not match"));
        }
        let pages = cursor.varint()?;
        within(
            "the size of an image in pages",
            pages,
            max_pages.min(MAX_PAGES),
        )?;
        let count = pages.div_ceil(FAN_OUT as u64);
        let stored = PageSet::decode_from(&mut cursor, count)?;
        within(
            "the number of chunks",
            stored.len(),
            cursor.remaining() as u64 / (FAN_OUT as u64 / 8),
        )?;
        let mut chunks = vec![None; count as usize];
        for index in stored.iter() {
            let bitmap: [u8; FAN_OUT / 8] = cursor.array()?;
            let mut chunk = Chunk::zero();
            let held = (pages - index.0 * FAN_OUT as u64).min(FAN_OUT as u64) as usize;
            for (i, leaf) in chunk.leaves.iter_mut().enumerate() {
                if bitmap[i / 8] & (1 << (i % 8)) != 0 {
                    if i >= held {
                        return Err(cursor.malformed("it has pages past its end"));
                    }
                    *leaf = PageHash(cursor.array()?);
                }
            }
            if chunk.is_zero() {
                return Err(cursor.malformed("a chunk without content is stored"));
            }
            chunks[index.0 as usize] = Some(Arc::new(chunk));
        }
        cursor.end()?;
        Ok(Self::from_chunks(pages, chunks))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::page::PageIndex;

    fn sample(pages: u64, content: &[(u64, u8)]) -> ImageTree {
        let mut tree = ImageTree::zero(pages).unwrap();
        for &(index, byte) in content {
            tree.set(PageIndex(index % pages), PageHash([byte; 32]))
                .unwrap();
        }
        tree
    }

    proptest! {
        #[test]
        fn trees_come_back_and_damage_is_seen(
            pages in 1u64..3000,
            content in prop::collection::vec((any::<u64>(), any::<u8>()), 0..40),
            at: prop::sample::Index,
            bit in 0u32..8,
        ) {
            let tree = sample(pages, &content);
            let mut bytes = tree.encode();
            let back = ImageTree::decode(&bytes, pages).unwrap();
            prop_assert_eq!(back.root(), tree.root());
            prop_assert!(ImageTree::decode(&bytes, pages - 1).is_err());
            let cut = at.index(bytes.len());
            prop_assert!(ImageTree::decode(&bytes[..cut], pages).is_err());
            bytes[cut] ^= 1 << bit;
            prop_assert!(ImageTree::decode(&bytes, pages).is_err());
        }

        #[test]
        fn bytes_with_a_right_checksum_do_no_harm(
            tail in prop::collection::vec(prop_oneof![0u8..3, any::<u8>()], 0..300),
        ) {
            let mut bytes = MAGIC.to_vec();
            bytes.push(VERSION as u8);
            bytes.extend(tail);
            let checksum = blake3::hash(&bytes);
            bytes.extend_from_slice(checksum.as_bytes());
            if let Ok(tree) = ImageTree::decode(&bytes, 100_000) {
                prop_assert!(tree.encode().len() <= bytes.len());
            }
        }
    }
}
