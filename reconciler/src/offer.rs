//! What the source says first: which pages differ from the common base, and how the target
//! finds each distinct content among them: by a place in an image that both hold, by a
//! short hash ([`crate::Known`] says which, [`crate::short_bits`] how short), or, if it is very likely
//! where the twin has it, by check symbols over the hashes of all of these ([`crate::parity`]).

use crate::by_hash::PageMap;
use crate::error::{Error, within};
use crate::known::{
    Hint, Known, MAX_SHARED_LEN, Shared, decode_hints, decode_shared, encode_hints, encode_shared,
};
use crate::page::{MAX_PAGES, PageHash, PageIndex};
use crate::page_set::PageSet;
use crate::parity::Parity;
use crate::short::{
    Bits, MAX_BITS, Salt, all_distinct, here_bits, pack_bits, short, short_bits, unpack_bits,
};
use crate::tree::{ImageTree, Root};
use crate::wire::{Cursor, put_section, put_varint, take_section};

const MAGIC: &[u8; 4] = b"RMof";
const VERSION: u64 = 3;
const WHAT: &str = "offer";
/// Of fewer likely contents each is named by a hash: check symbols would not take less, and were
/// there too many errors for them nothing would be looked for [again](crate::Seek).
const LEAST_LIKELY: u64 = OfferOptions::SEEK_FROM;

/// How the source builds an offer.
#[derive(Clone, Copy, Debug)]
pub struct OfferOptions {
    /// Fresh randomness.
    pub salt: Salt,
    /// How many pages that are not zero the target will search, as far as the source can tell;
    /// too low a number makes refetches likelier.
    pub candidates: u64,
    /// Bits of a short, instead of what the budget asks for.
    pub force_bits: Option<u32>,
    /// From so many contents on that the target should have and doesn't find, it is asked to look
    /// for them again, see [`crate::Seek`].
    pub seek_from: u64,
}

impl OfferOptions {
    /// They are some 25 kB, which is worth a round trip on any line that is thin.
    pub const SEEK_FROM: u64 = 64;
}

/// Names the pages of the new image that differ from the base, and their contents.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offer {
    pages: u64,
    base: Root,
    root: Root,
    salt: Salt,
    bits: Bits,
    shared: Vec<Shared>,
    zeros: PageSet,
    changed: PageSet,
    /// For each page of `changed`, in order, which content it has.
    contents: Vec<u32>,
    /// For each content, in order of first appearance, how to find it.
    hints: Vec<Hint>,
    /// And by which short; 0 where it takes none.
    shorts: Vec<u64>,
    /// Over the shorts of likely contents, in their order.
    parity: Parity,
    /// Known to the source alone.
    expected: Expected,
}

/// What a target that replayed as the twin did has at its own address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Expected {
    /// The lowest pages of such contents.
    pages: PageSet,
    /// How many pages it would have to search for what is not there.
    candidates: u64,
    /// See [`OfferOptions::seek_from`].
    seek_from: u64,
    /// See [`OfferOptions::force_bits`].
    forced: Option<u32>,
}

impl Offer {
    /// Compares the new image with the base. `base` is the tree of the generation that both
    /// sites hold, or [`ImageTree::zero`] when there is none.
    pub fn new(new: &ImageTree, base: &ImageTree, options: &OfferOptions) -> Result<Self, Error> {
        Self::knowing(new, base, &Known::default(), options)
    }

