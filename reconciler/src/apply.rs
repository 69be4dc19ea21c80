//! The target's end: the new image grows in place over the replayed one.
//!
//! [`Applier::new`] does all that needs nothing from the source: it sets aside pages that are
//! both copied from and overwritten, puts back what only replay changed, writes zeros and
//! copies. Then pages are written as their chunks arrive. What comes out is [`Applied`], which
//! nobody may run: only comparing the root makes it [`Verified`].

use std::fmt;

use crate::encode::xor;
use crate::error::Error;
use crate::offer::Offer;
use crate::page::{Image, Page, PageIndex, ReadPages, ZERO_PAGE};
use crate::page_set::PageSet;
use crate::resolve::{Holdings, Origin, PlaceKind, Resolution};
use crate::spool::Spool;
use crate::stats::PageCounts;
use crate::stream::{PageChunk, PageDecoder, PageKind};
use crate::tree::{ImageTree, Progress, Root};

/// How much the target may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ApplyOptions {
    /// Bytes of pages set aside in memory; more go to a temporary file.
    pub spool_memory: usize,
}

impl Default for ApplyOptions {
    fn default() -> Self {
        Self {
            spool_memory: 64 << 20,
        }
    }
}

/// Builds the new image.
pub struct Applier<'a> {
    image: &'a mut dyn Image,
    base: Option<&'a dyn ReadPages>,
    decoder: PageDecoder,
    wanted: Vec<PageIndex>,
    repeats: Vec<(u32, PageIndex)>,
    touched: Vec<u64>,
    counts: PageCounts,
    root: Root,
}

impl<'a> Applier<'a> {
    /// Does everything that needs nothing more from the source.
    ///
    /// `image` holds what `holdings.current` says, is as long as the new image (grown with
    /// zeros or cut), and is none of `holdings.places`. Once this has returned the places may
    /// change; the base may not before [`Applier::finish`].
    pub fn new(
        offer: &Offer,
        resolution: Resolution,
        holdings: &Holdings<'a>,
        image: &'a mut dyn Image,
        options: ApplyOptions,
    ) -> Result<Self, Error> {
        if image.pages() != offer.pages() {
            return Err(Error::TooLarge {
                what: "the new image in pages",
                found: offer.pages(),
                limit: image.pages(),
            });
        }
        let touched = overwritten(&resolution);
        let overwritten = PageSet::from_unsorted(touched.clone());
        let aside = resolution
            .copies
            .iter()
            .filter_map(|&(_, origin)| match origin {
                Origin::Current(from) if overwritten.contains(from) => Some(from),
                _ => None,
            })
            .collect();
        let spool = Spool::fill(image.reader(), &aside, options.spool_memory)?;
        let mut applier = Self {
            image,
            base: holdings.base_reader,
            decoder: PageDecoder::new(resolution.wanted.len() as u64)?,
            wanted: resolution.wanted,
            repeats: resolution.repeats,
            touched,
            counts: PageCounts {
                zero: resolution.zero.len() + resolution.zero_kept,
                same: resolution.kept,
                reverted: resolution.zero_reverted.len() + resolution.revert.len(),
                ..PageCounts::default()
            },
            root: offer.root(),
        };
        for index in resolution
            .zero
            .iter()
            .chain(resolution.zero_reverted.iter())
        {
            applier
                .image
                .write_zero(index)
                .map_err(|source| Error::Write {
                    page: index,
                    source,
                })?;
        }
        applier.revert(&resolution.revert)?;
        applier.copy(&resolution.copies, holdings, &spool)?;
        Ok(applier)
    }

    fn revert(&mut self, pages: &PageSet) -> Result<(), Error> {
        let Some(base) = self.base else {
            return if pages.is_empty() {
                Ok(())
            } else {
                Err(Error::NoBase { pages: pages.len() })
            };
        };
        let mut page = ZERO_PAGE;
        for index in pages.iter() {
            base.read(index, &mut page).map_err(|source| Error::Read {
                image: "the base",
                page: index,
                source,
            })?;
            write(self.image, index, &page)?;
        }
        Ok(())
    }

