//! How a VM came to be where it is: a chain of hand-overs, each signed by the site that gave.
//!
//! A fencing number alone is a claim: whoever is trusted could name a higher one. So each hand-over
//! is a [`Link`], signed with the giver's Ed25519 site key over the VM, the numbers before and
//! after, the taker's key and the hash of the link before it. A site keeps the chain beside its
//! lease, shows it with each offer, and takes a VM that it knows only along a chain that goes on
//! from the last link that it has seen: that one names who has the VM by what is known here, and
//! nobody else can sign the next. What a chain proves, it proves to whoever knew the VM before; who
//! never saw it takes what is consistent in itself.
//!
//! Links that are no hand-overs say so: [`Step::Start`] is the first of all, [`Step::NewKey`]
//! is how a site's key is followed by its next one, and [`Step::Takeover`] is `vm takeover`, which
//! nobody gave and the taker signs by themselves. That one proves nothing but who said so; whether
//! it is believed is asked elsewhere ([`Way::On`] lists them).
//!
//! Promised: what is read from others is bounded before it takes memory ([`Chain::MOST`] links of
//! some 140 bytes), and nothing is believed of a chain that was not checked as a whole ([`Proven`]).
//! Not promised: that a site does not sign two links in a row to different sites, as a site that
//! lies can; but both bear its signature.
//!
//! Ed25519 is RFC 8032's, by *ring*; hashes are BLAKE3's `derive_key`.

use std::collections::HashMap;

use serde::de::{SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use crate::identity::{Identity, NewKey, PublicKey, Signature, SiteKey, hex_or_bytes};
use crate::peers::Peer;
use crate::protocol::Hello;
use crate::vm::Id;

/// What is signed begins with it, so that no signature of another kind is one of these.
const SIGNED: &[u8] = b"replay-migrate hand-over 1";
/// The context of `derive_key` for a link's hash.
const HASHED: &str = "replay-migrate 2026-11 link of a chain of hand-overs";

/// The hash of a link, and by that of all before it; zeros where there is none.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct LinkHash([u8; 32]);
hex_or_bytes!(
    LinkHash,
    32,
    "the hash of a hand-over is 64 hexadecimal digits"
);

/// What kind of step a link is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// The VM was made here, or was here when its chain began.
    Start,
    /// Given by the site that had it, which signs.
    HandOver,
    /// Taken without being given, because the site that had it is lost. The taker signs.
    Takeover,
    /// The site that has it goes by another key. The old one signs, once for all VMs.
    NewKey,
}

/// One step of a VM from a site to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Link {
    /// What kind.
    pub step: Step,
    /// The fencing number before; 0 at the start.
    pub before: u64,
    /// The fencing number from here on.
    pub after: u64,
    /// Who signs.
    pub by: PublicKey,
    /// Who has the VM from here on.
    pub to: SiteKey,
    /// Of all this, the VM and the hash of the link before.
    pub signature: Signature,
}

impl Link {
    /// Signs a step.
    fn sign(vm: Id, last: &LinkHash, terms: Terms, identity: &Identity) -> Self {
        let Terms {
            step,
            before,
            after,
            to,
        } = terms;
        let mut link = Self {
            step,
            before,
            after,
            by: identity.public(),
            to,
            signature: Signature::NONE,
        };
        link.signature = identity.sign(&link.signed(vm, last));
        link
    }

    fn signed(&self, vm: Id, last: &LinkHash) -> Vec<u8> {
        let step = match self.step {
            Step::Start => 0,
            Step::HandOver => 1,
            Step::Takeover => 2,
            Step::NewKey => 3,
        };
        [
            SIGNED,
            &vm.0,
            &last.0,
            &[step],
            &self.before.to_le_bytes(),
            &self.after.to_le_bytes(),
            self.by.key().as_bytes(),
            self.to.as_bytes(),
        ]
        .concat()
    }

    fn hash(&self, vm: Id, last: &LinkHash) -> LinkHash {
        LinkHash(blake3::derive_key(HASHED, &self.signed(vm, last)))
    }

    fn is_signed(&self, vm: Id, last: &LinkHash) -> bool {
        match self.step {
            Step::NewKey => self.as_new_key().holds(),
            _ => self.by.verify(&self.signed(vm, last), &self.signature),
        }
    }

    fn as_new_key(&self) -> NewKey {
        NewKey {
            by: self.by,
            to: self.to,
            signature: self.signature,
        }
    }

    /// Whether it may follow on `last`, or begin what is shown where there is none.
    fn follows(&self, last: Option<&Self>) -> bool {
        let signer = self.by.key();
        let from_owner = last.is_none_or(|last| last.to == signer);
        let step = match self.step {
            Step::Start => last.is_none() && self.before == 0 && self.to == signer,
            Step::HandOver => from_owner && self.before.checked_add(1) == Some(self.after),
            Step::Takeover => self.before < self.after && self.to == signer,
            Step::NewKey => from_owner && self.before == self.after,
        };
        step && last.is_none_or(|last| last.after == self.before) && self.after < Hello::NUMBERS
    }
}

