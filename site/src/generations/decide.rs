//! What may go: a pure function of what a survey found.
//!
//! Two things are kept apart. A *state* (RAM, device state, hash trees) serves whoever begins
//! with it: the VM itself, a replay, a peer on its way back. A *disk overlay* also serves all
//! overlays above it. So a generation whose state nobody needs loses that, and keeps its disks
//! for as long as something rests on them, however long the chain between.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::{Add, AddAssign, Sub};

use serde::Serialize;

/// Bytes on disk, by what they hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Sizes {
    /// Guest RAM.
    pub ram: u64,
    /// The overlays of all disks.
    pub disks: u64,
    /// The device state.
    pub device: u64,
    /// Hash trees, the manifest, and what was left half-made.
    pub other: u64,
}

impl Sizes {
    /// All of it.
    pub fn total(&self) -> u64 {
        self.ram + self.disks + self.device + self.other
    }
}

impl Add for Sizes {
    type Output = Self;

    fn add(self, more: Self) -> Self {
        Self {
            ram: self.ram + more.ram,
            disks: self.disks + more.disks,
            device: self.device + more.device,
            other: self.other + more.other,
        }
    }
}

impl AddAssign for Sizes {
    fn add_assign(&mut self, more: Self) {
        *self = *self + more;
    }
}

impl Sub for Sizes {
    type Output = Self;

    fn sub(self, less: Self) -> Self {
        Self {
            ram: self.ram.saturating_sub(less.ram),
            disks: self.disks.saturating_sub(less.disks),
            device: self.device.saturating_sub(less.device),
            other: self.other.saturating_sub(less.other),
        }
    }
}

/// What a folder of the line holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A generation.
    Whole,
    /// What is left of one that was pruned.
    Pruned,
    /// What never became one: its making was cut off.
    Unfinished,
}

/// Who needs the state of a generation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Reliance {
    /// It is the newest: the VM starts from it, or will be received against it.
    Newest,
    /// The VM's last run began with it.
    Run,
    /// The newest log continues it, and the VM is here.
    Log,
    /// A peer has it as well, as far as is known, and nothing newer.
    Peer(String),
}

/// One folder of the line, as a survey found it.
#[derive(Clone, Debug)]
pub(crate) struct Folder {
    pub number: u64,
    pub kind: Kind,
    /// Bytes that would be free if it went; a file that also has a name elsewhere has none.
    pub own: Sizes,
    /// Who needs its state, but for [`Reliance::Newest`].
    pub relied: Vec<Reliance>,
    /// The folders that its overlays name as backing; none where they can't be read.
    pub rests_on: Option<BTreeSet<u64>>,
}

/// What is to be kept beyond what is relied on.
#[derive(Clone, Copy, Debug, Default)]
pub struct Limits {
    /// So many of the newest stay, whoever relies on them; the newest always does.
    pub keep: usize,
    /// Older ones go, the oldest first, until what is left takes no more than this. Without it
    /// all go that may.
    pub max_bytes: Option<u64>,
    /// All from this number on stay.
    pub from: Option<u64>,
    /// Logs stay, also those that nothing can be replayed from any more.
    pub keep_logs: bool,
}

/// What becomes of a folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Fate {
    /// It stays as it is.
    Stay,
    /// Overlays rest on its disks: those stay, the rest goes.
    Disks,
    /// Only the note stays that there was one, for what is older.
    Note,
    /// All of it goes.
    Go,
}

/// What becomes of each folder, and of the logs.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Decision {
    pub fates: BTreeMap<u64, Fate>,
    /// Logs that continue something older than the oldest generation that stays: nothing can be
    /// replayed from them.
    pub logs: BTreeSet<u64>,
    /// Bytes that become free.
    pub freed: u64,
    /// Bytes that stay.
    pub left: u64,
}

/// A folder that is needed has an overlay that can't be read: who relies on what is not known.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Unreadable(pub u64);

