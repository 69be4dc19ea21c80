//! The target's end: the new image grows in place over the replayed one.
//!
//! [`Applier::new`] does all that needs nothing from the source: it sets aside pages that are
//! both copied from and overwritten, puts back what only replay changed, writes zeros and
//! copies. Then pages are written as their chunks arrive. What comes out is [`Applied`], which
//! nobody may run: only comparing the root makes it [`crate::Verified`].
//!
//! A patch is laid over the page that the image holds at the lowest address of its content.
//! That page is as it was before: zeros, copies and pages put back go only to pages that
//! nothing was asked for, and each page asked for is written once in a round. Where the result has not the
//! short hash that the offer names, it stays as a guess, and the page is asked for again: first
//! with hashes of the guess's lines, so that those which differ are laid over it, then whole.

use std::fmt;
use std::path::PathBuf;

use rayon::prelude::*;

use crate::error::Error;
use crate::lines::Unpatched;
use crate::offer::Offer;
use crate::page::{Image, PAGE_SIZE, Page, PageHash, PageIndex, ReadPages, ZERO_PAGE};
use crate::page_set::PageSet;
use crate::patch::{Mask, xor};
use crate::relative::Mappings;
use crate::resolve::{Holdings, Origin, PlaceKind, Resolution, Short};
use crate::short::{Salt, short};
use crate::spool::Spool;
use crate::stats::PageCounts;
use crate::stream::{Coded, PageChunk, PageDecoder};
use crate::tree::Root;
use crate::verify::Applied;

/// Pages that are read at once before they are copied: 4 MiB.
const COPIED_AT_ONCE: usize = 1024;
/// Runs of them that are worth another thread.
const RUNS_AT_ONCE: usize = 16;

/// How much the target may hold, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApplyOptions {
    /// Bytes of pages set aside in memory; more go to a temporary file.
    pub spool_memory: usize,
    /// The folder of that file, which has no name there. Who has images encrypted wants their
    /// pages to lie in a folder that is, too.
    pub spool_dir: PathBuf,
}

impl Default for ApplyOptions {
    fn default() -> Self {
        Self {
            spool_memory: 64 << 20,
            spool_dir: std::env::temp_dir(),
        }
    }
}

/// Builds the new image.
pub struct Applier<'a> {
    image: &'a mut dyn Image,
    base: Option<&'a dyn ReadPages>,
    decoder: PageDecoder,
    wanted: Vec<Wanted>,
    /// The pages of `wanted` that this round brings, by their place in it, in order.
    round: Vec<u32>,
    /// Those of them whose patch did not fit.
    failed: Vec<u32>,
    /// How often pages were asked for again.
    retries: u32,
    salt: Salt,
    repeats: Vec<(u32, PageIndex)>,
    touched: Vec<u64>,
    counts: PageCounts,
    root: Root,
}

/// What is to be asked for after a round of pages.
#[derive(Debug)]
pub enum Retry {
    /// Nothing: the image is complete.
    Complete,
    /// These pages, as what differs from what is here: [`Unpatched::encode`].
    Lines(Unpatched),
    /// These pages, in whole: [`PageSet::encode`].
    Whole(PageSet),
}

/// A content that was asked for.
#[derive(Clone, Copy)]
struct Wanted {
    /// The lowest page that has it.
    first: PageIndex,
    /// Its short hash; without any bits there is no telling whether a patch fits.
    short: Short,
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
        options: &ApplyOptions,
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
        let spool = Spool::fill(
            image.reader(),
            &aside,
            options.spool_memory,
            &options.spool_dir,
        )?;
        let wanted: Vec<_> = resolution
            .wanted
            .iter()
            .zip(&resolution.shorts)
            .map(|(&first, &short)| Wanted { first, short })
            .collect();
        let mut applier = Self {
            image,
            base: holdings.base_reader,
            decoder: PageDecoder::new(wanted.len() as u64),
            round: (0..wanted.len() as u32).collect(),
            failed: Vec::new(),
            retries: 0,
            wanted,
            salt: offer.salt(),
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
        let mut buffer = vec![0; COPIED_AT_ONCE.min(copies.len()) * PAGE_SIZE];
        for batch in copies.chunks(COPIED_AT_ONCE) {
            let mut rest = &mut buffer[..];
            let mut runs = Vec::new();
            for run in batch.chunk_by(goes_on) {
                let (into, after) = rest.split_at_mut(run.len() * PAGE_SIZE);
                runs.push((run, into));
                rest = after;
            }
            let image = self.image.reader();
            runs.par_iter_mut()
                .with_min_len(RUNS_AT_ONCE)
                .try_for_each(|(run, into)| read_run(image, run[0].1, holdings, spool, into))?;
            for (run, pages) in runs {
                let (first, origin) = run[0];
                self.image
                    .write_many(first, pages)
                    .map_err(|source| Error::Write {
                        page: first,
                        source,
                    })?;
                let kind = match origin {
                    Origin::Current(_) => PlaceKind::Replayed,
                    Origin::Place(place, _) => holdings.places[place as usize].kind,
                };
                *self.counts.moved.entry(kind).or_default() += run.len() as u64;
            }
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
            round,
            failed,
            retries,
            salt,
            repeats,
            counts,
            ..
        } = self;
        decoder.push(chunk, &mut |position, coded, mappings| {
            // The decoder announces no position that was not asked for.
            let slot = round[position as usize];
            let Wanted { first, short } = wanted[slot as usize];
            let mut patched = ZERO_PAGE;
            let page = match coded {
                Coded::Literal(page) => {
                    mappings.undo(first, page);
                    counts.literal += 1;
                    &*page
                }
                Coded::Delta(page) => {
                    undelta(*base, first, mappings, page)?;
                    counts.delta += 1;
                    &*page
                }
                Coded::Patch(mask, words) => {
                    patch(image.reader(), first, &mask, words, mappings, &mut patched)?;
                    let fits =
                        short.bits > 0 && short_of(salt, short.bits, &patched) == short.value;
                    let count = match (*retries, fits) {
                        (0, true) => &mut counts.patched,
                        (0, false) => &mut counts.patch_failed,
                        (_, true) => &mut counts.lines,
                        (_, false) => &mut counts.lines_failed,
                    };
                    *count += 1;
                    if !fits {
                        failed.push(slot);
                        return write(*image, first, &patched);
                    }
                    &patched
                }
            };
            write(*image, first, page)?;
            let start = repeats.partition_point(|&(other, _)| other < slot);
            for &(other, index) in &repeats[start..] {
                if other != slot {
                    break;
                }
                write(*image, index, page)?;
                counts.repeated += 1;
            }
            Ok(())
        })
    }

