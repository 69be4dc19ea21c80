//! The target's working copy of a state while it arrives: RAM, overlays and device state in
//! folders of their own, which become a generation when all is verified, or go without a trace.

mod device;
mod exchange;
mod kept;
mod place;
mod receive;
mod rounds;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use reconciler::{ImageTree, Layout, PageHash, PageSet, Processes, Rearrangement, SlicePages};
use tokio::task::JoinHandle;
use vm_host::RamMapMut;

use crate::disks::{self};
use crate::error::{Error, Result};
use crate::files;
use crate::generation::{GenerationFiles, Manifest};
use crate::generations;
use crate::layout;
use crate::local::{blocking, joined};
use crate::protocol::{Hello, ImageKind};
use crate::state::{Base, tree_of};
use crate::store::VmDir;
use crate::vm::{Id, VmRecord};

pub(crate) use kept::KeptNote;
pub(crate) use place::Workplace;
use rounds::Rounds;

/// A state in the making.
pub(crate) struct Work {
    vm: VmDir,
    record: VmRecord,
    dir: PathBuf,
    runtime: PathBuf,
    base_number: Option<u64>,
    base: Arc<Base>,
    device: Vec<u8>,
    /// The tree of RAM as the replay left it; without one, RAM is the base's.
    replayed: Option<ImageTree>,
    /// Hashes RAM meanwhile, where no replay is to come.
    hashing: Option<JoinHandle<Result<ImageTree>>>,
    /// How the source's RAM lies, as far as it said so.
    layout: Option<Layout>,
    /// How the source's device state is put together from the replayed one, if it said so.
    rearrangement: Option<Rearrangement>,
    /// Lays the base's RAM down on the disk meanwhile.
    laying: Option<JoinHandle<Result<()>>>,
    /// What rounds of pre-copy have made of RAM and disks, if there were some.
    rounds: Option<Rounds>,
    /// What is noted of it, once images come.
    note: Option<KeptNote>,
}

/// The trees of a state that was received and verified.
pub(crate) struct Received {
    ram: ImageTree,
    disks: Vec<ImageTree>,
    device: ImageTree,
}

impl Work {
    /// Makes a working copy of a generation, or of the bare base images, that is to become a
    /// generation of its own. Of the base images these pages are not here.
    pub(crate) async fn prepare(
        vm: &VmDir,
        record: &VmRecord,
        transfer: Id,
        base_number: Option<u64>,
        absent: Vec<PageSet>,
    ) -> Result<Self> {
        let base = (base_number, absent);
        let mut work = Self::prepare_fork(vm, record, Workplace::Incoming, transfer, base).await?;
        work.laying = Some(work.lay_ram()?);
        Ok(work)
    }

    /// Makes a working copy of a generation, or of the bare base images, that will be thrown
    /// away.
    pub(crate) async fn prepare_fork(
        vm: &VmDir,
        record: &VmRecord,
        place: Workplace,
        transfer: Id,
        (base_number, absent): (Option<u64>, Vec<PageSet>),
    ) -> Result<Self> {
        let (vm, record) = (vm.clone(), record.clone());
        blocking(move || {
            let dir = place.dir(&vm).join(transfer.to_string());
            let runtime = match place {
                // Each has its own.
                Workplace::Packing => dir.join("ram"),
                Workplace::Incoming | Workplace::Following => place.runtime(&vm)?,
            };
            files::remove_dir(&dir)?;
            files::remove_dir(&runtime)?;
            files::make_dir(&dir)?;
            files::make_dir(&runtime)?;
            let base = Arc::new(Base::load_without(&vm, &record, base_number, &absent)?);
            let device = base.device().to_vec();
            let work = Self::fresh(vm, record, (dir, runtime), (base_number, base), device);
            if let Some(number) = base_number {
                files::copy_sparse(&work.vm.generation(number).ram(), &work.ram_path())?;
            } else {
                let bytes = work.record.hardware.memory_bytes();
                RamMapMut::create(&work.ram_path(), bytes)
                    .map_err(Error::host("cannot make room for the guest's RAM"))?;
            }
            for index in 0..work.record.disks.len() {
                let overlay = work.disk_path(index);
                disks::overlay_on(&work.vm, &work.record, base_number, index, &overlay)?;
            }
            Ok(work)
        })
        .await
    }

