//! What waits for its source while that can't be heard: forks that follow a VM in use, and working
//! copies of a VM whose move was cut off.
//!
//! A line that is cut costs a standby nothing but the time until the next call: it goes on with
//! what it has, the source sends what was recorded since, and nothing is replayed twice. So does a
//! copy into which pages came already. Either holds the VM's lock here and the memory of a guest,
//! so it is not kept for ever.
//!
//! While both processes live it mostly does not come to this: the conversation itself outlives
//! its connection, see [`crate::transport::lasting`].

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;

use super::Session;
use crate::admission::{may_stay, trusted};
use crate::error::{Error, Result};
use crate::identity::SiteKey;
use crate::line::TargetLine;
use crate::peers::Peer;
use crate::protocol::{Hello, Purpose};
use crate::transport::LineHandle;
use crate::vm::{Id, VmName};

/// How long a standby or a working copy waits for its source.
pub(super) const PATIENCE: Duration = Duration::from_secs(600);

/// How long a conversation may take to end that another call takes the place of.
const LET_GO: Duration = Duration::from_secs(10);

/// The standbys of an agent that wait for their sources, and the conversations that may become
/// such.
#[derive(Clone, Default)]
pub(crate) struct Standbys(Arc<Shared>);

#[derive(Default)]
struct Shared {
    parked: Mutex<HashMap<VmName, Parked>>,
    calls: Mutex<HashMap<CallId, Call>>,
    ended: Notify,
}

/// Who calls, and for which transfer.
pub(super) type CallId = (SiteKey, Id);

/// A conversation that goes on.
struct Call {
    vm: VmName,
    fence: u64,
    line: LineHandle,
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

    fn calls(&self) -> MutexGuard<'_, HashMap<CallId, Call>> {
        self.0.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a conversation that begins: its line is cut when another takes its place.
    pub(super) fn begin(&self, line: &TargetLine, hello: &Hello) -> CallId {
        let id = (line.peer().key, hello.transfer);
        let call = Call {
            vm: hello.vm.name.clone(),
            fence: hello.fence,
            line: line.handle(),
        };
        self.calls().insert(id, call);
        id
    }

    /// A conversation is over, and parked if it is to be.
    pub(super) fn end(&self, call: &CallId) {
        self.calls().remove(call);
        self.0.ended.notify_waiters();
    }

    /// Has conversations let go that this call takes the place of: of the same transfer, whose
    /// line is dead, if this site does not know it yet; and of the same VM, if their line is lost.
    async fn supersede(&self, peer: &Peer, hello: &Hello) {
        let in_the_way = |(key, transfer): &CallId, call: &Call| {
            let ours = *key == peer.key;
            let lost = call.vm == hello.vm.name && call.line.is_down();
            (ours && *transfer == hello.transfer) || (lost && (ours || call.fence < hello.fence))
        };
        let gone = async {
            loop {
                let ended = self.0.ended.notified();
                tokio::pin!(ended);
                // Before looking: an end in between is not missed.
                ended.as_mut().enable();
                let cut = {
                    let calls = self.calls();
                    let old = calls.iter().filter(|(id, call)| in_the_way(id, call));
                    old.map(|(_, call)| call.line.cut()).count()
                };
                if cut == 0 {
                    return;
                }
                ended.await;
            }
        };
        // Who does not let go holds the VM's lock, which says so.
        let _ = tokio::time::timeout(LET_GO, gone).await;
    }

    /// Keeps what a conversation has whose line was lost, for a while.
    pub(super) fn park(&self, session: Session) {
        self.park_for(session, PATIENCE);
    }

    /// The same, for so long.
    pub(super) fn park_for(&self, session: Session, patience: Duration) {
        let name = session.hello.vm.name.clone();
        tracing::info!(vm = %name, kept = ?session.kept(), "it waits here for another call");
        let peers = session.store.peers();
        let turn = Arc::new(());
        let parked = Parked {
            session: Box::new(session),
            turn: turn.clone(),
        };
        self.parked().insert(name.clone(), parked);
        // Whoever is trusted no longer may be so since the line was lost, when it was not here yet.
        self.retain(&trusted(&peers));
        let standbys = self.clone();
        tokio::spawn(async move {
            tokio::time::sleep(patience).await;
            let given_up = {
                let mut all = standbys.parked();
                let same = all
                    .get(&name)
                    .is_some_and(|parked| Arc::ptr_eq(&parked.turn, &turn));
                if same { all.remove(&name) } else { None }
            };
            if let Some(parked) = given_up {
                tracing::info!(vm = %name, "what waited here was not asked for again");
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
        self.supersede(peer, hello).await;
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
                        "{} is being moved here from another site; try again in {} minutes",
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
            return match session.go_on().await {
                Ok(()) => Ok(Some(session)),
                Err(error) => {
                    tracing::warn!(error = error.chain(), "what was kept here is of no use");
                    end(*session).await;
                    Ok(None)
                }
            };
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
