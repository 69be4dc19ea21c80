//! The compressors of the page streams, and how what they write becomes chunks.
//!
//! A stream is a row of frames. Where the codec is a quick one, each piece of a stream is a frame
//! of its own, and threads compress several of them at once ([`Pool`]). Where it is not, one frame
//! goes on for as long as its codec is the right one, with all that came before as its window.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::thread::Scope;
use std::time::Duration;

use crossbeam::channel::{Receiver, Sender, bounded, unbounded};
use liblzma::stream::Action;
use rustix::time::{ClockId, clock_gettime};
use zstd::bulk::Compressor;
use zstd::stream::raw::CParameter;
use zstd::stream::write::Encoder;

use crate::codec::{Codec, LzmaEncoder, MAX_WINDOW_LOG, ZSTD_TAG};
use crate::error::Error;
use crate::governor::Governor;
use crate::stream::{PageChunk, StreamId};
use crate::wire::MAX_CHUNK;

/// Raw bytes in a frame of its own.
pub(crate) const PIECE: usize = 1 << 20;
/// Pieces of one stream that wait for threads, or for their turn on the line.
const AHEAD: usize = 4;

/// The time that this thread has had of a processor.
fn own_time() -> Duration {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

/// A piece to compress.
struct Job {
    level: i32,
    raw: Vec<u8>,
    done: Sender<io::Result<Packed>>,
}

/// A frame, and what it took.
struct Packed {
    level: i32,
    raw: usize,
    bytes: Vec<u8>,
    took: Duration,
}

/// Threads that compress pieces of all streams.
#[derive(Clone)]
pub(crate) struct Pool {
    jobs: Sender<Job>,
    /// Buffers that are done with, and where they are taken from again.
    back: Sender<Vec<u8>>,
    spare: Receiver<Vec<u8>>,
}

impl Pool {
    /// Begins so many threads, which end when the last of the pool's clones is dropped.
    pub(crate) fn begin<'scope>(scope: &'scope Scope<'scope, '_>, threads: u32) -> Self {
        let (jobs, work) = bounded::<Job>(0);
        let (back, spare) = unbounded();
        for _ in 0..threads {
            let (work, back) = (work.clone(), back.clone());
            scope.spawn(move || {
                let mut compressor = None;
                for mut job in &work {
                    let packed = pack(&mut compressor, job.level, &job.raw);
                    job.raw.clear();
                    // Nobody waits for either if the stream has failed.
                    let _ = back.send(job.raw);
                    let _ = job.done.send(packed);
                }
            });
        }
        Self { jobs, back, spare }
    }

    /// A buffer for the next piece.
    pub(crate) fn buffer(&self) -> Vec<u8> {
        self.spare
            .try_recv()
            .unwrap_or_else(|_| Vec::with_capacity(PIECE))
    }

    /// Takes a buffer back.
    fn give_back(&self, mut buffer: Vec<u8>) {
        buffer.clear();
        // There are as many receivers as pools.
        let _ = self.back.send(buffer);
    }
}

/// Compresses a piece into a frame.
fn pack(
    compressor: &mut Option<Compressor<'static>>,
    level: i32,
    raw: &[u8],
) -> io::Result<Packed> {
    let begun = own_time();
    let compressor = if let Some(compressor) = compressor {
        compressor.set_compression_level(level)?;
        compressor
    } else {
        let mut new = Compressor::new(level)?;
        new.set_parameter(CParameter::ChecksumFlag(true))?;
        compressor.insert(new)
    };
    let bytes = compressor.compress(raw)?;
    Ok(Packed {
        level,
        raw: raw.len(),
        bytes,
        took: own_time().saturating_sub(begun),
    })
}

/// One stream of compressed bytes; begins with the first of them, so that a stream without
/// pages sends nothing, not even an empty frame.
pub(crate) struct StreamWriter<'a> {
    stream: StreamId,
    out: ChunkWriter<'a>,
    governor: &'a Governor,
    most: u64,
    packer: Option<Packer>,
}

