//! Disks: chains of qcow2 overlays over a raw base.
//!
//! Why: what a guest writes goes into its topmost overlay, so that every generation of a disk
//! is a file that never changes again, and what changed since is the allocation of the files
//! above it. The format is QEMU's `docs/interop/qcow2.txt`.
//!
//! Overlays are made with clusters of 4 KiB, the unit in which images are compared: the
//! allocation map then names the written pages and no neighbours, and writing a page never
//! copies one.
//!
//! Promise: a function here never follows a backing file of a format that isn't written in the
//! overlay (a guest could put any header into a raw disk), and makes no file that is whole only
//! in part. All of it is synchronous, and may be called from any thread.

mod overlay;

use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;

pub use overlay::{OverlayReader, OverlayWriter, PAGE_SIZE, chain_of};

use crate::error::Context as _;
use crate::programs::{qemu_img, run};
use crate::{Error, Result};

/// Formats a disk image can have here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// The bytes of the disk.
    Raw,
    /// QEMU's copy-on-write format.
    Qcow2,
}

impl Format {
    fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// What an image is, by its own account.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Info {
    virtual_size: u64,
    format: String,
}

fn info(path: &Path, format: Option<Format>) -> Result<Info> {
    fs::metadata(path).context("find", path)?;
    let path = std::path::absolute(path).context("make absolute", path)?;
    let file = text(&path)?;
    let mut args = vec!["info", "--output=json", "-U"];
    args.extend(format.iter().flat_map(|format| ["-f", format.name()]));
    args.push(file);
    let json = run(&qemu_img(), args, &format!("read {file}"))?;
    serde_json::from_str(&json).map_err(|error| Error::Image {
        problem: format!("is not understood: {error}"),
        path,
    })
}

fn text(path: &Path) -> Result<&str> {
    let problem = "is not UTF-8, which qemu-img's options can't carry; rename it";
    path.to_str().ok_or_else(|| Error::Path {
        path: path.to_owned(),
        problem,
    })
}

/// The format of an image, in QEMU's words, guessed from its content: only for images that no
/// guest has written to.
pub fn format_of(image: &Path) -> Result<String> {
    Ok(info(image, None)?.format)
}

/// Size of the disk an image holds, in bytes. The image may be in use.
pub fn virtual_size(path: &Path, format: Format) -> Result<u64> {
    Ok(info(path, Some(format))?.virtual_size)
}

/// Makes an empty overlay.
///
/// `backing` is written into it as it is given; a relative path is relative to the overlay's
/// directory. It may be in use by a VM. Fails if the overlay exists already.
pub fn create_overlay(path: &Path, backing: &Path, format: Format) -> Result<()> {
    if path.exists() {
        let problem = "exists already; an overlay is made once".to_owned();
        return Err(Error::Image {
            path: path.to_owned(),
            problem,
        });
    }
    let name = text(backing)?;
    if backing.is_relative() && name.contains(':') {
        let problem = "has a colon, which QEMU takes for a protocol; use an absolute path";
        return Err(Error::Path {
            path: backing.to_owned(),
            problem,
        });
    }
    let beside = path.parent().unwrap_or(Path::new("")).join(backing);
    let size = virtual_size(&beside, format)?;
    let absolute = std::path::absolute(path).context("make absolute", path)?;
    // Without opening the backing file (-u), which a running VM may have locked.
    let options = [
        "create",
        "-q",
        "-u",
        "-f",
        "qcow2",
        "-o",
        "cluster_size=4k",
        "-b",
        name,
        "-F",
    ];
    let size = size.to_string();
    let rest = [format.name(), text(&absolute)?, &size];
    run(
        &qemu_img(),
        options.into_iter().chain(rest),
        &format!("create {}", path.display()),
    )?;
    Ok(())
}

/// Writes what the overlays from `top` on hold into `base`, an overlay behind them: `base` is then what `top`
/// was. Until it takes that one's name, all that rests on `top` reads as before, and so does `top`; what is between
/// doesn't.
///
/// No VM may have them open.
pub fn merge_overlays(top: &Path, base: &Path) -> Result<()> {
    let reader = OverlayReader::open(top)?;
    let held = reader.allocated_above(base)?;
    let writer = OverlayWriter::open(base)?;
    let mut page = [0; PAGE_SIZE];
    for index in held.into_iter().flatten() {
        reader.read_page(index, &mut page)?;
        writer.write_page(index, &page)?;
    }
    writer.sync()
}

/// Makes an empty disk of its own, with nothing behind it.
pub fn create_empty(path: &Path, bytes: u64) -> Result<()> {
    if path.exists() {
        let problem = "exists already; a disk is made once".to_owned();
        return Err(Error::Image {
            path: path.to_owned(),
            problem,
        });
    }
    let absolute = std::path::absolute(path).context("make absolute", path)?;
    let size = bytes.to_string();
    let args = [
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "cluster_size=4k",
        text(&absolute)?,
        &size,
    ];
    run(&qemu_img(), args, &format!("create {}", path.display()))?;
    Ok(())
}

/// Copies a disk image of any format that `qemu-img` knows into a raw, sparse file, padded to
/// whole pages. Replaces what was there, but only once the copy is complete and on the disk.
///
/// Without a `format` it is guessed from the image's content: name it for images that a guest
/// has written to.
pub fn import_base(image: &Path, format: Option<&str>, raw: &Path) -> Result<()> {
    fs::metadata(image).context("find", image)?;
    let fresh = PathBuf::from(format!("{}.new", text(raw)?));
    let (from, to) = (
        std::path::absolute(image).context("make absolute", image)?,
        std::path::absolute(&fresh).context("make absolute", &fresh)?,
    );
    let mut args = vec!["convert", "-O", "raw", "-S", "4k"];
    args.extend(format.iter().flat_map(|format| ["-f", format]));
    args.extend([text(&from)?, text(&to)?]);
    let copied = run(&qemu_img(), args, &format!("convert {}", image.display())).and_then(|_| {
        let file = fs::OpenOptions::new()
            .write(true)
            .open(&fresh)
            .context("open", &fresh)?;
        let length = file.metadata().context("measure", &fresh)?.len();
        let padded = length.next_multiple_of(PAGE_SIZE as u64);
        file.set_len(padded)
            .and_then(|()| file.sync_all())
            .context("write", &fresh)
    });
    if let Err(error) = copied {
        crate::runtime::remove(&fresh)?;
        return Err(error);
    }
    fs::rename(&fresh, raw).context("rename to", raw)
}
