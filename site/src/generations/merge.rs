//! Merging the disks of generations that were pruned: a chain of overlays is as long as there are
//! states that somebody needs, and not as long as there were checkpoints.
//!
//! Overlays that nothing but each other rests on, and one that stays, become one: what all of them
//! hold is written into the file of the oldest, and that takes the name of the newest, whose state it
//! then is. Until that step, a durable one, everything that counts reads as before; the notes of the
//! older ones say no longer that their disks are there, from before the first write on.
//!
//! Where the VM runs, its QEMU writes, as it has the files open ([`vm_host::Merge`]). It remembers a
//! merge that is done, and so one that was cut off before that step is finished by the next.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::Serialize;
use vm_host::{Merge, Status, Vm, disk};

use super::Locks;
use super::decide::{Decision, Fate};
use super::survey::{self, Survey};
use crate::error::{Error, Result};
use crate::files;
use crate::leftovers;
use crate::local::{self, Live, blocking};
use crate::store::VmDir;

/// Overlays of one disk that became one, or would.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Merged {
    /// Which disk.
    pub disk: usize,
    /// The generation in whose place the merged overlay is.
    pub into: u64,
    /// The older ones that are in it as well, newest first.
    pub from: Vec<u64>,
}

impl Merged {
    /// For QEMU to remember: all that is needed to finish it.
    fn name(&self) -> String {
        let oldest = self.from.last().unwrap_or(&self.into);
        format!("{}-{}-{oldest}", self.disk, self.into)
    }
}

/// What can be merged once it has come to what was decided.
pub(super) fn possible(vm: &VmDir, survey: &Survey, decision: &Decision) -> Result<Vec<Merged>> {
    let fate = |number: u64| decision.fates.get(&number).copied().unwrap_or(Fate::Stay);
    let live = Live::load(vm)?.map(|live| live.overlay_paths(vm));
    let live = live.unwrap_or_default();
    // Of a run that is over, what says so may be there without its overlays.
    let live: Vec<PathBuf> = live.into_iter().filter(|path| path.exists()).collect();
    let others = survey::overlays_outside(vm, &survey::PLACES)?;
    let others = others.into_iter().filter(|path| !live.contains(path));
    // Nobody knows who has those open.
    let untouchable = survey::rests_on(vm, others.collect())?;
    let disks = vm.record()?.disks.len();
    let mut possible = Vec::new();
    for index in 0..disks {
        let mut behind = BTreeMap::new();
        let mut above: BTreeMap<u64, u32> = BTreeMap::new();
        for folder in &survey.line {
            let overlay = vm.generation(folder.number).disk(index);
            // A checkpoint that was killed may have left one disk of several.
            let stays = matches!(fate(folder.number), Fate::Stay | Fate::Disks) && overlay.exists();
            if let Some(on) =
                survey::rests_on(vm, Vec::from_iter(stays.then_some(overlay)))?.first()
            {
                behind.insert(folder.number, *on);
                *above.entry(*on).or_default() += 1;
            }
        }
        let live = Vec::from_iter(live.get(index).cloned());
        for on in survey::rests_on(vm, live)? {
            *above.entry(on).or_default() += 1;
        }
        let mergeable = |number: &u64| {
            fate(*number) == Fate::Disks
                && above.get(number) == Some(&1)
                && !untouchable.contains(number)
                // Not one that also has a name elsewhere: it is written to.
                && fs::metadata(vm.generation(*number).disk(index)).is_ok_and(|file| file.nlink() == 1)
        };
        let below = |number: &u64| behind.get(number).copied().filter(|below| mergeable(below));
        let within: BTreeSet<u64> = behind
            .keys()
            .filter(|n| mergeable(n))
            .filter_map(below)
            .collect();
        for folder in survey.line.iter().rev() {
            let newest = folder.number;
            // One that another one is merged with is not the newest.
            if !mergeable(&newest) || within.contains(&newest) {
                continue;
            }
            let mut from: Vec<u64> = Vec::new();
            while let Some(next) = below(from.last().unwrap_or(&newest)) {
                from.push(next);
            }
            if !from.is_empty() {
                possible.push(Merged {
                    disk: index,
                    into: newest,
                    from,
                });
            }
        }
    }
    Ok(possible)
}

/// The QEMU that has the disks open, if it can be asked to merge them, and what it may have left of a
/// merge that was cut off is finished.
///
/// Where nothing is to change, nobody is asked.
pub(super) async fn ready(vm: &VmDir, dry_run: bool) -> Result<Option<Vm>> {
    if dry_run {
        return Ok(None);
    }
    let Some(qemu) = local::attach(vm).await? else {
        return Ok(None);
    };
    let failed = || Error::host(format!("cannot merge overlays of {}", vm.name()));
    let status = qemu.status().await.map_err(failed())?;
    if !matches!(status, Status::Running | Status::Paused) {
        return Err(Error::Refused(format!(
            "the QEMU of {} is {status}",
            vm.name()
        )));
    }
    finish_cut_off(vm, &qemu).await?;
    // Names that overlays were given for as long as a merge took.
    let live = Live::of_running(vm, &qemu).await?.overlay_paths(vm);
    for overlay in survey::overlays_of(&vm.live_dir())? {
        if !live.contains(&overlay) {
            leftovers::remove(&overlay)?;
        }
    }
    Ok(Some(qemu))
}

