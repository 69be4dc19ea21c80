//! Disk images that come in pieces: before the VM has moved what its guest has in memory, and the rest while it runs
//! here.

use std::collections::{BTreeMap, BTreeSet};
use std::future::poll_fn;
use std::io::Read;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use reconciler::{ImageTree, PAGE_SIZE, PageSet, blob_parts};
use tokio::sync::watch;

use super::Session;
use crate::arriving::{Arrivals, Arriving};
use crate::error::{Error, Result};
use crate::line::TargetLine;
use crate::local::blocking;
use crate::phase::Phase;
use crate::protocol::{Blocks, ToSource, ToTarget};
use crate::vm::BaseFile;

/// No tree takes more: 32 bytes for each page of the largest disk, and what is around them.
const TREE_MAX: u64 = 34 * reconciler::MAX_PAGES;

/// Hashes of an image that has much of one content, in zstd.
const PACKS: u64 = 64;

/// How often it is looked for a guest that stands still, where one may.
const LOOK: Duration = Duration::from_secs(1);

impl Session {
    fn disk(&self, disk: u8) -> Result<BaseFile> {
        let known = self.hello.vm.disks.get(usize::from(disk)).copied();
        known.ok_or_else(|| self.out_of_place("a disk that the VM does not have"))
    }

    /// The image of a disk that is on its way.
    fn arriving(&self, disk: u8) -> Result<Arc<Arriving>> {
        let hash = self.disk(disk)?.hash;
        let image = self.arrivals.get(&self.store, hash)?;
        image.ok_or_else(|| self.out_of_place("a part of a disk image that is not on its way"))
    }

    /// An image is announced: its pages' hashes come, and what is lacking is said.
    pub(super) async fn begin_later(&mut self, line: &mut TargetLine, disk: u8) -> Result<()> {
        let file = self.disk(disk)?;
        if self.store.base_file(file.hash).is_some() {
            return Err(self.out_of_place("an image that is here already"));
        }
        let pages = file.bytes / PAGE_SIZE as u64;
        // As much as a tree of so many pages takes, in zstd, which makes no hash longer.
        let limit = pages
            .saturating_mul(34)
            .saturating_add(1 << 20)
            .min(TREE_MAX);
        let mut packed = Vec::new();
        loop {
            match line.receive(Phase::Base).await? {
                ToTarget::Data(part) if (packed.len() + part.len()) as u64 <= limit => {
                    packed.extend_from_slice(&part);
                }
                ToTarget::DataEnd => break,
                _ => return Err(line.unexpected(Phase::Base, "half the hashes of an image")),
            }
        }
        let malformed = || Error::reconcile("the hashes of an image are malformed");
        let (store, peer, arrivals) =
            (self.store.clone(), self.peer.clone(), self.arrivals.clone());
        blocking(move || {
            // Hashes don't get much shorter: a little that unpacks to much is none.
            let packs = (packed.len() as u64)
                .saturating_mul(PACKS)
                .saturating_add(1 << 20);
            let encoded = unpacked(&packed, limit.min(packs))?;
            let tree = ImageTree::decode(&encoded, pages).map_err(malformed())?;
            arrivals.begin(&store, file, &tree, &peer)
        })
        .await?;
        self.say_absent(line, disk).await.map(drop)
    }

    /// Tells what is lacking of an image; nothing, of one that is here.
    pub(super) async fn say_absent(&self, line: &mut TargetLine, disk: u8) -> Result<PageSet> {
        let hash = self.disk(disk)?.hash;
        let image = self.arrivals.get(&self.store, hash)?;
        let absent = image.map_or_else(PageSet::new, |image| image.absent());
        for part in blob_parts(&absent.encode()) {
            line.send(ToSource::Lacks(part)).await?;
        }
        line.flush().await?;
        Ok(absent)
    }

    /// Takes pages of an image that was announced.
    pub(super) async fn take_blocks(&self, blocks: Blocks) -> Result<()> {
        take(self.arriving(blocks.disk)?, blocks).await
    }

    /// No more of an image comes for now; what is lacking of it.
    pub(super) async fn end_of_later(&self, line: &mut TargetLine, disk: u8) -> Result<PageSet> {
        let hash = self.disk(disk)?.hash;
        if let Some(image) = self.arrivals.get(&self.store, hash)? {
            blocking(move || image.note()).await?;
        }
        self.say_absent(line, disk).await
    }

    /// The conversation in which the rest of the images comes.
    pub(super) async fn supplied(&mut self, line: &mut TargetLine) -> Result<()> {
        self.phase = Phase::Rest;
        let mut images: BTreeMap<u8, Arc<Arriving>> = BTreeMap::new();
        let outcome = self.take_rest(line, &mut images).await;
        note(&images).await;
        outcome
    }

