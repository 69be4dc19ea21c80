//! The source's end of the page streams.
//!
//! One thread reads pages and decides how each is coded, one compresses literals, one deltas,
//! and the caller's thread hands the chunks on. Bounded channels lie between them: when the
//! line is slow everything waits, and reading, compressing and sending overlap.

use std::io::{self, Write};
use std::thread;

use crossbeam::channel::{Receiver, Sender, bounded};
use serde::{Deserialize, Serialize};
use zstd::stream::raw::CParameter;
use zstd::stream::write::Encoder;

use crate::error::Error;
use crate::page::{PAGE_SIZE, Page, PageIndex, ReadPages, ZERO_PAGE};
use crate::stream::{MAX_WINDOW_LOG, PageChunk, PageKind, StreamId, encode_kinds};
use crate::wire::MAX_CHUNK;

/// Pages read before they are handed to the compressors: 1 MiB.
const BATCH: usize = 256;
/// Batches and chunks that wait between two stages.
const QUEUE: usize = 4;
/// Raw bytes in one job of zstd's own threads.
const JOB_BYTES: u32 = 2 << 20;

/// How pages are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EncodeOptions {
    /// zstd level; see [`level_for`].
    pub level: i32,
    /// Threads of zstd for each stream.
    pub workers: u32,
}

impl EncodeOptions {
    /// What suits a line of this speed on two cores.
    pub fn for_line(bits_per_second: u64) -> Self {
        Self {
            level: level_for(bits_per_second),
            workers: 2,
        }
    }
}

/// The zstd level whose output keeps a line of this speed busy and no more, on two cores.
///
/// Measured on a 768 MiB desktop after replay (6,469 pages, 26 MB, which compress about 13:1),
/// two busy cores: level 3 took in some 160 MB/s, 9 some 55, 15 some 5, 19 some 2. A level pays
/// while it takes in thirteen times what the line carries. Levels 12 and 15 save 1 and 2 %
/// against 9, level 19 a sixth: only a very slow line has the time.
pub const fn level_for(bits_per_second: u64) -> i32 {
    match bits_per_second {
        0..=800_000 => 19,
        800_001..=3_000_000 => 15,
        3_000_001..=40_000_000 => 9,
        40_000_001..=100_000_000 => 6,
        100_000_001..=1_000_000_000 => 3,
        _ => 1,
    }
}

/// What was sent, and what it took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EncodeStats {
    /// Pages sent as they are.
    pub literal_pages: u64,
    /// Pages sent as XOR with the base.
    pub delta_pages: u64,
    /// Compressed bytes of literals.
    pub literal_bytes: u64,
    /// Compressed bytes of deltas.
    pub delta_bytes: u64,
    /// Bytes that say which page is which.
    pub kinds_bytes: u64,
}

impl EncodeStats {
    /// All bytes handed to the sink.
    pub const fn bytes(&self) -> u64 {
        self.literal_bytes + self.delta_bytes + self.kinds_bytes
    }
}

/// The sink takes no more; [`encode_pages`] stops and says [`Error::SinkClosed`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Closed;

/// Reads `pages` of the image, in this order, and hands chunks to `sink` on this thread.
///
/// `base` is the image that the target can read as well, for deltas against the page at the
/// same address; `None` when either side lacks it. `sink` may block: that is how a slow line
/// holds everything back. Nothing but a few MiB (and zstd's window) is held at a time.
pub fn encode_pages(
    image: &dyn ReadPages,
    base: Option<&dyn ReadPages>,
    pages: &[PageIndex],
    options: EncodeOptions,
    sink: &mut dyn FnMut(PageChunk) -> Result<(), Closed>,
) -> Result<EncodeStats, Error> {
    if pages.is_empty() {
        return Ok(EncodeStats::default());
    }
    let base = SharedBase(base);
    thread::scope(|scope| {
        let (chunks_in, chunks) = bounded::<PageChunk>(QUEUE);
        let (literals_in, literals) = bounded::<Vec<u8>>(QUEUE);
        let (deltas_in, deltas) = bounded::<Vec<u8>>(QUEUE);
        let window = window_log(pages.len());
        let kinds = chunks_in.clone();
        let reader =
            scope.spawn(move || read_stage(image, base, pages, &kinds, literals_in, deltas_in));
        let to_wire = chunks_in.clone();
        let literal = scope.spawn(move || {
            compress_stage(
                StreamId::Literal,
                "literal",
                &literals,
                &to_wire,
                options,
                window,
            )
        });
        let delta = scope.spawn(move || {
            compress_stage(
                StreamId::Delta,
                "delta",
                &deltas,
                &chunks_in,
                options,
                window,
            )
        });

        let mut stats = EncodeStats::default();
        let mut closed = false;
        for chunk in &chunks {
            let len = chunk.bytes.len() as u64;
            match chunk.stream {
                StreamId::Kinds => stats.kinds_bytes += len,
                StreamId::Literal => stats.literal_bytes += len,
                StreamId::Delta => stats.delta_bytes += len,
            }
            if sink(chunk).is_err() {
                closed = true;
                break;
            }
        }
        // The stages notice at their next chunk and end.
        drop(chunks);
        let read = reader.join().map_err(|_| Error::WorkerDied)?;
        let literal = literal.join().map_err(|_| Error::WorkerDied)?;
        let delta = delta.join().map_err(|_| Error::WorkerDied)?;
        if closed {
            return Err(Error::SinkClosed);
        }
        // A compressor that failed closes its queue, on which the reader gives up: its error
        // is the one that says why.
        literal?;
        delta?;
        (stats.literal_pages, stats.delta_pages) = read?;
        Ok(stats)
    })
}

