//! Standbys whose source can't be heard: forks that follow a VM in use, kept while the line to
//! its site is down.
//!
//! A line that is cut costs a standby nothing but the time until the next call: it goes on with
//! what it has, the source sends what was recorded since, and nothing is replayed twice. It holds
//! the VM's lock here and the memory of a guest, so it is not kept for ever.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::Session;
use crate::admission::may_stay;
use crate::error::{Error, Result};
use crate::identity::SiteKey;
use crate::peers::Peer;
use crate::protocol::{Hello, Purpose};
use crate::vm::{Id, VmName};

/// How long a standby waits for its source.
const PATIENCE: Duration = Duration::from_secs(600);

/// How long a conversation may take to end that another call takes the place of.
const LET_GO: Duration = Duration::from_secs(10);

/// The standbys of an agent that wait for their sources, and the conversations that may become
/// such.
#[derive(Clone, Default)]
pub(crate) struct Standbys(Arc<Shared>);

#[derive(Default)]
struct Shared {
    parked: Mutex<HashMap<VmName, Parked>>,
    calls: Mutex<HashMap<(SiteKey, Id), CancellationToken>>,
    ended: Notify,
}

struct Parked {
    session: Box<Session>,
    /// Tells this wait from a later one of the same standby.
    turn: Arc<()>,
}

impl Standbys {
    fn parked(&self) -> MutexGuard<'_, HashMap<VmName, Parked>> {
        // No code that holds the lock can leave the map half changed.
        self.0.parked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn calls(&self) -> MutexGuard<'_, HashMap<(SiteKey, Id), CancellationToken>> {
        self.0.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a conversation that begins; the token is cancelled when another takes its place.
    pub(super) fn begin(&self, peer: &Peer, transfer: Id) -> CancellationToken {
        let superseded = CancellationToken::new();
        self.calls()
            .insert((peer.key, transfer), superseded.clone());
        superseded
    }

    /// A conversation is over, and parked if it is to be.
    pub(super) fn end(&self, peer: &Peer, transfer: Id) {
        self.calls().remove(&(peer.key, transfer));
        self.0.ended.notify_waiters();
    }

    /// Has a conversation of the same transfer let go: its line is dead, if this site does not
    /// know it yet.
    async fn supersede(&self, peer: &Peer, transfer: Id) {
        let call = (peer.key, transfer);
        let gone = async {
            loop {
                let ended = self.0.ended.notified();
                tokio::pin!(ended);
                // Before looking: an end in between is not missed.
                ended.as_mut().enable();
                match self.calls().get(&call) {
                    None => return,
                    Some(token) => token.cancel(),
                }
                ended.await;
            }
        };
        // Who does not let go holds the VM's lock, which says so.
        let _ = tokio::time::timeout(LET_GO, gone).await;
    }

    /// Keeps a standby whose line was lost, for a while.
    pub(super) fn park(&self, session: Session) {
        let name = session.hello.vm.name.clone();
        tracing::info!(vm = %name, "its replay waits here for another call");
        let turn = Arc::new(());
        let parked = Parked {
            session: Box::new(session),
            turn: turn.clone(),
        };
        self.parked().insert(name.clone(), parked);
        let standbys = self.clone();
        tokio::spawn(async move {
            tokio::time::sleep(PATIENCE).await;
            let given_up = {
                let mut all = standbys.parked();
                let same = all
                    .get(&name)
                    .is_some_and(|parked| Arc::ptr_eq(&parked.turn, &turn));
                if same { all.remove(&name) } else { None }
            };
            if let Some(parked) = given_up {
                tracing::info!(vm = %name, "its replay was not asked for again");
                end(*parked.session).await;
            }
        });
    }

    /// The standby that this call goes on with, if there is one. One of another transfer makes
    /// way, if it may.
    pub(super) async fn resume(&self, peer: &Peer, hello: &Hello) -> Result<Option<Box<Session>>> {
        if !matches!(hello.purpose, Purpose::Migrate | Purpose::Seed) {
            return Ok(None);
        }
        hello.validate()?;
        self.supersede(peer, hello.transfer).await;
        let found = {
            let mut all = self.parked();
            let may = all.get(&hello.vm.name).map(|parked| {
                let old = &parked.session;
                old.peer.key == peer.key || old.hello.fence < hello.fence
            });
            match may {
                None => return Ok(None),
                Some(false) => {
                    return Err(Error::Refused(format!(
                        "{} is followed here from another site; try again in {} minutes",
                        hello.vm.name,
                        PATIENCE.as_secs() / 60
                    )));
                }
                Some(true) => all.remove(&hello.vm.name),
            }
        };
        let Some(Parked { mut session, .. }) = found else {
            return Ok(None);
        };
        if continues(&session.hello, hello) && session.peer.key == peer.key {
            session.hello = hello.clone();
            session.peer = peer.clone();
            return Ok(Some(session));
        }
        end(*session).await;
        Ok(None)
    }

    /// Ends those of sites that are trusted no longer, or may do less than when they called:
    /// `trusted` are those that are.
    pub(crate) fn retain(&self, trusted: &[Peer]) {
        let gone: Vec<Parked> = {
            let mut all = self.parked();
            all.extract_if(|_, parked| !may_stay(trusted, &parked.session.peer))
                .map(|(_, parked)| parked)
                .collect()
        };
        for parked in gone {
            tokio::spawn(end(*parked.session));
        }
    }

    /// Ends all: the agent stops.
    pub(crate) async fn clear(&self) {
        let all: Vec<Parked> = self.parked().drain().map(|(_, parked)| parked).collect();
        for parked in all {
            end(*parked.session).await;
        }
    }
}

/// Whether a call is of the same attempt to move the same VM. A new generation may have come.
fn continues(old: &Hello, new: &Hello) -> bool {
    new.purpose == Purpose::Migrate
        && old.transfer == new.transfer
        && old.vm == new.vm
        && old.fence == new.fence
}

async fn end(mut session: Session) {
    let vm = session.hello.vm.name.clone();
    if let Err(error) = session.clean().await {
        tracing::error!(%vm, error = error.chain(), "could not clean up");
    }
}
