//! The hub's side: what it is given for others, and what it gives to those.

use std::io::Write;
use std::path::PathBuf;

use tokio::io::{AsyncReadExt, AsyncSeekExt};

use super::shelf::{self, Shelves};
use super::{Collect, Head, Shelf, refused};
use crate::error::{Error, Result};
use crate::identity::SiteKey;
use crate::line::TargetLine;
use crate::local::blocking;
use crate::peers::Permission;
use crate::phase::Phase;
use crate::protocol::{ToSource, ToTarget};
use crate::store::Store;
use crate::vm::Id;

/// Bytes of a message.
const PART: usize = 256 << 10;

/// Of so many bytes that come, the room is measured once.
const MEASURE: u64 = 8 << 20;

/// A conversation with this site as the hub, which a message has begun.
pub(crate) async fn serve(store: &Store, room: u64, mut line: TargetLine, first: ToTarget) {
    let site = line.peer().name.clone();
    let outcome = match first {
        ToTarget::Deposit { vm, to } => deposited(store, room, &mut line, vm, to).await,
        ToTarget::Collect(said) => collected(store, &mut line, *said).await,
        _ => Err(line.unexpected(Phase::Hello, "no beginning")),
    };
    if let Err(error) = outcome
        && !error.is_disconnect()
    {
        tracing::warn!(%site, error = error.chain(), "a hub's work ended early");
        let _ = line.send(ToSource::Refused(error.chain())).await;
    }
    line.close().await;
}

/// Whether a site may have this one hold things, or fetch them.
fn may(line: &TargetLine) -> Result<()> {
    if line.peer().may.has(Permission::Hold) {
        return Ok(());
    }
    refused(
        "this site was told not to hold anything for you or from you; `replay-migrate site trust` \
         there, with --may, changes that",
    )
}

async fn deposited(
    store: &Store,
    room: u64,
    line: &mut TargetLine,
    vm: Id,
    to: SiteKey,
) -> Result<()> {
    may(line)?;
    let known = store.peers().by_key(&to)?;
    if !known.is_some_and(|site| site.may.has(Permission::Hold)) {
        return refused(format!(
            "the site {} is not known here, or nothing may be held for it: `replay-migrate site trust` \
             at this site changes that",
            to.id()
        ));
    }
    if room == 0 {
        return refused("this site holds nothing for others (`serve --hub-room`)");
    }
    let shelves = Shelves::of(store, to);
    let (of, maker) = (shelves.clone(), line.peer().key);
    let shelf = blocking(move || {
        Ok(Shelf {
            key: of.key()?,
            receipt: of.receipt(vm)?,
            // Another's are none of the caller's business.
            parcels: of
                .parcels_by(vm, &maker)?
                .into_iter()
                .map(|lying| lying.head)
                .collect(),
        })
    })
    .await?;
    line.send(ToSource::Shelf(Box::new(shelf))).await?;
    line.flush().await?;
    let (head, replaces) = match line.receive(Phase::Base).await {
        Ok(ToTarget::Parcel { head, replaces }) => (*head, replaces),
        Ok(_) => return Err(line.unexpected(Phase::Base, "no parcel")),
        Err(error) if error.is_called_off() => return Ok(()),
        Err(error) => return Err(error),
    };
    check(line, &head, vm, to)?;
    let lie = shelves.clone();
    let waiting = blocking(move || lie.parcels_by(vm, &maker)).await?.len();
    if waiting >= Shelf::PARCELS && !replaces {
        return refused(format!("{waiting} parcels wait here for that site already"));
    }
    take(store, room, line, shelves, head, replaces).await?;
    line.send(ToSource::Held).await?;
    line.flush().await
}

/// What it is must be what was announced, in the word of who brings it.
fn check(line: &TargetLine, head: &Head, vm: Id, to: SiteKey) -> Result<()> {
    let so = head.vm == vm && head.recipient == to;
    if so && head.by.key() == line.peer().key && head.holds() {
        return Ok(());
    }
    Err(line.unexpected(Phase::Base, "a parcel of another kind than announced"))
}

