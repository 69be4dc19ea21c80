//! Post-copy of disk images: what the guest has in memory of them goes before it moves, and the rest while it runs at
//! the target already, what it waits for first.
//!
//! Only base images come so, which never change: whatever the guest writes is in overlays, and is there when it
//! goes on. Most of a base image is never read.
//!
//! How much is under way is bounded by how long it takes to be taken: what a guest waits for must not stand in line
//! behind megabytes that nobody waits for.

mod sending;

use std::collections::{BTreeMap, BTreeSet, HashSet, VecDeque};
use std::ops::Range;
use std::time::Instant;

use reconciler::{
    BlobAssembler, ImageTree, PAGE_SIZE, PageHash, PageIndex, PageSet, SlicePages, no_progress,
};
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use super::opening::{begin, hello};
use crate::error::{Error, Result};
use crate::files::{self, FileLock};
use crate::identity::SiteKey;
use crate::lease::Lease;
use crate::line::Line;
use crate::local::blocking;
use crate::peers::Peer;
use crate::phase::Phase;
use crate::progress::Progress;
use crate::protocol::{Purpose, ToSource, ToTarget, Welcome};
use crate::report::RestReport;
use crate::store::VmDir;
use crate::vm::{Id, VmRecord};

use sending::{Piece, Sending, send};

/// The version of the note's form.
const VERSION: u32 = 1;

/// Pages at the beginning of a disk, with its boot sector and partition table.
const BEGINNING: u64 = 16;

/// Bytes of a tree in one message.
const CHUNK: usize = 256 << 10;

/// That a site has a VM and this one still has a part of its disk images.
#[derive(Debug, Serialize, Deserialize)]
struct Owed {
    version: u32,
    /// Tells this debt from a later one.
    id: Id,
    to: SiteKey,
    to_name: String,
}

fn path(vm: &VmDir) -> std::path::PathBuf {
    vm.dir().join("owed.json")
}

/// Notes that the rest of its images is owed, before the VM is handed over.
pub(super) fn owe(vm: &VmDir, peer: &Peer) -> Result<()> {
    let owed = Owed {
        version: VERSION,
        id: Id::random()?,
        to: peer.key,
        to_name: peer.name.to_string(),
    };
    files::write_json(&path(vm), &owed)
}

/// The site that the rest of a VM's images is owed, and its name; nothing, where all have all.
pub(crate) fn owed(vm: &VmDir) -> Result<Option<(SiteKey, String)>> {
    // While the VM is here, it is not known to have been handed over.
    if matches!(vm.lease()?, Lease::Held { .. }) {
        return Ok(None);
    }
    Ok(load(vm)?.map(|owed| (owed.to, owed.to_name)))
}

/// What was noted before a hand-over that did not take place is not so any more.
pub(super) fn forget(vm: &VmDir) -> Result<()> {
    files::remove_file(&path(vm))
}

fn load(vm: &VmDir) -> Result<Option<Owed>> {
    let owed: Option<Owed> = files::read_json(&path(vm))?;
    match owed {
        Some(owed) if owed.version != VERSION => Err(Error::Damaged {
            path: path(vm),
            reason: format!(
                "it is of version {}; this program reads version {VERSION}",
                owed.version
            ),
        }),
        owed => Ok(owed),
    }
}

/// What the target says while it is asked what it lacks.
#[derive(Default)]
struct Heard {
    /// What guests wait for.
    wanted: VecDeque<(u8, Range<u64>)>,
    /// Disks whose images are whole there.
    here: BTreeSet<u8>,
}

/// What the target says that it lacks of a disk's image.
async fn absent(line: &mut Line, count: u64, phase: Phase, heard: &mut Heard) -> Result<PageSet> {
    let malformed = || Error::reconcile("what is lacking of an image is malformed");
    let mut assembler = BlobAssembler::new(count.saturating_mul(20).saturating_add(64));
    loop {
        match line.recv(phase).await? {
            ToSource::Lacks(part) => {
                if let Some(bytes) = assembler.push(&part).map_err(malformed())? {
                    return PageSet::decode(&bytes, count).map_err(malformed());
                }
            }
            ToSource::Want { disk, first, count } if phase == Phase::Rest => {
                // All of it goes in its turn.
                if heard.wanted.len() < sending::WANTED_MAX {
                    let end = first.saturating_add(u64::from(count));
                    heard.wanted.push_back((disk, first..end));
                }
            }
            ToSource::Here { disk } if phase == Phase::Rest => {
                heard.here.insert(disk);
            }
            _ => return Err(line.unexpected(phase, "no word of what is lacking of an image")),
        }
    }
}

