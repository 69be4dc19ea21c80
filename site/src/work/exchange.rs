//! The target's half of reconciling one image over a line.

use std::path::PathBuf;

use reconciler::{
    Applier, ApplyOptions, BlobAssembler, BlobPart, Descent, Holdings, Image, ImageTree, Offer,
    PlaceKind, Resolution, Retry, Seek, Verification, Verified, blob_parts, no_progress, pages_for,
};
use tokio::runtime::Handle;

use crate::error::{Error, Result};
use crate::line::TargetLine;
use crate::phase::Phase;
use crate::protocol::{ImageHead, ImageOutcome, ToSource, ToTarget};

/// A repair that does not end the matter is tried no more often.
const REPAIRS: usize = 3;

pub(super) async fn receive_offer(line: &mut TargetLine, head: ImageHead) -> Result<Offer> {
    let phase = head.kind.phase();
    let pages = pages_for(head.bytes);
    let malformed = || Error::reconcile("an offer is malformed");
    let mut assembler = BlobAssembler::new(Offer::max_encoded_len(pages));
    loop {
        let ToTarget::Offer(part) = line.receive(phase).await? else {
            return Err(line.unexpected(phase, "no offer"));
        };
        if let Some(bytes) = assembler.push(&part).map_err(malformed())? {
            let offer = Offer::decode(&bytes, pages).map_err(malformed())?;
            return if offer.pages() == pages {
                Ok(offer)
            } else {
                Err(line.unexpected(phase, "an offer of another size"))
            };
        }
    }
}

/// The line, for code that works on images and may block.
pub(super) struct Talk<'a> {
    pub(super) line: &'a mut TargetLine,
    pub(super) runtime: &'a Handle,
    pub(super) phase: Phase,
    /// Came already, and is the next to be received.
    pub(super) next: Option<ToTarget>,
    /// Where pages are set aside that do not fit into memory.
    pub(super) aside: PathBuf,
}

impl Talk<'_> {
    fn send(&mut self, message: ToSource) -> Result<()> {
        self.runtime.block_on(async {
            self.line.send(message).await?;
            self.line.flush().await
        })
    }

    pub(super) fn receive(&mut self) -> Result<ToTarget> {
        if let Some(next) = self.next.take() {
            return Ok(next);
        }
        self.runtime.block_on(self.line.receive(self.phase))
    }

    pub(super) fn unexpected(&self, what: &str) -> Error {
        self.line.unexpected(self.phase, what)
    }

    /// Hands pages to `take` until there are no more.
    pub(super) fn pages(
        &mut self,
        mut take: impl FnMut(&reconciler::PageChunk) -> Result<(), reconciler::Error>,
    ) -> Result<()> {
        loop {
            match self.receive()? {
                ToTarget::Pages(chunk) => {
                    take(&chunk).map_err(Error::reconcile("cannot apply the pages received"))?;
                }
                ToTarget::PagesEnd => return Ok(()),
                _ => return Err(self.line.unexpected(self.phase, "no pages")),
            }
        }
    }
}

