//! The standby's side: what lies at a hub for this site is fetched, opened and applied.

use std::collections::HashSet;
use std::fs::File;
use std::io::{Seek, Write};
use std::time::Instant;

use serde::Serialize;
use vm_host::probe;

use super::seal::{Opener, SealingKey};
use super::{Collect, Head, Receipt, pack, unusable};
use crate::error::{Error, Result};
use crate::generation::{GenerationId, Manifest};
use crate::line::{Line, TargetLine};
use crate::local::blocking;
use crate::peers::Peer;
use crate::phase::Phase;
use crate::progress::Progress;
use crate::protocol::{ToSource, ToTarget};
use crate::store::Store;
use crate::target;
use crate::transport::PROTOCOL_VERSION;
use crate::vm::{Id, VmName};

/// Room that stays free on the disk.
const MARGIN: u64 = 256 << 20;

/// What a site fetched at a hub.
#[derive(Clone, Debug, Default, Serialize)]
pub struct CollectReport {
    /// Generations that came, in order.
    pub collected: Vec<Collected>,
    /// Why parcels that lie there could not be used.
    pub refused: Vec<String>,
    /// Bytes that were sent to the hub, and received.
    pub sent: u64,
    /// The latter.
    pub received: u64,
}

/// A generation that came by way of a hub.
#[derive(Clone, Debug, Serialize)]
pub struct Collected {
    /// Of which VM.
    pub vm: VmName,
    /// The generation.
    pub generation: u64,
    /// The one before, that it was told against.
    pub generation_from: Option<u64>,
    /// Who made it.
    pub by: String,
    /// Seconds until it was fetched, opened, applied and verified.
    pub seconds: f64,
}

/// Fetches all that a hub has for this site and that it can use. `keep` generations of each VM stay, besides
/// what somebody relies on.
///
/// # Errors
/// When the hub can't be reached or refuses, or this host fails. What came before is here, as whole
/// generations.
pub async fn collect(
    store: &Store,
    hub: &Peer,
    keep: usize,
    progress: &dyn Progress,
) -> Result<CollectReport> {
    let mut report = CollectReport::default();
    let _only = store.collect_lock()?.ok_or_else(|| {
        Error::Refused("another command fetches what lies at a hub; wait for it".into())
    })?;
    let identity = store.identity()?;
    let (mut useless, mut strange, mut passed) = (Vec::new(), HashSet::new(), Vec::new());
    let mut warned = false;
    loop {
        progress.phase(Phase::Hello);
        let begun = Instant::now();
        let mut line = Line::connect(store, hub).await?;
        let handle = line.handle();
        let said = Collect {
            key: SealingKey::of(&identity),
            receipts: receipts(store, &strange)?,
            useless: std::mem::take(&mut useless),
        };
        line.send(ToTarget::Collect(Box::new(said))).await?;
        let ToSource::Parcels(heads) = line.recv(Phase::Hello).await? else {
            return Err(line.unexpected(Phase::Hello, "no word of what it holds"));
        };
        let trusted = store.peers().list().map_err(Error::from)?;
        let mut strangers = heads.iter().filter(|head| {
            let maker = head.by.key();
            !trusted.iter().any(|peer| peer.key == maker)
        });
        if let Some(head) = strangers.next()
            && !warned
        {
            warned = true;
            report.refused.push(format!(
                "what was made by the site {} is left there: it is not trusted here",
                head.by.key().id()
            ));
        }
        let mine = |head: &&Head| {
            let maker = head.by.key();
            head.recipient == identity.key()
                && trusted.iter().any(|peer| peer.key == maker)
                && head.holds()
        };
        let named = |head: &Head| (head.vm, head.to);
        let next = heads
            .iter()
            .filter(mine)
            .find(|head| !passed.contains(&named(head)));
        let Some(head) = next.cloned() else {
            line.close().await;
            count(&mut report, &handle);
            return Ok(report);
        };
        // Of a VM that is not here, or not any more, the hub may have an old word.
        if head.from.is_some_and(|from| !is_here(store, head.vm, from)) {
            line.close().await;
            count(&mut report, &handle);
            if !strange.insert(head.vm) {
                passed.push(named(&head));
            }
            continue;
        }
        progress.phase(Phase::Base);
        let fetched = fetch(store, &mut line, &head).await;
        line.close().await;
        count(&mut report, &handle);
        let body = fetched?;
        match apply(store, &head, body).await {
            Ok((vm, by)) => {
                crate::generations::tidy_standby(&store.vm(&vm), keep).await;
                report.collected.push(Collected {
                    vm,
                    generation: head.to.number,
                    generation_from: head.from.map(|from| from.number),
                    by,
                    seconds: begun.elapsed().as_secs_f64(),
                });
            }
            Err(error) => {
                let why = format!(
                    "generation {} of the VM {} can't be taken: {}",
                    head.to.number,
                    head.vm,
                    error.chain()
                );
                progress.note(&why);
                report.refused.push(why);
                passed.push(named(&head));
                if is_broken(&error) {
                    useless.push(named(&head));
                }
            }
        }
    }
}

