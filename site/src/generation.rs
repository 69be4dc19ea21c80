//! Generations: immutable, numbered states of a VM.
//!
//! A generation is a folder that holds the guest's RAM, one overlay a disk, the device state,
//! a hash tree of each, and a manifest. The manifest is written last: a folder without one is
//! no generation. Disk overlays rest on the overlays of the generation before, so generations
//! form a line. One that was pruned has its manifest under another name, and perhaps its disks:
//! see [`crate::generations`].

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use reconciler::{ImageTree, Root};
use serde::{Deserialize, Serialize};
use vm_host::Hardware;

use crate::error::{Error, Result};
use crate::files;
use crate::vm::{Id, VmRecord};

/// The version of the manifest's form.
const MANIFEST_VERSION: u32 = 1;

/// A serialised tree is never larger than this: 32 bytes for each page of a 16 TiB image.
const TREE_LIMIT: u64 = 128 << 30;

/// What a generation is: the roots of its images and what it takes to run it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Form of this file.
    pub version: u32,
    /// Of which VM.
    pub vm: Id,
    /// Its number; grows along the line.
    pub generation: u64,
    /// The generation that its disk overlays rest on.
    pub parent: Option<u64>,
    /// The hardware whose state it holds.
    pub hardware: Hardware,
    /// The QEMU that wrote the device state.
    pub qemu: String,
    /// Guest RAM.
    pub ram: ImageInfo,
    /// The disks, in order.
    pub disks: Vec<ImageInfo>,
    /// The device state; `bytes` is its length before padding to pages.
    pub device: ImageInfo,
    /// When it was made, in seconds since 1970.
    pub created: u64,
    /// Pages of RAM that the guest had freed and that were made zero, as was asked for: what they
    /// held before is not preserved.
    #[serde(default)]
    pub free_dropped: u64,
}

/// Size and root of one image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageInfo {
    /// Length in bytes.
    pub bytes: u64,
    /// The tree's root.
    pub root: Root,
}

impl Manifest {
    /// A manifest of this form for a generation made now.
    pub fn new(
        vm: Id,
        generation: u64,
        parent: Option<u64>,
        hardware: Hardware,
        qemu: String,
        [ram, device]: [ImageInfo; 2],
        disks: Vec<ImageInfo>,
    ) -> Self {
        let created = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(0, |since| since.as_secs());
        Self {
            version: MANIFEST_VERSION,
            vm,
            generation,
            parent,
            hardware,
            qemu,
            ram,
            disks,
            device,
            created,
            free_dropped: 0,
        }
    }

    /// Checks what a peer says of the VM that `record` describes; the roots are for whoever has
    /// the images.
    pub(crate) fn check(&self, record: &VmRecord) -> Result<()> {
        // Far longer than any QEMU's version, far shorter than what a manifest can hold.
        const QEMU: usize = 256;
        let sized = self.ram.bytes == record.hardware.memory_bytes();
        if self.version != MANIFEST_VERSION
            || self.vm != record.id
            || self.hardware != record.hardware
            || self.qemu.len() > QEMU
            || self.qemu.chars().any(char::is_control)
            || !sized
        {
            return Err(Error::Refused(format!(
                "the manifest of generation {} is not of {}, or of a form that this program does \
                 not know",
                self.generation, record.name
            )));
        }
        Ok(())
    }

    /// Which state this is, for another site: number and roots, not how it is stored.
    pub fn identity(&self) -> GenerationId {
        let mut hasher = blake3::Hasher::new_derive_key("replay-migrate 2026 generation identity");
        hasher.update(&self.vm.0);
        hasher.update(&self.generation.to_le_bytes());
        for image in self.disks.iter().chain([&self.ram, &self.device]) {
            hasher.update(&image.bytes.to_le_bytes());
            hasher.update(&image.root.0);
        }
        GenerationId {
            number: self.generation,
            digest: *hasher.finalize().as_bytes(),
        }
    }
}

/// A generation as sites speak of it: equal only if number and every image are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GenerationId {
    /// Its number.
    pub number: u64,
    /// Over all roots.
    pub digest: [u8; 32],
}

/// The files of a generation that exists, or of one in the making.
#[derive(Clone, Debug)]
pub struct GenerationFiles {
    dir: PathBuf,
}

