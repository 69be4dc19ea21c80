//! The generations of a VM as things that take room: what each takes, who relies on it, and
//! pruning what nobody does.
//!
//! Promises: the newest generation, the one that the VM's last run began with, the one that its
//! newest log continues while the VM is here, and the newest that each trusted peer is known to
//! have ([`seen`]) are never taken; nor is a disk overlay that another one rests on. A
//! generation that is pruned ceases to be one in a single durable step, the renaming of its
//! manifest; what is deleted after that is nobody's, and pruning that was cut off is finished by
//! the next. Whatever is not understood (a chain that can't be followed, a note that can't be
//! read) refuses the whole.
//!
//! Overlays that only the newer ones rest on are merged into those ([`Merged`]), so that chains are no
//! longer than there are states to keep.
//!
//! Not promised: that a limit is met. See `docs/decisions/0019-what-prune-keeps.md` and
//! `docs/decisions/0033-overlays-are-merged.md`.

mod decide;
mod merge;
mod place;
pub(crate) mod seen;
mod survey;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Serialize;
use vm_host::Vm;

pub use decide::{Fate, Kind, Limits, Reliance, Sizes};
pub use merge::Merged;
pub(crate) use merge::finish_cut_off;
pub(crate) use place::{make_place, unmark};

use crate::error::{Error, Result};
use crate::files::{self, FileLock};
use crate::lease::Lease;
use crate::leftovers;
use crate::local::blocking;
use crate::source;
use crate::store::VmDir;
use crate::work::Workplace;
use decide::{Decision, Unreadable, decide};
use survey::Survey;

/// One line of `generations list`.
#[derive(Clone, Debug, Serialize)]
pub struct Listed {
    /// Its number.
    pub generation: u64,
    /// What is there of it.
    pub kind: Kind,
    /// When it was made, in seconds since 1970.
    pub created: Option<u64>,
    /// Bytes that it takes on the disk; holes take none.
    pub bytes: Sizes,
    /// The log that continues it, in bytes on the disk.
    pub log_bytes: u64,
    /// Who needs its state.
    pub relied_on_by: Vec<Reliance>,
    /// The generations whose disks rest on its own.
    pub below: Vec<u64>,
    /// The disks of the VM's last run, or of a fork of it, rest on its own.
    pub below_live: bool,
    /// What `prune` would make of it, without limits.
    pub prune: Fate,
}

/// Lists the generations of a VM, and what else is in their place. Oldest first.
pub async fn list(vm: &VmDir) -> Result<Vec<Listed>> {
    vm.record()?;
    let vm = vm.clone();
    blocking(move || {
        let survey = Survey::of(&vm, &survey::PLACES)?;
        let decision = decided(&vm, &survey, Limits::default())?;
        let listed = survey.line.iter().map(|folder| {
            let number = folder.number;
            let rests = |other: &&decide::Folder| {
                other.rests_on.iter().flatten().any(|on| *on == number)
                    && decision.fates.get(&other.number) != Some(&Fate::Go)
            };
            Listed {
                generation: number,
                kind: folder.kind,
                created: survey.created.get(&number).copied(),
                bytes: survey.sizes.get(&number).copied().unwrap_or_default(),
                log_bytes: survey.logs.get(&number).copied().unwrap_or_default(),
                relied_on_by: folder.relied.clone(),
                below: survey.line.iter().filter(rests).map(|f| f.number).collect(),
                below_live: survey.in_use.contains(&number),
                prune: decision.fates.get(&number).copied().unwrap_or(Fate::Stay),
            }
        });
        Ok(listed.collect())
    })
    .await
}

/// What pruning has taken, or would take.
#[derive(Clone, Debug, Serialize)]
pub struct Pruned {
    /// Whether nothing was changed.
    pub dry_run: bool,
    /// The generations, and what was in their place.
    pub taken: Vec<Taken>,
    /// The generations whose logs were taken.
    pub logs: Vec<u64>,
    /// The disks of pruned generations that became one.
    pub merged: Vec<Merged>,
    /// Why others did not.
    pub unmerged: Option<String>,
    /// Other things that nobody needs any more.
    pub leftovers: Vec<PathBuf>,
    /// Bytes that became free.
    pub freed: u64,
    /// Bytes that generations and logs still take.
    pub left: u64,
    /// Whether that is within the limit, if there was one.
    pub within: Option<bool>,
}

/// One generation of which something was taken.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Taken {
    /// Its number.
    pub generation: u64,
    /// What it was.
    pub kind: Kind,
    /// What became of it.
    pub fate: Fate,
    /// Bytes that became free; none where a file also has a name elsewhere.
    pub freed: u64,
}

/// Takes what nobody relies on, and what was left behind by those who died.
///
/// # Errors
/// [`Error::Refused`] while somebody else works on the VM or follows it, or while its hand-over
/// is not settled; then nothing was changed.
pub async fn prune(vm: &VmDir, limits: Limits, dry_run: bool) -> Result<Pruned> {
    vm.record()?;
    let _not_synced = source::syncing_lock(vm)?.ok_or_else(|| {
        Error::Refused(format!(
            "standbys of {0} are being kept, and what is on its way to them must stay. `sync {0}` \
             prunes by itself",
            vm.name()
        ))
    })?;
    prune_locked(vm, lock(vm)?, limits, dry_run).await
}

