//! A VM that has come and does not run yet.
//!
//! Between the step that makes a VM this site's and its guest's first instruction here lies a
//! moment in which the agent can die, or the host lose power. The source has let go by then, and
//! the user waits for a desktop that nobody would start. So it is written down before the step
//! that decides, and whoever serves this site next goes on with it: the VM runs, or stands still
//! where `migrate --paused` had said so.
//!
//! The note speaks of one hand-over. Where the lease does not say that the VM came by it, it is
//! past. It goes as soon as the VM runs, or somebody was told that it can't.

use serde::{Deserialize, Serialize};
use vm_host::{Accelerator, Status, Vm};

use crate::chance;
use crate::error::{Error, Result};
use crate::files;
use crate::lease::Lease;
use crate::local::{self, First, Live};
use crate::store::VmDir;
use crate::vm::Id;

/// The version of the file's form.
const VERSION: u32 = 1;

/// What is left to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Resuming {
    version: u32,
    /// The hand-over by which the VM comes.
    pub transfer: Id,
    /// Whether it is to stand still.
    pub paused: bool,
}

impl Resuming {
    pub(crate) fn of(transfer: Id, paused: bool) -> Self {
        Self {
            version: VERSION,
            transfer,
            paused,
        }
    }

    /// What is noted; nothing, where nothing is left to do.
    pub(crate) fn load(vm: &VmDir) -> Result<Option<Self>> {
        let path = vm.resuming_path();
        let Some(noted) = files::read_json::<Self>(&path)? else {
            return Ok(None);
        };
        if noted.version != VERSION {
            return Err(Error::Damaged {
                path,
                reason: format!(
                    "it is of version {}; this program reads version {VERSION}",
                    noted.version
                ),
            });
        }
        Ok(Some(noted))
    }

    /// Writes it down, durable when this returns.
    pub(crate) fn store(&self, vm: &VmDir) -> Result<()> {
        files::write_json(&vm.resuming_path(), self)
    }

    /// Nothing is left to do.
    pub(crate) fn forget(vm: &VmDir) -> Result<()> {
        files::remove_file(&vm.resuming_path())
    }
}

/// How a VM is gone on with that came and was not seen to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    /// It does what it is to do, or did.
    Nothing,
    /// Its QEMU has all it needs.
    Resume,
    /// From the state that came.
    Start,
}

impl Next {
    /// By what its QEMU does, if it has one, and by what is noted of its disks.
    fn of(noted: &Resuming, qemu: Option<&Status>, live: Option<&Live>) -> Self {
        // A guest that has run and has no QEMU any more is the user's to start, as after any power
        // cut: its disks are ahead of the state that came.
        let ran = live.is_some_and(|live| live.ran);
        // Who was loading its device state is dead.
        let waits = matches!(qemu, Some(Status::Incoming));
        match qemu {
            _ if waits || qemu.is_none() && !ran => Self::Start,
            Some(Status::Paused | Status::Saved) if !noted.paused => Self::Resume,
            // A guest that has shut down, or has a disk that failed, ran.
            _ => Self::Nothing,
        }
    }
}

/// Goes on with a VM that came here while somebody served this site who is dead. Does nothing
/// while one is at work, nor where nothing is left to do.
///
/// # Errors
/// When it can't be started now; what is left to do stays noted.
pub(crate) async fn go_on(vm: &VmDir) -> Result<()> {
    // Looked at without the lock, so that nobody is kept from work by somebody who only looks.
    if Resuming::load(vm)?.is_none() {
        return Ok(());
    }
    // Held by whoever is at work.
    let Ok(_lock) = vm.lock() else {
        return Ok(());
    };
    let Some(noted) = Resuming::load(vm)? else {
        return Ok(());
    };
    let came = match Lease::load(&vm.lease_path())? {
        Some(Lease::Held { transfer, .. }) => transfer == Some(noted.transfer),
        _ => false,
    };
    if came {
        let qemu = local::attach(vm).await?;
        let status = match &qemu {
            Some(qemu) => Some(local::guest_status(vm, qemu).await?),
            None => None,
        };
        let next = Next::of(&noted, status.as_ref(), Live::load(vm)?.as_ref());
        tracing::info!(vm = %vm.name(), ?next, paused = noted.paused, "it came and was not seen to run");
        go(vm, next, qemu, noted.paused).await?;
    }
    Resuming::forget(vm)
}

