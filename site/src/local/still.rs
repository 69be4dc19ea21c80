//! A guest that stands still while its state is taken, and who sees to it that it goes on where the
//! process dies that stopped it.
//!
//! A note beside the guest's sockets, and gone with them: without QEMU there is nothing to go on.

use std::fs;
use std::path::PathBuf;

use vm_host::Status;

use super::{First, attach, resume_live, start_locked};
use crate::error::{Error, Result};
use crate::files;
use crate::lease::Lease;
use crate::store::VmDir;

fn path(vm: &VmDir) -> Result<PathBuf> {
    Ok(vm.runtime_dir("live")?.join("still"))
}

/// The guest runs, and is to stand still now.
pub(super) fn begin(vm: &VmDir) -> Result<()> {
    let path = path(vm)?;
    fs::write(&path, b"").map_err(Error::file("write", &path))
}

/// It goes on.
pub(crate) fn end(vm: &VmDir) -> Result<()> {
    files::remove_file(&path(vm)?)
}

/// Whether a guest stands still for somebody; whoever holds the VM's lock, and does not know, may
/// have it go on.
pub(crate) fn is_noted(vm: &VmDir) -> Result<bool> {
    Ok(path(vm)?.exists())
}

/// Lets a guest go on whose state was being taken by a process that died. Does nothing while one is
/// at work.
pub(crate) async fn recover(vm: &VmDir) -> Result<()> {
    if !is_noted(vm)? {
        return Ok(());
    }
    // Held by whoever is at work.
    let Ok(_lock) = vm.lock() else {
        return Ok(());
    };
    if !is_noted(vm)? {
        return Ok(());
    }
    // Of a VM that is another's, or may be, nothing runs here.
    if !matches!(vm.lease()?, Lease::Held { .. }) {
        return Ok(());
    }
    let what = || format!("cannot have {} go on", vm.name());
    if let Some(qemu) = attach(vm).await? {
        tracing::warn!(
            vm = %vm.name(),
            "a checkpoint was killed while the guest stood still; it goes on"
        );
        if qemu.status().await.map_err(Error::host(what()))? == Status::Incoming {
            // A new one that has nothing of the guest yet.
            qemu.kill().await.map_err(Error::host(what()))?;
            start_locked(vm, qemu.accelerator(), First::Runs).await?;
        } else {
            resume_live(vm, &qemu).await?;
        }
    }
    end(vm)
}
