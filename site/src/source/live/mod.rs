//! Live pre-copy: the VM runs on while its pages go over, and again when they change.
//!
//! ```text
//!  copy      RAM and disks are copied while they change; the copy is reconciled like any state,
//!            against the stale copy at the target, what a replay made of it, or nothing
//!  rounds    what has changed since goes over as differences to what the target has by now
//!            ([`reconciler::Shadow`]), pages that change all the time last
//!  stop      the VM stands still; what still differs goes over in the same way
//! ```
//!
//! After each round both sites compare the roots of what the target has. After the last, every
//! image is verified as in all other strategies. Nothing that a running guest was read as is
//! relied on: the last round compares all of it with the guest that stands still.
//!
//! The VM is not slowed down, unless by the share of a processor that looking for changes takes:
//! QEMU throttles a guest's processors only for its own migration.

mod end;
mod scan;

use std::sync::Arc;
use std::time::{Duration, Instant};

use reconciler::{
    Captured, Codec, EncodeOptions, EncodeStats, PageChunk, PageIndex, PageSet, ReadPages,
    References, Shadow, blob_parts,
};
use tokio::sync::mpsc;

use super::Migration;
use crate::disks::DiskImage;
use crate::error::{Error, Result};
use crate::exchange::{self, Outgoing, Sent};
use crate::line::Line;
use crate::local::{self, Live};
use crate::phase::Phase;
use crate::plan;
use crate::protocol::{ImageKind, ImageOutcome, ToSource, ToTarget};
use crate::report::{LiveReport, RoundReport, RoundsEnd};
use crate::state::{Base, State, with};
use crate::work::Workplace;

pub(crate) use end::Judge;
use end::{Round, expected};
pub(crate) use scan::SHARE;
use scan::{Batch, Disk, Heat, OfBase, Pace};

/// Pages of a round are many and differ in little: what compresses them fast keeps the line
/// busy, and the guest is left the processor.
const CODEC: Codec = Codec::Zstd(3);

/// Chunks between the compressor and the socket; each is at most 256 KiB.
const QUEUE: usize = 4;

/// Less tells nothing about a line.
const TELLING_BYTES: u64 = 1 << 20;

/// When rounds are enough.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LiveOptions {
    /// The VM is stopped once it is expected to stand still no longer.
    pub downtime: Duration,
    /// No more rounds than these.
    pub rounds: u32,
    /// First the target replays the log on its stale copy, and rounds begin with that.
    pub replay: bool,
}

impl Default for LiveOptions {
    fn default() -> Self {
        Self {
            downtime: Duration::from_secs(1),
            rounds: 30,
            replay: false,
        }
    }
}

/// What the target has after the rounds, and what they took.
pub(super) struct Ahead {
    ram: Arc<Shadow>,
    disks: Vec<Arc<Shadow>>,
    /// What was sent, to be accounted for.
    pub(super) sent: Vec<Sent>,
    pub(super) report: LiveReport,
}

impl Ahead {
    /// The last exchange is over: puts what the rounds sent before what it did.
    pub(super) fn close(mut self, sent: &mut Vec<Sent>) -> LiveReport {
        let last: u64 = sent.iter().map(|image| image.payload + image.hashes).sum();
        self.report.last_bytes += last;
        sent.splice(..0, self.sent);
        self.report
    }
}

/// What is being brought over.
struct Images {
    ram: Arc<Shadow>,
    disks: Vec<(Arc<Disk>, Arc<Shadow>)>,
}

