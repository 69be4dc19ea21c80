//! Reading and writing chains of overlays while no guest does.
//!
//! The VM must stand still: paused, so that QEMU has written everything to the files, for
//! reading; not running at all, or waiting for its device state, for writing. QEMU locks its
//! images; this doesn't look at its locks.

use std::collections::HashSet;
use std::fmt;
use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use imago::file::File as ImagoFile;
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{FormatAccess, ShallowMapping};

use crate::error::Context as _;
use crate::{Error, Result};

/// The unit in which disks are compared and moved, in bytes.
pub const PAGE_SIZE: usize = 4096;

/// More overlays than any VM has; a chain that is longer is taken for a loop.
const LAYERS_MAX: usize = 1000;

/// What a file of a chain says is behind it.
enum Behind {
    Raw(PathBuf),
    Qcow2(PathBuf),
    Nothing,
}

/// Opens one qcow2 file, with nothing behind it yet.
fn open_layer(path: &Path, writable: bool) -> Result<(Qcow2<ImagoFile>, Behind)> {
    let image = |problem: String| Error::Image {
        path: path.to_owned(),
        problem,
    };
    let mut layer = Qcow2::<ImagoFile>::open_path(path, writable).context("open", path)?;
    if layer.requires_external_data_file() {
        return Err(image(
            "keeps its data in another file, which is not supported".into(),
        ));
    }
    layer.set_data_file(None);
    let behind = match (
        layer.implicit_backing_file(),
        layer.implicit_backing_format(),
    ) {
        (None, _) => Behind::Nothing,
        (Some(name), format) => {
            let file = path.parent().unwrap_or(Path::new("")).join(name);
            match format.map(String::as_str) {
                Some("raw") => Behind::Raw(file),
                Some("qcow2") => Behind::Qcow2(file),
                other => {
                    let said = other.unwrap_or("nothing");
                    return Err(image(format!(
                        "says {said} about the format of its backing file, which must be raw or \
                         qcow2; tell it with qemu-img rebase -u -F FORMAT"
                    )));
                }
            }
        }
    };
    Ok((layer, behind))
}

/// The qcow2 files of a chain, topmost first, and the raw file they end in.
type Chain = (Vec<(PathBuf, Qcow2<ImagoFile>)>, Option<PathBuf>);

fn open_chain(top: &Path, writable: bool) -> Result<Chain> {
    let mut layers = Vec::new();
    let mut seen = HashSet::new();
    let mut path = top.to_owned();
    loop {
        let identity = fs::canonicalize(&path).context("find", &path)?;
        if !seen.insert(identity) || layers.len() == LAYERS_MAX {
            let problem = "is part of a chain of backing files without an end".to_owned();
            return Err(Error::Image { path, problem });
        }
        let (layer, behind) = open_layer(&path, writable && layers.is_empty())?;
        layers.push((path, layer));
        match behind {
            Behind::Qcow2(next) => path = next,
            Behind::Raw(base) => return Ok((layers, Some(base))),
            Behind::Nothing => return Ok((layers, None)),
        }
    }
}

/// The overlays of a chain, topmost first, by their headers. What they end in is not among them.
///
/// # Errors
/// As [`OverlayReader::open`]'s, though nothing is read but headers.
pub fn chain_of(top: &Path) -> Result<Vec<PathBuf>> {
    let (layers, _) = open_chain(top, false)?;
    Ok(layers.into_iter().map(|(path, _)| path).collect())
}

/// A stretch of a disk that a layer decides, in bytes. Sorted and disjoint within a layer.
struct Extent {
    range: Range<u64>,
    zero: bool,
}

struct Layer {
    path: PathBuf,
    image: FormatAccess<ImagoFile>,
    extents: Vec<Extent>,
}

impl Layer {
    fn new(path: PathBuf, mut image: Qcow2<ImagoFile>) -> Result<Self> {
        // On its own, what it hasn't allocated is told apart from zeroes it has written.
        image.set_backing(None);
        let image = FormatAccess::new(image);
        let extents = Self::extents(&image).context("read the allocation of", &path)?;
        Ok(Self {
            path,
            image,
            extents,
        })
    }

