//! What is there: the folders of a VM's line, their sizes, and who relies on them.
//!
//! Which overlay rests on which is read from the overlays themselves. The manifests know less: a
//! checkpoint that failed after it had swapped the disks leaves a folder without a manifest that
//! the running VM rests on, and so does everything that comes after it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::decide::{Folder, Kind, Reliance, Sizes, newest};
use super::seen::Seen;
use crate::error::{Error, Result};
use crate::generation::Manifest;
use crate::lease::Lease;
use crate::local::Live;
use crate::store::VmDir;

/// Blocks of `st_blocks`, by definition.
const BLOCK: u64 = 512;

/// The longest name of a backing file that qcow2 allows.
const BACKING_NAME: u32 = 1023;

/// Where the overlays of the VM's last run lie.
pub(super) const RUN: &str = "live";

/// All places with overlays outside the line; those of forks and of states that arrive, too.
pub(super) const PLACES: [&str; 3] = [RUN, "incoming", "following"];

/// All that a decision needs to know.
pub(super) struct Survey {
    pub line: Vec<Folder>,
    /// Bytes that each folder takes on the disk, shared or not.
    pub sizes: BTreeMap<u64, Sizes>,
    /// When each was made, in seconds since 1970.
    pub created: BTreeMap<u64, u64>,
    /// Folders that overlays outside the line rest on.
    pub in_use: BTreeSet<u64>,
    /// The logs, with their bytes on disk.
    pub logs: BTreeMap<u64, u64>,
}

impl Survey {
    /// Looks at a VM; overlays outside the line are looked for in these places.
    pub(super) fn of(vm: &VmDir, places: &[&str]) -> Result<Self> {
        let mut survey = Self {
            line: Vec::new(),
            sizes: BTreeMap::new(),
            created: BTreeMap::new(),
            in_use: in_use(vm, places)?,
            logs: BTreeMap::new(),
        };
        for (number, path) in vm.logs()? {
            let log = fs::metadata(&path).map_err(Error::file("measure", &path))?;
            survey.logs.insert(number, log.blocks() * BLOCK);
        }
        let relied = relied(vm, survey.logs.keys().next_back().copied())?;
        for number in folders(vm)? {
            let files = vm.generation(number);
            let (manifest, kind) = match (files.load_manifest()?, files.load_pruned()?) {
                (Some(manifest), _) => (Some(manifest), Kind::Whole),
                (None, Some(manifest)) => (Some(manifest), Kind::Pruned),
                (None, None) => (None, Kind::Unfinished),
            };
            let (size, own) = measure(files.dir())?;
            survey.sizes.insert(number, size);
            let relied = match &manifest {
                Some(manifest) if kind == Kind::Whole => relied
                    .iter()
                    .filter(|(wanted, _)| wanted.is(manifest))
                    .map(|(_, reliance)| reliance.clone())
                    .collect(),
                _ => Vec::new(),
            };
            if let Some(manifest) = manifest {
                survey.created.insert(number, manifest.created);
            }
            survey.line.push(Folder {
                number,
                kind,
                own,
                relied,
                rests_on: overlays_of(files.dir())
                    .and_then(|overlays| rests_on(vm, overlays))
                    .ok(),
            });
        }
        if let Some(newest) = newest(&survey.line)
            && let Some(folder) = survey.line.iter_mut().find(|f| f.number == newest)
        {
            folder.relied.insert(0, Reliance::Newest);
        }
        Ok(survey)
    }
}

/// A state that somebody wants.
enum Wanted {
    Number(u64),
    Exactly(crate::generation::GenerationId),
}

impl Wanted {
    fn is(&self, manifest: &Manifest) -> bool {
        match self {
            Self::Number(number) => manifest.generation == *number,
            Self::Exactly(id) => manifest.identity() == *id,
        }
    }
}

/// Who wants which state.
fn relied(vm: &VmDir, newest_log: Option<u64>) -> Result<Vec<(Wanted, Reliance)>> {
    let mut relied = Vec::new();
    if let Some(number) = Live::load(vm)?.and_then(|live| live.generation) {
        relied.push((Wanted::Number(number), Reliance::Run));
    }
    // The stale copy of a VM that is elsewhere is replayed upon with what was recorded there.
    if let Some(number) = newest_log
        && !matches!(vm.lease()?, Lease::Elsewhere { .. })
    {
        relied.push((Wanted::Number(number), Reliance::Log));
    }
    let here: Vec<_> = vm.generations()?.iter().map(Manifest::identity).collect();
    for peer in vm.store().peers().list()? {
        let seen = Seen::of(vm, &peer)?;
        for id in seen.generations().filter(|id| here.contains(id)) {
            let reliance = Reliance::Peer(peer.name.to_string());
            relied.push((Wanted::Exactly(id), reliance));
        }
    }
    Ok(relied)
}

/// The numbers of all folders of the line, whatever is in them.
fn folders(vm: &VmDir) -> Result<BTreeSet<u64>> {
    let dir = vm.dir().join("generations");
    let mut numbers = BTreeSet::new();
    for path in entries(&dir)? {
        let name = path.file_name().and_then(|name| name.to_str());
        numbers.extend(name.and_then(|name| name.parse::<u64>().ok()));
    }
    Ok(numbers)
}

/// What lies in a folder; nothing, where there is none.
fn entries(dir: &Path) -> Result<Vec<PathBuf>> {
    match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        entries => entries
            .and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect())
            .map_err(Error::file("list", dir)),
    }
}

/// Size and kind of a file, unless it has just gone: a list is made without the VM's lock.
fn metadata(path: &Path) -> Result<Option<fs::Metadata>> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        other => other.map(Some).map_err(Error::file("measure", path)),
    }
}

