//! A VM's disks as images of pages: overlays over overlays over a raw base image.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use reconciler::{FilePages, ImageTree, Page, PageIndex, PageSet, ReadPages, Shadow, WritePages};
use vm_host::disk::{Format, OverlayReader, OverlayWriter};

use crate::error::{Error, Result};
use crate::store::VmDir;
use crate::vm::VmRecord;

/// What a disk overlay rests on: a generation's overlay, or the base image.
pub(crate) fn backing_of(
    vm: &VmDir,
    record: &VmRecord,
    generation: Option<u64>,
    index: usize,
) -> (PathBuf, Format) {
    match generation {
        Some(number) => (vm.generation(number).disk(index), Format::Qcow2),
        None => (vm.store().base_path(record.disks[index].hash), Format::Raw),
    }
}

/// Makes an empty overlay over a generation's disk, or over the base image.
///
/// The backing file is named relative to the overlay; all overlays lie three folders below the
/// state directory's `vms`, see [`crate::store`].
pub(crate) fn overlay_on(
    vm: &VmDir,
    record: &VmRecord,
    generation: Option<u64>,
    index: usize,
    overlay: &Path,
) -> Result<()> {
    let relative = match generation {
        Some(number) => format!("../../generations/{number}/disk{index}.qcow2"),
        None => format!("../../../../images/{}", record.disks[index].hash),
    };
    let (_, format) = backing_of(vm, record, generation, index);
    vm_host::disk::create_overlay(overlay, Path::new(&relative), format).map_err(Error::host(
        format!("cannot make the overlay {}", overlay.display()),
    ))
}

/// So often overlays are merged while a chain is opened, at most.
const MERGES: usize = 3;

