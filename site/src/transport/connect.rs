//! Calling another site, and telling apart the ways in which that fails: each has another
//! cure.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use rustls::pki_types::ServerName;
use rustls::{AlertDescription, CertificateError};
use tokio::net::{TcpStream, lookup_host};
use tokio::time::{Instant, timeout_at};
use tokio_rustls::TlsConnector;

use super::traffic::{Counted, Traffic};
use super::{Connection, PROTOCOL_VERSION, PreambleError, WireError, tls, tune};
use crate::identity::{Identity, SiteKey};
use crate::peers::PeerAddr;

/// Why a site couldn't be talked to. Nothing was asked of it.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The host's name leads nowhere.
    #[error("can't find the host of {addr}: check the address in `replay-migrate site list`")]
    Lookup {
        /// Where we called.
        addr: PeerAddr,
        /// Why.
        source: io::Error,
    },
    /// The host is there, the agent isn't.
    #[error("nothing listens at {addr}: is `replay-migrate serve` running there, on that port?")]
    Refused {
        /// Where we called.
        addr: PeerAddr,
    },
    /// No way to the host.
    #[error("can't reach {addr}: check the address, the network and the firewalls between")]
    Unreachable {
        /// Where we called.
        addr: PeerAddr,
        /// Why.
        source: io::Error,
    },
    /// No answer in time.
    #[error(
        "no answer from {addr} within {} s, while {step}: check the address, the network and \
         the firewalls between",
        .after.as_secs_f32()
    )]
    Timeout {
        /// Where we called.
        addr: PeerAddr,
        /// What we were doing.
        step: &'static str,
        /// How long we tried.
        after: Duration,
    },
    /// Somebody else answers.
    #[error(
        "the site at {addr} shows another key than the trusted one: expected {expected}, got \
         {got}. If that site was set up anew, compare with `replay-migrate site id` there and \
         trust the new key; otherwise it is another machine, or somebody stands between"
    )]
    WrongKey {
        /// Where we called.
        addr: PeerAddr,
        /// The pinned key.
        expected: SiteKey,
        /// What was shown.
        got: SiteKey,
    },
    /// The right site, but it doesn't know us.
    #[error(
        "the site at {addr} doesn't trust this one: run there `replay-migrate site trust NAME \
         ADDR {own}`"
    )]
    NotTrusted {
        /// Where we called.
        addr: PeerAddr,
        /// This site's key.
        own: SiteKey,
    },
    /// Another release is installed there.
    #[error(
        "the site at {addr} speaks protocol version {theirs}, this is {ours}: install the same \
         release of replay-migrate at both"
    )]
    Version {
        /// Where we called.
        addr: PeerAddr,
        /// The peer's version.
        theirs: u16,
        /// This program's version.
        ours: u16,
    },
    /// Something answers that doesn't behave as a site.
    #[error("what answers at {addr} is no replay-migrate site, or can't accept us: see its log")]
    NotASite {
        /// Where we called.
        addr: PeerAddr,
        /// How it failed.
        source: Option<io::Error>,
    },
    /// This site's own key doesn't work with TLS.
    #[error("can't set up TLS with this site's key")]
    Setup(#[source] rustls::Error),
}

impl ConnectError {
    /// Whether the same call may succeed later, with nothing changed at either site.
    pub(crate) const fn may_pass(&self) -> bool {
        match self {
            Self::Lookup { .. }
            | Self::Refused { .. }
            | Self::Unreachable { .. }
            | Self::Timeout { .. }
            | Self::NotASite { .. } => true,
            Self::WrongKey { .. }
            | Self::NotTrusted { .. }
            | Self::Version { .. }
            | Self::Setup(_) => false,
        }
    }
}

/// Calls the site at `addr`, which must prove to hold the key `expected`.
///
/// `timeout` covers everything from looking up the host to the exchange of versions.
pub async fn connect(
    addr: &PeerAddr,
    identity: &Identity,
    expected: &SiteKey,
    timeout: Duration,
) -> Result<Connection, ConnectError> {
    connect_counted(addr, identity, expected, timeout, Traffic::default()).await
}

