//! The compressors of the page streams, and how what they write becomes chunks.

use std::io::{self, Write};

use crossbeam::channel::{Receiver, Sender};
use liblzma::stream::Action;
use zstd::stream::raw::CParameter;
use zstd::stream::write::Encoder;

use crate::codec::{Codec, LzmaEncoder, MAX_WINDOW_LOG, ZSTD_TAG};
use crate::encode::EncodeOptions;
use crate::error::Error;
use crate::stream::{PageChunk, StreamId};
use crate::wire::MAX_CHUNK;

/// Raw bytes in one job of zstd's own threads.
const JOB_BYTES: u32 = 2 << 20;

/// One stream of compressed bytes; begins with the first of them, so that a stream without
/// pages sends nothing, not even an empty frame.
pub(crate) struct StreamWriter<'a> {
    stream: StreamId,
    chunks: &'a Sender<PageChunk>,
    options: EncodeOptions,
    most: u64,
    packer: Option<Packer<'a>>,
}

/// The compressor of a stream, and where what it writes goes.
enum Packer<'a> {
    Zstd(Encoder<'static, ChunkWriter<'a>>),
    Lzma(LzmaEncoder, ChunkWriter<'a>),
}

impl<'a> StreamWriter<'a> {
    /// `most` bounds what will be written; the window need not be longer.
    pub(crate) fn new(
        stream: StreamId,
        chunks: &'a Sender<PageChunk>,
        options: EncodeOptions,
        most: u64,
    ) -> Self {
        Self {
            stream,
            chunks,
            options,
            most,
            packer: None,
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

    fn begin(&self) -> io::Result<Packer<'a>> {
        let mut out = ChunkWriter {
            stream: self.stream,
            chunks: self.chunks,
            bytes: Vec::with_capacity(MAX_CHUNK),
        };
        let level = match self.options.codec {
            Codec::Zstd(level) => level,
            Codec::Lzma(effort) => {
                let (tag, encoder) = LzmaEncoder::new(effort, self.most)?;
                out.bytes.push(tag);
                return Ok(Packer::Lzma(encoder, out));
            }
        };
        out.bytes.push(ZSTD_TAG);
        let window_log = self.most.next_power_of_two().trailing_zeros();
        let mut encoder = Encoder::new(out, level)?;
        encoder.include_checksum(true)?;
        encoder.set_parameter(CParameter::WindowLog(window_log.clamp(17, MAX_WINDOW_LOG)))?;
        encoder.set_parameter(CParameter::EnableLongDistanceMatching(true))?;
        if self.options.workers > 0 {
            encoder.multithread(self.options.workers)?;
            encoder.set_parameter(CParameter::JobSize(JOB_BYTES))?;
        }
        Ok(Packer::Zstd(encoder))
    }

    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        if self.packer.is_none() {
            self.packer = Some(self.begin().map_err(|source| self.error(source))?);
        }
        let written = match &mut self.packer {
            Some(Packer::Zstd(encoder)) => encoder.write_all(bytes),
            Some(Packer::Lzma(encoder, out)) => encoder.run(bytes, Action::Run, out),
            None => Ok(()),
        };
        written.map_err(|source| self.error(source))
    }

    /// Sends all that was written; takes some bytes.
    pub(crate) fn flush(&mut self) -> Result<(), Error> {
        let flushed = match &mut self.packer {
            Some(Packer::Zstd(encoder)) => encoder.flush(),
            Some(Packer::Lzma(encoder, out)) => encoder
                .run(&[], Action::SyncFlush, out)
                .and_then(|()| out.flush()),
            None => Ok(()),
        };
        flushed.map_err(|source| self.error(source))
    }

    pub(crate) fn finish(mut self) -> Result<(), Error> {
        let ended = match self.packer.take() {
            Some(Packer::Zstd(encoder)) => encoder.finish().and_then(|mut out| out.flush()),
            Some(Packer::Lzma(mut encoder, mut out)) => encoder
                .run(&[], Action::Finish, &mut out)
                .and_then(|()| out.flush()),
            None => Ok(()),
        };
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
