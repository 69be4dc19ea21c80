//! What of a site's state is encrypted where it is stored.
//!
//! Images, generations, overlays, logs and leases lie in `images/` and `vms/`. Where the file
//! system can (see [`vm_host::fscrypt`]), both are encrypted by the kernel with the site's state
//! key from the beginning: a folder must be empty for that, so what was there before stays as it
//! is, and a new VM's folder in it is encrypted by itself. All have one policy, so that files can
//! be renamed from any of them to any other.
//!
//! Each process that opens the state directory gives the kernel the key, before it touches an
//! image; the kernel keeps it until it is taken away ([`lock`]), the file system is unmounted or
//! the host is off. Who has the user account reads everything while the kernel has the key.
//!
//! Where the file system can't, dm-crypt may lie beneath it. What is so, and what to do where
//! neither is, [`AtRest`] tells.

use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;
use vm_host::fscrypt::{self, KeyIdentifier, KeyState, Policy};
use vm_host::probe::storage::{self, Storage};

use crate::error::{Error, Result};
use crate::files;
use crate::keys::Keys;
use crate::local;
use crate::store::{Store, runtime_base};

/// The folders that are encrypted as a whole.
const FOLDERS: [&str; 2] = ["images", "vms"];

/// How a site's state is protected where it is stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct AtRest {
    /// Nothing of images and VMs lies on a disk in the clear.
    pub encrypted: bool,
    /// Each part of the state.
    pub folders: Vec<Folder>,
    /// What it lies on.
    pub storage: Storage,
    /// What the RAM of running guests lies on.
    pub ram: Storage,
    /// Where that may be swapped out to.
    pub swap: Vec<Storage>,
    /// Where the keys lie.
    pub keys: PathBuf,
    /// What those lie on.
    pub keys_on: Storage,
    /// What could be better, and how.
    pub advice: Vec<String>,
}

/// A part of a site's state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Folder {
    /// Its name below the state directory.
    pub name: PathBuf,
    /// How it is stored.
    pub is: Protection,
}

/// How a folder is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Protection {
    /// Encrypted by the file system; the kernel has the key.
    Unlocked,
    /// Encrypted by the file system; nobody can read it now.
    Locked,
    /// Encrypted beneath the file system.
    DmCrypt,
    /// In memory, and gone without power.
    Memory,
    /// Not encrypted: the file system can't.
    Unable,
    /// Not encrypted: the file system is of a kind that can, and is not set up for it.
    NotSetUp,
    /// Not encrypted, though it could be: it was there before.
    Clear,
}

impl Protection {
    fn of(policy: Policy, has_key: bool, storage: &Storage) -> Self {
        match (policy, storage) {
            (Policy::Encrypted(_), _) if !has_key => Self::Locked,
            (Policy::Encrypted(_) | Policy::Other, _) => Self::Unlocked,
            (_, Storage::Encrypted(_)) => Self::DmCrypt,
            (_, Storage::Memory) => Self::Memory,
            (Policy::None, _) => Self::Clear,
            (Policy::NotSetUp, _) => Self::NotSetUp,
            (Policy::Unsupported, _) => Self::Unable,
        }
    }

    /// Whether a disk that is stolen tells nothing of it.
    pub fn is_encrypted(self) -> bool {
        !matches!(self, Self::Unable | Self::NotSetUp | Self::Clear)
    }
}

impl AtRest {
    /// How a site's state is stored now. Nothing is changed or unlocked.
    pub fn of(store: &Store) -> Result<Self> {
        let (root, keys) = (store.root(), store.keys().dir());
        let on = storage::of(root);
        let mut folders = Vec::new();
        for dir in parts(root)? {
            let policy = asked(&dir)?;
            let has_key = match policy {
                Policy::Encrypted(key) => key_state(&dir, key)? == KeyState::Present,
                _ => true,
            };
            let name = dir.strip_prefix(root).unwrap_or(&dir).to_owned();
            let is = Protection::of(policy, has_key, &on);
            folders.push(Folder { name, is });
        }
        let there = keys.ancestors().find(|dir| dir.exists()).unwrap_or(root);
        let ram = storage::of(&runtime_base()?);
        let keys_on = storage::of(there);
        let one_disk = keys_on == on;
        let found = Self {
            encrypted: folders.iter().all(|folder| folder.is.is_encrypted()),
            folders,
            storage: on,
            ram,
            swap: storage::swap(),
            keys: keys.to_owned(),
            keys_on,
            advice: Vec::new(),
        };
        Ok(Self {
            advice: found.advise(one_disk),
            ..found
        })
    }

