//! The state directory of a site: where everything is.
//!
//! ```text
//! site.json                the form of all this, and where the keys lie if not here
//! site.key, keys/          the site's identity, and the keys of its logs and of its state
//! keys.json                how the site's key was followed by others
//! peers.json               the sites it knows
//! images/HASH              read-only base files: raw disk images, kernels; named by BLAKE3
//! images/HASH.tree         hash tree of a disk image
//! images/HASH.arriving     a part of it is still on its way, see `arriving`
//! vms/NAME/vm.json         what the VM is
//! vms/NAME/lease.json      whether this site may run it, and the hand-overs that led there
//! vms/NAME/lock            held while one process changes the VM
//! vms/NAME/moving.json     a move from here that is under way, or was cut off
//! vms/NAME/resuming.json   a move to here after which the VM was not seen to run yet
//! vms/NAME/generations/N/  immutable states, and what is left of pruned ones
//! vms/NAME/seen/KEY.json   the newest generations that a peer is known to have
//! vms/NAME/live/run/       the overlays of the running VM, and what it rests on
//! vms/NAME/log/N.rmlog     what was typed on top of generation N
//! vms/NAME/incoming/ID/    a migration that is arriving; removed when it ends, however it ends
//! vms/NAME/packing/        a parcel for a hub that is being made
//! hub/KEY/ID/              what is held here for other sites, sealed, see `hub`
//! deleted/ID.json          the last lease of a VM that was deleted here
//! void/ID                  a hand-over that was given up, never to be taken
//! ```
//!
//! Overlays name their backing file relative to themselves, and all of them lie at the same
//! depth, so that a folder can be renamed into place and a state directory can be moved.
//! `images/` and `vms/` are encrypted where the file system can, see [`crate::at_rest`].
//! Sockets and the RAM of running guests lie in a runtime directory outside, on tmpfs.

mod vm_dir;

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use reconciler::{FilePages, ImageTree};
use serde::{Deserialize, Serialize};

use crate::arriving::Paths;
use crate::at_rest;
use crate::error::{Error, Result};
use crate::files::{self, FileLock};
use crate::generation;
use crate::identity::{Identity, NewKey, SiteKey};
use crate::keys::Keys;
use crate::lease::Lease;
use crate::leftovers::Importing;
use crate::peers::PeerStore;
use crate::vm::{BaseFile, FileHash, Id, VmName};

pub use vm_dir::VmDir;

/// The version of the state directory's form.
const VERSION: u32 = 1;

#[derive(Serialize, Deserialize)]
struct SiteFile {
    version: u32,
    /// Where the site's keys lie, if not in the state directory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    keys: Option<PathBuf>,
}

/// A site's state directory.
#[derive(Clone, Debug)]
pub struct Store {
    root: PathBuf,
    keys: Keys,
    /// Nothing in it is encrypted, as others go on with it.
    plain: bool,
}

impl Store {
    /// Opens a state directory, and makes it where there is none.
    ///
    /// # Errors
    /// When it can't be made, is of another version, or is locked.
    pub fn open(root: impl AsRef<Path>) -> Result<Self> {
        Self::open_with(root.as_ref(), None)
    }

    /// The same, with the site's keys in another folder, which is noted.
    ///
    /// # Errors
    /// Also when the site has keys, and not in that folder.
    pub fn open_with(root: &Path, keys: Option<&Path>) -> Result<Self> {
        let store = Self::look(root, keys)?;
        store.keys.settle()?;
        store.note()?;
        at_rest::open(&store.root, &store.keys)?;
        Ok(store)
    }

    /// A state directory that is only made to be taken from: nothing in it is encrypted.
    pub(crate) fn scratch(root: &Path) -> Result<Self> {
        let store = Self {
            plain: true,
            ..Self::look(root, None)?
        };
        store.note()?;
        Ok(store)
    }

    /// A state directory as it is, perhaps locked. Only its folder is made, where there is none.
    ///
    /// # Errors
    /// When it is of another version, or its keys are not where they should be.
    pub fn look(root: &Path, keys: Option<&Path>) -> Result<Self> {
        files::make_dir(root)?;
        let root = fs::canonicalize(root).map_err(Error::file("open", root))?;
        let site = Self::site_file(&root)?;
        let noted = site.and_then(|site| site.keys);
        let keys = Keys::find(&root, keys, noted.as_deref())?;
        Ok(Self {
            root,
            keys,
            plain: false,
        })
    }

    fn site_file(root: &Path) -> Result<Option<SiteFile>> {
        match files::read_json::<SiteFile>(&root.join("site.json"))? {
            Some(site) if site.version != VERSION => Err(Error::Refused(format!(
                "{} is a state directory of version {}; this program reads version {VERSION}",
                root.display(),
                site.version
            ))),
            site => Ok(site),
        }
    }

