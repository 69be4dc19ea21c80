//! Messages on a byte stream: a length (u32, little endian), then that many bytes of
//! postcard.
//!
//! What is read was written by someone else, so a length is compared with the limit before
//! anything is allocated, a message must fill its frame exactly, and an end in the middle of
//! a frame is another thing than an end between two.
//!
//! Both directions are buffered and both are safe to cancel: a `send` dropped half way has
//! its frame queued whole and goes on with the next `send` or `flush`; a `recv` dropped half
//! way has lost nothing.

use std::io;
use std::time::Duration;

use postcard::ser_flavors::Flavor;
use serde::de::{Deserialize, DeserializeOwned};
use serde::ser::Serialize;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;

/// Bytes of a frame's length.
const HEADER: usize = 4;
/// Queued bytes from which `send` writes instead of waiting for more.
const WRITE_AT: usize = 128 * 1024;
/// Room offered to each read.
const READ_ROOM: usize = 128 * 1024;
/// Capacity above which an empty buffer is given back.
const KEEP: usize = 4 << 20;

/// What a connection bears before it gives up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The longest message, in bytes, in both directions.
    pub max_frame: usize,
    /// How long a read may bring no byte, or a write place none, while one is asked for.
    /// `None`: for ever, or until TCP finds the peer gone.
    pub idle: Option<Duration>,
}

impl Default for Limits {
    /// 1 MiB of payload and 64 KiB for what is said about it; five minutes, which a target
    /// may well spend replaying.
    fn default() -> Self {
        Self {
            max_frame: (1 << 20) + (64 << 10),
            idle: Some(Duration::from_secs(300)),
        }
    }
}

