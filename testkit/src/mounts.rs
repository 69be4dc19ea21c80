//! Mounts of this program's own, which nobody else sees and which go with its last process.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};

/// Set where this program is in a namespace of its own already.
const INSIDE: &str = "REPLAY_MIGRATE_MOUNTS_INSIDE";

/// Goes on in a mount namespace of its own: returns in there only.
///
/// # Errors
/// If this user may not make one.
pub fn enter_namespace() -> anyhow::Result<()> {
    use std::os::unix::process::CommandExt;
    if std::env::var_os(INSIDE).is_some() {
        return Ok(());
    }
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private"]);
    if !rustix::process::getuid().is_root() {
        command.args(["--user", "--map-root-user"]);
    }
    let program = std::env::current_exe().context("cannot find this program's file")?;
    command
        .arg(program)
        .args(std::env::args_os().skip(1))
        .env(INSIDE, "1");
    let error = command.exec();
    Err(error).context("cannot start unshare")
}

/// Something mounted, until it is dropped.
#[derive(Debug)]
pub struct Mounted {
    dir: PathBuf,
}

impl Mounted {
    /// Mounts with these words of mount(8) on a folder, which is made where it lacks.
    pub fn new(words: &[&OsStr], dir: &Path) -> anyhow::Result<Self> {
        std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        run("mount", words.iter().copied().chain([dir.as_os_str()]))?;
        Ok(Self {
            dir: dir.to_owned(),
        })
    }

    /// A tmpfs with these options.
    pub fn tmpfs(options: &str, dir: &Path) -> anyhow::Result<Self> {
        let words = ["-t", "tmpfs", "-o", options, "testkit"].map(OsStr::new);
        Self::new(&words, dir)
    }

    /// Gives it other options.
    pub fn remount(&self, options: &str) -> anyhow::Result<()> {
        let options = format!("remount,{options}");
        let words = ["-o", &options].map(OsStr::new);
        run("mount", words.into_iter().chain([self.dir.as_os_str()]))
    }

    /// Where it is.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Unmounts it: all of it is where it rests on when this returns.
    ///
    /// # Errors
    /// While somebody has a file of it open; then it stays, and is given back.
    pub fn unmount(self) -> Result<(), (Self, anyhow::Error)> {
        match run("umount", [self.dir.as_os_str()]) {
            Ok(()) => {
                std::mem::forget(self);
                Ok(())
            }
            Err(error) => Err((self, error)),
        }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Err(error) = run("umount", [OsStr::new("--lazy"), self.dir.as_os_str()]) {
            eprintln!("{error:#}");
        }
    }
}

/// Runs a program that must succeed, and says what it said if it does not.
pub fn run<'a>(program: &str, args: impl IntoIterator<Item = &'a OsStr>) -> anyhow::Result<()> {
    let output = Command::new(program)
        .args(args)
        .output()
        .with_context(|| format!("cannot start {program}"))?;
    if !output.status.success() {
        bail!(
            "{program} failed: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(())
}
