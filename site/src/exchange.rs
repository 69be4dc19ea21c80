//! The source's half of reconciling images over a line: offers for all of them, then the pages
//! that the target lacks, image by image.
//!
//! Reading and compressing run on their own threads and hand chunks over a bounded channel, so
//! that they overlap with sending, and a slow line holds them back. How hard they compress follows
//! what the line takes and what this host's processor can do ([`Governor`]).

use std::borrow::Cow;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use reconciler::{
    BlobAssembler, BlobPart, Closed, EncodeStats, Governor, ImageTree, Known, NodeServer, Offer,
    OfferOptions, Page, PageChunk, PageIndex, PageSet, ReadPages, References, Salt, Unpatched,
    blob_parts,
};
use tokio::sync::mpsc;

use crate::error::{Error, Result};
use crate::layout::TwinState;
use crate::line::Line;
use crate::local::blocking;
use crate::phase::Phase;
use crate::progress::Progress;
use crate::protocol::{ImageHead, ImageKind, ImageOutcome, ToSource, ToTarget};
use crate::state::{Base, State, with};
use crate::vm::Id;

/// Chunks between the compressor and the socket; each is at most 256 KiB.
const QUEUE: usize = 4;

/// Bytes of a base file in one message.
const FILE_CHUNK: usize = 256 << 10;

/// What sending one image took.
#[derive(Clone, Debug)]
pub(crate) struct Sent {
    /// Which.
    pub kind: ImageKind,
    /// Bytes of the offer, the answer, and a descent if there was one.
    pub hashes: u64,
    /// Bytes of pages.
    pub payload: u64,
    /// Seconds that sending the pages took, from the answer to the target's verdict.
    pub seconds: f64,
    /// What the target made of it.
    pub outcome: ImageOutcome,
}

struct Offered {
    head: ImageHead,
    offer: Offer,
    encoded: Vec<u8>,
}

/// What is sent, and what it is sent against.
pub(crate) struct Outgoing<'a> {
    /// The state.
    pub state: &'a Arc<State>,
    /// What the target has as well.
    pub base: &'a Arc<Base>,
    /// Whether the target has replayed.
    pub replayed: bool,
    /// What this site's own replay left, if the target has replayed.
    pub twin: Option<&'a Arc<TwinState>>,
    /// The line's rate, in bits per second.
    pub rate: f64,
    /// Hears how it gets on.
    pub progress: &'a dyn Progress,
}

/// What pages may be told against.
enum Against {
    /// The base and the twin.
    All,
    /// The base, and what the target has where a patch has failed.
    Guesses(Unpatched),
    /// The base alone: not even that has helped.
    Base,
    /// Nothing: the base itself is in doubt.
    Nothing,
}

/// Sends all images of a state to a target that has `base`; returns when it has verified them.
///
/// `enter` hears which phase begins.
pub(crate) async fn send_images(
    line: &mut Line,
    out: &Outgoing<'_>,
    enter: &mut (dyn FnMut(Phase) + Send),
) -> Result<Vec<Sent>> {
    enter(Phase::Device);
    let salt = salt()?;
    let (for_offers, base_for_offers) = (out.state.clone(), out.base.clone());
    let (twin, replayed) = (out.twin.cloned(), out.replayed);
    let offers = blocking(move || {
        let state = for_offers;
        let options = OfferOptions {
            salt,
            candidates: base_for_offers.candidates(),
            force_bits: None,
            seek_from: OfferOptions::SEEK_FROM,
        };
        state
            .heads()
            .into_iter()
            .map(|head| {
                let base = base_for_offers.tree(head.kind)?;
                let base_ram = base_for_offers.tree(ImageKind::Ram)?;
                let held = shared(
                    &state,
                    &base_for_offers,
                    head.kind,
                    &base,
                    &base_ram,
                    replayed,
                )?;
                let held: Vec<_> = held.iter().map(AsRef::as_ref).collect();
                let known = Known {
                    shared: &held,
                    twin: &twin
                        .as_ref()
                        .map_or_else(Vec::new, |twin| twin.trees(head.kind)),
                    nothing_else: !replayed,
                };
                let offer = Offer::knowing(state.tree(head.kind), &base, &known, &options)
                    .map_err(Error::reconcile("cannot say what differs"))?;
                let encoded = offer
                    .encode()
                    .map_err(Error::reconcile("cannot say what differs"))?;
                Ok(Offered {
                    head,
                    offer,
                    encoded,
                })
            })
            .collect::<Result<Vec<_>>>()
    })
    .await?;
    tracing::debug!("what differs is known");
    for offered in &offers {
        line.send(ToTarget::Image(offered.head)).await?;
        for part in blob_parts(&offered.encoded) {
            line.send(ToTarget::Offer(part)).await?;
        }
    }
    line.flush().await?;
    let mut sent = Vec::new();
    let governor = if line.is_local() {
        Governor::for_later(out.rate as u64, compressors())
    } else {
        Governor::for_line(out.rate as u64, compressors())
    };
    let governor = Arc::new(governor);
    for offered in offers {
        let phase = offered.head.kind.phase();
        enter(phase);
        sent.push(send_image(line, out, &governor, offered).await?);
    }
    tracing::info!(codecs = ?governor.taken(), "compressed");
    Ok(sent)
}

