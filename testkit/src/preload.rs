//! Libraries that are loaded before a program's own, and play what no real part does at will: a disk
//! that refuses an fsync, or forgets one.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use anyhow::Context as _;

use crate::mounts::run;

/// Builds one, with the host's C compiler: cargo links with it too.
///
/// # Errors
/// When there is no compiler, or it does not take the source.
pub fn build(dir: &Path, name: &str, source: &str) -> anyhow::Result<PathBuf> {
    let (file, library) = (
        dir.join(format!("{name}.c")),
        dir.join(format!("{name}.so")),
    );
    std::fs::write(&file, source).with_context(|| format!("cannot write {}", file.display()))?;
    let words = ["-shared", "-fPIC", "-O2", "-o"].map(OsStr::new);
    let files = [library.as_os_str(), file.as_os_str(), OsStr::new("-ldl")];
    run("cc", words.into_iter().chain(files))?;
    Ok(library)
}