    /// The pages whose patch did not fit so far, each the lowest that has its content.
    pub fn failed(&self) -> PageSet {
        let failed = self.failed.iter();
        failed
            .map(|&slot| self.wanted[slot as usize].first)
            .collect()
    }

    /// Ends a round of pages and begins the next, of those whose patch did not fit.
    ///
    /// The source sends them with [`crate::encode_pages`], ascending and without a twin. Fails
    /// when pages of this round are missing, and when not even pages asked for whole fit.
    pub fn retry(&mut self) -> Result<Retry, Error> {
        self.decoder.finish()?;
        // Slots ascend as the pages do; patches come in order, but nothing rests on that here.
        self.failed.sort_unstable();
        let pages = self.failed();
        let retry = match self.retries {
            _ if pages.is_empty() => Retry::Complete,
            0 => Retry::Lines(self.guesses(&pages)?),
            1 => Retry::Whole(pages),
            _ => {
                return Err(Error::Unpatched { pages: pages.len() });
            }
        };
        self.decoder = PageDecoder::new(self.failed.len() as u64);
        self.round = std::mem::take(&mut self.failed);
        self.retries += 1;
        Ok(retry)
    }

    /// What the image has of these pages.
    fn guesses(&self, pages: &PageSet) -> Result<Unpatched, Error> {
        let mut unpatched = Unpatched::new(self.salt);
        let mut page = ZERO_PAGE;
        for index in pages.iter() {
            let read = self.image.reader().read(index, &mut page);
            read.map_err(|source| Error::Read {
                image: "the image being built",
                page: index,
                source,
            })?;
            unpatched.push(index, &page);
        }
        Ok(unpatched)
    }

    /// Ends the image; fails when pages are missing, be it because their patches did not fit.
    pub fn finish(self) -> Result<Applied, Error> {
        self.decoder.finish()?;
        if !self.failed.is_empty() {
            return Err(Error::Unpatched {
                pages: self.failed.len() as u64,
            });
        }
        Ok(Applied {
            touched: PageSet::from_unsorted(self.touched),
            counts: self.counts,
            root: self.root,
            pages: self.image.pages(),
        })
    }
}

/// Whether a page to copy lies behind another in a place, and is to lie behind it.
fn goes_on(a: &(PageIndex, Origin), b: &(PageIndex, Origin)) -> bool {
    match (a.1, b.1) {
        (Origin::Place(p, from), Origin::Place(q, next)) => {
            p == q && next.0 == from.0 + 1 && b.0.0 == a.0.0 + 1
        }
        // Some of these are set aside, one by one.
        _ => false,
    }
}

/// Reads pages to copy that lie behind one another.
fn read_run(
    image: &dyn ReadPages,
    origin: Origin,
    holdings: &Holdings<'_>,
    spool: &Spool,
    into: &mut [u8],
) -> Result<(), Error> {
    match origin {
        Origin::Current(from) => {
            // It is one page.
            for page in into.as_chunks_mut::<PAGE_SIZE>().0 {
                if !spool.read(from, page)? {
                    image.read(from, page).map_err(|source| Error::Read {
                        image: "the replayed image",
                        page: from,
                        source,
                    })?;
                }
            }
            Ok(())
        }
        Origin::Place(place, from) => {
            let place = &holdings.places[place as usize];
            let read = place.reader.read_many(from, into);
            read.map_err(|source| Error::Read {
                image: "an image to copy from",
                page: from,
                source,
            })
        }
    }
}

fn short_of(salt: &Salt, bits: u32, page: &Page) -> u64 {
    short(salt, bits, &PageHash::of(page))
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

pub(crate) fn write(image: &mut dyn Image, index: PageIndex, page: &Page) -> Result<(), Error> {
    image.write(index, page).map_err(|source| Error::Write {
        page: index,
        source,
    })
}

fn undelta(
    base: Option<&dyn ReadPages>,
    index: PageIndex,
    mappings: Mappings,
    page: &mut Page,
) -> Result<(), Error> {
    let base = base.ok_or(Error::NoBase { pages: 1 })?;
    let mut old = ZERO_PAGE;
    base.read(index, &mut old).map_err(|source| Error::Read {
        image: "the base",
        page: index,
        source,
    })?;
    mappings.apply(index, &mut old);
    xor(page, &old);
    mappings.undo(index, page);
    Ok(())
}

/// Reads a page of the image being built and lays words over it.
fn patch(
    image: &dyn ReadPages,
    index: PageIndex,
    mask: &Mask,
    words: &[u8],
    mappings: Mappings,
    page: &mut Page,
) -> Result<(), Error> {
    image.read(index, page).map_err(|source| Error::Read {
        image: "the replayed image",
        page: index,
        source,
    })?;
    mappings.apply(index, page);
    mask.overlay(words, page);
    mappings.undo(index, page);
    Ok(())
}