    /// Refuses a state of which anything lies on a disk in the clear.
    pub fn require(&self) -> Result<()> {
        if self.encrypted {
            return Ok(());
        }
        let clear: Vec<_> = self
            .folders
            .iter()
            .filter(|folder| !folder.is.is_encrypted())
            .map(|folder| folder.name.display().to_string())
            .collect();
        Err(Error::Refused(format!(
            "not encrypted at rest: {}; {}",
            clear.join(", "),
            self.advice.first().map_or("", String::as_str)
        )))
    }

    /// What could be better. What keeps it from being encrypted comes first.
    fn advise(&self, one_disk: bool) -> Vec<String> {
        let mut advice = Vec::new();
        let any = |is| self.folders.iter().any(|folder| folder.is == is);
        if any(Protection::Unable) {
            advice.push(
                "put the state directory on ext4 with the feature `encrypt`, or on dm-crypt".into(),
            );
        }
        if any(Protection::NotSetUp) {
            advice.push(
                "have the file system's encryption switched on by who administers the host (ext4: \
                 `tune2fs -O encrypt` on its device), then make the state directory anew; or put it \
                 on dm-crypt"
                    .into(),
            );
        }
        if any(Protection::Clear) {
            advice.push(
                "what was there before stays in the clear: stop the agent and all VMs, and copy the \
                 state into a new directory, as docs/threat-model.md says"
                    .into(),
            );
        }
        let locks = any(Protection::Unlocked) || any(Protection::Locked);
        if locks && one_disk && matches!(self.keys_on, Storage::Clear(_)) {
            advice.push(format!(
                "the key lies on the same disk, in {}: who has the disk has both. Keep the keys \
                 elsewhere with --keys DIR",
                self.keys.display()
            ));
        }
        if matches!(self.ram, Storage::Clear(_) | Storage::Unknown(_)) {
            advice
                .push("the RAM of running guests lies on a disk: mount a tmpfs at /dev/shm".into());
        }
        for swap in &self.swap {
            if let Storage::Clear(name) | Storage::Unknown(name) = swap {
                advice.push(format!(
                    "the RAM of running guests may be swapped out to {name} in the clear: encrypt \
                     swap, or do without"
                ));
            }
        }
        advice
    }
}

/// What is encrypted as a whole; of VMs in a folder that is not, each.
fn parts(root: &Path) -> Result<Vec<PathBuf>> {
    let mut parts: Vec<_> = FOLDERS.iter().map(|name| root.join(name)).collect();
    parts.retain(|dir| dir.exists());
    let vms = root.join("vms");
    if vms.exists() && asked(&vms)? == Policy::None {
        let inside = fs::read_dir(&vms).map_err(Error::file("list", &vms))?;
        let mut dirs = Vec::new();
        for entry in inside {
            let path = entry.map_err(Error::file("list", &vms))?.path();
            if path.is_dir() {
                dirs.push(path);
            }
        }
        if !dirs.is_empty() {
            parts.retain(|dir| *dir != vms);
            dirs.sort();
            parts.extend(dirs);
        }
    }
    Ok(parts)
}

fn asked(dir: &Path) -> Result<Policy> {
    fscrypt::policy(dir).map_err(Error::host(format!(
        "cannot find out how {} is stored",
        dir.display()
    )))
}

fn key_state(dir: &Path, key: KeyIdentifier) -> Result<KeyState> {
    fscrypt::key_state(dir, key).map_err(Error::host(format!(
        "cannot find out whether {} is locked",
        dir.display()
    )))
}

/// Makes a state directory ready: what is locked is unlocked, and what is empty and could be
/// encrypted is from now on.
///
/// # Errors
/// [`Error::Locked`] when the key is not there, or not the right one.
pub(crate) fn open(root: &Path, keys: &Keys) -> Result<()> {
    for dir in parts(root)? {
        match asked(&dir)? {
            Policy::Encrypted(key) => unlock(&dir, key, keys)?,
            Policy::None => shelter(&dir, keys)?,
            _ => {}
        }
    }
    Ok(())
}

