//! The images of a VM's state, as both sides of a migration handle them.

use std::borrow::Cow;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use reconciler::{
    FilePages, ImageTree, PageHash, PageSet, ReadPages, Shadow, SlicePages, no_progress, pages_for,
};
use vm_host::RamMap;

use crate::disks::{self, DiskImage};
use crate::error::{Error, Result};
use crate::generation::{ImageInfo, Manifest};
use crate::local;
use crate::protocol::{ImageHead, ImageKind};
use crate::store::VmDir;
use crate::vm::VmRecord;

/// A whole state with the tree of each image: what a source sends.
pub(crate) struct State {
    ram: Ram,
    ram_tree: ImageTree,
    disks: Vec<(DiskImage, ImageTree)>,
    device: Vec<u8>,
    device_tree: ImageTree,
}

/// Where a state's RAM is read.
enum Ram {
    /// Of a VM that stands still.
    Mapped(RamMap),
    /// Of a generation. Read and not mapped: a disk that fails is an error then, and not a signal
    /// that ends the process.
    Kept(FilePages),
    /// As it was copied from one that runs.
    Copied(Arc<Shadow>),
}

impl State {
    /// What was copied of a VM that runs on: of no one moment, but not to change any more.
    pub(crate) fn of_copies(
        ram: &Arc<Shadow>,
        disks: Vec<(DiskImage, ImageTree)>,
        device: Vec<u8>,
    ) -> Result<Self> {
        Ok(Self {
            ram_tree: ram.tree(),
            ram: Ram::Copied(ram.clone()),
            disks,
            device_tree: tree_of(&SlicePages(&device), "the device state")?,
            device,
        })
    }

    /// The state of a VM that stands still: its mapped RAM, the top overlays of its disks, and
    /// its device state. `since` is the generation that the overlays rest on.
    pub(crate) fn of_paused(
        vm: &VmDir,
        record: &VmRecord,
        since: Option<u64>,
        ram: &Path,
        overlays: &[std::path::PathBuf],
        device: Vec<u8>,
    ) -> Result<Self> {
        let ram = map(ram)?;
        let (ram_tree, disks) = rayon::join(
            || tree_of(&SlicePages(&ram), "RAM"),
            || {
                overlays
                    .iter()
                    .enumerate()
                    .map(|(index, top)| {
                        let image = DiskImage::open(top)?;
                        let tree = disks::tree_since(vm, record, since, index, &image)?;
                        Ok((image, tree))
                    })
                    .collect::<Result<Vec<_>>>()
            },
        );
        let device_tree = tree_of(&SlicePages(&device), "the device state")?;
        Ok(Self {
            ram_tree: ram_tree?,
            ram: Ram::Mapped(ram),
            disks: disks?,
            device,
            device_tree,
        })
    }

    /// The same, with this device state.
    pub(crate) fn with_device(self, device: Vec<u8>) -> Result<Self> {
        Ok(Self {
            device_tree: tree_of(&SlicePages(&device), "the device state")?,
            device,
            ..self
        })
    }

