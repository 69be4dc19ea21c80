//! The state directory of a site: where everything is.
//!
//! ```text
//! keys/                    the site's identity and the key of its logs
//! peers.json               the sites it knows
//! images/HASH              read-only base files: raw disk images, kernels; named by BLAKE3
//! images/HASH.tree         hash tree of a disk image
//! vms/NAME/vm.json         what the VM is
//! vms/NAME/lease.json      whether this site may run it
//! vms/NAME/lock            held while one process changes the VM
//! vms/NAME/moving.json     a move from here that is under way, or was cut off
//! vms/NAME/generations/N/  immutable states, and what is left of pruned ones
//! vms/NAME/seen/KEY.json   the newest generations that a peer is known to have
//! vms/NAME/live/run/       the overlays of the running VM, and what it rests on
//! vms/NAME/log/N.rmlog     what was typed on top of generation N
//! vms/NAME/incoming/ID/    a migration that is arriving; removed when it ends, however it ends
//! deleted/ID.json          the last lease of a VM that was deleted here
//! void/ID                  a hand-over that was given up, never to be taken
//! ```
//!
//! Overlays name their backing file relative to themselves, and all of them lie at the same
//! depth, so that a folder can be renamed into place and a state directory can be moved.
//! Sockets and the RAM of running guests lie in a runtime directory outside, on tmpfs.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use reconciler::{FilePages, ImageTree};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::files::{self, FileLock};
use crate::generation::{self, GenerationFiles, Manifest};
use crate::identity::{Identity, SiteKey};
use crate::lease::Lease;
use crate::peers::PeerStore;
use crate::vm::{BaseFile, FileHash, Id, VmName, VmRecord};

/// The version of the state directory's form.
const VERSION: u32 = 1;

#[derive(Serialize, Deserialize)]
struct SiteFile {
    version: u32,
}

/// A site's state directory.
#[derive(Clone, Debug)]
pub struct Store {
    root: PathBuf,
}

impl Store {
    /// Opens a state directory, and makes it where there is none.
    ///
    /// # Errors
    /// When it can't be made or is of another version.
    pub fn open(root: impl AsRef<Path>) -> Result<Self> {
        let root = root.as_ref();
        files::make_dir(root)?;
        let root = fs::canonicalize(root).map_err(Error::file("open", root))?;
        let store = Self { root };
        let path = store.root.join("site.json");
        match files::read_json::<SiteFile>(&path)? {
            None => {
                files::make_dir(&store.root.join("images"))?;
                files::make_dir(&store.root.join("vms"))?;
                files::write_json(&path, &SiteFile { version: VERSION })?;
            }
            Some(site) if site.version == VERSION => {}
            Some(site) => {
                return Err(Error::Refused(format!(
                    "{} is a state directory of version {}; this program reads version {VERSION}",
                    store.root.display(),
                    site.version
                )));
            }
        }
        Ok(store)
    }

    /// The state directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// This site's key, made on first use.
    pub fn identity(&self) -> Result<Identity> {
        Ok(Identity::load_or_create(&self.root)?)
    }

    /// Gives the site a new key; the former and the new one.
    ///
    /// # Errors
    /// While an agent serves, which would go on showing the old one.
    pub fn rotate_identity(&self) -> Result<(SiteKey, SiteKey)> {
        let _only = self.agent_lock()?.ok_or_else(|| {
            Error::Refused(format!(
                "an agent serves {} with the key that it has: stop `replay-migrate serve` first",
                self.root.display()
            ))
        })?;
        let former = self.identity()?.key();
        Ok((former, Identity::rotate(&self.root)?.key()))
    }

    /// The sites it knows.
    pub fn peers(&self) -> PeerStore {
        PeerStore::new(&self.root)
    }

    /// The key that this site's logs are encrypted with, made on first use.
    pub fn log_key(&self) -> Result<traces::LogKey> {
        let keys = self.root.join("keys");
        files::make_dir(&keys)?;
        traces::LogKey::load_or_create(&keys.join("log.key"))
            .map_err(Error::log("cannot use this site's log key"))
    }

