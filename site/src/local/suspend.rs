//! Ending a VM's QEMU with nothing lost, for good or to go on in a new one at once.

use vm_host::{Status, Vm};

use super::checkpoint::{After, checkpoint_locked};
use super::{First, attach_running, guest_status, require_lease, resume_live, start_locked, still};
use crate::error::{Error, Result};
use crate::files;
use crate::generation::Manifest;
use crate::store::VmDir;

/// Stops a VM so that `start` goes on where it was: a checkpoint, then QEMU quits.
pub async fn suspend(vm: &VmDir) -> Result<Manifest> {
    crate::source::settle(vm).await?;
    let _lock = vm.lock_soon().await?;
    require_lease(vm)?;
    let qemu = attach_running(vm).await?;
    qemu.pause()
        .await
        .map_err(Error::host(format!("cannot pause {}", vm.name())))?;
    // It is not to go on from here.
    still::end(vm)?;
    let made = checkpoint_locked(vm, &qemu, None, After::GoesOn).await?;
    end(vm, &qemu).await?;
    Ok(made.manifest)
}

/// A VM in a new QEMU, at the generation that was made for it. It stands still yet.
pub(crate) struct Renewed {
    pub(crate) qemu: Vm,
    pub(crate) manifest: Manifest,
    was_running: bool,
}

/// Makes a new generation, ends QEMU and starts another one there. The lock is held;
/// `for_recording` as of [`checkpoint_locked`].
///
/// Where that fails before QEMU ends, the guest goes on in the one it has; after that, `vm start`
/// goes on with the generation.
pub(crate) async fn renew_locked(
    vm: &VmDir,
    old: Vm,
    for_recording: &(dyn Fn() + Sync),
) -> Result<Renewed> {
    let was_running = guest_status(vm, &old).await? == Status::Running || still::is_noted(vm)?;
    let made = async {
        let made = checkpoint_locked(vm, &old, Some(for_recording), After::StandsStill).await?;
        end(vm, &old).await?;
        Ok(made.manifest)
    };
    let manifest = match made.await {
        Ok(manifest) => manifest,
        Err(error) => {
            if was_running && old.status().await.is_ok() {
                go_on(vm, &old).await?;
            }
            return Err(error);
        }
    };
    let first = if was_running {
        First::StandsStillForUs
    } else {
        First::StandsStill
    };
    let qemu = match start_locked(vm, old.accelerator(), first).await {
        Ok(qemu) => qemu,
        Err(error) => {
            tracing::error!(
                vm = %vm.name(),
                generation = manifest.generation,
                "the VM has no QEMU now; `vm start` goes on from this generation, with nothing lost"
            );
            return Err(error);
        }
    };
    Ok(Renewed {
        qemu,
        manifest,
        was_running,
    })
}

impl Renewed {
    /// The guest does what it did before.
    pub(crate) async fn go_on(&self, vm: &VmDir) -> Result<()> {
        if self.was_running {
            go_on(vm, &self.qemu).await?;
        }
        Ok(())
    }
}

async fn go_on(vm: &VmDir, qemu: &Vm) -> Result<()> {
    resume_live(vm, qemu).await?;
    still::end(vm)
}

/// Ends QEMU; what it had is in the newest generation.
async fn end(vm: &VmDir, qemu: &Vm) -> Result<()> {
    qemu.quit()
        .await
        .map_err(Error::host(format!("cannot stop {}", vm.name())))?;
    files::remove_dir(&vm.live_dir())?;
    files::remove_dir(&vm.runtime_dir("live")?)
}
