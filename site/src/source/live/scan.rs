//! Finding what a running guest has changed: by hashing, for QEMU tells nobody what it writes.
//!
//! RAM is read through its file, not through a mapping: what is copied is copied once, whatever
//! the guest writes meanwhile. Looking takes one thread, and no more of a processor than its
//! share: after each stretch of work it rests as long as that demands.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use reconciler::{Captured, FilePages, PAGE_SIZE, Page, PageHash, PageIndex, ReadPages, Shadow};
use tokio::sync::mpsc;

use crate::disks::{self, DiskImage};
use crate::error::{Error, Result};
use crate::local::Live;
use crate::protocol::ImageKind;
use crate::store::VmDir;
use crate::vm::VmRecord;

/// Of one processor, what looking for changes takes at most: the guest has the rest, and the
/// other processors.
pub(crate) const SHARE: f64 = 0.5;

/// Pages looked at in one stretch: 1 MiB.
const STRETCH: u64 = 256;

/// Pages that are sent in one batch, and held in memory: 16 MiB.
const BATCH: usize = 4096;

/// How much was looked at, and what that took.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Looked {
    /// Time at work.
    pub(super) busy: Duration,
    /// Bytes read and hashed.
    pub(super) bytes: u64,
}

/// Works for its share of the time.
pub(super) struct Pace {
    share: f64,
    pub(super) looked: Looked,
}

impl Pace {
    pub(super) fn new(share: f64) -> Self {
        Self {
            share: share.clamp(0.01, 1.0),
            looked: Looked::default(),
        }
    }

    /// So long it worked on so many bytes; it rests now.
    fn worked(&mut self, since: Instant, bytes: u64) {
        let worked = since.elapsed();
        self.looked.busy += worked;
        self.looked.bytes += bytes;
        std::thread::sleep(worked.mul_f64(1.0 / self.share - 1.0));
    }
}

/// In which of the last eight rounds each page had changed; the newest is the highest bit.
pub(super) struct Heat(Vec<u8>);

impl Heat {
    pub(super) fn new(pages: u64) -> Self {
        Self(vec![0; pages as usize])
    }

    /// Whether a page changed in both rounds before.
    fn is_hot(&self, index: PageIndex) -> bool {
        let rounds = self.0.get(index.0 as usize).copied();
        rounds.unwrap_or_default() >> 6 == 0b11
    }

    fn note(&mut self, index: PageIndex, changed: bool) {
        if let Some(rounds) = self.0.get_mut(index.0 as usize) {
            *rounds = *rounds >> 1 | u8::from(changed) << 7;
        }
    }
}

/// Pages that wait to be sent.
pub(super) struct Batch {
    pub(super) kind: ImageKind,
    pub(super) captured: Captured,
    /// They changed in the rounds before, too.
    pub(super) hot: bool,
}

/// The RAM of a running guest, as an image that can be read.
pub(super) fn open_ram(path: &Path) -> Result<FilePages> {
    File::open(path)
        .and_then(FilePages::new)
        .map_err(Error::file("read the guest's RAM in", path))
}

/// Copies all that differs from the shadow into it.
pub(super) fn copy(image: &dyn ReadPages, shadow: &Shadow, pace: &mut Pace) -> Result<()> {
    let mut captured = Captured::of(shadow.pages());
    stretches(image, shadow, pace, &mut |index, hash, page| {
        captured.push(index, hash, page).map_err(cannot_note())?;
        if captured.len() == BATCH {
            shadow.keep(&captured).map_err(cannot_note())?;
            captured = Captured::of(shadow.pages());
        }
        Ok(true)
    })?;
    shadow.keep(&captured).map_err(cannot_note())
}

