//! A migration, and the fault that strikes it.

use std::time::{Duration, Instant};

use anyhow::Context;
use serde_json::Value;
use testkit::site::{Finished, Recorder, Running};

use crate::case::{Case, Fault, Phase, Side, Way};
use crate::world::{VM, World};

/// A phase that has not begun by then never will.
const PHASE_LIMIT: Duration = Duration::from_secs(120);
/// A command that has neither ended nor gone on by then hangs.
const END_LIMIT: Duration = Duration::from_secs(240);
/// How long who has no peer, no line or no room is left alone, before all is well again.
const PATIENCE: Duration = Duration::from_secs(3);
/// `replay-migrate` refused, and nothing changed.
const REFUSED: Option<i32> = Some(3);
/// What a command notes that takes up what the target has kept.
const KEPT: &str = "going on with what";
/// How often the outside world is looked at.
const STEP: Duration = Duration::from_millis(1);

/// How the attempt that was struck went.
pub(crate) struct Struck {
    pub(crate) finished: Finished,
    /// Of the VM, when it was struck.
    pub(crate) qemu: Option<u32>,
    pub(crate) recorder: Option<Recorder>,
}

/// The words of a migration.
fn words<'a>(case: Case, to: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let twin = if case.has_twin() { "beside" } else { "never" };
    let strategy = match case.way() {
        Way::Replay => "replay",
        Way::Base => "base",
    };
    let mut words = vec![
        "migrate",
        VM,
        "--to",
        to,
        "--strategy",
        strategy,
        "--twin",
        twin,
    ];
    words.extend(more);
    words
}

/// Begins a migration, strikes, and puts all right again; the command has ended.
pub(crate) async fn strike(
    world: &mut World,
    case: Case,
    stall: Duration,
) -> anyhow::Result<Struck> {
    let recorder = match case.way() {
        Way::Replay => Some(world.record().await?),
        Way::Base => None,
    };
    let to = world.site(Side::Target).name().to_owned();
    let qemu = world.qemu(Side::Source).map(|qemu| qemu.pid);
    let mut migration = world.site(Side::Source).spawn(&words(case, &to, &[]))?;
    reach(world, case, &mut migration).await?;
    inflict(world, case).await?;
    if (case.fault, case.side) == (Fault::Process, Side::Source) {
        migration.kill();
    }
    let patience = if case.fault == Fault::Stall {
        stall
    } else {
        PATIENCE
    };
    // Who goes on by itself needs what is missing; who gives up has done so by now.
    let ended = migration.until("end", patience, |_| false).await.is_ok();
    // A full disk stays full: nobody waits for room.
    let lasts = matches!(case.fault, Fault::Full | Fault::Sync);
    if lasts && !ended {
        let _ = migration.until("end", END_LIMIT, |_| false).await;
    }
    world.mend().await?;
    let finished = migration.finish(END_LIMIT).await?;
    Ok(Struck {
        finished,
        qemu,
        recorder,
    })
}

/// Waits until the migration is where it is to be struck.
async fn reach(world: &World, case: Case, migration: &mut Running) -> anyhow::Result<()> {
    let wanted = match case.phase {
        // The last that the source says before.
        Phase::Taken => Phase::Commit,
        phase => phase,
    };
    let begun = migration
        .until("reach the phase", PHASE_LIMIT, |line| {
            line["phase"] == wanted.name()
        })
        .await?;
    begun.with_context(|| format!("it ended before {wanted}: {}", migration.stderr()))?;
    if case.phase == Phase::Taken {
        until("the target to take the VM", || {
            Ok((world.right(Side::Target)? == "held").then_some(()))
        })
        .await?;
    }
    Ok(())
}

async fn inflict(world: &mut World, case: Case) -> anyhow::Result<()> {
    let side = case.side;
    match case.fault {
        Fault::Process => {
            if side == Side::Target {
                world.site_mut(side).kill_agent();
            }
        }
        Fault::Qemu => {
            let qemu = until("a QEMU of the VM", || Ok(world.qemu(side))).await?;
            qemu.kill();
        }
        Fault::Replay => {
            let qemu = until("a QEMU that replays", || Ok(world.replaying_qemu(side))).await?;
            qemu.kill();
        }
        Fault::Cut => world.link().cut(),
        Fault::Stall => world.link().stall(),
        Fault::Damage => match side {
            Side::Source => world.link().damage_down(),
            Side::Target => world.link().damage_up(),
        },
        Fault::Full => world.volume(side).fill()?,
        Fault::Sync => world.volume(side).fail_syncs()?,
    }
    Ok(())
}

/// Waits until the outside world shows something.
async fn until<T>(
    what: &str,
    mut look: impl FnMut() -> anyhow::Result<Option<T>>,
) -> anyhow::Result<T> {
    let end = Instant::now() + PHASE_LIMIT;
    loop {
        if let Some(seen) = look()? {
            return Ok(seen);
        }
        anyhow::ensure!(Instant::now() < end, "waited in vain for {what}");
        tokio::time::sleep(STEP).await;
    }
}

/// How the next attempt went.
pub(crate) struct Again {
    /// What it reported.
    pub(crate) report: Value,
    /// It went on with what the target had kept of the first.
    pub(crate) kept: bool,
}

/// The next attempt, which leaves the VM paused at the target.
pub(crate) async fn again(world: &World, case: Case) -> anyhow::Result<Again> {
    let to = world.site(Side::Target).name().to_owned();
    // Who lost its QEMU lost its recording as well.
    let case = if case.loses_the_run() {
        Case {
            phase: Phase::Hello,
            ..case
        }
    } else {
        case
    };
    let end = Instant::now() + PATIENCE;
    loop {
        let migration = world
            .site(Side::Source)
            .spawn(&words(case, &to, &["--paused"]))?;
        let finished = migration.finish(END_LIMIT).await?;
        // Whoever puts things right there is done in a moment.
        let busy = finished.code == REFUSED && finished.stderr.contains("another replay-migrate");
        if busy && Instant::now() < end {
            tokio::time::sleep(PATIENCE / 10).await;
            continue;
        }
        return Ok(Again {
            kept: finished.lines.iter().any(|line| line.contains(KEPT)),
            report: finished.success()?.last()?,
        });
    }
}