/// `&dyn ReadPages` is `Sync`, and so may go to another thread; this says it in a type.
#[derive(Clone, Copy)]
struct SharedBase<'a>(Option<&'a dyn ReadPages>);

fn window_log(pages: usize) -> u32 {
    let bytes = (pages as u64).saturating_mul(PAGE_SIZE as u64);
    bytes
        .next_power_of_two()
        .trailing_zeros()
        .clamp(17, MAX_WINDOW_LOG)
}

fn read_stage(
    image: &dyn ReadPages,
    base: SharedBase<'_>,
    pages: &[PageIndex],
    kinds_out: &Sender<PageChunk>,
    literals: Sender<Vec<u8>>,
    deltas: Sender<Vec<u8>>,
) -> Result<(u64, u64), Error> {
    let (mut page, mut old) = (ZERO_PAGE, ZERO_PAGE);
    let mut counts = (0, 0);
    for batch in pages.chunks(BATCH) {
        let mut kinds = Vec::with_capacity(batch.len());
        let (mut literal, mut delta) = (Vec::new(), Vec::new());
        for &index in batch {
            image.read(index, &mut page).map_err(|source| Error::Read {
                image: "the new image",
                page: index,
                source,
            })?;
            let mut kind = PageKind::Literal;
            if let Some(base) = base.0 {
                base.read(index, &mut old).map_err(|source| Error::Read {
                    image: "the base",
                    page: index,
                    source,
                })?;
                kind = choose(&page, &old);
            }
            if kind == PageKind::Delta {
                xor(&mut page, &old);
                delta.extend_from_slice(&page);
                counts.1 += 1;
            } else {
                literal.extend_from_slice(&page);
                counts.0 += 1;
            }
            kinds.push(kind);
        }
        let kinds = PageChunk {
            stream: StreamId::Kinds,
            bytes: encode_kinds(&kinds),
        };
        let sent = kinds_out.send(kinds).is_ok()
            && (literal.is_empty() || literals.send(literal).is_ok())
            && (delta.is_empty() || deltas.send(delta).is_ok());
        if !sent {
            return Err(Error::SinkClosed);
        }
    }
    // Closing the queues ends the compressors' frames.
    drop((literals, deltas));
    Ok(counts)
}

/// Whether a page is better sent as what changed in it.
///
/// The cost of either is estimated by the 8-byte words that are not zero; a delta that is
/// nearly full compresses worse than text among its like. On a desktop's RAM after replay,
/// deltas took a third off (3.36 to 2.18 MiB at level 3), and any bound between a half and
/// seven eighths was within 1 % of the best.
fn choose(page: &Page, base: &Page) -> PageKind {
    let (words, old) = (page.as_chunks::<8>().0, base.as_chunks::<8>().0);
    let full = words.iter().filter(|&word| *word != [0; 8]).count();
    let changed = words.iter().zip(old).filter(|(a, b)| a != b).count();
    if changed * 4 <= full * 3 {
        PageKind::Delta
    } else {
        PageKind::Literal
    }
}

/// XORs `with` into `page`; twice is nothing.
pub(crate) fn xor(page: &mut Page, with: &Page) {
    for (a, b) in page.iter_mut().zip(with) {
        *a ^= b;
    }
}

