//! Taking a VM over: the step that decides, going on with the VM, and answering afterwards
//! whether it was decided.

use std::sync::{Mutex, PoisonError};

use vm_host::{Accelerator, Network, Vm};

use crate::error::{Error, Result};
use crate::files::{self};
use crate::generations::seen;
use crate::lease::Lease;
use crate::line::TargetLine;
use crate::local::{self};
use crate::phase::Phase;
use crate::protocol::{CommitRequest, Hello, ToSource};
use crate::store::VmDir;
use crate::vm::Id;
use crate::work::{Received, Work};

use super::Session;

/// Held for the moment in which a hand-over is decided, one way or the other: the answer that it
/// never will take place and the lease that says that it did must not both be given. One agent
/// serves a state directory, so a lock of this process will do.
static DECIDING: Mutex<()> = Mutex::new(());

impl Session {
    /// Takes the VM over. When this returns, it is this site's for good.
    pub(super) async fn commit(
        &mut self,
        work: Work,
        received: Received,
        request: CommitRequest,
    ) -> Result<crate::work::Kept> {
        let CommitRequest { manifest, fence } = request;
        let hello = &self.hello;
        if manifest.vm != hello.vm.id
            || manifest.generation != hello.next
            || manifest.hardware != hello.vm.hardware
            || Some(fence) != hello.fence.checked_add(1)
        {
            return Err(self.out_of_place("a commit of another state"));
        }
        let kept = work.keep(received, manifest).await?;
        self.note_vm()?;
        let came = kept.manifest.identity();
        take(&self.vm, hello.transfer, fence)?;
        self.committed = true;
        seen::warn_unnoted(seen::came_with(&self.vm, &self.peer, came));
        tracing::info!(vm = %self.vm.name(), generation = kept.manifest.generation, "taken over");
        Ok(kept)
    }

    /// Writes down what the VM is, if it is new here.
    pub(super) fn note_vm(&self) -> Result<()> {
        if self.vm.try_record()?.is_none() {
            let lease = Lease::Elsewhere {
                fence: self.hello.fence,
                owner: self.peer.key,
                owner_name: self.peer.name.to_string(),
            };
            self.vm.create(&self.hello.vm, &lease)?;
        }
        Ok(())
    }

    /// Starts the VM on the images that were received.
    pub(super) async fn resume(&self, kept: crate::work::Kept, paused: bool) -> Result<()> {
        let record = &self.hello.vm;
        let live = local::lay_overlays(&self.vm, record, Some(&kept.manifest))?;
        let runtime = self.vm.runtime_dir("live")?;
        files::remove_dir(&runtime)?;
        files::make_dir(&runtime)?;
        let ram = runtime.join("ram.img");
        std::fs::rename(&kept.ram, &ram).map_err(Error::file("move into place", &ram))?;
        let launch = local::launch(
            &self.vm,
            record,
            &record.hardware,
            &runtime,
            live.overlay_paths(&self.vm),
            Network::Connected,
            Accelerator::Auto,
            true,
        );
        let what = || {
            format!(
                "cannot go on with {0}, which is this site's now; `replay-migrate vm start {0}` \
                 here tries again",
                self.vm.name()
            )
        };
        let device = kept.generation.load_device()?;
        let qemu = Vm::start(&launch).await.map_err(Error::host(what()))?;
        let loaded = qemu
            .load_device_state(&device)
            .await
            .map_err(Error::host(what()));
        let resumed = match loaded {
            Ok(()) if paused => Ok(()),
            Ok(()) => local::resume_live(&self.vm, &qemu).await,
            Err(error) => Err(error),
        };
        if resumed.is_ok() && !paused {
            // The images are the source's bit for bit by now, and verified; what follows is the
            // VM's own life, of which this is a part.
            if let Err(error) = crate::chance::release_unless_recorded(&self.vm).await {
                tracing::warn!(
                    error = error.chain(),
                    "the guest's random numbers stay held"
                );
            }
        }
        if resumed.is_err() {
            let _ = qemu.kill().await;
            files::remove_dir(&self.vm.live_dir())?;
        }
        resumed
    }

    /// Answers whether a hand-over took place; if it did not, it never will.
    pub(super) async fn settle(&mut self, line: &mut TargetLine, transfer: Id) -> Result<()> {
        self.phase = Phase::Commit;
        let taken = was_taken(&self.vm, &self.hello, transfer)?;
        line.send(ToSource::Settled { taken }).await?;
        line.flush().await
    }
}

/// The step that decides: the VM is this site's, unless the source has given the hand-over up.
fn take(vm: &VmDir, transfer: Id, fence: u64) -> Result<()> {
    let _deciding = DECIDING.lock().unwrap_or_else(PoisonError::into_inner);
    if is_void(vm, transfer) {
        return Err(Error::Refused(
            "this hand-over was given up meanwhile".into(),
        ));
    }
    Lease::Held {
        fence,
        transfer: Some(transfer),
    }
    .store(&vm.lease_path())
}