    /// The VM of this name, whether or not it exists.
    pub fn vm(&self, name: &VmName) -> VmDir {
        VmDir {
            dir: self.root.join("vms").join(name.as_str()),
            name: name.clone(),
            store: self.clone(),
        }
    }

    /// All VMs, sorted by name.
    pub fn vms(&self) -> Result<Vec<VmDir>> {
        let mut vms = self.vm_dirs()?;
        vms.retain(|vm| vm.record_path().exists());
        Ok(vms)
    }

    /// All folders of VMs, sorted by name; also those of VMs that did not arrive whole.
    pub(crate) fn vm_dirs(&self) -> Result<Vec<VmDir>> {
        let dir = self.root.join("vms");
        let mut vms = Vec::new();
        for entry in fs::read_dir(&dir).map_err(Error::file("list", &dir))? {
            let entry = entry.map_err(Error::file("list", &dir))?;
            let name = entry
                .file_name()
                .to_str()
                .and_then(|name| name.parse().ok());
            vms.extend(name.map(|name| self.vm(&name)));
        }
        vms.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(vms)
    }

    /// The fencing number that a VM had when it was deleted here, if it ever was.
    pub(crate) fn deleted_fence(&self, id: Id) -> Result<Option<u64>> {
        Ok(Lease::load(&self.deleted_path(id))?.map(|lease| lease.fence()))
    }

    /// Where the last lease of a VM is kept that was deleted here.
    pub(crate) fn deleted_path(&self, id: Id) -> PathBuf {
        self.root.join("deleted").join(format!("{id}.json"))
    }

    /// Where hand-overs are noted that were given up.
    pub(crate) fn void_dir(&self) -> PathBuf {
        self.root.join("void")
    }

    /// The lock of the agent that serves this site, unless there is one.
    pub(crate) fn agent_lock(&self) -> Result<Option<FileLock>> {
        FileLock::try_take(&self.root.join("agent.lock"))
    }

    /// Where a base file lies, if this site has it.
    pub fn base_file(&self, hash: FileHash) -> Option<PathBuf> {
        let path = self.base_path(hash);
        path.exists().then_some(path)
    }

    pub(crate) fn base_path(&self, hash: FileHash) -> PathBuf {
        self.root.join("images").join(hash.to_string())
    }

    /// Takes a disk image of any format into the store, as a raw file.
    pub fn import_disk(&self, image: &Path) -> Result<BaseFile> {
        let what = || format!("cannot take in the disk image {}", image.display());
        let images = self.root.join("images");
        let partial = tempfile::Builder::new()
            .prefix(".import-")
            .tempdir_in(&images)
            .map_err(Error::file("write to", &images))?;
        let raw = partial.path().join("raw");
        if !link_if_unchanging(image, &raw)? {
            vm_host::disk::import_base(image, None, &raw).map_err(Error::host(what()))?;
        }
        self.adopt(&raw)
    }

    /// Takes a kernel or another plain file into the store.
    pub fn import_file(&self, path: &Path) -> Result<BaseFile> {
        let images = self.root.join("images");
        let partial = tempfile::Builder::new()
            .prefix(".import-")
            .tempdir_in(&images)
            .map_err(Error::file("write to", &images))?;
        let copy = partial.path().join("file");
        fs::copy(path, &copy).map_err(Error::file("read", path))?;
        self.adopt(&copy)
    }

    /// Names a file in `images/` by its content; it is moved, made read-only and durable.
    pub(crate) fn adopt(&self, file: &Path) -> Result<BaseFile> {
        let known = Self::identify(file)?;
        self.keep_file(file, known)?;
        Ok(known)
    }

    /// As [`Self::adopt`], but only a file of the content that was announced is kept; whether it
    /// is one.
    pub(crate) fn adopt_announced(&self, file: &Path, announced: BaseFile) -> Result<bool> {
        let right = Self::identify(file)? == announced;
        if right {
            self.keep_file(file, announced)?;
        }
        Ok(right)
    }

    fn identify(file: &Path) -> Result<BaseFile> {
        let mut hasher = blake3::Hasher::new();
        hasher
            .update_mmap_rayon(file)
            .map_err(Error::file("read", file))?;
        let hash = FileHash(*hasher.finalize().as_bytes());
        let bytes = fs::metadata(file).map_err(Error::file("read", file))?.len();
        Ok(BaseFile { hash, bytes })
    }

