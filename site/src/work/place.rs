//! Where forks and states in the making lie, and how a place is cleared.

use std::path::PathBuf;

use vm_host::Vm;

use crate::error::{Error, Result};
use crate::files;
use crate::store::VmDir;

/// Where a state is made. What is done in one place at a time is kept apart by locks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Workplace {
    /// Of migrations, and of replays that are thrown away: with the VM's lock.
    Incoming,
    /// Of the twin that follows a running VM: with the lock of who follows.
    Following,
    /// Of parcels that are being packed: with the lock of who keeps standbys. No guest runs there, and
    /// all of it is on the disk.
    Packing,
}

impl Workplace {
    /// The folder for what is kept on disk.
    pub(crate) fn dir(self, vm: &VmDir) -> PathBuf {
        match self {
            Self::Incoming => vm.incoming(),
            Self::Following => vm.dir().join("following"),
            Self::Packing => vm.dir().join("packing"),
        }
    }

    /// The folder for sockets and RAM.
    pub(crate) fn runtime(self, vm: &VmDir) -> Result<PathBuf> {
        match self {
            Self::Incoming => vm.runtime_dir("incoming"),
            Self::Following => vm.runtime_dir("following"),
            Self::Packing => Ok(self.dir(vm).join("ram")),
        }
    }

    /// Ends a fork that somebody left behind here when they died, and removes the folders.
    pub(crate) async fn clear(self, vm: &VmDir) -> Result<()> {
        self.end_fork(vm).await?;
        files::remove_dir(&self.runtime(vm)?)?;
        files::remove_dir(&self.dir(vm))
    }

    /// Ends a fork that somebody left behind here when they died; what it wrote stays.
    pub(crate) async fn end_fork(self, vm: &VmDir) -> Result<()> {
        let runtime = self.runtime(vm)?;
        if runtime.exists()
            && let Some(qemu) = Vm::attach(&runtime)
                .await
                .map_err(Error::host("cannot reach a fork left behind"))?
        {
            qemu.kill()
                .await
                .map_err(Error::host("cannot end a fork left behind"))?;
        }
        Ok(())
    }
}
