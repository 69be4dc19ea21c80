//! The pages that the source sends, as streams side by side.
//!
//! - `Mappings`, if any, before all others: where the image lies in its guest's address space. All
//!   that follows is told of pages whose pointers into their own neighbourhood are distances
//!   ([`crate::relative`]), and so is the base's page of a delta.
//! - `Kinds`: for each page in the order of the request, how it is coded, as runs.
//! - `Literal`: the pages as they are, one after another, compressed as one stream.
//! - `Delta`: pages XORed with the base's page at the same address, in a stream of their
//!   own, for rows of zeros with islands compress best among their kind.
//! - `Masks` and `Words`, compressed each: for each patched page 512 bits that say which 8-byte
//!   words it tells, lowest first, and those words. Of some none is told: the target's page is
//!   expected to be nearly right, and where is for the target to ask.
//!
//! The kinds of a batch come before its pages, and its masks before its words. Streams are cut
//! into chunks anywhere. Each but `Mappings` and `Kinds` is a row of frames, each of which begins
//! with the byte that names its codec and has forgotten those before it. Held at a time are a
//! page for each stream and the masks whose words
//! have not come, of which there are no more than pages asked for.

use std::collections::VecDeque;
use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::codec::Unpacker;
use crate::error::{Error, within};
use crate::page::{PAGE_SIZE, Page, ZERO_PAGE};
use crate::patch::{MASK_BYTES, Mask, WORD};
use crate::relative::Mappings;
use crate::wire::{Cursor, MAX_CHUNK, put_varint};

/// One of the streams that pages travel in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum StreamId {
    /// How each page is coded.
    Kinds,
    /// Pages as they are.
    Literal,
    /// Pages XORed with the base.
    Delta,
    /// Which words of a page are told, the others being the target's.
    Masks,
    /// Those words.
    Words,
    /// Where the image lies in its guest's address space.
    Mappings,
}

impl StreamId {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Kinds => "kinds stream",
            Self::Literal => "literal stream",
            Self::Delta => "delta stream",
            Self::Masks => "masks stream",
            Self::Words => "words stream",
            Self::Mappings => "mappings stream",
        }
    }
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
    Patch,
}

/// Codes the kinds of a batch of pages as runs.
pub(crate) fn encode_kinds(kinds: &[PageKind]) -> Vec<u8> {
    let mut out = Vec::new();
    for run in kinds.chunk_by(PartialEq::eq) {
        let kind = match run[0] {
            PageKind::Literal => 0,
            PageKind::Delta => 1,
            PageKind::Patch => 2,
        };
        put_varint(&mut out, (run.len() as u64) << 2 | kind);
    }
    out
}