    /// A copy of which nothing is known but what is in its folders.
    fn fresh(
        vm: VmDir,
        record: VmRecord,
        (dir, runtime): (PathBuf, PathBuf),
        (base_number, base): (Option<u64>, Arc<Base>),
        device: Vec<u8>,
    ) -> Self {
        Self {
            vm,
            record,
            dir,
            runtime,
            base_number,
            base,
            device,
            replayed: None,
            hashing: None,
            layout: None,
            rearrangement: None,
            laying: None,
            rounds: None,
            note: None,
        }
    }

    /// Takes up a working copy that an agent left that died, into which images came.
    ///
    /// Disks that it was writing to are not whole: they begin at the base again.
    pub(crate) async fn reopen(
        vm: &VmDir,
        hello: &Hello,
        base_number: Option<u64>,
        disks_whole: bool,
    ) -> Result<Self> {
        let dir = Workplace::Incoming.dir(vm).join(hello.transfer.to_string());
        let runtime = Workplace::Incoming.runtime(vm)?;
        let (vm, record) = (vm.clone(), hello.vm.clone());
        let mut work = blocking(move || {
            let base = Arc::new(Base::load(&vm, &record, base_number)?);
            let path = dir.join("device.bin");
            let device = std::fs::read(&path).map_err(Error::file("read", &path))?;
            let work = Self::fresh(vm, record, (dir, runtime), (base_number, base), device);
            let ram = vm_host::RamMap::open(&work.ram_path())
                .map_err(Error::host("cannot read the guest's RAM"))?;
            if ram.len() as u64 != work.record.hardware.memory_bytes() {
                return Err(Error::Damaged {
                    path: work.ram_path(),
                    reason: "it is of another length than the guest's RAM".into(),
                });
            }
            for index in 0..work.record.disks.len() {
                let overlay = work.disk_path(index);
                if disks_whole && overlay.exists() {
                    continue;
                }
                files::remove_file(&overlay)?;
                disks::overlay_on(&work.vm, &work.record, base_number, index, &overlay)?;
            }
            Ok(work)
        })
        .await?;
        work.laying = Some(work.lay_ram()?);
        work.take_stock().await
    }

    /// Notes what this is, before images come into it.
    pub(crate) fn keep_note(&mut self, note: KeptNote) {
        self.note = Some(note);
    }

    /// Writes down what was noted: the disks are whole, or they are about to be written to.
    ///
    /// It is a help for an agent that comes after this one, and never a condition.
    fn write_note(&mut self, disks_whole: bool) {
        let Some(note) = &mut self.note else {
            return;
        };
        let first = !self.dir.join("device.bin").exists();
        if !first && note.disks_whole == disks_whole {
            return;
        }
        note.disks_whole = disks_whole;
        let written = if first {
            files::replace_for_now(&self.dir.join("device.bin"), &self.device)
        } else {
            Ok(())
        };
        if let Err(error) = written.and_then(|()| note.store(&self.dir)) {
            let error = error.chain();
            tracing::warn!(error, "what arrives is not kept if this agent dies");
            self.note = None;
            // What it says is not so any more.
            let _ = std::fs::remove_file(kept::path(&self.dir));
        }
    }

    /// Lays the base's RAM down on the disk, durable: once the new RAM is known, only the pages
    /// that differ from the base are left to write while the user waits.
    ///
    /// The file is made before this returns, and never again: where the conversation ends while
    /// it is written, it goes with its folder.
    fn lay_ram(&self) -> Result<JoinHandle<Result<()>>> {
        let kept = self.kept_ram();
        let file = files::create_private(&kept)?;
        let from = self
            .base_number
            .map(|number| self.vm.generation(number).ram());
        let bytes = self.record.hardware.memory_bytes();
        Ok(tokio::spawn(blocking(move || {
            let file = if let Some(from) = from {
                files::copy_sparse_into(&from, &kept, file)?
            } else {
                file.set_len(bytes).map_err(Error::file("size", &kept))?;
                file
            };
            file.sync_all().map_err(Error::file("write", &kept))
        })))
    }