impl GenerationFiles {
    /// The files in this folder, whether or not they are there yet.
    pub fn at(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into() }
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Guest RAM, as a plain file.
    pub fn ram(&self) -> PathBuf {
        self.dir.join("ram.img")
    }

    /// The overlay of a disk, qcow2.
    pub fn disk(&self, index: usize) -> PathBuf {
        self.dir.join(format!("disk{index}.qcow2"))
    }

    /// The device state.
    pub fn device(&self) -> PathBuf {
        self.dir.join("device.bin")
    }

    fn ram_tree(&self) -> PathBuf {
        self.dir.join("ram.tree")
    }

    fn disk_tree(&self, index: usize) -> PathBuf {
        self.dir.join(format!("disk{index}.tree"))
    }

    /// The manifest, which makes it a generation.
    pub(crate) fn manifest(&self) -> PathBuf {
        self.dir.join("manifest.json")
    }

    /// The manifest of a generation that was pruned.
    pub(crate) fn pruned(&self) -> PathBuf {
        self.dir.join("pruned.json")
    }

    /// Reads the manifest; `None` if this is no generation (any more, or yet).
    pub fn load_manifest(&self) -> Result<Option<Manifest>> {
        load_manifest(&self.manifest())
    }

    /// Reads the manifest that a pruned generation had; `None` if there was none.
    pub(crate) fn load_pruned(&self) -> Result<Option<Manifest>> {
        load_manifest(&self.pruned())
    }

    /// From here on this is no generation any more, durable; its files are still there.
    pub(crate) fn mark_pruned(&self) -> Result<()> {
        let (from, to) = (self.manifest(), self.pruned());
        fs::rename(&from, &to)
            .and_then(|()| files::sync_dir(&self.dir))
            .map_err(Error::file("rename", &from))
    }

    /// Makes all files durable, then writes the manifest: from here on the generation exists.
    pub fn publish(&self, manifest: &Manifest) -> Result<()> {
        let mut paths = vec![self.ram(), self.device(), self.ram_tree()];
        for index in 0..manifest.disks.len() {
            paths.extend([self.disk(index), self.disk_tree(index)]);
        }
        for path in &paths {
            files::sync_file(path)?;
        }
        // Their names as well, before the one that makes them a generation.
        files::sync_dir(&self.dir).map_err(Error::file("sync", &self.dir))?;
        files::write_json(&self.manifest(), manifest)?;
        let line = self.dir.parent().unwrap_or(&self.dir);
        files::sync_dir(line).map_err(Error::file("sync", line))
    }

    /// Writes the trees of RAM and disks.
    pub fn save_trees(&self, ram: &ImageTree, disks: &[ImageTree]) -> Result<()> {
        self.save_ram_tree(ram)?;
        disks
            .iter()
            .enumerate()
            .try_for_each(|(index, tree)| save_tree(&self.disk_tree(index), tree))
    }

    /// Writes the tree of RAM alone.
    pub fn save_ram_tree(&self, tree: &ImageTree) -> Result<()> {
        save_tree(&self.ram_tree(), tree)
    }

    /// The tree of RAM, checked against the manifest.
    pub fn load_ram_tree(&self, manifest: &Manifest) -> Result<ImageTree> {
        load_tree(&self.ram_tree(), Some(&manifest.ram.root))
    }

    /// The tree of a disk, checked against the manifest.
    pub fn load_disk_tree(&self, manifest: &Manifest, index: usize) -> Result<ImageTree> {
        load_tree(
            &self.disk_tree(index),
            manifest.disks.get(index).map(|disk| &disk.root),
        )
    }

    /// The device state.
    pub fn load_device(&self) -> Result<Vec<u8>> {
        let path = self.device();
        fs::read(&path).map_err(Error::file("read", &path))
    }
}

fn load_manifest(path: &Path) -> Result<Option<Manifest>> {
    let Some(manifest) = files::read_json::<Manifest>(path)? else {
        return Ok(None);
    };
    if manifest.version != MANIFEST_VERSION {
        return Err(Error::Damaged {
            path: path.to_owned(),
            reason: format!(
                "it is of version {}; this program reads version {MANIFEST_VERSION}",
                manifest.version
            ),
        });
    }
    Ok(Some(manifest))
}

/// Writes a tree in one step.
pub(crate) fn save_tree(path: &Path, tree: &ImageTree) -> Result<()> {
    files::write_atomic(path, &tree.encode())
}

