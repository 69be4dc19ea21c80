//! What a hub keeps on disk: one folder a site, in it one a VM, in it the parcels.
//!
//! ```text
//! hub/KEY/key.bin                what is to be sealed for, by that site's word
//! hub/KEY/makers.bin             whom that site takes something from
//! hub/KEY/VM/receipt.bin         what that site has of the VM, by its word
//! hub/KEY/VM/NUMBER-DIGEST-MAKER.parcel   length of the head (u32, little endian), head, sealed body
//! ```
//!
//! A parcel is there as a whole or not at all: it is written beside, and renamed.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::Serialize;
use serde::de::DeserializeOwned;
use tempfile::NamedTempFile;

use super::seal::SealingKey;
use super::{Collect, Head, Receipt, Shelf, refused, unusable};
use crate::error::{Error, Result};
use crate::files;
use crate::generation::GenerationId;
use crate::identity::SiteKey;
use crate::store::Store;
use crate::transport::PROTOCOL_VERSION;
use crate::vm::{Id, decode_hex};

/// Key and receipt are far shorter.
const SMALL: u64 = 4096;

const ENDING: &str = "parcel";

/// What a hub has for one site.
#[derive(Clone, Debug)]
pub(super) struct Shelves {
    dir: PathBuf,
    site: SiteKey,
}

/// A parcel that lies here.
#[derive(Clone, Debug)]
pub(super) struct Lying {
    pub(super) head: Head,
    pub(super) path: PathBuf,
    /// Of the whole file.
    pub(super) bytes: u64,
}

fn root(store: &Store) -> PathBuf {
    store.root().join("hub")
}

impl Shelves {
    pub(super) fn of(store: &Store, site: SiteKey) -> Self {
        Self {
            dir: root(store).join(site.to_string()),
            site,
        }
    }

    fn vm(&self, vm: Id) -> PathBuf {
        self.dir.join(vm.to_string())
    }

    /// What is to be sealed for.
    pub(super) fn key(&self) -> Result<Option<SealingKey>> {
        let key: Option<SealingKey> = small(&self.dir.join("key.bin"), SMALL)?;
        Ok(key.filter(|key| key.is_of(&self.site)))
    }

    /// Whom the site takes something from; nobody, where it never called.
    pub(super) fn makers(&self) -> Result<Vec<SiteKey>> {
        let path = self.dir.join("makers.bin");
        let most = Collect::VMS * size_of::<SiteKey>() + 16;
        Ok(small(&path, most as u64)?.unwrap_or_default())
    }

    /// What the site said last that it has of a VM.
    pub(super) fn receipt(&self, vm: Id) -> Result<Option<Receipt>> {
        let receipt: Option<Receipt> = small(&self.vm(vm).join("receipt.bin"), SMALL)?;
        Ok(receipt.filter(|receipt| receipt.is_of(&self.site) && receipt.vm == vm))
    }

    /// The parcels of a VM, by what they bring. What can't be read is none.
    pub(super) fn parcels(&self, vm: Id) -> Result<Vec<Lying>> {
        let dir = self.vm(vm);
        let mut parcels: Vec<_> = entries(&dir)?
            .into_iter()
            .filter(|path| path.extension().is_some_and(|ending| ending == ENDING))
            .filter_map(|path| {
                let read = open(&path);
                if let Err(error) = &read {
                    tracing::warn!(error = error.chain(), "not a parcel");
                }
                let (head, file) = read.ok()?;
                let bytes = file.metadata().ok()?.len();
                (head.vm == vm && head.recipient == self.site).then_some(Lying {
                    head,
                    path,
                    bytes,
                })
            })
            .collect();
        parcels.sort_by_key(|parcel| parcel.head.to.number);
        Ok(parcels)
    }

    /// Those of one maker.
    pub(super) fn parcels_by(&self, vm: Id, maker: &SiteKey) -> Result<Vec<Lying>> {
        let mut parcels = self.parcels(vm)?;
        parcels.retain(|lying| lying.head.by.key() == *maker);
        Ok(parcels)
    }

    /// Of each VM, and of each maker that the site takes something from, the parcel that it can use and
    /// gains most by.
    pub(super) fn offers(&self) -> Result<Vec<Lying>> {
        let makers = self.makers()?;
        let mut offers = Vec::new();
        for vm in self.vms()? {
            let has = self.receipt(vm)?.map_or(Vec::new(), |receipt| receipt.has);
            let mut of = BTreeMap::<SiteKey, Vec<Lying>>::new();
            for lying in self.parcels(vm)? {
                of.entry(lying.head.by.key()).or_default().push(lying);
            }
            of.retain(|maker, _| makers.contains(maker));
            offers.extend(of.values().filter_map(|all| usable(&has, all)).cloned());
        }
        Ok(offers)
    }

