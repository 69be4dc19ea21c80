//! Dropping what the guest's free pages hold, where the user allows it.
//!
//! A guest that doesn't clear what it frees is full of pages that nobody will read again, and
//! that no site can guess. They are made zero in the guest that stands still, before its state is
//! hashed: what is promised of the images from then on is promised of these zeroes, and if the VM
//! stays here after all, it goes on with them. Which pages are free the guest's kernel has to say
//! twice, see [`introspection::free`]; where it doesn't, nothing is dropped.

use std::ops::Range;
use std::path::Path;

use vm_host::RamMap;

use crate::error::{Error, Result};
use crate::local;
use crate::store::VmDir;

const PAGE: usize = 4096;

/// Makes the free pages of a guest zero, which stands still; how many were not.
pub(super) async fn drop_free(vm: &VmDir) -> Result<u64> {
    let ram = vm.runtime_dir("live")?.join("ram.img");
    let vm = vm.clone();
    local::blocking(move || {
        let stale = match stale(&ram)? {
            Ok(stale) => stale,
            Err(unsure) => {
                tracing::warn!(vm = %vm.name(), "no free pages are dropped: {unsure}");
                return Ok(0);
            }
        };
        let failed = || format!("cannot drop free pages of {}", vm.name());
        vm_host::clear_ram(&ram, &stale).map_err(Error::host(failed()))?;
        let pages: usize = stale.iter().map(|range| range.len() / PAGE).sum();
        tracing::info!(vm = %vm.name(), pages, "free pages are dropped");
        Ok(pages as u64)
    })
    .await
}

/// The free pages that are not zero, in runs.
fn stale(
    ram: &Path,
) -> Result<std::result::Result<Vec<Range<usize>>, introspection::free::Unsure>> {
    let map = RamMap::open(ram).map_err(Error::host("cannot read the guest's RAM"))?;
    let free = match introspection::free::pages(&map) {
        Ok(free) => free,
        Err(unsure) => return Ok(Err(unsure)),
    };
    let mut runs: Vec<Range<usize>> = Vec::new();
    for at in free.into_iter().flat_map(|range| range.step_by(PAGE)) {
        let zero = map
            .get(at..at + PAGE)
            .is_none_or(|page| page.iter().all(|byte| *byte == 0));
        match runs.last_mut() {
            _ if zero => {}
            Some(last) if last.end == at => last.end += PAGE,
            _ => runs.push(at..at + PAGE),
        }
    }
    Ok(Ok(runs))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_guest_has_no_free_pages() {
        let dir = tempfile::tempdir().unwrap();
        let ram = dir.path().join("ram.img");
        std::fs::write(&ram, vec![7; 8 * PAGE]).unwrap();
        assert!(stale(&ram).unwrap().is_err());
    }
}
