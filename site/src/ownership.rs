//! The steps by which the right to run a VM moves, each in the order that keeps the right one.
//!
//! ```text
//! source: Held -> Offered, then asks -> Elsewhere, once it has heard "committed"
//! target: Elsewhere -> Held, then answers
//! source, where it did not hear: asks on a new line whether it was taken -> Elsewhere or Held
//! target: answers "not taken" only after it has made sure that it never will be (a void)
//! ```
//!
//! Each step is durable before the next begins; who dies between two has left a state from which
//! the rest can be found out. What talks is handed in, so that the very same steps are driven
//! through crashes and lost messages in tests, seed by seed.

use std::sync::{Mutex, PoisonError};

use crate::error::{Error, Result};
use crate::files;
use crate::identity::SiteKey;
use crate::lease::Lease;
use crate::store::{Store, VmDir};
use crate::vm::Id;

/// Held for the moment in which a hand-over is decided, one way or the other: the answer that it
/// never will take place and the lease that says that it did must not both be given. One agent
/// serves a state directory, so a lock of this process will do.
static DECIDING: Mutex<()> = Mutex::new(());

/// A VM that is to be another site's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Offer {
    /// The number that this site holds.
    pub fence: u64,
    /// The hand-over.
    pub transfer: Id,
    /// The target.
    pub to: SiteKey,
    /// Its name here.
    pub to_name: String,
    /// Whether the guest ran.
    pub was_running: bool,
}

/// Gives a VM away: `asked` has the target take it, and succeeds when that says that it did.
///
/// # Errors
/// Whatever failed, the lease says what is known. Where that is [`Lease::Offered`], the target is
/// to be asked, and [`decide`] is next.
pub(crate) async fn give(
    vm: &VmDir,
    offer: Offer,
    asked: impl Future<Output = Result<()>>,
) -> Result<()> {
    Lease::Offered {
        fence: offer.fence,
        transfer: offer.transfer,
        to: offer.to,
        to_name: offer.to_name.clone(),
        was_running: offer.was_running,
    }
    .store(&vm.lease_path())?;
    asked.await?;
    given(vm, offer)
}

fn given(vm: &VmDir, offer: Offer) -> Result<()> {
    Lease::Elsewhere {
        fence: offer.fence + 1,
        owner: offer.to,
        owner_name: offer.to_name,
    }
    .store(&vm.lease_path())
}

/// Whose a VM is that was in doubt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Settled {
    /// It is not in doubt any more, or never was.
    Known,
    /// It is here.
    Here {
        /// Whether the guest is to run again.
        was_running: bool,
    },
    /// It is the target's.
    Away,
}

/// The hand-over of which it is not known here whether it took place, if there is one.
pub(crate) fn offered(vm: &VmDir) -> Result<Option<Offer>> {
    Ok(match vm.lease()? {
        Lease::Offered {
            fence,
            transfer,
            to,
            to_name,
            was_running,
        } => Some(Offer {
            fence,
            transfer,
            to,
            to_name,
            was_running,
        }),
        Lease::Held { .. } | Lease::Elsewhere { .. } => None,
    })
}

/// Notes what the target answered: whether it took the VM. The VM's lock is held; while the
/// target was asked it need not have been, as an answer stands for ever.
pub(crate) fn decide(vm: &VmDir, offer: Offer, taken: bool) -> Result<Settled> {
    if offered(vm)?.as_ref() != Some(&offer) {
        // Somebody else has asked meanwhile.
        return Ok(Settled::Known);
    }
    if taken {
        given(vm, offer)?;
        return Ok(Settled::Away);
    }
    let Offer {
        fence, was_running, ..
    } = offer;
    Lease::Held {
        fence,
        transfer: None,
    }
    .store(&vm.lease_path())?;
    Ok(Settled::Here { was_running })
}

/// The step that decides: the VM is this site's, unless the source has given the hand-over up.
pub(crate) fn take(vm: &VmDir, transfer: Id, fence: u64) -> Result<()> {
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

/// Whether a hand-over took place that was offered under `fence`. If it did not, it never will.
///
/// The answer is durable before it is given: a lease that was written just before a crash may be
/// there to be read and still not outlive a power cut.
pub(crate) fn was_taken(vm: &VmDir, id: Id, transfer: Id, fence: u64) -> Result<bool> {
    let _deciding = DECIDING.lock().unwrap_or_else(PoisonError::into_inner);
    let known = vm.try_record()?.is_some_and(|record| record.id == id);
    let lease = if known { Some(vm.lease()?) } else { None };
    let by_lease = lease.filter(|lease| match lease {
        Lease::Held {
            transfer: Some(by),
            fence: held,
        } => *by == transfer || *held > fence,
        // It was taken, and handed on since.
        lease => lease.fence() > fence,
    });
    if let Some(lease) = by_lease {
        lease.store(&vm.lease_path())?;
        return Ok(true);
    }
    let deleted = vm.store().deleted_fence(id)?;
    let taken = deleted.is_some_and(|deleted| deleted > fence);
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

/// Forgets what was given up, which only an agent may that has just started: no conversation is
/// open that could still commit it.
pub(crate) fn forget_voids(store: &Store) -> Result<()> {
    files::remove_dir(&store.void_dir())
}

#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;
