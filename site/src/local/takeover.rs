//! An operator's override: the stale copy here becomes the VM, because the site that has it is gone
//! for good.
//!
//! Nobody can be asked, so the number decides: the VM goes on here under a fencing number that is
//! beyond whatever the lost site can have come to. Each hand-over counts one, so that a lost site
//! that comes back, and says its number to anybody who knows of this one, learns that its copy is
//! of the past ([`give_way`]). What was done there since the generation that is here is lost with
//! it; so is one owner, for as long as the lost site runs the VM and talks to nobody.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;

use super::{attach, drop_stale_live};
use crate::chain::{Chain, Way};
use crate::error::{Error, Result};
use crate::files;
use crate::generation::Manifest;
use crate::generations::seen::Seen;
use crate::lease::{Lease, Title};
use crate::moving::Moving;
use crate::peers::Peer;
use crate::protocol::Hello;
use crate::store::VmDir;
use crate::vm::VmName;

/// So many hand-overs that nobody here has heard of are reckoned with.
const UNHEARD: u64 = 1000;

/// What taking a VM over means.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Takeover {
    /// The VM.
    pub vm: VmName,
    /// The site that has it, as far as is known here.
    pub from: String,
    /// The highest fencing number known here.
    pub fence_known: u64,
    /// The one under which it goes on here.
    pub fence: u64,
    /// The state that it goes on from; `None` for the one in which it stands still here since its
    /// hand-over was cut off.
    pub generation: Option<u64>,
    /// How old that is, by this host's clock.
    pub age: Option<Duration>,
}

/// What taking this VM over under this number would mean. Changes nothing.
///
/// # Errors
/// Refused where the VM belongs here, there is no whole state of it, or the number is not beyond
/// what the lost site can have.
pub fn takeover_of(vm: &VmDir, fence: u64) -> Result<Takeover> {
    vm.record()?;
    let title = vm.title()?;
    let fence_known = title.fence();
    let lease = title.lease;
    let least = fence_known.saturating_add(UNHEARD);
    let newest = vm.generations()?.pop();
    let (from, newest) = match lease {
        Lease::Held { .. } => {
            return Err(Error::Refused(format!(
                "{} belongs here already; there is nothing to take over",
                vm.name()
            )));
        }
        Lease::Elsewhere { owner_name, .. } => {
            let newest = newest.ok_or_else(|| {
                Error::Refused(format!(
                    "there is no whole state of {} here to go on from",
                    vm.name()
                ))
            })?;
            (owner_name, Some(newest))
        }
        Lease::Offered { to_name, .. } => (to_name, None),
    };
    if fence < least || fence >= Hello::NUMBERS {
        return Err(Error::Refused(format!(
            "{} has number {fence_known} as far as is known here, and {from} may have handed it on \
             since, one number each time: say --fence {least} or more, below {}",
            vm.name(),
            Hello::NUMBERS
        )));
    }
    Ok(Takeover {
        vm: vm.name().clone(),
        from,
        fence_known,
        fence,
        generation: newest.as_ref().map(|newest| newest.generation),
        age: newest.as_ref().and_then(age),
    })
}

/// How old a generation is; nothing, where this host's clock is behind it.
fn age(manifest: &Manifest) -> Option<Duration> {
    // It was the other site that said when.
    let made = UNIX_EPOCH.checked_add(Duration::from_secs(manifest.created))?;
    SystemTime::now().duration_since(made).ok()
}

/// Takes a VM over: from here on it is this site's, stopped, or paused where it stood still here.
///
/// # Errors
/// As [`takeover_of`]'s.
pub async fn takeover(vm: &VmDir, fence: u64) -> Result<Takeover> {
    vm.record()?;
    let _lock = vm.lock()?;
    let taken = takeover_of(vm, fence)?;
    drop_stale_live(vm).await?;
    let mut chain = vm.title()?.chain;
    let (id, identity) = (vm.record()?.id, vm.store().identity()?);
    chain.take_over(id, taken.fence_known, fence, &identity);
    let held = Lease::Held {
        fence,
        transfer: None,
    };
    Title::new(held, chain).store(&vm.lease_path())?;
    Moving::forget(vm)?;
    tracing::warn!(vm = %vm.name(), from = taken.from, fence, "taken over");
    Ok(taken)
}

/// Says that this site took a VM over, of which a stale copy lies here: what is offered along a chain
/// with that step in it is taken from now on. Changes nothing else.
///
/// # Errors
/// Refused where the VM belongs here, or its owner is not clear.
pub fn believe(vm: &VmDir, by: &Peer) -> Result<()> {
    vm.record()?;
    let _lock = vm.lock()?;
    let title = vm.title()?;
    if !matches!(title.lease, Lease::Elsewhere { .. }) {
        return Err(Error::Refused(format!(
            "{} belongs here, as far as is known: nobody took it over from another site",
            vm.name()
        )));
    }
    Title {
        taken_by: Some(by.key),
        ..title
    }
    .store(&vm.lease_path())
}

