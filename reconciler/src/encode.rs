//! The source's end of the page streams.
//!
//! One thread reads pages and decides how each is coded, others compress, and the caller's thread
//! hands the chunks on. Bounded channels lie between them: when the line is
//! slow everything waits, and reading, compressing and sending overlap.

use std::thread;
use std::time::Instant;

use crossbeam::channel::{Sender, bounded};
use serde::{Deserialize, Serialize};

use crate::codec::Codec;
use crate::compress::{PIECE, Pool, StreamWriter};
use crate::error::Error;
use crate::governor::Governor;
use crate::lines::Unpatched;
use crate::page::{PAGE_SIZE, Page, PageIndex, ReadPages, ZERO_PAGE};
use crate::patch::{Choice, MASK_BYTES, choose, xor};
use crate::relative::Mappings;
use crate::stream::{PageChunk, PageKind, StreamId, encode_kinds};

/// Pages read before they are handed to the compressors: 1 MiB.
const BATCH: usize = 256;
/// Batches and chunks that wait between two stages.
const QUEUE: usize = 4;

/// How pages are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EncodeOptions {
    /// The codec of every stream.
    pub codec: Codec,
    /// Threads of zstd for all streams; LZMA has one for each.
    pub workers: u32,
}

impl EncodeOptions {
    /// What suits a line of this speed on two cores; see [`Codec::for_line`].
    pub const fn for_line(bits_per_second: u64) -> Self {
        Self {
            codec: Codec::for_line(bits_per_second),
            workers: 2,
        }
    }
}

/// What was sent, and what it took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EncodeStats {
    /// Pages sent as they are.
    pub literal_pages: u64,
    /// Pages sent as XOR with the base.
    pub delta_pages: u64,
    /// Pages sent as the words that differ from the twin.
    pub patch_pages: u64,
    /// Pages sent as the lines that differ from the target's guess.
    pub line_pages: u64,
    /// Compressed bytes of literals.
    pub literal_bytes: u64,
    /// Compressed bytes of deltas.
    pub delta_bytes: u64,
    /// Compressed bytes of patches and lines: which words, and what they hold.
    pub patch_bytes: u64,
    /// Bytes that say which page is which.
    pub kinds_bytes: u64,
}

impl EncodeStats {
    /// All bytes handed to the sink.
    pub const fn bytes(&self) -> u64 {
        self.literal_bytes + self.delta_bytes + self.patch_bytes + self.kinds_bytes
    }
}

/// The sink takes no more; [`encode_pages`] stops and says [`Error::SinkClosed`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Closed;

/// Images that pages are told against.
#[derive(Clone, Copy, Default)]
pub struct References<'a> {
    /// The image that the target can read as well, for deltas against the page at the same
    /// address; `None` when either side lacks it.
    pub base: Option<&'a dyn ReadPages>,
    /// What this side's own replay of the input made of the base, for patches over what the
    /// target's replay made of it. `None` when the target did not replay, and when it asks
    /// again for pages that its replay got too wrong for a patch.
    pub twin: Option<&'a dyn ReadPages>,
    /// What the target says it has of pages whose patch did not fit.
    pub unpatched: Option<&'a Unpatched>,
}

impl<'a> References<'a> {
    /// The base alone.
    pub const fn base(base: Option<&'a dyn ReadPages>) -> Self {
        Self {
            base,
            twin: None,
            unpatched: None,
        }
    }
}

/// Reads `pages` of the image, in this order, and hands chunks to `sink` on this thread.
///
/// For patches each page must be the lowest that has its content, as [`crate::Offer`]'s answer
/// names it: the target lays them over its page at that address. `sink` may block: that is how
/// a slow line holds everything back. Nothing but a few MiB (and the compressors' windows) is held at a
/// time.
pub fn encode_pages(
    image: &dyn ReadPages,
    references: References<'_>,
    pages: &[PageIndex],
    options: EncodeOptions,
    sink: &mut dyn FnMut(PageChunk) -> Result<(), Closed>,
) -> Result<EncodeStats, Error> {
    encode_pages_by(image, references, pages, &Governor::fixed(options), sink)
}

