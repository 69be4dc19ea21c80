//! The hash tree over an image.
//!
//! Leaves are BLAKE3 of each page's content, so that the same leaf also finds the content
//! elsewhere. 256 leaves make a chunk (1 MiB), 256 nodes the next level, up to one top; the
//! [`Root`] binds the top and the number of pages. Nodes are keyed BLAKE3 over their children,
//! with a key of their own for each purpose, so that no page can pass for a node.
//!
//! A chunk of zero pages is not stored, and copies of a tree share the chunks they have in
//! common: a mostly empty 100 GB disk costs little more than its content does.

use std::fmt;
use std::ops::Range;
use std::sync::{Arc, OnceLock};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::error::{Error, within};
use crate::page::{MAX_PAGES, PAGE_SIZE, PageHash, PageIndex, ReadPages, ZERO_PAGE};
use crate::page_set::PageSet;

/// Children of a node, and pages of a chunk.
pub const FAN_OUT: usize = 256;
const FAN: u64 = FAN_OUT as u64;

/// Told how many more pages are done; called from several threads.
pub type Progress<'a> = &'a (dyn Fn(u64) + Sync);

/// For callers that show no progress.
pub fn no_progress(_pages: u64) {}

/// The hash of a whole image: equal roots mean equal images of equal length.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Root(pub [u8; 32]);

impl fmt::Display for Root {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Root {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// The hash of a node above the leaves.
pub(crate) type NodeHash = [u8; 32];

/// 256 leaves and, once asked for, the hash over them.
#[derive(Clone)]
pub(crate) struct Chunk {
    pub(crate) leaves: [PageHash; FAN_OUT],
    node: OnceLock<NodeHash>,
}

impl Chunk {
    pub(crate) const fn zero() -> Self {
        Self {
            leaves: [PageHash::ZERO; FAN_OUT],
            node: OnceLock::new(),
        }
    }

    fn node(&self) -> NodeHash {
        *self
            .node
            .get_or_init(|| node_hash(1, self.leaves.iter().map(|leaf| &leaf.0)))
    }

    pub(crate) fn is_zero(&self) -> bool {
        self.leaves.iter().all(PageHash::is_zero)
    }
}

/// Merkle tree over all pages of an image.
#[derive(Clone)]
pub struct ImageTree {
    pages: u64,
    /// `None` where all 256 pages are zero.
    chunks: Vec<Option<Arc<Chunk>>>,
}

/// The hash of a node at `level` (1: a chunk), over up to 256 children; those that are missing
/// past the end of the image count as nodes of zero pages, which the caller supplies.
pub(crate) fn node_hash<'a>(level: u32, children: impl Iterator<Item = &'a [u8; 32]>) -> NodeHash {
    static KEY: OnceLock<[u8; 32]> = OnceLock::new();
    let key = KEY.get_or_init(|| blake3::derive_key("replay-migrate v1 image tree node", &[]));
    let mut bytes = Vec::with_capacity(4 + FAN_OUT * 32);
    bytes.extend_from_slice(&level.to_le_bytes());
    children.for_each(|child| bytes.extend_from_slice(child));
    *blake3::keyed_hash(key, &bytes).as_bytes()
}

/// The root of an image of `pages` pages whose topmost node is `top`.
pub(crate) fn root_hash(pages: u64, top: &NodeHash) -> Root {
    static KEY: OnceLock<[u8; 32]> = OnceLock::new();
    let key = KEY.get_or_init(|| blake3::derive_key("replay-migrate v1 image tree root", &[]));
    let mut bytes = [0; 40];
    bytes[..8].copy_from_slice(&pages.to_le_bytes());
    bytes[8..].copy_from_slice(top);
    Root(*blake3::keyed_hash(key, &bytes).as_bytes())
}

/// The most levels a tree within [`MAX_PAGES`] has.
const MAX_HEIGHT: usize = 4;

/// The node at `level` over nothing but zero pages; level 0 is the zero page itself.
pub(crate) fn zero_node(level: u32) -> NodeHash {
    static ZEROS: OnceLock<[NodeHash; MAX_HEIGHT + 1]> = OnceLock::new();
    let zeros = ZEROS.get_or_init(|| {
        let mut zeros = [PageHash::ZERO.0; MAX_HEIGHT + 1];
        for level in 1..zeros.len() {
            let child = zeros[level - 1];
            zeros[level] = node_hash(level as u32, std::iter::repeat_n(&child, FAN_OUT));
        }
        zeros
    });
    zeros[(level as usize).min(MAX_HEIGHT)]
}

/// How many levels above the leaves an image of `pages` pages has: at least one.
pub(crate) const fn height(pages: u64) -> u32 {
    let mut nodes = pages.div_ceil(FAN);
    let mut height = 1;
    while nodes > 1 {
        nodes = nodes.div_ceil(FAN);
        height += 1;
    }
    height
}

impl ImageTree {
    /// The tree of an image that is zero throughout.
    pub fn zero(pages: u64) -> Result<Self, Error> {
        within("the size of an image in pages", pages, MAX_PAGES)?;
        Ok(Self {
            pages,
            chunks: vec![None; pages.div_ceil(FAN) as usize],
        })
    }

