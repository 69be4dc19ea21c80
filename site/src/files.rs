//! Files that are whole or not there: write, fsync, rename, fsync of the folder.

mod lock;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rayon::iter::{IntoParallelIterator, ParallelIterator};
use reconciler::{PAGE_SIZE, ZERO_PAGE};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::{Error, Result};

pub(crate) use lock::FileLock;

/// No JSON file of a state directory comes near this.
const JSON_LIMIT: u64 = 4 << 20;

/// Replaces a file's content in one step; mode 0600.
pub(crate) fn write_atomic(path: &Path, content: &[u8]) -> Result<()> {
    replace(path, content, true)
}

/// Replaces a file's content in one step, for as long as this host runs; mode 0600. Nothing is
/// waited for.
pub(crate) fn replace_for_now(path: &Path, content: &[u8]) -> Result<()> {
    replace(path, content, false)
}

fn replace(path: &Path, content: &[u8], durable: bool) -> Result<()> {
    let partial = partial_name(path);
    let result = (|| {
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&partial)?;
        file.write_all(content)?;
        if durable {
            file.sync_all()?;
        }
        fs::rename(&partial, path)?;
        if durable { sync_parent(path) } else { Ok(()) }
    })();
    if result.is_err() {
        let _ = fs::remove_file(&partial);
    }
    result.map_err(Error::file("write", path))
}

/// A name beside `path` that no other process uses at the same time.
fn partial_name(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{}.partial", std::process::id()));
    PathBuf::from(name)
}

/// Makes a rename or a new file in this folder durable.
pub(crate) fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

fn sync_parent(path: &Path) -> io::Result<()> {
    sync_dir(path.parent().unwrap_or_else(|| Path::new(".")))
}

/// Writes a JSON file in one step.
pub(crate) fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<()> {
    let mut text = serde_json::to_vec_pretty(value)
        .map_err(|error| Error::file("write", path)(io::Error::other(error)))?;
    text.push(b'\n');
    write_atomic(path, &text)
}

/// Reads a JSON file; `None` if there is none.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::file("open", path)(error)),
    };
    let mut text = Vec::new();
    file.take(JSON_LIMIT)
        .read_to_end(&mut text)
        .map_err(Error::file("read", path))?;
    serde_json::from_slice(&text)
        .map(Some)
        .map_err(|error| Error::Damaged {
            path: path.to_owned(),
            reason: error.to_string(),
        })
}

/// Makes what is in a file durable; not its name.
pub(crate) fn sync_file(path: &Path) -> Result<()> {
    File::open(path)
        .and_then(|file| file.sync_all())
        .map_err(Error::file("sync", path))
}

/// Makes a folder that only this user can enter, with its parents; durable, where there was none.
pub(crate) fn make_dir(dir: &Path) -> Result<()> {
    let lacking: Vec<_> = dir.ancestors().take_while(|dir| !dir.exists()).collect();
    let make = || {
        fs::create_dir_all(dir)?;
        fs::set_permissions(dir, fs::Permissions::from_mode(0o700))?;
        // What is made durable in it later is of no use if it is not there itself.
        lacking.iter().rev().try_for_each(|made| sync_parent(made))
    };
    make().map_err(Error::file("create the folder", dir))
}

/// As [`make_dir`], but one that is there stays as it is: it may be somebody else's to make.
pub(crate) fn make_dir_unless_there(dir: &Path) -> Result<()> {
    if dir.is_dir() {
        return Ok(());
    }
    make_dir(dir)
}

/// Removes a folder and all in it; it is no error if it is not there.
pub(crate) fn remove_dir(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Error::file("remove the folder", dir)(error))
        }
        _ => Ok(()),
    }
}

/// Renames, durable in the folder that it goes to, and in the one it leaves.
pub(crate) fn rename(from: &Path, to: &Path) -> Result<()> {
    let renamed = fs::rename(from, to).and_then(|()| sync_parent(to));
    let both = renamed.and_then(|()| {
        if from.parent() == to.parent() {
            Ok(())
        } else {
            sync_parent(from)
        }
    });
    both.map_err(Error::file("move into place", to))
}

/// Removes a file, durable; it is no error if it is not there.
pub(crate) fn remove_file(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Ok(()) => sync_parent(path).map_err(Error::file("remove", path)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(Error::file("remove", path)(error)),
    }
}

/// Copies an image; all-zero blocks become holes. Returns without syncing.
///
/// A reflink or the kernel's own copy would keep holes only where the source has them; guest
/// RAM on tmpfs has most of its zero pages allocated.
///
/// On all processors: a guest stands still while its RAM is copied, and a user waits while a copy of it
/// is made.
pub(crate) fn copy_sparse(from: &Path, to: &Path) -> Result<File> {
    copy(from, to, create_private(to)?, |blocks, copy_block| {
        blocks
            .into_par_iter()
            .try_for_each_init(Vec::new, copy_block)
    })
}

/// An empty file that only this user can open, in place of what was there.
pub(crate) fn create_private(path: &Path) -> Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
        .map_err(Error::file("create", path))
}

/// The same as [`copy_sparse`], into an empty file that is open already; `to` is for messages.
/// Whoever deletes it meanwhile does not see it come back.
///
/// On one processor, for what is done beside other work: where a disk holds it up, it holds up nothing
/// else.
pub(crate) fn copy_sparse_into(from: &Path, to: &Path, target: File) -> Result<File> {
    copy(from, to, target, |mut blocks, copy_block| {
        let mut block = Vec::new();
        blocks.try_for_each(|number| copy_block(&mut block, number))
    })
}

/// Bytes that are copied at a time.
const BLOCK: usize = 1 << 20;

