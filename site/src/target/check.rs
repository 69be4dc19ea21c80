//! What a host must have for a VM, and what must be known here of it, checked before anything
//! is sent.

use vm_host::{probe, programs};

use crate::chain::{Chain, Proven, Step, Way};
use crate::error::{Error, Result};
use crate::identity::SiteKey;
use crate::lease::{Lease, Title};
use crate::local::{blocking, give_way};
use crate::ownership;
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
        Purpose::Migrate | Purpose::Seed | Purpose::Estimate | Purpose::Supply => {
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
pub(super) async fn superseded(
    store: &Store,
    caller: &Peer,
    hello: &Hello,
) -> Result<Option<(u64, Chain)>> {
    hello.validate()?;
    // A hand-over that was cut off is settled by its number as well, where it is answered.
    if matches!(hello.purpose, Purpose::Settle(_) | Purpose::Supply) {
        return Ok(None);
    }
    let vm = store.vm(&hello.vm.name);
    if vm.try_record()?.is_none_or(|known| known.id != hello.vm.id) {
        return Ok(None);
    }
    match vm.lease()? {
        Lease::Held { fence, .. } if fence > hello.fence => {
            let chain = ownership::proof(&vm)?.since(hello.vm.id, caller);
            Ok(Some((fence, chain)))
        }
        Lease::Held { fence, .. } if fence < hello.fence && hello.purpose != Purpose::Seed => {
            give_way(&vm, caller, hello.fence, &hello.chain).await?;
            Ok(None)
        }
        _ => Ok(None),
    }
}

/// Whether a VM that a site offers may come here, by what is known of it here: the chain of its
/// hand-overs as it is known then.
///
/// Of two sites that name the same fencing number one has none to name: each hand-over has a
/// number of its own. A higher one must be shown to have come about from what is known.
pub(crate) fn check_known(vm: &VmDir, hello: &Hello, caller: &Peer) -> Result<Chain> {
    let proven = check_chain(hello, caller)?;
    let Some(known) = vm.try_record()? else {
        return Ok(hello.chain.clone());
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
    let title = vm.title()?;
    match &title.lease {
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
        Lease::Elsewhere { .. } if title.fence() > hello.fence => {
            return Err(Error::Refused(format!(
                "{} was handed on since (number {} is known here, {} was said): what \
                 is offered is not the newest",
                vm.name(),
                title.fence(),
                hello.fence
            )));
        }
        Lease::Elsewhere {
            fence,
            owner,
            owner_name,
        } if *fence == hello.fence && hello.purpose != Purpose::Seed && !caller.had(owner) => {
            return Err(Error::Refused(format!(
                "{0} is {owner_name}'s by what is known here (number {fence}), and another site \
                 offers it with the same number: send it from {owner_name}, or, if that site is \
                 gone for good, remove the stale copy here with `replay-migrate vm delete {0}`",
                vm.name()
            )));
        }
        Lease::Elsewhere { .. } => {}
    }
    check_way(vm, &title, &proven, caller)?;
    Ok(proven.added_to(&title.chain))
}

/// Whether the chain that a site shows holds, and leads to it. A seed may come from a stale copy.
fn check_chain<'a>(hello: &'a Hello, caller: &Peer) -> Result<Proven<'a>> {
    let refuse = |what: String| {
        Error::Refused(format!(
            "{} can't show how it came to {}: {what}",
            caller.name, hello.vm.name
        ))
    };
    let proven = hello
        .chain
        .prove(hello.vm.id)
        .map_err(|error| refuse(error.to_string()))?;
    if proven.fence() != hello.fence {
        let fence = proven.fence();
        return Err(refuse(format!(
            "the chain of hand-overs leads to number {fence}, {} was said",
            hello.fence
        )));
    }
    if hello.purpose != Purpose::Seed && proven.owner() != caller.key {
        return Err(refuse(
            "the chain of hand-overs leads to another site".into(),
        ));
    }
    Ok(proven)
}

/// Whether a chain leads on from what is known of a VM whose stale copy lies here. What was taken
/// over without being given is a person's to believe.
fn check_way(vm: &VmDir, title: &Title, proven: &Proven<'_>, caller: &Peer) -> Result<()> {
    let Lease::Elsewhere {
        fence,
        owner,
        owner_name,
    } = &title.lease
    else {
        return Ok(());
    };
    let way = if title.chain.is_empty() {
        way_from_lease(*fence, *owner, proven, caller)
    } else if begins_anew(&title.chain, proven, caller) {
        Way::On(Vec::new())
    } else {
        proven.way_from(&title.chain)
    };
    let name = vm.name();
    match way {
        Way::On(takeovers) => {
            let unknown = takeovers
                .into_iter()
                .find(|link| title.taken_by.is_none_or(|taken| taken != link.to));
            let Some(link) = unknown else {
                return Ok(());
            };
            let by = name_of(vm, &link.to)?;
            let believe = if vm.store().peers().by_key(&link.to)?.is_some() {
                format!("say so here with `replay-migrate vm takeover {name} --by {by} --yes`, or ")
            } else {
                String::new()
            };
            Err(Error::Refused(format!(
                "{name} was taken over at {by}, as number {} after {}, and nobody gave it: if \
                 {owner_name} is gone for good, {believe}remove the stale copy here with \
                 `replay-migrate vm delete {name}`",
                link.after, link.before
            )))
        }
        Way::Behind => Err(Error::Refused(format!(
            "{name} was handed on since: a hand-over from number {} is known here, and what is \
             offered is not the newest",
            proven.fence()
        ))),
        Way::Apart => Err(Error::Refused(format!(
            "{0} can't show how it came to {name} from {owner_name}, which has it by what is \
             known here (number {1}): send it from {owner_name}, or, if {0} is to be believed \
             all the same, remove the stale copy here with `replay-migrate vm delete {name}`",
            caller.name,
            title.fence()
        ))),
    }
}

/// The way from a stale copy of before there were chains: number and owner are all that is known.
fn way_from_lease<'a>(fence: u64, owner: SiteKey, proven: &Proven<'a>, caller: &Peer) -> Way<'a> {
    let same = |key: &SiteKey| *key == owner || (caller.had(key) && caller.had(&owner));
    let links = proven.links();
    let known = links
        .iter()
        .position(|link| link.after == fence && same(&link.to));
    let new = match known {
        Some(at) => &links[at + 1..],
        // It begins later; what was before is not shown, and was never signed.
        None if links.first().is_some_and(|first| first.after > fence) => links,
        None => return Way::Apart,
    };
    let takeovers = new.iter().filter(|link| link.step == Step::Takeover);
    Way::On(takeovers.collect())
}

/// Whether it is the known owner, which lost its key and began anew with another: a person here
/// said that it is the same site.
fn begins_anew(known: &Chain, proven: &Proven<'_>, caller: &Peer) -> bool {
    let first = proven.links().first();
    let owner = known.owner().is_some_and(|owner| caller.had(&owner));
    let starts = first.is_some_and(|first| {
        first.step == Step::Start && first.to == caller.key && Some(first.after) == known.fence()
    });
    owner && starts
}

/// What the site of this key is called here.
pub(super) fn name_of(vm: &VmDir, key: &SiteKey) -> Result<String> {
    let peer = vm.store().peers().of_key(key)?;
    Ok(peer.map_or_else(|| key.id().to_string(), |peer| peer.name.to_string()))
}
