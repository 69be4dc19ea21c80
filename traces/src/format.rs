//! The layout of a log file. All numbers are little endian.
//!
//! ```text
//! header, 100 bytes
//!     0  magic            89 "RMLOG" 0D 0A; the last two show a transfer in text mode
//!     8  version          u16, now 1
//!    10  header length    u16, so that a reader can skip what a later version adds
//!    12  VM               16 bytes
//!    28  generation       u64, the one that the log starts from
//!    36  base position    u64, records of this VM before the log's first
//!    44  key id           8 bytes, names the site's key (see `key.rs`)
//!    52  salt             32 random bytes; file key = derive_key(site's key, salt)
//!    84  created          u64, milliseconds since 1970
//!    92  checksum         first 8 bytes of BLAKE3(bytes 0..92)
//! blocks, each
//!     0  length            u32, of the sealed bytes
//!     4  session           u32, random for each time that the file was opened for appending
//!     8  head check        first 4 bytes of BLAKE3(block number as u64, bytes 0..8)
//!    12  body check        first 8 bytes of BLAKE3(block number as u64, the sealed bytes)
//!    20  sealed            ChaCha20-Poly1305 (RFC 8439) of the body, 16 bytes longer than it
//! ```
//!
//! What stays true for ever: magic, version, header length, VM and generation are where they
//! are now.
//!
//! The body is a byte that says what it is: records, coded as in `coding.rs` behind those of the
//! blocks before, or only that the log was ended in an orderly way.
//!
//! The nonce is session and block number; the associated data is the header and the same two.
//! The session is there because a torn block is cut off and its number used again: another
//! plaintext under the same nonce would give both away to someone who has copied the file
//! before and after.
//!
//! Each part of a block has its reason. The head check lets a damaged length be told from a
//! block that was never finished. The body check tells an unfinished or damaged block from one
//! that was forged, which fails only under the cipher. What none of it shows is that somebody
//! has cut off whole blocks at the end: the generation's manifest knows how long the log was.

use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use zeroize::Zeroize;

use crate::key::{hex, random};
use crate::{Error, KeyId, Limits, LogKey};

const MAGIC: [u8; 8] = *b"\x89RMLOG\r\n";
const VERSION: u16 = 1;
pub(crate) const HEADER_BYTES: usize = 100;
const CHECKED_BYTES: usize = 92;
pub(crate) const HEAD_BYTES: usize = 20;

/// Sealed bytes of a block, at most; a writer stays far below.
pub(crate) const MAX_SEALED: usize = 1 << 20;
/// What a block may hold, likewise.
pub(crate) const LIMITS: Limits = Limits {
    records: 1 << 16,
    bytes: 1 << 20,
};
/// Tiles of an anchor, at most: a region of 2048 x 2048 pixels.
pub(crate) const MAX_TILES: usize = 1 << 14;

/// A block of records.
pub(crate) const RECORDS: u8 = 0;
/// A block that ends the log.
pub(crate) const CLOSED: u8 = 1;

/// What a log is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogId {
    /// The VM.
    pub vm: [u8; 16],
    /// The generation that the log starts from.
    pub generation: u64,
    /// How many records of this VM come before the first of this log.
    pub base_position: u64,
}

/// The readable part of a log: needs no key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What the log is of.
    pub id: LogId,
    /// The key that it is encrypted under.
    pub key: KeyId,
    /// When recording began, by the host's clock.
    pub created: SystemTime,
    salt: [u8; 32],
}

impl Header {
    pub(crate) fn new(id: LogId, key: &LogKey, created: SystemTime) -> Result<Self, Error> {
        Ok(Self {
            id,
            key: key.id(),
            created,
            salt: random()?,
        })
    }

    /// Reads the header of a log, without a key.
    pub fn read(path: &Path) -> Result<Self, Error> {
        crate::reader::open(path).map(|(header, ..)| header)
    }

