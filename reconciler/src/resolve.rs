//! Where the target finds what the source offers.
//!
//! Shorts of all offered contents go into one map; then all candidate pages stream past it,
//! first those of the image being built, then the other places in the caller's order. The
//! first hit wins, so that pages already in their place stay there. Two candidates with one
//! short but different contents make it worthless: that content is asked for.
//!
//! A content that the source says lies in a shared image is taken from there, and one that can
//! only lie at its own address is looked for nowhere else. Shared images are not searched: the
//! source has done so. Of the contents that are very likely at their own addresses check symbols tell
//! which are not, and their shorts: a patch is checked by these.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::hash::{BuildHasherDefault, Hasher};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::answer::encode_answer;
use crate::error::Error;
use crate::known::{Hint, locate};
use crate::offer::Offer;
use crate::page::{PageHash, PageIndex, ReadPages};
use crate::page_set::PageSet;
use crate::seek::Seek;
use crate::short::short;
use crate::tree::ImageTree;

/// What kind of image a page was found in; for the statistics alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PlaceKind {
    /// The image being built, before anything was written to it: the replayed (or stale) image.
    Replayed,
    /// The base generation's copy of the same image.
    Base,
    /// A disk of this VM.
    Disk,
    /// Any other image of this VM, as guest RAM is to a disk.
    OtherImage,
    /// Contents kept from elsewhere.
    Store,
}

/// An image that the target may copy pages from.
///
/// It must stay as its tree says until [`crate::Applier::new`] has returned.
#[derive(Clone, Copy)]
pub struct Place<'a> {
    /// For the statistics.
    pub kind: PlaceKind,
    /// Its hashes.
    pub tree: &'a ImageTree,
    /// Its content.
    pub reader: &'a dyn ReadPages,
}

/// What the target holds.
#[derive(Clone, Copy)]
pub struct Holdings<'a> {
    /// The tree of the generation both sites hold; [`ImageTree::zero`] without one.
    pub base: &'a ImageTree,
    /// The content of that generation, when at hand.
    pub base_reader: Option<&'a dyn ReadPages>,
    /// The tree of the image being built, as it is now: after replay, or the base's.
    pub current: &'a ImageTree,
    /// Other images, the cheapest to read first. The base is one only if it is listed.
    pub places: &'a [Place<'a>],
}

impl Holdings<'_> {
    /// How many pages will be searched; tell the source, for [`crate::OfferOptions`].
    pub fn candidates(&self) -> u64 {
        let places: u64 = self
            .places
            .iter()
            .map(|place| place.tree.content_pages())
            .sum();
        self.current.content_pages() + places
    }
}

/// Where a content was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    /// In the image being built, before it is changed.
    Current(PageIndex),
    /// In `Holdings::places`.
    Place(u32, PageIndex),
}

/// The short of a content.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Short {
    pub(crate) value: u64,
    /// Of so many bits; none if it is not known.
    pub(crate) bits: u32,
}

/// What becomes of each page.
#[derive(Clone, Debug)]
pub struct Resolution {
    /// To be written as zeros.
    pub(crate) zero: PageSet,
    /// Pages of the offer whose content is where it should be.
    pub(crate) kept: u64,
    /// Offered zero pages that are zero already.
    pub(crate) zero_kept: u64,
    /// Page to write and where its content is.
    pub(crate) copies: Vec<(PageIndex, Origin)>,
    /// Pages that replay changed, the source did not, and that were zero in the base.
    pub(crate) zero_reverted: PageSet,
    /// The same, for pages that were not zero in the base.
    pub(crate) revert: PageSet,
    /// Contents to ask for, ascending.
    pub(crate) lacking: PageSet,
    /// For each content asked for, in order, the lowest page that has it.
    pub(crate) wanted: Vec<PageIndex>,
    /// And what tells it, so that a patch can be checked.
    pub(crate) shorts: Vec<Short>,
    /// Other pages that have a content asked for, as (place in `wanted`, page), ascending.
    pub(crate) repeats: Vec<(u32, PageIndex)>,
}

impl Resolution {
    /// How many contents the source has to send.
    pub const fn lacking(&self) -> u64 {
        self.lacking.len()
    }

    /// The answer to the offer; send it with [`crate::blob_parts`].
    pub fn answer(&self, offer: &Offer) -> Result<Vec<u8>, Error> {
        encode_answer(&self.lacking, offer)
    }
}

/// Shorts are random already; spread them over all bits, which the map looks at.
#[derive(Default)]
struct Spread(u64);

impl Hasher for Spread {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u64(u64::from(byte));
        }
    }
    fn write_u64(&mut self, value: u64) {
        let mixed = (self.0 ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = mixed ^ (mixed >> 32);
    }
}

