//! Sockets in a VM's runtime directory, by which one process here reaches another that works on
//! the same VM. The directory is this user's alone.

use std::io;
use std::path::{Path, PathBuf};

use tokio::net::{UnixListener, UnixStream};

use crate::error::{Error, Result};

/// A socket that listens; its file goes with it.
pub(crate) struct ControlSocket {
    pub(crate) listener: UnixListener,
    pub(crate) path: PathBuf,
}

impl ControlSocket {
    /// Listens. Whoever listened there before is gone: the caller holds a lock that says so.
    pub(crate) fn bind(path: PathBuf) -> Result<Self> {
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(Error::file("remove", &path)(error));
            }
            _ => {}
        }
        let listener = UnixListener::bind(&path).map_err(Error::file("listen on", &path))?;
        Ok(Self { listener, path })
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Reaches who listens; `None` if nobody does.
pub(crate) async fn call(path: &Path, action: &'static str) -> Result<Option<UnixStream>> {
    use io::ErrorKind::{ConnectionRefused, NotFound};
    match UnixStream::connect(path).await {
        Ok(stream) => Ok(Some(stream)),
        Err(error) if matches!(error.kind(), NotFound | ConnectionRefused) => Ok(None),
        Err(error) => Err(Error::file(action, path)(error)),
    }
}