    fn copy(
        &mut self,
        copies: &[(PageIndex, Origin)],
        holdings: &Holdings<'_>,
        spool: &Spool,
    ) -> Result<(), Error> {
        let mut page = ZERO_PAGE;
        for &(to, origin) in copies {
            let kind = match origin {
                Origin::Current(from) => {
                    if !spool.read(from, &mut page)? {
                        self.image
                            .read(from, &mut page)
                            .map_err(|source| Error::Read {
                                image: "the replayed image",
                                page: from,
                                source,
                            })?;
                    }
                    PlaceKind::Replayed
                }
                Origin::Place(place, from) => {
                    let place = &holdings.places[place as usize];
                    place
                        .reader
                        .read(from, &mut page)
                        .map_err(|source| Error::Read {
                            image: "an image to copy from",
                            page: from,
                            source,
                        })?;
                    place.kind
                }
            };
            write(self.image, to, &page)?;
            *self.counts.moved.entry(kind).or_default() += 1;
        }
        Ok(())
    }

    /// Takes the next chunk from the source and writes the pages that it completes.
    pub fn push(&mut self, chunk: &PageChunk) -> Result<(), Error> {
        let Self {
            image,
            base,
            decoder,
            wanted,
            repeats,
            counts,
            ..
        } = self;
        decoder.push(chunk, &mut |position, kind, page| {
            // The decoder announces no position that was not asked for.
            let first = wanted[position as usize];
            decode_page(*base, first, kind, page)?;
            match kind {
                PageKind::Literal => counts.literal += 1,
                PageKind::Delta => counts.delta += 1,
            }
            write(*image, first, page)?;
            let start = repeats.partition_point(|&(slot, _)| u64::from(slot) < position);
            for &(slot, index) in &repeats[start..] {
                if u64::from(slot) != position {
                    break;
                }
                write(*image, index, page)?;
                counts.repeated += 1;
            }
            Ok(())
        })
    }

    /// Ends the image; fails when pages are missing.
    pub fn finish(self) -> Result<Applied, Error> {
        self.decoder.finish()?;
        Ok(Applied {
            touched: PageSet::from_unsorted(self.touched),
            counts: self.counts,
            root: self.root,
            pages: self.image.pages(),
        })
    }
}

impl fmt::Debug for Applier<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Applier")
            .field("counts", &self.counts)
            .finish_non_exhaustive()
    }
}

fn overwritten(resolution: &Resolution) -> Vec<u64> {
    let sets = [
        &resolution.zero,
        &resolution.zero_reverted,
        &resolution.revert,
    ];
    sets.iter()
        .flat_map(|set| set.iter())
        .chain(resolution.copies.iter().map(|&(to, _)| to))
        .chain(resolution.wanted.iter().copied())
        .chain(resolution.repeats.iter().map(|&(_, index)| index))
        .map(|index| index.0)
        .collect()
}

fn write(image: &mut dyn Image, index: PageIndex, page: &Page) -> Result<(), Error> {
    image.write(index, page).map_err(|source| Error::Write {
        page: index,
        source,
    })
}

fn decode_page(
    base: Option<&dyn ReadPages>,
    index: PageIndex,
    kind: PageKind,
    page: &mut Page,
) -> Result<(), Error> {
    if kind == PageKind::Delta {
        let base = base.ok_or(Error::NoBase { pages: 1 })?;
        let mut old = ZERO_PAGE;
        base.read(index, &mut old).map_err(|source| Error::Read {
            image: "the base",
            page: index,
            source,
        })?;
        xor(page, &old);
    }
    Ok(())
}

/// A new image that nobody has compared with the source's yet.
#[derive(Clone, Debug)]
#[must_use]
pub struct Applied {
    touched: PageSet,
    counts: PageCounts,
    root: Root,
    pages: u64,
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
    /// [`Holdings::current`] was. For disks, whose other pages nobody can have changed.
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
    /// ascending and without a base.
    pub fn repair<'a>(
        self,
        image: &'a mut dyn Image,
        pages: &PageSet,
    ) -> Result<Repairer<'a>, Error> {
        Ok(Repairer {
            image,
            decoder: PageDecoder::new(pages.len())?,
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
        decoder.push(chunk, &mut |position, kind, page| {
            let index = pages[position as usize];
            decode_page(None, index, kind, page)?;
            write(*image, index, page)
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