/// The same with the codec that a governor picks from piece to piece.
pub fn encode_pages_by(
    image: &dyn ReadPages,
    references: References<'_>,
    pages: &[PageIndex],
    governor: &Governor,
    sink: &mut dyn FnMut(PageChunk) -> Result<(), Closed>,
) -> Result<EncodeStats, Error> {
    if pages.is_empty() {
        return Ok(EncodeStats::default());
    }
    let most = pages.len() as u64 * PAGE_SIZE as u64;
    thread::scope(|scope| {
        let (chunks_in, chunks) = bounded::<PageChunk>(QUEUE);
        let pool = Pool::begin(scope, governor.workers());
        let compress = |stream| {
            let (queue_in, queue) = bounded::<Vec<u8>>(QUEUE);
            let (to_wire, pool) = (chunks_in.clone(), pool.clone());
            let stage = scope.spawn(move || {
                StreamWriter::new(stream, &to_wire, governor, most).drain(&queue, &pool)
            });
            (queue_in, stage)
        };
        let (literals, literal) = compress(StreamId::Literal);
        let (deltas, delta) = compress(StreamId::Delta);
        let (words, word) = compress(StreamId::Words);
        let reader = scope.spawn(move || {
            // Masks are few and may not be overtaken: they are compressed on the spot.
            let most_masks = (pages.len() * MASK_BYTES) as u64;
            let queue = |to| Gathered {
                bytes: pool.buffer(),
                to,
            };
            let stage = ReadStage {
                image,
                references,
                mappings: Mappings::default(),
                masks: StreamWriter::new(StreamId::Masks, &chunks_in, governor, most_masks),
                to_wire: &chunks_in,
                literals: queue(literals),
                deltas: queue(deltas),
                words: queue(words),
                pool: &pool,
                stats: EncodeStats::default(),
            };
            stage.run(pages)
        });
        let mut bytes = EncodeStats::default();
        let mut closed = false;
        for chunk in &chunks {
            let counter = match chunk.stream {
                StreamId::Mappings | StreamId::Kinds => &mut bytes.kinds_bytes,
                StreamId::Literal => &mut bytes.literal_bytes,
                StreamId::Delta => &mut bytes.delta_bytes,
                StreamId::Masks | StreamId::Words => &mut bytes.patch_bytes,
            };
            let len = chunk.bytes.len() as u64;
            *counter += len;
            let begun = Instant::now();
            if sink(chunk).is_err() {
                closed = true;
                break;
            }
            governor.sent(len, begun.elapsed());
        }
        // The stages notice at their next chunk and end.
        drop(chunks);
        let read = reader.join().map_err(|_| Error::WorkerDied)?;
        let stages = [literal, delta, word].map(thread::ScopedJoinHandle::join);
        if closed {
            return Err(Error::SinkClosed);
        }
        // A compressor that failed closes its queue, on which the reader gives up: its error
        // is the one that says why.
        for stage in stages {
            stage.map_err(|_| Error::WorkerDied)??;
        }
        let pages = read?;
        Ok(EncodeStats {
            literal_pages: pages.literal_pages,
            delta_pages: pages.delta_pages,
            patch_pages: pages.patch_pages,
            line_pages: pages.line_pages,
            ..bytes
        })
    })
}

/// The thread that reads, and where what it reads goes to.
struct ReadStage<'a> {
    image: &'a dyn ReadPages,
    references: References<'a>,
    mappings: Mappings,
    masks: StreamWriter<'a>,
    to_wire: &'a Sender<PageChunk>,
    literals: Gathered,
    deltas: Gathered,
    words: Gathered,
    pool: &'a Pool,
    /// Only pages are counted here.
    stats: EncodeStats,
}

/// What is put together for a compressor.
struct Gathered {
    bytes: Vec<u8>,
    to: Sender<Vec<u8>>,
}

impl Gathered {
    /// Hands on what there is, if it is as much as that.
    fn send(&mut self, least: usize, pool: &Pool) -> Result<(), Error> {
        if self.bytes.len() < least {
            return Ok(());
        }
        let bytes = std::mem::replace(&mut self.bytes, pool.buffer());
        self.to.send(bytes).map_err(|_| Error::SinkClosed)
    }
}

/// What a batch of pages adds to what may not be overtaken.
#[derive(Default)]
struct Batch {
    kinds: Vec<PageKind>,
    masks: Vec<u8>,
}

