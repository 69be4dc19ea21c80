//! What processes that died have left in a state directory, told from what living ones are making
//! right now.
//!
//! | what | whose | how a living one is told |
//! |---|---|---|
//! | `NAME.PID.partial` | who was replacing a file | there is a process of this number |
//! | `images/.receive-*` | the agent | there is one agent, and it has just begun |
//! | `images/.import-*` | who was taking in a file | the lock `images/.import.lock` |
//! | `vms/.deleted-*` | who was deleting a VM | the VM's lock within |
//! | `.peers.*` | who was changing the list of sites | the lock `.peers.lock` |
//! | `.site.key.*`, `.state.key.*` | who was making one of the site's keys | it is young |
//! | `vms/NAME/log/N.redacting` | who was taking a stretch out of a log | the recording's lock |
//!
//! None of it is ever read. It takes room, and half a key is better not kept.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::{Pid, test_kill_process};

use crate::chance::recording_lock;
use crate::error::{Error, Result};
use crate::files::{self, FileLock};
use crate::peers;
use crate::store::{Store, VmDir};
use crate::vm::Id;

const RECEIVING: &str = ".receive-";
const IMPORTING: &str = ".import-";
const IMPORT_LOCK: &str = ".import.lock";
const DELETED: &str = ".deleted-";
const PEERS: &str = ".peers.";
const KEYS: [&str; 2] = [".site.key.", ".state.key."];

/// Nobody takes so long to write a key. By a clock that was set back a file is from the future,
/// and stays until that is past.
const KEY_TAKES: Duration = Duration::from_secs(60);

/// A folder for a file that an agent receives, removed when dropped.
pub(crate) fn receiving(images: &Path) -> Result<tempfile::TempDir> {
    scratch(images, RECEIVING)
}

fn scratch(images: &Path, prefix: &str) -> Result<tempfile::TempDir> {
    tempfile::Builder::new()
        .prefix(prefix)
        .tempdir_in(images)
        .map_err(Error::file("write to", images))
}

/// A folder for a file that is taken in, removed when dropped. Nobody clears it away before.
#[derive(Debug)]
pub(crate) struct Importing {
    scratch: tempfile::TempDir,
    _alive: FileLock,
}

impl Importing {
    pub(crate) fn begin(images: &Path) -> Result<Self> {
        // Somebody who clears away holds it for a moment.
        let alive = FileLock::share(&images.join(IMPORT_LOCK))?;
        Ok(Self {
            scratch: scratch(images, IMPORTING)?,
            _alive: alive,
        })
    }

    pub(crate) fn path(&self) -> &Path {
        self.scratch.path()
    }
}

/// Removes a VM's folder: from one moment to the next, durable, there is none, and what is removed
/// after that is a leftover. The VM's lock is held.
pub(crate) fn remove_vm(vm: &VmDir) -> Result<()> {
    if !vm.dir().exists() {
        return Ok(());
    }
    let vms = vm.dir().parent().unwrap_or(vm.dir());
    let gone = vms.join(format!("{DELETED}{}", Id::random()?));
    files::rename(vm.dir(), &gone)?;
    files::remove_dir(&gone)
}

/// Clears away what nobody needs. The agent's lock is held, and it has not begun to serve.
///
/// What can't be removed is told in the agent's own log: it is in nobody's way.
pub(crate) fn clear(store: &Store) -> Result<()> {
    let mut left = of_agent(store)?;
    left.extend(of_site(store)?);
    for vm in store.vm_dirs()? {
        // Whoever works on it right now leaves nothing, or dies and leaves it to the next.
        if let Ok(_lock) = vm.lock() {
            left.extend(of_vm(&vm)?);
        }
    }
    for path in left {
        match remove(&path) {
            Ok(()) => tracing::info!(path = %path.display(), "cleared away"),
            Err(error) => tracing::warn!(error = error.chain(), "a leftover stays"),
        }
    }
    Ok(())
}