/// Reads a tree; with `root`, it must be the tree of that root.
pub(crate) fn load_tree(path: &Path, root: Option<&Root>) -> Result<ImageTree> {
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(TREE_LIMIT).read_to_end(&mut bytes))
        .map_err(Error::file("read", path))?;
    let tree = ImageTree::decode(&bytes, reconciler::MAX_PAGES).map_err(Error::reconcile(
        format!("cannot read the hash tree {}", path.display()),
    ))?;
    if root.is_some_and(|root| tree.root() != *root) {
        return Err(Error::Damaged {
            path: path.to_owned(),
            reason: "its root is not the one in the manifest".into(),
        });
    }
    Ok(tree)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_that_is_not_the_manifests_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let files = GenerationFiles::at(dir.path());
        let tree = ImageTree::zero(4).unwrap();
        files
            .save_trees(&tree, std::slice::from_ref(&tree))
            .unwrap();
        let image = |root| ImageInfo {
            bytes: 4 * reconciler::PAGE_SIZE as u64,
            root,
        };
        let manifest = |root| {
            let device = image(Root([0; 32]));
            let hardware = Hardware::new("pc-q35-7.2");
            let images = [image(root), device];
            let disks = vec![image(root)];
            Manifest::new(Id([1; 16]), 1, None, hardware, String::new(), images, disks)
        };
        let right = manifest(tree.root());
        assert_eq!(files.load_ram_tree(&right).unwrap().root(), tree.root());
        assert_eq!(files.load_disk_tree(&right, 0).unwrap().root(), tree.root());
        let wrong = manifest(Root([7; 32]));
        for loaded in [files.load_ram_tree(&wrong), files.load_disk_tree(&wrong, 0)] {
            assert!(matches!(loaded, Err(Error::Damaged { .. })));
        }
    }

    #[test]
    fn what_has_no_manifest_yet_is_no_generation() {
        let dir = tempfile::tempdir().unwrap();
        let files = GenerationFiles::at(dir.path());
        let tree = ImageTree::zero(1).unwrap();
        fs::write(files.ram(), [0; reconciler::PAGE_SIZE]).unwrap();
        fs::write(files.device(), b"device").unwrap();
        files.save_trees(&tree, &[]).unwrap();
        let image = ImageInfo {
            bytes: reconciler::PAGE_SIZE as u64,
            root: tree.root(),
        };
        let hardware = Hardware::new("pc-q35-7.2");
        let manifest = |disks| {
            let of = [image, image];
            let qemu = String::new();
            Manifest::new(Id([1; 16]), 1, None, hardware.clone(), qemu, of, disks)
        };
        // A file that the manifest speaks of is not there: it is not written.
        assert!(files.publish(&manifest(vec![image])).is_err());
        assert_eq!(files.load_manifest().unwrap(), None);
        let whole = manifest(Vec::new());
        files.publish(&whole).unwrap();
        assert_eq!(files.load_manifest().unwrap(), Some(whole));
    }

    #[test]
    fn a_full_disk_makes_no_generation() {
        use crate::files::tests::{assert_no_room, leave_no_room_for};
        let dir = tempfile::tempdir().unwrap();
        let files = GenerationFiles::at(dir.path());
        let tree = ImageTree::zero(1).unwrap();
        fs::write(files.ram(), [0; reconciler::PAGE_SIZE]).unwrap();
        fs::write(files.device(), b"device").unwrap();
        leave_no_room_for(&files.ram_tree());
        let failed = files.save_trees(&tree, &[]).unwrap_err();
        assert_no_room(&failed, &files.ram_tree());
        files.save_trees(&tree, &[]).unwrap();
        let image = ImageInfo {
            bytes: reconciler::PAGE_SIZE as u64,
            root: tree.root(),
        };
        let hardware = Hardware::new("pc-q35-7.2");
        let of = [image, image];
        let manifest = Manifest::new(
            Id([1; 16]),
            1,
            None,
            hardware,
            String::new(),
            of,
            Vec::new(),
        );
        leave_no_room_for(&files.manifest());
        let failed = files.publish(&manifest).unwrap_err();
        assert_no_room(&failed, &files.manifest());
        assert_eq!(files.load_manifest().unwrap(), None);
        files.publish(&manifest).unwrap();
    }
}
