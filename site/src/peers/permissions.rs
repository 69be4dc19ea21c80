//! What a trusted site may do, said from here: it is the peer that sends, receives or follows.
//!
//! Whatever it may do, a trusted site may always ask whether a hand-over took place that it knows
//! the name of: without the answer a VM could be nobody's.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::PeerError;

/// One thing that a peer may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Permission {
    /// Send VMs here: its migrations to this site, its seeds, and its questions what one would
    /// cost.
    Send,
    /// Be sent VMs from here, with their whole state and the log of what was typed.
    Receive,
    /// With [`Self::Send`]: have its VMs followed here while they are in use there, which takes a
    /// guest's memory and a processor. With [`Self::Receive`]: follow VMs that are in use here,
    /// which tells it what is typed as it is typed.
    Follow,
    /// Leave here what is sealed for other sites, and fetch what is held here for it: this site is
    /// their hub, and can't read any of it.
    Hold,
}

impl Permission {
    const ALL: [Self; 4] = [Self::Send, Self::Receive, Self::Follow, Self::Hold];

    const fn name(self) -> &'static str {
        match self {
            Self::Send => "send",
            Self::Receive => "receive",
            Self::Follow => "follow",
            Self::Hold => "hold",
        }
    }
}

impl fmt::Display for Permission {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// All that a peer may do; everything, unless something else was said.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Permissions(BTreeSet<Permission>);

impl Default for Permissions {
    fn default() -> Self {
        Self(Permission::ALL.into())
    }
}

impl Permissions {
    /// Whether this is among them.
    pub fn has(&self, permission: Permission) -> bool {
        self.0.contains(&permission)
    }

    /// Whether nothing of what `others` allow is missing here.
    pub fn cover(&self, others: &Self) -> bool {
        self.0.is_superset(&others.0)
    }
}

impl fmt::Display for Permissions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("nothing");
        }
        let names: Vec<_> = self.0.iter().map(|one| one.name()).collect();
        f.write_str(&names.join(","))
    }
}

/// As it is written on a command line: `send,receive`, or `nothing`.
impl FromStr for Permissions {
    type Err = PeerError;

    fn from_str(text: &str) -> Result<Self, PeerError> {
        if text == "nothing" {
            return Ok(Self(BTreeSet::new()));
        }
        text.split(',')
            .map(|word| {
                let found = Permission::ALL.into_iter().find(|one| one.name() == word);
                found.ok_or_else(|| PeerError::Permission(super::shorten(word)))
            })
            .collect::<Result<_, _>>()
            .map(Self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permissions_are_read_as_they_are_written() {
        for text in ["nothing", "send", "receive", "send,receive,follow,hold"] {
            assert_eq!(text.parse::<Permissions>().unwrap().to_string(), text);
        }
        let twice: Permissions = "follow,send,follow".parse().unwrap();
        assert_eq!(twice.to_string(), "send,follow");
        assert_eq!(
            Permissions::default().to_string(),
            "send,receive,follow,hold"
        );
        for bad in ["", "all", "send,", "Send", "send receive"] {
            assert!(bad.parse::<Permissions>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn what_is_taken_away_is_noticed() {
        let all = Permissions::default();
        let some: Permissions = "send,follow".parse().unwrap();
        assert!(all.cover(&some) && some.cover(&some) && !some.cover(&all));
        assert!(some.has(Permission::Send) && !some.has(Permission::Receive));
    }
}