    /// The same, in fewer bytes by what is known of the target.
    pub fn knowing(
        new: &ImageTree,
        base: &ImageTree,
        known: &Known<'_>,
        options: &OfferOptions,
    ) -> Result<Self, Error> {
        let differing = new.differing(base);
        let (mut zeros, mut changed) = (PageSet::new(), PageSet::new());
        let mut contents = Vec::new();
        let mut distinct: Vec<(PageHash, PageIndex)> = Vec::new();
        let mut ordinals: PageMap<u32> = PageMap::default();
        for index in differing.iter() {
            let leaf = new.leaf(index);
            if leaf.is_zero() {
                zeros.push(index);
                continue;
            }
            changed.push(index);
            contents.push(*ordinals.entry(leaf).or_insert_with(|| {
                distinct.push((leaf, index));
                // Below 2^30, as the number of pages is.
                distinct.len() as u32 - 1
            }));
        }
        let mut hints = known.hints(&distinct);
        let forced = options.force_bits.map(|bits| bits.clamp(1, MAX_BITS));
        let is_likely = |hint: &Hint| *hint == Hint::Likely;
        let named = distinct.iter().zip(&hints);
        let likely = named.filter(|(_, hint)| is_likely(hint));
        let likely: PageSet = likely.map(|((_, first), _)| *first).collect();
        if forced.is_some() || likely.len() < options.seek_from.max(LEAST_LIKELY) {
            for hint in hints.iter_mut().filter(|hint| is_likely(hint)) {
                *hint = Hint::Here;
            }
        }
        let shared = known.shared();
        let with = |wanted: Hint| hints.iter().filter(|hint| **hint == wanted).count() as u64;
        // Where the base need not be searched, what the target's replay has changed is what is
        // left; that is about as much as changed here.
        let candidates = if shared.iter().any(|image| image.root == base.root()) {
            options.candidates.min(2 * differing.len())
        } else {
            options.candidates
        };
        let expected = Expected {
            pages: likely,
            candidates,
            seek_from: options.seek_from,
            forced,
        };
        let mut bits = Bits {
            anywhere: forced.unwrap_or_else(|| short_bits(with(Hint::Anywhere), candidates)),
            here: forced.unwrap_or_else(|| here_bits(with(Hint::Here))),
        };
        let shorts = loop {
            let named = distinct.iter().zip(&hints);
            let shorts: Vec<u64> = named
                .clone()
                .map(|((hash, _), hint)| short(&options.salt, bits.of(*hint), hash))
                .collect();
            let anywhere = named.zip(&shorts);
            let anywhere = anywhere.filter(|((_, hint), _)| **hint == Hint::Anywhere);
            let unlike = all_distinct(anywhere.map(|(_, short)| *short).collect());
            if forced.is_some() || bits.anywhere == MAX_BITS || unlike {
                break shorts;
            }
            bits.anywhere = (bits.anywhere + 8).min(MAX_BITS);
        };
        let likely = distinct.iter().zip(&hints);
        let likely = likely.filter(|(_, hint)| is_likely(hint));
        let checked: Vec<u16> = likely
            .map(|((hash, _), _)| checked(&options.salt, hash))
            .collect();
        Ok(Self {
            pages: new.pages(),
            base: base.root(),
            root: new.root(),
            salt: options.salt,
            bits,
            shared,
            zeros,
            changed,
            contents,
            hints,
            shorts,
            parity: Parity::of(&checked),
            expected,
        })
    }

    /// How many pages the new image has.
    pub const fn pages(&self) -> u64 {
        self.pages
    }
    /// The root of the base that the offer counts from.
    pub const fn base(&self) -> Root {
        self.base
    }
    /// The root of the new image.
    pub const fn root(&self) -> Root {
        self.root
    }
    /// Pages that are zero now and were not in the base.
    pub const fn zeros(&self) -> &PageSet {
        &self.zeros
    }
    /// Pages that differ from the base and are not zero.
    pub const fn changed(&self) -> &PageSet {
        &self.changed
    }
    /// How many distinct contents the changed pages have.
    pub fn distinct(&self) -> u64 {
        self.shorts.len() as u64
    }
    /// Bits of each short hash of a content that may lie anywhere.
    pub const fn bits(&self) -> u32 {
        self.bits.anywhere
    }