    /// Hashes the working copy of RAM, which nobody changes until images come: that it is what
    /// the base was is found out while the guest still runs.
    pub(crate) fn hash_ahead(&mut self) {
        let path = self.ram_path();
        self.hashing = Some(tokio::spawn(blocking(move || hash_ram(&path))));
    }

    fn kept_ram(&self) -> PathBuf {
        self.dir.join("ram.img")
    }

    /// The file with the guest's RAM.
    pub(crate) fn ram_path(&self) -> PathBuf {
        self.runtime.join("ram.img")
    }

    /// The overlay of a disk.
    pub(crate) fn disk_path(&self, index: usize) -> PathBuf {
        self.dir.join(format!("disk{index}.qcow2"))
    }

    /// The overlays of all disks.
    pub(crate) fn disk_paths(&self) -> Vec<PathBuf> {
        (0..self.record.disks.len())
            .map(|index| self.disk_path(index))
            .collect()
    }

    /// The folder for sockets and RAM.
    pub(crate) fn runtime(&self) -> &Path {
        &self.runtime
    }

    /// The base's device state.
    pub(crate) fn device(&self) -> &[u8] {
        &self.device
    }

    /// RAM and overlays are as a replay left them, and so is the device state. Whoever replayed
    /// is gone.
    pub(crate) async fn replayed(mut self, device: Vec<u8>) -> Result<Self> {
        blocking(move || {
            self.hashing = None;
            self.replayed = Some(hash_ram(&self.ram_path())?);
            self.device = device;
            Ok(self)
        })
        .await
    }

    /// What is here is neither the base nor what a replay left: images that were cut off came into
    /// it. What it is like is found out anew.
    pub(crate) async fn take_stock(mut self) -> Result<Self> {
        if self.rounds.take().is_some() {
            // What they laid down is not the base's RAM any more.
            if let Some(laying) = self.laying.take() {
                joined(laying).await?;
            }
            self.laying = Some(self.lay_ram()?);
        }
        let device = self.device.clone();
        self.replayed(device).await.map(|work| Self {
            layout: None,
            rearrangement: None,
            ..work
        })
    }

    /// Whether this is no longer the base.
    pub(crate) fn has_replayed(&self) -> bool {
        self.replayed.is_some()
    }

    /// Makes the received state a generation of this site.
    pub(crate) async fn keep(mut self, received: Received, manifest: Manifest) -> Result<Kept> {
        if let Some(laying) = self.laying.take() {
            joined(laying).await?;
        }
        blocking(move || {
            let manifest = Manifest {
                parent: self.base_number,
                ..manifest
            };
            manifest.check(&self.record)?;
            let mine = [
                (&manifest.ram, &received.ram),
                (&manifest.device, &received.device),
            ];
            let disks = manifest.disks.iter().zip(&received.disks);
            let same = manifest.disks.len() == received.disks.len()
                && mine
                    .into_iter()
                    .chain(disks)
                    .all(|(said, tree)| said.root == tree.root());
            if !same {
                return Err(Error::Refused(
                    "the manifest does not describe the images that were sent".into(),
                ));
            }
            let generation = self.vm.generation(manifest.generation);
            let manifest = generations::make_place(&self.vm, self.base_number, manifest)?;
            for index in 0..self.record.disks.len() {
                let (from, to) = (self.disk_path(index), generation.disk(index));
                if !to.exists() {
                    std::fs::rename(&from, &to).map_err(Error::file("move into place", &to))?;
                }
            }
            let device = generation.device();
            std::fs::write(&device, &self.device).map_err(Error::file("write", &device))?;
            self.write_changed_ram(&received.ram)?;
            let (from, to) = (self.kept_ram(), generation.ram());
            std::fs::rename(&from, &to).map_err(Error::file("move into place", &to))?;
            generation.save_trees(&received.ram, &received.disks)?;
            generation.publish(&manifest)?;
            generations::unmark(&generation)?;
            Ok(Kept {
                ram: self.ram_path(),
                generation,
                manifest,
            })
        })
        .await
    }
}

