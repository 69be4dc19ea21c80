//! Images that change while they are sent: rounds of pre-copy.
//!
//! The source sends what changed, again and again, each page as the difference to what the
//! target has of it (Svärd, Hudzia, Tordsson, Elmroth, VEE 2011). For that it has to know the
//! target's page byte by byte: a [`Shadow`] is that knowledge, the base and over it a sparse file
//! with the pages sent since. No version is ever evicted, so that there is no page that would
//! have to be sent whole for lack of its last version. It costs a file of as many pages as differ
//! from the base, which the page cache holds or gives back as the host needs; in memory are the
//! tree (32 bytes a page that is not zero) and a bit for each page.
//!
//! A page that changes while it is read is read as a mixture of two moments. That does no harm:
//! it is copied first ([`Captured`]), and what was copied is what is sent and remembered. The
//! mixture differs from the guest's page and goes into the next round; the last one is of a
//! guest that stands still.
//!
//! ```text
//!  source                                              target
//!  Captured of pages whose hash is not the shadow's
//!  encode_pages(captured, shadow)
//!        ── PageSet::encode, PageChunk ... ──────────►  Incoming::push ... finish
//!  shadow.keep(captured)                                its tree
//! ```
//!
//! Promised: after each batch the shadow's tree and the target's are of the same image, or an
//! error says that they are not to be relied on. Not promised: an image of any one moment.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{PoisonError, RwLock};

use crate::error::{Error, within};
use crate::page::{Image, PAGE_SIZE, Page, PageHash, PageIndex, ReadPages, ZERO_PAGE};
use crate::page_set::PageSet;
use crate::patch::xor;
use crate::stream::{Coded, PageChunk, PageDecoder};
use crate::tree::ImageTree;

/// Pages copied out of an image that goes on changing, with the hashes of what was copied.
#[derive(Debug, Default)]
pub struct Captured {
    pages: u64,
    indices: Vec<PageIndex>,
    hashes: Vec<PageHash>,
    bytes: Vec<u8>,
}

impl Captured {
    /// None yet, of an image of so many pages.
    pub fn of(pages: u64) -> Self {
        Self {
            pages,
            ..Self::default()
        }
    }

    /// Adds a page, which must come after all that are there.
    ///
    /// # Errors
    /// If it does not, or lies beyond the image.
    pub fn push(&mut self, index: PageIndex, hash: PageHash, page: &Page) -> Result<(), Error> {
        within("a page index", index.0.saturating_add(1), self.pages)?;
        if self.indices.last().is_some_and(|last| *last >= index) {
            return Err(Error::malformed("captured pages", "they do not ascend"));
        }
        self.indices.push(index);
        self.hashes.push(hash);
        self.bytes.extend_from_slice(page);
        Ok(())
    }

    /// Which pages, ascending.
    pub fn indices(&self) -> &[PageIndex] {
        &self.indices
    }

    /// How many pages.
    pub fn len(&self) -> usize {
        self.indices.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.indices.is_empty()
    }

    fn iter(&self) -> impl Iterator<Item = (PageIndex, PageHash, &Page)> {
        let pages = self.bytes.as_chunks::<PAGE_SIZE>().0;
        let named = self.indices.iter().zip(&self.hashes).zip(pages);
        named.map(|((index, hash), page)| (*index, *hash, page))
    }
}

impl ReadPages for Captured {
    fn pages(&self) -> u64 {
        self.pages
    }

    /// Fails for a page that was not captured.
    fn read(&self, index: PageIndex, into: &mut Page) -> io::Result<()> {
        let found = self.indices.binary_search(&index).ok();
        let page = found.and_then(|at| self.bytes.as_chunks::<PAGE_SIZE>().0.get(at));
        let page = page.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
        into.copy_from_slice(page);
        Ok(())
    }
}

/// What the other site has of an image: a base, and the pages sent since.
pub struct Shadow {
    base: Option<Box<dyn ReadPages + Send + Sync>>,
    file: File,
    sent: RwLock<Sent>,
}

struct Sent {
    tree: ImageTree,
    /// A bit for each page that the file has.
    held: Vec<u64>,
}

impl std::fmt::Debug for Shadow {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shadow")
            .field("pages", &self.pages())
            .field("held", &self.held())
            .finish_non_exhaustive()
    }
}

impl Shadow {
    /// The base, whose tree this is, and nothing sent yet; without a reader the base is zero
    /// throughout. `file` is empty, open for reading and writing, and nobody else's.
    pub fn over(
        base: Option<Box<dyn ReadPages + Send + Sync>>,
        tree: ImageTree,
        file: File,
    ) -> io::Result<Self> {
        file.set_len(tree.pages().saturating_mul(PAGE_SIZE as u64))?;
        let held = vec![0; tree.pages().div_ceil(64) as usize];
        Ok(Self {
            base,
            file,
            sent: RwLock::new(Sent { tree, held }),
        })
    }