    /// Writes down what this state directory is, unless that is known.
    fn note(&self) -> Result<()> {
        let known = Self::site_file(&self.root)?;
        let keys = self.keys.noted();
        if known.is_none() {
            files::make_dir(&self.root.join("images"))?;
            files::make_dir(&self.root.join("vms"))?;
        }
        if known.is_none_or(|site| site.keys.as_deref() != keys) {
            let site = SiteFile {
                version: VERSION,
                keys: keys.map(Path::to_owned),
            };
            files::write_json(&self.root.join("site.json"), &site)?;
        }
        Ok(())
    }

    /// Where its keys lie.
    pub(crate) fn keys(&self) -> &Keys {
        &self.keys
    }

    /// The state directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// This site's key, made on first use.
    pub fn identity(&self) -> Result<Identity> {
        self.keys.identity()
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
        let former = self.identity()?;
        for vm in self.vms()? {
            crate::ownership::begin_chain(&vm)?;
        }
        let successor = self.keys.successor()?;
        // Before the old key goes: it could not be said any more.
        let mut keys = self.new_keys()?;
        keys.push(NewKey::sign(&former, successor.key()));
        let surplus = keys.len().saturating_sub(Self::NEW_KEYS);
        keys.drain(..surplus);
        files::write_json(&self.new_keys_path(), &keys)?;
        Ok((former.key(), successor.install()?.key()))
    }

    /// As many of its own former keys are remembered.
    const NEW_KEYS: usize = 64;

    /// How this site's key was followed by others, oldest first. One that was announced may never
    /// have come to be; another follows the same key then.
    pub(crate) fn new_keys(&self) -> Result<Vec<NewKey>> {
        Ok(files::read_json(&self.new_keys_path())?.unwrap_or_default())
    }

    fn new_keys_path(&self) -> PathBuf {
        self.root.join("keys.json")
    }

    /// The sites it knows.
    pub fn peers(&self) -> PeerStore {
        PeerStore::new(&self.root)
    }

    /// The key that this site's logs are encrypted with, made on first use.
    pub fn log_key(&self) -> Result<traces::LogKey> {
        self.keys.log()
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

    /// Held by who fetches what lies at a hub.
    pub(crate) fn collect_lock(&self, hub: &SiteKey) -> Result<Option<FileLock>> {
        FileLock::try_take(&self.root.join(format!("collect-{}.lock", hub.id())))
    }

    /// Where a base file lies, if this site has it.
    pub fn base_file(&self, hash: FileHash) -> Option<PathBuf> {
        let path = self.base_path(hash);
        (path.exists() && !self.is_arriving(hash)).then_some(path)
    }

    /// Whether a part of a base file is still on its way.
    pub(crate) fn is_arriving(&self, hash: FileHash) -> bool {
        // What can't be looked at is not taken for whole.
        Paths::of(self, hash).note.try_exists().unwrap_or(true)
    }

    pub(crate) fn base_path(&self, hash: FileHash) -> PathBuf {
        self.root.join("images").join(hash.to_string())
    }

    /// Takes a disk image of any format into the store, as a raw file.
    pub fn import_disk(&self, image: &Path) -> Result<BaseFile> {
        let what = || format!("cannot take in the disk image {}", image.display());
        let images = self.root.join("images");
        let partial = Importing::begin(&images)?;
        let raw = partial.path().join("raw");
        if !link_if_unchanging(image, &raw)? {
            vm_host::disk::import_base(image, None, &raw).map_err(Error::host(what()))?;
        }
        self.adopt(&raw)
    }

    /// Takes a kernel or another plain file into the store.
    pub fn import_file(&self, path: &Path) -> Result<BaseFile> {
        let images = self.root.join("images");
        let partial = Importing::begin(&images)?;
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

    pub(crate) fn identify(file: &Path) -> Result<BaseFile> {
        let mut hasher = blake3::Hasher::new();
        // Read and not mapped: a disk that fails is an error then, and not a signal that ends the
        // process.
        fs::File::open(file)
            .and_then(|file| hasher.update_reader(file).map(drop))
            .map_err(Error::file("read", file))?;
        let hash = FileHash(*hasher.finalize().as_bytes());
        let bytes = fs::metadata(file).map_err(Error::file("read", file))?.len();
        Ok(BaseFile { hash, bytes })
    }

    fn keep_file(&self, file: &Path, known: BaseFile) -> Result<()> {
        let path = self.base_path(known.hash);
        if self.base_file(known.hash).is_none() {
            if self.is_arriving(known.hash) {
                Paths::of(self, known.hash).forget_tree()?;
            }
            let done = (|| {
                fs::set_permissions(file, fs::Permissions::from_mode(0o400))?;
                fs::File::open(file)?.sync_all()?;
                fs::rename(file, &path)?;
                files::sync_dir(&self.root.join("images"))
            })();
            done.map_err(Error::file("keep", &path))?;
            // What was on its way is here by another way.
            Paths::of(self, known.hash).settle()?;
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
