//! The standby's side: what lies at a hub for this site is fetched, opened and applied.

use std::collections::HashSet;
use std::fs::File;
use std::io::{Seek, Write};
use std::time::{Duration, Instant};

use serde::Serialize;
use vm_host::probe;

use super::seal::{Opener, SealingKey};
use super::{Collect, Head, ParcelName, Receipt, pack, unusable};
use crate::error::{Error, Result};
use crate::generation::Manifest;
use crate::identity::SiteKey;
use crate::lease::Lease;
use crate::line::{Line, TargetLine};
use crate::local::blocking;
use crate::peers::{Peer, Permission};
use crate::phase::Phase;
use crate::progress::Progress;
use crate::protocol::{ToSource, ToTarget};
use crate::store::Store;
use crate::target;
use crate::transport::{PROTOCOL_VERSION, WireError};
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

/// Fetches what lies at hubs, once or again and again.
#[derive(Debug, Default)]
pub struct Collector {
    /// What was tried and can't be used for now, and when.
    tried: Vec<(ParcelName, Instant)>,
}

impl Collector {
    /// What this site refused may be possible later: room, an image, trust.
    const AGAIN: Duration = Duration::from_secs(600);

    /// Rounds with one hub: each brings a generation, or is about one that was not tried before.
    const ROUNDS: usize = 1000;

    /// VMs of which a hub has an older word than this site's, told of in one go.
    const STRANGE: usize = 64;

    /// Fetches all that a hub has for this site and that it can use. `keep` generations of each VM stay,
    /// besides what somebody relies on.
    ///
    /// # Errors
    /// When the hub can't be reached or refuses, or this host fails. What came before is here, as whole
    /// generations.
    pub async fn collect(
        &mut self,
        store: &Store,
        hub: &Peer,
        keep: usize,
        progress: &dyn Progress,
    ) -> Result<CollectReport> {
        let mut report = CollectReport::default();
        let _only = store.collect_lock(&hub.key)?.ok_or_else(|| {
            Error::Refused(format!(
                "another command fetches what lies at {}; wait for it",
                hub.name
            ))
        })?;
        self.tried.retain(|(_, when)| when.elapsed() < Self::AGAIN);
        let identity = store.identity()?;
        let (mut useless, mut strange) = (Vec::new(), HashSet::new());
        for _ in 0..Self::ROUNDS {
            progress.phase(Phase::Hello);
            let begun = Instant::now();
            let mut line = Line::connect(store, hub).await?;
            let handle = line.handle();
            let (makers, receipts) = (makers(store)?, receipts(store, &strange)?);
            let said = Collect {
                key: SealingKey::of(&identity),
                makers: makers.clone(),
                receipts,
                useless: std::mem::take(&mut useless),
            };
            line.send(ToTarget::Collect(Box::new(said))).await?;
            let ToSource::Parcels(heads) = line.recv(Phase::Hello).await? else {
                return Err(line.unexpected(Phase::Hello, "no word of what it holds"));
            };
            let mine = |head: &&Head| {
                head.recipient == identity.key()
                    && makers.contains(&head.by.key())
                    && head.holds()
                    && !self.tried.iter().any(|(tried, _)| *tried == head.name())
            };
            let Some(head) = heads.iter().find(mine).cloned() else {
                line.close().await;
                count(&mut report, &handle);
                return Ok(report);
            };
            let name = head.name();
            // Whatever becomes of it, it is tried once.
            self.tried.push((name, Instant::now()));
            let local = match Use::of(store, &head)? {
                Use::Takes => None,
                Use::Never => {
                    useless.push(name);
                    Some(None)
                }
                // Of a VM that is not here, or not any more, the hub may have an old word: it is told.
                Use::Lacks if strange.len() < Self::STRANGE && strange.insert(head.vm) => {
                    self.tried.pop();
                    Some(None)
                }
                Use::Lacks => Some(None),
                Use::OtherVersion => Some(Some(format!(
                    "it is of protocol version {}, this is {PROTOCOL_VERSION}",
                    head.version
                ))),
            };
            if let Some(why) = local {
                line.close().await;
                count(&mut report, &handle);
                report.refused.extend(why.map(|why| told(&head, &why)));
                continue;
            }
            progress.phase(Phase::Base);
            let fetched = fetch(store, &mut line, &head).await;
            line.close().await;
            count(&mut report, &handle);
            let applied = match fetched {
                Ok(body) => apply(store, &head, body).await,
                // It was replaced meanwhile, or does not fit here.
                Err(error @ (Error::PeerRefused { .. } | Error::Refused(_))) => Err(error),
                Err(error) => return Err(error),
            };
            match applied {
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
                    let why = told(&head, &error.chain());
                    progress.note(&why);
                    report.refused.push(why);
                    match Fault::of(&error) {
                        Fault::Here => {}
                        Fault::Parcel => useless.push(name),
                        Fault::Unfit => {
                            useless.push(name);
                            unfit::note(store, &head)?;
                        }
                    }
                }
            }
        }
        Ok(report)
    }
}