/// Whether a hand-over took place. If it did not, it never will.
fn was_taken(vm: &VmDir, hello: &Hello, transfer: Id) -> Result<bool> {
    let _deciding = DECIDING.lock().unwrap_or_else(PoisonError::into_inner);
    let known = vm
        .try_record()?
        .is_some_and(|record| record.id == hello.vm.id);
    let taken = known
        && match vm.lease()? {
            Lease::Held {
                transfer: Some(by),
                fence,
            } => by == transfer || fence > hello.fence,
            // It was taken, and handed on since.
            lease => lease.fence() > hello.fence,
        };
    let deleted = vm.store().deleted_fence(hello.vm.id)?;
    let taken = taken || deleted.is_some_and(|fence| fence > hello.fence);
    if !taken {
        void(vm, transfer)?;
    }
    Ok(taken)
}

/// A hand-over that the source gave up must not be committed later, by a conversation that is
/// still open here.
fn void(vm: &VmDir, transfer: Id) -> Result<()> {
    let dir = vm.store().void_dir();
    files::make_dir(&dir)?;
    files::write_atomic(&dir.join(transfer.to_string()), b"")
}

fn is_void(vm: &VmDir, transfer: Id) -> bool {
    vm.store().void_dir().join(transfer.to_string()).exists()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::peers::Peer;
    use crate::protocol::Purpose;
    use crate::store::Store;
    use crate::target::check::check_known;
    use crate::vm::{BaseFile, FileHash, VmRecord};

    fn stale_copy(root: &std::path::Path) -> (VmDir, Hello) {
        let store = Store::open(root).unwrap();
        let vm = store.vm(&"desk".parse().unwrap());
        let record = VmRecord {
            id: Id([1; 16]),
            name: vm.name().clone(),
            hardware: vm_host::Hardware::new("pc-q35-7.2"),
            disks: vec![BaseFile {
                hash: FileHash([2; 32]),
                bytes: 4096,
            }],
            boot: None,
            ready_marker: None,
            replay_friendly: false,
        };
        vm.create(&record, &elsewhere(&vm, 7)).unwrap();
        let transfer = Id([3; 16]);
        let hello = Hello {
            purpose: Purpose::Settle(transfer),
            vm: record,
            transfer,
            fence: 7,
            generations: Vec::new(),
            next: 1,
            qemu: String::new(),
            follows: false,
        };
        (vm, hello)
    }

    #[test]
    fn what_was_answered_as_not_taken_is_never_taken() {
        let dir = tempfile::tempdir().unwrap();
        let (vm, hello) = stale_copy(dir.path());
        assert!(!was_taken(&vm, &hello, hello.transfer).unwrap());
        assert!(take(&vm, hello.transfer, 8).is_err());
        assert!(matches!(
            vm.lease().unwrap(),
            Lease::Elsewhere { fence: 7, .. }
        ));
        // Another attempt is another matter.
        take(&vm, Id([4; 16]), 8).unwrap();
    }

    #[test]
    fn what_was_taken_is_answered_so_also_after_it_was_handed_on() {
        let dir = tempfile::tempdir().unwrap();
        let (vm, hello) = stale_copy(dir.path());
        take(&vm, hello.transfer, 8).unwrap();
        assert!(was_taken(&vm, &hello, hello.transfer).unwrap());
        elsewhere(&vm, 9).store(&vm.lease_path()).unwrap();
        assert!(was_taken(&vm, &hello, hello.transfer).unwrap());
        vm.note_deleted().unwrap();
        files::remove_dir(vm.dir()).unwrap();
        assert!(was_taken(&vm, &hello, hello.transfer).unwrap());
    }

    #[test]
    fn nobody_else_offers_a_vm_with_its_owners_number() {
        let dir = tempfile::tempdir().unwrap();
        let (vm, mut hello) = stale_copy(dir.path());
        let Lease::Elsewhere { owner, .. } = vm.lease().unwrap() else {
            panic!("a stale copy");
        };
        let elsewhere = Store::open(dir.path().join("another")).unwrap();
        let other = elsewhere.identity().unwrap().key();
        let peer = |key| {
            let addr = "127.0.0.1:1".parse().unwrap();
            Peer::new("a".parse().unwrap(), addr, key)
        };
        check_known(&vm, &hello, &peer(owner)).unwrap();
        assert!(check_known(&vm, &hello, &peer(other)).is_err());
        // The owner itself, with a new key that somebody here said is its.
        let mut rekeyed = peer(other);
        rekeyed.former.push(owner);
        check_known(&vm, &hello, &rekeyed).unwrap();
        // The owner may have handed it on since, which takes a number more.
        hello.fence = 8;
        check_known(&vm, &hello, &peer(other)).unwrap();
        hello.fence = 6;
        assert!(check_known(&vm, &hello, &peer(owner)).is_err());
    }

    #[test]
    fn a_hand_over_is_decided_one_way_only() {
        let dir = tempfile::tempdir().unwrap();
        let (vm, hello) = stale_copy(dir.path());
        for round in 10..40 {
            let transfer = Id([round; 16]);
            elsewhere(&vm, 7).store(&vm.lease_path()).unwrap();
            let (took, said) = std::thread::scope(|scope| {
                let taking = scope.spawn(|| take(&vm, transfer, 8).is_ok());
                let asking = scope.spawn(|| was_taken(&vm, &hello, transfer).unwrap());
                (taking.join().unwrap(), asking.join().unwrap())
            });
            assert_eq!(took, said);
        }
    }

    fn elsewhere(vm: &VmDir, fence: u64) -> Lease {
        Lease::Elsewhere {
            fence,
            owner: vm.store().identity().unwrap().key(),
            owner_name: "a".into(),
        }
    }
}
