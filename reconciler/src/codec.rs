//! How the page streams are compressed, and how the other side learns it.
//!
//! Each stream begins with a byte that names its codec: 0 is one zstd frame; 16 to 26 is a raw
//! LZMA2 stream whose dictionary is two to that power. LZMA2 says the rest itself, chunk by
//! chunk (the .xz file format, 5.3.1, and liblzma's own documentation). The dictionary named is
//! all that a decoder may come to hold, and nothing of it is touched before bytes fill it.
//!
//! Why two: what a guest leaves to send are tables of pointers, lengths and counters, words of
//! eight bytes. LZMA can tell the eight places in such a word apart (`lp` and `pb` of 3, `lc`
//! of 0), zstd can not; over a thin line that is a quarter of all bytes. zstd takes in five
//! times as much a second, which counts as soon as the line does.
//!
//! A zstd frame carries a checksum, an LZMA2 stream does not: damage shows in the image's root.

use std::io::{self, Write};

use liblzma::stream::{Action, Filters, LzmaOptions, MatchFinder, Mode, Status, Stream};
use zstd::stream::raw::{DParameter, Decoder as ZstdDecoder, Operation};

/// The longest window a zstd stream may ask for, as a power of two: 128 MiB of memory.
pub(crate) const MAX_WINDOW_LOG: u32 = 27;

/// The dictionaries an LZMA stream may ask for, as powers of two: at most 64 MiB of memory.
const DICTIONARY_LOGS: std::ops::RangeInclusive<u32> = 16..=26;

/// The longest dictionary used here: 16 MiB, for which the match finder takes up to 190 MiB a
/// stream. Four times as much saved one byte in two thousand.
const MOST_DICTIONARY_LOG: u32 = 24;

/// Names zstd.
pub(crate) const ZSTD_TAG: u8 = 0;

/// How a stream is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Codec {
    /// zstd at this level.
    Zstd(i32),
    /// LZMA2.
    Lzma(Effort),
}

/// How much time LZMA takes to look for matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effort {
    /// The first good match.
    Fast,
    /// The cheapest way to say what follows, among few matches.
    Normal,
    /// Among many.
    Strong,
}

impl Codec {
    /// The codec that ends soonest on a line of this speed: it keeps the line busy and no more,
    /// on two cores of which the literals take one.
    ///
    /// Measured on what replay left of a 768 MiB desktop, the 7,047 pages of 28.9 MB that are
    /// sent as they are, one core:
    ///
    /// | | bytes | seconds | keeps busy a line of |
    /// |---|---|---|---|
    /// | zstd 3 | 4.59 MB | 0.1 | 350 Mbit/s |
    /// | zstd 9 | 3.98 MB | 0.3 | 110 Mbit/s |
    /// | LZMA fast | 3.01 MB | 1.4 | 17 Mbit/s |
    /// | LZMA normal | 2.83 MB | 3.4 | 6.7 Mbit/s |
    /// | LZMA strong | 2.63 MB | 8.9 | 2.4 Mbit/s |
    ///
    /// zstd 15 and 19 lie far from that row: 4.0 MB after 2 s and 3.4 MB after 9 s. A codec is
    /// right for somewhat faster lines than it keeps busy, until the next one has sent its more
    /// bytes as soon.
    pub const fn for_line(bits_per_second: u64) -> Self {
        match bits_per_second {
            0..=2_400_000 => Self::Lzma(Effort::Strong),
            2_400_001..=6_700_000 => Self::Lzma(Effort::Normal),
            6_700_001..=20_000_000 => Self::Lzma(Effort::Fast),
            20_000_001..=40_000_000 => Self::Zstd(9),
            40_000_001..=100_000_000 => Self::Zstd(6),
            100_000_001..=1_000_000_000 => Self::Zstd(3),
            _ => Self::Zstd(1),
        }
    }
}

impl Codec {
    /// For a stream beside the literals, which are several times as many bytes: while they keep
    /// one core busy, another can take a step more over the rest.
    pub(crate) const fn beside_literals(self) -> Self {
        match self {
            Self::Zstd(_) => self,
            Self::Lzma(Effort::Fast) => Self::Lzma(Effort::Normal),
            Self::Lzma(Effort::Normal | Effort::Strong) => Self::Lzma(Effort::Strong),
        }
    }
}

/// An LZMA2 encoder for at most so many bytes, and the byte that names it.
pub(crate) struct LzmaEncoder {
    stream: Stream,
    buffer: Box<[u8]>,
}

impl LzmaEncoder {
    pub(crate) fn new(effort: Effort, most: u64) -> io::Result<(u8, Self)> {
        let log = most.max(1).next_power_of_two().trailing_zeros();
        let log = log.clamp(*DICTIONARY_LOGS.start(), MOST_DICTIONARY_LOG);
        let mut options = LzmaOptions::new_preset(6)?;
        options
            .dict_size(1 << log)
            .literal_context_bits(0)
            .literal_position_bits(3)
            .position_bits(3);
        match effort {
            Effort::Fast => options
                .mode(Mode::Fast)
                .match_finder(MatchFinder::HashChain4)
                .nice_len(64)
                .depth(24),
            Effort::Normal => options
                .mode(Mode::Normal)
                .match_finder(MatchFinder::HashChain4)
                .nice_len(32)
                .depth(8),
            Effort::Strong => options
                .mode(Mode::Normal)
                .match_finder(MatchFinder::BinaryTree4)
                .nice_len(64)
                .depth(16),
        };
        let stream = Stream::new_raw_encoder(Filters::new().lzma2(&options))?;
        let buffer = vec![0; 64 << 10].into_boxed_slice();
        Ok((log as u8, Self { stream, buffer }))
    }

