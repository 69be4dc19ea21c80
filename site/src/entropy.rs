//! Holding a replay-friendly guest's random numbers in place while it is recorded, and doing
//! without them where they would only decide which place of a slab comes first: see
//! [`introspection::entropy`] and [`introspection::freelists`], and the decisions 0009 and 0016 in
//! `docs/decisions`.
//!
//! It only ever makes replays come closer. Where the guest is no Linux that is understood, the
//! recording goes on without, and says so.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use introspection::entropy::{self, Generator};
use introspection::freelists;
use vm_host::RamMap;

use crate::error::{Error, Result};
use crate::files::FileLock;
use crate::local;
use crate::store::VmDir;

/// A guest whose random numbers are held in place until this is dropped; it may be running then.
#[derive(Debug)]
pub(crate) struct Held(Option<(PathBuf, Generator)>);

/// Holds them in a VM that stands still, where that can be done. Its slabs are filled in order
/// from then on, until it boots again.
pub(crate) fn hold(vm: &VmDir) -> Option<Held> {
    let held = || {
        let ram = live_ram(vm)?;
        let Some(generator) = find(&ram)? else {
            return Err(Error::Refused(
                "the guest is no Linux that keeps VMCOREINFO with its symbols, or has not seeded \
                 them yet"
                    .into(),
            ));
        };
        write(&ram, generator.hold())?;
        let held = Held(Some((ram.clone(), generator)));
        let orders = random_orders(&ram)?;
        tracing::debug!(
            caches = orders.len(),
            "slabs are filled in order from now on"
        );
        for order in orders {
            write(&ram, (order, [0; 8]))?;
        }
        Ok(held)
    };
    match held() {
        Ok(held) => {
            tracing::info!(vm = %vm.name(), "the guest's random numbers are held in place");
            Some(held)
        }
        Err(error) => {
            tracing::warn!(
                vm = %vm.name(),
                error = error.chain(),
                "the guest's random numbers can't be held in place: replays will differ more"
            );
            None
        }
    }
}

impl Held {
    /// The guest is another site's, or gone.
    pub(crate) fn forget(mut self) {
        self.0 = None;
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Some((ram, generator)) = self.0.take()
            && let Err(error) = write(&ram, generator.release())
        {
            tracing::warn!(
                error = error.chain(),
                "the guest's random numbers stay held until it is recorded again, or moves"
            );
        }
    }
}

/// Lets them go in a VM that came from another site, or whose recorder is gone. It may be
/// running: the kernel's tables that are read don't change.
pub(crate) async fn release_unless_recorded(vm: &VmDir) -> Result<()> {
    let vm = vm.clone();
    local::blocking(move || {
        let friendly = vm.record()?.replay_friendly;
        // Who records holds this lock, and the numbers.
        let Some(_recording) = (if friendly { recording_lock(&vm)? } else { None }) else {
            return Ok(());
        };
        let ram = live_ram(&vm)?;
        match find(&ram)? {
            Some(generator) => write(&ram, generator.release()),
            None => Ok(()),
        }
    })
    .await
}

/// The lock of who records a VM, if nobody does.
pub(crate) fn recording_lock(vm: &VmDir) -> Result<Option<FileLock>> {
    FileLock::try_take(&vm.dir().join("record.lock"))
}

fn live_ram(vm: &VmDir) -> Result<PathBuf> {
    Ok(vm.runtime_dir("live")?.join("ram.img"))
}

fn find(ram: &Path) -> Result<Option<Generator>> {
    let map = RamMap::open(ram).map_err(Error::host("cannot read the guest's RAM"))?;
    Ok(entropy::find(&map))
}

fn random_orders(ram: &Path) -> Result<Vec<usize>> {
    let map = RamMap::open(ram).map_err(Error::host("cannot read the guest's RAM"))?;
    Ok(freelists::random_orders(&map))
}

fn write(ram: &Path, (offset, bytes): (usize, [u8; 8])) -> Result<()> {
    File::options()
        .write(true)
        .open(ram)
        .and_then(|file| file.write_all_at(&bytes, offset as u64))
        .map_err(Error::file("write", ram))
}