    /// The VMs of which there is something.
    pub(super) fn vms(&self) -> Result<Vec<Id>> {
        let names = entries(&self.dir)?;
        let names = names.iter().filter_map(|path| path.file_name()?.to_str());
        Ok(names.filter_map(|name| decode_hex(name).map(Id)).collect())
    }

    /// Notes what a site says when it calls: whose word it is was checked. What it has already, or
    /// can't use, goes.
    pub(super) fn heard(&self, said: &Collect) -> Result<()> {
        files::make_dir(&self.dir)?;
        keep_small(&self.dir.join("key.bin"), &said.key)?;
        keep_small(&self.dir.join("makers.bin"), &said.makers)?;
        let mut vms = self.vms()?.len();
        for receipt in &said.receipts {
            let dir = self.vm(receipt.vm);
            if !dir.exists() {
                // One after the other, it could name ever more of them.
                if vms >= Collect::VMS {
                    continue;
                }
                vms += 1;
            }
            files::make_dir(&dir)?;
            keep_small(&dir.join("receipt.bin"), receipt)?;
            let newest = receipt.newest();
            for parcel in self.parcels(receipt.vm)? {
                if newest.is_some_and(|newest| parcel.head.to.number <= newest.number) {
                    files::remove_file(&parcel.path)?;
                }
            }
        }
        for useless in &said.useless {
            for parcel in self.parcels(useless.vm)? {
                if parcel.head.name() == *useless {
                    files::remove_file(&parcel.path)?;
                }
            }
        }
        Ok(())
    }

    /// A parcel that is about to come, in a file without a lasting name, which has its length already:
    /// the body is to be written into it.
    pub(super) fn begin(&self, head: &Head, body: u64) -> Result<NamedTempFile> {
        let dir = self.vm(head.vm);
        files::make_dir(&self.dir)?;
        files::make_dir(&dir)?;
        let mut file = tempfile::Builder::new()
            .prefix(".coming")
            .tempfile_in(&dir)
            .map_err(Error::file("make a parcel in", &dir))?;
        let begins = begin(head)?;
        let length = (begins.len() as u64).saturating_add(body);
        let sized = file.as_file().set_len(length);
        sized
            .and_then(|()| file.write_all(&begins))
            .map_err(Error::file("write a parcel in", &dir))?;
        Ok(file)
    }

    /// It is whole: it lies here from now on, in the place of all that its maker laid here before, if it
    /// is to.
    pub(super) fn keep(&self, head: &Head, file: NamedTempFile, replaces: bool) -> Result<()> {
        let before = self.parcels_by(head.vm, &head.by.key())?;
        let [a, b, c, d, ..] = head.to.digest;
        let digest = format!("{:08x}", u32::from_be_bytes([a, b, c, d]));
        let dir = self.vm(head.vm);
        let (number, maker) = (head.to.number, head.by.key().id());
        let path = dir.join(format!("{number}-{digest}-{maker}.{ENDING}"));
        let write = Error::file("keep", &path);
        let kept = file.as_file().sync_all();
        let kept = kept.and_then(|()| Ok(file.persist(&path).map(drop)?));
        kept.and_then(|()| files::sync_dir(&dir)).map_err(write)?;
        for parcel in before {
            if replaces && parcel.path != path {
                files::remove_file(&parcel.path)?;
            }
        }
        Ok(())
    }
}

/// What a parcel's file begins with.
pub(super) fn begin(head: &Head) -> Result<Vec<u8>> {
    let encoded = postcard::to_stdvec(head).map_err(|error| unusable(error.to_string()))?;
    // `Head::LONGEST` is far below.
    Ok([&(encoded.len() as u32).to_le_bytes()[..], &encoded].concat())
}

/// A parcel's head, whose signature holds, and its file at the body.
pub(super) fn open(path: &Path) -> Result<(Head, File)> {
    let mut file = match File::open(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return refused("that parcel was replaced meanwhile: call again");
        }
        opened => opened.map_err(Error::file("open", path))?,
    };
    let head = read_head(&mut file)
        .map_err(Error::file("read", path))?
        .filter(Head::holds);
    let damaged = || Error::Damaged {
        path: path.to_owned(),
        reason: "it is no parcel".into(),
    };
    Ok((head.ok_or_else(damaged)?, file))
}