fn unlock(dir: &Path, key: KeyIdentifier, keys: &Keys) -> Result<()> {
    if key_state(dir, key)? == KeyState::Present {
        return Ok(());
    }
    let locked = |why: &str| Error::Locked {
        dir: dir.to_owned(),
        key: keys.state_path(),
        why: why.to_owned(),
    };
    let mut state = keys.state()?.ok_or_else(|| locked("is not there"))?;
    let given = fscrypt::add_key(dir, state.bytes())
        .map_err(Error::host(format!("cannot unlock {}", dir.display())))?;
    if given == key {
        return Ok(());
    }
    // Of no use to anybody.
    if let Err(error) = fscrypt::remove_key(dir, given) {
        tracing::debug!(%error, "a key that opens nothing stays with the kernel");
    }
    Err(locked("is another one"))
}

/// Has what will be made in this folder encrypted, if it is empty and its file system can. Where
/// that fails it stays as it was, which [`AtRest`] tells.
pub(crate) fn shelter(dir: &Path, keys: &Keys) -> Result<()> {
    let empty = || {
        let mut inside = fs::read_dir(dir).map_err(Error::file("list", dir))?;
        Ok::<_, Error>(inside.next().is_none())
    };
    if asked(dir)? != Policy::None || !empty()? {
        return Ok(());
    }
    let mut state = keys.make_state()?;
    let done = fscrypt::add_key(dir, state.bytes()).and_then(|key| fscrypt::encrypt(dir, key));
    if let Err(error) = done {
        let error = crate::error::chain_of(&error);
        tracing::warn!(dir = %dir.display(), error, "what comes here is not encrypted");
        return Ok(());
    }
    // A kernel without the cipher takes the policy, and then nothing can be made.
    let probe = dir.join(".probe");
    let usable = fs::write(&probe, b"x").and_then(|()| fs::remove_file(&probe));
    if let Err(error) = usable {
        tracing::warn!(dir = %dir.display(), %error, "what comes here is not encrypted");
        files::remove_dir(dir)?;
        files::make_dir(dir)?;
    }
    Ok(())
}

/// What locking has done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Locked {
    /// Nothing can be read any more before the key is given again.
    Locked,
    /// It was locked already.
    Before,
    /// Some process has files open: those can be read as long as it has, and nothing else.
    FilesOpen,
    /// Another user has given the key as well: nothing is locked.
    OtherUsers,
    /// Nothing here is encrypted with a key of this site.
    Nothing,
}

/// Takes the key from the kernel. Nothing of this site may be at work.
///
/// # Errors
/// While an agent serves, a VM runs, or somebody works on one.
pub async fn lock(store: &Store) -> Result<Locked> {
    let root = store.root();
    // Beneath a folder that is encrypted by others, it is theirs.
    let above = asked(root)?;
    let mut ours = Vec::new();
    for dir in parts(root)? {
        let policy = asked(&dir)?;
        if let Policy::Encrypted(key) = policy
            && policy != above
            && !ours.contains(&key)
        {
            ours.push(key);
        }
    }
    let mut states = Vec::new();
    for key in &ours {
        states.push((*key, key_state(root, *key)?));
    }
    states.retain(|(_, state)| *state != KeyState::Absent);
    if states.is_empty() {
        return Ok(if ours.is_empty() {
            Locked::Nothing
        } else {
            Locked::Before
        });
    }
    // While it leaves, what is here can't be listed any more.
    if states.iter().all(|(_, state)| *state == KeyState::Present) {
        require_rest(store).await?;
    }
    let mut outcome = Locked::Locked;
    for (key, _) in states {
        let removed = fscrypt::remove_key(root, key)
            .map_err(Error::host(format!("cannot lock {}", root.display())))?;
        if removed.other_users {
            outcome = Locked::OtherUsers;
        } else if removed.files_busy && outcome == Locked::Locked {
            outcome = Locked::FilesOpen;
        }
    }
    Ok(outcome)
}