/// Removes one.
pub(crate) fn remove(path: &Path) -> Result<()> {
    match fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => files::remove_dir(path),
        Ok(_) => match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(Error::file("remove", path)(error))
            }
            _ => Ok(()),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(Error::file("measure", path)(error)),
    }
}

/// What an agent has left. The agent's lock is held, and nobody serves.
pub(crate) fn of_agent(store: &Store) -> Result<Vec<PathBuf>> {
    named(&store.root().join("images"), |name| {
        name.starts_with(RECEIVING)
    })
}

/// What commands have left that concerns no VM that is there.
pub(crate) fn of_site(store: &Store) -> Result<Vec<PathBuf>> {
    let root = store.root();
    let images = root.join("images");
    let mut left = Vec::new();
    let keys = store.keys().dir();
    for dir in [root, &images, keys] {
        left.extend(partials(dir)?);
    }
    if let Some(_nobody_imports) = FileLock::try_take(&images.join(IMPORT_LOCK))? {
        left.extend(named(&images, |name| name.starts_with(IMPORTING))?);
    }
    for gone in named(&root.join("vms"), |name| name.starts_with(DELETED))? {
        if !FileLock::is_held(&gone.join("lock")) {
            left.push(gone);
        }
    }
    if !FileLock::is_held(&root.join(peers::LOCK)) {
        left.extend(named(root, |name| {
            name.starts_with(PEERS) && name != peers::LOCK
        })?);
    }
    for dir in [root, keys] {
        let halves = named(dir, |name| KEYS.iter().any(|key| name.starts_with(key)))?;
        left.extend(halves.into_iter().filter(|path| {
            let written = fs::metadata(path).and_then(|file| file.modified());
            written.is_ok_and(|at| at.elapsed().is_ok_and(|age| age > KEY_TAKES))
        }));
    }
    left.sort();
    left.dedup();
    Ok(left)
}

/// What commands have left of a VM. Its lock is held.
pub(crate) fn of_vm(vm: &VmDir) -> Result<Vec<PathBuf>> {
    let mut left = partials(vm.dir())?;
    for part in ["seen", "log", "live/run"] {
        left.extend(partials(&vm.dir().join(part))?);
    }
    for generation in named(&vm.dir().join("generations"), |_| true)? {
        left.extend(partials(&generation)?);
    }
    if let Some(_nobody_records) = recording_lock(vm)? {
        left.extend(named(&vm.dir().join("log"), |name| {
            name.ends_with(".redacting")
        })?);
    }
    Ok(left)
}

/// Halves of files in a folder whose writers are dead.
fn partials(dir: &Path) -> Result<Vec<PathBuf>> {
    named(dir, |name| {
        let number = name
            .strip_suffix(".partial")
            .and_then(|name| name.rsplit('.').next()?.parse().ok());
        number.and_then(Pid::from_raw).is_some_and(is_dead)
    })
}

/// Whether a process is none but this one, which writes nothing while it looks.
fn is_dead(process: Pid) -> bool {
    let own = rustix::process::getpid() == process;
    own || test_kill_process(process) == Err(rustix::io::Errno::SRCH)
}

