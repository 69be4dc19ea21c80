//! What a replay is worth, over sessions and settings: rows, and how they are kept.
//!
//! An ablation takes one thing away at a time: the guest that was made friendly to replay, the
//! replay without a network, the pace of the recording. Taking all of it needs hours, so each
//! [`Row`] is one replay, kept in a file that is rewritten after every row; what is there already
//! need not be measured again. [`table`] and [`plot`] are made of the file alone.
//!
//! Nothing here measures. What was not measured has no row, and is reported as such.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::session;
use crate::user::User;
use moves::Move;

mod kinds;
pub mod moves;
pub mod plot;
pub mod table;
#[cfg(test)]
mod tests;
mod words;

/// The strategy of [`Row::bytes`] that starts from the stale copy.
pub const BASE: &str = "base";
/// The one that starts from what a replay made of the stale copy.
pub const REPLAY: &str = "replay";
/// The same, told by the source's own replay: what is sent by default.
pub const TWIN: &str = "twin";

/// No honest file is longer, in bytes: it would hold tens of thousands of rows.
const MAX_FILE: u64 = 64 << 20;

/// Why results could not be read, kept or put into a document.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file, or its folder.
    #[error("cannot {what} {}", path.display())]
    File {
        /// What was tried.
        what: &'static str,
        /// With which.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The file holds something else.
    #[error(
        "{} holds no results of an ablation; move it away to begin anew", path.display()
    )]
    Format {
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
    /// The file is longer than any that is written here.
    #[error("{} is longer than {MAX_FILE} bytes; move it away to begin anew", path.display())]
    TooLarge {
        /// Which.
        path: PathBuf,
    },
    /// JSON has no such number.
    #[error("a replay of {workload} (repeat {repeat}) has seconds that are no number")]
    NotANumber {
        /// Whose.
        workload: String,
        /// Which.
        repeat: u32,
    },
    /// The document has no place for the section, or more than one.
    #[error("the document has {found} lines {marker:?}; it must have one")]
    Marker {
        /// The line.
        marker: String,
        /// How often it is there.
        found: usize,
    },
    /// The document's markers are in the wrong order.
    #[error("in the document, the line {end:?} must come after {begin:?}")]
    MarkerOrder {
        /// What was to be the first.
        begin: String,
        /// What was to be the second.
        end: String,
    },
}

/// How the guest was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Guest {
    /// Chance taken out of it, as `vm create --replay-friendly` does.
    Friendly,
    /// As its distribution makes it.
    Ordinary,
    /// A friendly one whose instructions are counted, as `--icount` does.
    Counted,
}

/// Whether the guest had a network with a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Network {
    /// None.
    Off,
    /// One while it was recorded.
    On,
}

/// What kind of replay a row is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// At the recorded pace.
    Real,
    /// As quick as the guest allows.
    Quick,
    /// One that went entirely wrong: the replayed state is another session's.
    Failed,
}

impl Guest {
    /// All, the one that others are compared with first.
    pub const ALL: [Self; 3] = [Self::Friendly, Self::Ordinary, Self::Counted];
}

impl Network {
    /// All, the one that others are compared with first.
    pub const ALL: [Self; 2] = [Self::On, Self::Off];
}

impl Mode {
    /// Those in which the session's own log is replayed.
    pub const PACES: [Self; 2] = [Self::Real, Self::Quick];
}

impl fmt::Display for Guest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Friendly => "friendly",
            Self::Ordinary => "ordinary",
            Self::Counted => "counted",
        })
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Off => "off",
            Self::On => "on",
        })
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Real => "real",
            Self::Quick => "quick",
            Self::Failed => "failed",
        })
    }
}

/// Pages of a replayed state that are not as in the source's, at the same place.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Diverged {
    /// Of the devices' state.
    pub device: u64,
    /// Of all disks.
    pub disk: u64,
    /// Of RAM.
    pub ram: u64,
    /// Those of RAM by what the source uses them for; empty where that is not known.
    #[serde(default)]
    pub kinds: BTreeMap<String, u64>,
}

/// Bytes that cross the line for each image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageBytes {
    /// For the devices' state.
    pub device: u64,
    /// For all disks.
    pub disk: u64,
    /// For RAM.
    pub ram: u64,
}