async fn go(vm: &VmDir, next: Next, qemu: Option<Vm>, paused: bool) -> Result<()> {
    match (next, qemu) {
        (Next::Nothing, _) => return Ok(()),
        (Next::Resume, Some(qemu)) => local::resume_live(vm, &qemu).await?,
        (_, qemu) => {
            if let Some(qemu) = qemu {
                qemu.kill()
                    .await
                    .map_err(Error::host(format!("cannot stop {}", vm.name())))?;
            }
            let first = First::of(paused);
            local::start_locked(vm, Accelerator::Auto, first).await?;
        }
    }
    if !paused && let Err(error) = chance::release_unless_recorded(vm).await {
        tracing::warn!(
            error = error.chain(),
            "the guest's random numbers stay held"
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::local::tests::vm_with_generation;

    const TRANSFER: Id = Id([9; 16]);

    fn held(transfer: Option<Id>) -> Lease {
        Lease::Held { fence: 4, transfer }
    }

    #[test]
    fn a_vm_goes_on_from_where_its_agent_died() {
        let run = |ran| Live {
            generation: Some(3),
            overlays: Vec::new(),
            ran,
        };
        let next = |paused, qemu: Option<Status>, live: Option<&Live>| {
            Next::of(&Resuming::of(TRANSFER, paused), qemu.as_ref(), live)
        };
        for paused in [false, true] {
            assert_eq!(next(paused, None, None), Next::Start);
            assert_eq!(next(paused, None, Some(&run(false))), Next::Start);
            let loading = Some(Status::Incoming);
            assert_eq!(next(paused, loading, Some(&run(false))), Next::Start);
            // It ran, and is the user's: nobody starts it twice, and nothing of its disks goes.
            assert_eq!(next(paused, None, Some(&run(true))), Next::Nothing);
            let running = Some(Status::Running);
            assert_eq!(next(paused, running, Some(&run(true))), Next::Nothing);
            let off = Some(Status::Other("shutdown".into()));
            assert_eq!(next(paused, off, Some(&run(true))), Next::Nothing);
        }
        // What has loaded its state has lost nothing, also where it was noted that it runs.
        for ran in [false, true] {
            let loaded = Some(Status::Paused);
            assert_eq!(next(false, loaded.clone(), Some(&run(ran))), Next::Resume);
            assert_eq!(next(true, loaded, Some(&run(ran))), Next::Nothing);
        }
    }

    #[tokio::test]
    async fn what_did_not_come_is_not_gone_on_with() {
        let dir = tempfile::tempdir().unwrap();
        let vm = vm_with_generation(dir.path(), 3);
        let elsewhere = Lease::Elsewhere {
            fence: 3,
            owner: vm.store().identity().unwrap().key(),
            owner_name: "a".into(),
        };
        let other = held(Some(Id([8; 16])));
        for lease in [elsewhere, other, held(None)] {
            Resuming::of(TRANSFER, false).store(&vm).unwrap();
            lease.store(&vm.lease_path()).unwrap();
            go_on(&vm).await.unwrap();
            assert_eq!(Resuming::load(&vm).unwrap(), None, "{lease:?}");
        }
    }

    #[tokio::test]
    async fn nobody_goes_on_beside_whoever_is_at_work_and_what_fails_stays_noted() {
        let dir = tempfile::tempdir().unwrap();
        // A VM without a description can't be started.
        let vm = vm_with_generation(dir.path(), 3);
        let noted = Resuming::of(TRANSFER, false);
        noted.store(&vm).unwrap();
        held(Some(TRANSFER)).store(&vm.lease_path()).unwrap();
        let lock = vm.lock().unwrap();
        go_on(&vm).await.unwrap();
        drop(lock);
        assert_eq!(Resuming::load(&vm).unwrap().as_ref(), Some(&noted));
        go_on(&vm).await.unwrap_err();
        assert_eq!(Resuming::load(&vm).unwrap(), Some(noted));
    }
}