impl Migration<'_> {
    /// Rounds until the VM would stand still briefly enough, or they gain nothing more.
    pub(super) async fn rounds(
        &mut self,
        line: &mut Line,
        live: &Live,
        base: &Arc<Base>,
        rate: f64,
        replayed: bool,
    ) -> Result<Ahead> {
        self.clock.enter(Phase::Rounds);
        let LiveOptions {
            downtime, rounds, ..
        } = self.options.live;
        let mut judge = Judge::new(downtime, rounds);
        let mut last = Instant::now();
        if replayed {
            // The replay ends where it is; the copy is told against what it made of the base.
            line.send(ToTarget::Freeze).await?;
            line.flush().await?;
        }
        let images = self.images(live, base)?;
        let mut looked = self.copy(&images).await?;
        // Standing still, both sites look at all of RAM once.
        let besides = plan::besides(self.vm).unwrap_or(2.0 * looked.busy.as_secs_f64());

        let (mut sent, mut rate) = (
            self.send_copy(line, &images, base, rate, replayed).await?,
            rate,
        );
        let bytes: u64 = sent.iter().map(|image| image.payload).sum();
        let seconds: f64 = sent.iter().map(|image| image.seconds).sum();
        if bytes >= TELLING_BYTES && seconds > 0.0 {
            rate = bytes as f64 * 8.0 / seconds;
        }
        line.send(ToTarget::Rounds).await?;
        line.flush().await?;
        let mut before = last.elapsed();
        let mut report = LiveReport {
            rounds: vec![RoundReport {
                pages: images.held(),
                bytes,
                seconds: before.as_secs_f64(),
                expected_downtime: expected(
                    Round {
                        bytes,
                        took: before,
                        before,
                    },
                    rate,
                    besides,
                ),
                ..RoundReport::default()
            }],
            ended: RoundsEnd::Rounds,
            expected_downtime: 0.0,
            last_pages: 0,
            last_bytes: 0,
            scan_seconds: 0.0,
            scanned_bytes: 0,
            shadow_bytes: 0,
        };
        let mut heat = Heat::new(images.ram.pages());
        loop {
            last = Instant::now();
            let done = self.round(line, &images, heat).await?;
            heat = done.heat;
            let took = last.elapsed();
            looked.busy += done.looked.busy;
            looked.bytes += done.looked.bytes;
            let mut round = done.report;
            let bytes = round.bytes;
            let would = expected(
                Round {
                    bytes,
                    took,
                    before,
                },
                rate,
                besides,
            );
            before = took;
            round.seconds = took.as_secs_f64();
            round.expected_downtime = would;
            self.progress.note(&told(report.rounds.len(), &round));
            report.rounds.push(round);
            sent.extend(done.sent);
            if let Some(ended) = judge.after(would) {
                report.ended = ended;
                report.expected_downtime = would;
                break;
            }
        }
        report.scan_seconds = looked.busy.as_secs_f64();
        report.scanned_bytes = looked.bytes;
        report.shadow_bytes = images.held() * reconciler::PAGE_SIZE as u64;
        Ok(Ahead {
            ram: images.ram,
            disks: images.disks.into_iter().map(|(_, shadow)| shadow).collect(),
            sent,
            report,
        })
    }

    fn images(&self, live: &Live, base: &Arc<Base>) -> Result<Images> {
        let dir = Workplace::Incoming.dir(self.vm);
        crate::files::make_dir(&dir)?;
        let shadow = |kind| -> Result<Arc<Shadow>> {
            let tree = base.tree(kind)?;
            let reader = OfBase {
                base: base.clone(),
                kind,
                pages: tree.pages(),
            };
            // Without a name: it goes when nobody has it open, however this ends.
            tempfile::tempfile_in(&dir)
                .and_then(|file| Shadow::over(Some(Box::new(reader)), tree, file))
                .map(Arc::new)
                .map_err(Error::file("note what the target has in", &dir))
        };
        let disks = (0..self.record.disks.len()).map(|index| {
            let disk = Disk {
                vm: self.vm.clone(),
                record: self.record.clone(),
                live: live.clone(),
                index,
            };
            // `VmRecord::DISKS` is far below 256.
            Ok((Arc::new(disk), shadow(ImageKind::Disk(index as u8))?))
        });
        Ok(Images {
            ram: shadow(ImageKind::Ram)?,
            disks: disks.collect::<Result<_>>()?,
        })
    }

    /// Copies RAM and disks into their shadows.
    async fn copy(&self, images: &Images) -> Result<scan::Looked> {
        let path = self.vm.runtime_dir("live")?.join("ram.img");
        let (ram, disks) = (images.ram.clone(), images.disks.clone());
        local::blocking(move || {
            let mut pace = Pace::new(SHARE);
            scan::copy(&scan::open_ram(&path)?, &ram, &mut pace)?;
            for (disk, shadow) in &disks {
                passable(disk.copy(shadow, &mut pace));
            }
            Ok(pace.looked)
        })
        .await
    }

    /// Sends the copy as any state is sent: what lies on a disk, or elsewhere, is found there.
    async fn send_copy(
        &mut self,
        line: &mut Line,
        images: &Images,
        base: &Arc<Base>,
        rate: f64,
        replayed: bool,
    ) -> Result<Vec<Sent>> {
        let disks = images.disks.iter().zip(base.disks());
        let disks = disks.map(|((_, shadow), (image, _))| {
            let copy = DiskImage::Copied(shadow.clone(), image.bytes());
            (copy, shadow.tree())
        });
        // The device state of a guest that runs can't be had: it stays the base's for now.
        let device = base.device().to_vec();
        let state = Arc::new(State::of_copies(&images.ram, disks.collect(), device)?);
        let out = Outgoing {
            state: &state,
            base,
            replayed,
            twin: None,
            rate,
            progress: self.progress,
        };
        exchange::send_images(line, &out, &mut |_| {}).await
    }

    /// One round over all images: what it sent, by image as well, and how the pages' heat is now.
    async fn round(&self, line: &mut Line, images: &Images, mut heat: Heat) -> Result<RoundDone> {
        let path = self.vm.runtime_dir("live")?.join("ram.img");
        let (sender, mut batches) = mpsc::channel::<Batch>(1);
        let (ram, disks) = (images.ram.clone(), images.disks.clone());
        let looking = tokio::spawn(local::blocking(move || {
            let mut pace = Pace::new(SHARE);
            for (disk, shadow) in &disks {
                passable(disk.send(shadow, &mut pace, &sender));
            }
            // Last, so that its hot pages come last of all.
            let image = scan::open_ram(&path)?;
            scan::ram(&image, &ram, &mut heat, &mut pace, &sender)?;
            Ok((pace.looked, heat))
        }));
        let mut report = RoundReport::default();
        let mut all = Vec::new();
        while let Some(batch) = batches.recv().await {
            let Some(shadow) = images.shadow(batch.kind) else {
                continue;
            };
            let pages = batch.captured.len() as u64;
            let captured = Arc::new(batch.captured);
            let stats = self.push(line, batch.kind, &captured, &shadow).await?;
            with(&shadow, move |shadow| {
                shadow
                    .keep(&captured)
                    .map_err(Error::reconcile("cannot note what was sent"))
            })
            .await?;
            report.pages += pages;
            report.hot += if batch.hot { pages } else { 0 };
            report.deltas += stats.delta_pages;
            report.bytes += stats.bytes();
            self.progress.advance(Phase::Rounds, report.bytes, None);
            all.push(accounted(batch.kind, &stats));
        }
        let (looked, heat) = local::joined(looking).await?;
        line.send(ToTarget::RoundEnd).await?;
        line.flush().await?;
        let ToSource::Rounded { ram, disks } = line.recv(Phase::Rounds).await? else {
            return Err(line.unexpected(Phase::Rounds, "no word that a round is applied"));
        };
        let same = images.ram.with_tree(|tree| tree.root() == ram)
            && images.disks.len() == disks.len()
            && images
                .disks
                .iter()
                .zip(&disks)
                .all(|((_, shadow), root)| shadow.with_tree(|tree| tree.root() == *root));
        if !same {
            return Err(line.unexpected(Phase::Rounds, "it has other pages than were sent to it"));
        }
        Ok(RoundDone {
            report,
            sent: all,
            looked,
            heat,
        })
    }

    /// Sends captured pages as differences to the shadow.
    async fn push(
        &self,
        line: &mut Line,
        kind: ImageKind,
        captured: &Arc<Captured>,
        shadow: &Arc<Shadow>,
    ) -> Result<EncodeStats> {
        let pages: PageSet = captured.indices().iter().copied().collect();
        let (captured, shadow) = (captured.clone(), shadow.clone());
        send_changed(line, kind, &pages, move |sink| {
            encode(&*captured, &shadow, captured.indices(), sink)
        })
        .await
    }

    /// What still differs, now that the VM stands still. What the target has then is what the
    /// images are verified against.
    pub(super) async fn last_round(
        &mut self,
        line: &mut Line,
        ahead: &mut Ahead,
        state: &Arc<State>,
        base: Option<u64>,
    ) -> Result<Arc<Base>> {
        let disks = ahead.disks.iter().enumerate();
        let disks = disks.map(|(index, shadow)| (ImageKind::Disk(index as u8), shadow.clone()));
        let ram = (ImageKind::Ram, ahead.ram.clone());
        for (kind, shadow) in disks.chain([ram]) {
            self.clock.enter(kind.phase());
            let changed = shadow.with_tree(|there| state.tree(kind).differing(there));
            if changed.is_empty() {
                continue;
            }
            let (state, pages) = (state.clone(), changed.iter().collect::<Vec<_>>());
            let stats = send_changed(line, kind, &changed, move |sink| {
                state.with_pages(kind, |image| encode(image, &shadow, &pages, sink))
            })
            .await?;
            ahead.report.last_pages += changed.len();
            ahead.report.last_bytes += stats.bytes();
            ahead.sent.push(accounted(kind, &stats));
        }
        let (vm, record, state) = (self.vm.clone(), self.record.clone(), state.clone());
        let load = move || {
            let base = Base::load(&vm, &record, base)?;
            let ram = state.tree(ImageKind::Ram).clone();
            Ok(Arc::new(base.ahead(ram, state.disk_trees())))
        };
        local::blocking(load).await
    }
}