/// Announces the disk images that the target lacks, and sends what of them is in the guest's memory; of each disk,
/// what it lacks then.
pub(super) async fn announce(
    line: &mut Line,
    vm: &VmDir,
    record: &VmRecord,
    welcome: &Welcome,
    rate: f64,
    progress: &dyn Progress,
) -> Result<Vec<PageSet>> {
    let mut lacked = vec![PageSet::new(); record.disks.len()];
    let disks = record.disks.iter().zip(0_u8..);
    let disks: Vec<_> = disks
        .filter(|(file, _)| welcome.lacks.contains(&file.hash))
        .collect();
    if disks.is_empty() {
        return Ok(lacked);
    }
    let mut pieces = BTreeMap::new();
    let mut trees = Vec::new();
    for (file, disk) in disks {
        progress.note(&format!(
            "{} lacks the image of disk {disk}: it gets what the guest has of it in memory now, and the rest once \
             the VM runs there",
            line.peer().name
        ));
        let (store, file) = (vm.store().clone(), *file);
        let (tree, packed) = blocking(move || {
            let tree = store.base_tree(file)?;
            let packed = zstd::bulk::compress(&tree.encode(), 3)
                .map_err(|error| Error::Refused(format!("cannot compress hashes: {error}")))?;
            Ok((tree, packed))
        })
        .await?;
        line.send(ToTarget::Later { disk }).await?;
        for part in packed.chunks(CHUNK) {
            line.send(ToTarget::Data(part.to_vec())).await?;
        }
        line.send(ToTarget::DataEnd).await?;
        line.flush().await?;
        let lacks = absent(line, tree.pages(), Phase::Base, &mut Heard::default()).await?;
        pieces.insert(disk, Piece::open(vm, record, disk, &lacks)?);
        trees.push((disk, tree));
    }
    let ram = vm.runtime_dir("live")?.join("ram.img");
    let (order, trees) = blocking(move || Ok((in_memory(&ram, &trees)?, trees))).await?;
    let mut sending = Sending::new(pieces, rate);
    sending.order = order.into();
    send(line, &mut sending, None, Phase::Base, progress).await?;
    for (disk, tree) in trees {
        line.send(ToTarget::Rest { disk }).await?;
        line.flush().await?;
        let (pages, mut heard) = (tree.pages(), Heard::default());
        lacked[usize::from(disk)] = absent(line, pages, Phase::Base, &mut heard).await?;
    }
    Ok(lacked)
}

/// The pages of disk images that a guest has in its memory, by their content.
fn in_memory(ram: &std::path::Path, images: &[(u8, ImageTree)]) -> Result<Vec<(u8, Range<u64>)>> {
    let ram = vm_host::RamMap::open(ram).map_err(Error::host("cannot read the guest's RAM"))?;
    let tree = ImageTree::build(&SlicePages(&ram), &no_progress)
        .map_err(Error::reconcile("cannot hash the guest's RAM"))?;
    let held: HashSet<PageHash> = (0..tree.pages())
        .map(|page| tree.leaf(PageIndex(page)))
        .filter(|hash| !hash.is_zero())
        .collect();
    let mut found = Vec::new();
    for (disk, image) in images {
        // QEMU reads the beginning of a disk before the guest does anything, for its geometry.
        let needed = |page: &PageIndex| page.0 < BEGINNING || held.contains(&image.leaf(*page));
        let pages: PageSet = (0..image.pages()).map(PageIndex).filter(needed).collect();
        found.extend(pages.runs().iter().map(|run| (*disk, run.clone())));
    }
    Ok(found)
}

/// Brings the rest of a VM's disk images to the site that has the VM; nothing, where nothing is owed, or somebody
/// else is at it.
///
/// # Errors
/// What has come is kept, and the rest is still owed.
pub async fn supply(
    vm: &VmDir,
    progress: &dyn Progress,
    cancel: &CancellationToken,
) -> Result<Option<RestReport>> {
    if load(vm)?.is_none() {
        return Ok(None);
    }
    match supplying_lock(vm)? {
        Some(only) => supply_locked(vm, only, progress, cancel).await,
        None => Ok(None),
    }
}

