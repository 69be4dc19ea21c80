//! What a move that is under way has done to the VM at its source, written down before it is
//! done, so that whoever comes after a process that died can put it right.
//!
//! One small file in the VM's folder, made durable before each step that it speaks of: a write
//! ahead log of one record. It goes when the move ends in whatever way but one: when the line was
//! lost for too long, it stays, and names the transfer that the target keeps what it has for. The
//! step that decides is not noted here but in the [lease](crate::lease).

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::files;
use crate::identity::SiteKey;
use crate::lease::Lease;
use crate::local;
use crate::peers::Peer;
use crate::phase::Phase;
use crate::store::VmDir;
use crate::vm::Id;
use crate::work::Workplace;

/// The version of the file's form.
const VERSION: u32 = 1;

/// A move that has begun here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Moving {
    version: u32,
    /// Names it at both sites.
    pub transfer: Id,
    /// The target.
    pub to: SiteKey,
    /// Its name here, for messages.
    pub to_name: String,
    /// The fencing number under which it began.
    pub fence: u64,
    /// How far it came; [`Phase::Hello`], where there is nothing to put right.
    pub phase: Phase,
    /// Whether the guest ran, and was paused for it.
    pub paused: bool,
}

impl Moving {
    /// The move to this site: the one that was begun, if it can go on, or a new one.
    pub(crate) fn begin(vm: &VmDir, to: &Peer, fence: u64) -> Result<Self> {
        let begun = Self::load(vm)?.filter(|begun| to.had(&begun.to) && begun.fence == fence);
        let moving = match begun {
            Some(begun) => begun,
            None => Self::of(Id::random()?, to, fence),
        };
        moving.store(vm)?;
        Ok(moving)
    }

    /// A move that is to begin.
    pub(crate) fn of(transfer: Id, to: &Peer, fence: u64) -> Self {
        Self {
            version: VERSION,
            transfer,
            to: to.key,
            to_name: to.name.to_string(),
            fence,
            phase: Phase::Hello,
            paused: false,
        }
    }

    /// What is noted; nothing, where nothing is under way.
    pub(crate) fn load(vm: &VmDir) -> Result<Option<Self>> {
        let path = vm.moving_path();
        let Some(moving) = files::read_json::<Self>(&path)? else {
            return Ok(None);
        };
        if moving.version != VERSION {
            return Err(Error::Damaged {
                path,
                reason: format!(
                    "it is of version {}; this program reads version {VERSION}",
                    moving.version
                ),
            });
        }
        Ok(Some(moving))
    }

    /// Writes it down, durable when this returns.
    pub(crate) fn store(&self, vm: &VmDir) -> Result<()> {
        files::write_json(&vm.moving_path(), self)
    }

    /// It is over.
    pub(crate) fn forget(vm: &VmDir) -> Result<()> {
        files::remove_file(&vm.moving_path())
    }
}

/// Puts right what a process has left that died while it moved the VM, or took its state: the guest
/// that it paused goes on. Does nothing while one is at work, nor where there is nothing to put right.
///
/// Who owns a VM whose hand-over was cut off at its last step is another question, see
/// [`crate::source::settle`].
pub async fn recover(vm: &VmDir) -> Result<()> {
    local::still::recover(vm).await?;
    // Looked at without the lock, so that nobody is kept from work by somebody who only looks.
    if Moving::load(vm)?.is_none_or(|moving| moving.phase == Phase::Hello) {
        return Ok(());
    }
    // Held by whoever is at work.
    let Ok(_lock) = vm.lock() else {
        return Ok(());
    };
    let Some(moving) = Moving::load(vm)? else {
        return Ok(());
    };
    match vm.lease()? {
        Lease::Held { fence, .. } if fence == moving.fence => {}
        // To be settled first.
        Lease::Offered { .. } => return Ok(()),
        // It is past.
        _ => return Moving::forget(vm),
    }
    if moving.paused
        && let Some(qemu) = local::attach(vm).await?
    {
        tracing::warn!(
            vm = %vm.name(),
            to = moving.to_name,
            "a move was killed while the guest stood still; it goes on here"
        );
        local::resume_live(vm, &qemu).await?;
    }
    // A replay that went on beside it.
    Workplace::Incoming.clear(vm).await?;
    // The target may have kept what it has: the same command goes on with it.
    Moving {
        phase: Phase::Hello,
        paused: false,
        ..moving
    }
    .store(vm)
}

