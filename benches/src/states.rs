//! The states of a capture: RAM mapped, disks read where they lie.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use reconciler::{FilePages, ImageTree, PAGE_SIZE, PageIndex, ReadPages, SlicePages, no_progress};
use rustix::fs::{SeekFrom, seek};
use vm_host::{RamMap, RamMapMut};

use crate::error::{Error, Result};

/// More disks no VM has.
const MOST_DISKS: usize = 16;
/// Pages compared at once.
const AT_ONCE: u64 = 256;

/// One state, with the trees of its images.
pub(crate) struct State {
    pub(crate) ram: RamMap,
    pub(crate) ram_tree: ImageTree,
    pub(crate) disks: Vec<Disk>,
    pub(crate) device: Vec<u8>,
    pub(crate) device_tree: ImageTree,
    ram_path: PathBuf,
    /// A RAM that is not the capture's own.
    _scratch: Option<Scratch>,
}

pub(crate) struct Disk {
    pub(crate) image: FilePages,
    pub(crate) tree: ImageTree,
    path: PathBuf,
}

pub(crate) fn tree_of(pages: &dyn ReadPages) -> Result<ImageTree> {
    ImageTree::build(pages, &no_progress).map_err(Error::Hash)
}

fn open(path: &Path) -> Result<FilePages> {
    File::open(path)
        .and_then(FilePages::new)
        .map_err(Error::file("open", path))
}

impl State {
    /// Opens the state in a folder.
    pub(crate) fn open(dir: &Path) -> Result<Self> {
        let ram_path = dir.join("ram.img");
        let ram = RamMap::open(&ram_path).map_err(Error::Map)?;
        let mut disks = Vec::new();
        for index in 0..MOST_DISKS {
            let path = match index {
                0 => dir.join("disk.img"),
                more => dir.join(format!("disk{more}.img")),
            };
            if !path.exists() {
                break;
            }
            let image = open(&path)?;
            disks.push(Disk {
                tree: tree_of(&image)?,
                image,
                path,
            });
        }
        let path = dir.join("device.bin");
        let device = fs::read(&path).map_err(Error::file("read", &path))?;
        Ok(Self {
            ram_tree: tree_of(&SlicePages(&ram))?,
            ram,
            disks,
            device_tree: tree_of(&SlicePages(&device))?,
            device,
            ram_path,
            _scratch: None,
        })
    }

    /// The same, with the pages zero that the guest's kernel says are free; how many those are.
    pub(crate) fn without_free(self) -> Result<(Self, u64)> {
        let free = introspection::free::pages(&self.ram).map_err(Error::Free)?;
        let pages = free.iter().map(|range| range.len() / PAGE_SIZE);
        let pages = pages.sum::<usize>() as u64;
        let scratch = self.copy_ram()?;
        vm_host::clear_ram(scratch.0.path(), &free).map_err(Error::Map)?;
        let ram = RamMap::open(scratch.0.path()).map_err(Error::Map)?;
        let state = Self {
            ram_tree: tree_of(&SlicePages(&ram))?,
            ram,
            ram_path: scratch.0.path().to_owned(),
            _scratch: Some(scratch),
            ..self
        };
        Ok((state, pages))
    }

    /// A copy of its RAM, to build on.
    pub(crate) fn copy_ram(&self) -> Result<Scratch> {
        let to = Scratch::zero_ram(self.ram.len() as u64)?;
        to.fill(&self.ram_path, self.ram.len() as u64)
    }

    /// A copy of a disk, to build on, as long as `bytes`.
    pub(crate) fn copy_disk(&self, index: usize, bytes: u64) -> Result<Scratch> {
        Scratch::copy(&self.disks[index].path, bytes)
    }

    /// The length of a disk in bytes.
    pub(crate) fn disk_bytes(&self, index: usize) -> Result<u64> {
        let path = &self.disks[index].path;
        Ok(fs::metadata(path)
            .map_err(Error::file("measure", path))?
            .len())
    }
}

/// Where guests' RAM is kept, if there is such a place: in memory.
const IN_MEMORY: &str = "/dev/shm";

/// A temporary file, gone when it is dropped.
pub(crate) struct Scratch(tempfile::NamedTempFile);

