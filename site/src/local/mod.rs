//! VMs at this site: made, started, stopped, checkpointed.
//!
//! A running VM is a QEMU of its own that outlives this process. `live/run/live.json` says what
//! its overlays rest on; its RAM and sockets lie in the runtime directory. Nothing here runs a VM
//! whose lease is not held.

mod checkpoint;
mod create;
mod live;
mod status;
pub(crate) mod still;
mod suspend;
mod takeover;

use std::path::{Path, PathBuf};
use std::time::Duration;

use vm_host::{Accelerator, Boot, Hardware, Launch, Network, Status, Vm, programs};

use crate::arriving;
use crate::chance;
use crate::disks::{self};
use crate::error::{Error, Result};
use crate::files;
use crate::generation::Manifest;
use crate::lease::Lease;
use crate::leftovers;
use crate::resuming::Resuming;
use crate::source;
use crate::store::VmDir;
use crate::vm::VmRecord;

pub use checkpoint::checkpoint;
pub(crate) use checkpoint::{After, Made, checkpoint_locked, next_generation};
pub(crate) use create::create;
pub use create::{NewVm, REPLAY_FRIENDLY, create_from};
pub(crate) use live::Live;
pub use status::{VmState, VmStatus, status};
pub use suspend::suspend;
pub(crate) use suspend::{Renewed, renew_locked};
pub(crate) use takeover::give_way;
pub use takeover::{Takeover, believe, takeover, takeover_of};

/// Finds the running QEMU of a VM.
pub async fn attach(vm: &VmDir) -> Result<Option<Vm>> {
    Vm::attach(&vm.runtime_dir("live")?)
        .await
        .map_err(Error::host(format!(
            "cannot reach the QEMU of {}",
            vm.name()
        )))
}

/// The running QEMU of a VM, or a refusal.
pub async fn attach_running(vm: &VmDir) -> Result<Vm> {
    attach(vm).await?.ok_or_else(|| {
        Error::Refused(format!(
            "{0} is not running here; start it with `replay-migrate vm start {0}`",
            vm.name()
        ))
    })
}

pub(crate) async fn guest_status(vm: &VmDir, qemu: &Vm) -> Result<Status> {
    qemu.status()
        .await
        .map_err(Error::host(format!("cannot ask the QEMU of {}", vm.name())))
}

/// Fails unless this site may run the VM.
pub(crate) fn require_lease(vm: &VmDir) -> Result<u64> {
    match vm.lease()? {
        Lease::Held { fence, .. } => Ok(fence),
        Lease::Elsewhere { owner_name, .. } => Err(Error::Refused(format!(
            "{0} runs at {owner_name}; what is here is a stale copy. Bring it back from there with \
             `replay-migrate migrate`; if that site is gone for good, `vm takeover {0}` here",
            vm.name()
        ))),
        Lease::Offered { to_name, .. } => Err(Error::InDoubt {
            vm: vm.name().to_string(),
            site: to_name,
            source: None,
        }),
    }
}

/// Starts a VM: from its newest generation, or by booting it.
///
/// A VM whose QEMU died goes on from its disks as after a power cut.
pub async fn start(vm: &VmDir, accelerator: Accelerator, paused: bool) -> Result<Vm> {
    vm.record()?;
    source::settle(vm).await?;
    let _lock = vm.lock_soon().await?;
    require_lease(vm)?;
    if attach(vm).await?.is_some() {
        return Err(Error::Refused(format!("{} runs already", vm.name())));
    }
    let qemu = start_locked(vm, accelerator, First::of(paused)).await?;
    // It came, and runs.
    Resuming::forget(vm)?;
    Ok(qemu)
}

/// What a guest does first in a new QEMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum First {
    Runs,
    StandsStill,
    /// It stands still for whoever starts it, and goes on if that dies, see [`still`].
    StandsStillForUs,
}

impl First {
    pub(crate) const fn of(paused: bool) -> Self {
        if paused {
            Self::StandsStill
        } else {
            Self::Runs
        }
    }
}

