use std::io::Write;

use proptest::prelude::*;

use super::*;
use crate::codec::{Codec, Effort, MAX_WINDOW_LOG, ZSTD_TAG};
use crate::compress::StreamWriter;
use crate::encode::EncodeOptions;
use crate::governor::Governor;

/// A stream as the encoder makes it.
fn packed_by(codec: Codec, bytes: &[u8]) -> Vec<u8> {
    let (to_wire, chunks) = crossbeam::channel::unbounded();
    let governor = Governor::fixed(EncodeOptions { codec, workers: 0 });
    let most = bytes.len() as u64;
    let mut writer = StreamWriter::new(StreamId::Literal, &to_wire, &governor, most);
    writer.write(bytes).unwrap();
    writer.finish().unwrap();
    drop(to_wire);
    chunks.into_iter().flat_map(|chunk| chunk.bytes).collect()
}

const CODECS: [Codec; 4] = [
    Codec::Zstd(3),
    Codec::Lzma(Effort::Fast),
    Codec::Lzma(Effort::Normal),
    Codec::Lzma(Effort::Strong),
];

/// By one codec or the other.
fn packed(bytes: &[u8]) -> Vec<u8> {
    packed_by(CODECS[bytes.len() / WORD % 2], bytes)
}

fn frame(pages: usize) -> Vec<u8> {
    packed(&vec![5; pages * PAGE_SIZE])
}

fn chunk(stream: StreamId, bytes: &[u8]) -> PageChunk {
    PageChunk {
        stream,
        bytes: bytes.to_vec(),
    }
}