impl ImageBytes {
    /// For all of them.
    pub const fn total(&self) -> u64 {
        self.device
            .saturating_add(self.disk)
            .saturating_add(self.ram)
    }
}

/// One replay of one recording.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// The session, as in [`session::SUITE`].
    pub workload: String,
    /// Who was recorded.
    #[serde(default)]
    pub user: User,
    /// The guest's making.
    pub guest: Guest,
    /// The guest's network.
    pub network: Network,
    /// The kind of replay.
    pub mode: Mode,
    /// Which repeat, from 1. Rows of one repeat are of one recording.
    pub repeat: u32,
    /// What the recording took.
    pub recorded_seconds: f64,
    /// What the replay took; 0 for [`Mode::Failed`], as are the next three.
    pub seconds: f64,
    /// Input events that were replayed.
    pub events: u64,
    /// Anchors that the replay saw in time.
    pub matched: u64,
    /// Anchors that it did not.
    pub missed: u64,
    /// What the log takes on the line, or would.
    pub log_bytes: u64,
    /// How far the replayed state is from the source's.
    pub diverged: Diverged,
    /// What reconciling takes, by strategy: [`BASE`], [`REPLAY`], [`TWIN`].
    pub bytes: BTreeMap<String, ImageBytes>,
}

impl Row {
    /// All that crosses the line by this strategy: the images and, where there is a replay, the
    /// log that it needs. `None` if it was not measured.
    pub fn sent(&self, strategy: &str) -> Option<u64> {
        let images = self.bytes.get(strategy)?.total();
        Some(match strategy {
            BASE => images,
            _ => images.saturating_add(self.log_bytes),
        })
    }

    /// By how much that is less than [`BASE`] sends, in percent; negative if it is more.
    /// `None` if either was not measured.
    pub fn fewer(&self, strategy: &str) -> Option<f64> {
        let sent = self.sent(strategy)? as f64;
        let base = self.sent(BASE).filter(|base| *base > 0)? as f64;
        Some((1.0 - sent / base) * 100.0)
    }

    fn same_place(&self, other: &Self) -> bool {
        self.workload == other.workload
            && Setting::of(self) == Setting::of(other)
            && self.repeat == other.repeat
    }
}

/// Under which conditions a session was replayed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Setting {
    pub(crate) user: User,
    pub(crate) guest: Guest,
    pub(crate) network: Network,
    pub(crate) mode: Mode,
}

impl Setting {
    /// What all others are compared with.
    pub(crate) const REFERENCE: Self = Self {
        user: User::Practised,
        guest: Guest::Friendly,
        network: Network::On,
        mode: Mode::Real,
    };

    /// The same at the quick pace.
    pub(crate) const QUICK: Self = Self {
        mode: Mode::Quick,
        ..Self::REFERENCE
    };

    const fn of(row: &Row) -> Self {
        Self {
            user: row.user,
            guest: row.guest,
            network: row.network,
            mode: row.mode,
        }
    }
}

/// All that was measured on one machine.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Results {
    /// What it was measured with and on, in a sentence for readers.
    pub machine: String,
    /// One for each replay.
    pub rows: Vec<Row>,
    /// One for each run of the demo, whose target follows while the user works.
    #[serde(default)]
    pub moves: Vec<Move>,
}

impl Results {
    /// None yet.
    pub fn new(machine: impl Into<String>) -> Self {
        Self {
            machine: machine.into(),
            rows: Vec::new(),
            moves: Vec::new(),
        }
    }