/// Hands all of RAM that differs from the shadow to `out`, pages that change all the time last
/// and as they are then. Ends early when nobody takes them.
pub(super) fn ram(
    image: &dyn ReadPages,
    shadow: &Shadow,
    heat: &mut Heat,
    pace: &mut Pace,
    out: &mpsc::Sender<Batch>,
) -> Result<()> {
    let mut hot = Vec::new();
    let mut outlet = Outlet::new(ImageKind::Ram, shadow, false, out);
    let mut next = 0;
    stretches(image, shadow, pace, &mut |index, hash, page| {
        for unchanged in next..index.0 {
            heat.note(PageIndex(unchanged), false);
        }
        next = index.0 + 1;
        let was_hot = heat.is_hot(index);
        heat.note(index, true);
        if was_hot {
            hot.push(index);
            return Ok(true);
        }
        outlet.take(index, hash, page)
    })?;
    for unchanged in next..image.pages() {
        heat.note(PageIndex(unchanged), false);
    }
    if !outlet.end() {
        return Ok(());
    }
    let outlet = Outlet::new(ImageKind::Ram, shadow, true, out);
    recapture(image, shadow, &hot, outlet)
}

/// Hands over those of these pages that still differ from the shadow.
fn recapture(
    image: &dyn ReadPages,
    shadow: &Shadow,
    pages: &[PageIndex],
    mut outlet: Outlet<'_>,
) -> Result<()> {
    for &index in pages {
        let mut page = reconciler::ZERO_PAGE;
        image
            .read(index, &mut page)
            .map_err(|source| cannot_read(index, source))?;
        let hash = PageHash::of(&page);
        if shadow.with_tree(|tree| tree.leaf(index)) != hash && !outlet.take(index, hash, &page)? {
            return Ok(());
        }
    }
    outlet.end();
    Ok(())
}

/// Collects pages into batches.
struct Outlet<'a> {
    pages: u64,
    batch: Batch,
    out: &'a mpsc::Sender<Batch>,
}

impl<'a> Outlet<'a> {
    fn new(kind: ImageKind, shadow: &Shadow, hot: bool, out: &'a mpsc::Sender<Batch>) -> Self {
        let pages = shadow.pages();
        let captured = Captured::of(pages);
        Self {
            pages,
            batch: Batch {
                kind,
                captured,
                hot,
            },
            out,
        }
    }

    /// Whether somebody takes more.
    fn take(&mut self, index: PageIndex, hash: PageHash, page: &Page) -> Result<bool> {
        let pushed = self.batch.captured.push(index, hash, page);
        pushed.map_err(cannot_note())?;
        Ok(self.batch.captured.len() < BATCH || self.end())
    }

    /// Hands over what there is; whether somebody takes more.
    fn end(&mut self) -> bool {
        let captured = Captured::of(self.pages);
        let captured = std::mem::replace(&mut self.batch.captured, captured);
        captured.is_empty() || {
            let batch = Batch {
                captured,
                ..self.batch
            };
            self.out.blocking_send(batch).is_ok()
        }
    }
}

/// Hands every page that differs from the shadow to `take`, until that says that it is enough.
fn stretches(
    image: &dyn ReadPages,
    shadow: &Shadow,
    pace: &mut Pace,
    take: &mut dyn FnMut(PageIndex, PageHash, &Page) -> Result<bool>,
) -> Result<()> {
    let pages = shadow.pages();
    let mut buffer = vec![0; STRETCH as usize * PAGE_SIZE];
    let mut first = 0;
    while first < pages {
        let count = STRETCH.min(pages - first);
        let stretch = first..first + count;
        first = stretch.end;
        let begun = Instant::now();
        let known_zero = image.known_zero(PageIndex(stretch.start), count);
        if known_zero
            && shadow.with_tree(|tree| {
                stretch
                    .clone()
                    .all(|page| tree.leaf(PageIndex(page)).is_zero())
            })
        {
            continue;
        }
        let part = &mut buffer[..count as usize * PAGE_SIZE];
        image
            .read_many(PageIndex(stretch.start), part)
            .map_err(|source| cannot_read(PageIndex(stretch.start), source))?;
        let hashed: Vec<_> = part
            .as_chunks::<PAGE_SIZE>()
            .0
            .iter()
            .map(|page| (PageHash::of(page), page))
            .collect();
        let changed = shadow.with_tree(|tree| {
            let named = stretch.map(PageIndex).zip(hashed);
            named
                .filter(|(index, (hash, _))| tree.leaf(*index) != *hash)
                .collect::<Vec<_>>()
        });
        pace.worked(begun, count * PAGE_SIZE as u64);
        for (index, (hash, page)) in changed {
            if !take(index, hash, page)? {
                return Ok(());
            }
        }
    }
    Ok(())
}

