//! VMs at this site: made, started, stopped, checkpointed.
//!
//! A running VM is a QEMU of its own that outlives this process. `live/run/live.json` says what
//! its overlays rest on; its RAM and sockets lie in the runtime directory. Nothing here runs a VM
//! whose lease is not held.

use std::path::{Path, PathBuf};
use std::time::Duration;

use reconciler::{ImageTree, SlicePages, no_progress};
use serde::{Deserialize, Serialize};
use vm_host::{Accelerator, Boot, Hardware, Launch, Network, RamMap, Status, Vm, programs};

use crate::disks::{self, DiskImage};
use crate::error::{Error, Result};
use crate::files;
use crate::generation::{GenerationFiles, ImageInfo, Manifest};
use crate::lease::Lease;
use crate::store::VmDir;
use crate::vm::{BootFiles, Id, VmRecord};

/// What the overlays of a VM's last run rest on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Live {
    /// The generation it was restored from or last checkpointed as; `None` after a first boot.
    pub generation: Option<u64>,
    /// File names of the top overlays in the live folder, one a disk.
    pub overlays: Vec<String>,
    /// Whether the guest has run since that generation.
    pub ran: bool,
}

impl Live {
    fn path(vm: &VmDir) -> PathBuf {
        vm.live_dir().join("live.json")
    }

    pub(crate) fn load(vm: &VmDir) -> Result<Option<Self>> {
        files::read_json(&Self::path(vm))
    }

    pub(crate) fn store(&self, vm: &VmDir) -> Result<()> {
        files::write_json(&Self::path(vm), self)
    }

    /// The top overlays, as paths.
    pub(crate) fn overlay_paths(&self, vm: &VmDir) -> Vec<PathBuf> {
        self.overlays
            .iter()
            .map(|name| vm.live_dir().join(name))
            .collect()
    }
}

/// What to make a VM from.
#[derive(Clone, Debug)]
pub struct NewVm {
    /// The disk image, of any format that qemu-img reads; it is copied, unless nobody may write
    /// to it.
    pub disk: PathBuf,
    /// Direct kernel boot: kernel, initial RAM disk, command line.
    pub boot: Option<(PathBuf, Option<PathBuf>, String)>,
    /// What QEMU emulates.
    pub hardware: Hardware,
    /// The line that the guest writes to its serial port once its desktop is up.
    pub ready_marker: Option<String>,
    /// The cache of booted guests, see [`crate::booted`]: a VM that is in it need not boot.
    pub booted: Option<PathBuf>,
}

/// Makes a VM; it does not run yet. One that is in the cache of booted guests begins with a
/// generation.
pub async fn create_from(vm: &VmDir, new: &NewVm) -> Result<VmRecord> {
    let record = {
        let (vm, new) = (vm.clone(), new.clone());
        blocking(move || create(&vm, &new)).await?
    };
    if let Some(cache) = &new.booted {
        crate::booted::adopt(vm, &record, cache).await?;
    }
    Ok(record)
}

/// Makes a VM that has not booted.
pub(crate) fn create(vm: &VmDir, new: &NewVm) -> Result<VmRecord> {
    new.hardware
        .validate()
        .map_err(Error::host(format!("the hardware of {}", vm.name())))?;
    if vm.try_record()?.is_some() {
        return Err(Error::Refused(format!(
            "there is a VM {} already; take another name, or `replay-migrate vm delete` it",
            vm.name()
        )));
    }
    let store = vm.store();
    let boot = match &new.boot {
        None => None,
        Some((kernel, initrd, append)) => Some(BootFiles {
            kernel: store.import_file(kernel)?,
            initrd: initrd
                .as_deref()
                .map(|path| store.import_file(path))
                .transpose()?,
            append: append.clone(),
        }),
    };
    let record = VmRecord {
        id: Id::random()?,
        name: vm.name().clone(),
        hardware: new.hardware.clone(),
        disks: vec![store.import_disk(&new.disk)?],
        boot,
        ready_marker: new.ready_marker.clone(),
    };
    record.validate()?;
    vm.create(
        &record,
        &Lease::Held {
            fence: 1,
            transfer: None,
        },
    )?;
    Ok(record)
}

