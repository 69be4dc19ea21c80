//! A VM's folder in the state directory: what it holds, and who may change it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::{Store, runtime_base};
use crate::at_rest;
use crate::error::{Error, Result};
use crate::files::{self, FileLock};
use crate::generation::{GenerationFiles, Manifest};
use crate::lease::{Lease, Title};
use crate::vm::{VmName, VmRecord};

/// A VM's folder in the state directory.
#[derive(Clone, Debug)]
pub struct VmDir {
    pub(super) dir: PathBuf,
    pub(super) name: VmName,
    pub(super) store: Store,
}

impl VmDir {
    /// Its name.
    pub fn name(&self) -> &VmName {
        &self.name
    }

    /// The site's store.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Makes its folder, where there is none; a new one is encrypted if the file system can.
    pub(crate) fn make(&self) -> Result<()> {
        files::make_dir(&self.dir)?;
        if self.store.plain {
            return Ok(());
        }
        at_rest::shelter(&self.dir, &self.store.keys)
    }

    pub(super) fn record_path(&self) -> PathBuf {
        self.dir.join("vm.json")
    }

    pub(crate) fn lease_path(&self) -> PathBuf {
        self.dir.join("lease.json")
    }

    pub(crate) fn moving_path(&self) -> PathBuf {
        self.dir.join("moving.json")
    }

    pub(crate) fn resuming_path(&self) -> PathBuf {
        self.dir.join("resuming.json")
    }

    /// What the VM is; `None` if there is none of this name.
    pub fn try_record(&self) -> Result<Option<VmRecord>> {
        files::read_json(&self.record_path())
    }

    /// What the VM is.
    pub fn record(&self) -> Result<VmRecord> {
        self.try_record()?.ok_or_else(|| {
            Error::Refused(format!(
                "there is no VM {} at {}; `replay-migrate vm list` shows those there are",
                self.name,
                self.store.root.display()
            ))
        })
    }

    /// Writes down a new VM, with its lease.
    pub(crate) fn create(&self, record: &VmRecord, title: impl Into<Title>) -> Result<()> {
        self.make()?;
        for part in ["generations", "live", "log", "incoming"] {
            files::make_dir(&self.dir.join(part))?;
        }
        title.into().store(&self.lease_path())?;
        files::write_json(&self.record_path(), record)?;
        let vms = self.dir.parent().unwrap_or(&self.dir);
        files::sync_dir(vms).map_err(Error::file("sync", vms))
    }

    /// Whether this site may run it.
    pub fn lease(&self) -> Result<Lease> {
        Ok(self.title()?.lease)
    }

    /// Whether this site may run it, and how that came about.
    pub fn title(&self) -> Result<Title> {
        Title::load(&self.lease_path())?.ok_or_else(|| Error::Damaged {
            path: self.lease_path(),
            reason: "it is missing".into(),
        })
    }

    /// Writes down, outside the VM's folder, that it was here and by which lease: a giver that
    /// asks later whether it was taken must not hear that it never was.
    pub(crate) fn note_deleted(&self) -> Result<()> {
        let path = self.store.deleted_path(self.record()?.id);
        files::make_dir(path.parent().unwrap_or(&self.store.root))?;
        // Without a readable lease there is nothing to answer by, and no reason to keep the rest.
        self.lease()
            .map_or(Ok(()), |lease| Title::from(&lease).store(&path))
    }

    /// Locks the VM against other processes of this site.
    pub(crate) fn lock(&self) -> Result<FileLock> {
        FileLock::try_take(&self.dir.join("lock"))?.ok_or_else(|| {
            Error::Refused(format!(
                "another replay-migrate process is changing {} at this site; try again when it \
                 is done",
                self.name
            ))
        })
    }

