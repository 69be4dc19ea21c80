//! What each kind of RAM page costs, as [`introspection::kinds`] names them.
//!
//! Bytes have no kind by themselves: the pages of all kinds share a reconciliation's streams, and
//! a match in one of them may reach back to a page of another kind. So each kind's pages are
//! encoded once more, alone, in their order, against the same references and in the same rounds
//! as when they were sent. Pages by recipe are exact, for how a page is told depends on nothing
//! but that page and its references. Bytes are those of a kind that would have the line to
//! itself. Their sum is not quite what all took together: more where kinds lend each other
//! matches, less where pages stand closer to their like. It was within 1 % in the sessions
//! measured; both are given, the latter as the row [`TOGETHER`].
//!
//! What is said of all pages at once belongs to no kind and is in neither: hashes, the answer,
//! the layout, asking again, repairs.
//!
//! Promised: no kinds for a guest that [`introspection::kinds`] does not understand.

use std::collections::HashSet;
use std::io::{self, Write};

use introspection::kinds::{ByKind, Kind};
use reconciler::{
    EncodeOptions, EncodeStats, ImageTree, Message, Offer, PAGE_SIZE, PageHash, PageIndex, PageSet,
    References, Source, Stats, Unpatched, encode_pages,
};
use serde::Serialize;

use crate::error::{Error, Result};
use crate::report::{Strategy, name_of};
use crate::states::State;

/// The kind of the row for all pages.
pub const TOGETHER: &str = "together";
/// Of the plain way that others are held against.
const PLAIN_LEVEL: i32 = 3;

/// What one kind of page costs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct KindRow {
    /// As [`Kind`] is written; or [`TOGETHER`], for all pages as they travel in one.
    pub kind: String,
    /// So many are of that kind at the source.
    pub pages: u64,
    /// So many of them differ from the base's page at the same place.
    pub changed: u64,
    /// Those end to end, in zstd at level 3.
    pub changed_zstd_bytes: u64,
    /// What they take by each strategy and codec that was measured with a base.
    pub ways: Vec<KindWay>,
}

/// What one kind of page costs one way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct KindWay {
    /// Which way.
    pub strategy: Strategy,
    /// As [`name_of`] writes it.
    pub codec: String,
    /// Changed pages by recipe.
    pub pages: KindPages,
    /// Those that are sent, compressed, with what tells which is which.
    pub bytes: u64,
}

/// Changed pages of one kind by recipe, as [`reconciler::PageCounts`] has them for all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct KindPages {
    /// Became zero since the base.
    pub zero: u64,
    /// Replayed as the source has them.
    pub same: u64,
    /// Found in another place at the target, or sent once for several places.
    pub elsewhere: u64,
    /// Sent as they are.
    pub literal: u64,
    /// Sent as what differs from the base.
    pub delta: u64,
    /// Sent as words over a replayed page.
    pub patched: u64,
    /// Of patches that did not fit: those mended by lines.
    pub lines: u64,
}

/// The messages of a reconciliation that say which pages have to be sent.
#[derive(Default)]
pub(crate) struct Asked {
    offer: Vec<u8>,
    answer: Vec<u8>,
    /// For lines, then for whole pages.
    retries: Vec<Vec<u8>>,
}

impl Asked {
    pub(crate) fn hear(&mut self, message: &Message<'_>) {
        if let Message::Offer(bytes) = message {
            self.offer.clone_from(bytes);
        } else if let Message::Answer(bytes) = message {
            // The last one counts.
            self.answer.clone_from(bytes);
        } else if let Message::Retry(bytes) = message {
            self.retries.push((*bytes).clone());
        }
    }
}

/// A reconciliation that has been done.
pub(crate) struct Done<'a> {
    pub(crate) strategy: Strategy,
    pub(crate) options: EncodeOptions,
    pub(crate) source: Source<'a>,
    /// What the target had in the image's place.
    pub(crate) current: &'a ImageTree,
    pub(crate) asked: Asked,
    pub(crate) stats: &'a Stats,
}

