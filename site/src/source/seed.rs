//! Shipping what a target lacks ahead of a migration: base files and generations. And asking what
//! a migration would cost.

use std::sync::Arc;
use std::time::Instant;

use crate::error::{Error, Result};
use crate::exchange::{self, Outgoing, Sent};
use crate::generations::seen;
use crate::line::{Line, LinkHistory};
use crate::local::{self};
use crate::peers::{Peer, Permission};
use crate::phase::Phase;
use crate::plan::{self, Estimates, Feasible};
use crate::progress::Progress;
use crate::protocol::{Plan, Purpose, ToSource, ToTarget, Welcome};
use crate::report::{ByteReport, ReplaySummary, Strategy};
use crate::state::{Base, State};
use crate::store::VmDir;
use crate::transport::RateCap;
use crate::vm::{Id, VmRecord};

use super::LiveOptions;
use super::account::{account, finish_traffic};
use super::control;
use super::hand_over::{give_way_if_so, settle};
use super::opening::{begin, hello, live};
use super::sync::{self, ByLog, Choice};

pub(super) async fn ship_files(
    line: &mut Line,
    vm: &VmDir,
    record: &VmRecord,
    welcome: &Welcome,
    progress: &dyn Progress,
) -> Result<()> {
    for file in record.base_files() {
        if welcome.lacks.contains(&file.hash) {
            progress.note(&format!(
                "{} lacks the base file {}; sending it",
                line.peer().name,
                file.hash
            ));
            line.send(ToTarget::File(file)).await?;
            exchange::send_file(line, &vm.store().base_path(file.hash), progress).await?;
        }
    }
    Ok(())
}

/// A generation that was shipped.
pub(super) struct Shipped {
    pub(super) sent: Vec<Sent>,
    /// The log, if it went that way.
    log: u64,
    by_log: Option<ByLog>,
}

/// Ships a generation as what differs from the newest older one that the target has; by log, where
/// `choice` says so.
#[expect(clippy::too_many_arguments)]
pub(super) async fn ship_generation(
    line: &mut Line,
    vm: &VmDir,
    record: &VmRecord,
    number: u64,
    welcome: &Welcome,
    rate: f64,
    mut choice: Option<&mut Choice>,
    progress: &dyn Progress,
) -> Result<Shipped> {
    let manifest = vm.manifest(number)?;
    let id = manifest.identity();
    let common = welcome.common.iter().rfind(|id| id.number < number);
    let common = common.copied();
    let (state, base) = {
        let (vm, record, manifest) = (vm.clone(), record.clone(), manifest.clone());
        local::blocking(move || {
            Ok((
                Arc::new(State::of_generation(&vm, &manifest)?),
                Arc::new(Base::load(&vm, &record, common.map(|id| id.number))?),
            ))
        })
        .await?
    };
    let recorded = match (choice.as_deref_mut(), common) {
        (Some(choice), Some(from)) => {
            let stretch = [from.number, number];
            choice.recorded(vm, stretch, &state, &base, rate).await
        }
        _ => None,
    };
    if recorded.is_some() {
        line.send(ToTarget::Plan(Plan {
            strategy: Strategy::Replay,
            base: common,
            quick: true,
        }))
        .await?;
    }
    line.send(ToTarget::Generation {
        manifest: Box::new(manifest),
        base: common.map(|id| id.number),
    })
    .await?;
    let by_log = match &recorded {
        Some(recorded) => Some(ByLog {
            replay: have_replayed(line, &recorded.segment, progress).await?,
            state_expected: recorded.state_expected.map(|bytes| bytes as u64),
        }),
        None => None,
    };
    let out = Outgoing {
        state: &state,
        base: &base,
        replayed: by_log.is_some(),
        twin: None,
        rate,
        progress,
    };
    let sent = exchange::send_images(line, &out, &mut |_| {}).await?;
    line.send(ToTarget::Publish).await?;
    match line.recv(Phase::Base).await? {
        ToSource::Published => {
            seen::shared(vm, line.peer(), id)?;
        }
        _ => return Err(line.unexpected(Phase::Base, "no word that it kept the generation")),
    }
    let log = recorded
        .as_ref()
        .map_or(0, |recorded| recorded.segment.len());
    if let (Some(choice), Some(recorded)) = (choice, recorded) {
        let images = sent.iter().map(|sent| sent.hashes + sent.payload);
        let all = log as u64 + images.sum::<u64>();
        choice.took(all, recorded.state_expected);
    }
    Ok(Shipped {
        sent,
        log: log as u64,
        by_log,
    })
}

/// Has the target replay a log on the working copy of the generation that was announced.
async fn have_replayed(
    line: &mut Line,
    segment: &[u8],
    progress: &dyn Progress,
) -> Result<ReplaySummary> {
    for part in reconciler::blob_parts(segment) {
        line.send(ToTarget::Log(part)).await?;
    }
    line.flush().await?;
    let summary = loop {
        match line.recv(Phase::Replay).await? {
            ToSource::Replaying { done, total } => {
                progress.advance(Phase::Replay, done, Some(total));
            }
            ToSource::Replayed(summary) => break summary,
            _ => return Err(line.unexpected(Phase::Replay, "no word of the replay")),
        }
    };
    line.send(ToTarget::Freeze).await?;
    Ok(summary)
}

