//! Both ends in one process, without a wire: for tests and for measuring strategies on a
//! capture.
//!
//! Each round of pages is encoded, then applied, so that both can be timed
//! ([`reconcile_in_memory`]), or both ends work at once over a line of a given rate, as on the way
//! from site to site ([`reconcile_overlapped`]).

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::apply::{Applier, ApplyOptions, Retry};
use crate::descend::{Descent, NodeServer};
use crate::encode::{Closed, EncodeOptions, EncodeStats, References, encode_pages};
use crate::error::Error;
use crate::known::Known;
use crate::lines::Unpatched;
use crate::offer::{Offer, OfferOptions};
use crate::pace::Overlapped;
use crate::page::{Image, PageIndex, ReadPages};
use crate::page_set::PageSet;
use crate::resolve::{Holdings, Resolution, resolve, resolve_again};
use crate::seek::Seek;
use crate::stats::PageCounts;
use crate::tree::{ImageTree, no_progress};
use crate::verify::{Applied, Verification, Verified};

/// How often an image is repaired before giving up. Once is enough unless someone lies.
pub const MAX_REPAIRS: u32 = 3;

/// What went over the wire that there is not.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// Pages by recipe.
    pub pages: PageCounts,
    /// Bytes of the offer, and of a seek.
    pub offer_bytes: u64,
    /// Bytes of the answers.
    pub answer_bytes: u64,
    /// The page streams.
    pub encoded: EncodeStats,
    /// Bytes of asking for pages whose patch did not fit.
    pub retry_bytes: u64,
    /// The streams of those pages, by lines where that is less.
    pub resent: EncodeStats,
    /// The streams of pages whose lines did not fit either.
    pub whole: EncodeStats,
    /// Bytes of tree nodes and of pages sent again.
    pub repair_bytes: u64,
    /// What each stage took.
    pub times: Times,
}

/// How long the stages took, on all cores.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Times {
    /// The source's: saying what differs.
    pub offer: Duration,
    /// The target's: looking it up.
    pub resolve: Duration,
    /// The source's: reading, comparing and compressing pages, in all rounds.
    pub encode: Duration,
    /// The target's: copying, putting back, and unpacking pages, in all rounds.
    pub decode: Duration,
    /// What a line of the rate asked about took; nothing where both ends took turns.
    pub line: Duration,
    /// From the first page to the last, where both ends worked at once: compressing, sending and
    /// unpacking.
    pub pages: Duration,
    /// The target's: hashing the result.
    pub verify: Duration,
}

/// Adds what `work` takes to `time`.
fn timed<T>(time: &mut Duration, work: impl FnOnce() -> T) -> T {
    let begun = Instant::now();
    let done = work();
    *time += begun.elapsed();
    done
}

impl Stats {
    /// All bytes, both ways.
    pub const fn bytes(&self) -> u64 {
        self.offer_bytes
            + self.answer_bytes
            + self.encoded.bytes()
            + self.retry_bytes
            + self.resent.bytes()
            + self.whole.bytes()
            + self.repair_bytes
    }
}