/// What a running guest's disk holds, as far as QEMU has written it to its file; what it has
/// not is found later.
pub(super) struct Disk {
    pub(super) vm: VmDir,
    pub(super) record: VmRecord,
    pub(super) live: Live,
    pub(super) index: usize,
}

impl Disk {
    fn kind(&self) -> ImageKind {
        // `VmRecord::DISKS` is far below 256.
        ImageKind::Disk(self.index as u8)
    }

    /// The pages that differ from the shadow, with an image to read them from.
    fn changed(&self, shadow: &Shadow, pace: &mut Pace) -> Result<(DiskImage, Vec<PageIndex>)> {
        let begun = Instant::now();
        let paths = self.live.overlay_paths(&self.vm);
        let top = paths
            .get(self.index)
            .ok_or_else(|| Error::Refused(format!("the running VM has no disk {}", self.index)))?;
        let image = DiskImage::open(top)?;
        let since = self.live.generation;
        let tree = disks::tree_since(&self.vm, &self.record, since, self.index, &image)?;
        let changed: Vec<_> = shadow.with_tree(|there| tree.differing(there).iter().collect());
        pace.worked(begun, changed.len() as u64 * PAGE_SIZE as u64);
        Ok((image, changed))
    }

    /// Copies all that differs from the shadow into it.
    pub(super) fn copy(&self, shadow: &Shadow, pace: &mut Pace) -> Result<()> {
        let (image, changed) = self.changed(shadow, pace)?;
        for part in changed.chunks(BATCH) {
            let mut captured = Captured::of(shadow.pages());
            for &index in part {
                let mut page = reconciler::ZERO_PAGE;
                image
                    .read(index, &mut page)
                    .map_err(|source| cannot_read(index, source))?;
                captured
                    .push(index, PageHash::of(&page), &page)
                    .map_err(cannot_note())?;
            }
            shadow.keep(&captured).map_err(cannot_note())?;
        }
        Ok(())
    }

    /// Hands all that differs from the shadow to `out`.
    pub(super) fn send(
        &self,
        shadow: &Shadow,
        pace: &mut Pace,
        out: &mpsc::Sender<Batch>,
    ) -> Result<()> {
        let (image, changed) = self.changed(shadow, pace)?;
        let outlet = Outlet::new(self.kind(), shadow, false, out);
        recapture(&image, shadow, &changed, outlet)
    }
}

/// A page of an image that both sites have, to be read for as long as it is needed.
pub(super) struct OfBase {
    pub(super) base: Arc<crate::state::Base>,
    pub(super) kind: ImageKind,
    pub(super) pages: u64,
}

impl ReadPages for OfBase {
    fn pages(&self) -> u64 {
        self.pages
    }

    fn read(&self, index: PageIndex, into: &mut Page) -> std::io::Result<()> {
        self.base.with_pages(self.kind, |pages| {
            if let Some(pages) = pages {
                return pages.read(index, into);
            }
            into.fill(0);
            Ok(())
        })
    }
}

fn cannot_read(index: PageIndex, source: std::io::Error) -> Error {
    Error::reconcile("cannot copy a page of the running guest")(reconciler::Error::Read {
        image: "the running guest",
        page: index,
        source,
    })
}

