//! Booted guests, kept: booting the demo desktop takes most of a minute under software
//! emulation, and every VM made from it would do the same once more.
//!
//! A folder of the cache holds generation 1 of a VM that booted and said that it was ready. Its
//! name is a hash of everything that the state depends on: the base files, the hardware, and
//! QEMU's version.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Duration;

use vm_host::Accelerator;

use crate::error::{Error, Result};
use crate::files;
use crate::generation::{GenerationFiles, Manifest};
use crate::local::{self, NewVm};
use crate::store::{Store, VmDir};
use crate::vm::VmRecord;

/// A guest that has not announced itself by then never will.
const READY_LIMIT: Duration = Duration::from_secs(600);

/// The name of a booted state in the cache.
async fn key_of(record: &VmRecord) -> Result<String> {
    let mut hasher = blake3::Hasher::new_derive_key("replay-migrate 2026 booted guest");
    for file in record.base_files() {
        hasher.update(&file.hash.0);
    }
    let rest = (
        &record.hardware,
        record.boot.as_ref().map(|boot| &boot.append),
    );
    let rest = serde_json::to_vec(&rest)
        .map_err(|error| Error::Refused(format!("{} can't be described: {error}", record.name)))?;
    hasher.update(&rest);
    hasher.update(local::qemu_version().await?.as_bytes());
    Ok(hasher.finalize().to_hex()[..32].to_owned())
}

/// Boots a guest once and keeps the state, unless that was done before; where it is kept.
///
/// Several at once wait for one of them.
pub async fn ensure(cache: &Path, new: &NewVm, told: &dyn Fn(&str)) -> Result<PathBuf> {
    files::make_dir(cache)?;
    let scratch = tempfile::Builder::new()
        .prefix(".booting-")
        .tempdir_in(cache)
        .map_err(Error::file("write to", cache))?;
    // What is made is kept without this store's keys.
    let store = Store::scratch(scratch.path())?;
    let vm = store.vm(&"booting".parse()?);
    let record = {
        let (vm, new) = (
            vm.clone(),
            NewVm {
                booted: None,
                ..new.clone()
            },
        );
        local::blocking(move || local::create(&vm, &new)).await?
    };
    let key = key_of(&record).await?;
    let kept = cache.join(&key);
    let lock_path = cache.join(format!("{key}.lock"));
    let lock = File::create(&lock_path).map_err(Error::file("create", &lock_path))?;
    let lock = local::blocking(move || {
        lock.lock().map_err(Error::file("lock", &lock_path))?;
        Ok(lock)
    })
    .await?;
    if GenerationFiles::at(&kept).load_manifest()?.is_some() {
        return Ok(kept);
    }
    told("booting the guest once, to keep its state ...");
    let booted = async {
        let qemu = local::start(&vm, Accelerator::Auto, false).await?;
        local::wait_until_ready(&vm, &qemu, READY_LIMIT).await?;
        // QEMU serves one at a time.
        drop(qemu);
        local::suspend(&vm).await
    };
    let booted = booted.await;
    if booted.is_err() {
        local::discard(&vm).await?;
    }
    let manifest = booted?;
    let made = vm.generation(manifest.generation);
    files::remove_dir(&kept)?;
    fs::rename(made.dir(), &kept).map_err(Error::file("keep", &kept))?;
    files::sync_dir(cache).map_err(Error::file("sync", cache))?;
    drop(lock);
    Ok(kept)
}

/// Gives a new VM the booted state as its first generation, if the cache has it.
pub(crate) async fn adopt(vm: &VmDir, record: &VmRecord, cache: &Path) -> Result<bool> {
    let kept = GenerationFiles::at(cache.join(key_of(record).await?));
    let Some(manifest) = kept.load_manifest()? else {
        return Ok(false);
    };
    let manifest = Manifest {
        vm: record.id,
        ..manifest
    };
    let (vm, number) = (vm.clone(), manifest.generation);
    local::blocking(move || {
        let generation = vm.generation(number);
        files::make_dir(generation.dir())?;
        let dir = kept.dir();
        for entry in fs::read_dir(dir).map_err(Error::file("list", dir))? {
            let from = entry.map_err(Error::file("list", dir))?.path();
            let Some(name) = from.file_name().filter(|name| *name != "manifest.json") else {
                continue;
            };
            let to = generation.dir().join(name);
            // A generation never changes, so a link is as good as a copy.
            if fs::hard_link(&from, &to).is_err() {
                files::copy_sparse(&from, &to)?;
            }
        }
        generation.publish(&manifest)?;
        Ok(true)
    })
    .await
}
