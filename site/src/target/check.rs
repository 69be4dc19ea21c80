//! What a host must have for a VM, and what must be known here of it, checked before anything
//! is sent.

use vm_host::{probe, programs};

use crate::error::{Error, Result};
use crate::lease::Lease;
use crate::local::{blocking, give_way};
use crate::peers::{Peer, Permission};
use crate::protocol::{Hello, Purpose};
use crate::store::{Store, VmDir};
use crate::work::Workplace;

/// Room that must stay free beside a VM's own needs.
const MARGIN: u64 = 64 << 20;

/// Whether the caller may want what it wants. Who may not learns nothing else.
///
/// Whether a hand-over took place is answered to whoever is trusted: that it has no answer would
/// leave a VM nobody's.
pub(super) fn check_allowed(caller: &Peer, hello: &Hello) -> Result<()> {
    let allowed = match hello.purpose {
        Purpose::Settle(_) => true,
        Purpose::Migrate | Purpose::Seed | Purpose::Estimate => {
            caller.may.has(Permission::Send)
                && (!hello.follows || caller.may.has(Permission::Follow))
        }
    };
    if allowed {
        return Ok(());
    }
    let what = if caller.may.has(Permission::Send) {
        "have VMs followed here"
    } else {
        "send VMs here"
    };
    Err(Error::Refused(format!(
        "this site was told not to let you {what}; `replay-migrate site trust` there, with \
         --may, changes that"
    )))
}

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

/// Compares the caller's number with this site's, where both think that they have the VM: one of
/// them was gone while the other took it over. The number here, if the caller is of the past; if
/// it is this site, that is noted.
pub(super) async fn superseded(store: &Store, caller: &Peer, hello: &Hello) -> Result<Option<u64>> {
    hello.validate()?;
    // A hand-over that was cut off is settled by its number as well, where it is answered.
    if matches!(hello.purpose, Purpose::Settle(_)) {
        return Ok(None);
    }
    let vm = store.vm(&hello.vm.name);
    if vm.try_record()?.is_none_or(|known| known.id != hello.vm.id) {
        return Ok(None);
    }
    match vm.lease()? {
        Lease::Held { fence, .. } if fence > hello.fence => Ok(Some(fence)),
        Lease::Held { fence, .. } if fence < hello.fence && hello.purpose != Purpose::Seed => {
            give_way(&vm, caller, hello.fence).await?;
            Ok(None)
        }
        _ => Ok(None),
    }
}

/// Whether a VM that a site offers may come here, by what is known of it here.
///
/// Of two sites that name the same fencing number one has none to name: each hand-over has a
/// number of its own. That a site with a higher one has the VM can't be known here.
pub(crate) fn check_known(vm: &VmDir, hello: &Hello, caller: &Peer) -> Result<()> {
    let Some(known) = vm.try_record()? else {
        return Ok(());
    };
    if known.id != hello.vm.id {
        return Err(Error::Refused(format!(
            "there is another VM called {} here; rename or delete one of them",
            vm.name()
        )));
    }
    if known != hello.vm {
        return Err(Error::Refused(format!(
            "{0} was described otherwise when it was here last (its hardware, disks or kernel): \
             remove the stale copy here with `replay-migrate vm delete {0}`",
            vm.name()
        )));
    }
    match vm.lease()? {
        Lease::Held { .. } => {
            return Err(Error::Refused(format!(
                "{} belongs here: this site holds its lease, so it can't be sent here",
                vm.name()
            )));
        }
        Lease::Offered { to_name, .. } => {
            return Err(Error::Refused(format!(
                "the hand-over of {} from here to {to_name} is not settled; run `vm resume \
                 {}` here first",
                vm.name(),
                vm.name()
            )));
        }
        Lease::Elsewhere { fence, .. } if fence > hello.fence => {
            return Err(Error::Refused(format!(
                "{} was handed on since (number {fence} is known here, {} was said): what \
                 is offered is not the newest",
                vm.name(),
                hello.fence
            )));
        }
        Lease::Elsewhere {
            fence,
            owner,
            owner_name,
        } if fence == hello.fence && !caller.had(&owner) => {
            return Err(Error::Refused(format!(
                "{0} is {owner_name}'s by what is known here (number {fence}), and another site \
                 offers it with the same number: send it from {owner_name}, or, if that site is \
                 gone for good, remove the stale copy here with `replay-migrate vm delete {0}`",
                vm.name()
            )));
        }
        Lease::Elsewhere { .. } => {}
    }
    Ok(())
}
