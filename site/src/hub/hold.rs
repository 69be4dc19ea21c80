//! The hub's side: what it is given for others, and what it gives to those.

use std::io::Write;
use std::path::PathBuf;

use tempfile::NamedTempFile;
use tokio::io::{AsyncReadExt, AsyncSeekExt};
use vm_host::probe;

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

/// Room that stays free on the disk.
const MARGIN: u64 = 256 << 20;

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
             at this site changes that; or, if it has a new key, at the site that sends",
            to.id()
        ));
    }
    if room == 0 {
        return refused("this site holds nothing for others (`serve --hub-room`)");
    }
    let shelves = Shelves::of(store, to);
    let (of, maker) = (shelves.clone(), line.peer().key);
    let shelf = blocking(move || {
        let key = of.key()?;
        if key.is_some() && !of.makers()?.contains(&maker) {
            return refused(
                "that site takes nothing from you: `replay-migrate site trust` there, with --may, changes \
                 that once it calls here again",
            );
        }
        Ok(Shelf {
            key,
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
    let announced = match line.receive(Phase::Base).await {
        Ok(ToTarget::Parcel {
            head,
            bytes,
            replaces,
        }) => Announced {
            head: *head,
            bytes,
            replaces,
        },
        Ok(_) => return Err(line.unexpected(Phase::Base, "no parcel")),
        Err(error) if error.is_called_off() => return Ok(()),
        Err(error) => return Err(error),
    };
    let head = &announced.head;
    let so = head.vm == vm && head.recipient == to && head.by.key() == maker && head.holds();
    if !so {
        return Err(line.unexpected(Phase::Base, "a parcel of another kind than announced"));
    }
    take(store, room, line, shelves, announced).await?;
    line.send(ToSource::Held).await?;
    line.flush().await
}

/// A parcel that is about to come.
#[derive(Clone)]
struct Announced {
    head: Head,
    /// Of its body.
    bytes: u64,
    replaces: bool,
}

/// Makes room for a parcel: a file of its length, which counts from now on.
fn make_room(
    store: &Store,
    room: u64,
    shelves: &Shelves,
    announced: &Announced,
) -> Result<NamedTempFile> {
    let Announced {
        head,
        bytes,
        replaces,
    } = announced;
    let lying = shelves.parcels_by(head.vm, &head.by.key())?;
    if lying.len() >= Shelf::PARCELS && !replaces {
        return refused(format!(
            "{} parcels wait here for that site already",
            lying.len()
        ));
    }
    let goes: u64 = match replaces {
        true => lying.iter().map(|lying| lying.bytes).sum(),
        false => 0,
    };
    let taken = shelf::taken(store)?.saturating_sub(goes);
    if taken.saturating_add(*bytes) > room {
        return refused(format!(
            "there is no room for {} MiB more in what this site holds for others: {} of {} MiB are taken \
             (`replay-migrate hub list` shows it, `serve --hub-room` gives more)",
            bytes >> 20,
            taken >> 20,
            room >> 20
        ));
    }
    let free = probe::free_space(store.root());
    let free = free.map_err(Error::host("cannot measure free space"))?;
    if free < bytes.saturating_add(MARGIN) {
        return refused(format!(
            "there is no room for {} MiB on this site's disk, which has {} MiB free",
            bytes >> 20,
            free >> 20
        ));
    }
    shelves.begin(head, *bytes)
}

/// Takes a parcel in.
async fn take(
    store: &Store,
    room: u64,
    line: &mut TargetLine,
    shelves: Shelves,
    announced: Announced,
) -> Result<()> {
    let (of, what, here) = (shelves.clone(), announced.clone(), store.clone());
    let mut file = blocking(move || make_room(&here, room, &of, &what)).await?;
    let mut left = announced.bytes;
    loop {
        match line.receive(Phase::Base).await? {
            ToTarget::Data(part) => {
                let rest = left.checked_sub(part.len() as u64);
                left = rest.ok_or_else(|| {
                    line.unexpected(Phase::Base, "more of a parcel than was announced")
                })?;
                file = blocking(move || {
                    let path = PathBuf::from(file.path());
                    file.write_all(&part).map_err(Error::file("write", &path))?;
                    Ok(file)
                })
                .await?;
            }
            ToTarget::DataEnd if left == 0 => break,
            _ => return Err(line.unexpected(Phase::Base, "half a parcel")),
        }
    }
    let Announced {
        head,
        bytes,
        replaces,
    } = announced;
    let (site, number) = (line.peer().name.clone(), head.to.number);
    tracing::info!(%site, number, bytes, "a parcel is held");
    blocking(move || shelves.keep(&head, file, replaces)).await
}

async fn collected(store: &Store, line: &mut TargetLine, said: Collect) -> Result<()> {
    may(line)?;
    let site = line.peer().key;
    if said.receipts.len() > Collect::VMS
        || said.useless.len() > Collect::VMS
        || said.makers.len() > Collect::VMS
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
            Ok(ToTarget::Fetch(name)) => {
                let found = offered.iter().find(|lying| lying.head.name() == name);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::generation::GenerationId;
    use crate::hub::seal::{Sealer, SealingKey};
    use crate::identity::{Identity, Signature};

    #[test]
    fn there_is_room_for_so_much() {
        const ROOM: u64 = 10_000;
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let [maker, site] = [(); 2].map(|()| Identity::ephemeral().unwrap());
        let shelves = Shelves::of(&store, site.key());
        let announced = |number: u64, bytes, replaces| {
            let head = Head {
                version: 1,
                vm: Id([7; 16]),
                from: None,
                to: GenerationId {
                    number,
                    digest: [1; 32],
                },
                recipient: site.key(),
                by: maker.public(),
                key: [0; 32],
                signature: Signature::NONE,
            };
            let sealed = Sealer::new(&maker, &SealingKey::of(&site), head, Vec::new());
            Announced {
                head: sealed.unwrap().0,
                bytes,
                replaces,
            }
        };
        let room = |announced: &Announced| make_room(&store, ROOM, &shelves, announced);
        let refused = |announced: &Announced| {
            let error = room(announced).unwrap_err().to_string();
            assert!(error.contains("no room"), "{error}");
        };
        refused(&announced(1, u64::MAX, false));
        refused(&announced(1, ROOM + 1, true));
        // What is on its way counts.
        let first = announced(1, 6000, false);
        let coming = room(&first).unwrap();
        refused(&announced(2, 6000, false));
        shelves.keep(&first.head, coming, false).unwrap();
        refused(&announced(2, 6000, false));
        // What will be replaced does not.
        let second = announced(2, 6000, true);
        let coming = room(&second).unwrap();
        shelves.keep(&second.head, coming, true).unwrap();
        assert_eq!(shelves.parcels(Id([7; 16])).unwrap().len(), 1);
        for number in 3..=Shelf::PARCELS as u64 + 1 {
            let next = announced(number, 0, false);
            let coming = room(&next).unwrap();
            shelves.keep(&next.head, coming, false).unwrap();
        }
        let many = room(&announced(100, 0, false)).unwrap_err().to_string();
        assert!(many.contains("wait"), "{many}");
    }
}