/// What another site says of the owner of a VM that is held here: it has it, under a higher
/// number. If it is one that was given the VM once, and shows how it came to it from here, that is
/// believed: from here on the copy here is stale, and what ran on it has ended. Whether it is so.
///
/// The disks of what ran are kept beside, under the number that ended it: nobody but a person can
/// say whether something on them is missed.
pub(crate) async fn give_way(vm: &VmDir, to: &Peer, fence: u64, chain: &Chain) -> Result<bool> {
    if superseding(vm, to, fence, chain)?.is_none() {
        return Ok(false);
    }
    let _lock = vm.lock_soon().await?;
    let Some(chain) = superseding(vm, to, fence, chain)? else {
        return Ok(false);
    };
    let elsewhere = Lease::Elsewhere {
        fence,
        owner: to.key,
        owner_name: to.name.to_string(),
    };
    Title::new(elsewhere, chain).store(&vm.lease_path())?;
    Moving::forget(vm)?;
    tracing::warn!(
        vm = %vm.name(),
        owner = %to.name,
        fence,
        "it was taken over there while this site was gone: the copy here is stale from now on"
    );
    if let Some(qemu) = attach(vm).await? {
        // In order, so that its disks are whole.
        if qemu.quit().await.is_err() {
            qemu.kill()
                .await
                .map_err(Error::host(format!("cannot stop {}", vm.name())))?;
        }
    }
    if vm.live_dir().exists() {
        let beside = vm.live_dir().with_file_name(format!("lost-{fence}"));
        files::remove_dir(&beside)?;
        files::rename(&vm.live_dir(), &beside)?;
    }
    files::remove_dir(&vm.runtime_dir("live")?)?;
    Ok(true)
}