/// Waits a moment for whoever lets go of a VM right now that is another site's: they drive its
/// QEMU, which serves one at a time.
pub async fn let_others_finish(vm: &VmDir) -> Result<()> {
    let away = vm.try_record()?.is_some() && !matches!(vm.lease()?, Lease::Held { .. });
    if away && vm.runtime_dir("live")?.exists() {
        // Whoever takes longer is met as ever.
        let _ = vm.lock_soon().await;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Store;
    use crate::vm::VmRecord;

    fn vm(root: &std::path::Path, lease: &Lease) -> (VmDir, Peer) {
        let store = Store::open(root).unwrap();
        let vm = store.vm(&"desk".parse().unwrap());
        let record = VmRecord {
            disks: Vec::new(),
            ..VmRecord::example()
        };
        vm.create(&record, lease).unwrap();
        let key = store.identity().unwrap().key();
        let peer = Peer::new("b".parse().unwrap(), "127.0.0.1:1".parse().unwrap(), key);
        (vm, peer)
    }

    fn held(fence: u64) -> Lease {
        Lease::Held {
            fence,
            transfer: None,
        }
    }

    #[test]
    fn the_same_command_goes_on_and_another_begins_anew() {
        let dir = tempfile::tempdir().unwrap();
        let (vm, peer) = vm(dir.path(), &held(3));
        let first = Moving::begin(&vm, &peer, 3).unwrap();
        assert_eq!(Moving::begin(&vm, &peer, 3).unwrap(), first);
        let elsewhere = Peer {
            key: Store::open(dir.path().join("c"))
                .unwrap()
                .identity()
                .unwrap()
                .key(),
            ..peer.clone()
        };
        let other = Moving::begin(&vm, &elsewhere, 3).unwrap();
        assert_ne!(other.transfer, first.transfer);
        // A hand-over later it is another matter.
        assert_ne!(
            Moving::begin(&vm, &elsewhere, 5).unwrap().transfer,
            other.transfer
        );
    }

    #[tokio::test]
    async fn nothing_is_put_right_beside_whoever_is_at_work() {
        let dir = tempfile::tempdir().unwrap();
        let (vm, peer) = vm(dir.path(), &held(3));
        let mut moving = Moving::of(Id([9; 16]), &peer, 3);
        moving.paused = true;
        moving.phase = Phase::Stop;
        moving.store(&vm).unwrap();
        let lock = vm.lock().unwrap();
        recover(&vm).await.unwrap();
        assert_eq!(Moving::load(&vm).unwrap(), Some(moving.clone()));
        drop(lock);
        recover(&vm).await.unwrap();
        let left = Moving::load(&vm).unwrap().unwrap();
        assert!(!left.paused);
        assert_eq!(left.transfer, moving.transfer);
    }

    #[tokio::test]
    async fn what_was_handed_over_is_not_put_right() {
        let dir = tempfile::tempdir().unwrap();
        let (vm, peer) = vm(dir.path(), &held(3));
        let mut moving = Moving::of(Id([9; 16]), &peer, 3);
        moving.paused = true;
        moving.phase = Phase::Commit;
        moving.store(&vm).unwrap();
        let offered = Lease::Offered {
            fence: 3,
            transfer: moving.transfer,
            to: peer.key,
            to_name: "b".into(),
            was_running: true,
        };
        offered.store(&vm.lease_path()).unwrap();
        recover(&vm).await.unwrap();
        assert!(Moving::load(&vm).unwrap().is_some(), "to be settled first");
        held(9).store(&vm.lease_path()).unwrap();
        recover(&vm).await.unwrap();
        assert!(Moving::load(&vm).unwrap().is_none());
    }
}