/// The head that comes next; nothing, where there is none.
fn read_head(from: &mut impl Read) -> std::io::Result<Option<Head>> {
    let mut length = [0; 4];
    from.read_exact(&mut length)?;
    let length = u32::from_le_bytes(length) as usize;
    if length > Head::LONGEST {
        return Ok(None);
    }
    let mut encoded = vec![0; length];
    from.read_exact(&mut encoded)?;
    Ok(postcard::from_bytes(&encoded).ok())
}

/// Bytes that all of a hub takes, those included that are just coming.
pub(super) fn taken(store: &Store) -> Result<u64> {
    let mut sum = 0;
    for site in entries(&root(store))? {
        for vm in entries(&site)? {
            for file in entries(&vm)? {
                // It may just have gone.
                sum += fs::metadata(&file).map_or(0, |meta| meta.len());
            }
        }
    }
    Ok(sum)
}

/// Removes what came half, from agents that died.
pub(crate) fn clear(store: &Store) -> Result<()> {
    for site in entries(&root(store))? {
        for vm in entries(&site)? {
            for file in entries(&vm)? {
                let name = file.file_name().unwrap_or_default();
                if name.to_string_lossy().starts_with(".coming") {
                    files::remove_file(&file)?;
                }
            }
        }
    }
    Ok(())
}

/// What lies here for a site.
#[derive(Clone, Debug, Serialize)]
pub struct Lies {
    /// For which, by its name here; by its key, where it is not trusted any more.
    pub recipient: String,
    /// Who made it, likewise.
    pub by: String,
    /// The VM's number: its name is not known here.
    pub vm: Id,
    /// The generation that it goes on from; none: the bare images.
    pub from: Option<u64>,
    /// The generation that it brings.
    pub generation: u64,
    /// What it takes.
    pub bytes: u64,
    /// Since when it lies here, in seconds.
    pub age: u64,
}

fn sites(store: &Store) -> Result<Vec<SiteKey>> {
    let names = entries(&root(store))?;
    let names = names.iter().filter_map(|path| path.file_name()?.to_str());
    Ok(names.filter_map(|name| name.parse().ok()).collect())
}

/// What this site holds for others.
pub fn lies(store: &Store) -> Result<Vec<Lies>> {
    let peers = store.peers();
    let name = |key: &SiteKey| -> Result<String> {
        let peer = peers.of_key(key)?;
        Ok(peer.map_or_else(|| key.to_string(), |peer| peer.name.to_string()))
    };
    let mut lies = Vec::new();
    for site in sites(store)? {
        let shelves = Shelves::of(store, site);
        for vm in shelves.vms()? {
            for parcel in shelves.parcels(vm)? {
                let made = fs::metadata(&parcel.path).and_then(|meta| meta.modified());
                let age =
                    made.map(|made| SystemTime::now().duration_since(made).unwrap_or_default());
                lies.push(Lies {
                    recipient: name(&site)?,
                    by: name(&parcel.head.by.key())?,
                    vm,
                    from: parcel.head.from.map(|id| id.number),
                    generation: parcel.head.to.number,
                    bytes: parcel.bytes,
                    age: age.map_or(0, |age| age.as_secs()),
                });
            }
        }
    }
    Ok(lies)
}

/// Throws away what this site holds for another; how many parcels that were. `site` is its name, or its key.
pub fn drop_for(store: &Store, site: &str) -> Result<u64> {
    let key = match site.parse::<SiteKey>() {
        Ok(key) => key,
        Err(_) => store.peers().by_name(&site.parse()?)?.key,
    };
    // What was left for it when it had another key can't be opened by it any more.
    let known = store.peers().of_key(&key)?;
    let keys = known.map_or(vec![key], |peer| [vec![peer.key], peer.former].concat());
    let mut gone = 0;
    for key in keys {
        let shelves = Shelves::of(store, key);
        for vm in shelves.vms()? {
            for parcel in shelves.parcels(vm)? {
                files::remove_file(&parcel.path)?;
                gone += 1;
            }
        }
    }
    Ok(gone)
}

/// Where a source goes on that is to bring `newest`, by what it has itself (`ours`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// It lies there already, or the site has it.
    There,
    /// What is told against this one follows what lies there.
    After(GenerationId),
    /// What is told against this one, or against the bare images, takes the place of what lies there.
    Instead(Option<GenerationId>),
}

