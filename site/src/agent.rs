//! A site's agent: listens for peers, and talks with each in a task of its own.

use std::net::SocketAddr;

use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::error::Result;
use crate::files::{self, FileLock};
use crate::line::TargetLine;
use crate::local;
use crate::source;
use crate::store::Store;
use crate::target::{self, Standbys};
use crate::transport::Listener;
use crate::work::Workplace;
use crate::{Error, transport};

/// An agent that listens.
pub struct Agent {
    store: Store,
    listener: Listener,
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
        let listener = Listener::bind(listen, &identity, store.peers()).await?;
        // No conversation is open yet that could still commit what was given up.
        files::remove_dir(&store.void_dir())?;
        for vm in store.vm_dirs()? {
            // Somebody who works on a VM right now also clears it.
            if let Ok(_lock) = vm.lock() {
                Workplace::Incoming.clear(&vm).await?;
                source::clear_following(&vm).await?;
                local::drop_stale_live(&vm).await?;
            }
        }
        Ok(Self {
            store: store.clone(),
            listener,
            _only: only,
        })
    }

    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.listener.local_addr()
    }

    /// Serves peers until `stop` ends; then conversations end, and what they hold is cleared.
    pub async fn run(mut self, stop: impl Future<Output = ()>) -> Result<()> {
        let token = CancellationToken::new();
        let mut conversations = JoinSet::new();
        let standbys = Standbys::default();
        tokio::pin!(stop);
        loop {
            tokio::select! {
                () = &mut stop => break,
                accepted = self.listener.accept() => {
                    let transport::Accepted { connection, peer } = accepted;
                    let line = TargetLine::over(connection, peer, token.child_token());
                    let store = self.store.clone();
                    let standbys = standbys.clone();
                    conversations.spawn(async move {
                        Box::pin(target::converse(&store, &standbys, line)).await;
                    });
                }
                Some(ended) = conversations.join_next() => {
                    if let Err(error) = ended {
                        tracing::error!(%error, "a conversation failed");
                    }
                }
            }
        }
        token.cancel();
        while let Some(ended) = conversations.join_next().await {
            if let Err(error) = ended {
                tracing::error!(%error, "a conversation failed");
            }
        }
        standbys.clear().await;
        Ok(())
    }
}
