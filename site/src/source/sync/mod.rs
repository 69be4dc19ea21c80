//! Standbys (VMsync, IC2E 2013): sites that have a whole generation of a VM that runs here, and soon
//! a newer one.
//!
//! Each epoch is a generation, made while the VM stands still for a moment, and shipped as what
//! differs from the one that the standby has: a standby is a whole generation at any time, for a
//! site publishes one as a whole or not at all. Each standby is sent the newest when it is ready
//! for one, and so is at a version of its own; what was overwritten in between is never sent.
//!
//! Nothing here locks the VM but while a generation is made: it can be checkpointed, recorded and
//! moved meanwhile. Who moves it has this hold still ([`hold`]).

mod by_log;
mod change;
mod due;
mod hold;
mod ship;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Serialize;
use tokio::sync::{RwLock, mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use vm_host::Vcpus;

use super::deposit::{self, Packing};
use super::seed::Via;
use super::settle;
use crate::control_socket::ControlSocket;
use crate::error::{Error, Result};
use crate::files::FileLock;
use crate::generations;
use crate::lease::Lease;
use crate::local::{self, Live, Made};
use crate::peers::Peer;
use crate::recording;
use crate::report::ByteReport;
use crate::store::VmDir;
use crate::transport::RateCap;

use change::Change;
use due::{Due, Sight};
use ship::{Shared, Shipping, Told};

pub(super) use by_log::Choice;
pub use by_log::{By, ByLog};
pub use due::{Policy, Why};
pub(crate) use hold::{hold, syncing_lock};

/// How often the VM is looked at.
const LOOK: Duration = Duration::from_secs(1);

/// How to keep standbys.
#[derive(Clone, Copy, Debug, Default)]
pub struct SyncOptions {
    /// When there is another epoch.
    pub policy: Policy,
    /// By what epochs are shipped.
    pub by: By,
    /// No more bits per second than these, to all standbys together.
    pub cap: Option<u64>,
    /// Besides what somebody relies on, so many of the newest generations stay here.
    pub keep: usize,
    /// Ends once all standbys have the first epoch.
    pub once: bool,
}

/// A standby, and the way to it.
#[derive(Clone, Debug)]
pub struct Route {
    /// The standby.
    pub to: Peer,
    /// The hub where it fetches what it is sent; none, where it is called itself.
    pub via: Option<Peer>,
}

/// What happens, for who watches.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "sync", rename_all = "snake_case")]
pub enum SyncEvent {
    /// There is another generation.
    Epoch {
        /// Its number.
        generation: u64,
        /// Why it was made.
        why: Why,
        /// For how long the guest stood still, in seconds.
        paused: f64,
    },
    /// A standby has it.
    Shipped(Box<Shipment>),
    /// A standby can't be brought up to date, and is tried again.
    Waiting {
        /// Which.
        site: String,
        /// Why.
        why: String,
        /// In so many seconds.
        seconds: f64,
    },
    /// Somebody else works on the VM: nothing happens meanwhile.
    Held,
    /// No epoch can be made for now.
    Hindered {
        /// Why.
        why: String,
    },
}

/// A generation came to a standby.
#[derive(Clone, Debug, Serialize)]
pub struct Shipment {
    /// The standby.
    pub site: String,
    /// The hub that holds it for the standby, if it did not go there itself.
    pub via: Option<Via>,
    /// The generation.
    pub generation: u64,
    /// The one that it had before.
    pub generation_from: Option<u64>,
    /// How it was replayed there, if it was shipped by log.
    pub by_log: Option<ByLog>,
    /// What crossed the socket.
    pub bytes: ByteReport,
    /// How long it took.
    pub seconds: f64,
}

/// Why keeping standbys ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum SyncEnded {
    /// Somebody wanted it to end.
    Stopped,
    /// All standbys have what they were to have.
    Done,
    /// The VM is another site's.
    Moved,
}