/// The kinds of a source's pages, and what is known of each by now.
pub(crate) struct Kinds {
    of_pages: Vec<Kind>,
    changed: PageSet,
    /// One for each of [`Kind::ALL`].
    rows: Vec<KindRow>,
    together: KindRow,
}

impl Kinds {
    /// Of the source's pages these are the `kinds`, in the order of the file.
    pub(crate) fn new(kinds: Vec<Kind>, source: &State, base: &State) -> Result<Self> {
        let changed = source.ram_tree.differing(&base.ram_tree);
        let mut every = Frame::new()?;
        let mut frames = Vec::with_capacity(Kind::ALL.len());
        for _ in Kind::ALL {
            frames.push(Frame::new()?);
        }
        for index in changed.iter() {
            let page = page_of(&source.ram, index);
            every.push(page)?;
            frames[kind_of(&kinds, index) as usize].push(page)?;
        }
        let row = |kind: String, frame: Frame| {
            Ok(KindRow {
                kind,
                pages: 0,
                changed: frame.pages,
                changed_zstd_bytes: frame.finish()?,
                ways: Vec::new(),
            })
        };
        let named = Kind::ALL.into_iter().zip(frames);
        let mut rows = named
            .map(|(kind, frame)| row(kind.to_string(), frame))
            .collect::<Result<Vec<_>>>()?;
        let mut together = row(TOGETHER.to_owned(), every)?;
        for kind in &kinds {
            rows[*kind as usize].pages += 1;
            together.pages += 1;
        }
        Ok(Self {
            of_pages: kinds,
            changed,
            rows,
            together,
        })
    }

    /// One more way, of which RAM was reconciled so.
    pub(crate) fn add(&mut self, done: &Done<'_>) -> Result<()> {
        let failed = |source| Error::Reconcile {
            strategy: done.strategy.name(),
            image: "ram by kind".to_owned(),
            source,
        };
        let (stats, source) = (done.stats, &done.source);
        let rounds = Rounds::of(&done.asked, source, stats).map_err(failed)?;
        let found = self.found(done, &rounds.first);
        let of_all = [&stats.encoded, &stats.resent, &stats.whole].map(|encoded| *encoded);
        let mut all = KindPages::default();
        for (kind, pages) in found.iter() {
            let mut encoded = [EncodeStats::default(); 3];
            for (encoded, (references, asked)) in encoded.iter_mut().zip(rounds.each(source)) {
                let asked = asked.iter().copied();
                let own: Vec<PageIndex> = asked
                    .filter(|index| kind_of(&self.of_pages, *index) == kind)
                    .collect();
                let (image, how) = (source.image, done.options);
                *encoded =
                    encode_pages(image, references, &own, how, &mut |_| Ok(())).map_err(failed)?;
            }
            self.rows[kind as usize]
                .ways
                .push(way(done, *pages, &encoded));
            all.zero += pages.zero;
            all.same += pages.same;
            all.elsewhere += pages.elsewhere;
        }
        self.together.ways.push(way(done, all, &of_all));
        Ok(())
    }

    /// The changed pages that need not be sent.
    fn found(&self, done: &Done<'_>, sent: &[PageIndex]) -> ByKind<KindPages> {
        let tree = done.source.tree;
        let contents: HashSet<PageHash> = sent.iter().map(|index| tree.leaf(*index)).collect();
        let sent = PageSet::from_unsorted(sent.iter().map(|index| index.0).collect());
        let mut found: ByKind<KindPages> = ByKind::default();
        for index in self.changed.difference(&sent).iter() {
            let pages = &mut found[kind_of(&self.of_pages, index)];
            let leaf = tree.leaf(index);
            // What is sent for one page is not looked for in the place of another.
            let arrives = contents.contains(&leaf);
            *if leaf.is_zero() {
                &mut pages.zero
            } else if leaf == done.current.leaf(index) && !arrives {
                &mut pages.same
            } else {
                &mut pages.elsewhere
            } += 1;
        }
        found
    }

