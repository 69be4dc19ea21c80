//! A file system of its own for a site's VMs, whose room can be taken away, and a switch that has
//! all fsyncs fail there.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use testkit::mounts::Mounted;
use testkit::preload;

/// Room for a few generations; none of it is taken before it is used.
const ROOM: u64 = 8 << 30;

/// A tmpfs, gone when dropped.
#[derive(Debug)]
pub(crate) struct Volume {
    mounted: Mounted,
    switch: PathBuf,
}

impl Volume {
    /// Mounts one on this folder, which is made; `switch` is a file beside it.
    pub(crate) fn mount(dir: &Path, switch: PathBuf) -> anyhow::Result<Self> {
        Ok(Self {
            mounted: Mounted::tmpfs(&format!("size={ROOM},mode=700"), dir)?,
            switch,
        })
    }

    /// What the processes of its site need in their environment: the library first.
    pub(crate) fn environment(&self, shim: &Path) -> [(&'static str, PathBuf); 3] {
        environment(shim, &self.switch, self.mounted.dir())
    }

    /// Takes away all room that is left.
    pub(crate) fn fill(&self) -> anyhow::Result<()> {
        // Somebody may write meanwhile: then it can't be made so small, and there is a new size.
        const TRIES: usize = 50;
        for _ in 0..TRIES {
            let stat =
                rustix::fs::statvfs(self.mounted.dir()).context("cannot ask for the room")?;
            let used = (stat.f_blocks - stat.f_bfree) * stat.f_frsize;
            if self.resize(used).is_ok() {
                return Ok(());
            }
        }
        bail!("{} does not get full", self.mounted.dir().display())
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
        self.mounted.remount(&format!("size={bytes}"))
    }
}

/// Has all fsyncs under a folder fail while the switch is there.
fn environment(shim: &Path, switch: &Path, under: &Path) -> [(&'static str, PathBuf); 3] {
    [
        ("LD_PRELOAD", shim.to_owned()),
        ("FAULTS_SWITCH", switch.to_owned()),
        ("FAULTS_UNDER", under.to_owned()),
    ]
}

/// Builds the library that has fsyncs fail.
pub(crate) fn build_shim(out: &Path) -> anyhow::Result<PathBuf> {
    preload::build(out, "shim", include_str!("shim.c"))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

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
        let switch = dir.path().join("switch");
        let works = |program: &Path, file: &str| {
            std::fs::write(dir.path().join(file), "x").unwrap();
            let output = Command::new(program)
                .arg(dir.path().join(file))
                .envs(environment(&shim, &switch, &inside))
                .output()
                .unwrap();
            output.status.success()
        };
        assert!(works(&program, "vms/file"));
        std::fs::write(&switch, "").unwrap();
        assert!(!works(&program, "vms/file"));
        assert!(works(&program, "file"));
        assert!(works(sync, "vms/file"));
        std::fs::remove_file(&switch).unwrap();
        assert!(works(&program, "vms/file"));
    }
}