type ShortMap = HashMap<u64, u32, BuildHasherDefault<Spread>>;

#[derive(Clone, Copy)]
enum Found {
    Nothing,
    At(Origin, PageHash),
    Ambiguous,
}

/// Chunks searched at a time; bounds the memory that hits take to some 50 MB.
const BATCH_CHUNKS: usize = 4096;

/// Decides for every page of the new image where its content comes from.
pub fn resolve(offer: &Offer, holdings: &Holdings<'_>) -> Result<Resolution, Error> {
    resolve_again(offer, None, holdings)
}

/// The same with what the source has named since, see [`Seek`].
pub fn resolve_again(
    offer: &Offer,
    seek: Option<&Seek>,
    holdings: &Holdings<'_>,
) -> Result<Resolution, Error> {
    if offer.base() != holdings.base.root() {
        return Err(Error::WrongBase);
    }
    let (mut found, mut shorts) = search(offer, holdings)?;
    if let Some(seek) = seek {
        search_again(offer, seek, holdings, &mut found, &mut shorts)?;
    }
    let current = holdings.current;
    let mut out = Resolution {
        zero: offer
            .zeros()
            .iter()
            .filter(|&index| !current.leaf(index).is_zero())
            .collect(),
        kept: 0,
        zero_kept: 0,
        copies: Vec::new(),
        zero_reverted: PageSet::new(),
        revert: PageSet::new(),
        lacking: PageSet::new(),
        wanted: Vec::new(),
        shorts: Vec::new(),
        repeats: Vec::new(),
    };
    out.zero_kept = offer.zeros().len() - out.zero.len();

    let mut slot_of = vec![u32::MAX; found.len()];
    for (index, content) in offer.changed_contents() {
        match found[content as usize] {
            Found::At(_, hash) if current.leaf(index) == hash => out.kept += 1,
            Found::At(origin, _) => out.copies.push((index, origin)),
            Found::Nothing | Found::Ambiguous => {
                // Contents are numbered in order of first appearance, so both lists ascend.
                let slot = &mut slot_of[content as usize];
                if *slot == u32::MAX {
                    *slot = out.wanted.len() as u32;
                    out.wanted.push(index);
                    out.shorts.push(shorts[content as usize]);
                    out.lacking.push(PageIndex(u64::from(content)));
                } else {
                    out.repeats.push((*slot, index));
                }
            }
        }
    }
    out.repeats.sort_unstable();

    let offered = offer.zeros().union(offer.changed());
    let strayed = current
        .resized(offer.pages())?
        .differing(holdings.base)
        .difference(&offered);
    let (zero, revert): (Vec<_>, Vec<_>) = strayed
        .iter()
        .partition(|&index| holdings.base.leaf(index).is_zero());
    let (zero, revert) = (PageSet::from_iter(zero), PageSet::from_iter(revert));
    if holdings.base_reader.is_none() && !revert.is_empty() {
        return Err(Error::NoBase {
            pages: revert.len(),
        });
    }
    out.zero_reverted = zero;
    out.revert = revert;
    Ok(out)
}

/// Which of the places each shared image is.
fn shared_places(offer: &Offer, holdings: &Holdings<'_>) -> Result<Vec<usize>, Error> {
    let images = offer.shared().iter().map(|image| {
        let is_it = |place: &Place<'_>| {
            place.tree.pages() == image.pages && place.tree.root() == image.root
        };
        holdings.places.iter().position(is_it)
    });
    images.collect::<Option<_>>().ok_or(Error::NotShared)
}

/// Looks anywhere for contents that were to be at their own address and are not.
fn search_again(
    offer: &Offer,
    seek: &Seek,
    holdings: &Holdings<'_>,
    found: &mut [Found],
    shorts: &mut [Short],
) -> Result<(), Error> {
    let first_pages = offer.first_pages();
    let mut by_short = ShortMap::default();
    // Contents are numbered by their lowest pages.
    for (page, short) in seek.pages.iter().zip(&seek.shorts) {
        let Ok(content) = first_pages.binary_search(&page) else {
            return Err(Error::malformed("a seek", "it names what was not offered"));
        };
        if !matches!(found[content], Found::Nothing) {
            continue;
        }
        shorts[content] = Short {
            value: *short,
            bits: seek.bits,
        };
        match by_short.entry(*short) {
            Entry::Vacant(slot) => {
                slot.insert(content as u32);
            }
            Entry::Occupied(first) => {
                found[*first.get() as usize] = Found::Ambiguous;
                found[content] = Found::Ambiguous;
            }
        }
    }
    let shared = shared_places(offer, holdings)?;
    let short_of = |hash: &PageHash| short(&offer.salt(), seek.bits, hash);
    sweep(offer, holdings, &shared, &by_short, &short_of, found);
    Ok(())
}