/// The number of the newest generation.
pub(crate) fn newest(line: &[Folder]) -> Option<u64> {
    let whole = line.iter().filter(|folder| folder.kind == Kind::Whole);
    whole.map(|folder| folder.number).max()
}

/// Decides for a line of folders; `in_use` are those that overlays outside the line rest on,
/// `logs` the logs with their bytes.
pub(crate) fn decide(
    line: &[Folder],
    in_use: &BTreeSet<u64>,
    logs: &BTreeMap<u64, u64>,
    limits: Limits,
) -> Result<Decision, Unreadable> {
    let mut whole: Vec<&Folder> = line.iter().filter(|f| f.kind == Kind::Whole).collect();
    whole.sort_by_key(|folder| folder.number);
    let older = whole.len().saturating_sub(limits.keep.max(1));
    let from = limits.from.unwrap_or(u64::MAX);
    let may_go = whole[..older].iter();
    let may_go = may_go.filter(|f| f.relied.is_empty() && f.number < from);
    let may_go: Vec<u64> = may_go.map(|folder| folder.number).collect();
    let Some(max_bytes) = limits.max_bytes else {
        return without(line, in_use, logs, &may_go, limits.keep_logs);
    };
    for count in 0..=may_go.len() {
        let decision = without(line, in_use, logs, &may_go[..count], limits.keep_logs)?;
        if decision.left <= max_bytes || count == may_go.len() {
            return Ok(decision);
        }
    }
    without(line, in_use, logs, &may_go, limits.keep_logs)
}

/// What becomes of everything when these generations are given up.
fn without(
    line: &[Folder],
    in_use: &BTreeSet<u64>,
    logs: &BTreeMap<u64, u64>,
    given_up: &[u64],
    keep_logs: bool,
) -> Result<Decision, Unreadable> {
    let stays = |folder: &Folder| folder.kind == Kind::Whole && !given_up.contains(&folder.number);
    let by_number: BTreeMap<u64, &Folder> = line.iter().map(|f| (f.number, f)).collect();
    // All that must keep its disks, through chains of any length.
    let mut needed: BTreeSet<u64> = BTreeSet::new();
    let staying = line.iter().filter(|folder| stays(folder));
    let mut ahead: Vec<u64> = in_use
        .iter()
        .copied()
        .chain(staying.clone().map(|folder| folder.number))
        .collect();
    while let Some(number) = ahead.pop() {
        if !needed.insert(number) {
            continue;
        }
        if let Some(folder) = by_number.get(&number) {
            ahead.extend(folder.rests_on.as_ref().ok_or(Unreadable(number))?);
        }
    }
    let oldest = staying.map(|folder| folder.number).min();
    let newest = newest(line);
    let mut decision = Decision::default();
    for folder in line {
        let number = folder.number;
        let fate = if stays(folder) {
            Fate::Stay
        } else if needed.contains(&number) {
            Fate::Disks
        } else if newest.is_none_or(|newest| number > newest)
            || (folder.kind != Kind::Unfinished && oldest.is_some_and(|oldest| number > oldest))
        {
            // Numbers are not given twice, and a replay from an older one has to know that its
            // log does not end where the next older one begins.
            Fate::Note
        } else {
            Fate::Go
        };
        decision.fates.insert(number, fate);
        let left = match fate {
            Fate::Stay => folder.own,
            Fate::Disks => Sizes {
                disks: folder.own.disks,
                ..Sizes::default()
            },
            Fate::Note | Fate::Go => Sizes::default(),
        };
        decision.left += left.total();
        decision.freed += (folder.own - left).total();
    }
    for (number, bytes) in logs {
        if !keep_logs && oldest.is_some_and(|oldest| *number < oldest) {
            decision.logs.insert(*number);
            decision.freed += bytes;
        } else {
            decision.left += bytes;
        }
    }
    Ok(decision)
}

#[cfg(test)]
mod tests;