/// Refuses as long as anything of a site is at work. Nothing is held when this returns: a lock is
/// a file of a VM that is open.
async fn require_rest(store: &Store) -> Result<()> {
    if store.agent_lock()?.is_none() {
        return Err(Error::Refused(format!(
            "an agent serves {}: stop `replay-migrate serve` first",
            store.root().display()
        )));
    }
    for vm in store.vm_dirs()? {
        let _nobody = vm.lock()?;
        if local::attach(&vm).await?.is_some() {
            return Err(Error::Refused(format!(
                "{0} runs here: `replay-migrate vm stop {0}` first",
                vm.name()
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> KeyIdentifier {
        // Only the kernel makes them otherwise.
        KeyIdentifier::from_bytes([7; 16])
    }

    #[test]
    fn what_is_encrypted_is_told_by_policy_and_by_what_lies_beneath() {
        use Protection as P;
        let clear = Storage::Clear("sda1".into());
        let crypt = Storage::Encrypted("home".into());
        let ours = Policy::Encrypted(key());
        let cases = [
            (ours, true, &clear, P::Unlocked, true),
            (ours, false, &clear, P::Locked, true),
            (ours, true, &crypt, P::Unlocked, true),
            (Policy::Other, true, &clear, P::Unlocked, true),
            (Policy::None, true, &crypt, P::DmCrypt, true),
            (Policy::Unsupported, true, &crypt, P::DmCrypt, true),
            (Policy::Unsupported, true, &Storage::Memory, P::Memory, true),
            (Policy::Unsupported, true, &clear, P::Unable, false),
            (
                Policy::Unsupported,
                true,
                &Storage::Unknown("nfs4".into()),
                P::Unable,
                false,
            ),
            (Policy::NotSetUp, true, &clear, P::NotSetUp, false),
            (Policy::None, true, &clear, P::Clear, false),
        ];
        for (policy, has_key, storage, expected, encrypted) in cases {
            let is = Protection::of(policy, has_key, storage);
            assert_eq!(is, expected, "{policy:?} {storage:?}");
            assert_eq!(is.is_encrypted(), encrypted, "{is:?}");
        }
    }

    fn stored(folders: &[Protection], keys_on: Storage, swap: Vec<Storage>) -> AtRest {
        let folders: Vec<_> = folders
            .iter()
            .map(|is| Folder {
                name: "images".into(),
                is: *is,
            })
            .collect();
        AtRest {
            encrypted: folders.iter().all(|folder| folder.is.is_encrypted()),
            folders,
            storage: Storage::Clear("sda1".into()),
            ram: Storage::Memory,
            swap,
            keys: "/token".into(),
            keys_on,
            advice: Vec::new(),
        }
    }

    #[test]
    fn whatever_is_not_encrypted_is_refused_with_what_to_do() {
        let advised = |at_rest: AtRest| {
            let one_disk = at_rest.keys_on == at_rest.storage;
            AtRest {
                advice: at_rest.advise(one_disk),
                ..at_rest
            }
        };
        let token = || Storage::Clear("sdb1".into());
        let well = advised(stored(&[Protection::Unlocked], token(), Vec::new()));
        well.require().unwrap();
        assert_eq!(well.advice, Vec::<String>::new());
        for (is, remedy) in [
            (Protection::Unable, "dm-crypt"),
            (Protection::NotSetUp, "tune2fs -O encrypt"),
            (Protection::Clear, "copy the state"),
        ] {
            // One part in the clear is enough.
            let found = advised(stored(&[Protection::Unlocked, is], token(), Vec::new()));
            let refused = found.require().unwrap_err();
            assert!(matches!(refused, Error::Refused(_)));
            assert!(refused.to_string().contains(remedy), "{refused}");
        }
        let beside = Storage::Clear("sda1".into());
        let swap = vec![Storage::Memory, Storage::Clear("sda2".into())];
        let poor = advised(stored(&[Protection::Locked], beside, swap));
        poor.require().unwrap();
        assert!(poor.advice[0].contains("--keys"), "{poor:?}");
        assert!(poor.advice[1].contains("sda2"), "{poor:?}");
    }

    #[tokio::test]
    async fn a_state_that_is_not_encrypted_has_nothing_to_lock() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        if AtRest::of(&store).unwrap().folders[0].is == Protection::Unlocked {
            eprintln!("skipped: temporary files are encrypted here");
            return;
        }
        assert_eq!(lock(&store).await.unwrap(), Locked::Nothing);
        assert!(!dir.path().join("keys/state.key").exists());
    }
}
