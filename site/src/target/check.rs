//! What a host must have for a VM, checked before anything is sent.

use vm_host::{probe, programs};

use crate::error::{Error, Result};
use crate::local::blocking;
use crate::protocol::Hello;
use crate::store::Store;
use crate::work::Workplace;

/// Room that must stay free beside a VM's own needs.
const MARGIN: u64 = 64 << 20;

/// What this host must have for the VM, checked before anything is sent.
pub(super) async fn check_host(store: &Store, hello: &Hello) -> Result<()> {
    let machine = hello.vm.hardware.machine.clone();
    let machines = blocking(|| {
        programs::machine_types(&programs::qemu())
            .map_err(Error::host("cannot ask QEMU for its machine types"))
    })
    .await?;
    if !machines.iter().any(|known| known.name == machine) {
        let newest = machines.first().map_or("none", |known| known.name.as_str());
        return Err(Error::Refused(format!(
            "the QEMU here has no machine type {machine}; its newest is {newest}. Install a newer \
             QEMU here (the source's is {})",
            hello.qemu
        )));
    }
    // The VM's RAM twice: the generation that arrives lies on disk, what runs on tmpfs.
    let memory = hello.vm.hardware.memory_bytes();
    let runtime = Workplace::Incoming.runtime(&store.vm(&hello.vm.name))?;
    let shared = runtime.parent().unwrap_or(&runtime);
    let free = free_space(shared)?;
    if free < memory + MARGIN {
        return Err(Error::Refused(format!(
            "{} needs {} MiB for its memory, and {} has {} MiB free",
            hello.vm.name,
            memory >> 20,
            shared.display(),
            free >> 20
        )));
    }
    let available = probe::free_memory().map_err(Error::host("cannot measure memory"))?;
    if available < memory + MARGIN {
        return Err(Error::Refused(format!(
            "{} needs {} MiB of memory, and this host has {} MiB available",
            hello.vm.name,
            memory >> 20,
            available >> 20
        )));
    }
    let lacking = hello
        .vm
        .base_files()
        .iter()
        .filter(|file| store.base_file(file.hash).is_none())
        .fold(0, |sum: u64, file| sum.saturating_add(file.bytes));
    let free = free_space(store.root())?;
    let needed = memory.saturating_add(lacking).saturating_add(MARGIN);
    if free < needed {
        return Err(Error::Refused(format!(
            "{} needs {} MiB on the disk with {}, and there are {} MiB free",
            hello.vm.name,
            needed >> 20,
            store.root().display(),
            free >> 20
        )));
    }
    Ok(())
}

fn free_space(dir: &std::path::Path) -> Result<u64> {
    probe::free_space(dir).map_err(Error::host("cannot measure free space"))
}