fn is_gone(error: &vm_host::Error) -> bool {
    matches!(error, vm_host::Error::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
}

/// A disk as its guest sees it.
pub(crate) enum DiskImage {
    /// Through overlays.
    Overlays(OverlayReader),
    /// A raw base image, and the pages of it that are not at both sites: they read as zeroes.
    Base(FilePages, PageSet),
    /// As it was copied while its guest ran, with its size in bytes.
    Copied(Arc<Shadow>, u64),
}

impl DiskImage {
    /// Opens the top of a chain of overlays.
    pub(crate) fn open(top: &Path) -> Result<Self> {
        let mut opened = OverlayReader::open(top);
        // One behind it may just have been merged with another: then it rests on that.
        for _ in 0..MERGES {
            if !opened.as_ref().is_err_and(is_gone) {
                break;
            }
            opened = OverlayReader::open(top);
        }
        let reader = opened.map_err(Error::host(format!(
            "cannot read the disk {}",
            top.display()
        )))?;
        Ok(Self::Overlays(reader))
    }

    /// Opens a raw base image, of which these pages are not at both sites.
    pub(crate) fn open_base(image: &Path, absent: PageSet) -> Result<Self> {
        std::fs::File::open(image)
            .and_then(FilePages::new)
            .map(|pages| Self::Base(pages, absent))
            .map_err(Error::file("read the base image", image))
    }

    /// The guest's disk size in bytes.
    pub(crate) fn bytes(&self) -> u64 {
        match self {
            Self::Overlays(reader) => reader.size(),
            // Base images are kept in whole pages.
            Self::Base(file, _) => file.pages() * reconciler::PAGE_SIZE as u64,
            Self::Copied(_, bytes) => *bytes,
        }
    }

    /// The pages that overlays above `stop` hold: all that can differ from it.
    pub(crate) fn allocated_above(&self, stop: &Path) -> Result<PageSet> {
        let Self::Overlays(reader) = self else {
            return Ok(PageSet::new());
        };
        let ranges = reader.allocated_above(stop).map_err(Error::host(
            "cannot read which blocks of a disk were written",
        ))?;
        Ok(ranges.into_iter().flatten().map(PageIndex).collect())
    }
}

impl ReadPages for DiskImage {
    fn pages(&self) -> u64 {
        match self {
            Self::Overlays(reader) => reader.pages(),
            Self::Base(file, _) => file.pages(),
            Self::Copied(copy, _) => copy.pages(),
        }
    }

    fn read(&self, index: PageIndex, page: &mut Page) -> io::Result<()> {
        match self {
            Self::Overlays(reader) => reader.read_page(index.0, page).map_err(io::Error::other),
            Self::Base(_, absent) if absent.contains(index) => {
                page.fill(0);
                Ok(())
            }
            Self::Base(file, _) => file.read(index, page),
            Self::Copied(copy, _) => copy.read(index, page),
        }
    }

    fn read_many(&self, first: PageIndex, into: &mut [u8]) -> io::Result<()> {
        match self {
            Self::Overlays(reader) => reader.read_pages(first.0, into).map_err(io::Error::other),
            Self::Base(file, absent) => {
                file.read_many(first, into)?;
                if !absent.is_empty() {
                    let pages = into.as_chunks_mut::<{ reconciler::PAGE_SIZE }>().0;
                    let numbered = (first.0..).map(PageIndex).zip(pages);
                    let gone = numbered.filter(|(index, _)| absent.contains(*index));
                    gone.for_each(|(_, page)| page.fill(0));
                }
                Ok(())
            }
            Self::Copied(copy, _) => {
                let pages = into.as_chunks_mut::<{ reconciler::PAGE_SIZE }>().0;
                let mut numbered = (first.0..).map(PageIndex).zip(pages);
                numbered.try_for_each(|(index, page)| copy.read(index, page))
            }
        }
    }

    fn known_zero(&self, first: PageIndex, count: u64) -> bool {
        match self {
            Self::Overlays(_) | Self::Copied(..) => false,
            Self::Base(file, _) => file.known_zero(first, count),
        }
    }
}

/// A disk that is built in place, in its top overlay.
pub(crate) struct WorkDisk {
    top: PathBuf,
    writer: OverlayWriter,
    seen: RwLock<Seen>,
    pages: u64,
}

/// What a reader of the overlay shows; writes need another one.
struct Seen {
    reader: OverlayReader,
    stale: bool,
}

impl WorkDisk {
    /// Opens the top of a chain of overlays, to write into it.
    pub(crate) fn open(top: &Path) -> Result<Self> {
        let failed = || Error::host(format!("cannot write the disk {}", top.display()));
        let writer = OverlayWriter::open(top).map_err(failed())?;
        let reader = OverlayReader::open(top).map_err(failed())?;
        let pages = reader.pages();
        Ok(Self {
            top: top.to_owned(),
            writer,
            seen: RwLock::new(Seen {
                reader,
                stale: false,
            }),
            pages,
        })
    }

    /// Makes what was written durable.
    pub(crate) fn sync(&self) -> Result<()> {
        self.writer.sync().map_err(Error::host(format!(
            "cannot write the disk {}",
            self.top.display()
        )))
    }

    fn refresh(&self) -> io::Result<()> {
        let mut seen = self.seen.write().unwrap_or_else(PoisonError::into_inner);
        if seen.stale {
            self.writer.sync().map_err(io::Error::other)?;
            seen.reader = OverlayReader::open(&self.top).map_err(io::Error::other)?;
            seen.stale = false;
        }
        Ok(())
    }
}

impl ReadPages for WorkDisk {
    fn pages(&self) -> u64 {
        self.pages
    }

    fn read(&self, index: PageIndex, page: &mut Page) -> io::Result<()> {
        loop {
            let seen = self.seen.read().unwrap_or_else(PoisonError::into_inner);
            if !seen.stale {
                return seen
                    .reader
                    .read_page(index.0, page)
                    .map_err(io::Error::other);
            }
            drop(seen);
            self.refresh()?;
        }
    }
}

impl WritePages for WorkDisk {
    fn write(&mut self, index: PageIndex, page: &Page) -> io::Result<()> {
        self.seen
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner)
            .stale = true;
        self.writer
            .write_page(index.0, page)
            .map_err(io::Error::other)
    }
}

/// The tree of a generation's disk, or of the base image.
pub(crate) fn tree_of(
    vm: &VmDir,
    record: &VmRecord,
    generation: Option<u64>,
    index: usize,
) -> Result<ImageTree> {
    let Some(number) = generation else {
        return vm.store().base_tree(record.disks[index]);
    };
    let files = vm.generation(number);
    let manifest = vm.manifest(number)?;
    files.load_disk_tree(&manifest, index)
}

/// The tree of a disk, from the tree of the generation that it rests on and the blocks that
/// were written since.
pub(crate) fn tree_since(
    vm: &VmDir,
    record: &VmRecord,
    generation: Option<u64>,
    index: usize,
    image: &DiskImage,
) -> Result<ImageTree> {
    let mut tree = tree_of(vm, record, generation, index)?;
    let (stop, _) = backing_of(vm, record, generation, index);
    let written = image.allocated_above(&stop)?;
    tree.rehash(image, &written)
        .map_err(Error::reconcile("cannot hash a disk"))?;
    Ok(tree)
}