/// Copies a block of this number; the buffer is for the next one, too.
type CopyBlock<'a> = &'a (dyn Fn(&mut Vec<u8>, u64) -> io::Result<()> + Sync);

/// Copies an image, all of whose blocks `each` has copied.
fn copy(
    from: &Path,
    to: &Path,
    target: File,
    each: impl FnOnce(Range<u64>, CopyBlock<'_>) -> io::Result<()>,
) -> Result<File> {
    let copy = || -> io::Result<()> {
        let source = File::open(from)?;
        let length = source.metadata()?.len();
        target.set_len(length)?;
        each(0..length.div_ceil(BLOCK as u64), &|block, number| {
            let at = number * BLOCK as u64;
            block.resize(BLOCK.min((length - at) as usize), 0);
            source.read_exact_at(block, at)?;
            write_sparse(block, &target, at)
        })
    };
    copy().map_err(|source| Error::File {
        action: "copy an image to",
        path: to.to_owned(),
        source,
    })?;
    Ok(target)
}

/// Writes all but the pages that are zero.
fn write_sparse(block: &[u8], target: &File, at: u64) -> io::Result<()> {
    // Compared as wholes, which is many times quicker than byte by byte.
    let zero = |page: &[u8]| page == &ZERO_PAGE[..page.len()];
    let mut begin = None;
    let mut offset = 0;
    for page in block.chunks(PAGE_SIZE) {
        match (zero(page), begin) {
            (false, None) => begin = Some(offset),
            (true, Some(from)) => {
                target.write_all_at(&block[from..offset], at + from as u64)?;
                begin = None;
            }
            _ => {}
        }
        offset += page.len();
    }
    match begin {
        Some(from) => target.write_all_at(&block[from..], at + from as u64),
        None => Ok(()),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// From here on there is no room for another content of this file, once: the half of it is
    /// written to `/dev/full`.
    pub(crate) fn leave_no_room_for(path: &Path) {
        std::os::unix::fs::symlink("/dev/full", partial_name(path)).unwrap();
    }

    /// Makes a file that can't be read: at 0 of its own memory no process has anything, and the
    /// kernel says so as it does of a bad sector, with EIO.
    pub(crate) fn make_unreadable(path: &Path) {
        std::os::unix::fs::symlink("/proc/self/mem", path).unwrap();
    }

    /// It says that there was no room for this file.
    pub(crate) fn assert_no_room(error: &Error, wanted: &Path) {
        assert!(
            matches!(error, Error::File { path, source, .. }
                if path == wanted && source.kind() == io::ErrorKind::StorageFull),
            "{error:?}"
        );
    }

    /// It says that this file could not be read.
    pub(crate) fn assert_read_error(error: &Error, wanted: &Path) {
        let eio = rustix::io::Errno::IO.raw_os_error();
        assert!(
            matches!(error, Error::File { path, source, .. }
                if path == wanted && source.raw_os_error() == Some(eio)),
            "{error:?}"
        );
    }

    #[test]
    fn a_full_disk_is_named_and_leaves_what_was_there() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.json");
        write_json(&path, &1).unwrap();
        leave_no_room_for(&path);
        let failed = write_json(&path, &2).unwrap_err();
        assert_no_room(&failed, &path);
        assert_eq!(read_json::<u32>(&path).unwrap(), Some(1));
        // No half of it is left in the way of the next.
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        write_json(&path, &2).unwrap();
        assert_eq!(read_json::<u32>(&path).unwrap(), Some(2));
    }

    #[test]
    fn what_can_not_be_read_is_not_taken_for_missing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.json");
        make_unreadable(&path);
        let failed = read_json::<u32>(&path).unwrap_err();
        assert_read_error(&failed, &path);
        let copied = copy_sparse(dir.path(), &dir.path().join("copy")).unwrap_err();
        assert!(matches!(copied, Error::File { .. }), "{copied:?}");
    }

    #[test]
    fn a_sparse_copy_is_equal_and_leaves_holes() {
        use std::os::unix::fs::MetadataExt;
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("a"), dir.path().join("b"));
        let mut content = vec![0_u8; (5 << 20) + 777];
        content[4096..9000].fill(7);
        content[(2 << 20) - 3..(2 << 20) + 5].fill(9);
        *content.last_mut().unwrap() = 1;
        fs::write(&from, &content).unwrap();
        copy_sparse(&from, &to).unwrap();
        assert!(fs::read(&to).unwrap() == content);
        assert!(fs::metadata(&to).unwrap().blocks() * 512 < 1 << 20);
    }

    #[test]
    fn what_is_deleted_while_it_is_copied_does_not_come_back() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("a"), dir.path().join("in/b"));
        fs::write(&from, vec![7; 3 << 20]).unwrap();
        make_dir(to.parent().unwrap()).unwrap();
        let target = create_private(&to).unwrap();
        remove_dir(to.parent().unwrap()).unwrap();
        let copied = copy_sparse_into(&from, &to, target).unwrap();
        assert_eq!(copied.metadata().unwrap().len(), 3 << 20);
        assert!(!to.parent().unwrap().exists());
    }

    #[test]
    fn a_json_file_is_whole_or_damaged_but_never_guessed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.json");
        assert!(read_json::<Vec<u32>>(&path).unwrap().is_none());
        write_json(&path, &vec![1_u32, 2]).unwrap();
        assert_eq!(read_json::<Vec<u32>>(&path).unwrap(), Some(vec![1, 2]));
        fs::write(&path, "[1,").unwrap();
        assert!(matches!(
            read_json::<Vec<u32>>(&path),
            Err(Error::Damaged { .. })
        ));
    }
}
