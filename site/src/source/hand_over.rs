//! Who owns the VM: settling a hand-over that was cut off, and letting go after one that was not.

use std::sync::Arc;

use vm_host::Vm;

use super::opening::hello;
use crate::error::{Error, Result};
use crate::generation::Manifest;
use crate::lease::Lease;
use crate::line::Line;
use crate::local::{self, Live};
use crate::ownership::{self, Offer, Settled};
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
    let Some(offer) = ownership::offered(vm)? else {
        return Ok(true);
    };
    let taken = ask(vm, &offer).await?;
    match ownership::decide(vm, offer, taken)? {
        Settled::Known => Ok(true),
        Settled::Here { was_running } => {
            if was_running && let Some(qemu) = qemu {
                local::resume_live(vm, qemu).await?;
            }
            Ok(true)
        }
        Settled::Away => {
            let_go(vm, qemu).await?;
            // No manifest came of it: it can't become a stale copy, and must not be taken for
            // the VM.
            local::drop_stale_live(vm).await?;
            Ok(false)
        }
    }
}

/// Asks the target whether it took what was offered.
async fn ask(vm: &VmDir, offer: &Offer) -> Result<bool> {
    let Offer { to, to_name, .. } = offer;
    let ask = async {
        let peer = vm.store().peers().of_key(to)?.ok_or_else(|| {
            Error::Refused(format!(
                "{to_name} is no longer a trusted site; `site trust` it again"
            ))
        })?;
        let record = vm.record()?;
        let (transfer, fence) = (offer.transfer, offer.fence);
        let mut line = Line::connect(vm.store(), &peer).await?;
        let purpose = Purpose::Settle(transfer);
        let hello = hello(vm, &record, purpose, transfer, fence, 1, "")?;
        line.send(ToTarget::Hello(Box::new(hello))).await?;
        match line.recv(Phase::Commit).await? {
            ToSource::Settled { taken } => Ok(taken),
            _ => Err(line.unexpected(Phase::Commit, "no answer to the question who owns the VM")),
        }
    };
    ask.await.map_err(|source: Error| Error::InDoubt {
        vm: vm.name().to_string(),
        site: to_name.clone(),
        source: Some(Box::new(source)),
    })
}

/// Lets go of a VM that another site has: its QEMU ends, never to run this state again.
async fn let_go(vm: &VmDir, qemu: Option<&Vm>) -> Result<()> {
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
    let_go(vm, Some(qemu)).await?;
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
