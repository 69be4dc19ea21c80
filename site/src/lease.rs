//! The lease: exactly one site may run a VM.
//!
//! A fencing number grows with each hand-over. The hand-over has one step that decides, the
//! write of [`Lease::Held`] at the target, and one that makes it safe, the write of
//! [`Lease::Offered`] at the source just before it asks: an offered VM is not run at the source
//! again before the target has said that it did not take it. So after a crash at any point at
//! most one side runs the VM, and the one question "did you take transfer X?" settles which.

use std::path::Path;

use serde::{Deserialize, Serialize};

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

    /// Writes it, durable when this returns.
    pub fn store(&self, path: &Path) -> Result<()> {
        files::write_json(path, self)
    }
}
