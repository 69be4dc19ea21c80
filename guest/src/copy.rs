//! Copies an image: by sharing its blocks where the file system can, else without its holes.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;

use crate::GuestError;

const BLOCK_BYTES: usize = 1 << 20;

/// Copies `from` to the new file `to`, durably, and makes it read-only.
pub(crate) fn copy_image(from: &Path, to: &Path) -> Result<(), GuestError> {
    let source = File::open(from).map_err(GuestError::io("open", from))?;
    let target = File::create_new(to).map_err(GuestError::io("create", to))?;
    if rustix::fs::ioctl_ficlone(&target, &source).is_err() {
        copy_without_holes(source, &target)
            .map_err(GuestError::io("copy the guest's image to", to))?;
    }
    seal(&target).map_err(GuestError::io("write", to))
}

/// Makes a finished image durable and read-only: what boots it must put an overlay over it.
pub(crate) fn seal(file: &File) -> io::Result<()> {
    let mut permissions = file.metadata()?.permissions();
    permissions.set_readonly(true);
    file.set_permissions(permissions)?;
    file.sync_all()
}

fn copy_without_holes(mut source: File, mut target: &File) -> io::Result<()> {
    let mut block = vec![0; BLOCK_BYTES];
    let mut length = 0;
    loop {
        let filled = read_block(&mut source, &mut block)?;
        if filled == 0 {
            break;
        }
        length += filled as u64;
        if block[..filled].iter().all(|&byte| byte == 0) {
            target.seek(SeekFrom::Start(length))?;
        } else {
            target.write_all(&block[..filled])?;
        }
    }
    target.set_len(length)
}

/// As many bytes as there are, up to a whole block.
fn read_block(source: &mut File, block: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < block.len() {
        match source.read(&mut block[filled..]) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn a_copy_is_equal_sparse_and_read_only() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        let mut file = File::create(&from).unwrap();
        file.write_all(b"start").unwrap();
        file.seek(SeekFrom::Start(20 * BLOCK_BYTES as u64 + 7))
            .unwrap();
        file.write_all(b"end").unwrap();
        file.set_len(40 * BLOCK_BYTES as u64 + 1).unwrap();
        copy_image(&from, &to).unwrap();
        assert!(std::fs::read(&from).unwrap() == std::fs::read(&to).unwrap());
        let metadata = std::fs::metadata(&to).unwrap();
        assert!(
            metadata.blocks() * 512 < 4 * BLOCK_BYTES as u64,
            "{} blocks",
            metadata.blocks()
        );
        assert!(metadata.permissions().readonly());
    }

    #[test]
    fn nothing_is_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        std::fs::write(&from, "new").unwrap();
        std::fs::write(&to, "old").unwrap();
        assert!(copy_image(&from, &to).is_err());
        assert_eq!(std::fs::read_to_string(&to).unwrap(), "old");
    }
}