    /// The state of a generation.
    pub(crate) fn of_generation(vm: &VmDir, manifest: &Manifest) -> Result<Self> {
        let files = vm.generation(manifest.generation);
        let device = files.load_device()?;
        let disks = (0..manifest.disks.len())
            .map(|index| {
                Ok((
                    DiskImage::open(&files.disk(index))?,
                    files.load_disk_tree(manifest, index)?,
                ))
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(Self {
            ram: Ram::Kept(kept(&files.ram(), manifest.ram.bytes)?),
            ram_tree: files.load_ram_tree(manifest)?,
            disks,
            device_tree: tree_of(&SlicePages(&device), "the device state")?,
            device,
        })
    }

    /// The images in the order in which they are reconciled.
    pub(crate) fn heads(&self) -> Vec<ImageHead> {
        let disks = self
            .disks
            .iter()
            .enumerate()
            .map(|(index, (image, _))| ImageHead {
                // `VmRecord::DISKS` is far below 256.
                kind: ImageKind::Disk(index as u8),
                bytes: image.bytes(),
            });
        let head = |kind, bytes: u64| ImageHead { kind, bytes };
        std::iter::once(head(ImageKind::Device, self.device.len() as u64))
            .chain(disks)
            .chain([head(ImageKind::Ram, self.ram_bytes())])
            .collect()
    }

    /// The tree of an image.
    pub(crate) fn tree(&self, kind: ImageKind) -> &ImageTree {
        match kind {
            ImageKind::Device => &self.device_tree,
            ImageKind::Disk(index) => &self.disks[usize::from(index)].1,
            ImageKind::Ram => &self.ram_tree,
        }
    }

    /// The trees of all disks.
    pub(crate) fn disk_trees(&self) -> Vec<ImageTree> {
        self.disks.iter().map(|(_, tree)| tree.clone()).collect()
    }

    /// Lends the pages of an image.
    pub(crate) fn with_pages<T>(
        &self,
        kind: ImageKind,
        look: impl FnOnce(&dyn ReadPages) -> T,
    ) -> T {
        match kind {
            ImageKind::Device => look(&SlicePages(&self.device)),
            ImageKind::Disk(index) => look(&self.disks[usize::from(index)].0),
            ImageKind::Ram => match &self.ram {
                Ram::Mapped(ram) => look(&SlicePages(ram)),
                Ram::Kept(ram) => look(ram),
                Ram::Copied(ram) => look(&**ram),
            },
        }
    }

    /// Size and root of RAM and device state, and of each disk.
    pub(crate) fn infos(&self) -> ([ImageInfo; 2], Vec<ImageInfo>) {
        let info = |bytes, tree: &ImageTree| ImageInfo {
            bytes,
            root: tree.root(),
        };
        (
            [
                info(self.ram_bytes(), &self.ram_tree),
                info(self.device.len() as u64, &self.device_tree),
            ],
            self.disks
                .iter()
                .map(|(image, tree)| info(image.bytes(), tree))
                .collect(),
        )
    }

    /// The device state.
    pub(crate) fn device(&self) -> &[u8] {
        &self.device
    }

    /// The guest's RAM, where it is mapped; else nothing.
    pub(crate) fn ram(&self) -> &[u8] {
        match &self.ram {
            Ram::Mapped(ram) => ram,
            Ram::Kept(_) | Ram::Copied(_) => &[],
        }
    }

    fn ram_bytes(&self) -> u64 {
        match &self.ram {
            Ram::Mapped(ram) => ram.len() as u64,
            // Guests have whole pages of RAM.
            Ram::Kept(ram) => ram.pages() * reconciler::PAGE_SIZE as u64,
            Ram::Copied(ram) => ram.pages() * reconciler::PAGE_SIZE as u64,
        }
    }
}

/// What both sides have before anything is sent: a common generation, or only the base images.
pub(crate) struct Base {
    ram: Option<FilePages>,
    ram_tree: ImageTree,
    disks: Vec<(DiskImage, ImageTree)>,
    device: Vec<u8>,
    /// RAM and disks were brought farther than any generation, by rounds of pre-copy: there is
    /// nothing at hand to read them from.
    ahead: bool,
    /// Of each disk, the pages of its base image that the target lacks, where that is so.
    absent: Vec<PageSet>,
}

impl Base {
    /// A generation; without one, the base disk images and nothing else.
    pub(crate) fn load(vm: &VmDir, record: &VmRecord, generation: Option<u64>) -> Result<Self> {
        Self::load_without(vm, record, generation, &[])
    }

    /// The same, where the target lacks these pages of the base image of each disk: they are known, and can't be
    /// read there. With a generation all are there.
    pub(crate) fn load_without(
        vm: &VmDir,
        record: &VmRecord,
        generation: Option<u64>,
        absent: &[PageSet],
    ) -> Result<Self> {
        let Some(number) = generation else {
            let disks = record
                .disks
                .iter()
                .enumerate()
                .map(|(index, disk)| {
                    let absent = absent.get(index).cloned().unwrap_or_default();
                    let image = DiskImage::open_base(&vm.store().base_path(disk.hash), absent)?;
                    Ok((image, vm.store().base_tree(*disk)?))
                })
                .collect::<Result<Vec<_>>>()?;
            let pages = pages_for(record.hardware.memory_bytes());
            return Ok(Self {
                ram: None,
                ram_tree: zero(pages)?,
                disks,
                device: Vec::new(),
                ahead: false,
                absent: absent.to_vec(),
            });
        };
        let files = vm.generation(number);
        let manifest = vm.manifest(number)?;
        let disks = (0..manifest.disks.len())
            .map(|index| {
                Ok((
                    DiskImage::open(&files.disk(index))?,
                    files.load_disk_tree(&manifest, index)?,
                ))
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(Self {
            ram: Some(kept(&files.ram(), manifest.ram.bytes)?),
            ram_tree: files.load_ram_tree(&manifest)?,
            disks,
            device: files.load_device()?,
            ahead: false,
            absent: Vec::new(),
        })
    }

    /// The same, after RAM and disks were brought to where these trees say.
    pub(crate) fn ahead(mut self, ram: ImageTree, disks: Vec<ImageTree>) -> Self {
        self.ram_tree = ram;
        for ((_, tree), now) in self.disks.iter_mut().zip(disks) {
            *tree = now;
        }
        self.ahead = true;
        self
    }

    /// Whether this image was brought farther than any generation.
    pub(crate) fn is_ahead(&self, kind: ImageKind) -> bool {
        self.ahead && kind != ImageKind::Device
    }

    /// The tree of an image, as both sides compute it.
    pub(crate) fn tree(&self, kind: ImageKind) -> Result<ImageTree> {
        match kind {
            ImageKind::Device => tree_of(&SlicePages(&self.device), "the base device state"),
            ImageKind::Disk(index) => Ok(self.disks[usize::from(index)].1.clone()),
            ImageKind::Ram => Ok(self.ram_tree.clone()),
        }
    }

    /// Lends the pages of an image, where there are any.
    pub(crate) fn with_pages<T>(
        &self,
        kind: ImageKind,
        look: impl FnOnce(Option<&dyn ReadPages>) -> T,
    ) -> T {
        if self.is_ahead(kind) {
            return look(None);
        }
        match kind {
            ImageKind::Device => look(Some(&SlicePages(&self.device))),
            ImageKind::Disk(index) => look(Some(&self.disks[usize::from(index)].0)),
            ImageKind::Ram => match &self.ram {
                Some(ram) => look(Some(ram)),
                None => look(None),
            },
        }
    }

    /// The disks, with their trees.
    pub(crate) fn disks(&self) -> &[(DiskImage, ImageTree)] {
        &self.disks
    }

    /// The tree of a disk, this one's or a newer one's, without what the target can't read of it: as zeroes, which
    /// nobody looks for.
    pub(crate) fn readable<'a>(
        &self,
        disk: usize,
        tree: Cow<'a, ImageTree>,
    ) -> Result<Cow<'a, ImageTree>> {
        let (Some(absent), Some((_, base))) = (self.absent.get(disk), self.disks.get(disk)) else {
            return Ok(tree);
        };
        let mut readable = tree.clone().into_owned();
        let unchanged = absent
            .iter()
            .filter(|&page| tree.leaf(page) == base.leaf(page));
        readable
            .update(unchanged.map(|page| (page, PageHash::ZERO)))
            .map_err(Error::reconcile("cannot tell what is there of a disk"))?;
        Ok(Cow::Owned(readable))
    }

    /// Whether it is a generation, with RAM of its own.
    pub(crate) fn has_ram(&self) -> bool {
        self.ram.is_some()
    }

    /// The device state; empty without a common generation.
    pub(crate) fn device(&self) -> &[u8] {
        &self.device
    }

    /// How many pages a target can search at most: the base and a replayed copy of it.
    pub(crate) fn candidates(&self) -> u64 {
        let disks: u64 = self
            .disks
            .iter()
            .map(|(_, tree)| tree.content_pages())
            .sum();
        2 * (disks + self.ram_tree.pages() + pages_for(self.device.len() as u64))
    }
}

fn map(path: &Path) -> Result<RamMap> {
    RamMap::open(path).map_err(Error::host(format!("cannot read {}", path.display())))
}

/// The RAM of a generation, which has to be as long as its manifest says.
fn kept(path: &Path, bytes: u64) -> Result<FilePages> {
    let file = File::open(path).map_err(Error::file("open", path))?;
    let there = file.metadata().map_err(Error::file("measure", path))?.len();
    if there != bytes {
        return Err(Error::Damaged {
            path: path.to_owned(),
            reason: format!("it has {there} bytes, and its manifest says {bytes}"),
        });
    }
    FilePages::new(file).map_err(Error::file("open", path))
}

pub(crate) fn tree_of(pages: &dyn ReadPages, what: &str) -> Result<ImageTree> {
    ImageTree::build(pages, &no_progress).map_err(Error::reconcile(format!("cannot hash {what}")))
}

pub(crate) fn zero(pages: u64) -> Result<ImageTree> {
    ImageTree::zero(pages).map_err(Error::reconcile("an image is too large"))
}

/// As [`local::blocking`], for work that lends a shared state.
pub(crate) async fn with<S: Send + Sync + 'static, T: Send + 'static>(
    shared: &Arc<S>,
    work: impl FnOnce(&S) -> Result<T> + Send + 'static,
) -> Result<T> {
    let shared = shared.clone();
    local::blocking(move || work(&shared)).await
}

#[cfg(test)]
mod tests {
    use reconciler::PageIndex;

    use super::*;
    use crate::files;
    use crate::lease::Lease;
    use crate::store::Store;

    /// A VM without disks, and its first generation.
    fn generation(root: &Path) -> (VmDir, VmRecord, Manifest) {
        let vm = Store::open(root).unwrap().vm(&"desk".parse().unwrap());
        let record = VmRecord {
            disks: Vec::new(),
            ..VmRecord::example()
        };
        let lease = Lease::Held {
            fence: 1,
            transfer: None,
        };
        vm.create(&record, &lease).unwrap();
        let files = vm.generation(1);
        files::make_dir(files.dir()).unwrap();
        let ram = vec![7; 64 * reconciler::PAGE_SIZE];
        std::fs::write(files.ram(), &ram).unwrap();
        std::fs::write(files.device(), b"device").unwrap();
        let image = |bytes: &[u8]| {
            let tree = tree_of(&SlicePages(bytes), "it").unwrap();
            let info = ImageInfo {
                bytes: bytes.len() as u64,
                root: tree.root(),
            };
            (info, tree)
        };
        let ((ram, tree), (device, _)) = (image(&ram), image(b"device"));
        files.save_trees(&tree, &[]).unwrap();
        let hardware = record.hardware.clone();
        let images = [ram, device];
        let manifest = Manifest::new(
            record.id,
            1,
            None,
            hardware,
            String::new(),
            images,
            Vec::new(),
        );
        files.publish(&manifest).unwrap();
        (vm, record, manifest)
    }

    #[test]
    fn what_a_disk_does_not_give_back_is_an_error_and_ends_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let (vm, record, manifest) = generation(dir.path());
        let state = State::of_generation(&vm, &manifest).unwrap();
        let base = Base::load(&vm, &record, Some(1)).unwrap();
        let read = |pages: &dyn ReadPages| {
            let mut page = [0; reconciler::PAGE_SIZE];
            pages.read(PageIndex(40), &mut page).map(|()| page[0])
        };
        assert_eq!(state.with_pages(ImageKind::Ram, read).unwrap(), 7);
        // Of a mapping, whose process would be ended by a signal here: what was there is not.
        let ram = File::options().write(true).open(vm.generation(1).ram());
        let shorter = 7 * reconciler::PAGE_SIZE as u64;
        ram.unwrap().set_len(shorter).unwrap();
        state.with_pages(ImageKind::Ram, read).unwrap_err();
        let based = base.with_pages(ImageKind::Ram, |pages| read(pages.unwrap()));
        based.unwrap_err();
        // It is named where it is opened, and nothing takes it for the generation.
        for again in [
            State::of_generation(&vm, &manifest).map(drop),
            Base::load(&vm, &record, Some(1)).map(drop),
        ] {
            let error = again.unwrap_err();
            assert!(
                matches!(&error, Error::Damaged { path, .. } if *path == vm.generation(1).ram())
            );
        }
    }

    #[test]
    fn a_generation_that_can_not_be_read_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let (vm, record, manifest) = generation(dir.path());
        let files = vm.generation(1);
        for path in [files.device(), files.dir().join("ram.tree")] {
            let away = path.with_extension("away");
            std::fs::rename(&path, &away).unwrap();
            files::tests::make_unreadable(&path);
            for failed in [
                State::of_generation(&vm, &manifest).map(drop),
                Base::load(&vm, &record, Some(1)).map(drop),
            ] {
                files::tests::assert_read_error(&failed.unwrap_err(), &path);
            }
            std::fs::remove_file(&path).unwrap();
            std::fs::rename(&away, &path).unwrap();
        }
        Base::load(&vm, &record, Some(1)).unwrap();
    }
}