    pub(crate) const fn salt(&self) -> Salt {
        self.salt
    }
    pub(crate) const fn expected(&self) -> &PageSet {
        &self.expected.pages
    }
    pub(crate) const fn seek_from(&self) -> u64 {
        self.expected.seek_from
    }
    /// Bits of a short for so many of them.
    pub(crate) fn seek_bits(&self, contents: u64) -> u32 {
        let bits = || short_bits(contents, self.expected.candidates);
        self.expected.forced.unwrap_or_else(bits)
    }
    pub(crate) fn shorts(&self) -> &[u64] {
        &self.shorts
    }
    pub(crate) fn hints(&self) -> &[Hint] {
        &self.hints
    }
    pub(crate) fn shared(&self) -> &[Shared] {
        &self.shared
    }
    /// For each likely content the short that it has, given the hash of what lies at its own
    /// address; `None` where that can't be told.
    pub(crate) fn likely_shorts(
        &self,
        first_pages: &[PageIndex],
        lies_at: impl Fn(PageIndex) -> PageHash,
    ) -> Vec<(usize, Option<u16>)> {
        let ordinals = (0..self.hints.len()).filter(|at| self.hints[*at] == Hint::Likely);
        let ordinals: Vec<usize> = ordinals.collect();
        let pages = ordinals.iter().map(|at| first_pages[*at]);
        let own: Vec<u16> = pages.map(|page| self.checked(&lies_at(page))).collect();
        let right = self.parity.correct(&own);
        ordinals.into_iter().zip(right).collect()
    }
    /// The short of a likely content.
    pub(crate) fn checked(&self, hash: &PageHash) -> u16 {
        checked(&self.salt, hash)
    }
    /// The contents that the target lacks if its replay did as the twin.
    pub(crate) fn unlikely(&self) -> PageSet {
        let hints = (0..).map(PageIndex).zip(&self.hints);
        let unlikely = hints.filter(|(_, hint)| matches!(hint, Hint::Here | Hint::Lacking));
        unlikely.map(|(content, _)| content).collect()
    }
    /// The short of a page that is compared with contents that may lie anywhere.
    pub(crate) fn short_of(&self, hash: &PageHash) -> u64 {
        short(&self.salt, self.bits.anywhere, hash)
    }
    /// How many bits the short of a content has.
    pub(crate) fn bits_of(&self, content: u32) -> u32 {
        self.bits.of(self.hints[content as usize])
    }
    /// The short of a page that is compared with one content.
    pub(crate) fn short_as(&self, content: u32, hash: &PageHash) -> u64 {
        short(&self.salt, self.bits_of(content), hash)
    }

    /// The changed pages with the content each has, ascending by page.
    pub(crate) fn changed_contents(&self) -> impl Iterator<Item = (PageIndex, u32)> + '_ {
        self.changed.iter().zip(self.contents.iter().copied())
    }

    /// For each content, the lowest page that has it.
    pub(crate) fn first_pages(&self) -> Vec<PageIndex> {
        let mut first = Vec::with_capacity(self.shorts.len());
        for (index, content) in self.changed_contents() {
            if content as usize == first.len() {
                first.push(index);
            }
        }
        first
    }

    /// The offer as bytes; send them with [`crate::blob_parts`].
    pub fn encode(&self) -> Result<Vec<u8>, Error> {
        let mut out = MAGIC.to_vec();
        put_varint(&mut out, VERSION);
        put_varint(&mut out, self.pages);
        out.extend_from_slice(&self.base.0);
        out.extend_from_slice(&self.root.0);
        out.extend_from_slice(&self.salt.0);
        out.push(self.bits.anywhere as u8);
        out.push(self.bits.here as u8);
        encode_shared(&self.shared, &mut out);
        let mut index = Vec::new();
        self.zeros.encode_into(&mut index);
        self.changed.encode_into(&mut index);
        self.encode_repeats(&mut index);
        put_section(&mut out, &index)?;
        put_varint(&mut out, self.distinct());
        let mut hints = Vec::new();
        encode_hints(&self.hints, &mut hints);
        put_section(&mut out, &hints)?;
        let hints = self.hints.iter();
        let bits = hints.map(|hint| self.bits.of(*hint));
        pack_bits(&mut out, self.shorts.iter().copied().zip(bits));
        self.parity.encode_into(&mut out);
        Ok(out)
    }

    /// Which positions repeat an earlier content, and which: as the step from the one after
    /// the last repeated, so that a copied stretch is a row of zeros.
    fn encode_repeats(&self, out: &mut Vec<u8>) {
        let mut repeats = PageSet::new();
        let mut fresh = 0;
        for (position, &content) in self.contents.iter().enumerate() {
            if content == fresh {
                fresh += 1;
            } else {
                repeats.push(PageIndex(position as u64));
            }
        }
        repeats.encode_into(out);
        let mut expected = 0i64;
        for position in repeats.iter() {
            let content = i64::from(self.contents[position.0 as usize]);
            let step = content - expected;
            put_varint(out, ((step << 1) ^ (step >> 63)) as u64);
            expected = content + 1;
        }
    }

    /// The most bytes an offer about `max_pages` pages takes, for [`crate::BlobAssembler`].
    pub const fn max_encoded_len(max_pages: u64) -> u64 {
        256 + MAX_SHARED_LEN
            + index_limit(max_pages)
            + hints_limit(max_pages)
            + max_pages.saturating_mul(8)
            + Parity::max_encoded_len(max_pages)
    }

    /// Reads an offer about an image of at most `max_pages` pages.
    pub fn decode(bytes: &[u8], max_pages: u64) -> Result<Self, Error> {
        let mut cursor = Cursor::new(WHAT, bytes);
        if &cursor.array()? != MAGIC {
            return Err(cursor.malformed("it does not begin as one"));
        }
        if cursor.varint()? != VERSION {
            return Err(cursor.malformed("it is of an unknown version"));
        }
        let pages = cursor.varint()?;
        within(
            "the size of an image in pages",
            pages,
            max_pages.min(MAX_PAGES),
        )?;
        let (base, root) = (Root(cursor.array()?), Root(cursor.array()?));
        let salt = Salt(cursor.array()?);
        let [anywhere, here] = cursor.array()?.map(u32::from);
        if [anywhere, here]
            .iter()
            .any(|bits| !(1..=MAX_BITS).contains(bits))
        {
            return Err(cursor.malformed("short hashes of no possible length"));
        }
        let bits = Bits { anywhere, here };
        let shared = decode_shared(&mut cursor)?;
        let index = take_section(&mut cursor, index_limit(pages))?;
        let mut sets = Cursor::new(WHAT, &index);
        let zeros = PageSet::decode_from(&mut sets, pages)?;
        let changed = PageSet::decode_from(&mut sets, pages)?;
        if zeros.difference(&changed).len() != zeros.len() {
            return Err(cursor.malformed("a page is both zero and not"));
        }
        let distinct = cursor.varint()?;
        within("the number of contents", distinct, changed.len())?;
        let coded = take_section(&mut cursor, hints_limit(pages))?;
        let mut coded = Cursor::new(WHAT, &coded);
        let hints = decode_hints(&mut coded, distinct, &shared)?;
        coded.end()?;
        let lengths = hints.iter().map(|hint| bits.of(*hint));
        let shorts = unpack_bits(&mut cursor, lengths)?;
        let likely = hints.iter().filter(|hint| **hint == Hint::Likely).count();
        let parity = Parity::decode(&mut cursor, likely as u64)?;
        cursor.end()?;
        let contents = decode_repeats(&mut sets, changed.len(), distinct)?;
        sets.end()?;
        Ok(Self {
            pages,
            base,
            root,
            salt,
            bits,
            shared,
            zeros,
            changed,
            contents,
            hints,
            shorts,
            parity,
            expected: Expected::default(),
        })
    }
}

