//! Who is in: the conversations that an agent has open, bounded for each peer, and ended at once
//! when their peer is trusted no longer or may do less than when it came.
//!
//! A list of peers that can't be read or believed trusts nobody, here as at the handshake.

use std::collections::HashMap;

use tokio::task::Id as TaskId;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::error::Result;
use crate::identity::SiteKey;
use crate::peers::{Peer, PeerStore};

/// Conversations that a peer may have open at a time: one for each VM that moves, is seeded or is
/// followed, and those that ask.
pub(crate) const MOST_CALLS: usize = 32;

/// Whether a peer that came in as `then` may stay.
pub(crate) fn may_stay(now: &[Peer], then: &Peer) -> bool {
    let same = now.iter().find(|peer| peer.key == then.key);
    same.is_some_and(|peer| peer.may.cover(&then.may))
}

/// The peers as they are now; none, where the list can't be believed.
pub(crate) fn trusted(peers: &PeerStore) -> Vec<Peer> {
    peers.list().unwrap_or_else(|error| {
        let error = crate::chain_of(&error);
        tracing::error!(error, "nobody is trusted: the list of sites is of no use");
        Vec::new()
    })
}

/// The conversations of an agent.
#[derive(Debug, Default)]
pub(crate) struct Admitted(HashMap<TaskId, (Peer, CancellationToken)>);

impl Admitted {
    /// Whether this peer may have one more.
    pub(crate) fn has_room_for(&self, key: SiteKey) -> bool {
        let open = self.0.values().filter(|(peer, _)| peer.key == key).count();
        open < MOST_CALLS
    }

    /// Notes a conversation, which ends when `revoked` is cancelled.
    pub(crate) fn begin(&mut self, task: TaskId, peer: Peer, revoked: CancellationToken) {
        self.0.insert(task, (peer, revoked));
    }

    /// A conversation is over.
    pub(crate) fn end(&mut self, task: TaskId) {
        self.0.remove(&task);
    }

    /// Ends the conversations of those who are trusted no longer; who still is.
    pub(crate) fn review(&self, peers: &PeerStore) -> Vec<Peer> {
        let now = trusted(peers);
        for (peer, revoked) in self.0.values() {
            if !may_stay(&now, peer) && !revoked.is_cancelled() {
                tracing::warn!(peer = %peer.name, "trusted no longer, or with less: cut off");
                revoked.cancel();
            }
        }
        now
    }
}

/// Watches over one conversation that this site began, until it is dropped.
#[derive(Debug)]
pub(crate) struct Guarded {
    /// Cancelled when the peer is trusted no longer, or may do less.
    pub(crate) revoked: CancellationToken,
    _watching: DropGuard,
}

impl Guarded {
    /// Watches over a conversation with this peer.
    pub(crate) fn begin(peers: &PeerStore, peer: &Peer) -> Result<Self> {
        let mut watch = peers.watch()?;
        let (revoked, over) = (CancellationToken::new(), CancellationToken::new());
        let guarded = Self {
            revoked: revoked.clone(),
            _watching: over.clone().drop_guard(),
        };
        let (peers, peer) = (peers.clone(), peer.clone());
        tokio::spawn(async move {
            loop {
                // Looked at first: it may have changed before it was watched.
                if !may_stay(&trusted(&peers), &peer) {
                    return revoked.cancel();
                }
                tokio::select! {
                    changed = watch.changed() => if let Err(error) = changed {
                        tracing::error!(%error, "the list of sites can't be watched any more");
                        return revoked.cancel();
                    },
                    () = over.cancelled() => return,
                }
            }
        });
        Ok(guarded)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(name: &str, may: &str) -> Peer {
        let mut peer = Peer::new(
            name.parse().unwrap(),
            "127.0.0.1:1".parse().unwrap(),
            SiteKey::of_spki(name.as_bytes()),
        );
        peer.may = may.parse().unwrap();
        peer
    }

    fn store() -> (tempfile::TempDir, PeerStore) {
        let dir = tempfile::tempdir().unwrap();
        let store = PeerStore::new(dir.path());
        (dir, store)
    }

    async fn task() -> TaskId {
        let task = tokio::spawn(async {});
        let id = task.id();
        task.await.unwrap();
        id
    }

    #[tokio::test]
    async fn a_peer_has_only_so_many_conversations() {
        let mut admitted = Admitted::default();
        let (office, home) = (peer("office", "send"), peer("home", "send"));
        let mut last = None;
        for _ in 0..MOST_CALLS {
            assert!(admitted.has_room_for(office.key));
            let id = task().await;
            admitted.begin(id, office.clone(), CancellationToken::new());
            last = Some(id);
        }
        assert!(!admitted.has_room_for(office.key));
        assert!(admitted.has_room_for(home.key), "another is not kept out");
        admitted.end(last.unwrap());
        assert!(admitted.has_room_for(office.key));
    }

    #[tokio::test]
    async fn who_is_trusted_no_longer_or_with_less_is_cut_off() {
        let (_dir, peers) = store();
        let mut admitted = Admitted::default();
        let mut tokens = Vec::new();
        for name in ["gone", "less", "more", "rekeyed"] {
            let peer = peer(name, "send,receive");
            peers.trust(peer.clone(), None).unwrap();
            let token = CancellationToken::new();
            admitted.begin(task().await, peer, token.clone());
            tokens.push(token);
        }
        let ended = || {
            let ended = tokens.iter().map(CancellationToken::is_cancelled);
            ended.collect::<Vec<_>>()
        };
        assert_eq!(admitted.review(&peers).len(), 4);
        assert_eq!(ended(), [false; 4]);
        peers.remove(&"gone".parse().unwrap()).unwrap();
        let may = |text: &str| Some(text.parse().unwrap());
        peers.trust(peer("less", "send"), may("send")).unwrap();
        let all = may("send,receive,follow");
        peers.trust(peer("more", "send"), all).unwrap();
        let mut rekeyed = peer("rekeyed", "send,receive");
        rekeyed.key = SiteKey::of_spki(b"another");
        peers.trust(rekeyed, None).unwrap();
        admitted.review(&peers);
        assert_eq!(ended(), [true, true, false, true]);
    }

    #[tokio::test]
    async fn a_list_that_cannot_be_believed_lets_nobody_stay() {
        let (dir, peers) = store();
        let office = peer("office", "send");
        peers.trust(office.clone(), None).unwrap();
        let guarded = Guarded::begin(&peers, &office).unwrap();
        tokio::task::yield_now().await;
        assert!(!guarded.revoked.is_cancelled());
        std::fs::write(dir.path().join("peers.json"), "{").unwrap();
        guarded.revoked.cancelled().await;
    }

    #[tokio::test]
    async fn a_change_before_it_was_watched_counts() {
        let (_dir, peers) = store();
        let office = peer("office", "send");
        let guarded = Guarded::begin(&peers, &office).unwrap();
        guarded.revoked.cancelled().await;
    }
}