/// Threads that compress: one for each processor, up to a few.
fn compressors() -> u32 {
    const MOST: u32 = 8;
    std::thread::available_parallelism().map_or(1, |cores| (cores.get() as u32).min(MOST))
}

/// The images that the target holds as well when it looks this one up: as in
/// [`crate::work::Work`], where it lists the places.
pub(crate) fn shared<'a>(
    state: &'a State,
    common: &Base,
    kind: ImageKind,
    base: &'a ImageTree,
    base_ram: &'a ImageTree,
    replayed: bool,
) -> Result<Vec<Cow<'a, ImageTree>>> {
    let generation = common.has_ram();
    let mut shared = Vec::new();
    if common.is_ahead(kind) {
        return Ok(shared);
    }
    let (base, base_ram) = (Cow::Borrowed(base), Cow::Borrowed(base_ram));
    match kind {
        ImageKind::Device if generation => shared.push(base),
        ImageKind::Device => {}
        ImageKind::Disk(index) => {
            shared.push(common.readable(index.into(), base)?);
            if generation && !replayed {
                shared.push(base_ram);
            }
        }
        ImageKind::Ram => {
            if generation {
                shared.push(base);
            }
            // They come before.
            let disks = state.heads().into_iter().map(|head| head.kind);
            for disk in disks {
                if let ImageKind::Disk(index) = disk {
                    shared.push(common.readable(index.into(), Cow::Borrowed(state.tree(disk)))?);
                }
            }
        }
    }
    Ok(shared)
}

