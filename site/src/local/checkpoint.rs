//! Making a generation of a VM while the guest stands still for a moment.

use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

use reconciler::{FilePages, ImageTree, SlicePages, no_progress};
use vm_host::{Status, Vm};

use super::{
    Live, attach_running, blocking, guest_status, qemu_version, require_lease, resume_live, still,
};
use crate::disks::{self, DiskImage};
use crate::error::{Error, Result};
use crate::files;
use crate::generation::{GenerationFiles, ImageInfo, Manifest};
use crate::generations;
use crate::recording::{self, stretch};
use crate::store::VmDir;
use crate::vm::VmRecord;

/// Makes a new generation of a running or paused VM; it goes on as it was.
///
/// Where the guest has not run since the last generation, that one is the answer.
pub async fn checkpoint(vm: &VmDir) -> Result<Manifest> {
    crate::source::settle(vm).await?;
    let _lock = vm.lock_soon().await?;
    require_lease(vm)?;
    let qemu = attach_running(vm).await?;
    Ok(checkpoint_locked(vm, &qemu, None, After::GoesOn)
        .await?
        .manifest)
}

/// What a guest does once its state is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum After {
    /// What it did before.
    GoesOn,
    /// It stands still, as its QEMU is to end.
    StandsStill,
}

/// A generation that was made.
pub(crate) struct Made {
    pub(crate) manifest: Manifest,
    /// For how long the guest stood still.
    pub(crate) paused: Duration,
}

/// As [`checkpoint`], with the lock held; `for_recording` runs while the guest stands still, before
/// its state is taken.
pub(crate) async fn checkpoint_locked(
    vm: &VmDir,
    qemu: &Vm,
    for_recording: Option<&(dyn Fn() + Sync)>,
    after: After,
) -> Result<Made> {
    let record = vm.record()?;
    let live = Live::of_running(vm, qemu).await?;
    // One that was stopped by a process that died is to go on, too.
    let was_running = guest_status(vm, qemu).await? == Status::Running || still::is_noted(vm)?;
    // A recording may change the guest's state: what is there already is not enough then.
    let changes = for_recording.is_some() && record.replay_friendly;
    if !was_running
        && !live.ran
        && !changes
        && let Some(number) = live.generation
        && let Some(manifest) = vm.generation(number).load_manifest()?
    {
        if let Some(prepare) = for_recording {
            prepare();
        }
        return Ok(Made {
            manifest,
            paused: Duration::ZERO,
        });
    }
    generations::finish_cut_off(vm, qemu).await?;
    let what = |what: &str| format!("cannot {what} {}", vm.name());
    if was_running {
        still::begin(vm)?;
    }
    let held = if was_running {
        recording::hold(vm).await
    } else {
        None
    };
    let begun = Instant::now();
    qemu.pause().await.map_err(Error::host(what("pause")))?;
    if let Some(prepare) = for_recording {
        prepare();
    }
    let taken = take_state(vm, qemu, &record, &live).await;
    let goes_on = was_running && (after == After::GoesOn || taken.is_err());
    if goes_on {
        // Whatever happened above, the user's desktop goes on.
        resume_live(vm, qemu).await?;
        still::end(vm)?;
    }
    let position = held.and_then(|held| held.position);
    let paused = begun.elapsed();
    let taken = taken?;
    let overlays = taken.overlays.clone();
    let manifest = finish_generation(vm, &record, taken, &qemu_version().await?).await?;
    // Only now is there a generation to rest on; before, the older one was as right.
    Live {
        generation: Some(manifest.generation),
        overlays,
        ran: goes_on,
    }
    .store(vm)?;
    if let Some(position) = position {
        stretch::note(vm, manifest.generation, position)?;
    }
    Ok(Made { manifest, paused })
}

/// What was copied while the guest stood still.
struct Taken {
    files: GenerationFiles,
    number: u64,
    /// Names of the overlays that are on top since.
    overlays: Vec<String>,
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
        generation: live.generation,
        overlays,
        ran: true,
    };
    // The old names go below: the new ones must outlive a power cut by then.
    for overlay in now_live.overlay_paths(vm) {
        files::sync_file(&overlay)?;
    }
    for dir in [generation.dir(), &vm.dir().join("generations")] {
        files::sync_dir(dir).map_err(Error::file("sync", dir))?;
    }
    qemu.snapshot_disks(&now_live.overlay_paths(vm))
        .await
        .map_err(Error::host(format!(
            "cannot snapshot the disks of {}",
            vm.name()
        )))?;
    // From here on the new overlays are on top, whatever comes: note it before going on.
    now_live.store(vm)?;
    for old in live.overlay_paths(vm) {
        std::fs::remove_file(&old).map_err(Error::file("remove", &old))?;
    }
    let device = qemu.save_device_state().await.map_err(Error::host(format!(
        "cannot save the device state of {}",
        vm.name()
    )))?;
    let (from, to) = (vm.runtime_dir("live")?.join("ram.img"), generation.ram());
    blocking(move || files::copy_sparse(&from, &to).map(drop)).await?;
    Ok(Taken {
        files: generation,
        number,
        overlays: now_live.overlays,
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
            overlays: _,
            device,
        } = taken;
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
    let file = File::open(path).and_then(FilePages::new);
    let pages = file.map_err(Error::file("open", path))?;
    ImageTree::build(&pages, &no_progress)
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
