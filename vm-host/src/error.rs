//! What can go wrong with a virtual machine, each with what to do about it.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::process::Death;

/// A failure of this crate. The message never repeats its source.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A program isn't installed.
    #[error("{program} is not installed; install the Debian package {package}")]
    MissingProgram {
        /// What was looked for.
        program: PathBuf,
        /// The Debian package that brings it.
        package: &'static str,
    },
    /// A helper program failed.
    #[error("{program} could not {doing}: {reason}")]
    Program {
        /// The program.
        program: PathBuf,
        /// What it was asked to do.
        doing: String,
        /// What it said.
        reason: String,
    },
    /// A file or socket operation failed.
    #[error("cannot {doing} {}", path.display())]
    Io {
        /// What was tried, as in "cannot open".
        doing: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A hardware description or a launch is out of bounds; nothing was started.
    #[error("{what} is {value}; it must be {bounds}")]
    OutOfBounds {
        /// The field.
        what: &'static str,
        /// What it holds.
        value: String,
        /// What it may hold.
        bounds: &'static str,
    },
    /// A path QEMU can't take as it is.
    #[error("the path {path:?} {problem}")]
    Path {
        /// The path.
        path: PathBuf,
        /// What's wrong with it.
        problem: &'static str,
    },
    /// A unix socket's path doesn't fit the kernel's address structure.
    #[error(
        "the socket path {} is {length} bytes long and unix sockets allow {}; \
         use a state directory with a shorter path", path.display(), crate::SOCKET_PATH_MAX
    )]
    SocketPath {
        /// The path.
        path: PathBuf,
        /// Its length in bytes.
        length: usize,
    },
    /// The machine type isn't one of this QEMU's.
    #[error(
        "QEMU {version} has no machine type {machine} (its newest q35 is {newest}); \
         {machine} comes with QEMU {needed} or later: install that, or create the VM with a \
         machine type both sites have"
    )]
    UnknownMachine {
        /// What was asked for.
        machine: String,
        /// This QEMU.
        version: String,
        /// The newest machine type of the q35 family here.
        newest: String,
        /// The first QEMU with that machine type, as its name says.
        needed: String,
    },
    /// A VM runs already in this runtime directory.
    #[error(
        "{} is already in use by a running QEMU (process {pid}); attach to it or stop it first",
        runtime_dir.display()
    )]
    AlreadyRunning {
        /// The directory.
        runtime_dir: PathBuf,
        /// The QEMU.
        pid: u32,
    },
    /// The QEMU of a runtime directory is there, but can't be talked to.
    #[error(
        "the QEMU in {} (process {pid}) is alive but doesn't answer on its control socket: \
         another program drives it, or it hangs; end that program, or QEMU with: kill {pid}",
        runtime_dir.display()
    )]
    Unreachable {
        /// The directory.
        runtime_dir: PathBuf,
        /// The QEMU.
        pid: u32,
    },
    /// QEMU is gone.
    #[error("the QEMU of {name} died while asked to {doing}: {death}")]
    Died {
        /// The VM.
        name: String,
        /// What it was doing.
        doing: String,
        /// How it ended and what it said.
        death: Death,
    },
    /// QEMU understood and refused.
    #[error("QEMU refused {command}: {reason}")]
    Refused {
        /// The QMP command.
        command: &'static str,
        /// QEMU's words.
        reason: String,
    },
    /// QEMU did not answer.
    #[error("QEMU did not finish {doing} within {} s; its process may hang", limit.as_secs_f32())]
    Timeout {
        /// What was waited for.
        doing: String,
        /// For how long.
        limit: Duration,
    },
    /// The QMP connection ended.
    #[error("the QMP connection {} was closed", socket.display())]
    Disconnected {
        /// The socket.
        socket: PathBuf,
    },
    /// What came over QMP wasn't what was agreed.
    #[error("QEMU's answer to {command} makes no sense to this program: {reason}")]
    Protocol {
        /// The QMP command.
        command: &'static str,
        /// What was unexpected.
        reason: String,
    },
    /// The operation needs the VM in another state.
    #[error("cannot {doing} while the VM is {is}; it must be {must_be}")]
    State {
        /// What was asked.
        doing: &'static str,
        /// The state it is in, in QEMU's words.
        is: String,
        /// The state it should be in.
        must_be: &'static str,
    },
    /// Saving or loading device state failed.
    #[error("device state could not be {doing}: {reason}")]
    DeviceState {
        /// "saved" or "loaded".
        doing: &'static str,
        /// QEMU's words, or what was found.
        reason: String,
    },
    /// The marker did not appear on the serial port.
    #[error(
        "{name} did not print {marker:?} on its serial port within {} s; it last said: {tail}",
        limit.as_secs()
    )]
    NoMarker {
        /// The VM.
        name: String,
        /// What was waited for.
        marker: String,
        /// For how long.
        limit: Duration,
        /// The end of the serial log.
        tail: String,
    },
    /// A screenshot that can't be read.
    #[error("QEMU's screenshot can't be read: {reason}")]
    Screenshot {
        /// What's wrong with it.
        reason: String,
    },
    /// A disk image is not what was expected.
    #[error("{} {problem}", path.display())]
    Image {
        /// The image.
        path: PathBuf,
        /// What's wrong with it.
        problem: String,
    },
}

/// What the functions of this crate return.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Adds what was being done, and on what, to an I/O error.
pub(crate) trait Context<T> {
    fn context(self, doing: &'static str, path: &Path) -> Result<T>;
}

impl<T> Context<T> for io::Result<T> {
    fn context(self, doing: &'static str, path: &Path) -> Result<T> {
        self.map_err(|source| Error::Io {
            doing,
            path: path.to_owned(),
            source,
        })
    }
}

impl<T> Context<T> for std::result::Result<T, rustix::io::Errno> {
    fn context(self, doing: &'static str, path: &Path) -> Result<T> {
        self.map_err(io::Error::from).context(doing, path)
    }
}