/// As [`start`], with the lock held, for a VM of this site that has no QEMU.
pub(crate) async fn start_locked(vm: &VmDir, accelerator: Accelerator, first: First) -> Result<Vm> {
    let record = vm.record()?;
    require_lease(vm)?;
    let runtime = vm.runtime_dir("live")?;
    let (live, restore) = match point_of_start(vm)? {
        StartAt::Disks(live) => (live, None),
        StartAt::Generation(manifest) => {
            (lay_overlays(vm, &record, Some(&manifest))?, Some(*manifest))
        }
        StartAt::Boot => (lay_overlays(vm, &record, None)?, None),
    };
    for disk in &record.disks {
        arriving::require_served(vm, disk.hash)?;
    }
    files::remove_dir(&runtime)?;
    files::make_dir(&runtime)?;
    if first == First::StandsStillForUs {
        still::begin(vm)?;
    }
    let hardware = restore
        .as_ref()
        .map_or(&record.hardware, |manifest| &manifest.hardware);
    let ram = runtime.join("ram.img");
    if let Some(manifest) = &restore {
        files::copy_sparse(&vm.generation(manifest.generation).ram(), &ram)?;
    }
    let launch = launch(
        vm,
        &record,
        hardware,
        &runtime,
        live.overlay_paths(vm),
        Network::Connected,
        accelerator,
        restore.is_some(),
    );
    let qemu = Vm::start(&launch)
        .await
        .map_err(Error::host(format!("cannot start {}", vm.name())))?;
    let begun = async {
        if let Some(manifest) = &restore {
            let device = vm.generation(manifest.generation).load_device()?;
            qemu.load_device_state(&device)
                .await
                .map_err(Error::host(format!(
                    "cannot restore generation {} of {}",
                    manifest.generation,
                    vm.name()
                )))?;
        }
        if first == First::Runs {
            resume_live(vm, &qemu).await?;
        }
        Ok(())
    };
    if let Err(error) = begun.await {
        let _ = qemu.kill().await;
        return Err(error);
    }
    Ok(qemu)
}

/// What a VM without a QEMU goes on from.
#[derive(Debug, PartialEq)]
enum StartAt {
    /// Its disks as they were left, as after a power cut.
    Disks(Live),
    /// A whole state.
    Generation(Box<Manifest>),
    /// Nothing yet.
    Boot,
}

/// Whether [`start`] boots a VM; it restores others.
pub fn will_boot(vm: &VmDir) -> Result<bool> {
    Ok(!matches!(point_of_start(vm)?, StartAt::Generation(_)))
}

fn point_of_start(vm: &VmDir) -> Result<StartAt> {
    if let Some(live) = Live::load(vm)? {
        // A guest that has not run since its generation has lost nothing but its QEMU.
        let whole = match live.generation {
            Some(number) if !live.ran => vm.generation(number).load_manifest()?,
            _ => None,
        };
        return Ok(whole.map_or(StartAt::Disks(live), |manifest| {
            StartAt::Generation(Box::new(manifest))
        }));
    }
    Ok(match vm.generations()?.pop() {
        Some(manifest) => StartAt::Generation(Box::new(manifest)),
        None => StartAt::Boot,
    })
}

/// Lets the guest run, and notes that it is no longer at its generation.
pub async fn resume_live(vm: &VmDir, qemu: &Vm) -> Result<()> {
    require_lease(vm)?;
    let mut live = Live::of_running(vm, qemu).await?;
    if !live.ran {
        live.ran = true;
        live.store(vm)?;
    }
    qemu.resume()
        .await
        .map_err(Error::host(format!("cannot resume {}", vm.name())))
}

/// How QEMU is started for a VM of this site, or for a fork of one.
#[expect(
    clippy::too_many_arguments,
    reason = "each is a fact of its own; a struct would only rename Launch"
)]
pub(crate) fn launch(
    vm: &VmDir,
    record: &VmRecord,
    hardware: &Hardware,
    runtime: &Path,
    disks: Vec<PathBuf>,
    network: Network,
    accelerator: Accelerator,
    incoming: bool,
) -> Launch {
    let path = |hash| vm.store().base_path(hash);
    Launch {
        name: vm.name().to_string(),
        hardware: hardware.clone(),
        boot: record.boot.as_ref().map(|boot| Boot {
            kernel: path(boot.kernel.hash),
            initrd: boot.initrd.map(|initrd| path(initrd.hash)),
            append: boot.append.clone(),
        }),
        accelerator,
        runtime_dir: runtime.to_owned(),
        ram: runtime.join("ram.img"),
        disks,
        arriving: record
            .disks
            .iter()
            .map(|disk| vm.store().is_arriving(disk.hash).then_some(disk.hash))
            // Without a runtime directory nothing starts; least of all on the holes of a file.
            .map(|hash| hash.map(|hash| arriving::socket(vm.store(), hash).unwrap_or_default()))
            .collect(),
        network,
        incoming,
    }
}