/// Bytes that the files of a folder take, and those that would be free without them.
fn measure(dir: &Path) -> Result<(Sizes, Sizes)> {
    let (mut all, mut own) = (Sizes::default(), Sizes::default());
    for path in entries(dir)? {
        let Some(file) = metadata(&path)? else {
            continue;
        };
        let bytes = file.blocks() * BLOCK;
        let mut size = Sizes::default();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        *match &*name {
            "ram.img" => &mut size.ram,
            "device.bin" => &mut size.device,
            name if is_overlay(name) => &mut size.disks,
            _ => &mut size.other,
        } = bytes;
        all += size;
        // What there was is noted for as long as something older is there.
        let note = matches!(&*name, "manifest.json" | "pruned.json");
        if file.nlink() <= 1 && !note {
            own += size;
        }
    }
    Ok((all, own))
}

/// Bytes that all files in a folder take, however deep.
pub(super) fn measure_deep(dir: &Path) -> Result<u64> {
    let mut bytes = 0;
    let mut ahead = vec![dir.to_owned()];
    while let Some(dir) = ahead.pop() {
        for path in entries(&dir)? {
            let Some(entry) = metadata(&path)? else {
                continue;
            };
            bytes += entry.blocks() * BLOCK;
            if entry.is_dir() {
                ahead.push(path);
            }
        }
    }
    Ok(bytes)
}

fn is_overlay(name: &str) -> bool {
    name.strip_suffix(".qcow2").is_some()
}

/// Whether this file of a generation's folder is one of its disks.
pub(super) fn is_disk(path: &Path) -> bool {
    path.file_name()
        .and_then(|name| name.to_str())
        .is_some_and(is_overlay)
}

/// The overlays in a folder.
pub(super) fn overlays_of(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut overlays = entries(dir)?;
    overlays.retain(|path| is_disk(path));
    Ok(overlays)
}

/// The folders that overlays in these places rest on.
fn in_use(vm: &VmDir, places: &[&str]) -> Result<BTreeSet<u64>> {
    rests_on(vm, overlays_outside(vm, places)?)
}

/// The overlays in these places.
pub(super) fn overlays_outside(vm: &VmDir, places: &[&str]) -> Result<Vec<PathBuf>> {
    let mut overlays = Vec::new();
    for place in places {
        for dir in entries(&vm.dir().join(place))? {
            if dir.is_dir() {
                overlays.extend(overlays_of(&dir)?);
            }
        }
    }
    Ok(overlays)
}

/// The folders that these overlays name as backing.
pub(super) fn rests_on(vm: &VmDir, overlays: Vec<PathBuf>) -> Result<BTreeSet<u64>> {
    let line = vm.dir().join("generations");
    let line = match fs::canonicalize(&line) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BTreeSet::new()),
        other => other.map_err(Error::file("open", &line))?,
    };
    let mut numbers = BTreeSet::new();
    for overlay in overlays {
        let Some(backing) = file_behind(&overlay)? else {
            continue;
        };
        let folder = backing.parent();
        if folder.and_then(Path::parent) == Some(&line) {
            let name = folder.and_then(|folder| folder.file_name()?.to_str());
            numbers.extend(name.and_then(|name| name.parse::<u64>().ok()));
        }
    }
    Ok(numbers)
}

/// The file that an overlay rests on, without symbolic links.
pub(super) fn file_behind(overlay: &Path) -> Result<Option<PathBuf>> {
    let Some(backing) = backing_of(overlay)? else {
        return Ok(None);
    };
    let backing = overlay.parent().unwrap_or(Path::new("")).join(backing);
    let found = fs::canonicalize(&backing).map_err(Error::file("find", &backing))?;
    Ok(Some(found))
}

/// The backing file that a qcow2 image names, as its header has it (QEMU's
/// `docs/interop/qcow2.txt`): a read of one block, where opening the image would read the
/// allocation of the whole chain.
fn backing_of(overlay: &Path) -> Result<Option<PathBuf>> {
    let damaged = |reason: &str| Error::Damaged {
        path: overlay.to_owned(),
        reason: reason.into(),
    };
    let read = || -> io::Result<(Vec<u8>, File)> {
        let mut file = File::open(overlay)?;
        let mut header = vec![0; 20];
        file.read_exact(&mut header)?;
        Ok((header, file))
    };
    let (header, mut file) = read().map_err(Error::file("read", overlay))?;
    let number = |at: usize, bytes: usize| {
        header[at..at + bytes]
            .iter()
            .fold(0_u64, |number, byte| number << 8 | u64::from(*byte))
    };
    if header[..4] != *b"QFI\xfb" {
        return Err(damaged("it is no qcow2 image"));
    }
    let (offset, length) = (number(8, 8), number(16, 4));
    if offset == 0 {
        return Ok(None);
    }
    if length == 0 || length > u64::from(BACKING_NAME) {
        return Err(damaged(
            "the name of its backing file has no possible length",
        ));
    }
    let mut name = vec![0; length as usize];
    file.seek(SeekFrom::Start(offset))
        .and_then(|_| file.read_exact(&mut name))
        .map_err(Error::file("read", overlay))?;
    Ok(Some(PathBuf::from(std::ffi::OsString::from_vec(name))))
}

/// Whether any overlay but its own rests on the disks in a folder of the line.
pub(crate) fn is_rested_on(vm: &VmDir, number: u64) -> Result<bool> {
    if in_use(vm, &PLACES)?.contains(&number) {
        return Ok(true);
    }
    for other in folders(vm)? {
        let overlays = overlays_of(vm.generation(other).dir())?;
        if other != number && rests_on(vm, overlays)?.contains(&number) {
            return Ok(true);
        }
    }
    Ok(false)
}