/// For each content, where it is, and its short.
fn search(offer: &Offer, holdings: &Holdings<'_>) -> Result<(Vec<Found>, Vec<Short>), Error> {
    let shared = shared_places(offer, holdings)?;
    let mut found = vec![Found::Nothing; offer.shorts().len()];
    let mut by_short = ShortMap::default();
    let first_pages = offer.first_pages();
    let numbered = offer.shorts().iter().zip(0..);
    let mut shorts: Vec<Short> = numbered
        .map(|(&value, content)| Short {
            value,
            bits: offer.bits_of(content),
        })
        .collect();
    let current = |index| holdings.current.leaf(index);
    for (content, right) in offer.likely_shorts(&first_pages, current) {
        let Some(right) = right else {
            continue;
        };
        shorts[content] = Short {
            value: right.into(),
            bits: u16::BITS,
        };
        let index = first_pages[content];
        let hash = current(index);
        if !hash.is_zero() && offer.checked(&hash) == right {
            found[content] = Found::At(Origin::Current(index), hash);
        }
    }
    for (content, (&short, hint)) in offer.shorts().iter().zip(offer.hints()).enumerate() {
        match *hint {
            // The latter have been looked at.
            Hint::Lacking | Hint::Likely => {}
            Hint::Shared(place) => {
                // Decoding an offer checks that its places are in its images.
                let (at, index) = locate(offer.shared(), place).ok_or(Error::NotShared)?;
                let hash = holdings.places[shared[at]].tree.leaf(index);
                found[content] = Found::At(Origin::Place(shared[at] as u32, index), hash);
            }
            Hint::Here => {
                let index = first_pages[content];
                let hash = holdings.current.leaf(index);
                if !hash.is_zero() && offer.short_as(content as u32, &hash) == short {
                    found[content] = Found::At(Origin::Current(index), hash);
                }
            }
            Hint::Anywhere => match by_short.entry(short) {
                Entry::Vacant(slot) => {
                    slot.insert(content as u32);
                }
                // Nobody can tell these two contents apart.
                Entry::Occupied(first) => {
                    found[*first.get() as usize] = Found::Ambiguous;
                    found[content] = Found::Ambiguous;
                }
            },
        }
    }
    let short_of = |hash: &PageHash| offer.short_of(hash);
    sweep(offer, holdings, &shared, &by_short, &short_of, &mut found);
    Ok((found, shorts))
}

/// Looks for contents in all that the target has, but for what is shared.
fn sweep(
    offer: &Offer,
    holdings: &Holdings<'_>,
    shared: &[usize],
    by_short: &ShortMap,
    short_of: &(dyn Fn(&PageHash) -> u64 + Sync),
    found: &mut [Found],
) {
    if by_short.is_empty() {
        return;
    }
    let is_shared = |place: Option<u32>| place.is_some_and(|at| shared.contains(&(at as usize)));
    let base_is_shared = offer
        .shared()
        .iter()
        .any(|image| image.root == offer.base());
    let current = std::iter::once((None, holdings.current));
    let places = holdings.places.iter().enumerate();
    for (place, tree) in current.chain(places.map(|(i, place)| (Some(i as u32), place.tree))) {
        if is_shared(place) {
            continue;
        }
        let unchanged = |(index, hash): &(PageIndex, PageHash)| {
            base_is_shared && place.is_none() && holdings.base.leaf(*index) == *hash
        };
        let chunks = tree.chunks().len();
        // Pages past the end of the new image are gone before they could be copied.
        let end = if place.is_none() {
            offer.pages()
        } else {
            u64::MAX
        };
        for first in (0..chunks).step_by(BATCH_CHUNKS) {
            let hits: Vec<_> = tree
                .content(first..chunks.min(first + BATCH_CHUNKS))
                .filter(|(index, _)| index.0 < end)
                .filter(|page| !unchanged(page))
                .filter_map(|(index, hash)| {
                    by_short
                        .get(&short_of(&hash))
                        .map(|&content| (content, index, hash))
                })
                .collect();
            for (content, index, hash) in hits {
                let origin = place.map_or(Origin::Current(index), |i| Origin::Place(i, index));
                let found = &mut found[content as usize];
                match *found {
                    Found::Nothing => *found = Found::At(origin, hash),
                    Found::At(_, first) if first != hash => *found = Found::Ambiguous,
                    Found::At(..) | Found::Ambiguous => {}
                }
            }
        }
    }
}