/// What was done.
#[derive(Clone, Debug, Serialize)]
pub struct SyncReport {
    /// Generations that were made for it.
    pub epochs: u64,
    /// What came to standbys, in order.
    pub shipped: u64,
    /// Bytes that crossed sockets for that.
    pub bytes_sent: u64,
    /// Why it ended.
    pub ended: SyncEnded,
}

/// Keeps standbys of a VM up to date until it moves or `stop` is cancelled.
///
/// # Errors
/// When something can't be done at first, or what will not go better by itself. Standbys are whole
/// in any case.
pub async fn sync(
    vm: &VmDir,
    routes: &[Route],
    options: SyncOptions,
    tell: &(dyn Fn(&SyncEvent) + Sync),
    stop: &CancellationToken,
) -> Result<SyncReport> {
    settle(vm).await?;
    vm.record()?;
    ship::check(routes)?;
    local::require_lease(vm)?;
    let _only = syncing_lock(vm)?.ok_or_else(|| {
        Error::Refused(format!("standbys of {} are being kept already", vm.name()))
    })?;
    deposit::clear(vm).await;
    let socket = hold::bind(vm)?;
    let (newest, of_newest) = watch::channel(0);
    let (held, of_held) = watch::channel(false);
    let (out, told) = mpsc::unbounded_channel();
    let gate = Arc::new(RwLock::new(()));
    let shipping = Shipping::default();
    let shared = Shared {
        vm: vm.clone(),
        newest: of_newest,
        held: of_held,
        gate: gate.clone(),
        shipping: shipping.clone(),
        cap: options.cap.map(|cap| Arc::new(RateCap::new(cap))),
        packing: Packing::default(),
        choice: Choice::new(options.by),
        out,
    };
    // Dropped, it ends those tasks.
    let mut shippers = JoinSet::new();
    for route in routes {
        shippers.spawn(ship::ship(shared.clone(), route.clone()));
    }
    let mut keeping = Keeping {
        vm,
        options,
        tell,
        standbys: routes.len(),
        due: Due::new(options.policy.or_default(), Instant::now()),
        change: Change::new(),
        vcpus: None,
        newest,
        held,
        gate,
        shipping,
        has: BTreeMap::new(),
        untidy: false,
        hindered: None,
        report: SyncReport {
            epochs: 0,
            shipped: 0,
            bytes_sent: 0,
            ended: SyncEnded::Stopped,
        },
    };
    let ended = Box::pin(keeping.run(&socket, told, stop)).await;
    let report = keeping.report;
    shippers.shutdown().await;
    deposit::clear(vm).await;
    drop(socket);
    hold::clear(vm)?;
    Ok(SyncReport {
        ended: ended?,
        ..report
    })
}

struct Keeping<'a> {
    vm: &'a VmDir,
    options: SyncOptions,
    tell: &'a (dyn Fn(&SyncEvent) + Sync),
    standbys: usize,
    due: Due,
    change: Change,
    /// The guest's processors, while they are there.
    vcpus: Option<Vcpus>,
    newest: watch::Sender<u64>,
    held: watch::Sender<bool>,
    gate: Arc<RwLock<()>>,
    shipping: Shipping,
    /// The generation that each standby has, of those it was sent from here.
    has: BTreeMap<String, u64>,
    /// There may be generations that nobody needs.
    untidy: bool,
    /// Why no epoch could be made when it was last looked.
    hindered: Option<String>,
    report: SyncReport,
}

