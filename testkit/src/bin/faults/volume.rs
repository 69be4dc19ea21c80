//! A file system of its own for a site's VMs, whose room can be taken away, and a switch that has
//! all fsyncs fail there.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};

/// Room for a few generations; none of it is taken before it is used.
const ROOM: u64 = 8 << 30;

/// Where mounts are this program's alone, which go with its last process.
const INSIDE: &str = "REPLAY_MIGRATE_FAULTS_INSIDE";

/// Goes on in a mount namespace of its own: returns in there only.
///
/// # Errors
/// If this user may not make one.
pub(crate) fn enter_namespace() -> anyhow::Result<()> {
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

/// A tmpfs, gone when dropped.
#[derive(Debug)]
pub(crate) struct Volume {
    dir: PathBuf,
    switch: PathBuf,
}

impl Volume {
    /// Mounts one on this folder, which is made; `switch` is a file beside it.
    pub(crate) fn mount(dir: &Path, switch: PathBuf) -> anyhow::Result<Self> {
        std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let options = format!("size={ROOM},mode=700");
        run(
            "mount",
            ["-t", "tmpfs", "-o", &options, "faults"]
                .map(OsStr::new)
                .into_iter()
                .chain([dir.as_os_str()]),
        )?;
        Ok(Self {
            dir: dir.to_owned(),
            switch,
        })
    }

    /// What the processes of its site need in their environment: the library first.
    pub(crate) fn environment(&self, shim: &Path) -> [(&'static str, PathBuf); 3] {
        [
            ("LD_PRELOAD", shim.to_owned()),
            ("FAULTS_SWITCH", self.switch.clone()),
            ("FAULTS_UNDER", self.dir.clone()),
        ]
    }

    /// Takes away all room that is left.
    pub(crate) fn fill(&self) -> anyhow::Result<()> {
        // Somebody may write meanwhile: then it can't be made so small, and there is a new size.
        const TRIES: usize = 50;
        for _ in 0..TRIES {
            let stat = rustix::fs::statvfs(&self.dir).context("cannot ask for the room")?;
            let used = (stat.f_blocks - stat.f_bfree) * stat.f_frsize;
            if self.resize(used).is_ok() {
                return Ok(());
            }
        }
        bail!("{} does not get full", self.dir.display())
    }

    /// Has all fsyncs fail.
    pub(crate) fn fail_syncs(&self) -> anyhow::Result<()> {
        std::fs::write(&self.switch, "").context("cannot set the switch")
    }

    /// There is room, and fsyncs work.
    pub(crate) fn mend(&self) -> anyhow::Result<()> {
        match std::fs::remove_file(&self.switch) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).context("cannot take the switch back");
            }
            _ => {}
        }
        self.resize(ROOM)
    }

    fn resize(&self, bytes: u64) -> anyhow::Result<()> {
        let options = format!("remount,size={bytes}");
        run(
            "mount",
            ["-o", &options]
                .map(OsStr::new)
                .into_iter()
                .chain([self.dir.as_os_str()]),
        )
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        if let Err(error) = run("umount", [OsStr::new("--lazy"), self.dir.as_os_str()]) {
            eprintln!("{error:#}");
        }
    }
}

fn run<'a>(program: &str, args: impl IntoIterator<Item = &'a OsStr>) -> anyhow::Result<()> {
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

/// Builds the library that has fsyncs fail, with the host's C compiler: cargo links with it too.
pub(crate) fn build_shim(out: &Path) -> anyhow::Result<PathBuf> {
    let (source, library) = (out.join("shim.c"), out.join("shim.so"));
    std::fs::write(&source, include_str!("shim.c"))
        .with_context(|| format!("cannot write {}", source.display()))?;
    let args = [
        "-shared".as_ref(),
        "-fPIC".as_ref(),
        "-O2".as_ref(),
        "-o".as_ref(),
        library.as_os_str(),
        source.as_os_str(),
        "-ldl".as_ref(),
    ];
    run("cc", args)?;
    Ok(library)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fsyncs_fail_under_the_folder_while_the_switch_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let shim = build_shim(dir.path()).unwrap();
        // A program of the right name; `sync FILE` calls fsync.
        let program = dir.path().join("replay-migrate");
        let sync = ["/usr/bin/sync", "/bin/sync"].map(Path::new);
        let sync = sync.into_iter().find(|path| path.exists()).unwrap();
        std::os::unix::fs::symlink(sync, &program).unwrap();
        let inside = dir.path().join("vms");
        std::fs::create_dir(&inside).unwrap();
        let volume = Volume {
            dir: inside.clone(),
            switch: dir.path().join("switch"),
        };
        let works = |program: &Path, file: &str| {
            std::fs::write(dir.path().join(file), "x").unwrap();
            let output = Command::new(program)
                .arg(dir.path().join(file))
                .envs(volume.environment(&shim))
                .output()
                .unwrap();
            output.status.success()
        };
        assert!(works(&program, "vms/file"));
        volume.fail_syncs().unwrap();
        assert!(!works(&program, "vms/file"));
        assert!(works(&program, "file"));
        assert!(works(sync, "vms/file"));
        std::fs::remove_file(&volume.switch).unwrap();
        assert!(works(&program, "vms/file"));
        // It was never mounted.
        std::mem::forget(volume);
    }
}