/// Why messages don't pass.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// An orderly end between two messages.
    #[error("the peer closed the connection")]
    Closed,
    /// The stream ended between two messages, without the farewell that TLS asks for: the
    /// peer died, or somebody cut the line.
    #[error("the connection was cut: the peer's program or the line to it failed")]
    Cut,
    /// The stream ended inside a message.
    #[error("the connection ended inside a message, after {have} of {want} bytes")]
    Truncated {
        /// Bytes that arrived, length included.
        have: usize,
        /// Bytes announced, length included; just the length while that is incomplete.
        want: usize,
    },
    /// The peer announces more than is ever sent.
    #[error("the peer announces a message of {len} bytes, the limit is {max}: it isn't one of us")]
    TooLong {
        /// Announced bytes.
        len: usize,
        /// The limit in force.
        max: usize,
    },
    /// We were about to send more than the peer would take; nothing was sent.
    #[error("a message to send exceeds the limit of {max} bytes")]
    TooLongToSend {
        /// The limit in force.
        max: usize,
    },
    /// A frame doesn't hold the message expected here.
    #[error("the peer's message can't be read as what is expected here")]
    Malformed(#[source] postcard::Error),
    /// A message is followed by something else in its frame.
    #[error("the peer's message is followed by {bytes} bytes that don't belong there")]
    Trailing {
        /// Bytes too many.
        bytes: usize,
    },
    /// A message that postcard can't express; nothing was sent.
    #[error("a message can't be encoded")]
    Encode(#[source] postcard::Error),
    /// Nothing came.
    #[error("the peer sent nothing for {} s", .0.as_secs_f32())]
    Silent(Duration),
    /// Nothing was taken.
    #[error("the peer took nothing for {} s", .0.as_secs_f32())]
    Stalled(Duration),
    /// The other side has called the conversation off.
    #[error("the peer has called it off")]
    HungUp,
    /// The line was lost, and did not come back in time.
    #[error("the line was lost, and did not come back within {:.0} s: {why}", .after.as_secs_f32())]
    Lost {
        /// How long it was waited for.
        after: Duration,
        /// Why the last call failed.
        why: String,
    },
    /// The line was lost and is back, but the other side has lost its part of the conversation.
    #[error("the peer knows nothing of this conversation any more: its agent has started anew")]
    Forgotten,
    /// The socket or TLS failed.
    #[error("the connection to the peer failed")]
    Io(#[source] io::Error),
}

impl WireError {
    /// Whether the peer went away, rather than said something wrong: worth another try.
    pub fn is_disconnect(&self) -> bool {
        match self {
            Self::Closed
            | Self::Cut
            | Self::Truncated { .. }
            | Self::Silent(_)
            | Self::Stalled(_)
            | Self::HungUp
            | Self::Lost { .. }
            | Self::Forgotten => true,
            Self::Io(error) => !matches!(error.kind(), io::ErrorKind::InvalidData),
            _ => false,
        }
    }
}

/// Writes messages.
#[derive(Debug)]
pub struct FrameWriter<W> {
    io: W,
    queue: Vec<u8>,
    /// How much of `queue` is written.
    written: usize,
    limits: Limits,
}

impl<W: AsyncWrite + Unpin> FrameWriter<W> {
    /// Messages to `io`.
    pub fn new(io: W, limits: Limits) -> Self {
        Self {
            io,
            queue: Vec::new(),
            written: 0,
            limits,
        }
    }

    /// Changes what this direction bears.
    pub fn set_limits(&mut self, limits: Limits) {
        self.limits = limits;
    }

    /// Queues a message, and writes once enough is queued. **What must arrive now needs
    /// [`flush`](Self::flush).**
    pub async fn send<T: Serialize + ?Sized>(&mut self, message: &T) -> Result<(), WireError> {
        encode_frame(message, &mut self.queue, self.limits.max_frame)?;
        if self.queue.len() - self.written >= WRITE_AT {
            self.drain().await
        } else {
            Ok(())
        }
    }

    /// Hands everything queued to the kernel.
    pub async fn flush(&mut self) -> Result<(), WireError> {
        self.drain().await?;
        let idle = self.limits.idle;
        patient(idle, self.io.flush(), WireError::Stalled).await
    }

    /// Flushes, then tells the peer that nothing more comes. The other direction stays open.
    pub async fn shutdown(&mut self) -> Result<(), WireError> {
        self.flush().await?;
        let idle = self.limits.idle;
        patient(idle, self.io.shutdown(), WireError::Stalled).await
    }

    /// Queues bytes that are no frame: the preamble.
    pub(crate) fn queue_raw(&mut self, bytes: &[u8]) {
        self.queue.extend_from_slice(bytes);
    }

    async fn drain(&mut self) -> Result<(), WireError> {
        while self.written < self.queue.len() {
            let idle = self.limits.idle;
            let rest = &self.queue[self.written..];
            match patient(idle, self.io.write(rest), WireError::Stalled).await? {
                0 => return Err(WireError::Io(io::ErrorKind::WriteZero.into())),
                bytes => self.written += bytes,
            }
        }
        self.written = 0;
        self.queue.clear();
        if self.queue.capacity() > KEEP {
            self.queue = Vec::new();
        }
        Ok(())
    }
}

/// Reads messages.
#[derive(Debug)]
pub struct FrameReader<R> {
    io: R,
    buffer: Vec<u8>,
    /// Where in `buffer` the first unread byte is.
    start: usize,
    limits: Limits,
}

impl<R: AsyncRead + Unpin> FrameReader<R> {
    /// Messages from `io`.
    pub fn new(io: R, limits: Limits) -> Self {
        Self {
            io,
            buffer: Vec::new(),
            start: 0,
            limits,
        }
    }

    /// Changes what this direction bears.
    pub fn set_limits(&mut self, limits: Limits) {
        self.limits = limits;
    }

    /// The next message.
    pub async fn recv<T: DeserializeOwned>(&mut self) -> Result<T, WireError> {
        decode(self.frame().await?)
    }

    /// The next message, which may borrow its byte strings from the frame.
    pub async fn recv_borrowed<'a, T: Deserialize<'a>>(&'a mut self) -> Result<T, WireError> {
        decode(self.frame().await?)
    }

    /// The next message's bytes.
    async fn frame(&mut self) -> Result<&[u8], WireError> {
        self.fill(HEADER).await?;
        let len = frame_len(&self.buffer[self.start..], self.limits.max_frame)?.unwrap_or(0);
        self.fill(HEADER + len).await?;
        let begin = self.start + HEADER;
        self.start = begin + len;
        Ok(&self.buffer[begin..begin + len])
    }

    /// The next `N` bytes, which are no frame: the preamble.
    pub(crate) async fn raw<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        self.fill(N).await?;
        let mut bytes = [0; N];
        bytes.copy_from_slice(&self.buffer[self.start..self.start + N]);
        self.start += N;
        Ok(bytes)
    }

    /// Waits until `want` unread bytes are there.
    async fn fill(&mut self, want: usize) -> Result<(), WireError> {
        loop {
            let have = self.buffer.len() - self.start;
            if have >= want {
                return Ok(());
            }
            if self.start > 0 {
                // What is left over is part of one frame at most.
                self.buffer.drain(..self.start);
                self.start = 0;
            }
            if have == 0 && self.buffer.capacity() > KEEP {
                self.buffer = Vec::new();
            }
            self.buffer.reserve((want - have).max(READ_ROOM));
            let read = self.io.read_buf(&mut self.buffer);
            match patient(self.limits.idle, read, WireError::Silent).await {
                Ok(0) if have == 0 => return Err(WireError::Closed),
                Ok(0) => return Err(WireError::Truncated { have, want }),
                Ok(_) => {}
                Err(WireError::Io(error)) if error.kind() == io::ErrorKind::UnexpectedEof => {
                    return Err(if have == 0 {
                        WireError::Cut
                    } else {
                        WireError::Truncated { have, want }
                    });
                }
                Err(error) => return Err(error),
            }
        }
    }
}

/// The length of the frame that begins here, its four bytes not counted; `None` while they
/// aren't all there.
pub fn frame_len(bytes: &[u8], max: usize) -> Result<Option<usize>, WireError> {
    let Some(header) = bytes.first_chunk::<HEADER>() else {
        return Ok(None);
    };
    // usize has at least 32 bits wherever QEMU runs.
    let len = u32::from_le_bytes(*header) as usize;
    if len > max {
        Err(WireError::TooLong { len, max })
    } else {
        Ok(Some(len))
    }
}

/// Reads a frame's bytes as one message and nothing more.
pub fn decode<'a, T: Deserialize<'a>>(frame: &'a [u8]) -> Result<T, WireError> {
    let (message, rest) = postcard::take_from_bytes(frame).map_err(WireError::Malformed)?;
    if rest.is_empty() {
        Ok(message)
    } else {
        Err(WireError::Trailing { bytes: rest.len() })
    }
}

/// Appends a message's frame to `out`; on failure `out` is as it was.
pub fn encode_frame<T: Serialize + ?Sized>(
    message: &T,
    out: &mut Vec<u8>,
    max: usize,
) -> Result<(), WireError> {
    let before = out.len();
    out.extend_from_slice(&[0; HEADER]);
    let body = before + HEADER;
    let max = max.min(u32::MAX as usize);
    let flavor = Bounded {
        end: body + max,
        out,
    };
    let result = postcard::serialize_with_flavor::<T, Bounded<'_>, ()>(message, flavor);
    if let Err(error) = result {
        out.truncate(before);
        return Err(match error {
            postcard::Error::SerializeBufferFull => WireError::TooLongToSend { max },
            error => WireError::Encode(error),
        });
    }
    let len = (out.len() - body) as u32; // bounded by `max` above
    out[before..body].copy_from_slice(&len.to_le_bytes());
    Ok(())
}

/// postcard's output, up to a limit.
struct Bounded<'a> {
    out: &'a mut Vec<u8>,
    end: usize,
}

impl Flavor for Bounded<'_> {
    type Output = ();

    fn try_push(&mut self, byte: u8) -> postcard::Result<()> {
        self.try_extend(&[byte])
    }

    fn try_extend(&mut self, bytes: &[u8]) -> postcard::Result<()> {
        if bytes.len() > self.end - self.out.len() {
            return Err(postcard::Error::SerializeBufferFull);
        }
        self.out.extend_from_slice(bytes);
        Ok(())
    }

    fn finalize(self) -> postcard::Result<()> {
        Ok(())
    }
}

/// Waits for `work` as long as the limit allows.
async fn patient<T>(
    limit: Option<Duration>,
    work: impl Future<Output = io::Result<T>>,
    late: fn(Duration) -> WireError,
) -> Result<T, WireError> {
    match limit {
        None => work.await,
        Some(limit) => match timeout(limit, work).await {
            Ok(done) => done,
            Err(_) => return Err(late(limit)),
        },
    }
    .map_err(WireError::Io)
}

#[cfg(test)]
mod tests;