impl Keeping<'_> {
    async fn run(
        &mut self,
        socket: &ControlSocket,
        mut told: mpsc::UnboundedReceiver<Told>,
        stop: &CancellationToken,
    ) -> Result<SyncEnded> {
        self.first().await?;
        let mut look = tokio::time::interval(LOOK);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = stop.cancelled() => return Ok(SyncEnded::Stopped),
                accepted = socket.listener.accept() => {
                    let (caller, _) = accepted.map_err(Error::file("accept on", &socket.path))?;
                    self.hold_still(caller, socket, stop).await;
                }
                // The shippers last as long as this.
                Some(told) = told.recv() => {
                    let heard = self.hear(told);
                    // A VM that another site has taken over is shipped nowhere.
                    if self.is_here()? {
                        heard?;
                    }
                    if self.options.once && self.up_to_date() == self.standbys {
                        return Ok(SyncEnded::Done);
                    }
                }
                _ = look.tick() => {
                    let looked = self.look().await;
                    self.note(looked);
                }
            }
            if self.vm.try_record()?.is_none() {
                return Ok(SyncEnded::Stopped);
            }
            if !self.is_here()? {
                return Ok(SyncEnded::Moved);
            }
        }
    }

    /// Whether the VM is this site's, as far as is known.
    fn is_here(&self) -> Result<bool> {
        let lease = self.vm.lease()?;
        Ok(matches!(lease, Lease::Held { .. } | Lease::Offered { .. }))
    }

    /// How many standbys have the newest generation.
    fn up_to_date(&self) -> usize {
        let newest = *self.newest.borrow();
        self.has.values().filter(|has| **has >= newest).count()
    }

    /// The first epoch: of a VM that is stopped the generation that there is.
    async fn first(&mut self) -> Result<()> {
        if local::attach(self.vm).await?.is_some() {
            let lock = self.vm.lock_soon().await?;
            let made = self.checkpoint(lock).await?;
            self.began(Why::First, made.manifest.generation, made.paused);
            return Ok(());
        }
        let newest = self.vm.generations()?.pop().ok_or_else(|| {
            Error::Refused(format!(
                "{0} has no generation yet, and does not run; start it with `replay-migrate vm \
                 start {0}`",
                self.vm.name()
            ))
        })?;
        self.began(Why::First, newest.generation, Duration::ZERO);
        Ok(())
    }

    async fn checkpoint(&mut self, _lock: FileLock) -> Result<Made> {
        local::require_lease(self.vm)?;
        let qemu = local::attach_running(self.vm).await?;
        self.vcpus = Some(qemu.vcpus());
        local::checkpoint_locked(self.vm, &qemu, None, local::After::GoesOn).await
    }

    fn began(&mut self, why: Why, generation: u64, paused: Duration) {
        self.due.began(Instant::now());
        if why != Why::Made {
            self.report.epochs += 1;
        }
        (self.tell)(&SyncEvent::Epoch {
            generation,
            why,
            paused: paused.as_secs_f64(),
        });
        self.newest.send_replace(generation);
    }

    fn hear(&mut self, told: Told) -> Result<()> {
        match told {
            Told::Shipped(shipment) => {
                self.report.shipped += 1;
                self.report.bytes_sent += shipment.bytes.sent;
                self.has.insert(shipment.site.clone(), shipment.generation);
                self.untidy = true;
                (self.tell)(&SyncEvent::Shipped(shipment));
                Ok(())
            }
            Told::Waiting { site, why, seconds } => {
                (self.tell)(&SyncEvent::Waiting { site, why, seconds });
                Ok(())
            }
            Told::Failed(error) => Err(error),
        }
    }

    /// Does nothing until the caller lets go, and all others that have come meanwhile: who of them works on the
    /// VM is settled by its lock.
    async fn hold_still(
        &mut self,
        caller: tokio::net::UnixStream,
        socket: &ControlSocket,
        stop: &CancellationToken,
    ) {
        (self.tell)(&SyncEvent::Held);
        self.held.send_replace(true);
        let gate = self.gate.clone();
        tokio::select! {
            () = async {
                // All have let go of what they shipped.
                let _all = gate.write().await;
                let mut callers = JoinSet::from_iter([hold::until_let_go(caller)]);
                loop {
                    tokio::select! {
                        gone = callers.join_next() => if gone.is_none() {
                            break;
                        },
                        Ok((caller, _)) = socket.listener.accept() => {
                            callers.spawn(hold::until_let_go(caller));
                        }
                    }
                }
            } => {}
            () = stop.cancelled() => {}
        }
        self.held.send_replace(false);
    }

    /// Begins an epoch if one is due, and clears away what nobody needs.
    async fn look(&mut self) -> Result<()> {
        if !matches!(self.vm.lease()?, Lease::Held { .. }) {
            return Ok(());
        }
        let newest = self
            .vm
            .generations()?
            .pop()
            .map(|manifest| manifest.generation);
        if let Some(newest) = newest.filter(|newest| *newest > *self.newest.borrow()) {
            self.began(Why::Made, newest, Duration::ZERO);
            return Ok(());
        }
        if let Err(error) = self.clear_away().await {
            // Room is no reason to be without a standby.
            tracing::warn!(vm = %self.vm.name(), error = error.chain(), "nothing was pruned");
        }
        let sight = self.sight().await?;
        // One that no standby is ready for would only be skipped.
        let Some(why) = self.due.look(sight).filter(|_| self.up_to_date() > 0) else {
            return Ok(());
        };
        let made = match self.vm.lock() {
            Ok(lock) => self.checkpoint(lock).await,
            Err(error) => Err(error),
        };
        match made {
            // The guest has not run since.
            Ok(made) if made.manifest.generation == *self.newest.borrow() => {
                self.due.began(Instant::now());
                Ok(())
            }
            Ok(made) => {
                self.began(why, made.manifest.generation, made.paused);
                Ok(())
            }
            // Somebody else works on it just now, or it has just stopped.
            Err(Error::Refused(why)) => {
                tracing::debug!(why, "no epoch");
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// What keeps an epoch from being made may pass, as a full disk does; it is told once.
    fn note(&mut self, looked: Result<()>) {
        let why = looked.err().map(|error| error.chain());
        if let Some(why) = &why
            && self.hindered.as_ref() != Some(why)
        {
            (self.tell)(&SyncEvent::Hindered { why: why.clone() });
        }
        self.hindered = why;
    }

    async fn sight(&mut self) -> Result<Sight> {
        let used = match self.used() {
            None => {
                self.vcpus = local::attach(self.vm).await?.map(|qemu| qemu.vcpus());
                self.used()
            }
            used => used,
        };
        let viewers = if self.due.asks_for_viewers() {
            recording::viewers(self.vm).await
        } else {
            None
        };
        let changed = match (self.due.asks_for_change(), Live::load(self.vm)?) {
            (true, Some(live)) if used.is_some() => {
                let ram = self.vm.runtime_dir("live")?.join("ram.img");
                let generation = self.vm.generation(*self.newest.borrow()).ram();
                let overlays = live.overlay_paths(self.vm);
                let mut change = std::mem::replace(&mut self.change, Change::new());
                let (change, changed) = local::blocking(move || {
                    let changed = change.since(&ram, &generation, &overlays);
                    Ok((change, changed))
                })
                .await?;
                self.change = change;
                // It may just have been checkpointed, or stopped: the next look tells.
                changed.unwrap_or_default()
            }
            _ => 0,
        };
        Ok(Sight {
            now: Instant::now(),
            used,
            viewers,
            changed,
        })
    }

    fn used(&self) -> Option<Duration> {
        self.vcpus.as_ref().and_then(|vcpus| vcpus.cpu_time().ok())
    }

    /// Generations that only were on their way to standbys go, but for those that are now.
    async fn clear_away(&mut self) -> Result<()> {
        if !self.untidy {
            return Ok(());
        }
        let keep = self.options.keep.max(1);
        match generations::prune_synced(self.vm, keep, || self.shipping.oldest()).await {
            Ok(_) => {
                self.untidy = false;
                Ok(())
            }
            // Somebody works on it, or follows it.
            Err(Error::Refused(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }
}
