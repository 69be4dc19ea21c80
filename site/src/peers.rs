//! The sites this one trusts: a name for people, an address to connect to, and the key that
//! proves who answers.
//!
//! Kept as `peers.json` in the site's directory. The agent asks it at every handshake, and
//! whoever has a connection open watches it ([`PeerWatch`]): a peer that was removed, or may do
//! less than before, is cut off at once, without a restart.
//!
//! Promised: the file is replaced whole or not at all, commands that run at once don't lose
//! each other's change, and a file others can write to is not believed.

mod permissions;
mod watch;

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::files::FileLock;
use crate::identity::SiteKey;

pub use permissions::{Permission, Permissions};
pub use watch::PeerWatch;

/// Held by whoever changes the list; another file than the list itself, which is replaced under its readers.
pub(crate) const LOCK: &str = ".peers.lock";

/// The version of the file this program writes, and the newest it reads. Version 1 knew neither
/// permissions nor former keys, version 2 not that a site may have things held here: whoever reads
/// only those must not take a file for one.
const FORMAT: u32 = 3;
/// Room for some thousands of peers.
const MAX_FILE: u64 = 1 << 20;

/// What people call a peer: 1 to 63 letters, digits, `-`, `_` or `.`, the first a letter or
/// digit. So it fits a file name, a log line and a command line without quoting.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PeerName(String);

/// Where a peer listens: `HOST:PORT`, an IPv6 host in brackets.
///
/// The host is looked up when connecting; who answers is proven by key, not by this.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PeerAddr(String);

/// A trusted site.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    /// What it is called here.
    pub name: PeerName,
    /// Where its agent listens.
    pub addr: PeerAddr,
    /// What it must prove to hold.
    pub key: SiteKey,
    /// What it may do.
    #[serde(default)]
    pub may: Permissions,
    /// The keys that it had before, by the word of whoever trusted its new one: nobody gets in
    /// with them, and a VM that was theirs is this key's. The newest is the last.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub former: Vec<SiteKey>,
}

impl Peer {
    /// As many former keys are remembered.
    const FORMER: usize = 16;

    /// A site that may do everything.
    pub fn new(name: PeerName, addr: PeerAddr, key: SiteKey) -> Self {
        Self {
            name,
            addr,
            key,
            may: Permissions::default(),
            former: Vec::new(),
        }
    }

    /// Whether this key is the site's, or was.
    pub fn had(&self, key: &SiteKey) -> bool {
        self.key == *key || self.former.contains(key)
    }

    /// Checks that the peer may do this.
    ///
    /// # Errors
    /// What to do about it at this site.
    pub(crate) fn require(&self, permission: Permission) -> Result<(), PeerError> {
        if self.may.has(permission) {
            Ok(())
        } else {
            Err(PeerError::MayNot {
                name: self.name.clone(),
                permission,
                may: self.may.clone(),
            })
        }
    }

    /// Takes over what is known of the same site under another key.
    fn succeed(&mut self, known: &Self) {
        self.former.clone_from(&known.former);
        self.former.retain(|key| *key != self.key);
        if known.key != self.key {
            self.former.push(known.key);
        }
        let surplus = self.former.len().saturating_sub(Self::FORMER);
        self.former.drain(..surplus);
    }
}

impl FromStr for PeerName {
    type Err = PeerError;

    fn from_str(text: &str) -> Result<Self, PeerError> {
        let inner = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        let good = text.len() <= 63
            && text.starts_with(|c: char| c.is_ascii_alphanumeric())
            && text.chars().all(inner);
        if good {
            Ok(Self(text.to_owned()))
        } else {
            Err(PeerError::Name(shorten(text)))
        }
    }
}

impl FromStr for PeerAddr {
    type Err = PeerError;

    fn from_str(text: &str) -> Result<Self, PeerError> {
        let good = text.rsplit_once(':').is_some_and(|(host, port)| {
            let bare = host
                .strip_prefix('[')
                .and_then(|host| host.strip_suffix(']'));
            let host_good = match bare {
                Some(bare) => bare.parse::<std::net::Ipv6Addr>().is_ok(),
                None => {
                    !host.is_empty()
                        && host.len() <= 253
                        && host
                            .chars()
                            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
                }
            };
            // `parse` alone would take "+7707".
            let digits = port.chars().all(|c| c.is_ascii_digit());
            host_good && digits && port.parse::<u16>().is_ok_and(|port| port != 0)
        });
        if good {
            Ok(Self(text.to_owned()))
        } else {
            Err(PeerError::Addr(shorten(text)))
        }
    }
}

