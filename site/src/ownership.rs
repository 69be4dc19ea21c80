//! The steps by which the right to run a VM moves, each in the order that keeps the right one.
//!
//! ```text
//! source: Held -> Offered, then asks -> Elsewhere, once it has heard "committed"
//! target: Elsewhere -> Held, then answers
//! source, where it did not hear: asks on a new line whether it was taken -> Elsewhere or Held
//! target: answers "not taken" only after it has made sure that it never will be (a void)
//! ```
//!
//! With each hand-over goes a link of the VM's [`chain`](crate::chain), which the giver signs: by it
//! others see that it was one.
//!
//! Each step is durable before the next begins; who dies between two has left a state from which
//! the rest can be found out. What talks is handed in, so that the very same steps are driven
//! through crashes and lost messages in tests, seed by seed.

use std::sync::{Mutex, PoisonError};

use crate::chain::{Chain, Link};
use crate::error::{Error, Result};
use crate::files;
use crate::identity::SiteKey;
use crate::lease::{Lease, Title};
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

/// What shows that a VM is this site's, where it is: the chain of its hand-overs, up to the key that
/// this site has now. Elsewhere, what is known of it.
///
/// A VM that has none, of before there were any, begins one with the number that it has. So it does
/// where what is written down ends at another key (a key file that was lost, a folder that was
/// copied): others will want a person's word then.
pub(crate) fn proof(vm: &VmDir) -> Result<Chain> {
    let Title { lease, chain, .. } = vm.title()?;
    let Lease::Held { fence, .. } = lease else {
        return Ok(chain);
    };
    let identity = vm.store().identity()?;
    let mut whole = chain;
    if whole.fence() == Some(fence) && whole.succeed(&vm.store().new_keys()?, identity.key()) {
        return Ok(whole);
    }
    Ok(Chain::start(vm.record()?.id, fence, &identity))
}

/// Writes down the chain of a VM that has none, before the key goes with which it would begin.
pub(crate) fn begin_chain(vm: &VmDir) -> Result<()> {
    let lacks = |title: &Title| title.chain.is_empty() && matches!(title.lease, Lease::Held { .. });
    if !lacks(&vm.title()?) {
        return Ok(());
    }
    let _lock = vm.lock()?;
    let title = vm.title()?;
    if lacks(&title) {
        Title::new(title.lease, proof(vm)?).store(&vm.lease_path())?;
    }
    Ok(())
}

/// Gives a VM away: `asked` has the target take it by the link that says so, and succeeds when that
/// says that it did.
///
/// # Errors
/// Whatever failed, the lease says what is known. Where that is [`Lease::Offered`], the target is
/// to be asked, and [`decide`] is next.
pub(crate) async fn give(
    vm: &VmDir,
    offer: Offer,
    asked: impl AsyncFnOnce(Link) -> Result<()>,
) -> Result<()> {
    let mut chain = proof(vm)?;
    let link = chain
        .hand_over(vm.record()?.id, offer.to, &vm.store().identity()?)
        .filter(|link| link.before == offer.fence)
        .ok_or_else(|| Error::Refused(format!("{} is not this site's to give", vm.name())))?;
    let lease = Lease::Offered {
        fence: offer.fence,
        transfer: offer.transfer,
        to: offer.to,
        to_name: offer.to_name.clone(),
        was_running: offer.was_running,
    };
    let offered = Title::new(lease, chain);
    offered.store(&vm.lease_path())?;
    asked(link).await?;
    given(vm, offer, offered.chain)
}

fn given(vm: &VmDir, offer: Offer, chain: Chain) -> Result<()> {
    let lease = Lease::Elsewhere {
        fence: offer.fence + 1,
        owner: offer.to,
        owner_name: offer.to_name,
    };
    Title::new(lease, chain).store(&vm.lease_path())
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
    let mut chain = vm.title()?.chain;
    if taken {
        given(vm, offer, chain)?;
        return Ok(Settled::Away);
    }
    chain.take_back();
    let Offer {
        fence, was_running, ..
    } = offer;
    let held = Lease::Held {
        fence,
        transfer: None,
    };
    Title::new(held, chain).store(&vm.lease_path())?;
    Ok(Settled::Here { was_running })
}

/// The step that decides: the VM is this site's, unless the source has given the hand-over up. The
/// chain was checked, and ends here.
pub(crate) fn take(vm: &VmDir, transfer: Id, fence: u64, chain: Chain) -> Result<()> {
    let _deciding = DECIDING.lock().unwrap_or_else(PoisonError::into_inner);
    if is_void(vm, transfer) {
        return Err(Error::Refused(
            "this hand-over was given up meanwhile".into(),
        ));
    }
    let held = Lease::Held {
        fence,
        transfer: Some(transfer),
    };
    Title::new(held, chain).store(&vm.lease_path())
}

/// Whether a hand-over took place that was offered under `fence`. If it did not, it never will.
///
/// The answer is durable before it is given: a lease that was written just before a crash may be
/// there to be read and still not outlive a power cut.
pub(crate) fn was_taken(vm: &VmDir, id: Id, transfer: Id, fence: u64) -> Result<bool> {
    let _deciding = DECIDING.lock().unwrap_or_else(PoisonError::into_inner);
    let known = vm.try_record()?.is_some_and(|record| record.id == id);
    let title = if known { Some(vm.title()?) } else { None };
    let by_lease = title.filter(|title| match &title.lease {
        Lease::Held {
            transfer: Some(by),
            fence: held,
        } => *by == transfer || *held > fence,
        // It was taken, and handed on since.
        lease => lease.fence() > fence,
    });
    if let Some(title) = by_lease {
        title.store(&vm.lease_path())?;
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
mod lies;
#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;