/// Held by whoever brings the rest of a VM's images, or is about to; nothing, if somebody else does.
pub(super) fn supplying_lock(vm: &VmDir) -> Result<Option<FileLock>> {
    FileLock::try_take(&vm.dir().join("supply.lock"))
}

/// As [`supply`], for who holds the lock.
pub(super) async fn supply_locked(
    vm: &VmDir,
    _only: FileLock,
    progress: &dyn Progress,
    cancel: &CancellationToken,
) -> Result<Option<RestReport>> {
    let Some(owed) = load(vm)? else {
        return Ok(None);
    };
    if matches!(vm.lease()?, Lease::Held { .. }) {
        // It is not handed over yet, or is back.
        return Ok(None);
    }
    let peer = vm.store().peers().of_key(&owed.to)?.ok_or_else(|| {
        Error::Refused(format!(
            "{} is no longer a trusted site, and part of the disk of {} is only here: `site trust` it again",
            owed.to_name,
            vm.name()
        ))
    })?;
    let record = vm.record()?;
    let begun = Instant::now();
    progress.phase(Phase::Rest);
    let go = async {
        let mut line = Line::connect(vm.store(), &peer).await?;
        let traffic = line.traffic();
        let fence = vm.title()?.fence();
        let id = Id::random()?;
        let hello = hello(vm, &record, &peer, Purpose::Supply, id, fence, 1, "")?;
        let (welcome, rate) = begin(&mut line, vm, hello).await?;
        let mut pieces = BTreeMap::new();
        let (mut order, mut heard) = (VecDeque::new(), Heard::default());
        for (file, disk) in record.disks.iter().zip(0_u8..) {
            if !welcome.lacks.contains(&file.hash) {
                continue;
            }
            line.send(ToTarget::Rest { disk }).await?;
            line.flush().await?;
            let count = file.bytes.div_ceil(PAGE_SIZE as u64);
            let lacks = absent(&mut line, count, Phase::Rest, &mut heard).await?;
            order.extend(lacks.runs().iter().map(|run| (disk, run.clone())));
            pieces.insert(disk, Piece::open(vm, &record, disk, &lacks)?);
        }
        let disks: BTreeSet<u8> = pieces.keys().copied().collect();
        let mut sending = Sending::new(pieces, rate);
        (sending.order, sending.wanted) = (order, heard.wanted);
        sending.here = heard.here;
        send(&mut line, &mut sending, Some(&disks), Phase::Rest, progress).await?;
        line.close().await;
        Ok::<_, Error>(RestReport {
            sent: traffic.sent(),
            seconds: begun.elapsed().as_secs_f64(),
            ..sending.report
        })
    };
    let report = tokio::select! {
        report = go => report?,
        () = cancel.cancelled() => return Err(Error::Interrupted(Phase::Rest)),
    };
    if load(vm)?.is_some_and(|now| now.id == owed.id) {
        forget(vm)?;
    }
    Ok(Some(report))
}

/// Brings what is left of the disk images of a VM that has moved: whatever comes of that, it has.
pub(super) async fn bring_rest(
    vm: &VmDir,
    peer: &Peer,
    only: FileLock,
    progress: &dyn Progress,
    cancel: &CancellationToken,
) -> Option<RestReport> {
    if !matches!(owed(vm), Ok(Some(_))) {
        return None;
    }
    progress.note(&format!(
        "{} runs at {} by now; the rest of its disk is only here, and goes there now",
        vm.name(),
        peer.name
    ));
    match supply_locked(vm, only, progress, cancel).await {
        Ok(rest) => rest,
        Err(error) => {
            let why = match error {
                Error::Interrupted(_) => "that was interrupted".to_owned(),
                error => error.chain(),
            };
            progress.note(&format!(
                "not all of the disk of {0} is at {1} yet ({why}): a guest that reads what is missing waits. The \
                 agent of this site goes on with it if it serves, and so does `replay-migrate supply {0}`",
                vm.name(),
                peer.name
            ));
            None
        }
    }
}
