//! Cuts a viewer's byte stream into messages.
//!
//! Each message comes out twice: understood, and as the very bytes that arrived, because those
//! are what is forwarded. Any split of the stream gives the same messages.

use bytes::{Bytes, BytesMut};
use thiserror::Error;
use tokio_util::codec::Decoder;

use crate::messages::{ClientMessage, Extent, Malformed, extent, parse};

/// A message and the bytes it came as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Framed {
    /// What it says.
    pub message: ClientMessage,
    /// What it was.
    pub bytes: Bytes,
}

/// Decodes what comes from a viewer after the handshake.
#[derive(Debug, Default)]
pub struct ClientCodec(());

/// Why the stream can't be read on.
#[derive(Debug, Error)]
pub enum DecodeError {
    /// The viewer said something that isn't RFB.
    #[error(transparent)]
    Malformed(#[from] Malformed),
    /// The stream ended inside a message.
    #[error("the viewer hung up in the middle of a message")]
    Truncated,
    /// The socket failed.
    #[error("reading from the viewer failed")]
    Io(#[from] std::io::Error),
}

impl Decoder for ClientCodec {
    type Item = Framed;
    type Error = DecodeError;

    fn decode(&mut self, buffer: &mut BytesMut) -> Result<Option<Framed>, DecodeError> {
        loop {
            match extent(buffer)? {
                Extent::AtLeast(needed) if buffer.len() < needed => {
                    buffer.reserve(needed - buffer.len());
                    return Ok(None);
                }
                // `extent` asks for more than it was given only; more of it decides now.
                Extent::AtLeast(_) => {}
                Extent::Exactly(total) if buffer.len() < total => {
                    // Bounded by `extent`: a mebibyte at most.
                    buffer.reserve(total - buffer.len());
                    return Ok(None);
                }
                Extent::Exactly(total) => {
                    let bytes = buffer.split_to(total).freeze();
                    let message = parse(&bytes)?;
                    return Ok(Some(Framed { message, bytes }));
                }
            }
        }
    }

    fn decode_eof(&mut self, buffer: &mut BytesMut) -> Result<Option<Framed>, DecodeError> {
        match self.decode(buffer)? {
            None if !buffer.is_empty() => Err(DecodeError::Truncated),
            decoded => Ok(decoded),
        }
    }
}