/// A round that is over.
struct RoundDone {
    report: RoundReport,
    /// What it sent, to be accounted for.
    sent: Vec<Sent>,
    looked: scan::Looked,
    heat: Heat,
}

impl Images {
    fn shadow(&self, kind: ImageKind) -> Option<Arc<Shadow>> {
        match kind {
            ImageKind::Device => None,
            ImageKind::Disk(index) => {
                let disk = self.disks.get(usize::from(index));
                disk.map(|(_, shadow)| shadow.clone())
            }
            ImageKind::Ram => Some(self.ram.clone()),
        }
    }

    /// Pages that all shadows hold.
    fn held(&self) -> u64 {
        let disks = self.disks.iter().map(|(_, shadow)| shadow.held());
        disks.sum::<u64>() + self.ram.held()
    }
}

/// A disk that can't be read while QEMU writes to it is left for later: the last round reads it
/// standing still.
fn passable(outcome: Result<()>) {
    if let Err(error) = outcome {
        tracing::debug!(error = error.chain(), "a disk waits for the next round");
    }
}

fn encode(
    image: &dyn ReadPages,
    shadow: &Shadow,
    pages: &[PageIndex],
    sink: &mut dyn FnMut(PageChunk) -> Result<(), reconciler::Closed>,
) -> Result<EncodeStats> {
    let how = EncodeOptions {
        codec: CODEC,
        workers: 0,
    };
    reconciler::encode_pages(image, References::base(Some(shadow)), pages, how, sink)
        .map_err(Error::reconcile("cannot read and compress pages"))
}

