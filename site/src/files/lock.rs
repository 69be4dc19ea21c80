//! Locks on files, which go with the process that holds them.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use crate::error::{Error, Result};

/// A lock on a file, held until dropped; it goes with the process that holds it.
#[derive(Debug)]
pub(crate) struct FileLock(File);

impl Drop for FileLock {
    fn drop(&mut self) {
        // Not left to closing it: a program that another thread is just starting has the file open, too,
        // until it is that program. Closed it is in any case.
        let _ = self.0.unlock();
    }
}

impl FileLock {
    /// Takes the lock for this one alone, or says that another has it.
    pub(crate) fn try_take(path: &Path) -> Result<Option<Self>> {
        let file = open(path).map_err(Error::file("open", path))?;
        Self::try_take_of(file).map_err(Error::file("lock", path))
    }

    /// Takes the lock for this one alone as soon as nobody has it.
    pub(crate) fn take(path: &Path) -> io::Result<Self> {
        let file = open(path)?;
        file.lock()?;
        Ok(Self(file))
    }

    /// Takes the lock beside others that share it, as soon as nobody has it alone.
    pub(crate) fn share(path: &Path) -> Result<Self> {
        let file = open(path).map_err(Error::file("open", path))?;
        file.lock_shared().map_err(Error::file("lock", path))?;
        Ok(Self(file))
    }

    /// Whether somebody holds the lock; where there is no such file, nobody does. Who holds it at this moment may be
    /// gone at the next.
    pub(crate) fn is_held(path: &Path) -> bool {
        // Let go of at once, and by unlocking it: whoever wants it next must not find it held by this look.
        File::open(path).is_ok_and(|file| !matches!(Self::try_take_of(file), Ok(Some(_))))
    }

    fn try_take_of(file: File) -> io::Result<Option<Self>> {
        match file.try_lock() {
            Ok(()) => Ok(Some(Self(file))),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place() -> (tempfile::TempDir, std::path::PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        (dir, path)
    }

    #[test]
    fn a_lock_is_exclusive_until_dropped() {
        let (_dir, path) = place();
        assert!(!FileLock::is_held(&path), "there is none");
        let held = FileLock::try_take(&path).unwrap();
        assert!(held.is_some());
        assert!(FileLock::try_take(&path).unwrap().is_none());
        assert!(FileLock::is_held(&path));
        drop(held);
        assert!(!FileLock::is_held(&path));
        assert!(FileLock::try_take(&path).unwrap().is_some());
        drop(FileLock::take(&path).unwrap());
    }

    #[test]
    fn a_shared_lock_is_nobodys_alone() {
        let (_dir, path) = place();
        let one = FileLock::share(&path).unwrap();
        let other = FileLock::share(&path).unwrap();
        drop(one);
        assert!(FileLock::try_take(&path).unwrap().is_none());
        drop(other);
        assert!(FileLock::try_take(&path).unwrap().is_some());
    }

    #[test]
    fn a_lock_is_let_go_of_though_another_process_has_its_file_open() {
        let (_dir, path) = place();
        let ways: [fn(&Path) -> FileLock; 3] = [
            |path| FileLock::try_take(path).unwrap().unwrap(),
            |path| FileLock::take(path).unwrap(),
            |path| FileLock::share(path).unwrap(),
        ];
        for way in ways {
            let lock = way(&path);
            // As a program has that is just being started.
            let inherited = lock.0.try_clone().unwrap();
            drop(lock);
            assert!(FileLock::try_take(&path).unwrap().is_some());
            drop(inherited);
        }
    }
}