/// The chain of a VM that is held here, as it is known when this site is believed; nothing, if it is
/// not.
fn superseding(vm: &VmDir, by: &Peer, fence: u64, shown: &Chain) -> Result<Option<Chain>> {
    let Some(Title {
        lease: Lease::Held { fence: ours, .. },
        chain: known,
        ..
    }) = Title::load(&vm.lease_path())?
    else {
        return Ok(None);
    };
    let had_it = Seen::load(vm, &by.key)?.generations().next().is_some();
    let id = vm.record()?.id;
    let proven = shown
        .prove(id)
        .ok()
        .filter(|proven| proven.owner() == by.key && proven.fence() == fence);
    let Some(proven) = proven.filter(|_| had_it && fence > ours && fence < Hello::NUMBERS) else {
        return Ok(None);
    };
    // A VM of before there were chains goes by the number, as it did then.
    let leads = known.is_empty() || matches!(proven.way_from(&known), Way::On(_));
    Ok(leads.then(|| proven.added_to(&known)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::generation::GenerationId;
    use crate::generations::seen;
    use crate::identity::Identity;
    use crate::local::Live;
    use crate::local::tests::vm_with_generation;
    use crate::store::Store;
    use crate::vm::{Id, VmRecord};

    const ID: Id = Id([1; 16]);

    #[test]
    fn a_generation_of_any_time_has_an_age_or_none() {
        let dir = tempfile::tempdir().unwrap();
        let vm = vm_with_generation(dir.path(), 3);
        let manifest = vm.manifest(3).unwrap();
        let age_of = |created| {
            age(&Manifest {
                created,
                ..manifest.clone()
            })
        };
        let now = manifest.created;
        let old = age_of(now - 86_400).unwrap();
        assert!((86_400..90_000).contains(&old.as_secs()));
        assert!(age_of(0).unwrap().as_secs() >= now);
        // Of a clock that was days ahead, and what no clock says.
        for never in [now + 5 * 86_400, u64::MAX] {
            assert_eq!(age_of(never), None);
        }
    }

    /// A VM whose stale copy is here; the other site, and its key.
    fn stale(root: &std::path::Path) -> (VmDir, Peer, Identity) {
        let vm = vm_with_generation(root, 3);
        let other = Store::open(root.join("other")).unwrap().identity().unwrap();
        let addr = "127.0.0.1:1".parse().unwrap();
        let peer = Peer::new("b".parse().unwrap(), addr, other.key());
        let record = VmRecord {
            disks: Vec::new(),
            ..VmRecord::example()
        };
        let elsewhere = Lease::Elsewhere {
            fence: 7,
            owner: peer.key,
            owner_name: "b".into(),
        };
        let title = Title::new(elsewhere, Chain::start(ID, 7, &other));
        vm.create(&record, title).unwrap();
        (vm, peer, other)
    }

    #[tokio::test]
    async fn a_stale_copy_becomes_the_vm_beyond_what_the_lost_site_can_have() {
        let dir = tempfile::tempdir().unwrap();
        let (vm, ..) = stale(dir.path());
        let before = vm.title().unwrap().chain;
        for short in [0, 7, 8, 1006, Hello::NUMBERS] {
            let refused = takeover(&vm, short).await.unwrap_err();
            assert!(refused.to_string().contains("--fence 1007"), "{refused}");
        }
        assert_eq!(takeover_of(&vm, 1007).unwrap().generation, Some(3));
        assert_eq!(vm.lease().unwrap().fence(), 7, "asking changes nothing");
        let taken = takeover(&vm, 1007).await.unwrap();
        assert_eq!((taken.from.as_str(), taken.fence_known), ("b", 7));
        assert_eq!(
            vm.lease().unwrap(),
            Lease::Held {
                fence: 1007,
                transfer: None
            }
        );
        let chain = vm.title().unwrap().chain;
        let way = chain.prove(ID).unwrap().way_from(&before);
        assert_eq!(
            way,
            Way::On(vec![chain.links().last().unwrap()]),
            "and is said"
        );
        let again = takeover(&vm, 9999).await.unwrap_err();
        assert!(again.to_string().contains("belongs here"), "{again}");
    }

    #[tokio::test]
    async fn a_hand_over_to_a_lost_site_can_be_taken_back() {
        let dir = tempfile::tempdir().unwrap();
        let (vm, peer, _) = stale(dir.path());
        let offered = Lease::Offered {
            fence: 7,
            transfer: Id([2; 16]),
            to: peer.key,
            to_name: "b".into(),
            was_running: true,
        };
        offered.store(&vm.lease_path()).unwrap();
        let taken = takeover(&vm, 2000).await.unwrap();
        assert_eq!(taken.generation, None, "it goes on as it stands here");
        assert_eq!(vm.lease().unwrap().fence(), 2000);
    }

    #[tokio::test]
    async fn the_lost_site_gives_way_only_to_a_higher_number_of_a_site_that_had_the_vm() {
        let dir = tempfile::tempdir().unwrap();
        let (vm, peer, other) = stale(dir.path());
        // It was handed on to this site.
        let us = vm.store().identity().unwrap();
        let theirs = vm.title().unwrap().chain;
        let mut ours = theirs.clone();
        ours.hand_over(ID, us.key(), &other).unwrap();
        let held = Lease::Held {
            fence: 8,
            transfer: None,
        };
        Title::new(held.clone(), ours.clone())
            .store(&vm.lease_path())
            .unwrap();
        // What the other site, which gave it, has made of its stale copy since.
        let mut taken = ours;
        taken.take_over(ID, 8, 1008, &other);
        let live = Live {
            generation: Some(3),
            overlays: vec!["disk0.qcow2".into()],
            ran: true,
        };
        files::make_dir(&vm.live_dir()).unwrap();
        live.store(&vm).unwrap();
        assert!(
            !give_way(&vm, &peer, 1008, &taken).await.unwrap(),
            "it never had it"
        );
        let known = GenerationId {
            number: 3,
            digest: [1; 32],
        };
        seen::shared(&vm, &peer, known).unwrap();
        assert!(
            !give_way(&vm, &peer, 8, &theirs).await.unwrap(),
            "no higher number"
        );
        for forged in [
            Chain::start(ID, 1008, &other),
            Chain::default(),
            // Under another number than it says, of another VM.
            theirs,
            Chain::start(Id([2; 16]), 1008, &other),
        ] {
            assert!(!give_way(&vm, &peer, 1008, &forged).await.unwrap());
        }
        assert_eq!(vm.lease().unwrap(), held);
        assert!(give_way(&vm, &peer, 1008, &taken).await.unwrap());
        assert_eq!(vm.title().unwrap().chain, taken);
        assert!(matches!(
            vm.lease().unwrap(),
            Lease::Elsewhere { fence: 1008, owner, .. } if owner == peer.key
        ));
        let refused = crate::local::require_lease(&vm).unwrap_err();
        assert!(refused.to_string().contains("stale copy"), "{refused}");
        // What ran is not taken for the VM, nor is it gone.
        assert!(Live::load(&vm).unwrap().is_none());
        let beside = vm.dir().join("live").join("lost-1008").join("live.json");
        assert!(beside.exists());
    }
}