/// An error shows what was given, escaped by `Debug`, but not pages of it.
fn shorten(text: &str) -> String {
    text.chars().take(80).collect()
}

macro_rules! string_newtype {
    ($name:ident) => {
        impl $name {
            /// As text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl TryFrom<String> for $name {
            type Error = PeerError;

            fn try_from(text: String) -> Result<Self, PeerError> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(value: $name) -> Self {
                value.0
            }
        }
    };
}
string_newtype!(PeerName);
string_newtype!(PeerAddr);

/// The store of trusted sites. Holds no state: every question reads the file.
#[derive(Clone, Debug)]
pub struct PeerStore {
    path: PathBuf,
}

#[derive(Serialize, Deserialize)]
struct Document {
    version: u32,
    peers: Vec<Peer>,
}

/// Read before the rest, so that a newer file is named as newer whatever else it holds.
#[derive(Deserialize)]
struct Versioned {
    version: u32,
}

impl PeerStore {
    /// The store in a site's directory. Nothing is read or created yet.
    pub fn new(site_dir: &Path) -> Self {
        Self {
            path: site_dir.join("peers.json"),
        }
    }

    /// All peers, by name. None when the file isn't there yet.
    pub fn list(&self) -> Result<Vec<Peer>, PeerError> {
        let read = |source| PeerError::Read {
            path: self.path.clone(),
            source,
        };
        let file = match File::open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(read(error)),
        };
        let metadata = file.metadata().map_err(read)?;
        if metadata.mode() & 0o022 != 0 {
            return Err(PeerError::Exposed {
                path: self.path.clone(),
            });
        }
        if metadata.len() > MAX_FILE {
            return Err(PeerError::TooLarge {
                path: self.path.clone(),
            });
        }
        let mut text = String::new();
        file.take(MAX_FILE)
            .read_to_string(&mut text)
            .map_err(read)?;
        let damaged = |source| PeerError::Damaged {
            path: self.path.clone(),
            source,
        };
        let Versioned { version } = serde_json::from_str(&text).map_err(damaged)?;
        if !(1..=FORMAT).contains(&version) {
            return Err(PeerError::Version {
                path: self.path.clone(),
                version,
            });
        }
        let mut document: Document = serde_json::from_str(&text).map_err(damaged)?;
        document.peers.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(document.peers)
    }

    /// The peer of that name.
    pub fn by_name(&self, name: &PeerName) -> Result<Peer, PeerError> {
        let found = self.list()?.into_iter().find(|peer| peer.name == *name);
        found.ok_or_else(|| PeerError::Unknown(name.clone()))
    }

    /// The peer with that key, if it is trusted.
    pub fn by_key(&self, key: &SiteKey) -> Result<Option<Peer>, PeerError> {
        Ok(self.list()?.into_iter().find(|peer| peer.key == *key))
    }

    /// The peer that has this key, or had it before.
    pub(crate) fn of_key(&self, key: &SiteKey) -> Result<Option<Peer>, PeerError> {
        Ok(self.list()?.into_iter().find(|peer| peer.had(key)))
    }

    /// Watches the list.
    pub fn watch(&self) -> Result<PeerWatch, PeerError> {
        // Always set by `new`, which joins a file name to a directory.
        let dir = self.path.parent().unwrap_or(Path::new("."));
        PeerWatch::of(dir).map_err(|source| PeerError::Watch {
            path: self.path.clone(),
            source,
        })
    }

    /// Trusts a peer from now on; one of the same name is the same site, perhaps with a new key:
    /// its former keys are remembered, and it may do what it might before where `may` says
    /// nothing. Returns what is known now, and what was known before.
    ///
    /// On failure the store is as it was.
    pub fn trust(
        &self,
        mut peer: Peer,
        may: Option<Permissions>,
    ) -> Result<(Peer, Option<Peer>), PeerError> {
        self.change(|peers| {
            if let Some(known) = peers
                .iter()
                .find(|p| p.had(&peer.key) && p.name != peer.name)
            {
                return Err(PeerError::KeyTaken(known.name.clone()));
            }
            if let Some(known) = peers.iter_mut().find(|known| known.name == peer.name) {
                peer.succeed(known);
                peer.may = may.unwrap_or_else(|| known.may.clone());
                return Ok((peer.clone(), Some(std::mem::replace(known, peer))));
            }
            peer.may = may.unwrap_or(peer.may);
            peers.push(peer.clone());
            Ok((peer, None))
        })
    }

    /// Trusts a peer no longer. Its open connections end, and no new one is accepted.
    ///
    /// On failure the store is as it was.
    pub fn remove(&self, name: &PeerName) -> Result<Peer, PeerError> {
        self.change(|peers| {
            let at = peers.iter().position(|peer| peer.name == *name);
            at.map(|at| peers.remove(at))
                .ok_or_else(|| PeerError::Unknown(name.clone()))
        })
    }

    fn change<T>(
        &self,
        change: impl FnOnce(&mut Vec<Peer>) -> Result<T, PeerError>,
    ) -> Result<T, PeerError> {
        let write = |source| PeerError::Write {
            path: self.path.clone(),
            source,
        };
        // Always set by `new`, which joins a file name to a directory.
        let dir = self.path.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(dir).map_err(write)?;
        let _alone = FileLock::take(&dir.join(LOCK)).map_err(write)?;

        let mut peers = self.list()?;
        let result = change(&mut peers)?;
        let document = Document {
            version: FORMAT,
            peers,
        };
        let mut text = serde_json::to_vec_pretty(&document).map_err(|e| write(e.into()))?;
        text.push(b'\n');
        if text.len() as u64 > MAX_FILE {
            return Err(PeerError::TooLarge {
                path: self.path.clone(),
            });
        }
        let mut file = tempfile::Builder::new()
            .prefix(".peers.")
            .tempfile_in(dir)
            .map_err(write)?;
        file.write_all(&text).map_err(write)?;
        file.as_file().sync_all().map_err(write)?;
        file.persist(&self.path)
            .map_err(|failed| write(failed.error))?;
        File::open(dir)
            .and_then(|dir| dir.sync_all())
            .map_err(write)?;
        Ok(result)
    }
}

