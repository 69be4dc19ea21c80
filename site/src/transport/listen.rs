//! Answering other sites: a call reaches the agent only once the caller has proven a key
//! that is trusted at that moment, and speaks our version.
//!
//! Handshakes run beside each other, bounded in number and time, so that a caller who says
//! nothing holds up nobody. Who is turned away is told why as far as TLS goes, and learns
//! nothing about this site but its public key.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;

use super::traffic::{Counted, Traffic};
use super::{Connection, PROTOCOL_VERSION, PreambleError, tls, tune};
use crate::identity::Identity;
use crate::peers::{Peer, PeerStore};

/// Where an agent listens when it isn't told: reachable from this host alone.
pub const DEFAULT_LISTEN: &str = "127.0.0.1:7707";

/// Three round trips take 2 s on a bad satellite line.
const HANDSHAKE: Duration = Duration::from_secs(15);
/// Callers being examined at once; more wait in the kernel's queue.
const AT_ONCE: usize = 256;
/// A refused caller's last words are read so far, or the answer would be lost with them.
const DRAIN_BYTES: u64 = 64 * 1024;
const DRAIN_TIME: Duration = Duration::from_secs(2);

/// A call from a trusted site.
#[derive(Debug)]
pub struct Accepted {
    /// The line to it.
    pub connection: Connection,
    /// Which site it is.
    pub peer: Peer,
}

/// The agent's open port.
pub struct Listener {
    tcp: TcpListener,
    local: SocketAddr,
    acceptor: TlsAcceptor,
    peers: PeerStore,
    handshakes: JoinSet<Option<Accepted>>,
}

/// Why no port could be opened.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Taken.
    #[error(
        "{addr} is in use: another `replay-migrate serve` may be running; stop it, or choose \
         another port with --listen"
    )]
    Busy {
        /// What was asked for.
        addr: String,
    },
    /// Not an address of this host.
    #[error("{addr} is no address of this host: choose one with --listen")]
    NotHere {
        /// What was asked for.
        addr: String,
    },
    /// Below 1024, mostly.
    #[error("not allowed to listen on {addr}: choose a port above 1023 with --listen")]
    Forbidden {
        /// What was asked for.
        addr: String,
    },
    /// Anything else, such as an address that is none.
    #[error("can't listen on {addr}: give --listen as HOST:PORT")]
    Other {
        /// What was asked for.
        addr: String,
        /// Why.
        source: io::Error,
    },
    /// This site's own key doesn't work with TLS.
    #[error("can't set up TLS with this site's key")]
    Setup(#[source] rustls::Error),
}

impl Listener {
    /// Opens `addr` (`HOST:PORT`; port 0 takes a free one) for the sites in `peers`.
    pub async fn bind(
        addr: &str,
        identity: &Identity,
        peers: PeerStore,
    ) -> Result<Self, ListenError> {
        let config = tls::server_config(identity, peers.clone()).map_err(ListenError::Setup)?;
        let failed = |source: io::Error| {
            let addr = addr.to_owned();
            match source.kind() {
                io::ErrorKind::AddrInUse => ListenError::Busy { addr },
                io::ErrorKind::AddrNotAvailable => ListenError::NotHere { addr },
                io::ErrorKind::PermissionDenied => ListenError::Forbidden { addr },
                _ => ListenError::Other { addr, source },
            }
        };
        let tcp = TcpListener::bind(addr).await.map_err(failed)?;
        let local = tcp.local_addr().map_err(failed)?;
        let acceptor = TlsAcceptor::from(config);
        Ok(Self {
            tcp,
            local,
            acceptor,
            peers,
            handshakes: JoinSet::new(),
        })
    }

    /// Where it listens, the port filled in.
    pub const fn local_addr(&self) -> SocketAddr {
        self.local
    }