fn count(report: &mut CollectReport, line: &crate::transport::LineHandle) {
    report.sent += line.traffic().sent();
    report.received += line.traffic().received();
}

/// Whether another site's next parcel may be better, and this one never will.
fn is_broken(error: &Error) -> bool {
    matches!(
        error,
        Error::Parcel { .. }
            | Error::Line { .. }
            | Error::Reconcile { .. }
            | Error::Protocol { .. }
    )
}

/// What this site has of each VM; of `strange` ones, nothing.
fn receipts(store: &Store, strange: &HashSet<Id>) -> Result<Vec<Receipt>> {
    let identity = store.identity()?;
    let mut strange = strange.clone();
    let mut receipts = Vec::new();
    for vm in store.vms()?.into_iter().take(Collect::VMS / 2) {
        let has: Vec<_> = vm.generations()?.iter().map(Manifest::identity).collect();
        let id = vm.record()?.id;
        strange.remove(&id);
        receipts.push(Receipt::sign(&identity, id, has));
    }
    let nothing = strange.into_iter().take(Collect::VMS / 2);
    receipts.extend(nothing.map(|vm| Receipt::sign(&identity, vm, Vec::new())));
    Ok(receipts)
}

fn is_here(store: &Store, vm: Id, generation: GenerationId) -> bool {
    let vms = store.vms().unwrap_or_default();
    let of = vms
        .iter()
        .find(|dir| dir.record().is_ok_and(|record| record.id == vm));
    let generations = of
        .and_then(|dir| dir.generations().ok())
        .unwrap_or_default();
    generations.iter().any(|one| one.identity() == generation)
}

/// Fetches a parcel's body, into a file without a name.
async fn fetch(store: &Store, line: &mut Line, head: &Head) -> Result<File> {
    let root = store.root().to_owned();
    line.send(ToTarget::Fetch {
        vm: head.vm,
        to: head.to,
    })
    .await?;
    line.flush().await?;
    let opened = tempfile::tempfile_in(&root);
    let mut file = opened.map_err(Error::file("make a file in", &root))?;
    loop {
        match line.recv(Phase::Base).await? {
            ToSource::Content(part) => {
                let root = root.clone();
                file = blocking(move || {
                    // How much comes is the hub's to say.
                    let free = probe::free_space(&root);
                    if free.map_err(Error::host("cannot measure free space"))? < MARGIN {
                        return Err(Error::Refused(format!(
                            "what the hub sends does not fit on the disk with {}",
                            root.display()
                        )));
                    }
                    let written = file.write_all(&part);
                    written.map_err(Error::file("write to a file in", &root))?;
                    Ok(file)
                })
                .await?;
            }
            ToSource::ContentEnd => break,
            _ => return Err(line.unexpected(Phase::Base, "half a parcel")),
        }
    }
    file.rewind()
        .map_err(Error::file("read a file in", &root))?;
    Ok(file)
}

/// Takes a parcel as the seed that it holds; the VM, and the name here of the site that made it.
async fn apply(store: &Store, head: &Head, body: File) -> Result<(VmName, String)> {
    let maker = head.by.key();
    let by = store.peers().by_key(&maker)?.ok_or_else(|| {
        Error::Refused(format!(
            "it was made by the site {}, which is not trusted here",
            maker.id()
        ))
    })?;
    if head.version != PROTOCOL_VERSION {
        return Err(Error::Refused(format!(
            "it is of protocol version {}, this is {PROTOCOL_VERSION}",
            head.version
        )));
    }
    let identity = store.identity()?;
    let opener = Opener::new(&identity, head, std::io::BufReader::new(body))
        .map_err(|error| unusable(error.to_string()))?;
    let line = TargetLine::local(by.clone(), pack::unheard(), pack::messages(opener));
    let vm = target::take_parcel(store, line, head).await?;
    Ok((vm, by.name.to_string()))
}
