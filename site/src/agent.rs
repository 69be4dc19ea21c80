//! A site's agent: listens for peers, and talks with each in a task of its own. Meanwhile it looks
//! after what lies here, see [`crate::keeper`].

use std::net::SocketAddr;
use std::time::Duration;

use tokio::task::{Id as TaskId, JoinError, JoinSet};
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use crate::admission::{Admitted, MOST_CALLS};
use crate::arriving::Arrivals;
use crate::error::Result;
use crate::files::FileLock;
use crate::generations;
use crate::hub;
use crate::keeper;
use crate::leftovers;
use crate::line::TargetLine;
use crate::local;
use crate::ownership;
use crate::peers::PeerWatch;
use crate::retention;
use crate::source;
use crate::store::Store;
use crate::target::{self, Standbys};
use crate::transport::{Conversations, Listener};
use crate::{Error, transport};

/// How often logs are looked for that are too old.
const TIDY: Duration = Duration::from_secs(3600);

/// An agent that listens.
pub struct Agent {
    store: Store,
    listener: Listener,
    watch: PeerWatch,
    standbys: Standbys,
    arrivals: Arrivals,
    keep_logs: Option<Duration>,
    keep_generations: usize,
    hub_room: u64,
    _only: FileLock,
}

impl Agent {
    /// Opens the port, and clears away what an agent that died has left.
    pub async fn bind(store: &Store, listen: &str) -> Result<Self> {
        let only = store.agent_lock()?.ok_or_else(|| {
            Error::Refused(format!(
                "an agent serves {} already; stop it first",
                store.root().display()
            ))
        })?;
        let identity = store.identity()?;
        let watch = store.peers().watch()?;
        let listener = Listener::bind(listen, &identity, store.peers()).await?;
        let standbys = Standbys::default();
        for vm in store.vm_dirs()? {
            // Somebody who works on a VM right now also clears it.
            if let Ok(_lock) = vm.lock() {
                source::clear_following(&vm).await?;
                source::clear_packing(&vm).await?;
                local::drop_stale_live(&vm).await?;
            }
            target::revive(&vm, &standbys).await?;
        }
        leftovers::clear(store)?;
        hub::clear(store)?;
        let arrivals = Arrivals::default();
        arrivals.revive(store)?;
        // No conversation is open yet, nor kept, that could still commit what was given up.
        ownership::forget_voids(store)?;
        Ok(Self {
            store: store.clone(),
            listener,
            watch,
            standbys,
            arrivals,
            keep_logs: None,
            keep_generations: usize::MAX,
            hub_room: hub::DEFAULT_ROOM,
            _only: only,
        })
    }

    /// Has it delete logs that began longer ago than this; all are kept without a limit.
    #[must_use]
    pub fn keep_logs(self, limit: Option<Duration>) -> Self {
        Self {
            keep_logs: limit,
            ..self
        }
    }

    /// Of a VM that another site has, and ships generations of here: keep so many of the newest,
    /// besides those that somebody relies on. All are kept without a limit.
    #[must_use]
    pub fn keep_generations(self, limit: usize) -> Self {
        Self {
            keep_generations: limit,
            ..self
        }
    }

    /// Has it give so many bytes to what it holds for other sites; none, and it is no hub.
    #[must_use]
    pub fn hub_room(self, bytes: u64) -> Self {
        Self {
            hub_room: bytes,
            ..self
        }
    }

    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.listener.local_addr()
    }

    /// Serves peers until `stop` ends; then conversations end, and what they hold is cleared.
    pub async fn run(mut self, stop: impl Future<Output = ()>) -> Result<()> {
        let token = CancellationToken::new();
        let mut conversations = JoinSet::new();
        let mut admitted = Admitted::default();
        let known = Conversations::default();
        let standbys = self.standbys.clone();
        let keeper = tokio::spawn(keeper::keep(self.store.clone()));
        let mut tidy = tokio::time::interval(TIDY);
        tidy.set_missed_tick_behavior(MissedTickBehavior::Delay);
        tokio::pin!(stop);
        let outcome = loop {
            tokio::select! {
                () = &mut stop => break Ok(()),
                changed = self.watch.changed() => match changed {
                    Ok(()) => standbys.retain(&admitted.review(&self.store.peers())),
                    Err(error) => {
                        let list = self.store.root().join("peers.json");
                        break Err(Error::file("watch", &list)(error));
                    }
                },
                _ = tidy.tick(), if self.keep_logs.is_some() => {
                    let (store, limit) = (self.store.clone(), self.keep_logs);
                    // Of no interest to anybody here when it is done, and soon done.
                    tokio::task::spawn_blocking(move || {
                        if let Some(limit) = limit {
                            retention::prune_all(&store, limit);
                        }
                    });
                }
                accepted = self.listener.accept() => {
                    let transport::Accepted { connection, peer } = accepted;
                    let revoked = CancellationToken::new();
                    let room = admitted.has_room_for(peer.key);
                    let (store, stop) = (self.store.clone(), token.child_token());
                    let (known, standbys) = (known.clone(), standbys.clone());
                    let arrivals = self.arrivals.clone();
                    let (keep, hub_room) = (self.keep_generations, self.hub_room);
                    let (who, ends) = (peer.clone(), revoked.clone());
                    let task = conversations.spawn(async move {
                        // Nothing, where it carries on a conversation that has its task.
                        let Some(lasting) = known.admit(connection).await else {
                            return;
                        };
                        let line = TargetLine::over(lasting, who, stop, ends);
                        if room {
                            let talk = Box::pin(target::converse(&store, &standbys, &arrivals, hub_room, line));
                            if let Some(name) = talk.await {
                                generations::tidy_standby(&store.vm(&name), keep).await;
                            }
                        } else {
                            line.turn_away(&too_many()).await;
                        }
                    });
                    admitted.begin(task.id(), peer, revoked);
                    // What was changed between the handshake and now.
                    admitted.review(&self.store.peers());
                }
                Some(ended) = conversations.join_next_with_id() => over(&mut admitted, ended),
            }
        };
        token.cancel();
        keeper.abort();
        while let Some(ended) = conversations.join_next_with_id().await {
            over(&mut admitted, ended);
        }
        standbys.clear().await;
        outcome
    }
}

/// A conversation is over, in whatever way.
fn over(admitted: &mut Admitted, ended: Result<(TaskId, ()), JoinError>) {
    let id = match ended {
        Ok((id, ())) => id,
        Err(error) => {
            tracing::error!(%error, "a conversation failed");
            error.id()
        }
    };
    admitted.end(id);
}

fn too_many() -> Error {
    Error::Refused(format!(
        "this site talks with another about {MOST_CALLS} VMs at a time and no more: wait until \
         one of them has moved"
    ))
}

#[cfg(test)]
mod tests;
