//! The place in the line for a generation that was received: what may be in it already.

use crate::error::{Error, Result};
use crate::files;
use crate::generation::{GenerationFiles, Manifest};
use crate::lease::Lease;
use crate::leftovers;
use crate::store::VmDir;

use super::survey::is_rested_on;

/// Makes a folder for a generation that was built on `base`, and says how it is to be described
/// there.
///
/// One of that number with another content is of a hand-over that was given up after its state
/// was kept: it goes, unless something rests on it. Of one that was pruned here the disks are
/// there still if others rest on them; if they are the same, they stay where they are, and it is
/// that generation again.
pub(crate) fn make_place(vm: &VmDir, base: Option<u64>, manifest: Manifest) -> Result<Manifest> {
    let number = manifest.generation;
    let files = vm.generation(number);
    if !files.dir().exists() {
        files::make_dir(files.dir())?;
        return Ok(manifest);
    }
    let rested_on = base == Some(number) || is_rested_on(vm, number)?;
    if files.load_manifest()?.is_some() {
        let held = Lease::load(&vm.lease_path())?
            .is_some_and(|lease| !matches!(lease, Lease::Elsewhere { .. }));
        if rested_on || held {
            return Err(in_the_way(vm, number));
        }
        tracing::info!(
            generation = number,
            "replacing what a hand-over that was given up has left"
        );
    } else if rested_on {
        return match files.load_pruned()? {
            Some(pruned) if pruned.disks == manifest.disks => Ok(Manifest {
                parent: pruned.parent,
                ..manifest
            }),
            _ => Err(in_the_way(vm, number)),
        };
    }
    // What says that it is whole goes first, durable: the rest goes in whatever order.
    files::remove_file(&files.manifest())?;
    files::remove_dir(files.dir())?;
    files::make_dir(files.dir())?;
    Ok(manifest)
}

fn in_the_way(vm: &VmDir, number: u64) -> Error {
    Error::Refused(format!(
        "there is a generation {number} of {} here already",
        vm.name()
    ))
}

/// A generation was published in this place: what is noted of a pruned one is past.
pub(crate) fn unmark(files: &GenerationFiles) -> Result<()> {
    leftovers::remove(&files.pruned())
}