    /// The next call from a trusted site. Safe to cancel. Everybody else is refused on the
    /// way, with a line in the log.
    pub async fn accept(&mut self) -> Accepted {
        loop {
            tokio::select! {
                Some(done) = self.handshakes.join_next() => match done {
                    Ok(Some(accepted)) => return accepted,
                    Ok(None) => {}
                    Err(error) => tracing::error!(%error, "a handshake's task failed"),
                },
                call = self.tcp.accept(), if self.handshakes.len() < AT_ONCE => match call {
                    Ok((tcp, from)) => {
                        let (acceptor, peers) = (self.acceptor.clone(), self.peers.clone());
                        self.handshakes.spawn(admit(acceptor, peers, tcp, from));
                    }
                    Err(error) => {
                        tracing::warn!(%error, "can't accept a call");
                        // Out of descriptors, most likely: nothing announces that some are free.
                        sleep(Duration::from_millis(100)).await;
                    }
                },
            }
        }
    }
}

/// Why a caller was turned away.
#[derive(Debug, thiserror::Error)]
enum RefusedCaller {
    #[error(
        "its key {0} is not trusted here (if it is one of yours: `replay-migrate site trust \
         NAME ADDR {0}`)"
    )]
    Untrusted(crate::identity::SiteKey),
    #[error("no handshake within {} s", HANDSHAKE.as_secs())]
    Late,
    #[error("the handshake failed: {0}")]
    Tls(io::Error),
    #[error(transparent)]
    Preamble(#[from] PreambleError),
    #[error("can't look it up: {0}")]
    Peers(#[from] crate::peers::PeerError),
}

async fn admit(
    acceptor: TlsAcceptor,
    peers: PeerStore,
    tcp: TcpStream,
    from: SocketAddr,
) -> Option<Accepted> {
    let admitted = timeout(HANDSHAKE, examine(acceptor, peers, tcp, from)).await;
    match admitted.unwrap_or(Err(RefusedCaller::Late)) {
        Ok(accepted) => {
            tracing::info!(peer = %accepted.peer.name, %from, "connected");
            Some(accepted)
        }
        Err(why) => {
            tracing::warn!(%from, %why, "refused a caller");
            None
        }
    }
}

async fn examine(
    acceptor: TlsAcceptor,
    peers: PeerStore,
    tcp: TcpStream,
    from: SocketAddr,
) -> Result<Accepted, RefusedCaller> {
    tune(&tcp).map_err(RefusedCaller::Tls)?;
    let traffic = Traffic::default();
    let stream = Counted::new(tcp, traffic.clone());
    let stream = match acceptor.accept(stream).into_fallible().await {
        Ok(stream) => stream,
        Err((error, stream)) => {
            hang_up(stream).await;
            return Err(reason(error));
        }
    };
    // The handshake can't succeed without a certificate that was parsed once already.
    let shown = stream
        .get_ref()
        .1
        .peer_certificates()
        .and_then(<[_]>::first);
    let shown = shown.ok_or_else(|| RefusedCaller::Tls(io::ErrorKind::InvalidData.into()))?;
    let key = tls::key_of(shown).map_err(|e| RefusedCaller::Tls(io::Error::other(e)))?;
    // Asked again for its name; in between it may have been removed.
    let peer = peers.by_key(&key)?.ok_or(RefusedCaller::Untrusted(key))?;
    let mut connection = Connection::over(stream.into(), key, from, traffic);
    if let Err(why) = connection.exchange_preamble(PROTOCOL_VERSION).await {
        // So that the caller reads our version before the end.
        let _ = connection.close().await;
        return Err(why.into());
    }
    Ok(Accepted { connection, peer })
}

fn reason(error: io::Error) -> RefusedCaller {
    use rustls::{CertificateError, Error};
    if let Some(Error::InvalidCertificate(CertificateError::Other(other))) = error
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<Error>())
        && let Some(untrusted) = other.0.downcast_ref::<tls::Untrusted>()
    {
        return RefusedCaller::Untrusted(untrusted.got);
    }
    RefusedCaller::Tls(error)
}

/// Ends a refused call so that the alert already sent arrives: closing a socket with unread
/// bytes makes the kernel send a reset, which overtakes it (RFC 2525 section 2.17).
async fn hang_up(mut stream: Counted<TcpStream>) {
    let _ = stream.shutdown().await;
    let mut rest = stream.take(DRAIN_BYTES);
    let _ = timeout(
        DRAIN_TIME,
        tokio::io::copy(&mut rest, &mut tokio::io::sink()),
    )
    .await;
}
