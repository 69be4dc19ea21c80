//! The source's part of a migration, and of a seed.
//!
//! Whatever goes wrong before the lease has moved, [`migrate`] leaves the VM here, running if it
//! ran. The one moment at which that can't be known is between asking for the commit and hearing
//! that it was done; [`settle`] clears that up. A line that is lost is called again, see
//! [`persist`]; what a process leaves that is killed is put right by [`crate::moving::recover`].

mod account;
mod complete;
mod control;
mod deposit;
mod follow;
mod free;
mod hand_over;
mod later;
mod live;
mod open;
mod opening;
mod persist;
mod prepare;
mod replay;
mod seed;
mod standing;
mod stop;
pub mod sync;
mod twin;

use std::time::Duration;

use tokio_util::sync::CancellationToken;
use vm_host::{Status, Vm};

use crate::error::{Error, Result};
use crate::generation::GenerationId;
use crate::generations::{self, seen};
use crate::lease::Lease;
use crate::line::{CALL_AGAIN, Line};
use crate::local;
use crate::moving::Moving;
use crate::peers::{Peer, Permission};
use crate::phase::Phase;
use crate::plan;
use crate::progress::Progress;
use crate::protocol::Stage;
use crate::report::{ByteReport, MigrationReport, PhaseClock, Strategy};
use crate::store::VmDir;
use crate::work::Workplace;

use hand_over::{ask_target, give_way_if_so};
use persist::{Attempt, persist};
use prepare::{Migration, Prepared};
pub(crate) use stop::CLOSE;
use twin::Twin;

pub(crate) use deposit::clear_packing;
pub use follow::follow;
pub(crate) use follow::{clear_following, following_lock};
pub use hand_over::settle;
pub(crate) use hand_over::{ask_whether_superseded, settle_unattended};
pub(crate) use later::owed;
pub use later::supply;
pub use live::LiveOptions;
pub(crate) use live::{Judge, SHARE};
pub use seed::{SeedReport, Via, dry_run, seed};
pub use standing::{FollowOptions, Followed, Standing};
pub(crate) use sync::{hold, syncing_lock};

/// When the source's own replay takes place, see [`twin`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TwinTurn {
    /// Beside the target's.
    #[default]
    Beside,
    /// When the target's is over: where both sites share processors, neither slows down the
    /// other. It takes the time of another replay; the user works on meanwhile.
    After,
    /// Not at all: it is the processor's time and memory of one more guest.
    Never,
}

/// How to migrate.
#[derive(Clone, Copy, Debug)]
pub struct MigrateOptions {
    /// Which way; `None` for what is predicted to be best.
    pub strategy: Option<Strategy>,
    /// Leave the VM paused at the target.
    pub paused: bool,
    /// When to replay here as well.
    pub twin: TwinTurn,
    /// Replay without waiting out the time in which the user thought.
    pub quick: bool,
    /// When rounds of [`Strategy::Live`] are enough.
    pub live: LiveOptions,
    /// Make the guest's free pages zero before it moves: what they hold is not preserved.
    pub drop_free: bool,
    /// Disk images that the target lacks come after the VM, but for what the guest has of them in memory.
    pub post_copy: bool,
    /// How long a line that is lost is called again.
    pub give_up_after: Duration,
}

impl Default for MigrateOptions {
    fn default() -> Self {
        Self {
            strategy: None,
            paused: false,
            twin: TwinTurn::default(),
            quick: false,
            live: LiveOptions::default(),
            drop_free: false,
            post_copy: false,
            give_up_after: CALL_AGAIN,
        }
    }
}

