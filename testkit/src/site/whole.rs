//! Whether a generation is what its manifest says: all of its files are hashed anew.

use std::fs;
use std::io;
use std::path::Path;

use reconciler::{FilePages, ImageTree, MAX_PAGES, Page, PageIndex, ReadPages, no_progress};
use serde_json::Value;
use vm_host::disk::OverlayReader;

use super::SiteError;

type Result<T> = std::result::Result<T, SiteError>;

/// Looks at a generation's folder: RAM, device state, disks through all that they rest on, and the
/// hash trees beside them.
///
/// # Errors
/// [`SiteError::NotWhole`] for the first file that is not what it should be.
pub fn whole_generation(dir: &Path) -> Result<()> {
    let path = dir.join("manifest.json");
    let read = fs::read(&path).map_err(|error| wrong(&path, &error))?;
    let manifest: Value = serde_json::from_slice(&read).map_err(|error| wrong(&path, &error))?;
    for (file, image) in [("ram.img", "ram"), ("device.bin", "device")] {
        let image = &manifest[image];
        let path = dir.join(file);
        let opened = fs::File::open(&path).and_then(FilePages::new);
        let pages = opened.map_err(|error| wrong(&path, &error))?;
        let bytes = path.metadata().map_err(|error| wrong(&path, &error))?.len();
        if Some(bytes) != image["bytes"].as_u64() {
            return Err(wrong(&path, &format!("it has {bytes} bytes")));
        }
        same_root(&pages, image, &path)?;
    }
    tree(&dir.join("ram.tree"), &manifest["ram"])?;
    let disks = manifest["disks"].as_array().into_iter().flatten();
    for (index, image) in disks.enumerate() {
        let path = dir.join(format!("disk{index}.qcow2"));
        let disk = OverlayReader::open(&path).map_err(|error| wrong(&path, &error))?;
        same_root(&Disk(disk), image, &path)?;
        tree(&dir.join(format!("disk{index}.tree")), image)?;
    }
    Ok(())
}

fn wrong(path: &Path, reason: &(impl ToString + ?Sized)) -> SiteError {
    SiteError::NotWhole {
        path: path.to_owned(),
        reason: reason.to_string(),
    }
}

fn same_root(pages: &dyn ReadPages, image: &Value, path: &Path) -> Result<()> {
    let built = ImageTree::build(pages, &no_progress).map_err(|error| wrong(path, &error))?;
    is_root_of(&built, image, path)
}

fn tree(path: &Path, image: &Value) -> Result<()> {
    let bytes = fs::read(path).map_err(|error| wrong(path, &error))?;
    let kept = ImageTree::decode(&bytes, MAX_PAGES).map_err(|error| wrong(path, &error))?;
    is_root_of(&kept, image, path)
}

fn is_root_of(tree: &ImageTree, image: &Value, path: &Path) -> Result<()> {
    let told = serde_json::from_value(image["root"].clone());
    if tree.root() == told.map_err(|error| wrong(path, &error))? {
        Ok(())
    } else {
        Err(wrong(path, "it is not what the manifest says"))
    }
}

/// A disk through all that it rests on.
struct Disk(OverlayReader);

impl ReadPages for Disk {
    fn pages(&self) -> u64 {
        self.0.pages()
    }

    fn read(&self, index: PageIndex, page: &mut Page) -> io::Result<()> {
        self.0.read_page(index.0, page).map_err(io::Error::other)
    }
}
