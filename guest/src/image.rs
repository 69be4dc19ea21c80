//! A guest's folder: kernel, initrd, disk and `guest.json`, which says how they go together.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::GuestError;

const DESCRIPTION_FILE: &str = "guest.json";
const FORMAT_VERSION: u32 = 1;
/// `guest.json` has a few hundred bytes; nothing longer is read.
const DESCRIPTION_LIMIT_BYTES: u64 = 64 * 1024;

/// Size of the guest's screen, in pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Screen {
    /// Pixels from left to right.
    pub width: u16,
    /// Pixels from top to bottom.
    pub height: u16,
}

/// A complete guest on disk. All paths are absolute if the folder's was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestImage {
    /// The folder that holds the files.
    pub dir: PathBuf,
    /// Linux kernel, for QEMU's `-kernel`.
    pub kernel: PathBuf,
    /// For QEMU's `-initrd`.
    pub initrd: PathBuf,
    /// Raw disk, read-only and sparse: put an overlay over it.
    pub disk: PathBuf,
    /// The kernel's command line, for QEMU's `-append`.
    pub append: String,
    /// The line on the first serial port that says that the desktop can be used.
    pub ready_marker: String,
    /// The memory that the guest was tried with, in MiB.
    pub memory_mib: u32,
    /// The screen that it comes up with.
    pub screen: Screen,
}

/// `guest.json`. File names are relative to its folder.
#[derive(Serialize, Deserialize)]
pub(crate) struct Description {
    version: u32,
    kernel: String,
    initrd: String,
    disk: String,
    append: String,
    ready_marker: String,
    memory_mib: u32,
    screen: Screen,
}

impl Description {
    pub(crate) const KERNEL: &str = "vmlinuz";
    pub(crate) const INITRD: &str = "initrd.img";
    pub(crate) const DISK: &str = "disk.raw";

    /// What our own recipe makes.
    pub(crate) fn of_the_recipe() -> Self {
        Self {
            version: FORMAT_VERSION,
            kernel: Self::KERNEL.into(),
            initrd: Self::INITRD.into(),
            disk: Self::DISK.into(),
            append: crate::recipe::APPEND.into(),
            ready_marker: crate::recipe::READY_MARKER.into(),
            memory_mib: crate::recipe::MEMORY_MIB,
            screen: crate::recipe::SCREEN,
        }
    }

    pub(crate) fn file_names(&self) -> [&str; 3] {
        [&self.kernel, &self.initrd, &self.disk]
    }

    /// Makes `dir` a guest: the last file to be written, so that its presence means completeness.
    pub(crate) fn write(&self, dir: &Path) -> Result<(), GuestError> {
        let path = dir.join(DESCRIPTION_FILE);
        let file = File::create(&path).map_err(GuestError::io("create", &path))?;
        serde_json::to_writer_pretty(&file, self)
            .map_err(|error| GuestError::io("write", &path)(error.into()))?;
        file.sync_all().map_err(GuestError::io("write", &path))
    }

    pub(crate) fn read(dir: &Path) -> Result<Self, GuestError> {
        let path = dir.join(DESCRIPTION_FILE);
        let bad = |problem: String| GuestError::NotAGuest {
            path: dir.into(),
            problem,
        };
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(bad(format!("it has no {DESCRIPTION_FILE}")));
            }
            Err(error) => return Err(GuestError::io("open", &path)(error)),
        };
        let mut text = Vec::new();
        file.take(DESCRIPTION_LIMIT_BYTES)
            .read_to_end(&mut text)
            .map_err(GuestError::io("read", &path))?;
        let description: Self = serde_json::from_slice(&text)
            .map_err(|error| bad(format!("{DESCRIPTION_FILE}: {error}")))?;
        if description.version != FORMAT_VERSION {
            return Err(bad(format!(
                "{DESCRIPTION_FILE} has version {}, this program knows {FORMAT_VERSION}",
                description.version
            )));
        }
        for name in description.file_names() {
            // The description may come from elsewhere: it names files beside it and nothing else.
            if name.is_empty() || name.starts_with('.') || name.contains('/') {
                return Err(bad(format!(
                    "{DESCRIPTION_FILE} names a file outside the folder: {name:?}"
                )));
            }
            if !dir.join(name).is_file() {
                return Err(bad(format!("{name} is missing")));
            }
        }
        Ok(description)
    }
}

impl GuestImage {
    /// Reads a folder that [`crate::build`] made.
    ///
    /// # Errors
    /// [`GuestError::NotAGuest`] if it is none or not complete, [`GuestError::Io`] if it can't be read.
    pub fn load(dir: &Path) -> Result<Self, GuestError> {
        let description = Description::read(dir)?;
        Ok(Self {
            dir: dir.into(),
            kernel: dir.join(&description.kernel),
            initrd: dir.join(&description.initrd),
            disk: dir.join(&description.disk),
            append: description.append,
            ready_marker: description.ready_marker,
            memory_mib: description.memory_mib,
            screen: description.screen,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guest_in(dir: &Path) {
        for name in Description::of_the_recipe().file_names() {
            std::fs::write(dir.join(name), name).unwrap();
        }
        Description::of_the_recipe().write(dir).unwrap();
    }

    fn problem(dir: &Path) -> String {
        match GuestImage::load(dir) {
            Err(GuestError::NotAGuest { problem, .. }) => problem,
            other => panic!("expected NotAGuest, got {other:?}"),
        }
    }

    #[test]
    fn what_was_written_is_read_back() {
        let dir = tempfile::tempdir().unwrap();
        guest_in(dir.path());
        let image = GuestImage::load(dir.path()).unwrap();
        assert_eq!(image.disk, dir.path().join("disk.raw"));
        assert_eq!(image.ready_marker, crate::recipe::READY_MARKER);
        assert_eq!(
            image.screen,
            Screen {
                width: 1280,
                height: 800
            }
        );
    }

    #[test]
    fn an_incomplete_folder_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert!(problem(dir.path()).contains("no guest.json"));
        guest_in(dir.path());
        std::fs::remove_file(dir.path().join("initrd.img")).unwrap();
        assert_eq!(problem(dir.path()), "initrd.img is missing");
    }

    #[test]
    fn files_outside_the_folder_are_refused() {
        for name in ["/etc/passwd", "../disk.raw", "", "."] {
            let dir = tempfile::tempdir().unwrap();
            guest_in(dir.path());
            let mut description = Description::of_the_recipe();
            description.disk = name.into();
            description.write(dir.path()).unwrap();
            assert!(problem(dir.path()).contains("outside"), "{name:?}");
        }
    }

    #[test]
    fn a_later_format_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        guest_in(dir.path());
        let mut description = Description::of_the_recipe();
        description.version = 2;
        description.write(dir.path()).unwrap();
        assert!(problem(dir.path()).contains("version 2"));
    }
}