/// What check symbols are taken of.
fn checked(salt: &Salt, hash: &PageHash) -> u16 {
    // So many bits are asked for.
    short(salt, u16::BITS, hash) as u16
}

/// Two sets, repeats and their references, all at their longest.
const fn index_limit(pages: u64) -> u64 {
    64 + pages.saturating_mul(24)
}

/// Four sets of contents, and two numbers for each of them at most.
const fn hints_limit(pages: u64) -> u64 {
    64 + pages.saturating_mul(48)
}

fn decode_repeats(cursor: &mut Cursor<'_>, len: u64, distinct: u64) -> Result<Vec<u32>, Error> {
    let repeats = PageSet::decode_from(cursor, len)?;
    if len - repeats.len() != distinct {
        return Err(cursor.malformed("the number of contents does not fit the pages"));
    }
    // Each repeat takes a byte of its own.
    within(
        "the number of repeated pages",
        repeats.len(),
        cursor.remaining() as u64,
    )?;
    let mut contents = Vec::with_capacity(len as usize);
    let (mut fresh, mut expected) = (0u32, 0i64);
    let mut next = 0;
    for run in repeats
        .runs()
        .iter()
        .cloned()
        .chain(std::iter::once(len..len))
    {
        while next < run.start {
            contents.push(fresh);
            fresh += 1;
            next += 1;
        }
        for _ in run {
            let coded = cursor.varint()?;
            let step = (coded >> 1).cast_signed() ^ -(coded & 1).cast_signed();
            let content = expected
                .checked_add(step)
                .and_then(|content| u32::try_from(content).ok());
            let Some(content) = content.filter(|&content| content < fresh) else {
                return Err(cursor.malformed("a page repeats one that did not come before"));
            };
            contents.push(content);
            expected = i64::from(content) + 1;
            next += 1;
        }
    }
    Ok(contents)
}

#[cfg(test)]
mod tests;