/// Announces pages, and sends the chunks that `encode` makes of them.
async fn send_changed<E>(
    line: &mut Line,
    kind: ImageKind,
    pages: &PageSet,
    encode: E,
) -> Result<EncodeStats>
where
    E: FnOnce(&mut dyn FnMut(PageChunk) -> Result<(), reconciler::Closed>) -> Result<EncodeStats>
        + Send
        + 'static,
{
    for part in blob_parts(&pages.encode()) {
        line.send(ToTarget::Changed { kind, part }).await?;
    }
    let (sender, mut chunks) = mpsc::channel::<PageChunk>(QUEUE);
    let encoding = tokio::spawn(local::blocking(move || {
        encode(&mut |chunk| sender.blocking_send(chunk).map_err(|_| reconciler::Closed))
    }));
    while let Some(chunk) = chunks.recv().await {
        line.send(ToTarget::Pages(chunk)).await?;
    }
    line.send(ToTarget::PagesEnd).await?;
    line.flush().await?;
    local::joined(encoding).await
}

/// What a batch took, as the account of a migration wants it. Its time says nothing of the line.
fn accounted(kind: ImageKind, stats: &EncodeStats) -> Sent {
    let pages = [
        ("round_literal", stats.literal_pages),
        ("round_delta", stats.delta_pages),
    ];
    let pages = pages.into_iter().filter(|(_, count)| *count > 0);
    Sent {
        kind,
        hashes: 0,
        payload: stats.bytes(),
        seconds: 0.0,
        outcome: ImageOutcome {
            root: reconciler::Root([0; 32]),
            pages: pages
                .map(|(name, count)| (name.to_owned(), count))
                .collect(),
            refetched: 0,
        },
    }
}

/// A round in a sentence.
fn told(number: usize, round: &RoundReport) -> String {
    format!(
        "round {number}: {} pages, {:.1} KiB, {:.1} s; stopped now it would stand still for about \
         {:.1} s",
        round.pages,
        round.bytes as f64 / 1024.0,
        round.seconds,
        round.expected_downtime,
    )
}