/// A page as it was sent, with relative pointers.
pub(crate) enum Coded<'a> {
    Literal(&'a mut Page),
    Delta(&'a mut Page),
    /// The words of the mask, as many as it has.
    Patch(Mask, &'a [u8]),
}

/// Gets a decoded page, its position in the request, and what its pointers are relative to.
pub(crate) type OnPage<'a> = &'a mut dyn FnMut(u64, Coded<'_>, Mappings) -> Result<(), Error>;

/// Turns chunks back into pages, each as soon as it is complete.
pub(crate) struct PageDecoder {
    /// How many pages were asked for.
    expected: u64,
    /// How many the kinds seen so far stand for.
    announced: u64,
    mappings: Mappings,
    literal: (Frame, Lane<PAGE_SIZE>),
    delta: (Frame, Lane<PAGE_SIZE>),
    masks: (Frame, Lane<MASK_BYTES>),
    words: (Frame, Words),
    buffer: Vec<u8>,
}

/// A compressed stream that comes in pieces: a row of frames.
struct Frame {
    name: &'static str,
    /// None before its first byte.
    unpacker: Option<Unpacker>,
    /// Whether a frame has ended and the next has not begun.
    ended: bool,
}

impl Frame {
    const fn new(stream: StreamId) -> Self {
        Self {
            name: stream.name(),
            unpacker: None,
            ended: false,
        }
    }

    /// Hands what comes out to `take`, at most a buffer at a time.
    fn push(
        &mut self,
        mut input: &[u8],
        buffer: &mut [u8],
        mut take: impl FnMut(&[u8]) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let name = self.name;
        let decode = |source| Error::Decode {
            stream: name,
            source,
        };
        let mut more = false;
        while !input.is_empty() || more {
            let unpacker = match (self.unpacker.take(), input.split_first()) {
                (Some(unpacker), _) if !self.ended => self.unpacker.insert(unpacker),
                (unpacker, Some((&tag, rest))) => {
                    input = rest;
                    self.ended = false;
                    let next = match unpacker {
                        Some(ended) => ended.next(tag),
                        None => Unpacker::new(tag),
                    };
                    self.unpacker.insert(next.map_err(decode)?)
                }
                // Not with more to come, for that is no end.
                (_, None) => return Ok(()),
            };
            let step = unpacker.step(input, buffer).map_err(decode)?;
            if step.read == 0 && step.written == 0 && !input.is_empty() {
                return Err(Error::malformed(name, "it does not go on"));
            }
            input = &input[step.read..];
            self.ended = step.ended;
            more = !self.ended && step.written == buffer.len();
            take(&buffer[..step.written])?;
        }
        Ok(())
    }

    /// Whether nothing is missing, given that its content is complete.
    fn finish(&self, complete: bool) -> Result<(), Error> {
        if complete && self.unpacker.is_some() == self.ended {
            Ok(())
        } else {
            Err(Error::malformed(self.name, "it ends early"))
        }
    }
}

/// Things of one size, for pages that were announced.
struct Lane<const SIZE: usize> {
    name: &'static str,
    /// Positions of those to come.
    due: VecDeque<Range<u64>>,
    item: [u8; SIZE],
    held: usize,
}

impl<const SIZE: usize> Lane<SIZE> {
    fn new(stream: StreamId) -> (Frame, Self) {
        let lane = Self {
            name: stream.name(),
            due: VecDeque::new(),
            item: [0; SIZE],
            held: 0,
        };
        (Frame::new(stream), lane)
    }

    fn announce(&mut self, run: Range<u64>) {
        match self.due.back_mut() {
            Some(last) if last.end == run.start => last.end = run.end,
            _ => self.due.push_back(run),
        }
    }

    fn take(
        &mut self,
        mut bytes: &[u8],
        mut on_item: impl FnMut(u64, &mut [u8; SIZE]) -> Result<(), Error>,
    ) -> Result<(), Error> {
        while !bytes.is_empty() {
            let Some(run) = self.due.front_mut() else {
                return Err(Error::malformed(
                    self.name,
                    "more pages than were announced",
                ));
            };
            let taken = bytes.len().min(SIZE - self.held);
            self.item[self.held..self.held + taken].copy_from_slice(&bytes[..taken]);
            self.held += taken;
            bytes = &bytes[taken..];
            if self.held == SIZE {
                self.held = 0;
                let position = run.start;
                run.start += 1;
                if run.is_empty() {
                    self.due.pop_front();
                }
                on_item(position, &mut self.item)?;
            }
        }
        Ok(())
    }

    fn complete(&self) -> bool {
        self.due.is_empty() && self.held == 0
    }
}

/// The words of masks that have come.
struct Words {
    due: VecDeque<(u64, Mask)>,
    page: Page,
    held: usize,
}

impl Words {
    fn take(
        &mut self,
        mut bytes: &[u8],
        mut on_page: impl FnMut(u64, Coded<'_>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        while !bytes.is_empty() {
            let Some(&(position, mask)) = self.due.front() else {
                let why = "words before it is known where they belong";
                return Err(Error::malformed(StreamId::Words.name(), why));
            };
            // At most a page, and more than is held.
            let size = mask.words() * WORD;
            let taken = bytes.len().min(size - self.held);
            self.page[self.held..self.held + taken].copy_from_slice(&bytes[..taken]);
            self.held += taken;
            bytes = &bytes[taken..];
            if self.held == size {
                self.held = 0;
                self.due.pop_front();
                on_page(position, Coded::Patch(mask, &self.page[..size]))?;
            }
        }
        Ok(())
    }

    fn complete(&self) -> bool {
        self.due.is_empty() && self.held == 0
    }
}

impl PageDecoder {
    pub(crate) fn new(expected: u64) -> Self {
        let words = Words {
            due: VecDeque::new(),
            page: ZERO_PAGE,
            held: 0,
        };
        Self {
            expected,
            announced: 0,
            mappings: Mappings::default(),
            literal: Lane::new(StreamId::Literal),
            delta: Lane::new(StreamId::Delta),
            masks: Lane::new(StreamId::Masks),
            words: (Frame::new(StreamId::Words), words),
            buffer: vec![0; 32 * PAGE_SIZE],
        }
    }

    /// Takes the next chunk and hands on what it completes.
    pub(crate) fn push(&mut self, chunk: &PageChunk, on_page: OnPage<'_>) -> Result<(), Error> {
        let (bytes, buffer) = (&chunk.bytes[..], &mut self.buffer[..]);
        within("a chunk of pages", bytes.len() as u64, MAX_CHUNK as u64)?;
        let mappings = self.mappings;
        let mut on_page = |at, coded: Coded<'_>| on_page(at, coded, mappings);
        match chunk.stream {
            StreamId::Mappings => {
                if self.announced > 0 || !self.mappings.is_empty() {
                    let why = "it comes after other streams";
                    return Err(Error::malformed(StreamId::Mappings.name(), why));
                }
                self.mappings = Mappings::decode(bytes)?;
                Ok(())
            }
            StreamId::Kinds => self.announce(bytes),
            StreamId::Literal => {
                let (frame, lane) = &mut self.literal;
                let mut on_item = |at, page: &mut Page| on_page(at, Coded::Literal(page));
                frame.push(bytes, buffer, |raw| lane.take(raw, &mut on_item))
            }
            StreamId::Delta => {
                let (frame, lane) = &mut self.delta;
                let mut on_item = |at, page: &mut Page| on_page(at, Coded::Delta(page));
                frame.push(bytes, buffer, |raw| lane.take(raw, &mut on_item))
            }
            StreamId::Masks => {
                let ((frame, lane), words) = (&mut self.masks, &mut self.words.1);
                let mut on_item = |at, mask: &mut [u8; MASK_BYTES]| {
                    let mask = Mask(*mask);
                    if mask.words() == 0 {
                        return on_page(at, Coded::Patch(mask, &[]));
                    }
                    words.due.push_back((at, mask));
                    Ok(())
                };
                frame.push(bytes, buffer, |raw| lane.take(raw, &mut on_item))
            }
            StreamId::Words => {
                let (frame, words) = &mut self.words;
                frame.push(bytes, buffer, |raw| words.take(raw, &mut on_page))
            }
        }
    }

    fn announce(&mut self, bytes: &[u8]) -> Result<(), Error> {
        let mut cursor = Cursor::new(StreamId::Kinds.name(), bytes);
        while cursor.remaining() > 0 {
            let coded = cursor.varint()?;
            let count = coded >> 2;
            if count == 0 || count > self.expected - self.announced {
                return Err(cursor.malformed("it announces pages that were not asked for"));
            }
            let run = self.announced..self.announced + count;
            self.announced = run.end;
            match coded & 3 {
                0 => self.literal.1.announce(run),
                1 => self.delta.1.announce(run),
                2 => self.masks.1.announce(run),
                _ => return Err(cursor.malformed("a page of unknown kind")),
            }
        }
        Ok(())
    }

    /// Whether every page has come.
    pub(crate) fn finish(&self) -> Result<(), Error> {
        if self.announced != self.expected {
            return Err(Error::malformed(StreamId::Kinds.name(), "it ends early"));
        }
        self.literal.0.finish(self.literal.1.complete())?;
        self.delta.0.finish(self.delta.1.complete())?;
        self.masks.0.finish(self.masks.1.complete())?;
        self.words.0.finish(self.words.1.complete())
    }
}

#[cfg(test)]
mod tests;