    fn extents(image: &FormatAccess<ImagoFile>) -> std::io::Result<Vec<Extent>> {
        let mut extents: Vec<Extent> = Vec::new();
        let mut offset = 0;
        while offset < image.size() {
            let (mapping, length) = image.get_shallow_mapping(offset, image.size() - offset)?;
            let length = length.min(image.size() - offset);
            if length == 0 {
                return Err(std::io::Error::other("a mapping of no length"));
            }
            let range = offset..offset + length;
            offset = range.end;
            let zero = match mapping {
                ShallowMapping::Zero {
                    explicit: false, ..
                }
                | ShallowMapping::Eof { .. } => {
                    continue;
                }
                ShallowMapping::Zero { .. } => true,
                _ => false,
            };
            match extents.last_mut() {
                Some(last) if last.range.end == range.start && last.zero == zero => {
                    last.range.end = range.end;
                }
                _ => extents.push(Extent { range, zero }),
            }
        }
        Ok(extents)
    }
}

/// A disk as its guest sees it, through its whole chain of overlays.
pub struct OverlayReader {
    layers: Vec<Layer>,
    base: Option<(PathBuf, File)>,
    size: u64,
}

impl fmt::Debug for OverlayReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let paths: Vec<_> = self.layers.iter().map(|layer| &layer.path).collect();
        f.debug_struct("OverlayReader")
            .field("layers", &paths)
            .finish_non_exhaustive()
    }
}

impl OverlayReader {
    /// Opens a chain by its topmost file, to read.
    pub fn open(top: &Path) -> Result<Self> {
        let (layers, base) = open_chain(top, false)?;
        let layers: Vec<Layer> = layers
            .into_iter()
            .map(|(path, image)| Layer::new(path, image))
            .collect::<Result<_>>()?;
        let base = base.map(|path| File::open(&path).context("open", &path).map(|f| (path, f)));
        let size = layers.first().map_or(0, |top| top.image.size());
        Ok(Self {
            layers,
            base: base.transpose()?,
            size,
        })
    }

    /// Size of the disk in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Number of pages, the last of which may be one in part.
    pub fn pages(&self) -> u64 {
        self.size.div_ceil(PAGE_SIZE as u64)
    }

    /// The files of the chain, topmost first.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        let base = self.base.as_ref().map(|(path, _)| path.as_path());
        self.layers
            .iter()
            .map(|layer| layer.path.as_path())
            .chain(base)
    }

    /// The pages that the files above `stop` have written, whatever is in them: all others are
    /// as in `stop`. Sorted, disjoint, and not touching each other.
    pub fn allocated_above(&self, stop: &Path) -> Result<Vec<Range<u64>>> {
        let identity = fs::canonicalize(stop).context("find", stop)?;
        let above = self
            .files()
            .position(|file| fs::canonicalize(file).is_ok_and(|file| file == identity))
            .ok_or_else(|| Error::Image {
                path: stop.to_owned(),
                problem: format!("is not behind {}", self.top().display()),
            })?;
        let page = PAGE_SIZE as u64;
        let mut ranges: Vec<Range<u64>> = self
            .layers
            .iter()
            .take(above)
            .flat_map(|layer| &layer.extents)
            .map(|e| e.range.start / page..e.range.end.min(self.size).div_ceil(page))
            .filter(|range| !range.is_empty())
            .collect();
        ranges.sort_unstable_by_key(|range| range.start);
        let mut merged: Vec<Range<u64>> = Vec::new();
        for range in ranges {
            match merged.last_mut() {
                Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
                _ => merged.push(range),
            }
        }
        Ok(merged)
    }

    /// Reads one page; what is behind the end of the disk is zero.
    pub fn read_page(&self, index: u64, page: &mut [u8; PAGE_SIZE]) -> Result<()> {
        self.read_pages(index, page)
    }

    /// Reads consecutive pages, as many as fit. The fastest way to read much.
    pub fn read_pages(&self, first: u64, pages: &mut [u8]) -> Result<()> {
        let offset = first
            .checked_mul(PAGE_SIZE as u64)
            .filter(|&offset| offset < self.size);
        let Some(offset) = offset else {
            let problem = format!("has {} pages, no page {first}", self.pages());
            return Err(Error::Image {
                path: self.top().to_owned(),
                problem,
            });
        };
        let length = (self.size - offset).min(pages.len() as u64) as usize;
        let (inside, outside) = pages.split_at_mut(length);
        outside.fill(0);
        self.read_below(0, offset, inside)
    }

    fn top(&self) -> &Path {
        self.layers
            .first()
            .map_or(Path::new(""), |layer| &layer.path)
    }

    /// Reads what layer number `depth` and those behind it hold.
    fn read_below(&self, depth: usize, mut offset: u64, mut buffer: &mut [u8]) -> Result<()> {
        let Some(layer) = self.layers.get(depth) else {
            return self.read_base(offset, buffer);
        };
        // A smaller disk behind a larger one: the rest is zero, whatever is farther behind.
        let inside = layer
            .image
            .size()
            .saturating_sub(offset)
            .min(buffer.len() as u64) as usize;
        let (mut rest, outside) = std::mem::take(&mut buffer).split_at_mut(inside);
        outside.fill(0);
        let mut next = layer
            .extents
            .partition_point(|extent| extent.range.end <= offset);
        while !rest.is_empty() {
            let extent = layer
                .extents
                .get(next)
                .filter(|extent| extent.range.start <= offset);
            let end = match (extent, layer.extents.get(next)) {
                (Some(extent), _) => extent.range.end,
                (None, Some(after)) => after.range.start,
                (None, None) => u64::MAX,
            };
            let length = (end - offset).min(rest.len() as u64) as usize;
            let (now, later) = std::mem::take(&mut rest).split_at_mut(length);
            match extent {
                None => self.read_below(depth + 1, offset, now)?,
                Some(extent) if extent.zero => now.fill(0),
                Some(_) => layer.image.read(now, offset).context("read", &layer.path)?,
            }
            next += usize::from(extent.is_some());
            offset += length as u64;
            rest = later;
        }
        Ok(())
    }

    fn read_base(&self, mut offset: u64, mut buffer: &mut [u8]) -> Result<()> {
        let Some((path, file)) = &self.base else {
            buffer.fill(0);
            return Ok(());
        };
        while !buffer.is_empty() {
            match file.read_at(buffer, offset) {
                // Behind its end.
                Ok(0) => {
                    buffer.fill(0);
                    break;
                }
                Ok(count) => {
                    offset += count as u64;
                    buffer = buffer.get_mut(count..).unwrap_or_default();
                }
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                error => return error.context("read", path).map(drop),
            }
        }
        Ok(())
    }
}

