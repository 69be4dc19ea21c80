//! The lease: exactly one site may run a VM.
//!
//! A fencing number grows with each hand-over. The hand-over has one step that decides, the
//! write of [`Lease::Held`] at the target, and one that makes it safe, the write of
//! [`Lease::Offered`] at the source just before it asks: an offered VM is not run at the source
//! again before the target has said that it did not take it. So after a crash at any point at
//! most one side runs the VM, and the one question "did you take transfer X?" settles which.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::chain::Chain;
use crate::error::Result;
use crate::files;
use crate::identity::SiteKey;
use crate::vm::Id;

/// Whether this site may run a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum Lease {
    /// This site may run it.
    Held {
        /// Grows with each hand-over.
        fence: u64,
        /// The hand-over by which it came, so that the giver can ask.
        transfer: Option<Id>,
    },
    /// The target was asked to take it; whether it did is not known here.
    Offered {
        /// The number that this site holds.
        fence: u64,
        /// The hand-over.
        transfer: Id,
        /// The target.
        to: SiteKey,
        /// The target's name here, for messages.
        to_name: String,
        /// Whether the guest ran until then, and is to run again if the target did not take it.
        was_running: bool,
    },
    /// Another site may run it; what is here is a stale copy.
    Elsewhere {
        /// The highest number seen.
        fence: u64,
        /// The site that it was given to, or got from.
        owner: SiteKey,
        /// That site's name here, for messages.
        owner_name: String,
    },
}

impl Lease {
    /// The highest fencing number this site knows.
    pub fn fence(&self) -> u64 {
        match self {
            Self::Held { fence, .. }
            | Self::Offered { fence, .. }
            | Self::Elsewhere { fence, .. } => *fence,
        }
    }

    /// Reads it; `None` where the VM is not known.
    pub fn load(path: &Path) -> Result<Option<Self>> {
        files::read_json(path)
    }

    /// Writes it without a chain, as a program of before there were any.
    #[cfg(test)]
    pub(crate) fn store(&self, path: &Path) -> Result<()> {
        Title::from(self).store(path)
    }
}

/// A lease, and what shows how it came about. Both are one file: neither is ever newer than the
/// other.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Title {
    /// Whether this site may run the VM.
    #[serde(flatten)]
    pub lease: Lease,
    /// The hand-overs up to the last that is known here. Where the VM is [`Lease::Offered`], that
    /// one is the last. Empty for a VM of before there were chains.
    #[serde(default, skip_serializing_if = "Chain::is_empty")]
    pub chain: Chain,
    /// The site that took the VM over from one that is lost, by the word of a person here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub taken_by: Option<SiteKey>,
}

impl Title {
    /// A lease, and how it came about.
    pub(crate) fn new(lease: Lease, chain: Chain) -> Self {
        Self {
            lease,
            chain,
            taken_by: None,
        }
    }

    /// The highest number known here, of whichever.
    pub(crate) fn fence(&self) -> u64 {
        self.lease.fence().max(self.chain.fence().unwrap_or(0))
    }

    /// Reads it; `None` where the VM is not known.
    pub fn load(path: &Path) -> Result<Option<Self>> {
        files::read_json(path)
    }

    /// Writes it, durable when this returns.
    pub(crate) fn store(&self, path: &Path) -> Result<()> {
        files::write_json(path, self)
    }
}

impl From<&Lease> for Title {
    fn from(lease: &Lease) -> Self {
        Self::new(lease.clone(), Chain::default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::Identity;

    #[test]
    fn a_lease_and_its_chain_are_one_file_and_older_ones_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lease.json");
        let lease = Lease::Held {
            fence: 3,
            transfer: Some(Id([1; 16])),
        };
        // As it was written before there were chains.
        std::fs::write(
            &path,
            format!(
                "{{\"state\":\"held\",\"fence\":3,\"transfer\":\"{}\"}}",
                Id([1; 16])
            ),
        )
        .unwrap();
        assert_eq!(Title::load(&path).unwrap(), Some(Title::from(&lease)));
        let identity = Identity::ephemeral().unwrap();
        let chain = Chain::start(Id([2; 16]), 3, &identity);
        let mut title = Title::new(lease.clone(), chain);
        title.taken_by = Some(identity.key());
        title.store(&path).unwrap();
        assert_eq!(Title::load(&path).unwrap(), Some(title));
        assert_eq!(Lease::load(&path).unwrap(), Some(lease));
    }
}
