//! Taking chance out of a replay-friendly guest while it is recorded: its random numbers are held in
//! place, its programs take long turns, and no random number decides which place of a slab comes
//! first. See [`introspection::entropy`], [`introspection::turns`] and [`introspection::freelists`],
//! and the decisions 0009, 0016 and 0018 in `docs/decisions`.
//!
//! It only ever makes replays come closer. Where the guest is no Linux that is understood, the
//! recording goes on without, and says so.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use introspection::entropy::{self, Generator};
use introspection::freelists;
use introspection::turns::{self, Turns};
use vm_host::RamMap;

use crate::error::{Error, Result};
use crate::files::FileLock;
use crate::local;
use crate::store::VmDir;

/// A guest that chance is taken out of until this is dropped; it may be running then.
#[derive(Debug)]
pub(crate) struct Held(Option<(PathBuf, Found)>);

/// What of a guest can be held.
#[derive(Debug)]
struct Found {
    generator: Option<Generator>,
    turns: Option<Turns>,
}

/// Holds a VM that stands still, where that can be done. Its slabs are filled in order from then
/// on, until it boots again.
/// Programs take long turns if that is asked for.
pub(crate) fn hold(vm: &VmDir, long_turns: Option<Duration>) -> Option<Held> {
    let held = || {
        let ram = live_ram(vm)?;
        let mut found = Found::look(&ram)?;
        // What is not held need not be let go.
        found.turns = found.turns.filter(|_| long_turns.is_some());
        let Some(generator) = found.generator else {
            return Err(Error::Refused(
                "the guest is no Linux that keeps VMCOREINFO with its symbols, or has not seeded \
                 them yet"
                    .into(),
            ));
        };
        let words = found.turns.zip(long_turns);
        let words = words.map(|(turns, length)| turns.hold(length));
        // From here on it is let go if anything fails.
        let held = Held(Some((ram.clone(), found)));
        write(&ram, generator.hold())?;
        for word in words.into_iter().flatten() {
            write(&ram, word)?;
        }
        let orders = random_orders(&ram)?;
        tracing::debug!(
            caches = orders.len(),
            turns = words.is_some(),
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
        if let Some((ram, found)) = self.0.take()
            && let Err(error) = found.release(&ram)
        {
            tracing::warn!(
                error = error.chain(),
                "the guest's random numbers and turns stay held until it is recorded again, or \
                 moves"
            );
        }
    }
}

impl Found {
    fn look(ram: &Path) -> Result<Self> {
        let map = RamMap::open(ram).map_err(Error::host("cannot read the guest's RAM"))?;
        Ok(Self {
            generator: entropy::find(&map),
            turns: turns::find(&map),
        })
    }

    fn release(&self, ram: &Path) -> Result<()> {
        if let Some(generator) = &self.generator {
            write(ram, generator.release())?;
        }
        for word in self.turns.iter().flat_map(Turns::release) {
            write(ram, word)?;
        }
        Ok(())
    }
}

/// Lets go of a VM that came from another site, or whose recorder is gone. It may be running:
/// the kernel's tables that are read don't change.
pub(crate) async fn release_unless_recorded(vm: &VmDir) -> Result<()> {
    let vm = vm.clone();
    local::blocking(move || {
        let friendly = vm.record()?.replay_friendly;
        // Who records holds this lock, and the guest.
        let Some(_recording) = (if friendly { recording_lock(&vm)? } else { None }) else {
            return Ok(());
        };
        let ram = live_ram(&vm)?;
        Found::look(&ram)?.release(&ram)
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

fn random_orders(ram: &Path) -> Result<Vec<usize>> {
    let map = RamMap::open(ram).map_err(Error::host("cannot read the guest's RAM"))?;
    Ok(freelists::random_orders(&map))
}

fn write<const N: usize>(ram: &Path, (offset, bytes): (usize, [u8; N])) -> Result<()> {
    File::options()
        .write(true)
        .open(ram)
        .and_then(|file| file.write_all_at(&bytes, offset as u64))
        .map_err(Error::file("write", ram))
}
