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
use crate::error::{Error, Result};
use crate::files;
use crate::generation::Manifest;
use crate::generations::seen::Seen;
use crate::lease::Lease;
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
    let lease = vm.lease()?;
    let fence_known = lease.fence();
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
    let made = UNIX_EPOCH + Duration::from_secs(manifest.created);
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
    Lease::Held {
        fence,
        transfer: None,
    }
    .store(&vm.lease_path())?;
    Moving::forget(vm)?;
    tracing::warn!(vm = %vm.name(), from = taken.from, fence, "taken over");
    Ok(taken)
}

/// What another site says of the owner of a VM that is held here: it has it, under a higher
/// number. If it is one that was given the VM once, that is believed: from here on the copy here
/// is stale, and what ran on it has ended. Whether it is so.
///
/// The disks of what ran are kept beside, under the number that ended it: nobody but a person can
/// say whether something on them is missed.
pub(crate) async fn give_way(vm: &VmDir, to: &Peer, fence: u64) -> Result<bool> {
    if !is_superseded(vm, to, fence)? {
        return Ok(false);
    }
    let _lock = vm.lock_soon().await?;
    if !is_superseded(vm, to, fence)? {
        return Ok(false);
    }
    Lease::Elsewhere {
        fence,
        owner: to.key,
        owner_name: to.name.to_string(),
    }
    .store(&vm.lease_path())?;
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

fn is_superseded(vm: &VmDir, by: &Peer, fence: u64) -> Result<bool> {
    let Some(Lease::Held { fence: ours, .. }) = Lease::load(&vm.lease_path())? else {
        return Ok(false);
    };
    let had_it = Seen::load(vm, &by.key)?.generations().next().is_some();
    Ok(fence > ours && fence < Hello::NUMBERS && had_it)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::generation::GenerationId;
    use crate::generations::seen;
    use crate::local::Live;
    use crate::local::tests::vm_with_generation;
    use crate::store::Store;
    use crate::vm::{Id, VmRecord};

    fn stale(root: &std::path::Path) -> (VmDir, Peer) {
        let vm = vm_with_generation(root, 3);
        let key = Store::open(root.join("other"))
            .unwrap()
            .identity()
            .unwrap()
            .key();
        let peer = Peer::new("b".parse().unwrap(), "127.0.0.1:1".parse().unwrap(), key);
        let record = VmRecord {
            id: Id([1; 16]),
            name: vm.name().clone(),
            hardware: vm_host::Hardware::new("pc-q35-7.2"),
            disks: Vec::new(),
            boot: None,
            ready_marker: None,
            replay_friendly: false,
        };
        let elsewhere = Lease::Elsewhere {
            fence: 7,
            owner: peer.key,
            owner_name: "b".into(),
        };
        vm.create(&record, &elsewhere).unwrap();
        (vm, peer)
    }

    #[tokio::test]
    async fn a_stale_copy_becomes_the_vm_beyond_what_the_lost_site_can_have() {
        let dir = tempfile::tempdir().unwrap();
        let (vm, _) = stale(dir.path());
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
        let again = takeover(&vm, 9999).await.unwrap_err();
        assert!(again.to_string().contains("belongs here"), "{again}");
    }

    #[tokio::test]
    async fn a_hand_over_to_a_lost_site_can_be_taken_back() {
        let dir = tempfile::tempdir().unwrap();
        let (vm, peer) = stale(dir.path());
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
        let (vm, peer) = stale(dir.path());
        let held = Lease::Held {
            fence: 8,
            transfer: None,
        };
        held.store(&vm.lease_path()).unwrap();
        let live = Live {
            generation: Some(3),
            overlays: vec!["disk0.qcow2".into()],
            ran: true,
        };
        files::make_dir(&vm.live_dir()).unwrap();
        live.store(&vm).unwrap();
        assert!(
            !give_way(&vm, &peer, 1008).await.unwrap(),
            "it never had it"
        );
        let known = GenerationId {
            number: 3,
            digest: [1; 32],
        };
        seen::shared(&vm, &peer, known).unwrap();
        assert!(!give_way(&vm, &peer, 8).await.unwrap(), "no higher number");
        assert_eq!(vm.lease().unwrap(), held);
        assert!(give_way(&vm, &peer, 1008).await.unwrap());
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
