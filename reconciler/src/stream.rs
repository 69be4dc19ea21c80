//! The pages that the source sends, as three streams side by side.
//!
//! - `Kinds`: for each page in the order of the request, how it is coded, as runs.
//! - `Literal`: the pages as they are, one after another, in one zstd frame.
//! - `Delta`: pages XORed with the base's page at the same address, in a zstd frame of their
//!   own, for rows of zeros with islands compress best among their kind.
//!
//! The kinds of a batch come before its pages. Streams are cut into chunks anywhere.

use std::collections::VecDeque;
use std::ops::Range;

use serde::{Deserialize, Serialize};
use zstd::stream::raw::{DParameter, Decoder, Operation};

use crate::error::{Error, within};
use crate::page::{PAGE_SIZE, Page, ZERO_PAGE};
use crate::wire::{Cursor, MAX_CHUNK, put_varint};

/// The longest window a stream may ask for, as a power of two: 128 MiB of memory.
pub(crate) const MAX_WINDOW_LOG: u32 = 27;

/// One of the streams that pages travel in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum StreamId {
    /// How each page is coded.
    Kinds,
    /// Pages as they are.
    Literal,
    /// Pages XORed with the base.
    Delta,
}

/// A piece of a stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageChunk {
    /// Which stream it continues.
    pub stream: StreamId,
    /// At most [`MAX_CHUNK`] bytes.
    #[serde(with = "serde_bytes")]
    pub bytes: Vec<u8>,
}

/// How a page is coded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PageKind {
    Literal,
    Delta,
}

/// Codes the kinds of a batch of pages as runs.
pub(crate) fn encode_kinds(kinds: &[PageKind]) -> Vec<u8> {
    let mut out = Vec::new();
    for run in kinds.chunk_by(PartialEq::eq) {
        put_varint(
            &mut out,
            (run.len() as u64) << 1 | u64::from(run[0] == PageKind::Delta),
        );
    }
    out
}

/// Gets a decoded page: its position in the request, how it was coded, its bytes.
pub(crate) type OnPage<'a> = &'a mut dyn FnMut(u64, PageKind, &mut Page) -> Result<(), Error>;

/// Turns chunks back into pages, each as soon as it is complete.
pub(crate) struct PageDecoder {
    /// How many pages were asked for.
    expected: u64,
    /// How many the kinds seen so far stand for.
    announced: u64,
    literal: Lane,
    delta: Lane,
    buffer: Vec<u8>,
}

/// One stream of pages.
struct Lane {
    kind: PageKind,
    name: &'static str,
    zstd: Decoder<'static>,
    /// Positions of the pages to come.
    due: VecDeque<Range<u64>>,
    page: Page,
    held: usize,
    started: bool,
    ended: bool,
}

impl Lane {
    fn new(kind: PageKind, name: &'static str) -> Result<Self, Error> {
        let decode = |source| Error::Decode {
            stream: name,
            source,
        };
        let mut zstd = Decoder::new().map_err(decode)?;
        zstd.set_parameter(DParameter::WindowLogMax(MAX_WINDOW_LOG))
            .map_err(decode)?;
        let due = VecDeque::new();
        Ok(Self {
            kind,
            name,
            zstd,
            due,
            page: ZERO_PAGE,
            held: 0,
            started: false,
            ended: false,
        })
    }

    fn push(
        &mut self,
        mut input: &[u8],
        buffer: &mut [u8],
        on_page: OnPage<'_>,
    ) -> Result<(), Error> {
        self.started |= !input.is_empty();
        let mut more = false;
        while !input.is_empty() || more {
            if self.ended {
                return Err(Error::malformed(self.name, "bytes follow its end"));
            }
            let status =
                self.zstd
                    .run_on_buffers(input, buffer)
                    .map_err(|source| Error::Decode {
                        stream: self.name,
                        source,
                    })?;
            if status.bytes_read == 0 && status.bytes_written == 0 && !input.is_empty() {
                return Err(Error::malformed(self.name, "it does not go on"));
            }
            input = &input[status.bytes_read..];
            self.ended = status.remaining == 0;
            more = !self.ended && status.bytes_written == buffer.len();
            self.emit(&buffer[..status.bytes_written], on_page)?;
        }
        Ok(())
    }

    fn emit(&mut self, mut bytes: &[u8], on_page: OnPage<'_>) -> Result<(), Error> {
        while !bytes.is_empty() {
            let Some(run) = self.due.front_mut() else {
                return Err(Error::malformed(
                    self.name,
                    "more pages than were announced",
                ));
            };
            let taken = bytes.len().min(PAGE_SIZE - self.held);
            self.page[self.held..self.held + taken].copy_from_slice(&bytes[..taken]);
            self.held += taken;
            bytes = &bytes[taken..];
            if self.held == PAGE_SIZE {
                self.held = 0;
                let position = run.start;
                run.start += 1;
                if run.is_empty() {
                    self.due.pop_front();
                }
                on_page(position, self.kind, &mut self.page)?;
            }
        }
        Ok(())
    }

    fn finish(&self) -> Result<(), Error> {
        let complete = self.due.is_empty() && self.held == 0 && self.started == self.ended;
        if complete {
            Ok(())
        } else {
            Err(Error::malformed(self.name, "it ends early"))
        }
    }
}

impl PageDecoder {
    pub(crate) fn new(expected: u64) -> Result<Self, Error> {
        Ok(Self {
            expected,
            announced: 0,
            literal: Lane::new(PageKind::Literal, "literal stream")?,
            delta: Lane::new(PageKind::Delta, "delta stream")?,
            buffer: vec![0; 32 * PAGE_SIZE],
        })
    }