    /// Reads what [`Self::save`] wrote; `None` if there is no such file.
    ///
    /// # Errors
    /// The file can't be read, or holds something else.
    pub fn load(path: &Path) -> Result<Option<Self>, Error> {
        let failed = |source| Error::File {
            what: "read",
            path: path.to_owned(),
            source,
        };
        let file = match File::open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            file => file.map_err(failed)?,
        };
        let mut text = Vec::new();
        file.take(MAX_FILE + 1)
            .read_to_end(&mut text)
            .map_err(failed)?;
        if text.len() as u64 > MAX_FILE {
            return Err(Error::TooLarge {
                path: path.to_owned(),
            });
        }
        let read: Self = serde_json::from_slice(&text).map_err(|source| Error::Format {
            path: path.to_owned(),
            source,
        })?;
        let mut results = Self::new(read.machine);
        for row in read.rows {
            results.push(row);
        }
        results.moves = read.moves;
        Ok(Some(results))
    }

    /// Writes all to `path`, and makes its folder if need be. A reader, or who is interrupted,
    /// finds either what was there before or all of the new.
    ///
    /// # Errors
    /// The file can't be written, or a row holds what JSON can't say; `path` is as before.
    pub fn save(&self, path: &Path) -> Result<(), Error> {
        let numbers = |row: &&Row| !(row.recorded_seconds.is_finite() && row.seconds.is_finite());
        if let Some(row) = self.rows.iter().find(numbers) {
            return Err(Error::NotANumber {
                workload: row.workload.clone(),
                repeat: row.repeat,
            });
        }
        let failed = |source| Error::File {
            what: "write",
            path: path.to_owned(),
            source,
        };
        let mut text = serde_json::to_vec_pretty(self).map_err(|e| failed(e.into()))?;
        text.push(b'\n');
        let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty());
        let dir = dir.unwrap_or(Path::new("."));
        fs::create_dir_all(dir).map_err(failed)?;
        // Results are for all to read, unlike other temporary files.
        let mut file = tempfile::Builder::new()
            .prefix(".ablation.")
            .permissions(Permissions::from_mode(0o644))
            .tempfile_in(dir)
            .map_err(failed)?;
        file.write_all(&text).map_err(failed)?;
        file.as_file().sync_all().map_err(failed)?;
        file.persist(path).map_err(|error| failed(error.error))?;
        Ok(())
    }

    /// Adds a row; one of the same session, setting and repeat gives way to it.
    pub fn push(&mut self, row: Row) {
        match self.rows.iter_mut().find(|old| old.same_place(&row)) {
            Some(old) => *old = row,
            None => self.rows.push(row),
        }
    }

    /// Whether so many repeats of a session by this user with this guest and network are there,
    /// at either pace: nothing of it is left to measure.
    pub fn has(
        &self,
        workload: &str,
        user: User,
        guest: Guest,
        network: Network,
        repeats: u8,
    ) -> bool {
        Mode::PACES.into_iter().all(|mode| {
            let setting = Setting {
                user,
                guest,
                network,
                mode,
            };
            self.of(workload, setting).count() >= repeats.into()
        })
    }

    /// The rows of a session in a setting, in the order they were measured.
    pub(crate) fn of(&self, workload: &str, setting: Setting) -> impl Iterator<Item = &Row> {
        let of_it = move |row: &&Row| row.workload == workload && Setting::of(row) == setting;
        self.rows.iter().filter(of_it)
    }

    /// Of a session's rows in a setting, what `figure` makes of each.
    pub(crate) fn spread(
        &self,
        workload: &str,
        setting: Setting,
        figure: impl Fn(&Row) -> Option<f64>,
    ) -> Option<Spread> {
        Spread::of(self.of(workload, setting).filter_map(figure))
    }

    /// All sessions that have rows: those of the suite in its order, then others.
    pub(crate) fn workloads(&self) -> Vec<&str> {
        let mut names: Vec<&str> = Vec::new();
        for row in &self.rows {
            if !names.contains(&row.workload.as_str()) {
                names.push(&row.workload);
            }
        }
        let place = |name: &str| session::SUITE.iter().position(|(other, _)| *other == name);
        names.sort_by_key(|name| place(name).unwrap_or(usize::MAX));
        names
    }
}

/// The middle of some figures, and how far they lie apart.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Spread {
    /// The middle one; of an even number, the mean of the two in the middle.
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
    /// How many there are, at least one.
    pub(crate) count: usize,
}

impl Spread {
    /// `None` of no figures.
    pub(crate) fn of(figures: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut figures: Vec<f64> = figures.into_iter().collect();
        figures.sort_by(f64::total_cmp);
        let (min, max) = (*figures.first()?, *figures.last()?);
        let count = figures.len();
        let median = f64::midpoint(figures[(count - 1) / 2], figures[count / 2]);
        Some(Self {
            median,
            min,
            max,
            count,
        })
    }
}