/// Lays fresh overlays over a generation, or over the base images, as the VM's live disks.
pub(crate) fn lay_overlays(vm: &VmDir, record: &VmRecord, on: Option<&Manifest>) -> Result<Live> {
    files::remove_dir(&vm.live_dir())?;
    files::make_dir(&vm.live_dir())?;
    let mut live = Live {
        generation: on.map(|on| on.generation),
        overlays: Vec::new(),
        ran: false,
    };
    for index in 0..record.disks.len() {
        let name = format!("disk{index}.qcow2");
        disks::overlay_on(
            vm,
            record,
            live.generation,
            index,
            &vm.live_dir().join(&name),
        )?;
        live.overlays.push(name);
    }
    // A note of overlays that a power cut has taken would keep the VM from its generation.
    for overlay in live.overlay_paths(vm) {
        files::sync_file(&overlay)?;
    }
    live.store(vm)?;
    Ok(live)
}

/// Waits until the guest says that its desktop is up.
pub async fn wait_until_ready(vm: &VmDir, qemu: &Vm, limit: Duration) -> Result<()> {
    let record = vm.record()?;
    let Some(marker) = &record.ready_marker else {
        return Err(Error::Refused(format!(
            "{} was created without a readiness marker, so there is nothing to wait for",
            vm.name()
        )));
    };
    qemu.wait_for_serial(marker, limit)
        .await
        .map_err(Error::host(format!("{} did not become ready", vm.name())))
}

/// Ends QEMU and forgets what the guest did since its last generation.
pub async fn discard(vm: &VmDir) -> Result<()> {
    let _lock = vm.lock_soon().await?;
    drop_live(vm).await?;
    // Nobody starts it again but its user.
    Resuming::forget(vm)
}

/// Clears away the last run of a VM that another site has: left by a hand-over that was cut off
/// after it was decided. To be done before the VM comes back, or that run could be taken for it.
/// The lock is held.
pub(crate) async fn drop_stale_live(vm: &VmDir) -> Result<()> {
    if matches!(
        Lease::load(&vm.lease_path())?,
        Some(Lease::Elsewhere { .. })
    ) {
        drop_live(vm).await?;
    }
    Ok(())
}

async fn drop_live(vm: &VmDir) -> Result<()> {
    if let Some(qemu) = attach(vm).await? {
        qemu.kill()
            .await
            .map_err(Error::host(format!("cannot stop {}", vm.name())))?;
    }
    files::remove_dir(&vm.live_dir())?;
    files::remove_dir(&vm.runtime_dir("live")?)
}

/// Pauses the guest.
pub async fn pause(vm: &VmDir) -> Result<()> {
    let _lock = vm.lock_soon().await?;
    let qemu = attach_running(vm).await?;
    qemu.pause()
        .await
        .map_err(Error::host(format!("cannot pause {}", vm.name())))?;
    // Somebody wants it so.
    still::end(vm)
}

/// Lets a paused guest run.
pub async fn resume(vm: &VmDir) -> Result<()> {
    let _lock = vm.lock_soon().await?;
    let qemu = attach_running(vm).await?;
    resume_live(vm, &qemu).await?;
    chance::release_unless_recorded(vm).await
}

/// Removes a VM with all its generations and logs. Base files stay.
pub async fn delete(vm: &VmDir) -> Result<()> {
    vm.record()?;
    if let Some((site, name)) = source::owed(vm)?
        && vm.store().peers().of_key(&site)?.is_some()
    {
        return Err(Error::Refused(format!(
            "{0} is at {name}, and a part of its disk is only here yet: `replay-migrate supply {0}` brings it. If {name} \
             is gone for good, `site untrust {name}` first",
            vm.name()
        )));
    }
    let _held = source::hold(vm).await?;
    discard(vm).await?;
    let _lock = vm.lock_soon().await?;
    vm.note_deleted()?;
    leftovers::remove_vm(vm)
}

/// The version of this host's QEMU, as text.
pub(crate) async fn qemu_version() -> Result<String> {
    blocking(|| {
        let version = programs::version(&programs::qemu());
        Ok(version
            .map_err(Error::host("cannot ask QEMU for its version"))?
            .to_string())
    })
    .await
}

/// Runs work that hashes or copies images off the async threads.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

/// Waits for work that was begun earlier.
pub(crate) async fn joined<T>(work: tokio::task::JoinHandle<Result<T>>) -> Result<T> {
    match work.await {
        Ok(result) => result,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

#[cfg(test)]
pub(crate) mod tests;