    /// In the order of [`Kind::ALL`], all together last.
    pub(crate) fn into_rows(mut self) -> Vec<KindRow> {
        self.rows.push(self.together);
        self.rows
    }
}

/// What the rounds of sending made of pages, besides those that were found.
fn way(done: &Done<'_>, found: KindPages, rounds: &[EncodeStats; 3]) -> KindWay {
    let sum = |of: fn(&EncodeStats) -> u64| rounds.iter().map(of).sum::<u64>();
    let [first, second, third] = rounds;
    let sent = |round: &EncodeStats| {
        round.literal_pages + round.delta_pages + round.patch_pages + round.line_pages
    };
    KindWay {
        strategy: done.strategy,
        codec: name_of(done.options.codec),
        pages: KindPages {
            literal: sum(|round| round.literal_pages),
            delta: sum(|round| round.delta_pages),
            // What did not fit was sent again.
            patched: first.patch_pages.saturating_sub(sent(second)),
            lines: second.line_pages.saturating_sub(sent(third)),
            ..found
        },
        bytes: sum(EncodeStats::bytes),
    }
}

/// Which pages were sent when, in that order.
struct Rounds {
    first: Vec<PageIndex>,
    /// Those whose patch did not fit, with what the target had in their place.
    lines: Option<Unpatched>,
    whole: Vec<PageIndex>,
}

impl Rounds {
    fn of(
        asked: &Asked,
        source: &Source<'_>,
        stats: &Stats,
    ) -> std::result::Result<Self, reconciler::Error> {
        let total = source.tree.pages();
        let offer = Offer::decode(&asked.offer, total)?;
        let mut retries = asked.retries.iter();
        let most = stats.encoded.patch_pages;
        let lines = retries
            .next()
            .map(|bytes| Unpatched::decode(bytes, &offer, most))
            .transpose()?;
        let whole = retries
            .next()
            .map(|bytes| PageSet::decode(bytes, total))
            .transpose()?;
        Ok(Self {
            first: offer.decode_answer(&asked.answer)?,
            lines,
            whole: whole.iter().flat_map(PageSet::iter).collect(),
        })
    }

    fn each<'a>(&'a self, source: &Source<'a>) -> [(References<'a>, &'a [PageIndex]); 3] {
        let alone = References::base(source.base_reader);
        let (twin, unpatched) = (source.twin, self.lines.as_ref());
        [
            (References { twin, ..alone }, &self.first),
            (
                References { unpatched, ..alone },
                unpatched.map_or(&[], Unpatched::pages),
            ),
            (alone, &self.whole),
        ]
    }
}

fn kind_of(kinds: &[Kind], index: PageIndex) -> Kind {
    usize::try_from(index.0)
        .ok()
        .and_then(|index| kinds.get(index).copied())
        .unwrap_or(Kind::Other)
}

fn page_of(ram: &[u8], index: PageIndex) -> &[u8] {
    let start = ram.len().min(index.0 as usize * PAGE_SIZE);
    &ram[start..ram.len().min(start + PAGE_SIZE)]
}

/// Pages end to end in one zstd frame, of which only the length is kept.
struct Frame {
    zstd: zstd::Encoder<'static, Counted>,
    pages: u64,
}

impl Frame {
    fn new() -> Result<Self> {
        let zstd = zstd::Encoder::new(Counted(0), PLAIN_LEVEL).map_err(Error::Compress)?;
        Ok(Self { zstd, pages: 0 })
    }

    fn push(&mut self, page: &[u8]) -> Result<()> {
        self.pages += 1;
        self.zstd.write_all(page).map_err(Error::Compress)
    }

    /// The frame's bytes; none for no pages.
    fn finish(self) -> Result<u64> {
        let Counted(bytes) = self.zstd.finish().map_err(Error::Compress)?;
        Ok(if self.pages == 0 { 0 } else { bytes })
    }
}

struct Counted(u64);

impl Write for Counted {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
#[path = "kinds_tests.rs"]
mod tests;