    /// Refuses a log of another VM or one that starts from another generation; `path` is for
    /// the message.
    pub fn expect(&self, path: &Path, vm: [u8; 16], generation: u64) -> Result<(), Error> {
        if self.id.vm != vm {
            return Err(Error::OtherVm {
                path: path.to_owned(),
                wanted: hex(&vm),
                found: hex(&self.id.vm),
            });
        }
        if self.id.generation != generation {
            return Err(Error::OtherGeneration {
                path: path.to_owned(),
                wanted: generation,
                found: self.id.generation,
            });
        }
        Ok(())
    }

    pub(crate) fn encode(&self) -> [u8; HEADER_BYTES] {
        let created = self.created.duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut bytes = [0; HEADER_BYTES];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..10].copy_from_slice(&VERSION.to_le_bytes());
        bytes[10..12].copy_from_slice(&(HEADER_BYTES as u16).to_le_bytes());
        bytes[12..28].copy_from_slice(&self.id.vm);
        bytes[28..36].copy_from_slice(&self.id.generation.to_le_bytes());
        bytes[36..44].copy_from_slice(&self.id.base_position.to_le_bytes());
        bytes[44..52].copy_from_slice(&self.key.0);
        bytes[52..84].copy_from_slice(&self.salt);
        bytes[84..92].copy_from_slice(&(created.as_millis() as u64).to_le_bytes());
        let check = header_check(&bytes);
        bytes[92..].copy_from_slice(&check);
        bytes
    }

    /// `bytes` are the first of the file, up to [`HEADER_BYTES`], and `length` is the file's.
    pub(crate) fn decode(path: &Path, bytes: &[u8], length: u64) -> Result<Self, Error> {
        let magic = bytes.len().min(MAGIC.len());
        if bytes.is_empty() || bytes[..magic] != MAGIC[..magic] {
            return Err(Error::Foreign {
                path: path.to_owned(),
            });
        }
        let truncated = || Error::Truncated {
            path: path.to_owned(),
            bytes: length,
        };
        let version = u16::from_le_bytes(
            *bytes
                .get(8..)
                .and_then(<[u8]>::first_chunk)
                .ok_or_else(truncated)?,
        );
        if version > VERSION {
            return Err(Error::Newer {
                path: path.to_owned(),
                version,
                known: VERSION,
            });
        }
        let bytes: &[u8; HEADER_BYTES] = bytes.first_chunk().ok_or_else(truncated)?;
        if header_check(bytes) != bytes[CHECKED_BYTES..] || version != VERSION {
            return Err(Error::HeaderDamaged {
                path: path.to_owned(),
            });
        }
        let created = u64::from_le_bytes(part(bytes, 84));
        Ok(Self {
            id: LogId {
                vm: part(bytes, 12),
                generation: u64::from_le_bytes(part(bytes, 28)),
                base_position: u64::from_le_bytes(part(bytes, 36)),
            },
            key: KeyId(part(bytes, 44)),
            created: UNIX_EPOCH
                .checked_add(Duration::from_millis(created))
                .unwrap_or(UNIX_EPOCH),
            salt: part(bytes, 52),
        })
    }
}

fn header_check(bytes: &[u8; HEADER_BYTES]) -> [u8; 8] {
    part(blake3::hash(&bytes[..CHECKED_BYTES]).as_bytes(), 0)
}

/// `N` bytes from `start`; zeros where there aren't as many, which no caller asks for.
fn part<const N: usize>(bytes: &[u8], start: usize) -> [u8; N] {
    bytes
        .get(start..)
        .and_then(<[u8]>::first_chunk)
        .copied()
        .unwrap_or([0; N])
}

/// Where a block stands in the file, which its checks and its nonce depend on.
#[derive(Clone, Copy)]
pub(crate) struct Place {
    pub(crate) number: u64,
    pub(crate) session: u32,
}