/// As [`connect`]; the bytes are added to those of other connections.
pub(crate) async fn connect_counted(
    addr: &PeerAddr,
    identity: &Identity,
    expected: &SiteKey,
    timeout: Duration,
    traffic: Traffic,
) -> Result<Connection, ConnectError> {
    connect_as(
        PROTOCOL_VERSION,
        addr,
        identity,
        *expected,
        timeout,
        traffic,
    )
    .await
}

pub(super) async fn connect_as(
    version: u16,
    addr: &PeerAddr,
    identity: &Identity,
    expected: SiteKey,
    timeout: Duration,
    traffic: Traffic,
) -> Result<Connection, ConnectError> {
    let config = tls::client_config(identity, expected).map_err(ConnectError::Setup)?;
    let deadline = Instant::now() + timeout;
    let late = |step| {
        let addr = addr.clone();
        move |_| ConnectError::Timeout {
            addr,
            step,
            after: timeout,
        }
    };

    let tcp = timeout_at(deadline, dial(addr))
        .await
        .map_err(late("connecting"))??;
    let unusable = |source| ConnectError::Unreachable {
        addr: addr.clone(),
        source,
    };
    tune(&tcp).map_err(unusable)?;
    let peer = tcp.peer_addr().map_err(unusable)?;
    let stream = Counted::new(tcp, traffic.clone());

    let failed = |error| diagnose(addr, identity, error);
    // rustls wants a name; it is neither sent nor compared with anything.
    let name = ServerName::from(peer.ip());
    let stream = timeout_at(deadline, TlsConnector::from(config).connect(name, stream))
        .await
        .map_err(late("proving keys"))?
        .map_err(failed)?;
    let mut connection = Connection::over(stream.into(), expected, peer, traffic);
    let exchanged = timeout_at(deadline, connection.exchange_preamble(version))
        .await
        .map_err(late("comparing versions"))?;
    match exchanged {
        Ok(()) => Ok(connection),
        Err(PreambleError::Version { theirs, ours }) => Err(ConnectError::Version {
            addr: addr.clone(),
            theirs,
            ours,
        }),
        Err(PreambleError::Wire(WireError::Io(error))) => Err(failed(error)),
        Err(PreambleError::Wire(WireError::Cut | WireError::Truncated { .. })) => {
            Err(failed(io::ErrorKind::UnexpectedEof.into()))
        }
        Err(PreambleError::Magic | PreambleError::Wire(_)) => Err(ConnectError::NotASite {
            addr: addr.clone(),
            source: None,
        }),
    }
}

/// Tries each address of the host in turn.
async fn dial(addr: &PeerAddr) -> Result<TcpStream, ConnectError> {
    let lookup = |source| ConnectError::Lookup {
        addr: addr.clone(),
        source,
    };
    let found: Vec<SocketAddr> = lookup_host(addr.as_str()).await.map_err(lookup)?.collect();
    let mut last = None;
    for candidate in found {
        match TcpStream::connect(candidate).await {
            Ok(tcp) => return Ok(tcp),
            Err(error) => last = Some(error),
        }
    }
    match last {
        Some(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            Err(ConnectError::Refused { addr: addr.clone() })
        }
        Some(source) => Err(ConnectError::Unreachable {
            addr: addr.clone(),
            source,
        }),
        None => Err(lookup(io::ErrorKind::NotFound.into())),
    }
}

/// What a failure of the handshake means. Whether the server takes our key is known only
/// after it, from the first read (RFC 8446 section 4.4.2.4), so reads come here as well.
fn diagnose(addr: &PeerAddr, identity: &Identity, error: io::Error) -> ConnectError {
    let addr = addr.clone();
    match error
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<rustls::Error>())
    {
        Some(rustls::Error::InvalidCertificate(CertificateError::Other(other))) => {
            if let Some(wrong) = other.0.downcast_ref::<tls::WrongKey>() {
                return ConnectError::WrongKey {
                    addr,
                    expected: wrong.expected,
                    got: wrong.got,
                };
            }
        }
        // Sent for a key that isn't in the store, and by nothing else in this protocol.
        Some(rustls::Error::AlertReceived(AlertDescription::CertificateUnknown)) => {
            return ConnectError::NotTrusted {
                addr,
                own: identity.key(),
            };
        }
        _ => {}
    }
    ConnectError::NotASite {
        addr,
        source: Some(error),
    }
}