/// Takes a parcel in.
async fn take(
    store: &Store,
    room: u64,
    line: &mut TargetLine,
    shelves: Shelves,
    head: Head,
    replaces: bool,
) -> Result<()> {
    let (of, announced) = (shelves.clone(), head.clone());
    let mut file = blocking(move || of.begin(&announced)).await?;
    let mut came = 0;
    let mut measured = None;
    loop {
        match line.receive(Phase::Base).await? {
            ToTarget::Data(part) => {
                came += part.len() as u64;
                if measured.is_none_or(|before| came - before >= MEASURE) {
                    let store = store.clone();
                    let taken = blocking(move || shelf::taken(&store)).await?;
                    if taken.saturating_add(MEASURE) > room {
                        return refused(format!(
                            "there is no room left for what this site holds for others: {} of {} MiB are \
                             taken (`replay-migrate hub list` shows it, `serve --hub-room` gives more)",
                            taken >> 20,
                            room >> 20
                        ));
                    }
                    measured = Some(came);
                }
                file = blocking(move || {
                    let path = PathBuf::from(file.path());
                    file.write_all(&part).map_err(Error::file("write", &path))?;
                    Ok(file)
                })
                .await?;
            }
            ToTarget::DataEnd => break,
            _ => return Err(line.unexpected(Phase::Base, "half a parcel")),
        }
    }
    let (site, number) = (line.peer().name.clone(), head.to.number);
    tracing::info!(%site, number, bytes = came, "a parcel is held");
    blocking(move || shelves.keep(&head, file, replaces)).await
}

async fn collected(store: &Store, line: &mut TargetLine, said: Collect) -> Result<()> {
    may(line)?;
    let site = line.peer().key;
    if said.receipts.len() > Collect::VMS
        || said.useless.len() > Collect::VMS
        || !said.key.is_of(&site)
        || said.receipts.iter().any(|receipt| !receipt.is_of(&site))
    {
        return Err(line.unexpected(Phase::Hello, "another site's word"));
    }
    let shelves = Shelves::of(store, site);
    let mut offered = blocking(move || {
        shelves.heard(&said)?;
        shelves.offers()
    })
    .await?;
    offered.truncate(Collect::VMS);
    let heads = offered.iter().map(|lying| lying.head.clone()).collect();
    line.send(ToSource::Parcels(heads)).await?;
    line.flush().await?;
    loop {
        match line.receive(Phase::Base).await {
            Ok(ToTarget::Fetch { vm, to }) => {
                let wanted = |head: &Head| head.vm == vm && head.to == to;
                let found = offered.iter().find(|lying| wanted(&lying.head));
                let Some(lying) = found else {
                    return Err(line.unexpected(Phase::Base, "a parcel that was not offered"));
                };
                give(line, lying).await?;
            }
            Ok(_) => return Err(line.unexpected(Phase::Base, "no parcel asked for")),
            Err(error) if error.is_called_off() => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}

/// Sends a parcel's body. One that was replaced meanwhile is not there any more.
async fn give(line: &mut TargetLine, lying: &shelf::Lying) -> Result<()> {
    let (path, expected) = (lying.path.clone(), lying.head.clone());
    let opened = blocking(move || {
        let (head, mut file) = shelf::open(&path)?;
        if head != expected {
            return refused("that parcel was replaced meanwhile: call again");
        }
        let bytes = shelf::body_bytes(&mut file, &path)?;
        Ok((file, bytes))
    });
    let (file, bytes) = opened.await?;
    let mut file = tokio::fs::File::from_std(file);
    let read = |error| Error::file("read", &lying.path)(error);
    let at = lying.bytes - bytes;
    file.seek(std::io::SeekFrom::Start(at))
        .await
        .map_err(read)?;
    let mut left = bytes;
    while left > 0 {
        let mut part = vec![0; (left as usize).min(PART)];
        file.read_exact(&mut part).await.map_err(read)?;
        left -= part.len() as u64;
        line.send(ToSource::Content(part)).await?;
    }
    line.send(ToSource::ContentEnd).await?;
    line.flush().await
}
