//! Who owns the VM: settling a hand-over that was cut off, and letting go after one that was not.

use std::sync::Arc;
use std::time::Duration;

use vm_host::Vm;

use super::opening::hello;
use crate::error::{Error, Result};
use crate::generation::Manifest;
use crate::lease::Lease;
use crate::line::Line;
use crate::local::{self, Live};
use crate::moving::Moving;
use crate::ownership::{self, Offer, Settled};
use crate::peers::Peer;
use crate::phase::Phase;
use crate::protocol::{ImageKind, Purpose, ToSource, ToTarget};
use crate::recording;
use crate::state::State;
use crate::store::VmDir;
use crate::vm::Id;

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

/// As [`settle`], for an agent: nobody is kept from working on the VM while the target is asked.
///
/// # Errors
/// [`Error::InDoubt`] if the target can't be asked now.
pub(crate) async fn settle_unattended(vm: &VmDir) -> Result<()> {
    if vm.lock().is_err() {
        // Whoever is at work asks by themselves.
        return Ok(());
    }
    let Some(offer) = ownership::offered(vm)? else {
        return Ok(());
    };
    let taken = ask(vm, &offer).await?;
    let _lock = vm.lock_soon().await?;
    let qemu = local::attach(vm).await?;
    note(vm, qemu.as_ref(), offer, taken).await?;
    tracing::info!(vm = %vm.name(), taken, "the hand-over that was cut off is settled");
    Ok(())
}

/// Asks a site that had the VM whether it has it, under a higher number than this one's, and gives
/// way if so.
///
/// # Errors
/// When it can't be asked now.
pub(crate) async fn ask_whether_superseded(vm: &VmDir, peer: &Peer) -> Result<()> {
    let record = vm.record()?;
    let fence = vm.lease()?.fence();
    let transfer = Id::random()?;
    let purpose = Purpose::Estimate;
    let mut line = Line::connect(vm.store(), peer).await?;
    line.set_patience(Duration::ZERO);
    let hello = hello(vm, &record, peer, purpose, transfer, fence, 1, "")?;
    line.send(ToTarget::Hello(Box::new(hello))).await?;
    let answer = line.recv(Phase::Hello).await;
    line.close().await;
    give_way_if_so(vm, peer, answer.map(drop))
        .await
        .or_else(|error| {
            // It has said what it has to say.
            if error.superseded().is_some() {
                Ok(())
            } else {
                Err(error)
            }
        })
}

/// Notes that the VM was taken over by the other site, if that is why something failed.
pub(super) async fn give_way_if_so<T>(vm: &VmDir, peer: &Peer, outcome: Result<T>) -> Result<T> {
    if let Err(error) = &outcome
        && let Some((fence, chain)) = error.superseded()
        && !local::give_way(vm, peer, fence, chain).await?
    {
        tracing::warn!(
            vm = %vm.name(),
            peer = %peer.name,
            fence,
            "it says that it has the VM, and can't show how it came to it from here: it is not believed"
        );
    }
    outcome
}

/// Asks the target of an offered VM whether it took it, and notes the answer: whether the VM is
/// here.
pub(super) async fn ask_target(vm: &VmDir, qemu: Option<&Vm>) -> Result<bool> {
    let Some(offer) = ownership::offered(vm)? else {
        return Ok(true);
    };
    let taken = ask(vm, &offer).await?;
    note(vm, qemu, offer, taken).await
}

/// Notes what the target answered, and does what follows from it: whether the VM is here. The
/// lock is held.
async fn note(vm: &VmDir, qemu: Option<&Vm>, offer: Offer, taken: bool) -> Result<bool> {
    let settled = ownership::decide(vm, offer, taken)?;
    if settled != Settled::Known {
        // Neither way does that transfer go on.
        Moving::forget(vm)?;
    }
    match settled {
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
        // Whoever asks calls again.
        line.set_patience(Duration::ZERO);
        let purpose = Purpose::Settle(transfer);
        let hello = hello(vm, &record, &peer, purpose, transfer, fence, 1, "")?;
        line.send(ToTarget::Hello(Box::new(hello))).await?;
        match line.recv(Phase::Commit).await? {
            ToSource::Settled { taken } => {
                line.close().await;
                Ok(taken)
            }
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
