//! Every way a log can be refused, each with what to do about it.

use std::io;
use std::path::PathBuf;

use crate::KeyId;

/// Why a log could not be written, read or understood.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The file system refused.
    #[error("could not {action} {path:?}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The file doesn't start as a log does.
    #[error(
        "{path:?} is not an interaction log; give a file that `replay-migrate record` has written"
    )]
    Foreign {
        /// The file.
        path: PathBuf,
    },
    /// The file ends inside its header.
    #[error(
        "the log {path:?} is cut off inside its header, after {bytes} bytes: nothing of it can be \
         read; copy it again or record anew"
    )]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Its length.
        bytes: u64,
    },
    /// The header's checksum is wrong.
    #[error("the header of the log {path:?} is damaged; restore the file from a copy")]
    HeaderDamaged {
        /// The file.
        path: PathBuf,
    },
    /// A later version of this program wrote it.
    #[error(
        "the log {path:?} has format version {version}, and this program reads up to {known}; \
         update replay-migrate on this host"
    )]
    Newer {
        /// The file.
        path: PathBuf,
        /// The version found.
        version: u16,
        /// The newest version this build reads.
        known: u16,
    },
    /// The log belongs to another VM.
    #[error("the log {path:?} is of VM {found}, not of VM {wanted}; give this VM's own log")]
    OtherVm {
        /// The file.
        path: PathBuf,
        /// The VM asked for, in hexadecimal.
        wanted: String,
        /// The VM it is of, in hexadecimal.
        found: String,
    },
    /// The log starts at another generation.
    #[error(
        "the log {path:?} starts at generation {found}, not at {wanted}; give the log that was \
         recorded from generation {wanted}, or restore generation {found}"
    )]
    OtherGeneration {
        /// The file.
        path: PathBuf,
        /// The generation asked for.
        wanted: u64,
        /// The generation it starts at.
        found: u64,
    },
    /// The log was encrypted with another site's key.
    #[error(
        "the log {path:?} was encrypted with key {wanted}, and this site's log key is {given}; \
         read it at the site that recorded it, or give that site's key"
    )]
    OtherKey {
        /// The file.
        path: PathBuf,
        /// The key it needs.
        wanted: KeyId,
        /// The key that was given.
        given: KeyId,
    },
    /// A block is whole but fails authentication under the right key.
    #[error(
        "block {block} of the log {path:?} is not what was recorded: somebody changed the file; \
         do not use it, restore it from a copy"
    )]
    Forged {
        /// The file.
        path: PathBuf,
        /// Number of the block, from 0.
        block: u64,
    },
    /// A block that was written whole is damaged.
    #[error(
        "block {block} of the log {path:?}, at byte {offset}, is damaged; restore the file from a \
         copy (what comes before that block can still be read)"
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Number of the block, from 0.
        block: u64,
        /// Where it starts.
        offset: u64,
    },
    /// Bytes decrypt or arrive well, but are no coded records.
    #[error("these are not coded records: {what}; the sender's version or memory is at fault")]
    Malformed {
        /// What is wrong with them.
        what: &'static str,
    },
    /// More than the caller allows.
    #[error("the records take {found} {unit}, and at most {limit} are accepted")]
    TooMuch {
        /// How much it was.
        found: u64,
        /// How much is allowed.
        limit: u64,
        /// Of what.
        unit: &'static str,
    },
    /// An anchor with more tiles than any screen region we capture.
    #[error("an anchor of {tiles} tiles does not fit the log, which takes up to {limit} in one")]
    AnchorTooLarge {
        /// Its tiles.
        tiles: usize,
        /// The limit.
        limit: usize,
    },
    /// A write failed before; what is in the file is unknown.
    #[error("the log {path:?} failed to be written before; open it again to go on")]
    Poisoned {
        /// The file.
        path: PathBuf,
    },
    /// Another process is writing this log.
    #[error("the log {path:?} is being written by another process; stop that recording first")]
    Busy {
        /// The file.
        path: PathBuf,
    },
    /// The key file is no key file.
    #[error(
        "{path:?} is not a log key: {what}; restore it from a copy (logs written with it can't be \
         read without it)"
    )]
    KeyFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: &'static str,
    },
    /// Other users could read the key.
    #[error("the log key {path:?} can be read by others; run `chmod 600` on it")]
    KeyExposed {
        /// The file.
        path: PathBuf,
    },
    /// The system has no randomness to give.
    #[error("the system's random number generator failed; keys and salts can't be made")]
    Random,
    /// zstd or the cipher refused; never happens on sane input.
    #[error("{what} failed inside its library; this is a defect, please report it")]
    Library {
        /// Which operation.
        what: &'static str,
    },
}

impl Error {
    /// For `map_err` on I/O.
    pub(crate) fn io(
        action: &'static str,
        path: &std::path::Path,
    ) -> impl FnOnce(io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |source| Self::Io {
            action,
            path,
            source,
        }
    }
}