/// The entries of a folder with such names; none, where there is no folder.
fn named(dir: &Path, wanted: impl Fn(&str) -> bool) -> Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        // Whatever lies where a folder should be is not for this one to judge.
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => return Ok(Vec::new()),
        entries => entries.map_err(Error::file("list", dir))?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.map_err(Error::file("list", dir))?;
        if entry.file_name().to_str().is_some_and(&wanted) {
            found.push(entry.path());
        }
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::process::Command;
    use std::time::SystemTime;

    use super::*;

    fn store() -> (tempfile::TempDir, Store) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        (dir, store)
    }

    /// The number of a process that is dead.
    fn dead() -> u32 {
        let mut child = Command::new("true").spawn().unwrap();
        child.wait().unwrap();
        child.id()
    }

    #[test]
    fn halves_of_files_go_once_their_writer_is_dead() {
        let (_dir, store) = store();
        let vm = store.vm(&"desk".parse().unwrap());
        files::make_dir(vm.generation(3).dir()).unwrap();
        let mut alive = Command::new("sleep").arg("60").spawn().unwrap();
        let places = [
            store.root().to_owned(),
            vm.dir().to_owned(),
            vm.generation(3).dir().to_owned(),
        ];
        for place in &places {
            for pid in [dead(), alive.id()] {
                fs::write(place.join(format!("lease.json.{pid}.partial")), "{").unwrap();
            }
            fs::write(place.join("x.partial"), "nobody's").unwrap();
        }
        clear(&store).unwrap();
        for place in &places {
            let left = named(place, |name| name.ends_with(".partial")).unwrap();
            let kept = [
                place.join(format!("lease.json.{}.partial", alive.id())),
                place.join("x.partial"),
            ];
            assert_eq!(left, kept);
        }
        alive.kill().unwrap();
        alive.wait().unwrap();
    }

    #[test]
    fn halves_of_a_vms_files_stay_while_somebody_works_on_it() {
        let (_dir, store) = store();
        let vm = store.vm(&"desk".parse().unwrap());
        files::make_dir(vm.dir()).unwrap();
        let half = vm.dir().join(format!("vm.json.{}.partial", dead()));
        fs::write(&half, "{").unwrap();
        let working = vm.lock().unwrap();
        clear(&store).unwrap();
        assert!(half.exists());
        drop(working);
        clear(&store).unwrap();
        assert!(!half.exists());
    }

    #[test]
    fn what_is_being_taken_in_stays_and_what_was_goes() {
        let (_dir, store) = store();
        let images = store.root().join("images");
        for name in [".receive-abc", ".import-abc", "whole"] {
            fs::create_dir(images.join(name)).unwrap();
        }
        let left = |name: &str| images.join(name).exists();
        let importing = Importing::begin(&images).unwrap();
        let other = Importing::begin(&images).unwrap();
        clear(&store).unwrap();
        assert!(!left(".receive-abc") && left("whole"));
        assert!(left(".import-abc") && importing.path().exists());
        drop((importing, other));
        clear(&store).unwrap();
        assert!(!left(".import-abc"));
        assert!(left("whole"));
    }

    #[test]
    fn a_vm_that_was_being_deleted_is_none_and_goes() {
        let (_dir, store) = store();
        let gone = store.root().join("vms/.deleted-abc");
        fs::create_dir(&gone).unwrap();
        fs::write(gone.join("vm.json"), "{").unwrap();
        assert!(store.vms().unwrap().is_empty());
        let deleting = FileLock::try_take(&gone.join("lock")).unwrap();
        clear(&store).unwrap();
        assert!(gone.exists(), "somebody is at it");
        drop(deleting);
        clear(&store).unwrap();
        assert!(!gone.exists());
    }

    #[test]
    fn halves_of_keys_and_lists_go() {
        let (_dir, store) = store();
        let [key, fresh, list, locked] =
            [".site.key.aa", ".site.key.bb", ".peers.aa", ".peers.lock"].map(|name| {
                let path = store.root().join(name);
                fs::write(&path, "").unwrap();
                path
            });
        let set = |path: &Path, at| File::open(path).unwrap().set_modified(at).unwrap();
        set(&key, SystemTime::now() - 2 * KEY_TAKES);
        let changing = FileLock::take(&locked).unwrap();
        clear(&store).unwrap();
        assert!(!key.exists() && fresh.exists() && list.exists());
        // A clock that was set back by days makes nobody's file old.
        set(&fresh, SystemTime::now() + 5000 * KEY_TAKES);
        drop(changing);
        clear(&store).unwrap();
        assert!(fresh.exists() && !list.exists() && locked.exists());
    }
}
