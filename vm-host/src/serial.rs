//! The guest's serial port, where it says that it is ready.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::Path;
use std::time::Duration;

use rustix::fs::inotify;

use crate::error::Context as _;
use crate::process::{async_fd, tail};
use crate::{Error, Result, Vm};

impl Vm {
    /// Waits until the guest has printed a marker on its serial port, now or at any time since
    /// QEMU was started. Fails at once if QEMU dies.
    pub async fn wait_for_serial(&self, marker: &str, limit: Duration) -> Result<()> {
        let log = &self.paths.serial_log;
        let wait = async {
            tokio::select! {
                found = wait_for(log, marker.as_bytes()) => found.context("read", log),
                death = self.death() => Err(Error::Died {
                    name: self.launch.name.clone(),
                    doing: format!("print {marker:?} on its serial port"),
                    death,
                }),
            }
        };
        tokio::time::timeout(limit, wait).await.unwrap_or_else(|_| {
            Err(Error::NoMarker {
                name: self.launch.name.clone(),
                marker: marker.to_owned(),
                limit,
                tail: tail(log),
            })
        })
    }
}

/// Returns once a growing file holds a marker.
async fn wait_for(path: &Path, marker: &[u8]) -> io::Result<()> {
    // Watched before it is read: what is written meanwhile is noticed.
    let watch = inotify::init(inotify::CreateFlags::NONBLOCK | inotify::CreateFlags::CLOEXEC)?;
    inotify::add_watch(&watch, path, inotify::WatchFlags::MODIFY)?;
    let watch = async_fd(watch)?;
    let mut file = File::open(path)?;
    // The end of what was read, which may hold the marker's beginning.
    let mut seen: Vec<u8> = Vec::new();
    let mut chunk = vec![0; 1 << 16];
    loop {
        loop {
            let count = file.read(&mut chunk)?;
            if count == 0 {
                break;
            }
            seen.extend(chunk.iter().take(count));
            if marker.is_empty() || seen.windows(marker.len()).any(|window| window == marker) {
                return Ok(());
            }
            seen.drain(..seen.len().saturating_sub(marker.len()));
        }
        let mut ready = watch.readable().await?;
        // What happened doesn't matter, only that something did.
        let mut events = [0; 4096];
        while rustix::io::read(watch.get_ref(), &mut events).is_ok_and(|count| count > 0) {}
        ready.clear_ready();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    #[tokio::test]
    async fn a_marker_in_two_pieces_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut file = File::create(&path).unwrap();
        file.write_all(b"booting MAR").unwrap();
        let waiting = tokio::spawn({
            let path = path.clone();
            async move { wait_for(&path, b"MARKER").await }
        });
        tokio::task::yield_now().await;
        file.write_all(b"KE").unwrap();
        assert!(!waiting.is_finished());
        file.write_all(b"R\n").unwrap();
        tokio::time::timeout(Duration::from_secs(10), waiting)
            .await
            .unwrap()
            .unwrap()
            .unwrap();
    }
}
