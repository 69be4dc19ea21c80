//! The source's side: a parcel is made for a standby, and left at a hub.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::{Mutex, mpsc};

use super::account::{account, finish_traffic};
use super::opening::hello;
use super::seed::{SeedReport, Via};
use super::sync::syncing_lock;
use crate::error::{Error, Result};
use crate::generation::Manifest;
use crate::generations::seen;
use crate::hub::{Next, Packed, Parcel, Receipt, pack};
use crate::line::{Line, LinkHistory};
use crate::local::{blocking, joined};
use crate::peers::{Peer, Permission};
use crate::phase::Phase;
use crate::protocol::{Purpose, ToSource, ToTarget};
use crate::report::ByteReport;
use crate::store::VmDir;
use crate::transport::RateCap;
use crate::vm::Id;
use crate::work::Workplace;

/// What a line is taken for that was never measured: a thin one.
const THIN: f64 = 10e6;

/// Bytes of a message.
const PART: usize = 256 << 10;

/// One parcel is packed at a time.
pub(super) type Packing = Arc<Mutex<()>>;

/// Leaves the newest generation of a VM at a hub, sealed for a standby. The caller sees to it that the
/// generation stays, and holds the lock of who keeps standbys. Dropped, it calls the conversation off.
pub(super) async fn deposit_newest(
    vm: &VmDir,
    [to, hub]: [&Peer; 2],
    cap: Option<Arc<RateCap>>,
    packing: &Packing,
) -> Result<SeedReport> {
    let begun = Instant::now();
    to.require(Permission::Receive)?;
    let record = vm.record()?;
    let all = vm.generations()?;
    let newest = all
        .last()
        .cloned()
        .ok_or_else(|| Error::Refused(format!("{} has no generation yet", vm.name())))?;
    let ours: Vec<_> = all.iter().map(Manifest::identity).collect();
    let mut line = Line::connect_capped(vm.store(), hub, cap).await?;
    let handle = line.handle();
    let deposit = ToTarget::Deposit {
        vm: record.id,
        to: to.key,
    };
    line.send(deposit).await?;
    let ToSource::Shelf(shelf) = line.recv(Phase::Hello).await? else {
        return Err(line.unexpected(Phase::Hello, "no word of what it holds"));
    };
    let identity = vm.store().identity()?;
    shelf.check(record.id, &to.key, &identity.key())?;
    let key = shelf.key.ok_or_else(|| {
        Error::Refused(format!(
            "{} has never called at {1}, so that nothing can be sealed for it: run `replay-migrate \
             collect --from HUB` there, where HUB is its name for {1}",
            to.name, hub.name
        ))
    })?;
    let id = newest.identity();
    let next = shelf.next(id, &ours);
    let has = shelf
        .receipt
        .as_ref()
        .map_or(&[][..], |receipt| &receipt.has);
    let common = has.iter().filter(|id| ours.contains(id));
    let common = common.max_by_key(|id| id.number).copied();
    let mut report = SeedReport {
        generation: newest.generation,
        generation_from: common.map(|id| id.number),
        by_log: None,
        via: Some(Via {
            hub: hub.name.to_string(),
            has: common.map(|id| id.number),
            said: shelf.receipt.as_ref().map(Receipt::age),
        }),
        bytes: ByteReport::default(),
        seconds: 0.0,
    };
    let (from, mut replaces) = match next {
        Next::There => (None, false),
        Next::After(from) => (Some(from), false),
        Next::Instead(from) => (from, true),
    };
    // Both stay here: what the standby has, and what it will have.
    seen::by_hub(vm, to, common, from.unwrap_or(id))?;
    if next != Next::There {
        let _alone = packing.lock().await;
        let fence = vm.title()?.fence();
        let hello = hello(
            vm,
            &record,
            to,
            Purpose::Seed,
            Id::random()?,
            fence,
            newest.generation + 1,
            &newest.qemu,
        )?;
        let rate = LinkHistory::load(vm.store())?.rate(hub).unwrap_or(THIN);
        let mut parcel = Parcel {
            vm,
            to,
            key,
            from,
            manifest: newest,
            hello,
            rate,
        };
        let mut packed = pack(&parcel).await?;
        if packed.repaired() && parcel.from.take().is_some() {
            // The standby's is as it should be, and would have nothing to repair: it could not follow.
            tracing::warn!(
                vm = %vm.name(), ?from,
                "an older generation is damaged here; this one is told against the bare images"
            );
            replaces = true;
            packed = pack(&parcel).await?;
        }
        report.generation_from = parcel.from.map(|id| id.number);
        let Packed {
            head, body, sent, ..
        } = &packed;
        let bytes = std::fs::metadata(body).map_err(Error::file("measure", body))?;
        let sending = Instant::now();
        line.send(ToTarget::Parcel {
            head: Box::new(head.clone()),
            bytes: bytes.len(),
            replaces,
        })
        .await?;
        send_file(&mut line, body).await?;
        let ToSource::Held = line.recv(Phase::Base).await? else {
            return Err(line.unexpected(Phase::Base, "no word that it holds the parcel"));
        };
        let history = LinkHistory::load(vm.store())?;
        let seconds = sending.elapsed().as_secs_f64();
        history.reached(vm.store(), hub, bytes.len(), seconds)?;
        account(&mut report.bytes, sent);
    }
    seen::by_hub(vm, to, common, id)?;
    finish_traffic(&mut report.bytes, &handle);
    line.close().await;
    report.seconds = begun.elapsed().as_secs_f64();
    Ok(report)
}

/// Removes what was being packed by somebody who died; the caller holds the lock of who keeps
/// standbys.
pub(super) async fn clear(vm: &VmDir) {
    if let Err(error) = Workplace::Packing.clear(vm).await {
        // A thread may still be at it; the next time will do.
        tracing::debug!(error = error.chain(), "what was packed is still there");
    }
}

/// The same, where nobody keeps standbys.
pub(crate) async fn clear_packing(vm: &VmDir) -> Result<()> {
    if let Some(_only) = syncing_lock(vm)? {
        clear(vm).await;
    }
    Ok(())
}

async fn send_file(line: &mut Line, path: &Path) -> Result<()> {
    let (sender, mut parts) = mpsc::channel::<Vec<u8>>(4);
    let from = path.to_owned();
    let reading = tokio::spawn(blocking(move || {
        let mut file = File::open(&from).map_err(Error::file("open", &from))?;
        loop {
            let mut part = Vec::with_capacity(PART);
            let read = Read::by_ref(&mut file)
                .take(PART as u64)
                .read_to_end(&mut part);
            read.map_err(Error::file("read", &from))?;
            if part.is_empty() || sender.blocking_send(part).is_err() {
                return Ok(());
            }
        }
    }));
    while let Some(part) = parts.recv().await {
        line.send(ToTarget::Data(part)).await?;
    }
    joined(reading).await?;
    line.send(ToTarget::DataEnd).await?;
    line.flush().await
}
