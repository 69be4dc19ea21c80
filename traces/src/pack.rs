//! zstd with the plaintext that came before as its reference, so that a block of two seconds
//! still finds its repetitions (RFC 8878 section 5, raw content as dictionary).

use zstd::zstd_safe::{CCtx, CParameter, DCtx, compress_bound};

use crate::Error;

/// How much of the plaintext before a block may be referred to.
pub(crate) const HISTORY: usize = 64 << 10;

/// Blocks are a few hundred bytes every few seconds: the level costs nothing noticeable.
const LEVEL: i32 = 15;

const FAILED: Error = Error::Library {
    what: "compression",
};

/// Compresses into one frame without checksum or content size: the caller keeps those.
pub(crate) fn pack(plain: &[u8], history: &[u8]) -> Result<Vec<u8>, Error> {
    let mut context = CCtx::try_create().ok_or(FAILED)?;
    for parameter in [
        CParameter::CompressionLevel(LEVEL),
        CParameter::ContentSizeFlag(false),
        CParameter::ChecksumFlag(false),
    ] {
        context.set_parameter(parameter).map_err(|_| FAILED)?;
    }
    context.ref_prefix(history).map_err(|_| FAILED)?;
    let mut packed = Vec::with_capacity(compress_bound(plain.len()));
    context.compress2(&mut packed, plain).map_err(|_| FAILED)?;
    Ok(packed)
}

/// Undoes [`pack`]. The result is exactly `length` bytes; the caller has bounded `length`.
pub(crate) fn unpack(packed: &[u8], length: usize, history: &[u8]) -> Result<Vec<u8>, Error> {
    let mut context = DCtx::try_create().ok_or(FAILED)?;
    context.ref_prefix(history).map_err(|_| FAILED)?;
    let mut plain = Vec::with_capacity(length);
    context
        .decompress(&mut plain, packed)
        .map_err(|_| Error::Malformed {
            what: "the compressed data is broken",
        })?;
    if plain.len() != length {
        return Err(Error::Malformed {
            what: "the compressed data has another length than it says",
        });
    }
    Ok(plain)
}

/// Keeps the tail of what was packed, for the next block.
pub(crate) fn remember(history: &mut Vec<u8>, plain: &[u8]) {
    let keep = HISTORY.saturating_sub(plain.len()).min(history.len());
    history.drain(..history.len() - keep);
    history.extend_from_slice(&plain[plain.len().saturating_sub(HISTORY)..]);
}