/// The same, for who keeps standbys, but for logs. Generations stay from the one on that `shipped` tells,
/// which is asked when nobody can make another one.
pub(crate) async fn prune_synced(
    vm: &VmDir,
    keep: usize,
    shipped: impl FnOnce() -> Option<u64>,
) -> Result<Pruned> {
    let locks = lock(vm)?;
    let limits = Limits {
        keep,
        from: shipped(),
        keep_logs: true,
        ..Limits::default()
    };
    prune_locked(vm, locks, limits, false).await
}

/// Takes what nobody relies on of a VM that another site has, but so many of the newest.
pub(crate) async fn tidy_standby(vm: &VmDir, keep: usize) {
    let elsewhere = || Ok::<_, Error>(matches!(vm.lease()?, Lease::Elsewhere { .. }));
    let limits = Limits {
        keep,
        keep_logs: true,
        ..Limits::default()
    };
    let tidied = async {
        if keep < usize::MAX && elsewhere()? {
            prune_locked(vm, lock(vm)?, limits, false).await?;
        }
        Ok::<_, Error>(())
    };
    if let Err(error) = tidied.await {
        // The next time will do: somebody may be at work on it.
        tracing::info!(vm = %vm.name(), error = error.chain(), "nothing was pruned");
    }
}

async fn prune_locked(vm: &VmDir, locks: Locks, limits: Limits, dry_run: bool) -> Result<Pruned> {
    if let Lease::Offered { to_name, .. } = vm.lease()? {
        return Err(Error::Refused(format!(
            "the hand-over of {0} to {to_name} is not settled; run `vm resume {0}` first",
            vm.name()
        )));
    }
    let (mut leftovers, mut extra) = (Vec::new(), 0);
    // With both locks held, whoever worked there is dead.
    for place in [Workplace::Incoming, Workplace::Following] {
        let dir = place.dir(vm);
        if !files_in(&dir)?.is_empty() {
            extra += survey::measure_deep(&dir)?;
            leftovers.push(dir);
        }
        if !dry_run {
            place.clear(vm).await?;
        }
    }
    // What is worth no failure: all that is to go goes.
    let mut unmerged = None;
    let mut cannot = |error: Error| {
        tracing::warn!(vm = %vm.name(), error = error.chain(), "overlays are not merged");
        unmerged = Some(error.chain());
    };
    // A merge that was cut off is finished before anything is looked at.
    let qemu = match merge::ready(vm, dry_run).await {
        Ok(qemu) => Some(qemu),
        Err(error) => {
            cannot(error);
            None
        }
    };
    let (vm_too, locks_too) = (vm.clone(), locks.clone());
    let (mut pruned, possible) = blocking(move || {
        let (vm, _locks) = (vm_too, locks_too);
        let (survey, decision) = surveyed(&vm, limits)?;
        let taken = taken(&survey, &decision);
        let possible = merge::possible(&vm, &survey, &decision);
        let notes = outlived_notes(&vm)?;
        if !dry_run {
            sweep(&vm, &survey, &decision)?;
            for note in &notes {
                leftovers::remove(note)?;
            }
        }
        leftovers.extend(notes);
        let pruned = Pruned {
            dry_run,
            taken,
            logs: decision.logs.iter().copied().collect(),
            merged: Vec::new(),
            unmerged: None,
            leftovers,
            freed: decision.freed + extra,
            left: decision.left,
            within: limits.max_bytes.map(|max| decision.left <= max),
        };
        Ok((pruned, possible))
    })
    .await?;
    match (possible, qemu) {
        (Ok(possible), _) if dry_run => pruned.merged = possible,
        (Ok(possible), Some(qemu)) => {
            let merged = merge_all(vm, &locks, limits, qemu.as_ref(), possible);
            if let Err(error) = merged.await.map(|merged| pruned.merged = merged) {
                cannot(error);
            }
        }
        (Ok(_), None) => {}
        (Err(error), _) => cannot(error),
    }
    Ok(Pruned { unmerged, ..pruned })
}

fn surveyed(vm: &VmDir, limits: Limits) -> Result<(Survey, Decision)> {
    let survey = Survey::of(vm, &[survey::RUN])?;
    let decision = decided(vm, &survey, limits)?;
    Ok((survey, decision))
}

async fn merge_all(
    vm: &VmDir,
    locks: &Locks,
    limits: Limits,
    qemu: Option<&Vm>,
    possible: Vec<Merged>,
) -> Result<Vec<Merged>> {
    if possible.is_empty() {
        return Ok(possible);
    }
    for merged in &possible {
        merge::merge(vm, locks, qemu, merged).await?;
    }
    // The places of what was merged.
    let (vm, locks) = (vm.clone(), locks.clone());
    blocking(move || {
        let _locks = locks;
        let (survey, decision) = surveyed(&vm, limits)?;
        sweep(&vm, &survey, &decision)
    })
    .await?;
    Ok(possible)
}