/// What a link says, beside who signs.
#[derive(Clone, Copy)]
struct Terms {
    step: Step,
    before: u64,
    after: u64,
    to: SiteKey,
}

/// The last links of a VM's chain, oldest first. Empty for a VM of before there were any.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chain {
    /// The hash of the link before the first; zeros where that one is a start.
    last_before: LinkHash,
    #[serde(deserialize_with = "bounded")]
    links: Vec<Link>,
}

/// As many links as a chain may have, and no more memory than for those that came.
fn bounded<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Link>, D::Error> {
    struct Links;
    impl<'de> Visitor<'de> for Links {
        type Value = Vec<Link>;

        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            write!(f, "at most {} hand-overs", Chain::MOST)
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
            let mut links = Vec::new();
            while let Some(link) = seq.next_element()? {
                if links.len() == Chain::MOST {
                    return Err(serde::de::Error::invalid_length(links.len() + 1, &self));
                }
                links.push(link);
            }
            Ok(links)
        }
    }
    deserializer.deserialize_seq(Links)
}

/// Why a chain is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// There is none at all.
    #[error("no hand-over was shown")]
    Empty,
    /// A link does not follow on the one before.
    #[error("link {at} of the chain of hand-overs doesn't follow on the one before")]
    Broken {
        /// Counted from 1.
        at: usize,
    },
    /// A link is not signed by who it says, or was of another VM or another chain.
    #[error("link {at} of the chain of hand-overs isn't signed by the site that it names")]
    Signature {
        /// Counted from 1.
        at: usize,
    },
}

impl Chain {
    /// A chain that is kept or shown has no more links; of a longer one, the newest.
    pub const MOST: usize = 1024;

    /// A chain that begins here: this site has the VM, under this number.
    pub fn start(vm: Id, fence: u64, identity: &Identity) -> Self {
        let mut chain = Self::default();
        chain.extend(
            vm,
            Terms {
                step: Step::Start,
                before: 0,
                after: fence,
                to: identity.key(),
            },
            identity,
        );
        chain
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.links.is_empty()
    }

    /// Its links, oldest first.
    pub fn links(&self) -> &[Link] {
        &self.links
    }

    /// Who has the VM, by what it says.
    pub fn owner(&self) -> Option<SiteKey> {
        Some(self.links.last()?.to)
    }

    /// The number under which they have it.
    pub fn fence(&self) -> Option<u64> {
        Some(self.links.last()?.after)
    }

    /// Gives the VM to another site: the link that says so, which is the last from here on; nothing, if
    /// nobody has it.
    pub fn hand_over(&mut self, vm: Id, to: SiteKey, identity: &Identity) -> Option<Link> {
        let before = self.fence()?;
        let terms = Terms {
            step: Step::HandOver,
            before,
            after: before + 1,
            to,
        };
        self.extend(vm, terms, identity);
        self.links.last().copied()
    }

    /// Takes the VM without being given it.
    /// `known` is the number known of a VM without a chain.
    pub fn take_over(&mut self, vm: Id, known: u64, fence: u64, identity: &Identity) {
        let terms = Terms {
            step: Step::Takeover,
            before: self.fence().unwrap_or(known),
            after: fence,
            to: identity.key(),
        };
        self.extend(vm, terms, identity);
    }

    /// Adds how the owner's key was followed by others, up to this one; whether it was.
    pub(crate) fn succeed(&mut self, keys: &[NewKey], to: SiteKey) -> bool {
        let Some((mut owner, fence)) = self.owner().zip(self.fence()) else {
            return false;
        };
        let mut links = Vec::new();
        while owner != to {
            // The last, where a rotation was cut off before the key it spoke of was there.
            let known = keys.iter().rev().find(|new| new.by.key() == owner);
            let Some(new) = known.filter(|_| links.len() < keys.len()) else {
                return false;
            };
            owner = new.to;
            links.push(Link {
                step: Step::NewKey,
                before: fence,
                after: fence,
                by: new.by,
                to: new.to,
                signature: new.signature,
            });
        }
        self.links.extend(links);
        true
    }

    /// Takes back the last link, which came to nothing.
    pub(crate) fn take_back(&mut self) {
        self.links.pop();
    }

    fn extend(&mut self, vm: Id, terms: Terms, identity: &Identity) {
        let last = self.hashes(vm).last().unwrap_or(self.last_before);
        self.links.push(Link::sign(vm, &last, terms, identity));
    }

    /// Drops the oldest links of a chain that is too long.
    fn trim(&mut self, vm: Id) {
        let surplus = self.links.len().saturating_sub(Self::MOST);
        self.drop_first(vm, surplus);
    }

