//! Hears of changes of the list of peers, for those who have connections open.
//!
//! The file is replaced, never written to, so that its folder is watched (`inotify(7)`); what
//! else changes there is told as well, and costs the reader a look at the list.

use std::io;
use std::path::Path;

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;

/// Tells when the list of peers may have changed. Changes are kept from when it was made.
#[derive(Debug)]
pub struct PeerWatch {
    /// An inotify descriptor is read as a pipe is: what came, or it would block.
    events: pipe::Receiver,
}

impl PeerWatch {
    /// Watches the folder of the list. Must be called within a tokio runtime.
    pub(super) fn of(dir: &Path) -> io::Result<Self> {
        let inotify = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?;
        let changes = WatchFlags::CREATE
            | WatchFlags::MOVED_TO
            | WatchFlags::MOVED_FROM
            | WatchFlags::DELETE
            | WatchFlags::CLOSE_WRITE
            | WatchFlags::ATTRIB;
        inotify::add_watch(&inotify, dir, changes)?;
        Ok(Self {
            events: pipe::Receiver::from_owned_fd_unchecked(inotify)?,
        })
    }

    /// Returns when something has changed since it did last. Loses nothing when dropped.
    pub async fn changed(&mut self) -> io::Result<()> {
        // Room for a dozen; which they are does not matter.
        let mut events = [0; 4096];
        self.events.read(&mut events).await.map(drop)
    }
}
