//! Hubs: sites that hold generations of a VM for other sites, and can't read them.
//!
//! A standby that can't be reached from where the VM runs, or not now, is brought up to date by way
//! of a third site. What lies there is a [`Parcel`](seal): a generation as it differs from an older
//! one, sealed for the site that it is for and signed by the one that made it.
//!
//! ```text
//! source                          hub                           standby
//!   | -- Deposit (VM, for whom) --> |                               |
//!   | <- Shelf (key, receipt, heads)|                               |
//!   | -- Parcel, Data.., DataEnd -> |                               |
//!   | <-------------------- Held -- |                               |
//!   |                               | <-- Collect (key, receipts) - |  calls when it likes
//!   |                               | -- Parcels (heads) ---------> |
//!   |                               | <---------- Fetch (which) --- |
//!   |                               | -- Content.., ContentEnd ---> |  opened, applied, verified there
//! ```
//!
//! Inside a parcel is what the source says in a seed, from Hello to Publish ([`pack`]): the standby
//! takes it as it takes a seed over a line, with every check there is, and gives its answers to nobody.
//!
//! Promises: a hub learns who sends to whom, when, how much and of which VM by its number, and nothing
//! else; what it changes, swaps or makes up is refused as a whole, and what it withholds or shows once
//! more leaves a standby at the whole generation that it has. A hub's word is taken for nothing: keys
//! and receipts are signed by those they are of.

mod collect;
mod hold;
mod pack;
pub mod seal;
mod shelf;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::generation::GenerationId;
use crate::identity::{Identity, PublicKey, Signature, SiteKey};
use crate::vm::Id;

pub use collect::{CollectReport, Collected, Collector};
pub(crate) use hold::serve;
pub(crate) use pack::{Packed, Parcel, pack};
pub use shelf::{Lies, drop_for, lies};
pub(crate) use shelf::{Next, clear};

/// What a receipt's signature begins with.
const RECEIPT: &[u8] = b"replay-migrate receipt 1";

/// What a parcel's signature begins with.
const PARCEL: &[u8] = b"replay-migrate parcel 1";

/// Room that a hub gives to what it holds, where nothing else is said.
pub const DEFAULT_ROOM: u64 = 10 << 30;

/// What a parcel is, for all to see.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    /// The version of the protocol that is spoken inside.
    pub version: u16,
    /// Of which VM.
    pub vm: Id,
    /// The generation that it is told against; none: the bare images of its disks.
    pub from: Option<GenerationId>,
    /// The generation that it brings.
    pub to: GenerationId,
    /// The site that it is for.
    pub recipient: SiteKey,
    /// The site that made it.
    pub by: PublicKey,
    /// The encapsulated key (RFC 9180, section 4).
    pub key: [u8; 32],
    /// By the site that made it.
    pub signature: Signature,
}

impl Head {
    /// No head is longer, encoded.
    pub const LONGEST: usize = 1024;

    /// All that is known before there is a key: what the key is bound to.
    fn context(&self) -> Vec<u8> {
        let mut bytes = [PARCEL, &self.version.to_le_bytes(), &self.vm.0].concat();
        // Of fixed length each, so that nothing can be taken for something else.
        let (there, from) = match self.from {
            Some(from) => (1, from),
            None => (
                0,
                GenerationId {
                    number: 0,
                    digest: [0; 32],
                },
            ),
        };
        bytes.push(there);
        for id in [from, self.to] {
            bytes.extend(id.number.to_le_bytes());
            bytes.extend(id.digest);
        }
        bytes.extend(self.recipient.as_bytes());
        bytes.extend(self.by.key().as_bytes());
        bytes
    }

    fn signed(&self) -> Vec<u8> {
        [self.context(), self.key.to_vec()].concat()
    }