async fn send_image(
    line: &mut Line,
    out: &Outgoing<'_>,
    governor: &Arc<Governor>,
    offered: Offered,
) -> Result<Sent> {
    let Offered {
        head,
        offer,
        encoded,
    } = offered;
    let phase = head.kind.phase();
    let mut hashes = encoded.len() as u64;
    let mut pages = answered(line, phase, &offer, &mut hashes).await?;
    if let Some(seek) = offer.seek(out.state.tree(head.kind), &pages) {
        tracing::debug!(?head, lacking = pages.len(), "looked for again");
        let encoded = seek
            .encode()
            .map_err(Error::reconcile("cannot say what to look for again"))?;
        hashes += encoded.len() as u64;
        for part in blob_parts(&encoded) {
            line.send(ToTarget::Seek(part)).await?;
        }
        line.flush().await?;
        pages = answered(line, phase, &offer, &mut hashes).await?;
    }
    let begun = Instant::now();
    tracing::debug!(?head, lacking = pages.len(), "answer");
    let kind = head.kind;
    let mut encoded = send_pages(line, out, governor, Against::All, kind, pages).await?;
    let mut payload = encoded.bytes();
    loop {
        match line.recv(phase).await? {
            ToSource::Verified(outcome) => {
                if outcome.root != out.state.tree(head.kind).root() {
                    return Err(line.unexpected(phase, "it verified another image"));
                }
                let seconds = begun.elapsed().as_secs_f64();
                return Ok(Sent {
                    kind: head.kind,
                    hashes,
                    payload,
                    seconds,
                    outcome,
                });
            }
            ToSource::Differs(request) => {
                let reply = with(out.state, move |state| {
                    NodeServer::new(state.tree(head.kind))
                        .answer(&request)
                        .map_err(Error::reconcile("the target asks for what there is not"))
                })
                .await?;
                hashes += reply.children.len() as u64;
                line.send(ToTarget::Nodes(reply)).await?;
            }
            ToSource::Unpatched(part) => {
                let most = encoded.patch_pages;
                let limit = Unpatched::max_encoded_len(most, offer.pages());
                let bytes = requested(line, phase, part, limit).await?;
                hashes += bytes.len() as u64;
                let unpatched = Unpatched::decode(&bytes, &offer, most)
                    .map_err(Error::reconcile("a request for pages is malformed"))?;
                let pages = unpatched.pages().to_vec();
                let against = Against::Guesses(unpatched);
                encoded = send_pages(line, out, governor, against, kind, pages).await?;
                payload += encoded.bytes();
            }
            ToSource::Whole(part) => {
                let pages = requested_pages(line, phase, part, &offer).await?;
                encoded = send_pages(line, out, governor, Against::Base, kind, pages).await?;
                payload += encoded.bytes();
            }
            ToSource::Refetch(part) => {
                let pages = requested_pages(line, phase, part, &offer).await?;
                out.progress
                    .note(&format!("{} pages are sent again", pages.len()));
                encoded = send_pages(line, out, governor, Against::Nothing, kind, pages).await?;
                payload += encoded.bytes();
            }
            _ => return Err(line.unexpected(phase, "no verdict on an image")),
        }
    }
}

/// The pages that the target asks for; `bytes` counts its answer.
async fn answered(
    line: &mut Line,
    phase: Phase,
    offer: &Offer,
    bytes: &mut u64,
) -> Result<Vec<PageIndex>> {
    let bad = || Error::reconcile("the answer to an offer is malformed");
    let mut assembler = BlobAssembler::new(offer.max_answer_len());
    let answer = loop {
        let ToSource::Lacks(part) = line.recv(phase).await? else {
            return Err(line.unexpected(phase, "no answer to an offer"));
        };
        if let Some(answer) = assembler.push(&part).map_err(bad())? {
            break answer;
        }
    };
    *bytes += answer.len() as u64;
    offer.decode_answer(&answer).map_err(bad())
}

/// The pages that a request names, of which `first` is the first part.
async fn requested_pages(
    line: &mut Line,
    phase: Phase,
    first: BlobPart,
    offer: &Offer,
) -> Result<Vec<PageIndex>> {
    let limit = Offer::max_encoded_len(offer.pages());
    let bytes = requested(line, phase, first, limit).await?;
    Ok(PageSet::decode(&bytes, offer.pages())
        .map_err(Error::reconcile("a request for pages is malformed"))?
        .iter()
        .collect())
}

/// A request for pages of at most `limit` bytes, of which `first` is the first part.
async fn requested(line: &mut Line, phase: Phase, first: BlobPart, limit: u64) -> Result<Vec<u8>> {
    let malformed = || Error::reconcile("a request for pages is malformed");
    let mut assembler = BlobAssembler::new(limit);
    let mut part = first;
    loop {
        if let Some(bytes) = assembler.push(&part).map_err(malformed())? {
            return Ok(bytes);
        }
        part = match line.recv(phase).await? {
            ToSource::Refetch(part) | ToSource::Unpatched(part) | ToSource::Whole(part) => part,
            _ => return Err(line.unexpected(phase, "half a request for pages")),
        };
    }
}

