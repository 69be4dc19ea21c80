//! Whether the image that was built is the source's, and what becomes of it when it is not.

use std::fmt;

use crate::apply::write;
use crate::error::Error;
use crate::page::{Image, PageIndex, ReadPages};
use crate::page_set::PageSet;
use crate::stats::PageCounts;
use crate::stream::{Coded, PageChunk, PageDecoder};
use crate::tree::{ImageTree, Progress, Root};

/// A new image that nobody has compared with the source's yet.
#[derive(Clone, Debug)]
#[must_use]
pub struct Applied {
    pub(crate) touched: PageSet,
    pub(crate) counts: PageCounts,
    pub(crate) root: Root,
    /// How many the image has.
    pub(crate) pages: u64,
}

/// What comparing the root showed.
#[derive(Debug)]
pub enum Verification {
    /// The image is the source's, bit for bit.
    Verified(Verified),
    /// It is not; see [`Mismatch`].
    Mismatch(Mismatch),
}

impl Applied {
    /// The pages that were written.
    pub const fn touched(&self) -> &PageSet {
        &self.touched
    }

    /// Reads and hashes the whole image.
    pub fn verify(
        self,
        image: &dyn ReadPages,
        progress: Progress<'_>,
    ) -> Result<Verification, Error> {
        let tree = ImageTree::build(image, progress)?;
        Ok(self.compare(tree))
    }

    /// Reads and hashes the pages that were written; `before` is the tree that
    /// [`crate::Holdings::current`] was. For disks, whose other pages nobody can have changed.
    pub fn verify_touched(
        self,
        image: &dyn ReadPages,
        before: &ImageTree,
    ) -> Result<Verification, Error> {
        let mut tree = before.resized(self.pages)?;
        tree.rehash(image, &self.touched)?;
        Ok(self.compare(tree))
    }

    fn compare(self, tree: ImageTree) -> Verification {
        if tree.root() == self.root {
            Verification::Verified(Verified {
                tree,
                counts: self.counts,
            })
        } else {
            Verification::Mismatch(Mismatch {
                tree,
                applied: self,
            })
        }
    }
}

/// Proof that an image has the root that the source named.
#[derive(Debug)]
pub struct Verified {
    tree: ImageTree,
    counts: PageCounts,
}

impl Verified {
    /// The tree of the image, to keep with the generation.
    pub const fn tree(&self) -> &ImageTree {
        &self.tree
    }
    /// The root, equal to the source's.
    pub fn root(&self) -> Root {
        self.tree.root()
    }
    /// How the pages came about.
    pub const fn counts(&self) -> &PageCounts {
        &self.counts
    }
    /// The tree and the counts.
    pub fn into_parts(self) -> (ImageTree, PageCounts) {
        (self.tree, self.counts)
    }
}

/// An image that differs from the source's. [`crate::Descent`] finds where.
#[derive(Debug)]
pub struct Mismatch {
    tree: ImageTree,
    applied: Applied,
}

impl Mismatch {
    /// What the image holds.
    pub const fn tree(&self) -> &ImageTree {
        &self.tree
    }
    /// What it should hold.
    pub const fn expected(&self) -> Root {
        self.applied.root
    }

    /// Takes these pages from the source anew; it sends them with [`crate::encode_pages`],
    /// ascending and without references.
    pub fn repair<'a>(
        self,
        image: &'a mut dyn Image,
        pages: &PageSet,
    ) -> Result<Repairer<'a>, Error> {
        Ok(Repairer {
            image,
            decoder: PageDecoder::new(pages.len()),
            pages: pages.iter().collect(),
            mismatch: self,
        })
    }
}

/// Writes pages that are sent again.
pub struct Repairer<'a> {
    image: &'a mut dyn Image,
    decoder: PageDecoder,
    pages: Vec<PageIndex>,
    mismatch: Mismatch,
}

impl Repairer<'_> {
    /// Takes the next chunk.
    pub fn push(&mut self, chunk: &PageChunk) -> Result<(), Error> {
        let Self {
            image,
            decoder,
            pages,
            ..
        } = self;
        decoder.push(chunk, &mut |position, coded, mappings| match coded {
            Coded::Literal(page) => {
                let index = pages[position as usize];
                mappings.undo(index, page);
                write(*image, index, page)
            }
            Coded::Delta(_) | Coded::Patch(..) => Err(Error::malformed(
                "repair",
                "a page that is not told in full",
            )),
        })
    }

    /// Ends the repair; compare again with [`Applied::verify_touched`], against the tree that
    /// is returned, or with [`Applied::verify`].
    pub fn finish(self) -> Result<(Applied, ImageTree), Error> {
        self.decoder.finish()?;
        let Mismatch { tree, mut applied } = self.mismatch;
        applied.counts.refetched += self.pages.len() as u64;
        applied.touched = applied.touched.union(&self.pages.into_iter().collect());
        Ok((applied, tree))
    }
}

impl fmt::Debug for Repairer<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Repairer")
            .field("pages", &self.pages.len())
            .finish_non_exhaustive()
    }
}
