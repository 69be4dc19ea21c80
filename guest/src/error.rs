//! What can go wrong, in words for the person who has to put it right.

use std::io;
use std::path::PathBuf;

/// Why a guest could not be built or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GuestError {
    /// A program or file that a Debian package brings is not there.
    #[error(
        "{missing} is not installed, and the guest can't be built without it: install the package `{package}`"
    )]
    Missing {
        /// The program's name or the file's path.
        missing: String,
        /// The Debian or Ubuntu package to install.
        package: &'static str,
    },

    /// The build would run out of space half way.
    #[error(
        "building the guest needs {needed_mib} MiB free in {path}, and there are {available_mib} MiB: \
         make room there, or choose another place with {variable}"
    )]
    DiskSpace {
        /// The folder that is short of space.
        path: PathBuf,
        /// MiB needed there.
        needed_mib: u64,
        /// MiB available there.
        available_mib: u64,
        /// The environment variable that moves this folder.
        variable: &'static str,
    },

    /// Packages could not be fetched.
    #[error(
        "Debian packages could not be fetched ({said}): check the network, apt's proxy settings, \
         or name another mirror in REPLAY_MIGRATE_MIRROR"
    )]
    Network {
        /// What apt said.
        said: String,
    },

    /// mmdebstrap failed for another reason.
    #[error("mmdebstrap could not build the guest ({status}); its last words:\n{said}")]
    Mmdebstrap {
        /// How it ended.
        status: String,
        /// The end of its messages.
        said: String,
    },

    /// mmdebstrap reported success, but what it left is no guest.
    #[error(
        "the guest's build left {path} in a bad state ({problem}): this is a fault of the recipe"
    )]
    BadResult {
        /// The file in question.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },

    /// The folder to build into holds something else.
    #[error("{path} exists and is no guest image: choose another folder, or empty it")]
    OutOccupied {
        /// The folder asked for.
        path: PathBuf,
    },

    /// A folder is no guest image.
    #[error(
        "{path} is no guest image ({problem}): build one with `replay-migrate guest build --out {path}`"
    )]
    NotAGuest {
        /// The folder.
        path: PathBuf,
        /// What is missing or malformed.
        problem: String,
    },

    /// Neither a cache folder nor a home is known.
    #[error("there is no place for the guest's cache: set XDG_CACHE_HOME or HOME")]
    NoCache,

    /// The operating system refused something.
    #[error("could not {action} {path}")]
    Io {
        /// The verb: "create", "lock", ...
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl GuestError {
    /// For `map_err`: names the action and the path.
    pub(crate) fn io(
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io {
            action,
            path,
            source,
        }
    }
}