    /// Puts `input` in and what comes out to `out`; with another action than `Run`, until that
    /// is done.
    pub(crate) fn run(
        &mut self,
        mut input: &[u8],
        action: Action,
        out: &mut dyn Write,
    ) -> io::Result<()> {
        loop {
            let (read, written) = (self.stream.total_in(), self.stream.total_out());
            let status = self.stream.process(input, &mut self.buffer, action)?;
            input = &input[(self.stream.total_in() - read) as usize..];
            let written = (self.stream.total_out() - written) as usize;
            out.write_all(&self.buffer[..written])?;
            let done = match action {
                Action::Run => input.is_empty() && written < self.buffer.len(),
                _ => matches!(status, Status::StreamEnd),
            };
            if done {
                return Ok(());
            }
        }
    }
}

/// The decoder that the first byte of a stream names.
pub(crate) enum Unpacker {
    Zstd(ZstdDecoder<'static>),
    Lzma(Stream),
}

/// What one step of decoding did.
pub(crate) struct Step {
    pub(crate) read: usize,
    pub(crate) written: usize,
    pub(crate) ended: bool,
}

impl Unpacker {
    pub(crate) fn new(tag: u8) -> io::Result<Self> {
        if tag == ZSTD_TAG {
            let mut zstd = ZstdDecoder::new()?;
            zstd.set_parameter(DParameter::WindowLogMax(MAX_WINDOW_LOG))?;
            return Ok(Self::Zstd(zstd));
        }
        if !DICTIONARY_LOGS.contains(&u32::from(tag)) {
            let why = "it names a codec that is not known here";
            return Err(io::Error::new(io::ErrorKind::InvalidData, why));
        }
        let mut options = LzmaOptions::new();
        options.dict_size(1 << tag);
        let stream = Stream::new_raw_decoder(Filters::new().lzma2(&options))?;
        Ok(Self::Lzma(stream))
    }

    /// The decoder of the frame after one that has ended; it keeps its memory where it can.
    pub(crate) fn next(self, tag: u8) -> io::Result<Self> {
        match self {
            Self::Zstd(mut zstd) if tag == ZSTD_TAG => {
                zstd.reinit()?;
                Ok(Self::Zstd(zstd))
            }
            _ => Self::new(tag),
        }
    }

    pub(crate) fn step(&mut self, input: &[u8], buffer: &mut [u8]) -> io::Result<Step> {
        match self {
            Self::Zstd(zstd) => {
                let status = zstd.run_on_buffers(input, buffer)?;
                Ok(Step {
                    read: status.bytes_read,
                    written: status.bytes_written,
                    ended: status.remaining == 0,
                })
            }
            Self::Lzma(stream) => {
                let (read, written) = (stream.total_in(), stream.total_out());
                let status = stream.process(input, buffer, Action::Run)?;
                Ok(Step {
                    read: (stream.total_in() - read) as usize,
                    written: (stream.total_out() - written) as usize,
                    ended: matches!(status, Status::StreamEnd),
                })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How much less of the bytes a codec leaves.
    const fn strength(codec: Codec) -> i32 {
        match codec {
            Codec::Zstd(level) => level,
            Codec::Lzma(Effort::Fast) => 20,
            Codec::Lzma(Effort::Normal) => 21,
            Codec::Lzma(Effort::Strong) => 22,
        }
    }

    #[test]
    fn slower_lines_get_stronger_codecs() {
        let speeds =
            [1, 5, 10, 30, 80, 500, 10_000].map(|mbit| strength(Codec::for_line(mbit * 1_000_000)));
        assert!(speeds.is_sorted_by(|a, b| a > b), "{speeds:?}");
        for mbit in [1, 5, 10, 30, 10_000] {
            let codec = Codec::for_line(mbit * 1_000_000);
            assert!(strength(codec.beside_literals()) >= strength(codec));
        }
    }

    #[test]
    fn words_of_eight_bytes_suit_lzma() {
        let pointers: Vec<u8> = (0u64..16 << 10)
            .flat_map(|i| {
                (0xffff_8880_0000_0000 | (i * i * 6_364_136_223) & 0x3fff_ffc0).to_le_bytes()
            })
            .collect();
        let mut out = Vec::new();
        let (tag, mut lzma) = LzmaEncoder::new(Effort::Fast, pointers.len() as u64).unwrap();
        assert_eq!(tag, 17, "128 KiB");
        lzma.run(&pointers, Action::Run, &mut out).unwrap();
        lzma.run(&[], Action::Finish, &mut out).unwrap();
        let zstd = zstd::bulk::compress(&pointers, 19).unwrap();
        assert!(out.len() < zstd.len(), "{} {}", out.len(), zstd.len());
    }
}
