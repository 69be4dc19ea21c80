//! `replay-migrate site`

use std::path::Path;

use serde_json::json;
use site::Store;
use site::at_rest::{self, AtRest, Locked, Protection};
use site::peers::Peer;
use vm_host::probe::storage::Storage;

use crate::args::SiteCommand;
use crate::output::{Output, table};

pub(crate) async fn run(
    dir: &Path,
    keys: Option<&Path>,
    command: SiteCommand,
    output: &Output,
) -> anyhow::Result<()> {
    let open = || Store::open_with(dir, keys);
    match command {
        SiteCommand::Id { rotate: true } => {
            let (was, key) = open()?.rotate_identity()?;
            let (was, key) = (was.to_string(), key.to_string());
            output.result(&json!({ "key": key, "was": was }), |_| key.clone())
        }
        SiteCommand::Id { rotate: false } => {
            let key = open()?.identity()?.key().to_string();
            output.result(&json!({ "key": key }), |_| key.clone())
        }
        SiteCommand::Trust {
            name,
            addr,
            key,
            may,
        } => {
            let peer = Peer::new(
                name.parse().map_err(site::Error::from)?,
                addr.parse().map_err(site::Error::from)?,
                key.parse().map_err(site::Error::from)?,
            );
            let store = open()?;
            if peer.key == store.identity()?.key() {
                anyhow::bail!(site::Error::Refused(format!(
                    "that is this site's own key; run `replay-migrate site id` at {}",
                    peer.name
                )));
            }
            let (peer, replaced) = store.peers().trust(peer, may).map_err(site::Error::from)?;
            output.result(&peer, |peer| {
                let and = match replaced {
                    Some(old) if old.key != peer.key => ", with a new key",
                    Some(_) => ", with what was said now",
                    None => "",
                };
                format!("{} is trusted{and}: it may {}", peer.name, peer.may)
            })
        }
        SiteCommand::Untrust { name } => {
            let name = name.parse().map_err(site::Error::from)?;
            let peer = open()?.peers().remove(&name).map_err(site::Error::from)?;
            output.result(&peer, |peer| format!("{} is trusted no longer", peer.name))
        }
        SiteCommand::List => {
            let peers = open()?.peers().list().map_err(site::Error::from)?;
            output.result(&peers, |peers| {
                let rows: Vec<_> = peers
                    .iter()
                    .map(|peer| {
                        vec![
                            peer.name.to_string(),
                            peer.addr.to_string(),
                            peer.may.to_string(),
                            peer.key.to_string(),
                        ]
                    })
                    .collect();
                table(&rows)
            })
        }
        SiteCommand::Status => {
            // One that is there is only looked at: its key may be away, or to stay away.
            if !dir.join("site.json").exists() {
                open()?;
            }
            status(&Store::look(dir, keys)?, output)
        }
        SiteCommand::Lock => lock(&Store::look(dir, keys)?, output).await,
    }
}

/// Whether what lies here is encrypted.
fn status(store: &Store, output: &Output) -> anyhow::Result<()> {
    let at_rest = AtRest::of(store)?;
    output.result(&at_rest, describe)
}

fn describe(at_rest: &AtRest) -> String {
    let verdict = if at_rest.encrypted {
        "encrypted"
    } else {
        "NOT encrypted"
    };
    let on = storage(&at_rest.storage);
    let mut text = format!("at rest: {verdict}; the state lies {on}\n");
    let rows: Vec<_> = at_rest
        .folders
        .iter()
        .map(|folder| {
            let is = match folder.is {
                Protection::Unlocked => "encrypted by the file system, unlocked",
                Protection::Locked => "encrypted by the file system, locked",
                Protection::DmCrypt => "encrypted by dm-crypt",
                Protection::Memory => "in memory",
                Protection::Unable => "not encrypted: the file system can't",
                Protection::NotSetUp => "not encrypted: the file system is not set up for it",
                Protection::Clear => "not encrypted: it was there before",
            };
            vec![format!("  {}", folder.name.display()), is.to_owned()]
        })
        .collect();
    text.push_str(&table(&rows));
    text.push_str(&format!(
        "\nkeys: in {}, {}",
        at_rest.keys.display(),
        storage(&at_rest.keys_on)
    ));
    for advice in &at_rest.advice {
        text.push_str(&format!("\n- {advice}"));
    }
    text
}

fn storage(on: &Storage) -> String {
    match on {
        Storage::Memory => "in memory".into(),
        Storage::Encrypted(name) => format!("on {name}, which dm-crypt encrypts"),
        Storage::Clear(name) => format!("on {name}, a disk in the clear"),
        Storage::Unknown(kind) => format!("on {kind}, of which nothing is known"),
    }
}

/// Takes the key away from what is encrypted here.
async fn lock(store: &Store, output: &Output) -> anyhow::Result<()> {
    let locked = at_rest::lock(store).await?;
    output.result(&json!({ "locked": locked }), |_| {
        let said = match locked {
            Locked::Locked => "locked",
            Locked::Before => "it was locked already",
            Locked::FilesOpen => {
                "the key is gone, but some process has files open here, or is in a folder of it: \
                 end it, and lock again"
            }
            Locked::OtherUsers => {
                "another user of this host has unlocked it too: nothing is locked"
            }
            Locked::Nothing => "nothing here is encrypted with a key of this site",
        };
        said.to_owned()
    })?;
    match locked {
        Locked::Locked | Locked::Before => Ok(()),
        Locked::Nothing => anyhow::bail!(site::Error::Refused("there is nothing to lock".into())),
        Locked::FilesOpen | Locked::OtherUsers => anyhow::bail!("not all is locked"),
    }
}
