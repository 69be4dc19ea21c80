//! The target's half of live rounds: pages that changed while the VM ran on are laid over the
//! working copy, which nobody else changes, with a tree of each image kept up to date.
//!
//! When the rounds are over, both sites know the same trees, so that the last exchange, which
//! verifies every image as in any other strategy, has next to nothing to say. What the rounds
//! brought is laid down on the disk while they go on: it is not written while the user waits.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use reconciler::{
    BlobAssembler, BlobPart, Holdings, ImageTree, Incoming, Offer, PAGE_SIZE, PageSet, Root,
    SlicePagesMut,
};
use tokio::runtime::Handle;
use vm_host::RamMapMut;

use super::exchange::{Talk, exchange};
use super::{Received, Work};
use crate::disks::WorkDisk;
use crate::error::{Error, Result};
use crate::line::TargetLine;
use crate::local::blocking;
use crate::phase::Phase;
use crate::protocol::{ImageKind, ToTarget};

/// The longest encoding of a set of pages: two numbers of ten bytes for each.
const SET_BYTES_A_PAGE: u64 = 20;

/// How far rounds have brought the working copy.
pub(super) struct Rounds {
    ram: ImageTree,
    disks: Vec<ImageTree>,
    /// Pages of RAM that the file on the disk has not, or has of before.
    unlaid: PageSet,
}

impl Rounds {
    /// What is left to write of this RAM.
    pub(super) fn unlaid(&self, ram: &ImageTree) -> PageSet {
        self.unlaid.union(&ram.differing(&self.ram))
    }
}

impl Work {
    /// What was received is where rounds begin.
    pub(crate) fn begin_rounds(&mut self, received: Received) -> Result<()> {
        let Received { ram, disks, .. } = received;
        let unlaid = ram.differing(&self.base.tree(ImageKind::Ram)?);
        // No replay is worth more than what was just received.
        self.replayed = None;
        self.rounds = Some(Rounds { ram, disks, unlaid });
        // They write to disks all the time.
        self.write_note(false);
        Ok(())
    }

    /// Whether rounds have begun.
    pub(crate) fn in_rounds(&self) -> bool {
        self.rounds.is_some()
    }

    /// The tree of an image that rounds have brought on.
    pub(super) fn brought_to(&self, kind: ImageKind) -> Option<ImageTree> {
        let rounds = self.rounds.as_ref()?;
        match kind {
            ImageKind::Device => None,
            ImageKind::Disk(index) => rounds.disks.get(usize::from(index)).cloned(),
            ImageKind::Ram => Some(rounds.ram.clone()),
        }
    }

    /// Receives pages of an image that changed; `first` announces which.
    pub(crate) async fn receive_changed(
        mut self,
        mut line: TargetLine,
        kind: ImageKind,
        first: BlobPart,
    ) -> Result<(Self, TargetLine)> {
        blocking(move || {
            let runtime = Handle::current();
            let mut talk = Talk {
                line: &mut line,
                runtime: &runtime,
                phase: Phase::Rounds,
                next: None,
                aside: self.dir.clone(),
            };
            self.take_changed(&mut talk, kind, first)?;
            Ok((self, line))
        })
        .await
    }

    fn take_changed(
        &mut self,
        talk: &mut Talk<'_>,
        kind: ImageKind,
        first: BlobPart,
    ) -> Result<()> {
        let Some(mut tree) = self.brought_to(kind) else {
            return Err(talk.unexpected("changes of an image that no round is about"));
        };
        let malformed = || Error::reconcile("the pages that changed are malformed");
        let limit = tree
            .pages()
            .saturating_mul(SET_BYTES_A_PAGE)
            .saturating_add(64);
        let mut assembler = BlobAssembler::new(limit);
        let mut part = first;
        let encoded = loop {
            if let Some(encoded) = assembler.push(&part).map_err(malformed())? {
                break encoded;
            }
            part = match talk.receive()? {
                ToTarget::Changed { kind: same, part } if same == kind => part,
                _ => return Err(talk.unexpected("half a set of pages")),
            };
        };
        let pages = PageSet::decode(&encoded, tree.pages()).map_err(malformed())?;
        let mut incoming = Incoming::new(&pages, tree.pages()).map_err(malformed())?;
        if let ImageKind::Disk(index) = kind {
            let mut disk = WorkDisk::open(&self.disk_path(usize::from(index)))?;
            talk.pages(|chunk| incoming.push(chunk, &mut disk, &mut tree))?;
            incoming.finish().map_err(malformed())?;
            disk.sync()?;
            // What is said of an image is what can be read of it.
            tree.rehash(&disk, &pages)
                .map_err(Error::reconcile("cannot hash a disk"))?;
        } else {
            let mut ram = RamMapMut::open(&self.ram_path())
                .map_err(Error::host("cannot write the guest's RAM"))?;
            let mut image = SlicePagesMut(&mut ram);
            talk.pages(|chunk| incoming.push(chunk, &mut image, &mut tree))?;
            incoming.finish().map_err(malformed())?;
            tree.rehash(&image, &pages)
                .map_err(Error::reconcile("cannot hash the guest's RAM"))?;
        }
        if let Some(rounds) = &mut self.rounds {
            if let ImageKind::Disk(index) = kind {
                if let Some(slot) = rounds.disks.get_mut(usize::from(index)) {
                    *slot = tree;
                }
            } else {
                rounds.unlaid = rounds.unlaid.union(&pages);
                rounds.ram = tree;
            }
        }
        Ok(())
    }

