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
use crate::protocol::{Purpose, ToSource, ToTarget, Welcome};
use crate::report::ByteReport;
use crate::state::{Base, State};
use crate::store::VmDir;
use crate::transport::RateCap;
use crate::vm::{Id, VmRecord};

use super::LiveOptions;
use super::account::{account, finish_traffic};
use super::control;
use super::hand_over::{give_way_if_so, settle};
use super::opening::{begin, hello, live};
use super::sync;

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

pub(super) async fn ship_generation(
    line: &mut Line,
    vm: &VmDir,
    record: &VmRecord,
    number: u64,
    welcome: &Welcome,
    rate: f64,
    progress: &dyn Progress,
) -> Result<Vec<Sent>> {
    let manifest = vm.manifest(number)?;
    let id = manifest.identity();
    let common = welcome
        .common
        .iter()
        .rfind(|id| id.number < number)
        .map(|id| id.number);
    let (state, base) = {
        let (vm, record, manifest) = (vm.clone(), record.clone(), manifest.clone());
        local::blocking(move || {
            Ok((
                Arc::new(State::of_generation(&vm, &manifest)?),
                Arc::new(Base::load(&vm, &record, common)?),
            ))
        })
        .await?
    };
    line.send(ToTarget::Generation {
        manifest: Box::new(manifest),
        base: common,
    })
    .await?;
    let out = Outgoing {
        state: &state,
        base: &base,
        replayed: false,
        twin: None,
        rate,
        progress,
    };
    let sent = exchange::send_images(line, &out, &mut |_| {}).await?;
    line.send(ToTarget::Publish).await?;
    match line.recv(Phase::Base).await? {
        ToSource::Published => {
            seen::shared(vm, line.peer(), id)?;
            Ok(sent)
        }
        _ => Err(line.unexpected(Phase::Base, "no word that it kept the generation")),
    }
}

/// What seeding a site took.
#[derive(Clone, Debug, serde::Serialize)]
pub struct SeedReport {
    /// The generation that the site has now.
    pub generation: u64,
    /// The generation that both had before.
    pub generation_from: Option<u64>,
    /// What crossed the socket.
    pub bytes: ByteReport,
    /// Seconds in all.
    pub seconds: f64,
}

/// Ships the newest generation of a VM to another site.
pub async fn seed(vm: &VmDir, peer: &Peer, progress: &dyn Progress) -> Result<SeedReport> {
    let _held = sync::hold(vm).await?;
    settle(vm).await?;
    let seeded = {
        let _lock = vm.lock_soon().await?;
        ship_newest(vm, peer, None, progress).await
    };
    give_way_if_so(vm, peer, seeded).await
}

/// The same, with nothing locked: the caller sees to it that the generation stays. Dropped, it calls
/// the conversation off.
pub(super) async fn ship_newest(
    vm: &VmDir,
    peer: &Peer,
    cap: Option<Arc<RateCap>>,
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
    if !welcome.common.contains(&newest.identity()) {
        let number = newest.generation;
        let sent =
            ship_generation(&mut line, vm, &record, number, &welcome, rate, progress).await?;
        account(&mut bytes, &sent);
        LinkHistory::load(vm.store())?.note(vm.store(), peer, &sent)?;
    }
    finish_traffic(&mut bytes, &handle);
    line.close().await;
    Ok(SeedReport {
        generation: newest.generation,
        generation_from: welcome.common.last().map(|id| id.number),
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
