//! Shipping generations to one standby: always the newest there is by then, so that those in
//! between are skipped.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{RwLock, mpsc, watch};

use super::{Choice, Route, Shipment};
use crate::error::{Error, Result};
use crate::identity::SiteKey;
use crate::peers::Peer;
use crate::progress::Silent;
use crate::source::deposit::{Packing, deposit_newest};
use crate::source::hand_over::give_way_if_so;
use crate::source::seed::{SeedReport, ship_newest};
use crate::store::VmDir;
use crate::transport::RateCap;

/// Waits between attempts: the first, and the longest.
const BACK_OFF: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(60)];

/// The longest where a hub has refused what was packed: that takes this host's disk and processors each
/// time.
const BACK_OFF_FROM_HUB: Duration = Duration::from_secs(600);

/// What a shipper tells.
pub(super) enum Told {
    Shipped(Box<Shipment>),
    Waiting {
        site: String,
        why: String,
        seconds: f64,
    },
    /// It ships nothing more.
    Failed(Error),
}

/// Which generations are on their way.
#[derive(Clone, Default)]
pub(super) struct Shipping(Arc<Mutex<BTreeMap<SiteKey, u64>>>);

impl Shipping {
    /// From the oldest of them on; none, where none is.
    pub(super) fn oldest(&self) -> Option<u64> {
        self.numbers().values().copied().min()
    }

    fn begin(&self, to: &Peer, number: u64) -> Shipped {
        self.numbers().insert(to.key, number);
        Shipped(self.clone(), to.key)
    }

    fn numbers(&self) -> MutexGuard<'_, BTreeMap<SiteKey, u64>> {
        // Each change of it is one step.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// It is on its way until this is dropped.
struct Shipped(Shipping, SiteKey);

impl Drop for Shipped {
    fn drop(&mut self) {
        self.0.numbers().remove(&self.1);
    }
}

/// What all shippers of a VM share.
#[derive(Clone)]
pub(super) struct Shared {
    pub(super) vm: VmDir,
    /// The newest generation.
    pub(super) newest: watch::Receiver<u64>,
    /// Somebody else works on the VM.
    pub(super) held: watch::Receiver<bool>,
    /// Read while shipping.
    pub(super) gate: Arc<RwLock<()>>,
    /// What each standby is being sent, or what is newer: it stays meanwhile.
    pub(super) shipping: Shipping,
    pub(super) cap: Option<Arc<RateCap>>,
    /// Parcels are packed one after the other.
    pub(super) packing: Packing,
    pub(super) choice: Choice,
    pub(super) out: mpsc::UnboundedSender<Told>,
}

/// Ships until nobody makes generations any more.
pub(super) async fn ship(shared: Shared, route: Route) {
    let Route { to: peer, via } = route;
    let Shared {
        vm,
        mut newest,
        mut held,
        gate,
        shipping,
        cap,
        packing,
        mut choice,
        out,
    } = shared;
    let mut wait = BACK_OFF[0];
    let mut has = 0;
    let mut reached = false;
    loop {
        if newest.wait_for(|newest| *newest > has).await.is_err()
            || held.wait_for(|held| !held).await.is_err()
        {
            return;
        }
        let begun = Instant::now();
        let outcome = {
            let _until_held = gate.read().await;
            let _stays = shipping.begin(&peer, *newest.borrow());
            tokio::select! {
                biased;
                // Dropped, a conversation is called off.
                _ = held.wait_for(|held| *held) => continue,
                outcome = async {
                    match &via {
                        None => {
                            ship_newest(&vm, &peer, cap.clone(), Some(&mut choice), &Silent).await
                        }
                        Some(hub) => {
                            deposit_newest(&vm, [&peer, hub], cap.clone(), &packing).await
                        }
                    }
                } => outcome,
            }
        };
        let was_by_log = outcome.is_err() && choice.failed();
        let refused = via.is_some() && matches!(outcome, Err(Error::PeerRefused { .. }));
        let told = match give_way_if_so(&vm, &peer, outcome).await {
            Ok(report) => {
                (has, reached, wait) = (report.generation, true, BACK_OFF[0]);
                Told::Shipped(Box::new(shipment(&peer, &report, begun)))
            }
            // At first a person looks on: what can't be done is said at once.
            Err(error) if !was_by_log && (!reached || !may_go_better(&error)) => {
                Told::Failed(error)
            }
            Err(error) => Told::Waiting {
                site: peer.name.to_string(),
                why: error.chain(),
                seconds: wait.as_secs_f64(),
            },
        };
        let (waits, over) = (
            matches!(told, Told::Waiting { .. }),
            matches!(told, Told::Failed(_)),
        );
        if out.send(told).is_err() || over {
            return;
        }
        if waits {
            tokio::time::sleep(wait).await;
            let longest = if refused {
                BACK_OFF_FROM_HUB
            } else {
                BACK_OFF[1]
            };
            wait = (wait * 2).min(longest);
        }
    }
}

/// Whether it may go better the next time, with nothing said by a person.
fn may_go_better(error: &Error) -> bool {
    match error {
        // It may be busy with the VM, or full, or in trouble: all of that passes. Here, a newer
        // generation may have taken the place of the one that was looked for, or the disk is full.
        Error::PeerRefused { .. }
        | Error::PeerFailed { .. }
        | Error::Refused(_)
        | Error::File { .. } => true,
        // So does a peer that is just being started anew.
        other => other.is_disconnect() || other.may_go_better(),
    }
}

fn shipment(peer: &Peer, report: &SeedReport, begun: Instant) -> Shipment {
    Shipment {
        site: peer.name.to_string(),
        via: report.via.clone(),
        generation: report.generation,
        generation_from: report.generation_from,
        by_log: report.by_log.clone(),
        bytes: report.bytes,
        seconds: begun.elapsed().as_secs_f64(),
    }
}

/// Checks what would fail at each attempt.
pub(super) fn check(routes: &[Route]) -> Result<()> {
    for Route { to, via } in routes {
        to.require(crate::peers::Permission::Receive)?;
        if via.as_ref().is_some_and(|hub| hub.key == to.key) {
            return Err(Error::Refused(format!(
                "{0} can't be a hub for {0}",
                to.name
            )));
        }
    }
    let peers = routes;
    let mut names: Vec<_> = peers.iter().map(|route| route.to.key).collect();
    names.sort();
    names.dedup();
    if names.len() < peers.len() {
        return Err(Error::Refused("a standby is named twice".into()));
    }
    Ok(())
}