    pub(crate) fn from_chunks(pages: u64, chunks: Vec<Option<Arc<Chunk>>>) -> Self {
        Self { pages, chunks }
    }

    /// Reads and hashes a whole image on all cores. The image must not change meanwhile.
    pub fn build(image: &dyn ReadPages, progress: Progress<'_>) -> Result<Self, Error> {
        let pages = image.pages();
        within("the size of an image in pages", pages, MAX_PAGES)?;
        let chunks = (0..pages.div_ceil(FAN))
            .into_par_iter()
            .map_init(Vec::new, |buffer, chunk| {
                let first = chunk * FAN;
                let count = FAN.min(pages - first);
                let hashed = hash_chunk(image, first, count, buffer);
                progress(count);
                hashed
            })
            .collect::<Result<_, Error>>()?;
        Ok(Self { pages, chunks })
    }

    /// How many pages the image has.
    pub const fn pages(&self) -> u64 {
        self.pages
    }

    /// The content hash of a page; past the end, that of the zero page.
    pub fn leaf(&self, index: PageIndex) -> PageHash {
        match self.chunks.get((index.0 / FAN) as usize) {
            Some(Some(chunk)) => chunk.leaves[(index.0 % FAN) as usize],
            _ => PageHash::ZERO,
        }
    }

    /// The pages that are not zero, with their hashes, in a range of chunks.
    pub(crate) fn content(
        &self,
        chunks: Range<usize>,
    ) -> impl ParallelIterator<Item = (PageIndex, PageHash)> + '_ {
        let first = chunks.start;
        self.chunks[chunks]
            .par_iter()
            .enumerate()
            .flat_map_iter(move |(i, chunk)| {
                let start = (first + i) as u64 * FAN;
                let leaves = chunk.as_ref().map_or(&[][..], |chunk| &chunk.leaves[..]);
                leaves
                    .iter()
                    .enumerate()
                    .filter(|(_, leaf)| !leaf.is_zero())
                    .map(move |(j, &leaf)| (PageIndex(start + j as u64), leaf))
            })
    }

    pub(crate) fn chunks(&self) -> &[Option<Arc<Chunk>>] {
        &self.chunks
    }

    /// How many pages are not zero.
    pub fn content_pages(&self) -> u64 {
        self.content(0..self.chunks.len()).count() as u64
    }

    /// Sets one leaf. An index past the end is refused.
    pub fn set(&mut self, index: PageIndex, hash: PageHash) -> Result<(), Error> {
        within("a page index", index.0.saturating_add(1), self.pages)?;
        let slot = &mut self.chunks[(index.0 / FAN) as usize];
        if slot.is_none() && hash.is_zero() {
            return Ok(());
        }
        let chunk = Arc::make_mut(slot.get_or_insert_with(|| Arc::new(Chunk::zero())));
        chunk.leaves[(index.0 % FAN) as usize] = hash;
        chunk.node = OnceLock::new();
        if hash.is_zero() && chunk.is_zero() {
            *slot = None;
        }
        Ok(())
    }

    /// Sets many leaves.
    pub fn update(
        &mut self,
        leaves: impl IntoIterator<Item = (PageIndex, PageHash)>,
    ) -> Result<(), Error> {
        leaves
            .into_iter()
            .try_for_each(|(index, hash)| self.set(index, hash))
    }