/// Finishes the merges that QEMU has done, or is at, for somebody who died. Until then QEMU refuses
/// anything else that changes the chains of files: whoever is about to asks for this first.
///
/// The VM's lock is held. Nobody is kept from reading: the newer overlays read as before at any point.
pub(crate) async fn finish_cut_off(vm: &VmDir, qemu: &Vm) -> Result<()> {
    let failed = || Error::host(format!("cannot merge overlays of {}", vm.name()));
    for name in qemu.merges().await.map_err(failed())? {
        let numbers: Option<Vec<u64>> = name.split('-').map(|part| part.parse().ok()).collect();
        if let Some([disk, into, oldest]) = numbers.as_deref() {
            let merged = Merged {
                disk: *disk as usize,
                into: *into,
                from: vec![*oldest],
            };
            let vm = vm.clone();
            blocking(move || finish_if_behind(&vm, &merged)).await?;
        }
        qemu.forget_merge(&name).await.map_err(failed())?;
    }
    Ok(())
}

/// Merges overlays; the locks are held for as long as anything is done, whoever stops to wait.
pub(super) async fn merge(
    vm: &VmDir,
    locks: &Locks,
    qemu: Option<&Vm>,
    merged: &Merged,
) -> Result<()> {
    let failed = || Error::host(format!("cannot merge overlays of {}", vm.name()));
    let oldest = merged.from.last().copied().unwrap_or(merged.into);
    let disk_of = |number: u64| vm.generation(number).disk(merged.disk);
    for number in &merged.from {
        disown(vm, *number)?;
    }
    let chain = match qemu {
        Some(qemu) => {
            let live = Live::of_running(vm, qemu).await?.overlay_paths(vm);
            let top = live.get(merged.disk).cloned();
            top.map(|top| chain_of(&top)).transpose()?
        }
        None => None,
    };
    let chain = chain.unwrap_or_default();
    let place = |number: u64| {
        let disk = fs::canonicalize(disk_of(number)).ok()?;
        chain.iter().position(|file| *file == disk)
    };
    if place(merged.into).is_some() != place(oldest).is_some() {
        return Err(Error::Refused(format!(
            "the QEMU of {} has only some of the overlays {} open",
            vm.name(),
            merged.name()
        )));
    }
    if let (Some(qemu), Some(top), Some(base)) = (qemu, place(merged.into), place(oldest)) {
        let backing = format!(
            "../../generations/{}/disk{}.qcow2",
            merged.into, merged.disk
        );
        let command = Merge {
            name: &merged.name(),
            disk: merged.disk,
            files: &chain,
            top,
            base,
            backing: &backing,
        };
        qemu.merge_overlays(&command).await.map_err(failed())?;
    } else {
        // No QEMU has any of them open.
        let (top, base) = (disk_of(merged.into), disk_of(oldest));
        let locks = locks.clone();
        let done = blocking(move || {
            let _locks = locks;
            Ok(disk::merge_overlays(&top, &base))
        });
        done.await?.map_err(failed())?;
    }
    let (vm_too, merged_too, locks) = (vm.clone(), merged.clone(), locks.clone());
    blocking(move || {
        let _locks = locks;
        finish(&vm_too, &merged_too)
    })
    .await?;
    if let Some(qemu) = qemu.filter(|_| place(merged.into).is_some()) {
        qemu.forget_merge(&merged.name()).await.map_err(failed())?;
    }
    Ok(())
}

/// The note of a pruned generation says from here on that its disks are not there.
fn disown(vm: &VmDir, number: u64) -> Result<()> {
    let files = vm.generation(number);
    match files.load_pruned()? {
        Some(note) if !note.disks.is_empty() => {
            let without = crate::generation::Manifest {
                disks: Vec::new(),
                ..note
            };
            files::write_json(&files.pruned(), &without)
        }
        _ => Ok(()),
    }
}

/// The merged overlay takes the place of the newest; what is between is nobody's then.
fn finish(vm: &VmDir, merged: &Merged) -> Result<()> {
    let disk_of = |number: u64| vm.generation(number).disk(merged.disk);
    let Some((oldest, between)) = merged.from.split_last() else {
        return Ok(());
    };
    let (from, to) = (disk_of(*oldest), disk_of(merged.into));
    files::sync_file(&from)?;
    files::rename(&from, &to)?;
    for number in between {
        leftovers::remove(&disk_of(*number))?;
    }
    Ok(())
}

/// As [`finish`], for one that QEMU did for somebody who died: perhaps only after this step.
fn finish_if_behind(vm: &VmDir, merged: &Merged) -> Result<()> {
    let disk_of = |number: u64| vm.generation(number).disk(merged.disk);
    let oldest = merged.from.last().map(|oldest| disk_of(*oldest));
    let oldest = oldest.and_then(|oldest| fs::canonicalize(oldest).ok());
    match oldest {
        Some(oldest) if chain_of(&disk_of(merged.into))?.contains(&oldest) => finish(vm, merged),
        _ => Ok(()),
    }
}

/// The files of a disk, by their headers.
fn chain_of(top: &Path) -> Result<Vec<PathBuf>> {
    let mut chain = vec![top.to_owned()];
    let mut at = top.to_owned();
    while let Some(behind) = survey::file_behind(&at)? {
        // The base image is not an overlay.
        let is_overlay = survey::is_disk(&behind);
        chain.push(behind.clone());
        if !is_overlay {
            break;
        }
        at = behind;
    }
    Ok(chain)
}