impl Place {
    fn nonce(self) -> Nonce {
        let mut nonce = [0; 12];
        nonce[..4].copy_from_slice(&self.session.to_le_bytes());
        nonce[4..].copy_from_slice(&self.number.to_le_bytes());
        Nonce::assume_unique_for_key(nonce)
    }
}

/// The cipher of one file.
pub(crate) struct Cipher {
    key: LessSafeKey,
    header: [u8; HEADER_BYTES],
}

impl Cipher {
    pub(crate) fn new(path: &Path, header: &Header, key: &LogKey) -> Result<Self, Error> {
        if key.id() != header.key {
            return Err(Error::OtherKey {
                path: path.to_owned(),
                wanted: header.key,
                given: key.id(),
            });
        }
        let mut secret = key.for_file(&header.salt);
        let unbound = UnboundKey::new(&CHACHA20_POLY1305, &secret);
        secret.zeroize();
        let unbound = unbound.map_err(|_| Error::Library { what: "the cipher" })?;
        Ok(Self {
            key: LessSafeKey::new(unbound),
            header: header.encode(),
        })
    }

    fn aad(&self, place: Place) -> Aad<[u8; HEADER_BYTES + 12]> {
        let mut bytes = [0; HEADER_BYTES + 12];
        bytes[..HEADER_BYTES].copy_from_slice(&self.header);
        bytes[HEADER_BYTES..HEADER_BYTES + 8].copy_from_slice(&place.number.to_le_bytes());
        bytes[HEADER_BYTES + 8..].copy_from_slice(&place.session.to_le_bytes());
        Aad::from(bytes)
    }

    /// A whole block, head and sealed body.
    pub(crate) fn seal(&self, place: Place, mut body: Vec<u8>) -> Result<Vec<u8>, Error> {
        self.key
            .seal_in_place_append_tag(place.nonce(), self.aad(place), &mut body)
            .map_err(|_| Error::Library { what: "the cipher" })?;
        let head = Head {
            length: body.len() as u32,
            session: place.session,
            body_check: body_check(place.number, &body),
        };
        let mut block = head.encode(place.number).to_vec();
        block.extend(body);
        Ok(block)
    }

    /// The body, unless it was forged.
    pub(crate) fn open(&self, place: Place, sealed: &mut [u8]) -> Option<usize> {
        let opened = self
            .key
            .open_in_place(place.nonce(), self.aad(place), sealed);
        opened.ok().map(|body| body.len())
    }
}

/// The head of a block.
pub(crate) struct Head {
    pub(crate) length: u32,
    pub(crate) session: u32,
    pub(crate) body_check: [u8; 8],
}

impl Head {
    fn encode(&self, number: u64) -> [u8; HEAD_BYTES] {
        let mut bytes = [0; HEAD_BYTES];
        bytes[..4].copy_from_slice(&self.length.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.session.to_le_bytes());
        let check = head_check(number, &bytes);
        bytes[8..12].copy_from_slice(&check);
        bytes[12..].copy_from_slice(&self.body_check);
        bytes
    }

    /// The head, if it is one that was written for this block.
    pub(crate) fn decode(number: u64, bytes: &[u8; HEAD_BYTES]) -> Option<Self> {
        let length = u32::from_le_bytes(part(bytes, 0));
        if head_check(number, bytes) != part(bytes, 8) || length as usize > MAX_SEALED {
            return None;
        }
        Some(Self {
            length,
            session: u32::from_le_bytes(part(bytes, 4)),
            body_check: part(bytes, 12),
        })
    }
}

fn head_check(number: u64, head: &[u8; HEAD_BYTES]) -> [u8; 4] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&number.to_le_bytes()).update(&head[..8]);
    part(hasher.finalize().as_bytes(), 0)
}

pub(crate) fn body_check(number: u64, sealed: &[u8]) -> [u8; 8] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&number.to_le_bytes()).update(sealed);
    part(hasher.finalize().as_bytes(), 0)
}