    /// Reads and hashes these pages of the image anew, on all cores.
    pub fn rehash(&mut self, image: &dyn ReadPages, touched: &PageSet) -> Result<(), Error> {
        within("a page index", touched.end(), self.pages)?;
        let indices: Vec<_> = touched.iter().collect();
        for batch in indices.chunks(1 << 18) {
            let hashes: Vec<_> = batch
                .par_iter()
                .with_min_len(64)
                .map(|&index| Ok((index, read_hash(image, index)?)))
                .collect::<Result<_, Error>>()?;
            self.update(hashes)?;
        }
        Ok(())
    }

    /// The same image, cut or extended with zero pages.
    pub fn resized(&self, pages: u64) -> Result<Self, Error> {
        within("the size of an image in pages", pages, MAX_PAGES)?;
        let mut chunks = self.chunks.clone();
        chunks.resize(pages.div_ceil(FAN) as usize, None);
        let mut out = Self { pages, chunks };
        let partial = pages % FAN;
        if pages < self.pages && partial != 0 {
            // Leaves past the new end, where `set` does not reach.
            if let Some(slot) = out.chunks.last_mut()
                && let Some(chunk) = slot
            {
                let chunk = Arc::make_mut(chunk);
                chunk.leaves[partial as usize..].fill(PageHash::ZERO);
                chunk.node = OnceLock::new();
                if chunk.is_zero() {
                    *slot = None;
                }
            }
        }
        Ok(out)
    }

    /// The pages of this image whose content is not that of `other` at the same address.
    pub fn differing(&self, other: &Self) -> PageSet {
        let per_chunk: Vec<PageSet> = self
            .chunks
            .par_iter()
            .enumerate()
            .map(|(i, ours)| {
                let theirs = other.chunks.get(i).and_then(Option::as_ref);
                let mut set = PageSet::new();
                let same = match (ours, theirs) {
                    (None, None) => true,
                    (Some(a), Some(b)) => Arc::ptr_eq(a, b) || a.leaves == b.leaves,
                    _ => false,
                };
                if !same {
                    let first = i as u64 * FAN;
                    for j in 0..FAN.min(self.pages - first) {
                        let leaf = |chunk: Option<&Arc<Chunk>>| {
                            chunk.map_or(PageHash::ZERO, |chunk| chunk.leaves[j as usize])
                        };
                        if leaf(ours.as_ref()) != leaf(theirs) {
                            set.push(PageIndex(first + j));
                        }
                    }
                }
                set
            })
            .collect();
        let mut all = PageSet::new();
        for run in per_chunk.iter().flat_map(PageSet::runs) {
            all.push_run(run.clone());
        }
        all
    }

    /// The root. Node hashes are kept, so that only chunks that changed are hashed again.
    pub fn root(&self) -> Root {
        let levels = self.levels();
        let top = levels.last().and_then(|level| level.first()).copied();
        root_hash(self.pages, &top.unwrap_or_else(|| zero_node(1)))
    }

    /// The nodes above the leaves, chunk nodes first, the top last.
    pub(crate) fn levels(&self) -> Vec<Vec<NodeHash>> {
        let zero = zero_node(1);
        let node = |chunk: &Option<Arc<Chunk>>| chunk.as_deref().map_or(zero, Chunk::node);
        let mut levels = vec![self.chunks.par_iter().map(node).collect::<Vec<_>>()];
        for level in 2..=height(self.pages) {
            let below = &levels[level as usize - 2];
            let missing = zero_node(level - 1);
            let nodes = below
                .par_chunks(FAN_OUT)
                .map(|children| {
                    let padding = std::iter::repeat_n(&missing, FAN_OUT - children.len());
                    node_hash(level, children.iter().chain(padding))
                })
                .collect();
            levels.push(nodes);
        }
        levels
    }
}

impl fmt::Debug for ImageTree {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ImageTree")
            .field("pages", &self.pages)
            .field("root", &self.root())
            .finish_non_exhaustive()
    }
}

impl PartialEq for ImageTree {
    fn eq(&self, other: &Self) -> bool {
        self.root() == other.root()
    }
}

impl Eq for ImageTree {}