/// What a VM does at this site.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum VmState {
    /// Its guest runs.
    Running,
    /// QEMU holds it, stopped.
    Paused,
    /// There is no QEMU; it starts from its newest generation, or boots.
    Stopped,
    /// Another site runs it; here is a stale copy.
    Elsewhere,
    /// Its hand-over was cut off; see [`Lease::Offered`].
    InDoubt,
}

/// One line of `vm list`.
#[derive(Clone, Debug, Serialize)]
pub struct VmStatus {
    /// What the VM is.
    #[serde(flatten)]
    pub record: VmRecord,
    /// What it does here.
    pub state: VmState,
    /// Whether this site may run it.
    pub lease: Lease,
    /// The generations held here.
    pub generations: Vec<u64>,
    /// The generation that the running state rests on.
    pub base: Option<u64>,
    /// QEMU's process.
    pub pid: Option<u32>,
    /// Where a VNC viewer can reach the guest without being recorded.
    pub vnc: Option<PathBuf>,
}

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

/// What a VM is and does.
pub async fn status(vm: &VmDir) -> Result<VmStatus> {
    let record = vm.record()?;
    let lease = vm.lease()?;
    let qemu = attach(vm).await?;
    let state = match (&lease, &qemu) {
        (Lease::Offered { .. }, _) => VmState::InDoubt,
        (Lease::Elsewhere { .. }, _) => VmState::Elsewhere,
        (Lease::Held { .. }, None) => VmState::Stopped,
        (Lease::Held { .. }, Some(qemu)) => match guest_status(vm, qemu).await? {
            Status::Running => VmState::Running,
            _ => VmState::Paused,
        },
    };
    Ok(VmStatus {
        record,
        state,
        lease,
        generations: vm
            .generations()?
            .iter()
            .map(|manifest| manifest.generation)
            .collect(),
        base: Live::load(vm)?.and_then(|live| live.generation),
        pid: qemu.as_ref().map(Vm::pid),
        vnc: qemu.as_ref().map(|qemu| qemu.vnc_socket().to_owned()),
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
            "{} runs at {owner_name}; what is here is a stale copy. Bring it back from there with \
             `replay-migrate migrate`",
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
    let record = vm.record()?;
    let _lock = vm.lock()?;
    require_lease(vm)?;
    if attach(vm).await?.is_some() {
        return Err(Error::Refused(format!("{} runs already", vm.name())));
    }
    let runtime = vm.runtime_dir("live")?;
    let newest = vm.generations()?.pop();
    let live = Live::load(vm)?;
    let (live, restore) = match (live, newest) {
        (Some(live), _) => (live, None),
        (None, Some(manifest)) => (lay_overlays(vm, &record, Some(&manifest))?, Some(manifest)),
        (None, None) => (lay_overlays(vm, &record, None)?, None),
    };
    files::remove_dir(&runtime)?;
    files::make_dir(&runtime)?;
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
        if !paused {
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

/// Lets the guest run, and notes that it is no longer at its generation.
pub async fn resume_live(vm: &VmDir, qemu: &Vm) -> Result<()> {
    require_lease(vm)?;
    if let Some(mut live) = Live::load(vm)?
        && !live.ran
    {
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

/// Makes a new generation of a running or paused VM; it goes on as it was.
///
/// Where the guest has not run since the last generation, that one is the answer.
pub async fn checkpoint(vm: &VmDir) -> Result<Manifest> {
    let _lock = vm.lock()?;
    require_lease(vm)?;
    let qemu = attach_running(vm).await?;
    checkpoint_locked(vm, &qemu, None).await
}

/// As [`checkpoint`], with the lock held; `at_checkpoint` runs while the guest stands still.
pub(crate) async fn checkpoint_locked(
    vm: &VmDir,
    qemu: &Vm,
    at_checkpoint: Option<&(dyn Fn() + Sync)>,
) -> Result<Manifest> {
    let record = vm.record()?;
    let live = Live::load(vm)?.ok_or_else(|| Error::Damaged {
        path: vm.live_dir(),
        reason: "the VM runs, but what its disks rest on is not noted".into(),
    })?;
    let was_running = guest_status(vm, qemu).await? == Status::Running;
    if !was_running
        && !live.ran
        && let Some(number) = live.generation
        && let Some(manifest) = vm.generation(number).load_manifest()?
    {
        if let Some(notify) = at_checkpoint {
            notify();
        }
        return Ok(manifest);
    }
    let what = |what: &str| format!("cannot {what} {}", vm.name());
    qemu.pause().await.map_err(Error::host(what("pause")))?;
    let taken = take_state(vm, qemu, &record, &live).await;
    if taken.is_ok()
        && let Some(notify) = at_checkpoint
    {
        notify();
    }
    if was_running {
        // Whatever happened above, the user's desktop goes on.
        resume_live(vm, qemu).await?;
    }
    let taken = taken?;
    finish_generation(vm, &record, taken, &qemu_version().await?).await
}

/// What was copied while the guest stood still.
struct Taken {
    files: GenerationFiles,
    number: u64,
    live: Live,
    device: Vec<u8>,
}

async fn take_state(vm: &VmDir, qemu: &Vm, record: &VmRecord, live: &Live) -> Result<Taken> {
    let number = next_generation(vm)?;
    let generation = vm.generation(number);
    files::make_dir(generation.dir())?;
    // The top overlays become the generation's disks. A link keeps QEMU's name for them valid.
    let mut overlays = Vec::new();
    for (index, old) in live.overlay_paths(vm).iter().enumerate() {
        let kept = generation.disk(index);
        std::fs::hard_link(old, &kept).map_err(Error::file("link", &kept))?;
        let name = format!("disk{index}-{number}.qcow2");
        disks::overlay_on(vm, record, Some(number), index, &vm.live_dir().join(&name))?;
        overlays.push(name);
    }
    let now_live = Live {
        generation: Some(number),
        overlays,
        ran: false,
    };
    qemu.snapshot_disks(&now_live.overlay_paths(vm))
        .await
        .map_err(Error::host(format!(
            "cannot snapshot the disks of {}",
            vm.name()
        )))?;
    // From here on the new overlays are on top, whatever comes: note it before going on.
    Live {
        generation: live.generation,
        ran: true,
        ..now_live.clone()
    }
    .store(vm)?;
    for old in live.overlay_paths(vm) {
        std::fs::remove_file(&old).map_err(Error::file("remove", &old))?;
    }
    let device = qemu.save_device_state().await.map_err(Error::host(format!(
        "cannot save the device state of {}",
        vm.name()
    )))?;
    let (from, to) = (vm.runtime_dir("live")?.join("ram.img"), generation.ram());
    blocking(move || files::copy_sparse(&from, &to).map(drop)).await?;
    Live {
        ran: false,
        ..now_live.clone()
    }
    .store(vm)?;
    Ok(Taken {
        files: generation,
        number,
        live: now_live,
        device,
    })
}

async fn finish_generation(
    vm: &VmDir,
    record: &VmRecord,
    taken: Taken,
    qemu: &str,
) -> Result<Manifest> {
    let (vm, record, qemu) = (vm.clone(), record.clone(), qemu.to_owned());
    blocking(move || {
        let Taken {
            files: generation,
            number,
            live,
            device,
        } = taken;
        debug_assert_eq!(live.generation, Some(number));
        let parent = vm.generations()?.pop().map(|manifest| manifest.generation);
        let device_path = generation.device();
        std::fs::write(&device_path, &device).map_err(Error::file("write", &device_path))?;
        let ram = tree_of_file(&generation.ram())?;
        let mut disk_trees = Vec::new();
        let mut disk_infos = Vec::new();
        for index in 0..record.disks.len() {
            let image = DiskImage::open(&generation.disk(index))?;
            let tree = disks::tree_since(&vm, &record, parent, index, &image)?;
            disk_infos.push(ImageInfo {
                bytes: image.bytes(),
                root: tree.root(),
            });
            disk_trees.push(tree);
        }
        generation.save_trees(&ram, &disk_trees)?;
        let ram_bytes = std::fs::metadata(generation.ram())
            .map_err(Error::file("measure", &generation.ram()))?
            .len();
        let manifest = Manifest::new(
            record.id,
            number,
            parent,
            record.hardware.clone(),
            qemu,
            [
                ImageInfo {
                    bytes: ram_bytes,
                    root: ram.root(),
                },
                device_info(&device)?,
            ],
            disk_infos,
        );
        generation.publish(&manifest)?;
        Ok(manifest)
    })
    .await
}

/// Size and root of a device state.
pub(crate) fn device_info(device: &[u8]) -> Result<ImageInfo> {
    let tree = ImageTree::build(&SlicePages(device), &no_progress)
        .map_err(Error::reconcile("cannot hash the device state"))?;
    Ok(ImageInfo {
        bytes: device.len() as u64,
        root: tree.root(),
    })
}

/// The tree of an image that is a plain file.
pub(crate) fn tree_of_file(path: &Path) -> Result<ImageTree> {
    let map = RamMap::open(path).map_err(Error::host(format!("cannot read {}", path.display())))?;
    ImageTree::build(&SlicePages(&map), &no_progress)
        .map_err(Error::reconcile(format!("cannot hash {}", path.display())))
}

/// The number that the next generation gets; folders without a manifest count too.
pub(crate) fn next_generation(vm: &VmDir) -> Result<u64> {
    let dir = vm.dir().join("generations");
    let mut highest = 0;
    for entry in std::fs::read_dir(&dir).map_err(Error::file("list", &dir))? {
        let entry = entry.map_err(Error::file("list", &dir))?;
        let number = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse::<u64>().ok());
        highest = highest.max(number.unwrap_or(0));
    }
    Ok(highest + 1)
}

/// Stops a VM so that `start` goes on where it was: a checkpoint, then QEMU quits.
pub async fn suspend(vm: &VmDir) -> Result<Manifest> {
    let _lock = vm.lock()?;
    require_lease(vm)?;
    let qemu = attach_running(vm).await?;
    qemu.pause()
        .await
        .map_err(Error::host(format!("cannot pause {}", vm.name())))?;
    let manifest = checkpoint_locked(vm, &qemu, None).await?;
    qemu.quit()
        .await
        .map_err(Error::host(format!("cannot stop {}", vm.name())))?;
    files::remove_dir(&vm.live_dir())?;
    files::remove_dir(&vm.runtime_dir("live")?)?;
    Ok(manifest)
}

/// Ends QEMU and forgets what the guest did since its last generation.
pub async fn discard(vm: &VmDir) -> Result<()> {
    let _lock = vm.lock()?;
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
    let _lock = vm.lock()?;
    let qemu = attach_running(vm).await?;
    qemu.pause()
        .await
        .map_err(Error::host(format!("cannot pause {}", vm.name())))
}

/// Lets a paused guest run.
pub async fn resume(vm: &VmDir) -> Result<()> {
    let _lock = vm.lock()?;
    let qemu = attach_running(vm).await?;
    resume_live(vm, &qemu).await
}

/// Removes a VM with all its generations and logs. Base files stay.
pub async fn delete(vm: &VmDir) -> Result<()> {
    vm.record()?;
    discard(vm).await?;
    let _lock = vm.lock()?;
    files::remove_dir(vm.dir())
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