impl Scratch {
    /// All zero.
    pub(crate) fn zero(bytes: u64) -> Result<Self> {
        Self::zero_in(&std::env::temp_dir(), bytes)
    }

    /// The same where a guest's RAM would be.
    pub(crate) fn zero_ram(bytes: u64) -> Result<Self> {
        let memory = Path::new(IN_MEMORY);
        if memory.is_dir() {
            Self::zero_in(memory, bytes)
        } else {
            Self::zero(bytes)
        }
    }

    fn zero_in(dir: &Path, bytes: u64) -> Result<Self> {
        let file = tempfile::NamedTempFile::new_in(dir);
        let file = file.map_err(Error::file("create a file in", dir))?;
        let sized = file.as_file().set_len(bytes);
        sized.map_err(Error::file("size", file.path()))?;
        Ok(Self(file))
    }

    /// A file's first bytes, holes left out.
    fn copy(from: &Path, bytes: u64) -> Result<Self> {
        Self::zero(bytes)?.fill(from, bytes)
    }

    fn fill(self, from: &Path, bytes: u64) -> Result<Self> {
        copy_data(from, self.0.as_file(), bytes).map_err(Error::file("copy", from))?;
        Ok(self)
    }

    /// As an image read and written in place.
    pub(crate) fn pages(&self) -> Result<FilePages> {
        let path = self.0.path();
        let file = File::options().read(true).write(true).open(path);
        file.and_then(FilePages::new)
            .map_err(Error::file("open", path))
    }

    /// Mapped.
    pub(crate) fn map(&self) -> Result<RamMapMut> {
        RamMapMut::open(self.0.path()).map_err(Error::Map)
    }
}

/// Copies what is not a hole.
fn copy_data(from: &Path, to: &File, end: u64) -> io::Result<()> {
    let from = File::open(from)?;
    let mut buffer = vec![0; AT_ONCE as usize * PAGE_SIZE];
    let mut at = 0;
    while at < end {
        at = match seek(&from, SeekFrom::Data(at)) {
            Ok(data) => data,
            Err(rustix::io::Errno::NXIO) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        let hole = seek(&from, SeekFrom::Hole(at))?.min(end);
        while at < hole {
            let held = buffer.len().min((hole - at) as usize);
            from.read_exact_at(&mut buffer[..held], at)?;
            to.write_all_at(&buffer[..held], at)?;
            at += held as u64;
        }
    }
    Ok(())
}

/// The first page in which two images of one length differ.
pub(crate) fn first_difference(a: &dyn ReadPages, b: &dyn ReadPages) -> io::Result<Option<u64>> {
    let mut buffers = [(); 2].map(|()| vec![0; AT_ONCE as usize * PAGE_SIZE]);
    let pages = a.pages().max(b.pages());
    for first in (0..pages).step_by(AT_ONCE as usize) {
        let count = AT_ONCE.min(pages - first);
        if a.known_zero(PageIndex(first), count) && b.known_zero(PageIndex(first), count) {
            continue;
        }
        let [left, right] = &mut buffers;
        a.read_many(PageIndex(first), left)?;
        b.read_many(PageIndex(first), right)?;
        if left != right {
            let differs = left
                .chunks(PAGE_SIZE)
                .zip(right.chunks(PAGE_SIZE))
                .position(|(left, right)| left != right);
            return Ok(differs.map(|at| first + at as u64));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_are_equal_and_differences_are_found() {
        let from = Scratch::zero(8 << 20).unwrap();
        for at in [0, 5 << 20, (8 << 20) - 3] {
            from.0.as_file().write_all_at(&[1, 2, 3], at).unwrap();
        }
        let whole = Scratch::copy(from.0.path(), 8 << 20).unwrap();
        let compare = |a: &Scratch, b: &Scratch| {
            first_difference(&a.pages().unwrap(), &b.pages().unwrap()).unwrap()
        };
        assert_eq!(compare(&from, &whole), None);
        let short = Scratch::copy(from.0.path(), 6 << 20).unwrap();
        assert_eq!(compare(&from, &short), Some(2047));
        whole.0.as_file().write_all_at(&[9], 5 << 20).unwrap();
        assert_eq!(compare(&from, &whole), Some(5 << 8));
    }
}
