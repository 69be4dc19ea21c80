//! The guest of all cases: a boot sector that counts, in its memory and on its disk. It needs 32 MiB,
//! so that a whole life of it is recorded within a minute.

use std::path::Path;

use anyhow::Context;
use testkit::sector;

/// Its memory in MiB: the least that a VM may have.
pub(crate) const MEMORY: &str = "32";

/// Writes its disk.
pub(crate) fn write_disk(path: &Path) -> anyhow::Result<()> {
    sector::write_disk(path, &sector::COUNTS, &[])
        .with_context(|| format!("cannot write {}", path.display()))
}
