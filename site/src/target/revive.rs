//! Working copies that outlived an agent: one that was killed while images came in is started
//! again, and goes on with what arrived.
//!
//! Only a copy whose replay is over is kept: of a replay that was under way its fork may live, but
//! nobody knows any more what it was given last. That one is cleared away, and the source, which
//! is told that nothing is here, has the log replayed anew.

use std::time::Duration;

use super::check::{check_allowed, check_known};
use super::{Session, Standbys, standby};
use crate::error::{Error, Result};
use crate::store::VmDir;
use crate::work::{KeptNote, Work, Workplace};

/// Puts what an agent left that died in order: a working copy that may be asked for again waits,
/// everything else is cleared away. The lock is taken for as long as it waits; who works on the VM
/// right now is left alone.
pub(crate) async fn revive(vm: &VmDir, standbys: &Standbys) -> Result<()> {
    let Ok(lock) = vm.lock() else {
        return Ok(());
    };
    let kept = match kept(vm).await {
        Ok(kept) => kept,
        Err(error) => {
            let error = error.chain();
            tracing::warn!(vm = %vm.name(), error, "what had arrived is of no use");
            None
        }
    };
    let Some((note, work, left)) = kept else {
        return Workplace::Incoming.clear(vm).await;
    };
    let peer = vm.store().peers().of_key(&note.peer)?.ok_or_else(|| {
        Error::Refused("the site that it came from is trusted no longer".to_owned())
    })?;
    let mut session = Session::new(vm, peer, note.hello, Some(lock));
    session.plan = Some(note.plan);
    session.work = Some(work);
    tracing::info!(vm = %vm.name(), ?left, "what arrived before this agent was started is kept");
    standbys.park_for(session, left);
    Ok(())
}

/// The working copy that was left, if it is whole and still wanted.
async fn kept(vm: &VmDir) -> Result<Option<(KeptNote, Work, Duration)>> {
    let Ok(entries) = std::fs::read_dir(vm.incoming()) else {
        return Ok(None);
    };
    let noted = entries.flatten().find_map(|entry| {
        let dir = entry.path();
        KeptNote::load(&dir).map(|note| (note, dir))
    });
    let Some((note, dir)) = noted else {
        return Ok(None);
    };
    let Some(left) = note.left(standby::PATIENCE) else {
        return Ok(None);
    };
    let named = dir
        .file_name()
        .is_some_and(|name| *name == *note.hello.transfer.to_string());
    let void = vm.store().void_dir().join(note.hello.transfer.to_string());
    let Some(peer) = vm.store().peers().of_key(&note.peer)? else {
        return Ok(None);
    };
    if !named || void.exists() || note.hello.vm.name != *vm.name() {
        return Ok(None);
    }
    note.hello.validate()?;
    check_allowed(&peer, &note.hello)?;
    check_known(vm, &note.hello, &peer)?;
    let base = match note.plan.base {
        None => None,
        Some(base) => {
            let here = vm.generation(base.number).load_manifest()?;
            if here.is_none_or(|here| here.identity() != base) {
                return Ok(None);
            }
            Some(base.number)
        }
    };
    // A fork that outlived the agent has no place beside images.
    Workplace::Incoming.end_fork(vm).await?;
    let work = Work::reopen(vm, &note.hello, base, note.disks_whole).await?;
    Ok(Some((note, work, left)))
}
