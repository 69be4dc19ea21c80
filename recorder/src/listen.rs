//! Where viewers connect.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener, UnixStream};

use crate::recorder::RecorderError;

/// Where to listen for viewers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listen {
    /// A TCP address; port 0 lets the system choose.
    Tcp(SocketAddr),
    /// A unix socket, for this user only.
    Unix(PathBuf),
}

impl Default for Listen {
    /// This machine's VNC display 0: RFB carries what the user types unencrypted, so nobody
    /// else's machine gets to it unasked.
    fn default() -> Self {
        Self::Tcp(SocketAddr::from((Ipv4Addr::LOCALHOST, 5900)))
    }
}

impl FromStr for Listen {
    type Err = RecorderError;

    /// `HOST:PORT`, with an address for a host, or `unix:PATH`.
    fn from_str(text: &str) -> Result<Self, RecorderError> {
        match text.strip_prefix("unix:") {
            Some(path) if !path.is_empty() => Ok(Self::Unix(path.into())),
            Some(_) => Err(RecorderError::Address(text.to_owned())),
            None => text
                .parse()
                .map(Self::Tcp)
                .map_err(|_| RecorderError::Address(text.to_owned())),
        }
    }
}

/// As [`Listen::from_str`] reads it.
impl std::fmt::Display for Listen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// A viewer's byte stream.
pub(crate) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

pub(crate) enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener, PathBuf),
}

impl Listener {
    /// Starts listening. A socket file that nobody listens on any more is replaced.
    pub(crate) async fn bind(listen: &Listen) -> io::Result<Self> {
        match listen {
            Listen::Tcp(address) => {
                if !address.ip().is_loopback() {
                    tracing::warn!(
                        %address,
                        "viewers connect unencrypted and without a password from other machines"
                    );
                }
                Ok(Self::Tcp(TcpListener::bind(address).await?))
            }
            Listen::Unix(path) => {
                let listener = match UnixListener::bind(path) {
                    Err(e) if e.kind() == io::ErrorKind::AddrInUse && is_stale(path).await => {
                        std::fs::remove_file(path)?;
                        UnixListener::bind(path)?
                    }
                    bound => bound?,
                };
                std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
                Ok(Self::Unix(listener, path.clone()))
            }
        }
    }

    pub(crate) fn local(&self) -> io::Result<Listen> {
        match self {
            Self::Tcp(listener) => Ok(Listen::Tcp(listener.local_addr()?)),
            Self::Unix(_, path) => Ok(Listen::Unix(path.clone())),
        }
    }

    /// The next viewer, and who it is in words.
    pub(crate) async fn accept(&self) -> io::Result<(Box<dyn Stream>, String)> {
        match self {
            Self::Tcp(listener) => {
                let (stream, peer) = listener.accept().await?;
                // Events are a few bytes each and must not wait for more.
                stream.set_nodelay(true)?;
                Ok((Box::new(stream), peer.to_string()))
            }
            Self::Unix(listener, path) => {
                let (stream, _) = listener.accept().await?;
                Ok((Box::new(stream), path.display().to_string()))
            }
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Self::Unix(_, path) = self {
            let _ = std::fs::remove_file(path);
        }
    }
}

async fn is_stale(path: &Path) -> bool {
    let refused = UnixStream::connect(path)
        .await
        .is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused);
    let is_socket = std::fs::symlink_metadata(path)
        .is_ok_and(|m| std::os::unix::fs::FileTypeExt::is_socket(&m.file_type()));
    refused && is_socket
}