async fn send_pages(
    line: &mut Line,
    out: &Outgoing<'_>,
    governor: &Arc<Governor>,
    against: Against,
    kind: ImageKind,
    pages: Vec<PageIndex>,
) -> Result<EncodeStats> {
    let (sender, mut receiver) = mpsc::channel::<PageChunk>(QUEUE);
    let (state, base) = (out.state.clone(), out.base.clone());
    let twin = out
        .twin
        .filter(|_| matches!(against, Against::All))
        .cloned();
    // How well pages compress is known only at the end, so progress counts them as read.
    let read = Arc::new(AtomicU64::new(0));
    let counter = read.clone();
    let total = pages.len() as u64 * reconciler::PAGE_SIZE as u64;
    let governor = governor.clone();
    let encoding = tokio::spawn(blocking(move || {
        let mut sink = |chunk| sender.blocking_send(chunk).map_err(|_| Closed);
        state
            .with_pages(kind, |image| {
                let image = Counted {
                    image,
                    bytes: &counter,
                };
                base.with_pages(kind, |base| {
                    let mut encode = |twin: Option<&dyn ReadPages>| {
                        let references = References {
                            base: base.filter(|_| !matches!(against, Against::Nothing)),
                            twin,
                            unpatched: match &against {
                                Against::Guesses(unpatched) => Some(unpatched),
                                _ => None,
                            },
                        };
                        reconciler::encode_pages_by(
                            &image, references, &pages, &governor, &mut sink,
                        )
                    };
                    match &twin {
                        Some(twin) => twin.with_pages(kind, encode),
                        None => encode(None),
                    }
                })
            })
            .map_err(Error::reconcile("cannot read and compress pages"))
    }));
    while let Some(chunk) = receiver.recv().await {
        line.send(ToTarget::Pages(chunk)).await?;
        out.progress
            .advance(kind.phase(), read.load(Ordering::Relaxed), Some(total));
    }
    line.send(ToTarget::PagesEnd).await?;
    line.flush().await?;
    match encoding.await {
        Ok(stats) => stats,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

/// Counts the pages that are read.
struct Counted<'a> {
    image: &'a dyn ReadPages,
    bytes: &'a AtomicU64,
}

impl ReadPages for Counted<'_> {
    fn pages(&self) -> u64 {
        self.image.pages()
    }

    fn read(&self, index: PageIndex, into: &mut Page) -> std::io::Result<()> {
        self.bytes.fetch_add(into.len() as u64, Ordering::Relaxed);
        self.image.read(index, into)
    }
}

/// Sends a base file, as it is.
pub(crate) async fn send_file(line: &mut Line, path: &Path, progress: &dyn Progress) -> Result<()> {
    let (sender, mut receiver) = mpsc::channel::<Vec<u8>>(QUEUE);
    let path = path.to_owned();
    let total = std::fs::metadata(&path)
        .map_err(Error::file("measure", &path))?
        .len();
    let reading = tokio::spawn(blocking(move || {
        use std::io::Read;
        let read = || -> std::io::Result<()> {
            let file = std::fs::File::open(&path)?;
            // Base images are sparse and full of text: compressing is worth it on any line.
            let mut encoder = zstd::stream::read::Encoder::new(file, 6)?;
            loop {
                let mut chunk = vec![0; FILE_CHUNK];
                let mut filled = 0;
                while filled < chunk.len() {
                    match encoder.read(&mut chunk[filled..])? {
                        0 => break,
                        count => filled += count,
                    }
                }
                chunk.truncate(filled);
                if chunk.is_empty() || sender.blocking_send(chunk).is_err() {
                    return Ok(());
                }
            }
        };
        read().map_err(Error::file("read", &path))
    }));
    let mut sent = 0;
    while let Some(chunk) = receiver.recv().await {
        sent += chunk.len() as u64;
        line.send(ToTarget::Data(chunk)).await?;
        progress.advance(Phase::Base, sent.min(total), None);
    }
    line.send(ToTarget::DataEnd).await?;
    match reading.await {
        Ok(result) => result,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

/// A fresh salt for the truncated hashes of a session.
fn salt() -> Result<Salt> {
    let (a, b) = (Id::random()?, Id::random()?);
    let mut salt = [0; 32];
    salt[..16].copy_from_slice(&a.0);
    salt[16..].copy_from_slice(&b.0);
    Ok(Salt(salt))
}