/// A message on its way, for tests that damage it.
#[derive(Debug, PartialEq, Eq)]
pub enum Message<'a> {
    /// An encoded [`Offer`].
    Offer(&'a mut Vec<u8>),
    /// An encoded [`Seek`].
    Seek(&'a mut Vec<u8>),
    /// The answer to either.
    Answer(&'a mut Vec<u8>),
    /// Pages whose patch did not fit, asked for again.
    Retry(&'a mut Vec<u8>),
    /// A chunk of pages; emptied, it is lost.
    Pages(&'a mut Vec<u8>),
}

/// The source: its image, and what it knows of the base.
#[derive(Clone, Copy)]
pub struct Source<'a> {
    /// The image to move.
    pub image: &'a dyn ReadPages,
    /// Its tree.
    pub tree: &'a ImageTree,
    /// The tree of the base; [`ImageTree::zero`] without one.
    pub base: &'a ImageTree,
    /// The base itself, when the target can read it too.
    pub base_reader: Option<&'a dyn ReadPages>,
    /// What the source's own replay made of the base, when there is one.
    pub twin: Option<&'a dyn ReadPages>,
    /// What it knows of the target.
    pub known: Known<'a>,
}

/// Options of both ends.
#[derive(Clone, Debug)]
pub struct Options {
    /// The source's.
    pub offer: OfferOptions,
    /// The source's.
    pub encode: EncodeOptions,
    /// The target's.
    pub apply: ApplyOptions,
}

/// Makes `image`, which holds what `holdings.current` says, equal to the source's.
///
/// `on_the_way` sees every encoded message and may damage it.
pub fn reconcile_in_memory(
    source: Source<'_>,
    holdings: &Holdings<'_>,
    image: &mut dyn Image,
    options: &Options,
    on_the_way: &mut dyn FnMut(Message<'_>),
) -> Result<(Verified, Stats), Error> {
    reconcile(source, holdings, image, options, None, on_the_way)
}

/// The same, both ends at work at once. Nothing is damaged on the way; the governor takes the place
/// of `options.encode`.
pub fn reconcile_overlapped(
    source: Source<'_>,
    holdings: &Holdings<'_>,
    image: &mut dyn Image,
    options: &Options,
    how: &Overlapped<'_>,
) -> Result<(Verified, Stats), Error> {
    reconcile(source, holdings, image, options, Some(how), &mut |_| {})
}

fn reconcile(
    source: Source<'_>,
    holdings: &Holdings<'_>,
    image: &mut dyn Image,
    options: &Options,
    overlapped: Option<&Overlapped<'_>>,
    on_the_way: &mut dyn FnMut(Message<'_>),
) -> Result<(Verified, Stats), Error> {
    let mut stats = Stats::default();
    let (offered, mut bytes) = timed(&mut stats.times.offer, || {
        let offered = Offer::knowing(source.tree, source.base, &source.known, &options.offer)?;
        let bytes = offered.encode()?;
        Ok::<_, Error>((offered, bytes))
    })?;
    on_the_way(Message::Offer(&mut bytes));
    stats.offer_bytes = bytes.len() as u64;

    let (offer, resolution, mut answer) = timed(&mut stats.times.resolve, || {
        let offer = Offer::decode(&bytes, image.pages())?;
        let resolution = resolve(&offer, holdings)?;
        let answer = resolution.answer(&offer)?;
        Ok::<_, Error>((offer, resolution, answer))
    })?;
    on_the_way(Message::Answer(&mut answer));
    stats.answer_bytes = answer.len() as u64;

    let mut pages = offered.decode_answer(&answer)?;
    let mut resolution = resolution;
    if let Some(seek) = offered.seek(source.tree, &pages) {
        let mut bytes = seek.encode()?;
        on_the_way(Message::Seek(&mut bytes));
        stats.offer_bytes += bytes.len() as u64;
        let mut answer = timed(&mut stats.times.resolve, || {
            let seek = Seek::decode(&bytes, &offer)?;
            resolution = resolve_again(&offer, Some(&seek), holdings)?;
            resolution.answer(&offer)
        })?;
        on_the_way(Message::Answer(&mut answer));
        stats.answer_bytes += answer.len() as u64;
        pages = offered.decode_answer(&answer)?;
    }
    let mut transfer = Transfer {
        source,
        holdings,
        options,
        overlapped,
        stats: &mut stats,
        on_the_way,
    };
    let applied = transfer.run(&offer, resolution, image, &pages)?;
    let mut verification = timed(&mut stats.times.verify, || match overlapped {
        // As in a migration, whose target has hashed what it holds and changed nothing else.
        Some(_) => applied.verify_touched(image.reader(), holdings.current),
        None => applied.verify(image.reader(), &no_progress),
    })?;
    for _ in 0..MAX_REPAIRS {
        let mismatch = match verification {
            Verification::Verified(verified) => {
                stats.pages = verified.counts().clone();
                return Ok((verified, stats));
            }
            Verification::Mismatch(mismatch) => mismatch,
        };
        let server = NodeServer::new(source.tree);
        let mut descent = Descent::new(&mismatch);
        while let Some(request) = descent.next_request() {
            let reply = server.answer(&request)?;
            stats.repair_bytes += (request.nodes.len() * 8 + reply.children.len()) as u64;
            descent.take(&reply)?;
        }
        let differing = descent.into_differing();
        let pages: Vec<_> = differing.iter().collect();
        let mut repairer = mismatch.repair(image, &differing)?;
        let mut failed = None;
        let alone = References::default();
        let sent = encode_pages(source.image, alone, &pages, options.encode, &mut |chunk| {
            repairer.push(&chunk).map_err(|error| {
                failed = Some(error);
                Closed
            })
        });
        stats.repair_bytes += failed.map_or(sent, Err)?.bytes();
        let (applied, tree) = repairer.finish()?;
        verification = applied.verify_touched(image.reader(), &tree)?;
    }
    match verification {
        Verification::Verified(verified) => {
            stats.pages = verified.counts().clone();
            Ok((verified, stats))
        }
        Verification::Mismatch(_) => Err(Error::NotHealing {
            rounds: MAX_REPAIRS,
        }),
    }
}

/// The way of the pages.
struct Transfer<'a, 's> {
    source: Source<'a>,
    holdings: &'a Holdings<'a>,
    options: &'a Options,
    overlapped: Option<&'a Overlapped<'a>>,
    stats: &'s mut Stats,
    on_the_way: &'s mut dyn FnMut(Message<'_>),
}

impl Transfer<'_, '_> {
    fn run(
        &mut self,
        offer: &Offer,
        resolution: Resolution,
        image: &mut dyn Image,
        pages: &[PageIndex],
    ) -> Result<Applied, Error> {
        let total = image.pages();
        let mut applier = timed(&mut self.stats.times.decode, || {
            Applier::new(offer, resolution, self.holdings, image, &self.options.apply)
        })?;
        let shared = self.holdings.base_reader.is_some();
        let base = self.source.base_reader.filter(|_| shared);
        let twin = self.source.twin;
        let alone = References::base(base);
        self.stats.encoded = self.send(&mut applier, References { twin, ..alone }, pages)?;
        loop {
            match applier.retry()? {
                Retry::Complete => return applier.finish(),
                Retry::Lines(unpatched) => {
                    let request = self.ask(unpatched.encode());
                    let most = self.stats.encoded.patch_pages;
                    let unpatched = Unpatched::decode(&request, offer, most)?;
                    let guesses = References {
                        unpatched: Some(&unpatched),
                        ..alone
                    };
                    self.stats.resent = self.send(&mut applier, guesses, unpatched.pages())?;
                }
                Retry::Whole(pages) => {
                    let request = self.ask(pages.encode());
                    let pages: Vec<_> = PageSet::decode(&request, total)?.iter().collect();
                    self.stats.whole = self.send(&mut applier, alone, &pages)?;
                }
            }
        }
    }

    fn ask(&mut self, mut request: Vec<u8>) -> Vec<u8> {
        (self.on_the_way)(Message::Retry(&mut request));
        self.stats.retry_bytes += request.len() as u64;
        request
    }

    fn send(
        &mut self,
        applier: &mut Applier<'_>,
        references: References<'_>,
        pages: &[PageIndex],
    ) -> Result<EncodeStats, Error> {
        let (image, how) = (self.source.image, self.options.encode);
        if let Some(overlapped) = self.overlapped {
            let times = &mut self.stats.times;
            return overlapped.send(image, references, pages, applier, times);
        }
        let mut chunks = Vec::new();
        let sent = timed(&mut self.stats.times.encode, || {
            encode_pages(image, references, pages, how, &mut |chunk| {
                chunks.push(chunk);
                Ok(())
            })
        })?;
        for chunk in &mut chunks {
            (self.on_the_way)(Message::Pages(&mut chunk.bytes));
        }
        timed(&mut self.stats.times.decode, || {
            chunks.iter().try_for_each(|chunk| applier.push(chunk))
        })?;
        Ok(sent)
    }
}