    /// A round is over: the roots of RAM and disks.
    pub(crate) async fn end_round(&mut self) -> Result<Option<(Root, Vec<Root>)>> {
        self.lay_more().await?;
        Ok(self.rounds.as_ref().map(|rounds| {
            let disks = rounds.disks.iter().map(ImageTree::root).collect();
            (rounds.ram.root(), disks)
        }))
    }

    /// Lays down what rounds have brought, beside the rounds that follow.
    async fn lay_more(&mut self) -> Result<()> {
        let (from, to) = (self.ram_path(), self.kept_ram());
        let Some(rounds) = &mut self.rounds else {
            return Ok(());
        };
        if rounds.unlaid.is_empty() || self.laying.as_ref().is_some_and(|task| !task.is_finished())
        {
            return Ok(());
        }
        if let Some(laid) = self.laying.take() {
            crate::local::joined(laid).await?;
        }
        // Pages that change while they are laid down are in the next set.
        let pages = std::mem::take(&mut rounds.unlaid);
        self.laying = Some(tokio::spawn(blocking(move || lay(&from, &to, &pages))));
        Ok(())
    }

    /// Verifies an image that rounds have brought on, against what the source says of it.
    ///
    /// All of it was read and hashed when the rounds began, and since then each page that they
    /// wrote, which nobody else could: the user does not wait until all is read once more.
    pub(super) fn receive_ahead(
        &mut self,
        talk: &mut Talk<'_>,
        kind: ImageKind,
        offer: &Offer,
        tree: &ImageTree,
    ) -> Result<ImageTree> {
        let holdings = Holdings {
            base: tree,
            base_reader: None,
            current: tree,
            places: &[],
        };
        if let ImageKind::Disk(index) = kind {
            let mut image = WorkDisk::open(&self.disk_path(usize::from(index)))?;
            let exchanged = exchange(talk, offer, &holdings, &mut image, Some(tree));
            // Also if it was cut off: its own tables are kept in memory.
            let synced = image.sync();
            let verified = exchanged?;
            synced?;
            return Ok(verified);
        }
        let mut ram = RamMapMut::open(&self.ram_path())
            .map_err(Error::host("cannot write the guest's RAM"))?;
        let mut image = SlicePagesMut(&mut ram);
        exchange(talk, offer, &holdings, &mut image, Some(tree))
    }
}

/// Copies pages from one file of RAM to another, durable.
fn lay(from: &PathBuf, to: &PathBuf, pages: &PageSet) -> Result<()> {
    /// Copied at a time.
    const BLOCK: u64 = 256;
    let source = File::open(from).map_err(Error::file("open", from))?;
    let target = File::options()
        .write(true)
        .open(to)
        .map_err(Error::file("open", to))?;
    let mut block = vec![0; BLOCK as usize * PAGE_SIZE];
    for run in pages.runs() {
        let mut first = run.start;
        while first < run.end {
            let count = BLOCK.min(run.end - first);
            let part = &mut block[..count as usize * PAGE_SIZE];
            let at = first * PAGE_SIZE as u64;
            source
                .read_exact_at(part, at)
                .map_err(Error::file("read", from))?;
            target
                .write_all_at(part, at)
                .map_err(Error::file("write", to))?;
            first += count;
        }
    }
    target.sync_all().map_err(Error::file("write", to))
}