/// Moves a VM to another site.
///
/// # Errors
/// In all cases but [`Error::InDoubt`] and [`Error::NotResumed`] the VM is here and as it was.
/// After [`Error::GaveUp`] the same call goes on with what the target has kept.
pub async fn migrate(
    vm: &VmDir,
    peer: &Peer,
    options: MigrateOptions,
    progress: &dyn Progress,
    cancel: &CancellationToken,
) -> Result<MigrationReport> {
    if options.drop_free && options.strategy == Some(Strategy::Live) {
        // They were sent by then; zeroes would be one change more.
        return Err(Error::Refused(
            "free pages can't be dropped with the strategy live, which sends pages before they \
             are known to be free; leave out one of the two"
                .into(),
        ));
    }
    let _held = hold(vm).await?;
    settle(vm).await?;
    peer.require(Permission::Receive)?;
    vm.record()?;
    if matches!(options.strategy, None | Some(Strategy::Replay)) {
        let moved = control::move_followed(vm, peer, &options, progress, cancel).await?;
        if let Some(report) = moved {
            return Ok(report);
        }
    } else {
        control::stop_following(vm).await?;
    }
    let options = match options.strategy {
        // The twin tells what is volatile in a state that stands still.
        Some(Strategy::Live) => MigrateOptions {
            twin: TwinTurn::Never,
            ..options
        },
        _ => options,
    };
    // The agent of this site would begin with it as soon as the VM has moved.
    let supplying = if options.post_copy {
        let only = later::supplying_lock(vm)?.ok_or_else(|| {
            Error::Refused(format!(
                "the rest of an earlier move of {} with --post-copy is on its way from here; try again when it is \
                 done, or move it without",
                vm.name()
            ))
        })?;
        Some(only)
    } else {
        None
    };
    let moving = Moving::begin(vm, peer, local::require_lease(vm)?)?;
    let moved = persist(vm, peer, moving, options, None, progress, cancel).await;
    let report = give_way_if_so(vm, peer, moved).await?;
    let rest = match supplying {
        Some(only) => later::bring_rest(vm, peer, only, progress, cancel).await,
        None => None,
    };
    Ok(MigrationReport { rest, ..report })
}

/// Moves a VM to a site that has a generation of it, standing still for no longer than `downtime` where
/// that can be reached.
///
/// # Errors
/// As [`migrate`]'s, and a refusal where the site is not known to have one.
pub async fn switch(
    vm: &VmDir,
    peer: &Peer,
    downtime: Duration,
    progress: &dyn Progress,
    cancel: &CancellationToken,
) -> Result<MigrationReport> {
    vm.record()?;
    if !seen::is_standby(vm, peer)? {
        return Err(Error::Refused(format!(
            "{0} is not known to have a generation of {1}: `replay-migrate sync {1} --to {0}` \
             makes it a standby, and `migrate` moves the VM without one",
            peer.name,
            vm.name()
        )));
    }
    let options = MigrateOptions {
        strategy: Some(Strategy::Live),
        live: LiveOptions {
            downtime,
            ..LiveOptions::default()
        },
        ..MigrateOptions::default()
    };
    migrate(vm, peer, options, progress, cancel).await
}

/// A line whose other end has all that it needs to begin; perhaps it has begun to follow.
struct Opened {
    line: Line,
    strategy: Strategy,
    base: Option<GenerationId>,
    /// Bits per second.
    rate: f64,
    /// Records that the target has.
    records: usize,
    /// What went over this line and, where the target follows, over those lost before it.
    bytes: ByteReport,
    /// The replay at this site that follows as well.
    twin: Option<Twin>,
    /// How far behind the target follows; nothing, where it does not.
    behind: Option<Duration>,
    /// What the target has kept of an earlier attempt.
    kept: Option<Stage>,
}