/// What seeding a site took.
#[derive(Clone, Debug, serde::Serialize)]
pub struct SeedReport {
    /// The generation that the site has now.
    pub generation: u64,
    /// The generation that both had before.
    pub generation_from: Option<u64>,
    /// How it was replayed there, if it was shipped by log.
    pub by_log: Option<ByLog>,
    /// Where it lies, if the site is to fetch it itself.
    pub via: Option<Via>,
    /// What crossed the socket.
    pub bytes: ByteReport,
    /// Seconds in all.
    pub seconds: f64,
}

/// The hub that holds a generation for a site.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Via {
    /// Its name.
    pub hub: String,
    /// The newest generation that the site has of those that are here, by the last word that the hub
    /// has of it.
    pub has: Option<u64>,
    /// How long ago that was said, in seconds by both sites' clocks.
    pub said: Option<u64>,
}

/// Ships the newest generation of a VM to another site.
pub async fn seed(vm: &VmDir, peer: &Peer, progress: &dyn Progress) -> Result<SeedReport> {
    let _held = sync::hold(vm).await?;
    settle(vm).await?;
    let seeded = {
        let _lock = vm.lock_soon().await?;
        ship_newest(vm, peer, None, None, progress).await
    };
    give_way_if_so(vm, peer, seeded).await
}

/// The same, with nothing locked: the caller sees to it that the generation stays. Dropped, it calls
/// the conversation off.
pub(super) async fn ship_newest(
    vm: &VmDir,
    peer: &Peer,
    cap: Option<Arc<RateCap>>,
    choice: Option<&mut Choice>,
    progress: &dyn Progress,
) -> Result<SeedReport> {
    let begun = Instant::now();
    peer.require(Permission::Receive)?;
    let record = vm.record()?;
    let newest = vm.generations()?.pop().ok_or_else(|| {
        Error::Refused(format!(
            "{0} has no generation yet; make one with `replay-migrate checkpoint {0}` or `record {0}`",
            vm.name()
        ))
    })?;
    progress.phase(Phase::Hello);
    let mut line = Line::connect_capped(vm.store(), peer, cap).await?;
    let handle = line.handle();
    // Of a stale copy more may be known than by its lease.
    let fence = vm.title()?.fence();
    let next = newest.generation + 1;
    let hello = hello(
        vm,
        &record,
        peer,
        Purpose::Seed,
        Id::random()?,
        fence,
        next,
        &newest.qemu,
    )?;
    let (welcome, rate) = begin(&mut line, vm, hello).await?;
    progress.phase(Phase::Base);
    ship_files(&mut line, vm, &record, &welcome, progress).await?;
    let mut bytes = ByteReport::default();
    let mut by_log = None;
    if !welcome.common.contains(&newest.identity()) {
        let number = newest.generation;
        let shipped = ship_generation(
            &mut line, vm, &record, number, &welcome, rate, choice, progress,
        );
        let shipped = shipped.await?;
        account(&mut bytes, &shipped.sent);
        (bytes.log, by_log) = (shipped.log, shipped.by_log);
        LinkHistory::load(vm.store())?.note(vm.store(), peer, &shipped.sent)?;
    }
    finish_traffic(&mut bytes, &handle);
    line.close().await;
    Ok(SeedReport {
        generation: newest.generation,
        generation_from: welcome.common.last().map(|id| id.number),
        by_log,
        via: None,
        bytes,
        seconds: begun.elapsed().as_secs_f64(),
    })
}

/// Predicts what each strategy would cost, and changes nothing: also a site that follows goes on
/// as it did.
///
/// # Errors
/// As those of a migration without a chosen strategy that would be refused.
pub async fn dry_run(vm: &VmDir, peer: &Peer, progress: &dyn Progress) -> Result<Estimates> {
    let estimated = estimate(vm, peer, progress).await;
    give_way_if_so(vm, peer, estimated).await
}

async fn estimate(vm: &VmDir, peer: &Peer, progress: &dyn Progress) -> Result<Estimates> {
    settle(vm).await?;
    peer.require(Permission::Receive)?;
    let record = vm.record()?;
    let fence = local::require_lease(vm)?;
    local::attach_running(vm).await?;
    let following = control::standing(vm, peer).await?;
    progress.phase(Phase::Hello);
    let mut line = Line::connect(vm.store(), peer).await?;
    let next = local::next_generation(vm)?;
    let hello = hello(
        vm,
        &record,
        peer,
        Purpose::Estimate,
        Id::random()?,
        fence,
        next,
        &local::qemu_version().await?,
    )?;
    let (welcome, rate) = begin(&mut line, vm, hello).await?;
    line.close().await;
    progress.phase(Phase::Plan);
    let live = live(vm)?;
    let feasible = Feasible::of(vm, &live, &welcome)?;
    let rounds = Some(LiveOptions::default());
    plan::estimate(vm, &record, &live, feasible, rate, following, rounds).await
}
