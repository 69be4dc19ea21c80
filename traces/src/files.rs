//! Files that are there whole or not at all, and private to their owner.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::Error;
use crate::key::{hex, random};

/// Makes a new file of mode 0600 with these bytes in it, on the disk when this returns. It
/// fails with [`std::io::ErrorKind::AlreadyExists`] when there is a file of that name, also
/// when it came up meanwhile. The handle is open for reading and writing, and locked.
pub(crate) fn create(action: &'static str, path: &Path, bytes: &[u8]) -> Result<File, Error> {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".new-{}", hex(&random::<8>()?)));
    let temporary = PathBuf::from(name);
    let created = (|| {
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&temporary)?;
        file.lock()?;
        file.write_all(bytes)?;
        file.sync_all()?;
        // Unlike a rename, a hard link never replaces a file.
        fs::hard_link(&temporary, path)?;
        Ok(file)
    })();
    // Where it was never made, there is nothing to remove.
    let _ = fs::remove_file(&temporary);
    let file = created.map_err(Error::io(action, path))?;
    sync_parent(path)?;
    Ok(file)
}

/// Makes a name in a folder survive a power failure.
fn sync_parent(path: &Path) -> Result<(), Error> {
    let parent = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty());
    let parent = parent.unwrap_or(Path::new("."));
    File::open(parent)
        .and_then(|folder| folder.sync_all())
        .map_err(Error::io("make durable the folder", parent))
}