    /// As [`Self::lock`], but waits a little: a conversation that was just cut off is still
    /// clearing away what it held, and a generation that is being made for standbys is soon made.
    pub(crate) async fn lock_soon(&self) -> Result<FileLock> {
        const PATIENCE: Duration = Duration::from_secs(10);
        // A file lock can be awaited by a thread only, and that thread could not be called off.
        const STEP: Duration = Duration::from_millis(50);
        let begun = Instant::now();
        loop {
            match self.lock() {
                Err(Error::Refused(_)) if begun.elapsed() < PATIENCE => {
                    tokio::time::sleep(STEP).await;
                }
                outcome => return outcome,
            }
        }
    }

    pub(crate) fn generation_dir(&self, number: u64) -> PathBuf {
        self.dir.join("generations").join(number.to_string())
    }

    /// The files of a generation.
    pub fn generation(&self, number: u64) -> GenerationFiles {
        GenerationFiles::at(self.generation_dir(number))
    }

    /// The manifest of a generation that has to be there.
    pub(crate) fn manifest(&self, number: u64) -> Result<Manifest> {
        self.generation(number).load_manifest()?.ok_or_else(|| {
            Error::Refused(format!(
                "generation {number} of {} is not there any more",
                self.name
            ))
        })
    }

    /// All generations that exist, oldest first.
    pub fn generations(&self) -> Result<Vec<Manifest>> {
        self.manifests(GenerationFiles::load_manifest)
    }

    /// The numbers of the generations that exist, and of those between them that were pruned:
    /// from one to the next the VM went on with nothing in between. Oldest first.
    pub(crate) fn line(&self) -> Result<Vec<u64>> {
        let manifests = self.manifests(|files| match files.load_manifest()? {
            None => files.load_pruned(),
            manifest => Ok(manifest),
        })?;
        Ok(manifests.iter().map(|m| m.generation).collect())
    }

    fn manifests(
        &self,
        load: impl Fn(&GenerationFiles) -> Result<Option<Manifest>>,
    ) -> Result<Vec<Manifest>> {
        let dir = self.dir.join("generations");
        let entries = match fs::read_dir(&dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(Error::file("list", &dir))?,
        };
        let mut generations = Vec::new();
        for entry in entries {
            let entry = entry.map_err(Error::file("list", &dir))?;
            let number = entry
                .file_name()
                .to_str()
                .and_then(|name| name.parse().ok());
            if let Some(number) = number
                && let Some(manifest) = load(&self.generation(number))?
            {
                generations.push(manifest);
            }
        }
        generations.sort_by_key(|manifest| manifest.generation);
        Ok(generations)
    }

    pub(crate) fn live_dir(&self) -> PathBuf {
        self.dir.join("live").join("run")
    }

    /// The log of what was typed on top of a generation.
    pub fn log_path(&self, generation: u64) -> PathBuf {
        self.dir.join("log").join(format!("{generation}.rmlog"))
    }

    /// All logs, oldest first, with the generation that each continues.
    pub fn logs(&self) -> Result<Vec<(u64, PathBuf)>> {
        let dir = self.dir.join("log");
        let mut logs = Vec::new();
        for entry in fs::read_dir(&dir).map_err(Error::file("list", &dir))? {
            let path = entry.map_err(Error::file("list", &dir))?.path();
            let number = path
                .file_name()
                .and_then(|name| name.to_str()?.strip_suffix(".rmlog")?.parse().ok());
            logs.extend(number.map(|number| (number, path)));
        }
        logs.sort();
        Ok(logs)
    }

    pub(crate) fn incoming(&self) -> PathBuf {
        self.dir.join("incoming")
    }

    /// Where sockets and the RAM of the running guest lie: short enough for socket paths, on
    /// tmpfs, for this user only. `role` tells the VM apart from forks of it.
    pub fn runtime_dir(&self, role: &str) -> Result<PathBuf> {
        let mut hasher = blake3::Hasher::new();
        hasher.update(self.dir.as_os_str().as_encoded_bytes());
        hasher.update(&[0]);
        hasher.update(role.as_bytes());
        let name = hasher.finalize().to_hex();
        Ok(runtime_base()?.join(&name[..16]))
    }
}