/// How many pages came out.
fn decode(expected: u64, chunks: &[PageChunk]) -> Result<u64, Error> {
    let mut decoder = PageDecoder::new(expected);
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
            (0usize..6, prop::collection::vec(any::<u8>(), 0..60)), 0..6),
        expected in 0u64..20,
    ) {
        let streams = [
            StreamId::Kinds,
            StreamId::Literal,
            StreamId::Delta,
            StreamId::Masks,
            StreamId::Words,
            StreamId::Mappings,
        ];
        let chunks: Vec<_> =
            chunks.iter().map(|(stream, bytes)| chunk(streams[*stream], bytes)).collect();
        if let Ok(pages) = decode(expected, &chunks) {
            prop_assert_eq!(pages, expected);
        }
    }

    #[test]
    fn frames_may_be_cut_anywhere(
        cuts in prop::collection::vec(1usize..20, 1..40),
        codec in prop::sample::select(&CODECS),
    ) {
        let mut chunks = vec![chunk(
            StreamId::Kinds,
            &encode_kinds(&[PageKind::Literal, PageKind::Delta, PageKind::Literal]),
        )];
        for (stream, pages) in [(StreamId::Delta, 1), (StreamId::Literal, 2)] {
            let bytes = packed_by(codec, &vec![5; pages * PAGE_SIZE]);
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
fn frames_of_any_codecs_follow_one_another() {
    let three = chunk(StreamId::Kinds, &encode_kinds(&[PageKind::Literal; 3]));
    let page = |codec, share: usize| packed_by(codec, &vec![5; PAGE_SIZE * share / 2]);
    for first in CODECS {
        for second in CODECS {
            // A page and a half in each, and one that brings nothing.
            let frames = [page(first, 3), page(second, 0), page(second, 3)].concat();
            for at in [1, frames.len() / 2, frames.len() - 1] {
                let (a, b) = frames.split_at(at);
                let pieces = [a, b].map(|piece| chunk(StreamId::Literal, piece));
                let chunks = [&[three.clone()][..], &pieces].concat();
                assert_eq!(decode(3, &chunks).unwrap(), 3);
            }
            // A frame that is named and never comes.
            let more = chunk(StreamId::Literal, &[&frames[..], &[ZSTD_TAG]].concat());
            assert!(decode(3, &[three.clone(), more]).is_err());
        }
    }
}

/// Masks of one word each, the last.
fn masks(pages: usize) -> Vec<u8> {
    let mut mask = [0; MASK_BYTES];
    mask[MASK_BYTES - 1] = 0x80;
    packed(&mask.repeat(pages))
}

fn words(count: usize) -> Vec<u8> {
    packed(&vec![7; count * WORD])
}

#[test]
fn patches_need_their_masks_first_and_their_words_whole() {
    let three = chunk(StreamId::Kinds, &encode_kinds(&[PageKind::Patch; 3]));
    let told = |count| chunk(StreamId::Masks, &masks(count));
    let said = |count| chunk(StreamId::Words, &words(count));
    assert_eq!(decode(3, &[three.clone(), told(3), said(3)]).unwrap(), 3);
    assert!(decode(3, &[three.clone(), said(3), told(3)]).is_err());
    assert!(decode(3, &[told(3), three.clone(), said(3)]).is_err());
    for (masks, words) in [(2, 2), (4, 4), (3, 2), (3, 4), (3, 0), (2, 3)] {
        let chunks = [three.clone(), told(masks), said(words)];
        assert!(decode(3, &chunks).is_err(), "{masks} {words}");
    }
    let half = packed(&[7; 3 * WORD - 1]);
    assert!(decode(3, &[three.clone(), told(3), chunk(StreamId::Words, &half)]).is_err());
    let nothing = chunk(StreamId::Masks, &packed(&[0; 3 * MASK_BYTES]));
    assert_eq!(decode(3, &[three.clone(), nothing.clone()]).unwrap(), 3);
    assert!(decode(3, &[three, nothing, said(1)]).is_err());
    assert!(decode(1, &[chunk(StreamId::Kinds, &[1 << 2 | 3])]).is_err());
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
fn mappings_come_once_and_before_all_else() {
    let one = chunk(StreamId::Kinds, &encode_kinds(&[PageKind::Literal]));
    let page = chunk(StreamId::Literal, &frame(1));
    let mappings = chunk(StreamId::Mappings, &[0; 8]);
    let ways: [(&[PageChunk], bool); 4] = [
        (&[one.clone(), page.clone()], true),
        (&[mappings.clone(), one.clone(), page.clone()], true),
        (
            &[
                mappings.clone(),
                mappings.clone(),
                one.clone(),
                page.clone(),
            ],
            false,
        ),
        (&[one, mappings, page], false),
    ];
    for (chunks, good) in ways {
        assert_eq!(decode(1, chunks).is_ok(), good);
    }
}

#[test]
fn a_bomb_is_refused_at_its_first_page_too_many() {
    for codec in CODECS {
        // 64 MiB of zeros in a few kB.
        let bomb = packed_by(codec, &vec![0; 64 << 20]);
        for (kind, stream) in [
            (PageKind::Literal, StreamId::Literal),
            (PageKind::Delta, StreamId::Delta),
            (PageKind::Patch, StreamId::Masks),
        ] {
            let one = chunk(StreamId::Kinds, &encode_kinds(&[kind]));
            assert!(decode(1, &[one, chunk(stream, &bomb)]).is_err());
        }
        let one = chunk(StreamId::Kinds, &encode_kinds(&[PageKind::Patch]));
        let mask = chunk(StreamId::Masks, &masks(1));
        assert!(decode(1, &[one, mask, chunk(StreamId::Words, &bomb)]).is_err());
    }
}

#[test]
fn other_codecs_longer_windows_and_damage_are_refused() {
    let one = chunk(StreamId::Kinds, &encode_kinds(&[PageKind::Literal]));
    for codec in CODECS {
        let good = packed_by(codec, &[5; PAGE_SIZE]);
        assert_eq!(
            decode(1, &[one.clone(), chunk(StreamId::Literal, &good)]).unwrap(),
            1
        );
        for tag in (1..16).chain(27..=255) {
            let mut bytes = good.clone();
            bytes[0] = tag;
            assert!(decode(1, &[one.clone(), chunk(StreamId::Literal, &bytes)]).is_err());
        }
        for len in 0..good.len() {
            let cut = chunk(StreamId::Literal, &good[..len]);
            assert!(decode(1, &[one.clone(), cut]).is_err());
        }
    }
    // A frame that asks for more than 128 MiB.
    let mut encoder = zstd::stream::write::Encoder::new(vec![ZSTD_TAG], 1).unwrap();
    encoder.window_log(MAX_WINDOW_LOG + 1).unwrap();
    encoder.long_distance_matching(true).unwrap();
    encoder.write_all(&[5; PAGE_SIZE]).unwrap();
    let long = chunk(StreamId::Literal, &encoder.finish().unwrap());
    assert!(decode(1, &[one, long]).is_err());
}