impl Work {
    /// Notes how the source's RAM lies.
    pub(crate) fn set_layout(&mut self, layout: Layout) {
        self.layout = Some(layout);
    }

    /// Notes how the source's device state is put together from a replayed one.
    pub(crate) fn set_rearrangement(&mut self, told: Rearrangement) {
        self.rearrangement = Some(told);
    }

    /// How many pages the guest's RAM has.
    pub(crate) fn ram_pages(&self) -> u64 {
        reconciler::pages_for(self.record.hardware.memory_bytes())
    }

    /// Brings the replayed RAM into the source's layout; what was in the pages that this changed.
    fn realign(&mut self, base: &ImageTree) -> Result<Option<(Vec<u8>, ImageTree)>> {
        let (Some(layout), Some(replayed)) = (self.layout.take(), &mut self.replayed) else {
            return Ok(None);
        };
        let path = self.runtime.join("ram.img");
        let ram = vm_host::RamMap::open(&path).map_err(Error::host("cannot read the RAM"))?;
        let spaces = layout::spaces(&ram);
        let processes = Processes {
            ram: &ram,
            tree: replayed,
            spaces: &spaces,
        };
        let pages = layout.realign(processes, base);
        drop(ram);
        let mut ram =
            RamMapMut::open(&path).map_err(Error::host("cannot write the guest's RAM"))?;
        let mut displaced = Vec::with_capacity(pages.len() * reconciler::PAGE_SIZE);
        for (index, page) in &pages {
            let start = index.0 as usize * reconciler::PAGE_SIZE;
            let Some(there) = ram.get_mut(start..start + reconciler::PAGE_SIZE) else {
                continue;
            };
            displaced.extend_from_slice(there);
            there.copy_from_slice(&**page);
            replayed
                .set(*index, PageHash::of(page))
                .map_err(Error::reconcile("cannot realign RAM"))?;
        }
        tracing::info!(pages = pages.len(), "RAM realigned");
        let tree = tree_of(&SlicePages(&displaced), "what was realigned")?;
        Ok(Some((displaced, tree)))
    }

    /// Brings the RAM laid down by [`Self::lay_ram`] to what was received.
    fn write_changed_ram(&self, tree: &ImageTree) -> Result<()> {
        let kept = self.kept_ram();
        let changed = match &self.rounds {
            Some(rounds) => rounds.unlaid(tree),
            None => tree.differing(&self.base.tree(ImageKind::Ram)?),
        };
        let ram = vm_host::RamMap::open(&self.ram_path())
            .map_err(Error::host("cannot read the guest's RAM"))?;
        let file = File::options()
            .write(true)
            .open(&kept)
            .map_err(Error::file("open", &kept))?;
        for run in changed.runs() {
            let at = |page: u64| page as usize * reconciler::PAGE_SIZE;
            // The tree is of this RAM, so that its pages lie within.
            let pages = ram.get(at(run.start)..at(run.end)).unwrap_or_default();
            file.write_all_at(pages, at(run.start) as u64)
                .map_err(Error::file("write", &kept))?;
        }
        Ok(())
    }
}

/// The tree of a RAM file.
fn hash_ram(path: &Path) -> Result<ImageTree> {
    let ram = vm_host::RamMap::open(path).map_err(Error::host("cannot read the guest's RAM"))?;
    tree_of(&SlicePages(&ram), "RAM")
}

/// A state that has become a generation.
pub(crate) struct Kept {
    /// The working copy of its RAM, for the VM to run on.
    pub ram: PathBuf,
    /// Its files.
    pub generation: GenerationFiles,
    /// Its manifest.
    pub manifest: Manifest,
}
