//! Moving over a line that fails: one attempt after another, each with what the target has kept of
//! the one before.
//!
//! A line that is cut is called again beneath the conversation ([`crate::transport::lasting`]), and
//! costs nothing but time. Another attempt begins where that is not enough: where the target's
//! agent was started anew, and where the guest has stood still for [`STAND_STILL`]. Then it goes
//! on here, so that its user can; the next attempt stops it again, once the line is back.
//! It is the same transfer, so that a target that has waited goes on with its working copy.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{MigrateOptions, Opened, migrate_from};
use crate::error::{Error, Result};
use crate::lease::Lease;
use crate::moving::Moving;
use crate::peers::Peer;
use crate::phase::Phase;
use crate::progress::Progress;
use crate::report::{ByteReport, MigrationReport};
use crate::store::VmDir;
use crate::transport::{Condition, LineHandle};
use crate::vm::Id;

/// How long a guest stands still for a line that is lost. A person waits so long for a page.
pub(super) const STAND_STILL: Duration = Duration::from_secs(15);

/// Waits between attempts: the first, and the longest.
const BACK_OFF: [Duration; 2] = [Duration::from_millis(500), Duration::from_secs(10)];

/// A target that forgets so often is not going to remember.
const ATTEMPTS: u32 = 12;

/// Whether the guest waits for the line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Guest {
    /// It runs, or did not run before either.
    Runs,
    /// It stands still, and goes on here if need be.
    StandsStill,
    /// It stands still and may be the target's: there is no way back.
    HandedOver,
}

/// What is to be seen of an attempt from outside.
pub(super) struct View {
    line: watch::Sender<Option<LineHandle>>,
    guest: watch::Sender<Guest>,
}

impl View {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self {
            line: watch::Sender::new(None),
            guest: watch::Sender::new(Guest::Runs),
        })
    }

    pub(super) fn line(&self, line: LineHandle) {
        self.line.send_replace(Some(line));
    }

    pub(super) fn guest(&self, guest: Guest) {
        self.guest.send_replace(guest);
    }

    /// The line, once there is one.
    pub(super) fn line_now(&self) -> Option<LineHandle> {
        self.line.borrow().clone()
    }

    /// Tells how the line is, until the guest has stood still for too long.
    pub(super) async fn attend(&self, vm: &VmDir, peer: &Peer, progress: &dyn Progress) {
        let mut line = self.line.subscribe();
        let line = match line.wait_for(Option::is_some).await {
            Ok(line) => line.clone(),
            // The view is there as long as this is.
            Err(_) => None,
        };
        let Some(line) = line else {
            return std::future::pending().await;
        };
        let (mut condition, mut guest) = (line.condition(), self.guest.subscribe());
        let mut told = false;
        loop {
            let now = condition.borrow_and_update().clone();
            let stands = *guest.borrow_and_update();
            let late = match now {
                Condition::Up => {
                    if std::mem::take(&mut told) {
                        progress.note(&format!("the line to {} is back", peer.name));
                    }
                    None
                }
                Condition::Down { since, why } => {
                    if !std::mem::replace(&mut told, true) {
                        progress.note(&lost(vm, peer, &why, stands));
                    }
                    (stands == Guest::StandsStill).then_some(since + STAND_STILL)
                }
                Condition::Ended => return std::future::pending().await,
            };
            let too_late = async {
                match late {
                    Some(late) => tokio::time::sleep_until(late.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = too_late => return,
                changed = condition.changed() => if changed.is_err() {
                    return std::future::pending().await;
                },
                changed = guest.changed() => if changed.is_err() {
                    return std::future::pending().await;
                },
            }
        }
    }
}

fn lost(vm: &VmDir, peer: &Peer, why: &str, guest: Guest) -> String {
    let meanwhile = match guest {
        Guest::Runs => format!("{} goes on here meanwhile", vm.name()),
        Guest::StandsStill => format!(
            "{} stands still, and goes on here in {} s if the line is not back by then",
            vm.name(),
            STAND_STILL.as_secs()
        ),
        Guest::HandedOver => format!(
            "{} was just handed over, and it is not known yet whether {} has it",
            vm.name(),
            peer.name
        ),
    };
    format!(
        "the line to {} is lost ({why}); calling again: {meanwhile}",
        peer.name
    )
}

/// One attempt of several.
pub(super) struct Attempt<'a> {
    pub(super) vm: &'a VmDir,
    pub(super) peer: &'a Peer,
    pub(super) moving: &'a Moving,
    pub(super) options: MigrateOptions,
    /// What those who wait see of it.
    pub(super) view: Arc<View>,
    pub(super) progress: &'a dyn Progress,
    pub(super) cancel: &'a CancellationToken,
}

/// Moves a VM over as many lines as it takes, within what the options allow.
pub(super) async fn persist(
    vm: &VmDir,
    peer: &Peer,
    moving: Moving,
    options: MigrateOptions,
    mut opened: Option<Opened>,
    progress: &dyn Progress,
    cancel: &CancellationToken,
) -> Result<MigrationReport> {
    let _lock = vm.lock_soon().await?;
    let mut moving = moving;
    let mut reached = opened.is_some();
    let mut carried = ByteReport::default();
    let mut wait = BACK_OFF[0];
    let mut lost: Option<Instant> = None;
    let mut attempts = 0;
    loop {
        attempts += 1;
        let view = View::new();
        let attempt = Attempt {
            vm,
            peer,
            moving: &moving,
            options,
            view: view.clone(),
            progress,
            cancel,
        };
        let error = match Box::pin(migrate_from(attempt, opened.take())).await {
            Ok(mut report) => {
                report.bytes.sent += carried.sent;
                report.bytes.received += carried.received;
                report.bytes.resent += carried.resent;
                return Ok(report);
            }
            Err(error) => error,
        };
        let line = view.line_now();
        let here = matches!(vm.lease()?, Lease::Held { .. });
        if !here || !error.may_go_better() {
            // Nothing is kept there, unless nobody there has heard of it.
            if here && !line.is_some_and(|line| line.is_down()) {
                Moving::forget(vm)?;
            }
            return Err(error);
        }
        if let Some(line) = line {
            reached = true;
            carried.sent += line.traffic().sent();
            carried.received += line.traffic().received();
            carried.resent += line.resent();
            wait = BACK_OFF[0];
            lost = None;
        } else if !reached {
            // At first a person looks on: what can't be done is said at once.
            return Err(error);
        }
        if Moving::load(vm)?.is_none() {
            // It was settled that the hand-over did not take place: it never will.
            moving = Moving::of(Id::random()?, peer, moving.fence);
        }
        let waited = error.waited();
        let since = *lost.get_or_insert_with(|| {
            let now = Instant::now();
            now.checked_sub(waited).unwrap_or(now)
        });
        let left = options.give_up_after.saturating_sub(since.elapsed());
        if left.is_zero() || attempts >= ATTEMPTS {
            return Err(Error::GaveUp {
                vm: vm.name().to_string(),
                site: peer.name.to_string(),
                seconds: since.elapsed().as_secs(),
                source: Box::new(error),
            });
        }
        progress.note(&format!(
            "the move to {} was cut off ({}); {} goes on here, and {} is called again for {} s",
            peer.name,
            error.chain(),
            vm.name(),
            peer.name,
            left.as_secs()
        ));
        tokio::select! {
            () = tokio::time::sleep(wait.min(left)) => {}
            () = cancel.cancelled() => return Err(Error::Interrupted(Phase::Hello)),
        }
        wait = (wait * 2).min(BACK_OFF[1]);
    }
}
