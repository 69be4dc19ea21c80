//! What is noted of images that are on their way, for whoever is about to use one.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use reconciler::PAGE_SIZE;
use serde::{Deserialize, Serialize};

use super::pages::Pages;
use super::socket;
use crate::error::{Error, Result};
use crate::files;
use crate::identity::SiteKey;
use crate::peers::Peer;
use crate::store::{Store, VmDir};
use crate::vm::{FileHash, VmRecord};

/// The version of the note's form.
const VERSION: u32 = 1;

/// That an image is on its way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Note {
    version: u32,
    /// Its length.
    pub(super) bytes: u64,
    /// The site that brings it.
    pub(crate) from: SiteKey,
    /// What that was called here.
    pub(crate) from_name: String,
    /// All has come, and it is another image.
    #[serde(default)]
    pub(crate) wrong: bool,
}

impl Note {
    /// An image of this length is on its way from a site.
    pub(super) fn of(bytes: u64, from: &Peer) -> Self {
        Self {
            version: VERSION,
            bytes,
            from: from.key,
            from_name: from.name.to_string(),
            wrong: false,
        }
    }

    /// All has come, and it is another image.
    pub(super) fn of_another(self) -> Self {
        Self {
            wrong: true,
            ..self
        }
    }
}

/// The files of an image that is on its way.
pub(crate) struct Paths {
    pub(super) data: PathBuf,
    pub(crate) note: PathBuf,
    pub(super) pages: PathBuf,
    pub(super) tree: PathBuf,
}

impl Paths {
    pub(crate) fn of(store: &Store, hash: FileHash) -> Self {
        let data = store.base_path(hash);
        Self {
            note: data.with_extension("arriving"),
            pages: data.with_extension("pages"),
            tree: data.with_extension("tree"),
            data,
        }
    }

    /// The image is there, whole: nothing says any longer that it is on its way.
    pub(crate) fn settle(&self) -> Result<()> {
        files::remove_file(&self.note)?;
        files::remove_file(&self.pages)?;
        std::fs::set_permissions(&self.data, Permissions::from_mode(0o400))
            .map_err(Error::file("protect", &self.data))
    }

    /// Another file takes its place: what was said of its pages was said of this one.
    pub(crate) fn forget_tree(&self) -> Result<()> {
        files::remove_file(&self.tree)
    }
}

/// What is known of an image that is on its way; nothing, if it is not.
pub(crate) fn note_of(store: &Store, hash: FileHash) -> Result<Option<Note>> {
    let path = Paths::of(store, hash).note;
    let note: Option<Note> = files::read_json(&path)?;
    match note {
        Some(note) if note.version != VERSION => Err(Error::Damaged {
            path,
            reason: format!(
                "it is of version {}; this program reads version {VERSION}",
                note.version
            ),
        }),
        note => Ok(note),
    }
}

/// Bytes of an image that were not here when that was noted last, and who brings them.
pub(crate) fn missing(store: &Store, hash: FileHash) -> Result<Option<(u64, Note)>> {
    let Some(note) = note_of(store, hash)? else {
        return Ok(None);
    };
    let count = note.bytes.div_ceil(PAGE_SIZE as u64);
    let here = Pages::load(&Paths::of(store, hash).pages, count)?;
    let missing = count - here.map_or(0, |here| here.count());
    Ok(Some((missing * PAGE_SIZE as u64, note)))
}

/// VMs here whose disks rest on this image, and the number of the disk that does. Of those that can't be read it is
/// not known.
pub(super) fn users(store: &Store, hash: FileHash) -> Result<Vec<(VmDir, usize)>> {
    let mut users = Vec::new();
    for vm in store.vms()? {
        let disks = match vm.record() {
            Ok(record) => record.disks,
            Err(error) => {
                let (vm, error) = (vm.name(), error.chain());
                tracing::warn!(%vm, error, "what it rests on is not known");
                continue;
            }
        };
        let of_it = disks.into_iter().enumerate();
        let of_it = of_it.filter(|(_, disk)| disk.hash == hash);
        users.extend(of_it.map(|(index, _)| (vm.clone(), index)));
    }
    Ok(users)
}

/// Nothing is shipped that is not here.
pub(crate) fn require_whole(vm: &VmDir, record: &VmRecord) -> Result<()> {
    for disk in &record.disks {
        if let Some((bytes, note)) = missing(vm.store(), disk.hash)? {
            if note.wrong {
                return Err(Error::Refused(format!(
                    "the disk of {} rests on what {} gave for the image {}, and that is another image: it runs \
                     here, and can't be moved, shipped or captured",
                    vm.name(),
                    note.from_name,
                    disk.hash
                )));
            }
            return Err(Error::Refused(format!(
                "{} MiB of the disk of {} are still to come from {}: before they are here it can't be moved, shipped or \
                 captured (`replay-migrate vm status {}` shows how far that is)",
                bytes.div_ceil(1 << 20),
                vm.name(),
                note.from_name,
                vm.name()
            )));
        }
    }
    Ok(())
}

/// A VM is about to run on an image: if that is on its way, somebody must be there to bring it.
pub(crate) fn require_served(vm: &VmDir, hash: FileHash) -> Result<()> {
    let Some(note) = note_of(vm.store(), hash)? else {
        return Ok(());
    };
    if std::os::unix::net::UnixStream::connect(socket(vm.store(), hash)?).is_ok() {
        return Ok(());
    }
    Err(Error::Refused(format!(
        "a part of the disk of {} is still to come from {}, and the agent of this site brings it: start it with \
         `replay-migrate serve`",
        vm.name(),
        note.from_name
    )))
}
