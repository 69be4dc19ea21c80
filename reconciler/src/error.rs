//! What can go wrong while an image is reconciled.

use std::io;

use crate::page::PageIndex;

/// Why a step of the reconciliation failed.
///
/// Whatever a peer sent ends in [`Error::Malformed`], [`Error::TooLarge`],
/// [`Error::WrongBase`] or [`Error::NotShared`]; the image being built is then useless but nothing else is harmed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An image could not be read.
    #[error("cannot read page {page} of {image}; check the storage below it")]
    Read {
        /// Which image.
        image: &'static str,
        /// Which page.
        page: PageIndex,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The image being built could not be written.
    #[error("cannot write page {page} of the image being built; check free space at the target")]
    Write {
        /// Which page.
        page: PageIndex,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Bytes that do not say what they should.
    #[error("malformed {what}: {why}; the sender is broken or of another version")]
    Malformed {
        /// Which message or file.
        what: &'static str,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A length beyond what this side is ready to hold.
    #[error("{what} is {found}, more than the {limit} that are allowed here")]
    TooLarge {
        /// Which quantity.
        what: &'static str,
        /// What was announced.
        found: u64,
        /// What is accepted.
        limit: u64,
    },
    /// The offer counts from an image that this side does not hold.
    #[error(
        "the offer starts from another base than the one held here; send it from a common generation"
    )]
    WrongBase,
    /// The offer names places in an image that this side does not hold.
    #[error(
        "the offer names pages of an image that is not held here; list it among the places to look in"
    )]
    NotShared,
    /// A page has to go back to the base's content, and the base cannot be read here.
    #[error("{pages} pages have to go back to the base, which is not at hand; pass its reader")]
    NoBase {
        /// How many.
        pages: u64,
    },
    /// Patches did not fit what the target's replay made of these pages.
    #[error("patches of {pages} pages do not fit the replayed image; ask for the pages again")]
    Unpatched {
        /// How many.
        pages: u64,
    },
    /// The compressor refused.
    #[error("cannot compress the {stream}")]
    Encode {
        /// Which stream.
        stream: &'static str,
        /// What zstd said.
        #[source]
        source: io::Error,
    },
    /// The decompressor refused.
    #[error("cannot decompress the {stream}; the sender is broken or bytes were lost")]
    Decode {
        /// Which stream.
        stream: &'static str,
        /// What zstd said.
        #[source]
        source: io::Error,
    },
    /// The temporary file for pages that are both read and overwritten failed.
    #[error("cannot spool pages to a temporary file; check free space in its folder")]
    Spool {
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The caller's sink took no more chunks.
    #[error("the receiver of the encoded pages is gone")]
    SinkClosed,
    /// A thread of the encoder ended without an answer.
    #[error("a thread of the page encoder died; this is a defect, please report it")]
    WorkerDied,
    /// The image still differs after the pages that the source named were sent again.
    #[error(
        "the image still differs from the source after {rounds} repairs; is the source really stopped?"
    )]
    NotHealing {
        /// How often it was tried.
        rounds: u32,
    },
}

impl Error {
    pub(crate) const fn malformed(what: &'static str, why: &'static str) -> Self {
        Self::Malformed { what, why }
    }
}

/// Checks an announced quantity before anything is allocated for it.
pub(crate) const fn within(what: &'static str, found: u64, limit: u64) -> Result<(), Error> {
    if found > limit {
        Err(Error::TooLarge { what, found, limit })
    } else {
        Ok(())
    }
}