    /// The tree of what the other site has.
    pub fn tree(&self) -> ImageTree {
        self.look(|sent| sent.tree.clone())
    }

    /// Lends that tree; nothing is kept meanwhile.
    pub fn with_tree<T>(&self, look: impl FnOnce(&ImageTree) -> T) -> T {
        self.look(|sent| look(&sent.tree))
    }

    /// How many pages the file has.
    pub fn held(&self) -> u64 {
        self.look(|sent| {
            let ones = sent.held.iter().map(|bits| u64::from(bits.count_ones()));
            ones.sum()
        })
    }

    /// Notes that the other site has these pages now.
    ///
    /// # Errors
    /// What the file said; the shadow is useless then.
    pub fn keep(&self, captured: &Captured) -> Result<(), Error> {
        let mut sent = self.sent.write().unwrap_or_else(PoisonError::into_inner);
        for (index, hash, page) in captured.iter() {
            sent.tree.set(index, hash)?;
            // Within the tree, so that neither the place nor the bit is out of bounds.
            self.file
                .write_all_at(page, index.0 * PAGE_SIZE as u64)
                .map_err(|source| Error::Spool { source })?;
            if let Some(bits) = sent.held.get_mut((index.0 / 64) as usize) {
                *bits |= 1 << (index.0 % 64);
            }
        }
        Ok(())
    }

    fn look<T>(&self, look: impl FnOnce(&Sent) -> T) -> T {
        look(&self.sent.read().unwrap_or_else(PoisonError::into_inner))
    }
}

impl ReadPages for Shadow {
    fn pages(&self) -> u64 {
        self.look(|sent| sent.tree.pages())
    }

    fn read(&self, index: PageIndex, into: &mut Page) -> io::Result<()> {
        let held = self.look(|sent| {
            let bits = sent.held.get((index.0 / 64) as usize);
            bits.is_some_and(|bits| bits >> (index.0 % 64) & 1 == 1)
        });
        match &self.base {
            _ if held => self.file.read_exact_at(into, index.0 * PAGE_SIZE as u64),
            Some(base) => base.read(index, into),
            None => {
                into.fill(0);
                Ok(())
            }
        }
    }
}

/// The target's end: a batch of pages, laid over what it has of the image.
pub struct Incoming {
    indices: Vec<PageIndex>,
    decoder: PageDecoder,
}

impl std::fmt::Debug for Incoming {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Incoming")
            .field("pages", &self.indices.len())
            .finish_non_exhaustive()
    }
}

impl Incoming {
    /// These pages are about to come, of an image of so many pages.
    ///
    /// # Errors
    /// If one of them lies beyond it.
    pub fn new(pages: &PageSet, of: u64) -> Result<Self, Error> {
        within("a page index", pages.end(), of)?;
        Ok(Self {
            indices: pages.iter().collect(),
            decoder: PageDecoder::new(pages.len()),
        })
    }

    /// Takes a chunk and writes the pages that it completes. `tree` is the image's.
    ///
    /// # Errors
    /// The image is of no use after one.
    pub fn push(
        &mut self,
        chunk: &PageChunk,
        image: &mut dyn Image,
        tree: &mut ImageTree,
    ) -> Result<(), Error> {
        let indices = &self.indices;
        self.decoder.push(chunk, &mut |position, coded, mappings| {
            // The decoder hands out no more positions than it was told of pages.
            let Some(&index) = indices.get(position as usize) else {
                return Err(Error::malformed("pages", "more than were announced"));
            };
            let mut page = match coded {
                Coded::Literal(page) => *page,
                Coded::Delta(delta) => {
                    let mut page = ZERO_PAGE;
                    image.read(index, &mut page).map_err(|source| Error::Read {
                        image: "the image being built",
                        page: index,
                        source,
                    })?;
                    mappings.apply(index, &mut page);
                    xor(&mut page, delta);
                    page
                }
                Coded::Patch(..) => {
                    return Err(Error::malformed(
                        "pages",
                        "a patch where nothing was replayed",
                    ));
                }
            };
            mappings.undo(index, &mut page);
            let written = image.write(index, &page);
            written.map_err(|source| Error::Write {
                page: index,
                source,
            })?;
            tree.set(index, PageHash::of(&page))
        })
    }

    /// All have come.
    ///
    /// # Errors
    /// If they have not.
    pub fn finish(self) -> Result<(), Error> {
        self.decoder.finish()
    }
}

#[cfg(test)]
mod tests;