/// What holds off others, for as long as any part of the work has it.
type Locks = Arc<[FileLock; 2]>;

/// Holds off everybody who reads generations for longer than a moment: those who change the VM,
/// and those who have a copy of it follow.
fn lock(vm: &VmDir) -> Result<Locks> {
    let following = source::following_lock(vm)?.ok_or_else(|| {
        Error::Refused(format!(
            "{0} is being followed; what the other site follows from must stay. End `follow {0}` \
             first",
            vm.name()
        ))
    })?;
    Ok(Arc::new([following, vm.lock()?]))
}

fn decided(vm: &VmDir, survey: &Survey, limits: Limits) -> Result<Decision> {
    decide(&survey.line, &survey.in_use, &survey.logs, limits).map_err(|Unreadable(number)| {
        Error::Damaged {
            path: vm.generation(number).dir().to_owned(),
            reason: "what its disks rest on can't be read, so nothing is pruned".into(),
        }
    })
}

/// The folders of which something goes.
fn taken(survey: &Survey, decision: &Decision) -> Vec<Taken> {
    let mut taken = Vec::new();
    for folder in &survey.line {
        let fate = decision.fates.get(&folder.number).copied();
        let Some(fate) = fate.filter(|fate| *fate != Fate::Stay) else {
            continue;
        };
        let keeps = match fate {
            Fate::Disks => folder.own.disks,
            _ => 0,
        };
        let freed = folder.own.total() - keeps;
        // What was pruned before has nothing more to give.
        let changes = folder.kind == Kind::Whole || freed > 0 || fate == Fate::Go;
        if changes {
            taken.push(Taken {
                generation: folder.number,
                kind: folder.kind,
                fate,
                freed,
            });
        }
    }
    taken
}

/// One thing to do; a kill comes before or after it.
enum Step {
    /// It ceases to be a generation.
    GiveUp(u64),
    /// A file, or an empty folder, goes.
    Remove(PathBuf),
}

/// What is to be done, in order: all that is to go ceases to be a generation first, and what
/// says that there was one goes last. A kill at any point leaves whole generations and
/// leftovers, and nothing between.
fn steps(vm: &VmDir, survey: &Survey, decision: &Decision) -> Result<Vec<Step>> {
    let fate_of = |number: &u64| decision.fates.get(number).copied().unwrap_or(Fate::Stay);
    let (mut steps, mut removals) = (Vec::new(), Vec::new());
    for folder in &survey.line {
        let files = vm.generation(folder.number);
        let fate = fate_of(&folder.number);
        if fate == Fate::Stay {
            continue;
        }
        if folder.kind == Kind::Whole {
            steps.push(Step::GiveUp(folder.number));
        }
        for path in files_in(files.dir())? {
            let note = path == files.manifest() || path == files.pruned();
            let stays = note || fate == Fate::Disks && survey::is_disk(&path);
            if !stays {
                removals.push(Step::Remove(path));
            }
        }
        if fate == Fate::Go {
            removals.push(Step::Remove(files.pruned()));
            removals.push(Step::Remove(files.dir().to_owned()));
        }
    }
    steps.extend(removals);
    let logs = decision.logs.iter().map(|number| vm.log_path(*number));
    steps.extend(logs.map(Step::Remove));
    Ok(steps)
}

fn take(vm: &VmDir, step: &Step) -> Result<()> {
    match step {
        Step::GiveUp(number) => vm.generation(*number).mark_pruned(),
        Step::Remove(path) => leftovers::remove(path),
    }
}

/// Does what was decided.
fn sweep(vm: &VmDir, survey: &Survey, decision: &Decision) -> Result<()> {
    for step in steps(vm, survey, decision)? {
        take(vm, &step)?;
    }
    for dir in ["generations", "log"] {
        let dir = vm.dir().join(dir);
        files::sync_dir(&dir).map_err(Error::file("sync", &dir))?;
    }
    Ok(())
}

/// Notes of this site that no question can need any more, and what the dead have left. The VM's
/// lock is held.
///
/// `void/`: an agent that begins has no conversation that could still commit what was given up
/// before, and clears the folder itself; here that is done where no agent serves.
///
/// `deleted/`: how far a VM had come when it was deleted here. Where it is here again and has
/// come as far, its lease says more.
fn outlived_notes(vm: &VmDir) -> Result<Vec<PathBuf>> {
    let store = vm.store();
    let mut notes = Vec::new();
    let id = vm.record()?.id;
    if let Some(deleted) = store.deleted_fence(id)?
        && vm.lease()?.fence() >= deleted
    {
        notes.push(store.deleted_path(id));
    }
    if let Some(_no_agent) = store.agent_lock()? {
        notes.extend(files_in(&store.void_dir())?);
        notes.extend(leftovers::of_agent(store)?);
    }
    notes.extend(leftovers::of_site(store)?);
    notes.extend(leftovers::of_vm(vm)?);
    Ok(notes)
}

fn files_in(dir: &Path) -> Result<Vec<PathBuf>> {
    match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        entries => entries
            .and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect())
            .map_err(Error::file("list", dir)),
    }
}

#[cfg(test)]
mod tests;