impl ReadStage<'_> {
    fn run(mut self, pages: &[PageIndex]) -> Result<EncodeStats, Error> {
        self.mappings = Mappings::find(self.image, pages)?;
        if !self.mappings.is_empty() {
            let mappings = PageChunk {
                stream: StreamId::Mappings,
                bytes: self.mappings.encode(),
            };
            self.to_wire.send(mappings).map_err(|_| Error::SinkClosed)?;
        }
        for pages in pages.chunks(BATCH) {
            let mut batch = Batch::default();
            for &index in pages {
                self.read(index, &mut batch)?;
            }
            self.send(&batch, PIECE)?;
        }
        self.send(&Batch::default(), 1)?;
        // Closing the queues, as returning does, ends the compressors' frames.
        self.masks.finish()?;
        Ok(self.stats)
    }

    fn read(&mut self, index: PageIndex, batch: &mut Batch) -> Result<(), Error> {
        let (mut base, mut twin) = (ZERO_PAGE, ZERO_PAGE);
        let mut page = ZERO_PAGE;
        read(self.image, "the new image", index, &mut page)?;
        if let Some(image) = self.references.base {
            read(image, "the base", index, &mut base)?;
        }
        if let Some(image) = self.references.twin {
            read(image, "the twin", index, &mut twin)?;
        }
        let unpatched = self.references.unpatched;
        let lines = unpatched.and_then(|unpatched| unpatched.differing(index, &page));
        let choice = choose(
            &page,
            self.references.base.map(|_| &base),
            self.references.twin.map(|_| &twin),
            lines,
        );
        self.mappings.apply(index, &mut page);
        batch.kinds.push(match choice {
            Choice::Literal => {
                self.literals.bytes.extend_from_slice(&page);
                self.stats.literal_pages += 1;
                PageKind::Literal
            }
            Choice::Delta => {
                self.mappings.apply(index, &mut base);
                xor(&mut page, &base);
                self.deltas.bytes.extend_from_slice(&page);
                self.stats.delta_pages += 1;
                PageKind::Delta
            }
            Choice::Patch(mask) | Choice::Lines(mask) => {
                batch.masks.extend_from_slice(&mask.0);
                mask.gather(&page, &mut self.words.bytes);
                match choice {
                    Choice::Lines(_) => self.stats.line_pages += 1,
                    _ => self.stats.patch_pages += 1,
                }
                PageKind::Patch
            }
        });
        Ok(())
    }

    /// Hands on the batch, and of the rest what has come to `least` bytes.
    fn send(&mut self, batch: &Batch, least: usize) -> Result<(), Error> {
        if !batch.kinds.is_empty() {
            let kinds = PageChunk {
                stream: StreamId::Kinds,
                bytes: encode_kinds(&batch.kinds),
            };
            self.to_wire.send(kinds).map_err(|_| Error::SinkClosed)?;
        }
        if !batch.masks.is_empty() {
            self.masks.write(&batch.masks)?;
            self.masks.flush()?;
        }
        for gathered in [&mut self.literals, &mut self.deltas, &mut self.words] {
            gathered.send(least, self.pool)?;
        }
        Ok(())
    }
}

pub(crate) fn read(
    from: &dyn ReadPages,
    image: &'static str,
    page: PageIndex,
    into: &mut Page,
) -> Result<(), Error> {
    from.read(page, into).map_err(|source| Error::Read {
        image,
        page,
        source,
    })
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;
    use crate::page::SlicePages;
    use crate::wire::MAX_CHUNK;

    /// Pages that do not compress.
    fn noise(pages: usize) -> Vec<u8> {
        let mut bytes = vec![0; pages * PAGE_SIZE];
        blake3::Hasher::new().finalize_xof().fill(&mut bytes);
        bytes
    }

    const ALONE: References<'_> = References::base(None);

    const FAST: EncodeOptions = EncodeOptions {
        codec: Codec::Zstd(1),
        workers: 1,
    };

    #[test]
    fn chunks_are_bounded_and_counted() {
        let image = noise(1000);
        let pages: Vec<_> = (0..1000).map(PageIndex).collect();
        let mut sent = 0;
        let stats = encode_pages(&SlicePages(&image), ALONE, &pages, FAST, &mut |chunk| {
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
            let ended = encode_pages(&SlicePages(&image), ALONE, &pages, FAST, &mut |_| {
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
            codec: Codec::Zstd(1),
            workers: 0,
        };
        encode_pages(&watched, ALONE, &pages, options, &mut |chunk| {
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
        let ended = encode_pages(&watched, ALONE, &pages, FAST, &mut |_| Ok(()));
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
}
