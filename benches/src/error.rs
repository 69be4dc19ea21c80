//! What can go wrong.

use std::io;
use std::path::{Path, PathBuf};

/// Why a capture could not be measured.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file of the capture, or a temporary one.
    #[error("cannot {what} {}", path.display())]
    File {
        /// What was tried.
        what: &'static str,
        /// With which file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A file that could not be mapped.
    #[error("cannot read a state of the capture")]
    Map(#[source] vm_host::Error),
    /// It is not known which pages are free.
    #[error("no free pages can be dropped from the capture's source")]
    Free(#[source] introspection::free::Unsure),
    /// There is no capture.
    #[error(
        "{} is no capture: it has no {missing}; `replay-migrate capture` makes one", dir.display()
    )]
    NoCapture {
        /// The folder.
        dir: PathBuf,
        /// What it lacks.
        missing: &'static str,
    },
    /// A strategy needs a state that is not in the capture.
    #[error("the capture has no {state}, which the strategy {strategy} starts from")]
    NoState {
        /// Which.
        state: &'static str,
        /// For what.
        strategy: &'static str,
    },
    /// The reconciler failed: a bug, or damaged files.
    #[error("{strategy} of {image} failed")]
    Reconcile {
        /// Which way.
        strategy: &'static str,
        /// Which image.
        image: String,
        /// Why.
        #[source]
        source: reconciler::Error,
    },
    /// What came out is not the source's image, though its root is: a bug.
    #[error("{strategy} of {image} made another image than the source's, at page {page}")]
    Differs {
        /// Which way.
        strategy: &'static str,
        /// Which image.
        image: String,
        /// The first page that differs.
        page: u64,
    },
    /// zstd refused.
    #[error("cannot compress deltas")]
    Compress(#[source] io::Error),
    /// A hash tree could not be made.
    #[error("cannot hash an image of the capture")]
    Hash(#[source] reconciler::Error),
}

impl Error {
    pub(crate) fn file(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::File {
            what,
            path: path.to_owned(),
            source,
        }
    }
}

pub(crate) type Result<T> = std::result::Result<T, Error>;
