//! The compressors of the page streams, and how what they write becomes chunks.

use std::io::{self, Write};

use crossbeam::channel::{Receiver, Sender};
use zstd::stream::raw::CParameter;
use zstd::stream::write::Encoder;

use crate::encode::EncodeOptions;
use crate::error::Error;
use crate::stream::{MAX_WINDOW_LOG, PageChunk, StreamId};
use crate::wire::MAX_CHUNK;

/// Raw bytes in one job of zstd's own threads.
const JOB_BYTES: u32 = 2 << 20;

/// One stream of compressed bytes; begins with the first of them, so that a stream without
/// pages sends nothing, not even an empty frame.
pub(crate) struct StreamWriter<'a> {
    stream: StreamId,
    chunks: &'a Sender<PageChunk>,
    options: EncodeOptions,
    window_log: u32,
    encoder: Option<Encoder<'static, ChunkWriter<'a>>>,
}

impl<'a> StreamWriter<'a> {
    /// `most` bounds what will be written; the window need not be longer.
    pub(crate) fn new(
        stream: StreamId,
        chunks: &'a Sender<PageChunk>,
        options: EncodeOptions,
        most: u64,
    ) -> Self {
        let window_log = most.next_power_of_two().trailing_zeros();
        Self {
            stream,
            chunks,
            options,
            window_log: window_log.clamp(17, MAX_WINDOW_LOG),
            encoder: None,
        }
    }

    fn error(&self, source: io::Error) -> Error {
        match source.kind() {
            io::ErrorKind::BrokenPipe => Error::SinkClosed,
            _ => Error::Encode {
                stream: self.stream.name(),
                source,
            },
        }
    }

    fn begin(&self) -> io::Result<Encoder<'static, ChunkWriter<'a>>> {
        let out = ChunkWriter {
            stream: self.stream,
            chunks: self.chunks,
            bytes: Vec::with_capacity(MAX_CHUNK),
        };
        let mut encoder = Encoder::new(out, self.options.level)?;
        encoder.include_checksum(true)?;
        encoder.set_parameter(CParameter::WindowLog(self.window_log))?;
        encoder.set_parameter(CParameter::EnableLongDistanceMatching(true))?;
        if self.options.workers > 0 {
            encoder.multithread(self.options.workers)?;
            encoder.set_parameter(CParameter::JobSize(JOB_BYTES))?;
        }
        Ok(encoder)
    }

    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        if self.encoder.is_none() {
            self.encoder = Some(self.begin().map_err(|source| self.error(source))?);
        }
        let written = self
            .encoder
            .as_mut()
            .map_or(Ok(()), |to| to.write_all(bytes));
        written.map_err(|source| self.error(source))
    }

    /// Sends all that was written; takes some bytes.
    pub(crate) fn flush(&mut self) -> Result<(), Error> {
        let flushed = self.encoder.as_mut().map_or(Ok(()), Write::flush);
        flushed.map_err(|source| self.error(source))
    }

    pub(crate) fn finish(mut self) -> Result<(), Error> {
        let ended = self
            .encoder
            .take()
            .map_or(Ok(()), |encoder| encoder.finish()?.flush());
        ended.map_err(|source| self.error(source))
    }

    /// Writes all that comes, and ends the stream.
    pub(crate) fn drain(mut self, queue: &Receiver<Vec<u8>>) -> Result<(), Error> {
        for bytes in queue {
            self.write(&bytes)?;
        }
        self.finish()
    }
}

/// Cuts what the compressor writes into chunks.
struct ChunkWriter<'a> {
    stream: StreamId,
    chunks: &'a Sender<PageChunk>,
    bytes: Vec<u8>,
}

impl Write for ChunkWriter<'_> {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        let taken = from.len().min(MAX_CHUNK - self.bytes.len());
        self.bytes.extend_from_slice(&from[..taken]);
        if self.bytes.len() == MAX_CHUNK {
            self.flush()?;
        }
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.bytes.is_empty() {
            return Ok(());
        }
        let bytes = std::mem::replace(&mut self.bytes, Vec::with_capacity(MAX_CHUNK));
        let chunk = PageChunk {
            stream: self.stream,
            bytes,
        };
        self.chunks
            .send(chunk)
            .map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}
