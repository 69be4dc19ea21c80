//! What this site knows of the generations that its peers have: one small note a VM and peer.
//!
//! A peer that comes back, or is come back to, is quick because both sites still have a
//! generation in common. Which one that is comes out in every conversation; it is noted so that
//! pruning, which talks to nobody, leaves it alone.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::files;
use crate::generation::GenerationId;
use crate::identity::SiteKey;
use crate::peers::Peer;
use crate::store::VmDir;

/// What a peer has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Seen {
    /// The newest generation of this site that it said it has.
    has: Option<GenerationId>,
    /// The one that it was to keep when the VM came from there: it had not done so when it was
    /// last heard, and may not have been able to.
    expected: Option<GenerationId>,
}

impl Seen {
    /// The generations that the peer may go back to.
    pub(crate) fn generations(&self) -> impl Iterator<Item = GenerationId> {
        self.has.into_iter().chain(self.expected)
    }

    /// What is known of a peer, under the key that it has or, where it was not met since, had.
    pub(crate) fn of(vm: &VmDir, peer: &Peer) -> Result<Self> {
        let former = peer.former.iter().rev();
        for key in std::iter::once(&peer.key).chain(former) {
            let seen = Self::load(vm, key)?;
            if seen != Self::default() {
                return Ok(seen);
            }
        }
        Ok(Self::default())
    }

    /// What is known of a peer by its key; nothing, where it was never met.
    pub(crate) fn load(vm: &VmDir, peer: &SiteKey) -> Result<Self> {
        Ok(files::read_json(&path(vm, peer))?.unwrap_or_default())
    }

    fn store(self, vm: &VmDir, peer: &SiteKey) -> Result<()> {
        if self == Self::load(vm, peer)? {
            return Ok(());
        }
        let path = path(vm, peer);
        files::make_dir(path.parent().unwrap_or(Path::new(".")))?;
        files::write_json(&path, &self)
    }
}

fn path(vm: &VmDir, peer: &SiteKey) -> PathBuf {
    vm.dir().join("seen").join(format!("{peer}.json"))
}

/// The trusted sites that are known to have a generation of a VM.
pub(crate) fn sites(vm: &VmDir) -> Result<Vec<Peer>> {
    let mut sites = Vec::new();
    for peer in vm.store().peers().list()? {
        if Seen::load(vm, &peer.key)?.generations().next().is_some() {
            sites.push(peer);
        }
    }
    Ok(sites)
}

/// A peer said, at the beginning of a conversation, what it has in common with this site.
pub(crate) fn met(vm: &VmDir, peer: &Peer, common: &[GenerationId]) -> Result<()> {
    let has = common.iter().copied().max_by_key(|id| id.number);
    let expected = None;
    Seen { has, expected }.store(vm, &peer.key)
}

/// A peer has this generation too: it was sent there or here, and is durable at both sites.
pub(crate) fn shared(vm: &VmDir, peer: &Peer, generation: GenerationId) -> Result<()> {
    let mut seen = Seen::load(vm, &peer.key)?;
    if seen.has.is_none_or(|has| has.number <= generation.number) {
        seen.has = Some(generation);
    }
    seen.store(vm, &peer.key)
}

/// What a peer has by the word that a hub has of it, which may be an old one, and what lies there for
/// it, or is about to.
pub(crate) fn by_hub(
    vm: &VmDir,
    peer: &Peer,
    has: Option<GenerationId>,
    coming: GenerationId,
) -> Result<()> {
    let mut seen = Seen::load(vm, &peer.key)?;
    let known = seen.has.into_iter().chain(has);
    seen.has = known.max_by_key(|id| id.number);
    seen.expected = Some(coming);
    seen.store(vm, &peer.key)
}

/// Whether a peer is known to have a generation.
pub(crate) fn is_standby(vm: &VmDir, peer: &Peer) -> Result<bool> {
    Ok(Seen::load(vm, &peer.key)?.generations().next().is_some())
}

/// The VM came from a peer with this generation, which the peer keeps if it can.
pub(crate) fn came_with(vm: &VmDir, peer: &Peer, generation: GenerationId) -> Result<()> {
    let mut seen = Seen::load(vm, &peer.key)?;
    seen.expected = Some(generation);
    seen.store(vm, &peer.key)
}

/// A note that can't be written costs a later way back some bytes; it stops no hand-over that was
/// decided.
pub(crate) fn warn_unnoted(noted: Result<()>) {
    if let Err(error) = noted {
        tracing::warn!(
            error = error.chain(),
            "what the other site has was not noted"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(number: u64) -> GenerationId {
        GenerationId {
            number,
            digest: [number as u8; 32],
        }
    }

    #[test]
    fn what_a_peer_has_is_known_under_its_new_key() {
        let dir = tempfile::tempdir().unwrap();
        let store = crate::store::Store::open(dir.path()).unwrap();
        let vm = store.vm(&"desk".parse().unwrap());
        let key = |text: &str| SiteKey::of_spki(text.as_bytes());
        let addr = "127.0.0.1:1".parse().unwrap();
        let mut peer = Peer::new("b".parse().unwrap(), addr, key("old"));
        met(&vm, &peer, &[id(3)]).unwrap();
        peer.former = vec![peer.key];
        peer.key = key("new");
        let known = |peer| {
            let seen = Seen::of(&vm, peer).unwrap();
            seen.generations().map(|id| id.number).collect::<Vec<_>>()
        };
        assert_eq!(known(&peer), [3]);
        met(&vm, &peer, &[id(5)]).unwrap();
        assert_eq!(known(&peer), [5]);
    }

    #[test]
    fn what_a_peer_has_is_what_it_said_last() {
        let dir = tempfile::tempdir().unwrap();
        let store = crate::store::Store::open(dir.path()).unwrap();
        let vm = store.vm(&"desk".parse().unwrap());
        let peer = Peer::new(
            "b".parse().unwrap(),
            "127.0.0.1:1".parse().unwrap(),
            store.identity().unwrap().key(),
        );
        let known = || {
            let seen = Seen::load(&vm, &peer.key).unwrap();
            seen.generations().map(|id| id.number).collect::<Vec<_>>()
        };
        met(&vm, &peer, &[]).unwrap();
        assert!(!vm.dir().exists(), "there is nothing to note");
        met(&vm, &peer, &[id(1), id(3), id(2)]).unwrap();
        assert_eq!(known(), [3]);
        shared(&vm, &peer, id(2)).unwrap();
        assert_eq!(
            known(),
            [3],
            "an older one that was sent makes no difference"
        );
        came_with(&vm, &peer, id(4)).unwrap();
        assert_eq!(known(), [3, 4]);
        // Its keeping of 4 failed.
        met(&vm, &peer, &[id(3)]).unwrap();
        assert_eq!(known(), [3]);
        shared(&vm, &peer, id(5)).unwrap();
        assert_eq!(known(), [5]);
        // It has removed the VM.
        met(&vm, &peer, &[]).unwrap();
        assert!(known().is_empty());
    }
}