fn told(head: &Head, why: &str) -> String {
    format!(
        "generation {} of the VM {} can't be taken: {why}",
        head.to.number, head.vm
    )
}

/// What a parcel is to this site, by what its head says.
enum Use {
    Takes,
    /// It has it, or a newer one, or the VM itself.
    Never,
    /// It has not what it goes on from.
    Lacks,
    OtherVersion,
}

impl Use {
    fn of(store: &Store, head: &Head) -> Result<Self> {
        let vms = store.vms()?;
        let mut here = Vec::new();
        for vm in &vms {
            if vm.record()?.id == head.vm {
                if !matches!(vm.lease()?, Lease::Elsewhere { .. }) {
                    return Ok(Self::Never);
                }
                here = vm.generations()?.iter().map(Manifest::identity).collect();
            }
        }
        let newest = here.iter().map(|id| id.number).max();
        Ok(
            if newest.is_some_and(|newest| head.to.number <= newest)
                || head.version < PROTOCOL_VERSION
            {
                Self::Never
            } else if head.version > PROTOCOL_VERSION {
                Self::OtherVersion
            } else if head.from.is_some_and(|from| !here.contains(&from)) {
                Self::Lacks
            } else {
                Self::Takes
            },
        )
    }
}

/// Where the fault lies if a parcel can't be used.
enum Fault {
    /// At this site, as far as is known: it may be possible later.
    Here,
    /// It was changed on its way, or made for another key: the next one will do.
    Parcel,
    /// It does not fit what is here, which may be damaged: what it goes on from is not to be gone on
    /// from.
    Unfit,
}

impl Fault {
    fn of(error: &Error) -> Self {
        match error {
            Error::Line {
                source: WireError::Io(_),
                ..
            } => Self::Parcel,
            Error::Parcel { .. }
            | Error::Line { .. }
            | Error::Reconcile { .. }
            | Error::Protocol { .. } => Self::Unfit,
            _ => Self::Here,
        }
    }
}

/// Whom this site takes something from.
fn makers(store: &Store) -> Result<Vec<SiteKey>> {
    let mut peers = store.peers().list()?;
    peers.retain(|peer| peer.may.has(Permission::Send));
    let keys = peers.into_iter().map(|peer| peer.key);
    Ok(keys.take(Collect::VMS).collect())
}

fn count(report: &mut CollectReport, line: &crate::transport::LineHandle) {
    report.sent += line.traffic().sent();
    report.received += line.traffic().received();
}

/// What this site has of each VM that is another's; of `strange` ones, nothing.
fn receipts(store: &Store, strange: &HashSet<Id>) -> Result<Vec<Receipt>> {
    let identity = store.identity()?;
    let mut strange = strange.clone();
    let mut receipts = Vec::new();
    for vm in store.vms()?.into_iter().take(Collect::VMS / 2) {
        let id = vm.record()?.id;
        strange.remove(&id);
        // What this site has itself is nobody's business.
        if !matches!(vm.lease()?, Lease::Elsewhere { .. }) {
            continue;
        }
        let mut has: Vec<_> = vm.generations()?.iter().map(Manifest::identity).collect();
        let damaged = unfit::of(&vm)?;
        has.retain(|id| !damaged.contains(id));
        receipts.push(Receipt::sign(&identity, id, has));
    }
    let nothing = strange.into_iter().take(Collect::VMS / 2);
    receipts.extend(nothing.map(|vm| Receipt::sign(&identity, vm, Vec::new())));
    Ok(receipts)
}

/// Generations here that a parcel did not fit which was made to go on from them: bits of them may be
/// wrong, and what is told against the bare images mends that.
mod unfit {
    use std::path::PathBuf;

    use crate::error::Result;
    use crate::files;
    use crate::generation::{GenerationId, Manifest};
    use crate::hub::Head;
    use crate::store::{Store, VmDir};

    fn path(vm: &VmDir) -> PathBuf {
        vm.dir().join("unfit.json")
    }

    pub(super) fn of(vm: &VmDir) -> Result<Vec<GenerationId>> {
        Ok(files::read_json(&path(vm))?.unwrap_or_default())
    }

    pub(super) fn note(store: &Store, head: &Head) -> Result<()> {
        let Some(from) = head.from else {
            return Ok(());
        };
        for vm in store.vms()? {
            if vm.record()?.id != head.vm {
                continue;
            }
            let here: Vec<_> = vm.generations()?.iter().map(Manifest::identity).collect();
            let mut all = of(&vm)?;
            all.retain(|id| here.contains(id) && *id != from);
            all.push(from);
            files::write_json(&path(&vm), &all)?;
        }
        Ok(())
    }
}