    async fn take_rest(
        &mut self,
        line: &mut TargetLine,
        images: &mut BTreeMap<u8, Arc<Arriving>>,
    ) -> Result<()> {
        // Reads that the source has heard of.
        let mut told: BTreeMap<u8, u64> = BTreeMap::new();
        let mut here = BTreeSet::new();
        let mut reads = Vec::new();
        let mut looked = Instant::now();
        loop {
            let message = tokio::select! {
                message = line.receive(Phase::Rest) => message,
                () = asked(&mut reads) => {
                    tell(line, images, &mut told).await?;
                    continue;
                }
            };
            match message {
                Ok(ToTarget::Probe(_)) => {
                    line.send(ToSource::Probed).await?;
                    line.flush().await?;
                    continue;
                }
                Ok(ToTarget::Rest { disk }) if !images.contains_key(&disk) => {
                    self.say_absent(line, disk).await?;
                    let hash = self.disk(disk)?.hash;
                    let Some(image) = self.arrivals.get(&self.store, hash)? else {
                        // It has come by another way.
                        line.send(ToSource::Here { disk }).await?;
                        line.flush().await?;
                        continue;
                    };
                    Arrivals::wake(&self.store, &image);
                    reads.push(image.asked());
                    images.insert(disk, image);
                    // Those that waited before anybody brought anything.
                    tell(line, images, &mut told).await?;
                }
                Ok(ToTarget::Blocks(blocks)) => {
                    let Some(image) = images.get(&blocks.disk) else {
                        return Err(self.out_of_place("pages of an image that was not asked for"));
                    };
                    take(image.clone(), blocks).await?;
                    line.send(ToSource::Took).await?;
                    line.flush().await?;
                    if image.is_stalled() && looked.elapsed() >= LOOK {
                        looked = Instant::now();
                        Arrivals::wake(&self.store, image);
                    }
                }
                Ok(_) => return Err(self.out_of_place("a message")),
                Err(Error::Line {
                    source: crate::transport::WireError::Closed,
                    ..
                }) => return Ok(()),
                Err(error) => return Err(error),
            }
            // Two disks may rest on one image.
            for (&disk, image) in &*images {
                if !image.is_whole() || !here.insert(disk) {
                    continue;
                }
                if self.store.is_arriving(image.file().hash) {
                    let whole = image.clone();
                    blocking(move || whole.verify()).await?;
                    Arrivals::settle(&self.store, image.clone(), true);
                }
                line.send(ToSource::Here { disk }).await?;
                line.flush().await?;
            }
        }
    }
}

/// Takes pages of an image.
async fn take(image: Arc<Arriving>, blocks: Blocks) -> Result<()> {
    blocking(move || {
        let count: u64 = blocks.runs.iter().map(|(_, count)| u64::from(*count)).sum();
        if count > Blocks::PAGES {
            return Err(Error::Refused("more pages came than may at a time".into()));
        }
        let bytes = unpacked(&blocks.bytes, count * PAGE_SIZE as u64)?;
        let mut rest = bytes.as_slice();
        for (first, count) in blocks.runs {
            let length = count as usize * PAGE_SIZE;
            let Some((run, after)) = rest.split_at_checked(length) else {
                return Err(Error::Refused("fewer pages came than were said".into()));
            };
            image.put(first, run)?;
            rest = after;
        }
        Ok(())
    })
    .await
}

/// Unpacks zstd that holds no more than so many bytes.
fn unpacked(packed: &[u8], limit: u64) -> Result<Vec<u8>> {
    let malformed = |error| Error::Refused(format!("what came can't be unpacked: {error}"));
    let decoder = zstd::stream::read::Decoder::new(packed).map_err(malformed)?;
    let mut bytes = Vec::new();
    decoder
        .take(limit + 1)
        .read_to_end(&mut bytes)
        .map_err(malformed)?;
    if bytes.len() as u64 > limit {
        return Err(Error::Refused(
            "what came unpacks to more than it may".into(),
        ));
    }
    Ok(bytes)
}

/// What has come by now need not come again; where that can't be noted, it does.
async fn note(images: &BTreeMap<u8, Arc<Arriving>>) {
    for image in images.values() {
        if image.is_whole() {
            continue;
        }
        let image = image.clone();
        if let Err(error) = blocking(move || image.note()).await {
            let error = error.chain();
            tracing::warn!(error, "what has come of an image is not noted");
        }
    }
}

/// Until a guest waits for a page of one of these.
async fn asked(reads: &mut [watch::Receiver<u64>]) {
    let mut waits: Vec<_> = reads
        .iter_mut()
        .map(|read| Box::pin(read.changed()))
        .collect();
    poll_fn(|context| {
        let mut ready = waits.iter_mut().map(|wait| wait.as_mut().poll(context));
        if ready.any(|polled| polled.is_ready()) {
            Poll::Ready(())
        } else {
            Poll::Pending
        }
    })
    .await;
}

/// Tells what guests wait for and the source has not heard of.
async fn tell(
    line: &mut TargetLine,
    images: &BTreeMap<u8, Arc<Arriving>>,
    told: &mut BTreeMap<u8, u64>,
) -> Result<()> {
    for (&disk, image) in images {
        let next = told.entry(disk).or_default();
        for (number, range) in image.waiting(*next) {
            *next = number + 1;
            line.send(ToSource::Want {
                disk,
                first: range.start,
                count: u32::try_from(range.end - range.start).unwrap_or(u32::MAX),
            })
            .await?;
        }
    }
    line.flush().await
}