fn read_hash(image: &dyn ReadPages, index: PageIndex) -> Result<PageHash, Error> {
    if let Some(page) = whole_page(image, index.0) {
        return Ok(PageHash::of(page));
    }
    let mut page = ZERO_PAGE;
    image.read(index, &mut page).map_err(|source| Error::Read {
        image: "the image",
        page: index,
        source,
    })?;
    Ok(PageHash::of(&page))
}

/// A page where it lies, when the image is in memory and holds all of it.
fn whole_page(image: &dyn ReadPages, index: u64) -> Option<&[u8; PAGE_SIZE]> {
    let start = usize::try_from(index).ok()?.checked_mul(PAGE_SIZE)?;
    image.as_slice()?.get(start..)?.first_chunk()
}

fn hash_chunk(
    image: &dyn ReadPages,
    first: u64,
    count: u64,
    buffer: &mut Vec<u8>,
) -> Result<Option<Arc<Chunk>>, Error> {
    if image.known_zero(PageIndex(first), count) {
        return Ok(None);
    }
    let bytes = count as usize * PAGE_SIZE;
    let start = first as usize * PAGE_SIZE;
    let in_place = image
        .as_slice()
        .and_then(|slice| slice.get(start..start + bytes));
    let content = if let Some(content) = in_place {
        content
    } else {
        buffer.resize(bytes, 0);
        image
            .read_many(PageIndex(first), buffer)
            .map_err(|source| Error::Read {
                image: "the image",
                page: PageIndex(first),
                source,
            })?;
        &buffer[..]
    };
    let mut chunk = Chunk::zero();
    let pages = content.as_chunks::<PAGE_SIZE>().0;
    for (leaf, page) in chunk.leaves.iter_mut().zip(pages) {
        *leaf = PageHash::of(page);
    }
    if chunk.is_zero() {
        return Ok(None);
    }
    chunk.node();
    Ok(Some(Arc::new(chunk)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::page::SlicePages;

    /// Mostly zero images with a few different pages.
    fn images() -> impl Strategy<Value = Vec<u8>> {
        prop::collection::vec(0u8..4, 0..600).prop_map(|kinds| {
            kinds
                .iter()
                .flat_map(|&kind| [kind.saturating_sub(1); PAGE_SIZE])
                .collect()
        })
    }

    fn tree(bytes: &[u8]) -> ImageTree {
        ImageTree::build(&SlicePages(bytes), &no_progress).unwrap()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn updates_arrive_where_a_rebuild_does(old in images(), new in images()) {
            let (a, b) = (tree(&old), tree(&new));
            let differing = b.differing(&a);
            for i in 0..b.pages() {
                let index = PageIndex(i);
                prop_assert_eq!(differing.contains(index), a.leaf(index) != b.leaf(index));
            }
            let mut moved = a.resized(b.pages()).unwrap();
            moved.rehash(&SlicePages(&new), &differing).unwrap();
            prop_assert_eq!(moved.root(), b.root());
            prop_assert_eq!(a.root() == b.root(), old == new);
            prop_assert_eq!(moved.content_pages(), b.content_pages());
        }
    }

    #[test]
    fn the_root_binds_the_length() {
        let roots: Vec<_> = [0, 1, 255, 256, 257, 65536, 65537]
            .map(|n| ImageTree::zero(n).unwrap().root())
            .into();
        for (i, root) in roots.iter().enumerate() {
            assert!(!roots[..i].contains(root));
        }
    }

    #[test]
    fn an_empty_disk_of_100_gb_costs_little() {
        let mut tree = ImageTree::zero(100 << 18).unwrap();
        tree.set(PageIndex(99 << 18), PageHash([1; 32])).unwrap();
        assert_eq!(tree.chunks().iter().flatten().count(), 1);
        let stored = tree.root();
        tree.set(PageIndex(99 << 18), PageHash::ZERO).unwrap();
        assert_eq!(tree.chunks().iter().flatten().count(), 0);
        assert_ne!(tree.root(), stored);
        assert!(tree.set(PageIndex(100 << 18), PageHash::ZERO).is_err());
        assert!(ImageTree::zero(MAX_PAGES + 1).is_err());
    }

    #[test]
    fn a_zero_tree_is_the_tree_of_zeros() {
        for pages in [1, 256, 300] {
            let zeros = vec![0; pages * PAGE_SIZE];
            assert_eq!(
                tree(&zeros).root(),
                ImageTree::zero(pages as u64).unwrap().root()
            );
        }
    }
}
