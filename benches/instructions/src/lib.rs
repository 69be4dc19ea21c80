//! What the reconciler's stages work on, so small that Callgrind takes seconds for each.

#[path = "../../../reconciler/benches/synthetic/mod.rs"]
mod synthetic;

use reconciler::{
    Codec, EncodeOptions, Holdings, ImageTree, Offer, OfferOptions, PageChunk, PageIndex,
    References, Resolution, Salt, SlicePages, encode_pages, no_progress, resolve,
};

/// 16 MiB.
const PAGES: usize = 16 << 8;

/// A guest as it was, and as it became.
pub struct States {
    /// As both sites have it.
    pub base: Vec<u8>,
    /// As the source has it.
    pub source: Vec<u8>,
    /// Of `base`.
    pub base_tree: ImageTree,
    /// Of `source`.
    pub source_tree: ImageTree,
}

/// An exchange up to the pages.
pub struct Asked {
    /// What it is about.
    pub states: States,
    /// What the source says.
    pub offer: Offer,
    /// What the target makes of it.
    pub resolution: Resolution,
    /// What it asks for.
    pub wanted: Vec<PageIndex>,
}

/// Hashes an image. Where this is called first is the thread that all work of rayon is done on: what other
/// threads do is not counted.
pub fn tree(bytes: &[u8]) -> ImageTree {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1);
    // It fails where there is one already.
    let _ = pool.use_current_thread().build_global();
    ImageTree::build(&SlicePages(bytes), &no_progress).expect("memory can be read")
}

/// A third of all pages changed, half of those in a few words and half altogether.
pub fn states() -> States {
    let base = synthetic::guest(PAGES);
    let source = synthetic::used(&base, 3, 78);
    let (base_tree, source_tree) = (tree(&base), tree(&source));
    States {
        base,
        source,
        base_tree,
        source_tree,
    }
}

/// What the target has: the base.
pub fn holdings<'a>(states: &'a States, pages: &'a SlicePages<'a>) -> Holdings<'a> {
    Holdings {
        base: &states.base_tree,
        base_reader: Some(pages),
        current: &states.base_tree,
        places: &[],
    }
}

/// What the source says.
pub fn offer(states: &States) -> Offer {
    let options = OfferOptions {
        salt: Salt([9; 32]),
        candidates: 1 << 20,
        force_bits: None,
        seek_from: OfferOptions::SEEK_FROM,
    };
    Offer::new(&states.source_tree, &states.base_tree, &options).expect("the same guest")
}

/// An exchange up to the pages.
pub fn asked() -> Asked {
    let states = states();
    let offer = offer(&states);
    let pages = SlicePages(&states.base);
    let resolution = resolve(&offer, &holdings(&states, &pages)).expect("the same base");
    let answer = resolution.answer(&offer).expect("few pages");
    let wanted = offer.decode_answer(&answer).expect("it was just made");
    Asked {
        states,
        offer,
        resolution,
        wanted,
    }
}

/// Reads, compares and compresses the pages that are asked for.
pub fn encode(asked: &Asked, codec: Codec) -> Vec<PageChunk> {
    let (base, source) = (
        SlicePages(&asked.states.base),
        SlicePages(&asked.states.source),
    );
    let how = EncodeOptions { codec, workers: 1 };
    let mut chunks = Vec::new();
    encode_pages(
        &source,
        References::base(Some(&base)),
        &asked.wanted,
        how,
        &mut |chunk| {
            chunks.push(chunk);
            Ok(())
        },
    )
    .expect("nothing is closed");
    chunks
}