/// What is wrong with a peer, or with the store of them.
#[derive(Debug, thiserror::Error)]
pub enum PeerError {
    /// No name of a site.
    #[error(
        "{0:?} can't be a site's name: use up to 63 letters, digits, `-`, `_` and `.`, and \
         begin with a letter or digit"
    )]
    Name(String),
    /// No address.
    #[error("{0:?} is no address: write HOST:PORT, an IPv6 host in brackets")]
    Addr(String),
    /// No such permission.
    #[error("{0:?} is nothing that a site may do: name send, receive, follow and hold, or nothing")]
    Permission(String),
    /// Trusted, but not with this.
    #[error(
        "{name} may not {permission} by what this site was told (it may {may}): \
         `replay-migrate site trust {name} ADDR KEY --may ...` at this site changes that"
    )]
    MayNot {
        /// The peer.
        name: PeerName,
        /// What it may not do.
        permission: Permission,
        /// What it may.
        may: Permissions,
    },
    /// Never trusted, or removed.
    #[error(
        "no site called {0} is known here: `replay-migrate site list` shows the known ones, \
         `replay-migrate site trust {0} ADDR KEY` adds one"
    )]
    Unknown(PeerName),
    /// A site has one name.
    #[error("that key is trusted already, as {0}: change that entry, or remove it first")]
    KeyTaken(PeerName),
    /// The file can't be read.
    #[error("can't read the trusted sites in {}", .path.display())]
    Read {
        /// `peers.json`.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Nobody would notice that a peer is trusted no longer.
    #[error("can't watch {} for changes: too many programs may do so already \
             (fs.inotify.max_user_instances)", .path.display())]
    Watch {
        /// `peers.json`.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file can't be replaced.
    #[error("can't store the trusted sites in {}", .path.display())]
    Write {
        /// `peers.json`.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Whoever writes to it decides whom this site trusts.
    #[error(
        "{} can be written to by other users, so its trust means nothing: look through it, then \
         run `chmod go-w {}`",
        .path.display(), .path.display()
    )]
    Exposed {
        /// `peers.json`.
        path: PathBuf,
    },
    /// Beyond any sensible number of peers.
    #[error("{} is larger than {MAX_FILE} bytes", .path.display())]
    TooLarge {
        /// `peers.json`.
        path: PathBuf,
    },
    /// Not what was written here.
    #[error("{} is damaged: mend it, or delete it and trust the sites again", .path.display())]
    Damaged {
        /// `peers.json`.
        path: PathBuf,
        /// Where.
        source: serde_json::Error,
    },
    /// Written by another version of the program.
    #[error(
        "{} has format version {version}, this program knows {FORMAT}: use the newer \
         replay-migrate",
        .path.display()
    )]
    Version {
        /// `peers.json`.
        path: PathBuf,
        /// What it says.
        version: u32,
    },
}

#[cfg(test)]
mod tests;