    fn keep_file(&self, file: &Path, known: BaseFile) -> Result<()> {
        let path = self.base_path(known.hash);
        if !path.exists() {
            let done = (|| {
                fs::set_permissions(file, fs::Permissions::from_mode(0o400))?;
                fs::File::open(file)?.sync_all()?;
                fs::rename(file, &path)?;
                files::sync_dir(&self.root.join("images"))
            })();
            done.map_err(Error::file("keep", &path))?;
        }
        Ok(())
    }

    /// The hash tree of a base disk, made on first use.
    pub fn base_tree(&self, disk: BaseFile) -> Result<ImageTree> {
        let image = self.base_path(disk.hash);
        let path = image.with_extension("tree");
        if path.exists() {
            return generation::load_tree(&path, None);
        }
        let pages = fs::File::open(&image)
            .and_then(FilePages::new)
            .map_err(Error::file("read the base image", &image))?;
        let tree = ImageTree::build(&pages, &reconciler::no_progress)
            .map_err(Error::reconcile(format!("cannot hash {}", image.display())))?;
        generation::save_tree(&path, &tree)?;
        Ok(tree)
    }
}

/// A raw image that nobody may write needs no copy: a hard link will do.
fn link_if_unchanging(image: &Path, to: &Path) -> Result<bool> {
    let metadata = fs::metadata(image).map_err(Error::file("open the disk image", image))?;
    let raw = vm_host::disk::format_of(image).map_err(Error::host(format!(
        "cannot read the disk image {}",
        image.display()
    )))? == "raw";
    let unchanging = metadata.is_file()
        && metadata.mode() & 0o222 == 0
        && metadata.uid() == rustix::process::getuid().as_raw();
    Ok(raw && unchanging && metadata.len() % 4096 == 0 && fs::hard_link(image, to).is_ok())
}

/// A VM's folder in the state directory.
#[derive(Clone, Debug)]
pub struct VmDir {
    dir: PathBuf,
    name: VmName,
    store: Store,
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

    fn record_path(&self) -> PathBuf {
        self.dir.join("vm.json")
    }

    pub(crate) fn lease_path(&self) -> PathBuf {
        self.dir.join("lease.json")
    }

    pub(crate) fn moving_path(&self) -> PathBuf {
        self.dir.join("moving.json")
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
    pub(crate) fn create(&self, record: &VmRecord, lease: &Lease) -> Result<()> {
        for part in ["generations", "live", "log", "incoming"] {
            files::make_dir(&self.dir.join(part))?;
        }
        lease.store(&self.lease_path())?;
        files::write_json(&self.record_path(), record)?;
        let vms = self.dir.parent().unwrap_or(&self.dir);
        files::sync_dir(vms).map_err(Error::file("sync", vms))
    }

    /// Whether this site may run it.
    pub fn lease(&self) -> Result<Lease> {
        Lease::load(&self.lease_path())?.ok_or_else(|| Error::Damaged {
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
        self.lease().map_or(Ok(()), |lease| lease.store(&path))
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
    /// clearing away what it held.
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

/// The folder that holds all runtime directories of this user.
pub fn runtime_base() -> Result<PathBuf> {
    let uid = rustix::process::getuid().as_raw();
    let candidates = [
        Some(PathBuf::from("/dev/shm")),
        std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from),
    ];
    let parent = candidates
        .into_iter()
        .flatten()
        .find(|dir| dir.is_dir())
        .unwrap_or_else(std::env::temp_dir);
    let base = parent.join(format!("replay-migrate-{uid}"));
    match fs::DirBuilder::new().mode(0o700).create(&base) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(Error::file("create", &base)(error));
        }
        _ => {}
    }
    // Others may write to the parent: a folder or link that someone else put there is refused.
    let metadata = fs::symlink_metadata(&base).map_err(Error::file("open", &base))?;
    if !metadata.is_dir() || metadata.uid() != uid || metadata.mode() & 0o077 != 0 {
        return Err(Error::Refused(format!(
            "{} is not a folder of this user alone; remove it or correct its owner and mode (0700)",
            base.display()
        )));
    }
    Ok(base)
}