    fn drop_first(&mut self, vm: Id, count: usize) {
        if let Some(last) = count.checked_sub(1).and_then(|at| self.hashes(vm).nth(at)) {
            self.last_before = last;
            self.links.drain(..count);
        }
    }

    fn hashes(&self, vm: Id) -> impl Iterator<Item = LinkHash> {
        self.links.iter().scan(self.last_before, move |last, link| {
            *last = link.hash(vm, last);
            Some(*last)
        })
    }

    /// The links that a site may not know: from the last on that it gave or was given, which it
    /// does know.
    pub(crate) fn since(&self, vm: Id, peer: &Peer) -> Self {
        let knows = |link: &Link| peer.had(&link.to) || peer.had(&link.by.key());
        let mut shown = self.clone();
        if let Some(known) = self.links.iter().rposition(knows) {
            shown.drop_first(vm, known);
        }
        shown.trim(vm);
        shown
    }

    /// Checks it as a whole.
    pub fn prove(&self, vm: Id) -> Result<Proven<'_>, ChainError> {
        let (mut before, mut hashes) = (None, Vec::with_capacity(self.links.len()));
        let mut hash = self.last_before;
        for (index, link) in self.links.iter().enumerate() {
            let at = index + 1;
            let begins = link.step == Step::Start;
            if !link.follows(before) || (begins && self.last_before != LinkHash::default()) {
                return Err(ChainError::Broken { at });
            }
            if !link.is_signed(vm, &hash) {
                return Err(ChainError::Signature { at });
            }
            hash = link.hash(vm, &hash);
            hashes.push(hash);
            before = Some(link);
        }
        let last = before.ok_or(ChainError::Empty)?;
        Ok(Proven {
            chain: self,
            vm,
            last,
            hashes,
        })
    }
}

/// A chain that holds, from its first link to its last.
#[derive(Debug)]
pub struct Proven<'a> {
    chain: &'a Chain,
    vm: Id,
    last: &'a Link,
    /// Of each link.
    hashes: Vec<LinkHash>,
}

/// Where a chain leads from what is known.
#[derive(Debug, PartialEq, Eq)]
pub enum Way<'a> {
    /// On from the last link known, or by a takeover from one before. These takeovers are new.
    On(Vec<&'a Link>),
    /// Nowhere: what is known is newer.
    Behind,
    /// Not from there.
    Apart,
}

impl<'a> Proven<'a> {
    /// Who has the VM.
    pub fn owner(&self) -> SiteKey {
        self.last.to
    }

    /// Under which number.
    pub fn fence(&self) -> u64 {
        self.last.after
    }

    /// The links that are shown, oldest first.
    pub fn links(&self) -> &'a [Link] {
        &self.chain.links
    }

    /// Where it leads from what is known: a chain that is not empty.
    pub fn way_from(&self, known: &Chain) -> Way<'a> {
        let Some((here, there)) = self.common(known) else {
            return Way::Apart;
        };
        let (new, newer) = (&self.chain.links[here + 1..], &known.links[there + 1..]);
        let goes_on = match (new.first(), newer.last()) {
            (_, None) => true,
            (None, Some(_)) => return Way::Behind,
            (Some(next), Some(last)) => next.step == Step::Takeover && next.after > last.after,
        };
        if !goes_on {
            return Way::Apart;
        }
        Way::On(
            new.iter()
                .filter(|link| link.step == Step::Takeover)
                .collect(),
        )
    }

    /// The last link that both have: where it is in each.
    fn common(&self, known: &Chain) -> Option<(usize, usize)> {
        let places: HashMap<_, _> = known
            .hashes(self.vm)
            .enumerate()
            .map(|(at, hash)| (hash, at))
            .collect();
        let mut here = self.hashes.iter().enumerate().rev();
        here.find_map(|(at, hash)| Some((at, *places.get(hash)?)))
    }

    /// What is known when this is known as well.
    pub fn added_to(&self, known: &Chain) -> Chain {
        let mut all = match self.common(known) {
            None => self.chain.clone(),
            Some((here, there)) => {
                let mut all = known.clone();
                all.links.truncate(there + 1);
                all.links.extend(&self.chain.links[here + 1..]);
                all
            }
        };
        all.trim(self.vm);
        all
    }

    /// The same with the hand-over to `to` at its end; nothing, if `link` is none.
    pub fn handed_over(&self, known: &Chain, link: Link, to: SiteKey) -> Option<Chain> {
        let last = self.hashes.last()?;
        let holds = link.step == Step::HandOver
            && link.follows(Some(self.last))
            && link.to == to
            && link.is_signed(self.vm, last);
        holds.then(|| {
            let mut all = self.added_to(known);
            all.links.push(link);
            all.trim(self.vm);
            all
        })
    }
}

#[cfg(test)]
mod tests;