/// Answers an offer, applies what comes, verifies, and repairs until the roots are equal.
///
/// With `before`, only pages that were written are hashed again: for images which nobody else can
/// have changed since `before` was computed from them.
pub(super) fn exchange(
    talk: &mut Talk<'_>,
    offer: &Offer,
    holdings: &Holdings<'_>,
    image: &mut dyn Image,
    before: Option<&ImageTree>,
) -> Result<ImageTree> {
    let failed = |what: &'static str| Error::reconcile(what);
    let mut resolution =
        reconciler::resolve(offer, holdings).map_err(failed("cannot resolve an offer"))?;
    answer(talk, offer, &resolution)?;
    match talk.receive()? {
        ToTarget::Seek(part) => {
            let seek = receive_seek(talk, part, offer)?;
            resolution = reconciler::resolve_again(offer, Some(&seek), holdings)
                .map_err(failed("cannot look for pages again"))?;
            answer(talk, offer, &resolution)?;
        }
        other => talk.next = Some(other),
    }
    let options = ApplyOptions {
        spool_dir: talk.aside.clone(),
        ..ApplyOptions::default()
    };
    let mut applier = Applier::new(offer, resolution, holdings, image, &options)
        .map_err(failed("cannot begin to build an image"))?;
    talk.pages(|chunk| applier.push(chunk))?;
    // The applier ends this after two rounds, whatever comes.
    loop {
        match applier
            .retry()
            .map_err(failed("an image is not complete"))?
        {
            Retry::Complete => break,
            Retry::Lines(unpatched) => {
                for part in blob_parts(&unpatched.encode()) {
                    talk.send(ToSource::Unpatched(part))?;
                }
            }
            Retry::Whole(pages) => {
                for part in blob_parts(&pages.encode()) {
                    talk.send(ToSource::Whole(part))?;
                }
            }
        }
        talk.pages(|chunk| applier.push(chunk))?;
    }
    let applied = applier
        .finish()
        .map_err(failed("an image is not complete"))?;
    let mut verification = match before {
        Some(before) => applied.verify_touched(image.reader(), before),
        None => applied.verify(image.reader(), &no_progress),
    }
    .map_err(failed("cannot verify an image"))?;
    for _ in 0..REPAIRS {
        let mismatch = match verification {
            Verification::Verified(verified) => return tell(talk, verified),
            Verification::Mismatch(mismatch) => mismatch,
        };
        tracing::warn!(phase = %talk.phase, "an image differs from the source's; repairing it");
        let mut descent = Descent::new(&mismatch);
        while let Some(request) = descent.next_request() {
            talk.send(ToSource::Differs(request))?;
            let ToTarget::Nodes(reply) = talk.receive()? else {
                return Err(talk.line.unexpected(talk.phase, "no hashes"));
            };
            descent
                .take(&reply)
                .map_err(failed("the hashes received are not the source's"))?;
        }
        let differing = descent.into_differing();
        for part in blob_parts(&differing.encode()) {
            talk.send(ToSource::Refetch(part))?;
        }
        let mut repairer = mismatch
            .repair(image, &differing)
            .map_err(failed("cannot repair an image"))?;
        talk.pages(|chunk| repairer.push(chunk))?;
        let (applied, tree) = repairer
            .finish()
            .map_err(failed("a repair is not complete"))?;
        verification = applied
            .verify_touched(image.reader(), &tree)
            .map_err(failed("cannot verify an image"))?;
    }
    match verification {
        Verification::Verified(verified) => tell(talk, verified),
        Verification::Mismatch(_) => Err(Error::Refused(format!(
            "an image still differs from the source's after {REPAIRS} repairs: this host's memory \
             or disk may be failing"
        ))),
    }
}

/// Asks for what is lacking.
fn answer(talk: &mut Talk<'_>, offer: &Offer, resolution: &Resolution) -> Result<()> {
    let answer = resolution
        .answer(offer)
        .map_err(Error::reconcile("cannot answer an offer"))?;
    for part in blob_parts(&answer) {
        talk.send(ToSource::Lacks(part))?;
    }
    Ok(())
}

fn receive_seek(talk: &mut Talk<'_>, first: BlobPart, offer: &Offer) -> Result<Seek> {
    let malformed = || Error::reconcile("what is to be looked for again is malformed");
    let mut assembler = BlobAssembler::new(Seek::max_encoded_len(offer.pages()));
    let mut part = first;
    loop {
        if let Some(bytes) = assembler.push(&part).map_err(malformed())? {
            return Seek::decode(&bytes, offer).map_err(malformed());
        }
        part = match talk.receive()? {
            ToTarget::Seek(part) => part,
            _ => return Err(talk.line.unexpected(talk.phase, "half a seek")),
        };
    }
}

fn tell(talk: &mut Talk<'_>, verified: Verified) -> Result<ImageTree> {
    let (tree, counts) = verified.into_parts();
    let mut pages: Vec<(String, u64)> = [
        ("zero", counts.zero),
        ("same", counts.same),
        ("repeated", counts.repeated),
        ("literal", counts.literal),
        ("delta", counts.delta),
        ("patched", counts.patched),
        ("patch_failed", counts.patch_failed),
        ("lines", counts.lines),
        ("lines_failed", counts.lines_failed),
        ("reverted", counts.reverted),
        ("refetched", counts.refetched),
    ]
    .into_iter()
    .map(|(name, count)| (name.to_owned(), count))
    .collect();
    pages.extend(counts.moved.iter().map(|(place, count)| {
        let from = match place {
            PlaceKind::Replayed => "moved_from_replayed",
            PlaceKind::Base => "moved_from_base",
            PlaceKind::Disk => "moved_from_disk",
            PlaceKind::OtherImage => "moved_from_other_image",
            PlaceKind::Store => "moved_from_store",
        };
        (from.to_owned(), *count)
    }));
    pages.retain(|(_, count)| *count > 0);
    let outcome = ImageOutcome {
        root: tree.root(),
        pages,
        refetched: counts.refetched,
    };
    talk.send(ToSource::Verified(outcome))?;
    Ok(tree)
}
