//! What an agent does by itself: it puts right what a process that died has left of a move from
//! here, goes on with a VM that came and was not seen to run, finds out who owns a VM whose
//! hand-over was cut off, and asks once whether a VM that is held here was taken over elsewhere
//! while this site was gone.
//!
//! Nobody need type anything for any of it: a guest that a killed process paused goes on within a
//! second or so, and two agents that can talk agree on the owner.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use crate::error::{Error, Result};
use crate::generations::seen;
use crate::identity::SiteKey;
use crate::lease::Lease;
use crate::moving;
use crate::resuming;
use crate::source;
use crate::store::{Store, VmDir};
use crate::vm::VmName;

/// How often what lies here is looked at: two small files a VM.
const LOOK: Duration = Duration::from_secs(1);

/// Waits between calls to a site that does not answer: the first, and the longest.
const BACK_OFF: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(60)];

/// Calls that have failed, and when each is made again.
#[derive(Default)]
struct Calls(HashMap<(VmName, Option<SiteKey>), (Instant, Duration)>);

impl Calls {
    fn due(&self, what: &(VmName, Option<SiteKey>)) -> bool {
        self.0.get(what).is_none_or(|(at, _)| *at <= Instant::now())
    }

    fn note(&mut self, what: (VmName, Option<SiteKey>), done: bool) {
        if done {
            self.0.remove(&what);
            return;
        }
        let wait = match self.0.get(&what) {
            Some((_, wait)) => (*wait * 2).min(BACK_OFF[1]),
            None => BACK_OFF[0],
        };
        self.0.insert(what, (Instant::now() + wait, wait));
    }
}

/// Looks after the VMs of a site, until it is dropped.
pub(crate) async fn keep(store: Store) {
    let mut calls = Calls::default();
    let mut asked = HashSet::new();
    loop {
        match store.vms() {
            Ok(vms) => {
                for vm in vms {
                    if let Err(error) = look_after(&vm, &mut calls, &mut asked).await {
                        let vm = vm.name();
                        tracing::warn!(%vm, error = error.chain(), "it can't be looked after");
                    }
                }
            }
            Err(error) => tracing::warn!(error = error.chain(), "the VMs can't be listed"),
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Brings what is left of the disk images of a VM that has moved.
async fn bring_rest(vm: VmDir) {
    let never = CancellationToken::new();
    match source::supply(&vm, &crate::Silent, &never).await {
        Ok(None) => {}
        Ok(Some(_)) => tracing::info!(vm = %vm.name(), "all of its disk has gone where it runs"),
        Err(error) => {
            let (vm, error) = (vm.name(), error.chain());
            tracing::info!(%vm, error, "the rest of its disk can't be brought yet");
        }
    }
}

async fn look_after(
    vm: &VmDir,
    calls: &mut Calls,
    asked: &mut HashSet<(VmName, SiteKey)>,
) -> Result<()> {
    moving::recover(vm).await?;
    let what = (vm.name().clone(), None);
    if calls.due(&what) {
        let gone_on = resuming::go_on(vm).await;
        if gone_on.is_err() {
            calls.note(what, false);
        }
        gone_on?;
    }
    match vm.lease()? {
        Lease::Offered { .. } => {
            let what = (vm.name().clone(), None);
            if calls.due(&what) {
                let settled = source::settle_unattended(vm).await;
                if let Err(error) = &settled {
                    tracing::info!(
                        vm = %vm.name(),
                        error = error.chain(),
                        "who owns it can't be found out yet"
                    );
                }
                calls.note(what, settled.is_ok());
            }
        }
        Lease::Held { .. } => {
            for peer in seen::sites(vm)? {
                let what = (vm.name().clone(), Some(peer.key));
                let question = (vm.name().clone(), peer.key);
                if asked.contains(&question) || !calls.due(&what) {
                    continue;
                }
                let answered = match source::ask_whether_superseded(vm, &peer).await {
                    // It does not say, and will not another time.
                    Ok(()) | Err(Error::PeerRefused { .. }) => true,
                    Err(_) => false,
                };
                if answered {
                    asked.insert(question);
                }
                calls.note(what, answered);
            }
        }
        Lease::Elsewhere { .. } => {
            if let Some((site, _)) = source::owed(vm)?
                && let what = (vm.name().clone(), Some(site))
                && calls.due(&what)
            {
                // Should it fail, that is soon enough to try again; while it goes on, nobody else is let to it.
                calls.note(what, false);
                tokio::spawn(bring_rest(vm.clone()));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_does_not_answer_is_called_less_and_less() {
        let mut calls = Calls::default();
        let what: (VmName, Option<SiteKey>) = ("desk".parse().unwrap(), None);
        assert!(calls.due(&what));
        let mut waits = Vec::new();
        for _ in 0..10 {
            calls.note(what.clone(), false);
            assert!(!calls.due(&what));
            waits.push(calls.0[&what].1);
        }
        assert!(waits.is_sorted());
        assert_eq!(waits.last(), Some(&BACK_OFF[1]));
        calls.note(what.clone(), true);
        assert!(calls.due(&what));
    }
}
