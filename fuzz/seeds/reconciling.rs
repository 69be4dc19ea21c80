//! What is inside the larger messages.

use std::path::Path;

use reconciler::{
    Codec, EncodeOptions, ImageTree, Known, Layout, Offer, OfferOptions, PAGE_SIZE, Page,
    PageDelta, PageIndex, PageSet, Processes, Rearrangement, References, Salt, SlicePages, Space,
    StreamId, encode_pages,
};

use crate::images::tree;
use crate::{Result, put};

/// What the reconciler's own targets begin with.
pub(crate) fn reconciling(corpus: &Path) -> Result<()> {
    let image: Vec<u8> = (0..40_u8)
        .flat_map(|page| vec![page / 2; PAGE_SIZE])
        .collect();
    let (new, base) = (tree(&image)?, ImageTree::zero(40)?);
    let options = OfferOptions {
        salt: Salt([1; 32]),
        candidates: 1,
        force_bits: None,
        seek_from: OfferOptions::SEEK_FROM,
    };
    let offer = Offer::new(&new, &base, &options)?.encode()?;
    // All of it is the offer.
    put(corpus, "offer", "offer", &[&[255], &offer[..]].concat())?;
    let encoded = new.encode();
    let tree = &encoded[..encoded.len() - 32];
    put(corpus, "tree", "tree", tree)?;
    let pages: PageSet = new.differing(&base);
    put(corpus, "page_set", "pages", &pages.encode())?;

    // What the target `seek` has offered.
    let image: Vec<u8> = (1..=200_u8).flat_map(|byte| [byte; PAGE_SIZE]).collect();
    let (new, base) = (self::tree(&image)?, ImageTree::zero(200)?);
    let known = Known {
        twin: &[&new],
        ..Known::default()
    };
    let likely = Offer::knowing(&new, &base, &known, &options)?.encode()?;
    put(corpus, "offer", "likely", &[&[255], &likely[..]].concat())?;
    let offer = Offer::new(&new, &base, &options)?;
    let asked: Vec<_> = (0..200).step_by(2).map(PageIndex).collect();
    let known = offer.seek(&new, &asked);
    if let Some(seek) = known {
        put(corpus, "seek", "half", &seek.encode()?)?;
    }
    for (name, asked) in [("few", 3), ("all", 200)] {
        let asked: Vec<_> = (0..asked).map(PageIndex).collect();
        if let Some(seek) = offer.seek(&new, &asked) {
            put(corpus, "seek", name, &seek.encode()?)?;
        }
    }

    // A page as it was, all bytes 0, and as it is with a little changed here and there.
    let old: Page = [0; PAGE_SIZE];
    let mut page = old;
    for at in [3, 4, 5, 900, 2048, 4095] {
        page[at] = at as u8 | 1;
    }
    page[1000..1200].fill(7);
    for (number, delta) in PageDelta::ALL.iter().enumerate() {
        let said = delta.encode(&old, &page).ok_or("no delta")?;
        let bytes = [&[number as u8], &said[..]].concat();
        put(corpus, "page_delta", &format!("codec{number}"), &bytes)?;
    }
    Ok(())
}

/// Page streams as the target `pages` takes them: which stream, how many bytes, and those.
pub(crate) fn streams(corpus: &Path) -> Result<()> {
    const STREAMS: [StreamId; 6] = [
        StreamId::Kinds,
        StreamId::Literal,
        StreamId::Delta,
        StreamId::Masks,
        StreamId::Words,
        StreamId::Mappings,
    ];
    let source: Vec<u8> = (1..=8_u8).flat_map(|seed| [seed; PAGE_SIZE]).collect();
    let base = vec![0; source.len()];
    let all: Vec<_> = (0..8).map(PageIndex).collect();
    let base = SlicePages(&base);
    let deltas = References {
        base: Some(&base),
        ..References::default()
    };
    for (name, against, line) in [
        ("literal", References::default(), 1 << 40),
        ("thin", References::default(), 1 << 20),
        ("delta", deltas, 1 << 40),
    ] {
        let mut bytes = Vec::new();
        let options = EncodeOptions {
            codec: Codec::for_line(line),
            workers: 0,
        };
        let mut sink = |chunk: reconciler::PageChunk| {
            let stream = STREAMS.iter().position(|known| *known == chunk.stream);
            for piece in chunk.bytes.chunks(255) {
                bytes.extend(stream.map(|stream| stream as u8));
                bytes.push(piece.len() as u8);
                bytes.extend(piece);
            }
            Ok(())
        };
        encode_pages(&SlicePages(&source), against, &all, options, &mut sink)?;
        // The end of a round.
        bytes.extend([6, 0]);
        put(corpus, "pages", name, &bytes)?;
    }
    Ok(())
}

/// A process whose heap lies otherwise than in another run, and a device state in another order.
pub(crate) fn processes(corpus: &Path) -> Result<()> {
    const BASE: u64 = 0x5555_5555_0000;
    let guest = |gap: usize, order: fn(u64) -> u64| -> Result<_> {
        let mut words = vec![0; gap];
        let mut before = 0;
        for object in 0..900_u64 {
            let at = BASE + words.len() as u64 * 8;
            let content = object.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1 << 63;
            words.extend([object, content, content ^ 0x00ff_00ff, before]);
            before = at;
        }
        words.resize(9 * 512, 0);
        let mut ram = vec![0; 64 * PAGE_SIZE];
        let mut pages = Vec::new();
        for (number, words) in words.chunks(512).enumerate() {
            let page = order(number as u64);
            let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            ram[page as usize * PAGE_SIZE..][..PAGE_SIZE].copy_from_slice(&bytes);
            pages.push((BASE / PAGE_SIZE as u64 + number as u64, page));
        }
        let space = Space { key: 7, pages };
        Ok((tree(&ram)?, ram, [space]))
    };
    let (one, other) = (guest(0, |page| page + 3)?, guest(6, |page| page + 3)?);
    let of = |(tree, ram, spaces)| Processes { ram, tree, spaces };
    let (layout, _) = Layout::between(
        of((&one.0, &one.1[..], &one.2[..])),
        of((&other.0, &other.1[..], &other.2[..])),
        &ImageTree::zero(64)?,
    );
    if layout.is_empty() {
        return Err("the two runs lie alike".into());
    }
    put(corpus, "layout", "heap", &layout.encode()?)?;
    put(corpus, "layout", "none", &Layout::default().encode()?)?;

    let sections: Vec<Vec<u8>> = (0..6_u8)
        .map(|section| {
            (0..300_u32)
                .map(|at| (at * u32::from(section + 3)) as u8)
                .collect()
        })
        .collect();
    let old = sections.concat();
    let new = [3, 0, 5, 1, 4, 2]
        .map(|section| sections[section].clone())
        .concat();
    let told = Rearrangement::between(&new, &old);
    if told.is_empty() {
        return Err("the order is the same".into());
    }
    put(corpus, "rearrangement", "sections", &told.encode()?)
}