impl Shelf {
    /// Checks what a hub says to a maker: its word is not taken for anything.
    pub(crate) fn check(&self, vm: Id, site: &SiteKey, maker: &SiteKey) -> Result<()> {
        let receipt = self.receipt.as_ref();
        let heads = self.parcels.iter();
        if self.key.is_some_and(|key| !key.is_of(site))
            || receipt.is_some_and(|receipt| receipt.vm != vm || !receipt.is_of(site))
            || self.parcels.len() > Self::PARCELS
            || heads.into_iter().any(|head| {
                let of = head.vm == vm && head.recipient == *site && head.by.key() == *maker;
                !of || !head.holds()
            })
        {
            return refused("what the hub says of what it holds is not so");
        }
        Ok(())
    }

    /// The generation that the site will have once it has taken all it can use.
    fn end(&self) -> Option<GenerationId> {
        let has = self
            .receipt
            .as_ref()
            .map_or(&[][..], |receipt| &receipt.has);
        let mut at = self.receipt.as_ref().and_then(Receipt::newest);
        // Each step leads to a higher number.
        loop {
            let next = self.parcels.iter().filter(|head| {
                let newer = at.is_none_or(|at| head.to.number > at.number);
                // What another version of this program made may be of no use to the site.
                let spoken = head.version == PROTOCOL_VERSION;
                let from = head.from;
                let follows = from.is_none_or(|from| has.contains(&from) || Some(from) == at);
                newer && spoken && follows
            });
            let Some(next) = next.max_by_key(|head| head.to.number) else {
                return at;
            };
            at = Some(next.to);
        }
    }

    /// How to go on. Many parcels that wait are replaced by one: what was overwritten meanwhile is not
    /// sent to the site.
    pub(crate) fn next(&self, newest: GenerationId, ours: &[GenerationId]) -> Next {
        let end = self.end();
        if end == Some(newest) {
            return Next::There;
        }
        let waits = self.parcels.len() < Self::PARCELS / 2;
        if let Some(end) =
            end.filter(|end| waits && ours.contains(end) && end.number < newest.number)
        {
            return Next::After(end);
        }
        let has = self.receipt.iter().flat_map(|receipt| &receipt.has);
        let common = has.filter(|id| ours.contains(id) && id.number < newest.number);
        Next::Instead(common.max_by_key(|id| id.number).copied())
    }
}

/// Of the parcels of a VM that lie here, the one that a site can use which has these, and gains most by.
fn usable<'a>(has: &[GenerationId], parcels: &'a [Lying]) -> Option<&'a Lying> {
    let newest = has.iter().map(|id| id.number).max();
    let can = |parcel: &&Lying| {
        newest.is_none_or(|newest| parcel.head.to.number > newest)
            && parcel.head.from.is_none_or(|from| has.contains(&from))
    };
    parcels
        .iter()
        .filter(can)
        .max_by_key(|parcel| parcel.head.to.number)
}

fn small<T: DeserializeOwned>(path: &Path, most: u64) -> Result<Option<T>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::file("open", path)(error)),
    };
    let mut bytes = Vec::new();
    let read = file.take(most).read_to_end(&mut bytes);
    read.map_err(Error::file("read", path))?;
    Ok(postcard::from_bytes(&bytes).ok())
}

fn keep_small<T: Serialize>(path: &Path, value: &T) -> Result<()> {
    let bytes = postcard::to_stdvec(value).map_err(|error| unusable(error.to_string()))?;
    files::write_atomic(path, &bytes)
}

/// What is in a folder; nothing, where there is none.
fn entries(dir: &Path) -> Result<Vec<PathBuf>> {
    let listed = match fs::read_dir(dir) {
        Ok(listed) => listed,
        Err(error)
            if matches!(
                error.kind(),
                std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory
            ) =>
        {
            return Ok(Vec::new());
        }
        Err(error) => return Err(Error::file("list", dir)(error)),
    };
    let mut paths: Vec<_> = listed
        .filter_map(|entry| Some(entry.ok()?.path()))
        .collect();
    paths.sort();
    Ok(paths)
}

/// The body's length, of a file that stands at it.
pub(super) fn body_bytes(file: &mut File, path: &Path) -> Result<u64> {
    let at = file.stream_position().map_err(Error::file("read", path))?;
    let all = file.metadata().map_err(Error::file("measure", path))?.len();
    Ok(all.saturating_sub(at))
}

#[cfg(test)]
mod tests;
