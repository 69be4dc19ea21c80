//! Who owns the VM: settling a hand-over that was cut off, and letting go after one that was not.

use std::sync::Arc;

use vm_host::Vm;

use super::opening::hello;
use crate::error::{Error, Result};
use crate::generation::Manifest;
use crate::lease::Lease;
use crate::line::Line;
use crate::local::{self, Live};
use crate::phase::Phase;
use crate::protocol::{ImageKind, Purpose, ToSource, ToTarget};
use crate::recording;
use crate::state::State;
use crate::store::VmDir;

/// Finds out who owns a VM whose hand-over was cut off, if that is not known.
///
/// # Errors
/// [`Error::InDoubt`] if the target can't be asked now.
pub async fn settle(vm: &VmDir) -> Result<()> {
    if vm.try_record()?.is_some() && matches!(vm.lease()?, Lease::Offered { .. }) {
        let _lock = vm.lock()?;
        let qemu = local::attach(vm).await?;
        ask_target(vm, qemu.as_ref()).await?;
    }
    Ok(())
}

/// Asks the target of an offered VM whether it took it, and notes the answer: whether the VM is
/// here.
pub(super) async fn ask_target(vm: &VmDir, qemu: Option<&Vm>) -> Result<bool> {
    let Lease::Offered {
        fence,
        transfer,
        to,
        to_name,
        was_running,
    } = vm.lease()?
    else {
        return Ok(true);
    };
    let in_doubt = |source: Error| Error::InDoubt {
        vm: vm.name().to_string(),
        site: to_name.clone(),
        source: Some(Box::new(source)),
    };
    let ask = async {
        let peer = vm.store().peers().of_key(&to)?.ok_or_else(|| {
            Error::Refused(format!(
                "{to_name} is no longer a trusted site; `site trust` it again"
            ))
        })?;
        let record = vm.record()?;
        let mut line = Line::connect(vm.store(), &peer).await?;
        let hello = hello(
            vm,
            &record,
            Purpose::Settle(transfer),
            transfer,
            fence,
            1,
            "",
        )?;
        line.send(ToTarget::Hello(Box::new(hello))).await?;
        match line.recv(Phase::Commit).await? {
            ToSource::Settled { taken } => Ok(taken),
            _ => Err(line.unexpected(Phase::Commit, "no answer to the question who owns the VM")),
        }
    };
    let taken = ask.await.map_err(in_doubt)?;
    if taken {
        hand_over(
            vm,
            qemu,
            Lease::Elsewhere {
                fence: fence + 1,
                owner: to,
                owner_name: to_name,
            },
        )
        .await?;
        // No manifest came of it: it can't become a stale copy, and must not be taken for the VM.
        local::drop_stale_live(vm).await?;
    } else {
        Lease::Held {
            fence,
            transfer: None,
        }
        .store(&vm.lease_path())?;
        if was_running && let Some(qemu) = qemu {
            local::resume_live(vm, qemu).await?;
        }
    }
    Ok(!taken)
}

/// Lets go of a VM that another site has: its QEMU ends, never to run this state again.
async fn hand_over(vm: &VmDir, qemu: Option<&Vm>, lease: Lease) -> Result<()> {
    lease.store(&vm.lease_path())?;
    // A recorder that does not answer notices QEMU's end.
    if let Err(error) = recording::moved(vm).await {
        tracing::warn!(error = error.chain(), "the recorder was not told");
    }
    if let Some(qemu) = qemu {
        qemu.quit()
            .await
            .map_err(Error::host(format!("cannot end the QEMU of {}", vm.name())))?;
    }
    Ok(())
}

/// After the hand-over: what stood still here becomes the stale copy of the next return.
pub(super) async fn keep(
    vm: &VmDir,
    qemu: &Vm,
    live: &Live,
    state: Arc<State>,
    manifest: Manifest,
) -> Result<()> {
    hand_over(vm, Some(qemu), vm.lease()?).await?;
    let (vm, live) = (vm.clone(), live.clone());
    local::blocking(move || {
        let files = vm.generation(manifest.generation);
        crate::files::make_dir(files.dir())?;
        for (index, overlay) in live.overlay_paths(&vm).iter().enumerate() {
            let kept = files.disk(index);
            std::fs::hard_link(overlay, &kept).map_err(Error::file("link", &kept))?;
        }
        let ram = vm.runtime_dir("live")?.join("ram.img");
        crate::files::copy_sparse(&ram, &files.ram())?;
        let device = files.device();
        std::fs::write(&device, state.device()).map_err(Error::file("write", &device))?;
        files.save_trees(state.tree(ImageKind::Ram), &state.disk_trees())?;
        files.publish(&manifest)?;
        crate::files::remove_dir(&vm.live_dir())?;
        crate::files::remove_dir(&vm.runtime_dir("live")?)
    })
    .await
}