fn compress_stage(
    stream: StreamId,
    name: &'static str,
    pages: &Receiver<Vec<u8>>,
    chunks: &Sender<PageChunk>,
    options: EncodeOptions,
    window_log: u32,
) -> Result<(), Error> {
    // A stream without pages sends nothing, not even an empty frame.
    let Ok(first) = pages.recv() else {
        return Ok(());
    };
    let run = || -> io::Result<()> {
        let out = ChunkWriter {
            stream,
            chunks,
            bytes: Vec::with_capacity(MAX_CHUNK),
        };
        let mut encoder = Encoder::new(out, options.level)?;
        encoder.include_checksum(true)?;
        encoder.set_parameter(CParameter::WindowLog(window_log))?;
        encoder.set_parameter(CParameter::EnableLongDistanceMatching(true))?;
        if options.workers > 0 {
            encoder.multithread(options.workers)?;
            encoder.set_parameter(CParameter::JobSize(JOB_BYTES))?;
        }
        encoder.write_all(&first)?;
        for pages in pages {
            encoder.write_all(&pages)?;
        }
        encoder.finish()?.flush()
    };
    run().map_err(|source| match source.kind() {
        io::ErrorKind::BrokenPipe => Error::SinkClosed,
        _ => Error::Encode {
            stream: name,
            source,
        },
    })
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::SlicePages;

    /// Pages that do not compress.
    fn noise(pages: usize) -> Vec<u8> {
        let mut bytes = vec![0; pages * PAGE_SIZE];
        blake3::Hasher::new().finalize_xof().fill(&mut bytes);
        bytes
    }

    const FAST: EncodeOptions = EncodeOptions {
        level: 1,
        workers: 1,
    };

    #[test]
    fn chunks_are_bounded_and_counted() {
        let image = noise(1000);
        let pages: Vec<_> = (0..1000).map(PageIndex).collect();
        let mut sent = 0;
        let stats = encode_pages(&SlicePages(&image), None, &pages, FAST, &mut |chunk| {
            assert!(chunk.bytes.len() <= MAX_CHUNK && !chunk.bytes.is_empty());
            sent += chunk.bytes.len() as u64;
            Ok(())
        })
        .unwrap();
        assert_eq!(
            (stats.bytes(), stats.literal_pages, stats.delta_pages),
            (sent, 1000, 0)
        );
    }

    #[test]
    fn a_closed_sink_ends_every_stage() {
        let image = noise(8000);
        let pages: Vec<_> = (0..8000).map(PageIndex).collect();
        for allowed in [0, 1, 10] {
            let mut left = allowed;
            let ended = encode_pages(&SlicePages(&image), None, &pages, FAST, &mut |_| {
                if left == 0 {
                    return Err(Closed);
                }
                left -= 1;
                Ok(())
            });
            assert!(matches!(ended, Err(Error::SinkClosed)), "{ended:?}");
        }
    }

    /// Counts reads; fails at one page.
    struct Watched<'a>(SlicePages<'a>, std::sync::atomic::AtomicU64, u64);

    impl ReadPages for Watched<'_> {
        fn pages(&self) -> u64 {
            self.0.pages()
        }
        fn read(&self, index: PageIndex, into: &mut Page) -> io::Result<()> {
            if index.0 == self.2 {
                return Err(io::Error::other("the disk is on fire"));
            }
            self.1.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            self.0.read(index, into)
        }
    }

    #[test]
    fn a_waiting_line_holds_the_reader_back() {
        let image = noise(16_000);
        let watched = Watched(SlicePages(&image), 0.into(), u64::MAX);
        let pages: Vec<_> = (0..16_000).map(PageIndex).collect();
        let mut at_first_data = None;
        let options = EncodeOptions {
            level: 1,
            workers: 0,
        };
        encode_pages(&watched, None, &pages, options, &mut |chunk| {
            if chunk.stream == StreamId::Literal && at_first_data.is_none() {
                // Everything downstream stands still here; let the stages run into the queues.
                let mut last = u64::MAX;
                loop {
                    thread::sleep(std::time::Duration::from_millis(20));
                    let now = watched.1.load(std::sync::atomic::Ordering::Relaxed);
                    if now == last {
                        break;
                    }
                    last = now;
                }
                at_first_data = Some(last);
            }
            Ok(())
        })
        .unwrap();
        let read = at_first_data.unwrap();
        assert!(read < 8000, "{read} pages were read ahead");
    }

    #[test]
    fn a_page_that_cannot_be_read_is_named() {
        let image = noise(2000);
        let watched = Watched(SlicePages(&image), 0.into(), 1234);
        let pages: Vec<_> = (0..2000).map(PageIndex).collect();
        let ended = encode_pages(&watched, None, &pages, FAST, &mut |_| Ok(()));
        assert!(
            matches!(
                ended,
                Err(Error::Read {
                    page: PageIndex(1234),
                    ..
                })
            ),
            "{ended:?}"
        );
    }

    #[test]
    fn small_changes_go_as_deltas_and_new_text_does_not() {
        let base = noise(1);
        let (old, _) = base.as_chunks::<PAGE_SIZE>();
        let mut touched = old[0];
        touched[100] ^= 1;
        assert_eq!(choose(&touched, &old[0]), PageKind::Delta);
        assert_eq!(choose(&[b'x'; PAGE_SIZE], &old[0]), PageKind::Literal);
        assert_eq!(choose(&touched, &ZERO_PAGE), PageKind::Literal);
        xor(&mut touched, &old[0]);
        assert_eq!(touched.iter().filter(|&&byte| byte != 0).count(), 1);
    }

    #[test]
    fn slower_lines_get_stronger_levels() {
        let speeds = [1, 10, 50, 100, 500, 1000, 10_000].map(|mbit| level_for(mbit * 1_000_000));
        assert!(speeds.is_sorted_by(|a, b| a >= b) && speeds[0] > speeds[6]);
    }
}