fn cannot_note() -> impl FnOnce(reconciler::Error) -> Error {
    Error::reconcile("cannot note what the target has")
}

#[cfg(test)]
mod tests {
    use reconciler::{ImageTree, SlicePages, no_progress};

    use super::*;

    fn shadow(pages: u64) -> Shadow {
        let tree = ImageTree::zero(pages).unwrap();
        Shadow::over(None, tree, tempfile::tempfile().unwrap()).unwrap()
    }

    fn pace() -> Pace {
        Pace::new(1.0)
    }

    /// What a round hands out, kept in the shadow as it goes.
    fn round(image: &[u8], shadow: &Shadow, heat: &mut Heat) -> Vec<(bool, Vec<u64>)> {
        let (sender, mut batches) = mpsc::channel(100);
        ram(&SlicePages(image), shadow, heat, &mut pace(), &sender).unwrap();
        drop(sender);
        let mut out = Vec::new();
        while let Ok(batch) = batches.try_recv() {
            shadow.keep(&batch.captured).unwrap();
            let indices = batch.captured.indices().iter();
            out.push((batch.hot, indices.map(|index| index.0).collect()));
        }
        out
    }

    #[test]
    fn pages_that_change_all_the_time_come_last() {
        let mut image = vec![0; 600 * PAGE_SIZE];
        let (shadow, mut heat) = (shadow(600), Heat::new(600));
        let mut change = |image: &mut Vec<u8>, pages: &[usize]| {
            for page in pages {
                image[page * PAGE_SIZE] += 1;
            }
            round(image, &shadow, &mut heat)
        };
        assert_eq!(change(&mut image, &[1, 300]), [(false, vec![1, 300])]);
        assert_eq!(change(&mut image, &[1, 299]), [(false, vec![1, 299])]);
        assert_eq!(
            change(&mut image, &[1, 500]),
            [(false, vec![500]), (true, vec![1])]
        );
        assert_eq!(change(&mut image, &[]), []);
        // It has come to rest, and has to earn its place again.
        assert_eq!(change(&mut image, &[1, 2]), [(false, vec![1, 2])]);
        let tree = ImageTree::build(&SlicePages(&image), &no_progress).unwrap();
        assert_eq!(shadow.tree(), tree);
    }

    #[test]
    fn a_copy_has_all_that_differs() {
        let mut image = vec![0; 10_000 * PAGE_SIZE];
        for page in (0..10_000).step_by(2) {
            image[page * PAGE_SIZE + 7] = (page % 251) as u8 + 1;
        }
        let shadow = shadow(10_000);
        let mut pace = pace();
        copy(&SlicePages(&image), &shadow, &mut pace).unwrap();
        let tree = ImageTree::build(&SlicePages(&image), &no_progress).unwrap();
        assert_eq!(shadow.tree(), tree);
        assert_eq!(shadow.held(), 5000);
        assert_eq!(pace.looked.bytes, image.len() as u64);
    }

    #[test]
    fn looking_takes_no_more_than_its_share() {
        let image = vec![1; 2000 * PAGE_SIZE];
        let mut pace = Pace::new(0.25);
        let begun = Instant::now();
        copy(&SlicePages(&image), &shadow(2000), &mut pace).unwrap();
        assert!(begun.elapsed() >= pace.looked.busy.mul_f64(4.0));
    }

    #[test]
    fn nobody_who_takes_ends_the_search() {
        let image = vec![1; 3 * BATCH * PAGE_SIZE];
        let pages = 3 * BATCH as u64;
        let (sender, batches) = mpsc::channel(1);
        drop(batches);
        let mut pace = pace();
        let (shadow, mut heat) = (shadow(pages), Heat::new(pages));
        ram(&SlicePages(&image), &shadow, &mut heat, &mut pace, &sender).unwrap();
        assert!(pace.looked.bytes < image.len() as u64 / 2);
    }
}
