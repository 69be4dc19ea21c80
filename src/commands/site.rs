//! `replay-migrate site`

use serde_json::json;
use site::Store;
use site::peers::Peer;

use crate::args::SiteCommand;
use crate::output::{Output, table};

pub(crate) fn run(store: &Store, command: SiteCommand, output: &Output) -> anyhow::Result<()> {
    match command {
        SiteCommand::Id { rotate: true } => {
            let (was, key) = store.rotate_identity()?;
            let (was, key) = (was.to_string(), key.to_string());
            output.result(&json!({ "key": key, "was": was }), |_| key.clone())
        }
        SiteCommand::Id { rotate: false } => {
            let key = store.identity()?.key().to_string();
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
            let peer = store.peers().remove(&name).map_err(site::Error::from)?;
            output.result(&peer, |peer| format!("{} is trusted no longer", peer.name))
        }
        SiteCommand::List => {
            let peers = store.peers().list().map_err(site::Error::from)?;
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
    }
}
