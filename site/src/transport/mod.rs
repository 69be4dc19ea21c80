//! The line between two sites: who may speak, in what form, and what it costs.
//!
//! ```text
//! client (knows the server's key)            server (knows its peers' keys)
//!   | -- TLS 1.3 ClientHello ----------------> |
//!   | <- ServerHello, Certificate, Finished -- |   client: is this the key I was given?
//!   | -- Certificate, Finished, preamble ----> |   server: is this key in peers.json now?
//!   | <- preamble, or an alert --------------- |   both: do we speak one version?
//!   | <========== messages, both ways =======> |
//! ```
//!
//! - [`tls`] proves both sides' keys; there are no names and no authorities.
//! - The preamble, the first bytes inside TLS on each side, is fixed for ever: `RPLM`, the
//!   protocol's version (u16, little endian), two bytes of zero that are ignored on reading.
//!   Versions must be equal; whoever finds them different says so and hangs up.
//! - [`framing`] carries messages, bounded before anything is allocated.
//! - [`lasting`] has them outlive the connection: after a cut the caller calls again, and both go
//!   on where they were.
//! - [`Traffic`] counts what crossed the socket, TLS included.
//!
//! Not promised: that a message sent has arrived. That is for the protocol above to confirm.

mod connect;
pub mod framing;
mod lasting;
mod listen;
mod tls;
mod traffic;

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use rustix::net::sockopt;
use serde::de::DeserializeOwned;
use serde::ser::Serialize;
use tokio::io::{ReadHalf, WriteHalf};
use tokio::net::TcpStream;
use tokio_rustls::TlsStream;

use crate::identity::SiteKey;

pub(crate) use connect::connect_counted;
pub use connect::{ConnectError, connect};
pub use framing::{FrameReader, FrameWriter, Limits, WireError};
pub(crate) use lasting::{CallError, Condition, Conversations, Dial, Lasting, LineHandle};
pub use listen::{Accepted, DEFAULT_LISTEN, ListenError, Listener};
use traffic::Counted;
pub use traffic::{RateCap, Traffic};

/// The version of everything said after the preamble.
pub const PROTOCOL_VERSION: u16 = 11;

const MAGIC: [u8; 4] = *b"RPLM";

type Stream = TlsStream<Counted<TcpStream>>;

/// The half of a [`Connection`] that sends.
pub type Sender = FrameWriter<WriteHalf<Stream>>;

/// The half of a [`Connection`] that receives.
pub type Receiver = FrameReader<ReadHalf<Stream>>;

/// An open line to a site that proved its key and speaks our version.
///
/// Dropping it hangs up without a farewell, which the peer sees as [`WireError::Cut`]; end
/// an orderly conversation with [`close`](Self::close).
#[derive(Debug)]
pub struct Connection {
    sender: Sender,
    receiver: Receiver,
    peer_key: SiteKey,
    peer_addr: SocketAddr,
    traffic: Traffic,
}

impl Connection {
    /// Queues a message; see [`FrameWriter::send`]. What must arrive now needs
    /// [`flush`](Self::flush).
    pub async fn send<T: Serialize + ?Sized>(&mut self, message: &T) -> Result<(), WireError> {
        self.sender.send(message).await
    }

    /// Hands everything queued to the kernel.
    pub async fn flush(&mut self) -> Result<(), WireError> {
        self.sender.flush().await
    }

    /// The next message. Flushes first, so that no question waits here for its own answer.
    pub async fn recv<T: DeserializeOwned>(&mut self) -> Result<T, WireError> {
        self.sender.flush().await?;
        self.receiver.recv().await
    }

    /// Sends what is queued and says farewell. The peer reads [`WireError::Closed`].
    pub async fn close(mut self) -> Result<(), WireError> {
        self.sender.shutdown().await
    }

    /// The two directions, to be used from two tasks at once. Here [`Receiver::recv`] flushes
    /// nothing, and the line is hung up when both halves are dropped.
    ///
    /// [`Receiver::recv`]: FrameReader::recv
    pub fn split(self) -> (Sender, Receiver) {
        (self.sender, self.receiver)
    }

    /// Changes what both directions bear.
    pub fn set_limits(&mut self, limits: Limits) {
        self.sender.set_limits(limits);
        self.receiver.set_limits(limits);
    }

    /// The key the peer proved to hold.
    pub const fn peer_key(&self) -> SiteKey {
        self.peer_key
    }

    /// Where the peer is.
    pub const fn peer_addr(&self) -> SocketAddr {
        self.peer_addr
    }

    /// The counters of this connection, readable at any time and after its end.
    pub fn traffic(&self) -> Traffic {
        self.traffic.clone()
    }

    fn over(stream: Stream, peer_key: SiteKey, peer_addr: SocketAddr, traffic: Traffic) -> Self {
        let (read, write) = tokio::io::split(stream);
        let limits = Limits::default();
        Self {
            sender: FrameWriter::new(write, limits),
            receiver: FrameReader::new(read, limits),
            peer_key,
            peer_addr,
            traffic,
        }
    }

    /// Says our version, hears the peer's, and compares.
    async fn exchange_preamble(&mut self, ours: u16) -> Result<(), PreambleError> {
        let mut preamble = [0; 8];
        preamble[..4].copy_from_slice(&MAGIC);
        preamble[4..6].copy_from_slice(&ours.to_le_bytes());
        self.sender.queue_raw(&preamble);
        let said = self.sender.flush().await;
        // Even when speaking failed: what the peer said before it hung up tells why.
        let heard: [u8; 8] = self.receiver.raw().await?;
        said?;
        if heard[..4] != MAGIC {
            return Err(PreambleError::Magic);
        }
        let theirs = u16::from_le_bytes([heard[4], heard[5]]);
        if theirs == ours {
            Ok(())
        } else {
            Err(PreambleError::Version { theirs, ours })
        }
    }
}

/// Why two proven sites can't talk.
#[derive(Debug, thiserror::Error)]
enum PreambleError {
    #[error("it doesn't speak the protocol of replay-migrate")]
    Magic,
    #[error("it speaks protocol version {theirs}, this is {ours}")]
    Version { theirs: u16, ours: u16 },
    #[error(transparent)]
    Wire(#[from] WireError),
}

/// Small messages go at once; a peer that vanished is noticed within 90 s, whether we are
/// waiting for it or sending to it, and a line that fails for a minute is lived through.
fn tune(tcp: &TcpStream) -> io::Result<()> {
    tcp.set_nodelay(true)?;
    sockopt::set_socket_keepalive(tcp, true)?;
    sockopt::set_tcp_keepidle(tcp, Duration::from_secs(30))?;
    sockopt::set_tcp_keepintvl(tcp, Duration::from_secs(15))?;
    sockopt::set_tcp_keepcnt(tcp, 4)?;
    sockopt::set_tcp_user_timeout(tcp, 90_000)?;
    Ok(())
}

#[cfg(test)]
mod recordings;
#[cfg(test)]
mod tests;