/// Fetches a parcel's body, into a file without a name.
async fn fetch(store: &Store, line: &mut Line, head: &Head) -> Result<File> {
    let root = store.root().to_owned();
    line.send(ToTarget::Fetch(head.name())).await?;
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
    let identity = store.identity()?;
    let opener = Opener::new(&identity, head, std::io::BufReader::new(body))
        .map_err(|error| unusable(error.to_string()))?;
    let line = TargetLine::local(by.clone(), pack::unheard(), pack::messages(opener));
    let vm = target::take_parcel(store, line, head).await?;
    Ok((vm, by.name.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::generation::GenerationId;
    use crate::identity::{Identity, Signature};
    use crate::local::tests::vm_with_generation;
    use crate::store::VmDir;
    use crate::vm::VmRecord;

    /// A stale copy with this generation, which another site has.
    fn stale_copy(root: &std::path::Path, number: u64) -> (VmDir, GenerationId) {
        let vm = vm_with_generation(root, number);
        let id = vm.manifest(number).unwrap().vm;
        let record = VmRecord {
            id,
            ..VmRecord::example()
        };
        crate::files::write_json(&vm.dir().join("vm.json"), &record).unwrap();
        elsewhere().store(&vm.lease_path()).unwrap();
        let generation = vm.manifest(number).unwrap().identity();
        (vm, generation)
    }

    fn elsewhere() -> Lease {
        Lease::Elsewhere {
            fence: 2,
            owner: SiteKey::of_spki(b"a"),
            owner_name: "a".into(),
        }
    }

    fn head(vm: Id, from: Option<GenerationId>, number: u64) -> Head {
        let identity = Identity::ephemeral().unwrap();
        Head {
            version: PROTOCOL_VERSION,
            vm,
            from,
            to: GenerationId {
                number,
                digest: [9; 32],
            },
            recipient: identity.key(),
            by: identity.public(),
            key: [0; 32],
            signature: Signature::NONE,
        }
    }

    #[test]
    fn what_brings_nothing_new_is_not_taken() {
        let dir = tempfile::tempdir().unwrap();
        let (vm, here) = stale_copy(dir.path(), 5);
        let store = vm.store();
        let id = vm.record().unwrap().id;
        let use_of = |head: &Head| Use::of(store, head).unwrap();
        assert!(matches!(use_of(&head(id, Some(here), 6)), Use::Takes));
        assert!(matches!(use_of(&head(id, None, 6)), Use::Takes));
        for old in [5, 4] {
            assert!(matches!(use_of(&head(id, None, old)), Use::Never));
        }
        let other = GenerationId { number: 4, ..here };
        assert!(matches!(use_of(&head(id, Some(other), 6)), Use::Lacks));
        assert!(matches!(
            use_of(&head(Id([3; 16]), Some(other), 6)),
            Use::Lacks
        ));
        assert!(matches!(use_of(&head(Id([3; 16]), None, 1)), Use::Takes));
        for (version, never) in [(PROTOCOL_VERSION - 1, true), (PROTOCOL_VERSION + 1, false)] {
            let other = Head {
                version,
                ..head(id, Some(here), 6)
            };
            assert_eq!(matches!(use_of(&other), Use::Never), never);
            assert!(!matches!(use_of(&other), Use::Takes));
        }
        // What this site has itself is not brought to it.
        let held = Lease::Held {
            fence: 3,
            transfer: None,
        };
        held.store(&vm.lease_path()).unwrap();
        assert!(matches!(use_of(&head(id, Some(here), 6)), Use::Never));
    }

    #[test]
    fn a_site_says_what_it_has_of_others_vms_and_is_sure_of() {
        let dir = tempfile::tempdir().unwrap();
        let (vm, here) = stale_copy(dir.path(), 5);
        let store = vm.store();
        let said = || {
            let receipts = receipts(store, &HashSet::from([Id([3; 16])])).unwrap();
            let key = store.identity().unwrap().key();
            assert!(receipts.iter().all(|receipt| receipt.is_of(&key)));
            let has = receipts
                .into_iter()
                .map(|receipt| (receipt.vm, receipt.has));
            has.collect::<Vec<_>>()
        };
        let id = vm.record().unwrap().id;
        let nothing = (Id([3; 16]), Vec::new());
        assert_eq!(said(), [(id, vec![here]), nothing.clone()]);
        unfit::note(store, &head(id, None, 6)).unwrap();
        assert_eq!(said()[0].1, [here]);
        unfit::note(store, &head(id, Some(here), 6)).unwrap();
        assert_eq!(said(), [(id, Vec::new()), nothing.clone()]);
        let held = Lease::Held {
            fence: 3,
            transfer: None,
        };
        held.store(&vm.lease_path()).unwrap();
        assert_eq!(said(), [nothing]);
    }

    #[test]
    fn whom_something_is_taken_from_may_send() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        for (name, may) in [("a", "send"), ("b", "receive,hold")] {
            let addr = "127.0.0.1:1".parse().unwrap();
            let key = SiteKey::of_spki(name.as_bytes());
            let peer = Peer::new(name.parse().unwrap(), addr, key);
            let may = may.parse().unwrap();
            store.peers().trust(peer, Some(may)).unwrap();
        }
        assert_eq!(makers(&store).unwrap(), [SiteKey::of_spki(b"a")]);
    }
}