/// Writes into the topmost overlay of a chain.
pub struct OverlayWriter {
    path: PathBuf,
    image: FormatAccess<ImagoFile>,
}

impl fmt::Debug for OverlayWriter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OverlayWriter")
            .field("path", &self.path)
            .finish_non_exhaustive()
    }
}

impl OverlayWriter {
    /// Opens a chain by its topmost file, to write into that one. No VM may have it open.
    pub fn open(top: &Path) -> Result<Self> {
        let (layers, base) = open_chain(top, true)?;
        let base = base.map(|path| {
            let raw = Raw::<ImagoFile>::open_path(&path, false).context("open", &path)?;
            Ok::<_, Error>(FormatAccess::new(raw))
        });
        let mut below = base.transpose()?;
        // The ones behind are read where a page is smaller than a cluster.
        for (_, mut layer) in layers.into_iter().rev() {
            layer.set_backing(below.take());
            below = Some(FormatAccess::new(layer));
        }
        match below {
            Some(image) => Ok(Self {
                path: top.to_owned(),
                image,
            }),
            None => Err(Error::Image {
                path: top.to_owned(),
                problem: "is empty".into(),
            }),
        }
    }

    /// Writes one page; what is behind the end of the disk is left out. A page of zeroes takes
    /// no space.
    pub fn write_page(&self, index: u64, page: &[u8; PAGE_SIZE]) -> Result<()> {
        let offset = index
            .checked_mul(PAGE_SIZE as u64)
            .filter(|&o| o < self.image.size());
        let Some(offset) = offset else {
            let problem = format!("has {} bytes, no page {index}", self.image.size());
            return Err(Error::Image {
                path: self.path.clone(),
                problem,
            });
        };
        let length = (self.image.size() - offset).min(PAGE_SIZE as u64);
        let written = if page.iter().all(|&byte| byte == 0) {
            self.image.write_zeroes(offset, length)
        } else {
            let inside = page.get(..length as usize).unwrap_or(page);
            self.image.write(inside, offset)
        };
        written.context("write to", &self.path)
    }

    /// Makes everything written so far durable. Without it, none of it is.
    pub fn sync(&self) -> Result<()> {
        self.image
            .flush()
            .and_then(|()| self.image.sync())
            .context("sync", &self.path)
    }
}