/// Migrates over a new line, or over one on which the target follows.
/// The VM's lock is held.
async fn migrate_from(attempt: Attempt<'_>, opened: Option<Opened>) -> Result<MigrationReport> {
    let Attempt {
        vm,
        peer,
        moving,
        options,
        view,
        progress,
        cancel,
    } = attempt;
    let record = vm.record()?;
    let fence = local::require_lease(vm)?;
    let qemu = local::attach_running(vm).await?;
    generations::finish_cut_off(vm, &qemu).await?;
    Workplace::Incoming.clear(vm).await?;
    if opened.is_none() {
        clear_following(vm).await?;
    }
    if local::still::is_noted(vm)? {
        // Whoever took its state is dead: they would hold the lock.
        local::resume_live(vm, &qemu).await?;
        local::still::end(vm)?;
    }
    let was_running = local::guest_status(vm, &qemu).await? == Status::Running;
    let mut run = Migration {
        vm,
        record: &record,
        peer,
        options,
        progress,
        qemu: &qemu,
        qemu_version: local::qemu_version().await?,
        was_running,
        fence,
        moving: moving.clone(),
        view: view.clone(),
        clock: PhaseClock::start(progress),
        stopped: false,
        twin: None,
        predicted: None,
        absent: Vec::new(),
    };
    run.note(Phase::Plan, false)?;
    // Up to the commit, the user can stop it; the commit itself takes a round trip and is seen
    // through.
    let prepared = {
        let go = run.prepare(opened);
        tokio::pin!(go);
        tokio::select! {
            biased;
            prepared = &mut go => Outcome::Over(prepared),
            () = cancel.cancelled() => Outcome::CalledOff,
            () = view.attend(vm, peer, progress) => {
                // From here on the line can't come back: what is decided now stands.
                if let Some(line) = view.line_now() {
                    line.cut();
                }
                Outcome::StoodStill
            }
        }
    };
    let outcome = match prepared {
        Outcome::Over(Ok(prepared)) => {
            let complete = run.complete(prepared);
            tokio::pin!(complete);
            tokio::select! {
                completed = &mut complete => Outcome::Over(completed),
                // It only tells: nobody stands still for so long by choice any more.
                () = view.attend(vm, peer, progress) => Outcome::Over(complete.await),
            }
        }
        Outcome::Over(Err(error)) => Outcome::Over(Err(error)),
        Outcome::CalledOff => Outcome::CalledOff,
        Outcome::StoodStill => Outcome::StoodStill,
    };
    let phase = run.clock.phase();
    let error = match outcome {
        Outcome::Over(Ok((report, lesson))) => {
            let report = MigrationReport {
                seconds: run.clock.seconds(),
                ..report
            };
            // The user is at the target already.
            if let Some(lesson) = lesson
                && let Err(error) = plan::learn(vm, &report, lesson).await
            {
                tracing::warn!(error = error.chain(), "what this took was not noted");
            }
            return Ok(report);
        }
        Outcome::Over(Err(error)) => Error::Phase {
            phase,
            source: Box::new(error),
        },
        Outcome::CalledOff => Error::Interrupted(phase),
        Outcome::StoodStill => Error::Phase {
            phase,
            source: Box::new(Error::StoodStill {
                vm: vm.name().to_string(),
                site: peer.name.to_string(),
                waited: persist::STAND_STILL,
            }),
        },
    };
    if let Some(line) = view.line_now() {
        // If it can be told, the target need not wait for what will not come.
        line.ended().await;
    }
    let resume = was_running && run.stopped;
    let twin = run.twin.take();
    let undone = undo(vm, &qemu, resume).await;
    if let Some(twin) = twin {
        twin.kill().await;
    }
    warn_unclean(Workplace::Incoming.clear(vm).await);
    if undone? {
        // One that was offered is settled, and its note is gone.
        if run.moving.phase != Phase::Commit {
            run.note(Phase::Hello, false)?;
        }
        Err(error)
    } else {
        Err(Error::NotResumed {
            vm: vm.name().to_string(),
            site: peer.name.to_string(),
            source: Box::new(error),
        })
    }
}

/// Puts things back after a migration that did not succeed; whether the VM is here.
async fn undo(vm: &VmDir, qemu: &Vm, resume: bool) -> Result<bool> {
    let here = match vm.lease()? {
        Lease::Held { .. } => true,
        Lease::Offered { to_name, .. } => match ask_target(vm, Some(qemu)).await {
            Ok(here) => here,
            // What was answered could not be noted: it may be the target's.
            Err(error)
                if !matches!(error, Error::InDoubt { .. })
                    && matches!(vm.lease(), Ok(Lease::Offered { .. })) =>
            {
                return Err(Error::InDoubt {
                    vm: vm.name().to_string(),
                    site: to_name,
                    source: Some(Box::new(error)),
                });
            }
            Err(error) => return Err(error),
        },
        Lease::Elsewhere { .. } => false,
    };
    if here && resume {
        local::resume_live(vm, qemu).await?;
    }
    Ok(here)
}

/// How an attempt went on.
enum Outcome<T> {
    /// To its end, or to a failure.
    Over(Result<T>),
    /// The user does not want it any more.
    CalledOff,
    /// The guest had stood still for too long without a line.
    StoodStill,
}

/// What a replay here left behind hinders nobody, and the next migration clears it away.
fn warn_unclean(cleaned: Result<()>) {
    if let Err(error) = cleaned {
        tracing::warn!(
            error = error.chain(),
            "a replay at this site left something"
        );
    }
}