/// The compressor of a frame that goes on.
struct Packer {
    codec: Codec,
    with: With,
    /// Since it was told to the governor last.
    raw: u64,
    written: u64,
    took: Duration,
}

enum With {
    Zstd(Encoder<'static, Vec<u8>>),
    Lzma(LzmaEncoder),
}

impl<'a> StreamWriter<'a> {
    /// `most` bounds what will be written; the window need not be longer.
    pub(crate) fn new(
        stream: StreamId,
        chunks: &'a Sender<PageChunk>,
        governor: &'a Governor,
        most: u64,
    ) -> Self {
        Self {
            stream,
            out: ChunkWriter {
                stream,
                chunks,
                bytes: Vec::new(),
                written: 0,
            },
            governor,
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

    /// The codec of this stream for what comes next.
    fn codec(&self) -> Codec {
        match self.stream {
            StreamId::Literal => self.governor.codec(),
            _ => self.governor.codec().beside_literals(),
        }
    }

    /// Whether the governor learns from this stream: what it takes decides, and the others, rows of
    /// zeros with islands, are so much quicker that they would mislead.
    fn teaches(&self) -> bool {
        self.stream == StreamId::Literal
    }

    fn begin(&mut self, codec: Codec) -> io::Result<Packer> {
        let with = match codec {
            Codec::Zstd(level) => {
                self.out.write_all(&[ZSTD_TAG])?;
                let window_log = self.most.next_power_of_two().trailing_zeros();
                let mut encoder = Encoder::new(Vec::new(), level)?;
                encoder.include_checksum(true)?;
                let window_log = window_log.clamp(17, MAX_WINDOW_LOG);
                encoder.set_parameter(CParameter::WindowLog(window_log))?;
                encoder.set_parameter(CParameter::EnableLongDistanceMatching(true))?;
                With::Zstd(encoder)
            }
            Codec::Lzma(effort) => {
                let (tag, encoder) = LzmaEncoder::new(effort, self.most)?;
                self.out.write_all(&[tag])?;
                With::Lzma(encoder)
            }
        };
        Ok(Packer {
            codec,
            with,
            raw: 0,
            written: 0,
            took: Duration::ZERO,
        })
    }

    /// Puts bytes into the frame that goes on, or begins one; `action` other than `Run` is done
    /// for all that was put in.
    fn put(&mut self, bytes: &[u8], action: Action) -> io::Result<()> {
        let codec = self.codec();
        let mut packer = match self.packer.take() {
            Some(packer) if packer.codec == codec || bytes.is_empty() => packer,
            Some(other) => {
                self.end(other)?;
                self.begin(codec)?
            }
            None if bytes.is_empty() => return Ok(()),
            None => self.begin(codec)?,
        };
        packer.run(bytes, action, &mut self.out)?;
        if self.teaches() {
            packer.tell(self.governor);
        }
        self.packer = Some(packer);
        Ok(())
    }

    /// Ends a frame.
    fn end(&mut self, mut packer: Packer) -> io::Result<()> {
        packer.run(&[], Action::Finish, &mut self.out)
    }

    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.put(bytes, Action::Run)
            .map_err(|source| self.error(source))
    }

    /// Sends all that was written; takes some bytes.
    pub(crate) fn flush(&mut self) -> Result<(), Error> {
        self.put(&[], Action::SyncFlush)
            .and_then(|()| self.out.flush())
            .map_err(|source| self.error(source))
    }

    pub(crate) fn finish(mut self) -> Result<(), Error> {
        let ended = match self.packer.take() {
            Some(packer) => self.end(packer),
            None => Ok(()),
        };
        ended
            .and_then(|()| self.out.flush())
            .map_err(|source| self.error(source))
    }

    /// Writes all that comes, and ends the stream.
    pub(crate) fn drain(mut self, queue: &Receiver<Vec<u8>>, pool: &Pool) -> Result<(), Error> {
        let mut ahead = VecDeque::new();
        for bytes in queue {
            let Some(level) = self.in_pieces() else {
                self.take_up(&mut ahead, 0)?;
                self.write(&bytes)?;
                pool.give_back(bytes);
                continue;
            };
            if let Some(packer) = self.packer.take() {
                self.end(packer).map_err(|source| self.error(source))?;
            }
            let (done, packed) = bounded(1);
            let job = Job {
                level,
                raw: bytes,
                done,
            };
            pool.jobs.send(job).map_err(|_| Error::WorkerDied)?;
            ahead.push_back(packed);
            self.take_up(&mut ahead, AHEAD)?;
        }
        self.take_up(&mut ahead, 0)?;
        self.finish()
    }

    /// The level, if what comes next is to be compressed in pieces.
    fn in_pieces(&self) -> Option<i32> {
        match self.codec() {
            Codec::Zstd(level) if self.governor.workers() > 0 => Some(level),
            _ => None,
        }
    }

    /// Writes the pieces that are done, and waits for the first until no more than `left` are
    /// ahead.
    fn take_up(&mut self, ahead: &mut Ahead, left: usize) -> Result<(), Error> {
        while let Some(first) = ahead.front() {
            let packed = if ahead.len() > left {
                first.recv().map_err(|_| Error::WorkerDied)?
            } else if let Ok(packed) = first.try_recv() {
                packed
            } else {
                return Ok(());
            };
            ahead.pop_front();
            let packed = packed.map_err(|source| self.error(source))?;
            let (raw, written) = (packed.raw as u64, packed.bytes.len() as u64);
            if self.teaches() {
                let codec = Codec::Zstd(packed.level);
                self.governor.compressed(codec, raw, written, packed.took);
            }
            self.out
                .write_all(&[ZSTD_TAG])
                .and_then(|()| self.out.write_all(&packed.bytes))
                .map_err(|source| self.error(source))?;
        }
        Ok(())
    }
}

/// Pieces on their way through the pool, in order.
type Ahead = VecDeque<Receiver<io::Result<Packed>>>;

impl Packer {
    fn run(&mut self, bytes: &[u8], action: Action, out: &mut ChunkWriter<'_>) -> io::Result<()> {
        let (begun, before) = (own_time(), out.written);
        match &mut self.with {
            With::Zstd(encoder) => {
                encoder.write_all(bytes)?;
                match action {
                    Action::Run => {}
                    Action::Finish => encoder.do_finish()?,
                    _ => encoder.flush()?,
                }
                out.write_all(encoder.get_ref())?;
                encoder.get_mut().clear();
            }
            With::Lzma(encoder) => encoder.run(bytes, action, out)?,
        }
        self.raw += bytes.len() as u64;
        self.written += out.written - before;
        self.took += own_time().saturating_sub(begun);
        Ok(())
    }

    /// Lets the governor know, from time to time.
    fn tell(&mut self, governor: &Governor) {
        if self.raw >= PIECE as u64 {
            governor.compressed(self.codec, self.raw, self.written, self.took);
            (self.raw, self.written, self.took) = (0, 0, Duration::ZERO);
        }
    }
}

/// Cuts what the compressor writes into chunks.
struct ChunkWriter<'a> {
    stream: StreamId,
    chunks: &'a Sender<PageChunk>,
    bytes: Vec<u8>,
    /// Since the beginning.
    written: u64,
}

impl Write for ChunkWriter<'_> {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        if self.bytes.capacity() == 0 {
            self.bytes.reserve_exact(MAX_CHUNK);
        }
        let taken = from.len().min(MAX_CHUNK - self.bytes.len());
        self.bytes.extend_from_slice(&from[..taken]);
        self.written += taken as u64;
        if self.bytes.len() == MAX_CHUNK {
            self.flush()?;
        }
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.bytes.is_empty() {
            return Ok(());
        }
        let chunk = PageChunk {
            stream: self.stream,
            bytes: std::mem::take(&mut self.bytes),
        };
        self.chunks
            .send(chunk)
            .map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}