    /// Whether its maker has signed it, and its numbers can be.
    pub(crate) fn holds(&self) -> bool {
        let forward = self.from.is_none_or(|from| from.number < self.to.number);
        forward
            && self.to.number < crate::protocol::Hello::NUMBERS
            && self.by.verify(&self.signed(), &self.signature)
    }
}

/// Which parcel: a maker makes one of a kind for a site.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ParcelName {
    /// Of which VM.
    pub vm: Id,
    /// The generation that it brings.
    pub to: GenerationId,
    /// The site that made it.
    pub by: SiteKey,
}

impl Head {
    /// What it is called.
    pub fn name(&self) -> ParcelName {
        ParcelName {
            vm: self.vm,
            to: self.to,
            by: self.by.key(),
        }
    }
}

/// What a site has of a VM, signed by it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Receipt {
    /// Of which VM.
    pub vm: Id,
    /// Its newest generations, oldest first; none, where it has nothing of the VM.
    pub has: Vec<GenerationId>,
    /// When it was said, in seconds since 1970 by that site's clock: what a hub shows may be old.
    pub at: u64,
    /// By whom.
    pub by: PublicKey,
    /// By that key.
    pub signature: Signature,
}

impl Receipt {
    /// A receipt names no more generations.
    pub const GENERATIONS: usize = 16;

    /// What this site has of a VM, now.
    pub fn sign(identity: &Identity, vm: Id, mut has: Vec<GenerationId>) -> Self {
        let surplus = has.len().saturating_sub(Self::GENERATIONS);
        has.drain(..surplus);
        let mut receipt = Self {
            vm,
            has,
            at: now(),
            by: identity.public(),
            signature: Signature::NONE,
        };
        receipt.signature = identity.sign(&receipt.signed());
        receipt
    }

    fn signed(&self) -> Vec<u8> {
        let mut bytes = [RECEIPT, &self.vm.0, &self.at.to_le_bytes()].concat();
        for id in &self.has {
            bytes.extend(id.number.to_le_bytes());
            bytes.extend(id.digest);
        }
        bytes
    }

    /// Whether this site has said so.
    pub(crate) fn is_of(&self, site: &SiteKey) -> bool {
        self.has.len() <= Self::GENERATIONS
            && self.by.key() == *site
            && self.by.verify(&self.signed(), &self.signature)
    }

    /// How long ago it was said, in seconds.
    pub(crate) fn age(&self) -> u64 {
        now().saturating_sub(self.at)
    }

    /// The newest generation that it names.
    pub(crate) fn newest(&self) -> Option<GenerationId> {
        self.has.iter().copied().max_by_key(|id| id.number)
    }
}

/// What a hub has for a site, of one VM: what the source needs to know for its next parcel.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Shelf {
    /// What is to be sealed for; none, where the site has never called there.
    pub key: Option<seal::SealingKey>,
    /// What the site said last that it has.
    pub receipt: Option<Receipt>,
    /// The parcels that wait there.
    pub parcels: Vec<Head>,
}

impl Shelf {
    /// No more parcels of a VM wait for a site.
    pub const PARCELS: usize = 16;
}

/// A site calls at a hub for what is there for it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Collect {
    /// What is to be sealed for.
    pub key: seal::SealingKey,
    /// Whom it takes something from: what others left is not offered, and nobody else learns what it has.
    pub makers: Vec<SiteKey>,
    /// What it has.
    pub receipts: Vec<Receipt>,
    /// Parcels that are of no use to it.
    pub useless: Vec<ParcelName>,
}

impl Collect {
    /// A site has no more VMs than these, and takes from no more others.
    pub const VMS: usize = 4096;
}

/// In seconds since 1970.
fn now() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}

/// What can't be used of a parcel, or of what a hub says.
fn unusable(why: impl Into<String>) -> Error {
    Error::Parcel { why: why.into() }
}

/// For work that a hub does for others: it is none of what this site may refuse to do for itself.
fn refused<T>(why: impl Into<String>) -> Result<T> {
    Err(Error::Refused(why.into()))
}