    /// Takes the next chunk and hands on what it completes.
    pub(crate) fn push(&mut self, chunk: &PageChunk, on_page: OnPage<'_>) -> Result<(), Error> {
        within(
            "a chunk of pages",
            chunk.bytes.len() as u64,
            MAX_CHUNK as u64,
        )?;
        match chunk.stream {
            StreamId::Kinds => self.announce(&chunk.bytes),
            StreamId::Literal => self.literal.push(&chunk.bytes, &mut self.buffer, on_page),
            StreamId::Delta => self.delta.push(&chunk.bytes, &mut self.buffer, on_page),
        }
    }

    fn announce(&mut self, bytes: &[u8]) -> Result<(), Error> {
        let mut cursor = Cursor::new("kinds stream", bytes);
        while cursor.remaining() > 0 {
            let coded = cursor.varint()?;
            let count = coded >> 1;
            if count == 0 || count > self.expected - self.announced {
                return Err(cursor.malformed("it announces pages that were not asked for"));
            }
            let lane = if coded & 1 == 1 {
                &mut self.delta
            } else {
                &mut self.literal
            };
            let run = self.announced..self.announced + count;
            match lane.due.back_mut() {
                Some(last) if last.end == run.start => last.end = run.end,
                _ => lane.due.push_back(run.clone()),
            }
            self.announced = run.end;
        }
        Ok(())
    }

    /// Whether every page has come.
    pub(crate) fn finish(&self) -> Result<(), Error> {
        if self.announced != self.expected {
            return Err(Error::malformed("kinds stream", "it ends early"));
        }
        self.literal.finish()?;
        self.delta.finish()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frame(pages: usize) -> Vec<u8> {
        zstd::bulk::compress(&vec![5; pages * PAGE_SIZE], 3).unwrap()
    }

    fn chunk(stream: StreamId, bytes: &[u8]) -> PageChunk {
        PageChunk {
            stream,
            bytes: bytes.to_vec(),
        }
    }

    /// How many pages came out.
    fn decode(expected: u64, chunks: &[PageChunk]) -> Result<u64, Error> {
        let mut decoder = PageDecoder::new(expected)?;
        let mut pages = 0;
        for chunk in chunks {
            decoder.push(chunk, &mut |position, _, _| {
                assert!(position < expected);
                pages += 1;
                Ok(())
            })?;
        }
        decoder.finish()?;
        Ok(pages)
    }

    proptest! {
        #[test]
        fn any_chunks_end_well_or_in_an_error(
            chunks in prop::collection::vec(
                (0usize..3, prop::collection::vec(any::<u8>(), 0..60)), 0..6),
            expected in 0u64..20,
        ) {
            let streams = [StreamId::Kinds, StreamId::Literal, StreamId::Delta];
            let chunks: Vec<_> =
                chunks.iter().map(|(stream, bytes)| chunk(streams[*stream], bytes)).collect();
            if let Ok(pages) = decode(expected, &chunks) {
                prop_assert_eq!(pages, expected);
            }
        }

        #[test]
        fn frames_may_be_cut_anywhere(cuts in prop::collection::vec(1usize..20, 1..40)) {
            let mut chunks = vec![chunk(
                StreamId::Kinds,
                &encode_kinds(&[PageKind::Literal, PageKind::Delta, PageKind::Literal]),
            )];
            for (stream, pages) in [(StreamId::Delta, 1), (StreamId::Literal, 2)] {
                let bytes = frame(pages);
                let mut rest = &bytes[..];
                for &cut in cuts.iter().cycle().take(bytes.len()) {
                    let (piece, after) = rest.split_at(cut.min(rest.len()));
                    chunks.push(chunk(stream, piece));
                    rest = after;
                }
            }
            prop_assert_eq!(decode(3, &chunks).unwrap(), 3);
        }
    }

    #[test]
    fn pages_too_many_too_few_or_unannounced_are_refused() {
        let two = chunk(StreamId::Kinds, &encode_kinds(&[PageKind::Literal; 2]));
        let pages = |count| chunk(StreamId::Literal, &frame(count));
        assert_eq!(decode(2, &[two.clone(), pages(2)]).unwrap(), 2);
        assert!(decode(2, &[two.clone(), pages(3)]).is_err());
        assert!(decode(2, &[two.clone(), pages(1)]).is_err());
        assert!(decode(1, &[two.clone(), pages(2)]).is_err());
        assert!(decode(3, &[two.clone(), pages(2)]).is_err());
        assert!(decode(2, &[pages(2), two.clone()]).is_err());
        assert!(decode(2, &[two.clone(), chunk(StreamId::Delta, &frame(2))]).is_err());
        assert!(decode(2, &[two, pages(2), pages(1)]).is_err());
        assert!(decode(0, &[chunk(StreamId::Kinds, &vec![0; MAX_CHUNK + 1])]).is_err());
    }

    #[test]
    fn a_bomb_is_refused_at_its_first_page_too_many() {
        // 64 MiB of zeros in a few kB.
        let bomb = zstd::bulk::compress(&vec![0; 64 << 20], 3).unwrap();
        let one = chunk(StreamId::Kinds, &encode_kinds(&[PageKind::Literal]));
        assert!(decode(1, &[one, chunk(StreamId::Literal, &bomb)]).is_err());
    }
}
