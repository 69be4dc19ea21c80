//! What was measured: one row for each workload and way, kept in a file, and the tables of them.

use std::path::Path;

use anyhow::Context as _;
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// A way to move a VM that runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Way {
    /// Ours: live, from nothing but the read-only disk image
    Live,
    /// Ours: live, against a stale copy
    LiveStale,
    /// Ours: standing still, from nothing but the read-only disk image
    Full,
    /// QEMU: standing still
    QemuStopped,
    /// QEMU: pre-copy
    Qemu,
    /// QEMU: pre-copy with the capability `xbzrle`
    QemuXbzrle,
    /// QEMU: pre-copy with the capability `multifd`, compressing with zstd
    QemuMultifdZstd,
}

impl Way {
    /// As a table has it.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Live => "`live` from nothing",
            Self::LiveStale => "`live` against a stale copy",
            Self::Full => "`full`, standing still",
            Self::QemuStopped => "QEMU, standing still",
            Self::Qemu => "QEMU pre-copy",
            Self::QemuXbzrle => "QEMU pre-copy, xbzrle",
            Self::QemuMultifdZstd => "QEMU pre-copy, multifd zstd",
        }
    }
}

/// One measurement.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Row {
    /// What the guest did.
    pub(crate) workload: String,
    /// How it was moved.
    pub(crate) way: Way,
    /// Over all connections, both ways.
    pub(crate) bytes: u64,
    /// From the beginning until it ran at the other side.
    pub(crate) seconds: f64,
    /// Seconds that it stood still.
    pub(crate) downtime: f64,
    /// Whether the way ended by itself; else the guest was stopped after a time.
    pub(crate) converged: bool,
    /// Rounds over the guest's memory.
    pub(crate) rounds: u64,
    /// Bytes of the pages that changed while it ran, each time they were sent anew.
    pub(crate) dirty_bytes: Option<u64>,
    /// What was sent for them.
    pub(crate) sent_for_dirty: Option<u64>,
    /// What there is to know about it.
    pub(crate) note: String,
}

impl Row {
    /// Bytes of dirty pages over bytes sent for them.
    pub(crate) fn factor(&self) -> Option<f64> {
        let sent = self.sent_for_dirty.filter(|sent| *sent > 0)?;
        Some(self.dirty_bytes? as f64 / sent as f64)
    }
}

/// One trip of a VM that goes back and forth.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Trip {
    /// How.
    pub(crate) strategy: String,
    /// Over the line, both ways.
    pub(crate) bytes: u64,
    /// In all: until the source has its stale copy in place as well.
    pub(crate) seconds: f64,
    /// Until it ran at the other site.
    #[serde(default)]
    pub(crate) running: f64,
    /// Standing still.
    pub(crate) downtime: f64,
}

/// A standby that was kept during a session, and switched to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Standby {
    /// By what epochs were shipped.
    #[serde(default)]
    pub(crate) by: String,
    /// How often there was an epoch.
    pub(crate) every: String,
    /// What the session took.
    pub(crate) session_seconds: f64,
    /// From its end until the standby had all of it.
    #[serde(default)]
    pub(crate) caught_up_seconds: f64,
    /// Generations made in it.
    pub(crate) epochs: u64,
    /// For how long the guest stood still for one: the median, and the longest.
    pub(crate) paused: f64,
    pub(crate) longest_paused: f64,
    /// How many of them came to the standby, and how many of those by log.
    #[serde(default)]
    pub(crate) shipped: u64,
    #[serde(default)]
    pub(crate) by_log: u64,
    /// How long one took to the standby: the median.
    pub(crate) shipped_seconds: f64,
    /// All that crossed the line for them, both ways.
    pub(crate) shipped_bytes: u64,
    /// What crossed it for the switch, and how long that took.
    pub(crate) switch_bytes: u64,
    pub(crate) switch_seconds: f64,
    /// Of it, standing still.
    pub(crate) switch_downtime: f64,
}

/// What was found after kills of who keeps a standby.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Kills {
    pub(crate) tries: u64,
    /// Tries after which the standby had another generation than before.
    pub(crate) shipped: u64,
    /// Generations looked at, of both sites.
    pub(crate) generations: u64,
    /// Of them, not what their manifest says.
    pub(crate) not_whole: u64,
}

/// A move to a site that lacks the image of the VM's disk.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Bare {
    /// The options of `migrate`.
    pub(crate) how: String,
    /// Until it ran there, and what had crossed the line by then, both ways.
    pub(crate) running: f64,
    pub(crate) bytes_before: u64,
    /// Of it, standing still.
    pub(crate) downtime: f64,
    /// Until all was there, and what had crossed the line by then, both ways.
    pub(crate) all: f64,
    pub(crate) bytes: u64,
    /// Seconds that reading files took as soon as it ran there.
    pub(crate) reading: f64,
    /// Pages that went out of turn for it.
    pub(crate) wanted: u64,
}

/// The middle one; none of none.
pub(crate) fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or_default()
}

/// All of it, and what it was measured on.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Results {
    /// In a sentence for readers.
    pub(crate) machine: String,
    /// The line between the two.
    pub(crate) line: String,
    /// In the order of their measurement.
    pub(crate) rows: Vec<Row>,
    /// The first trip, to a site that had nothing, and those after it.
    pub(crate) trips: Vec<Trip>,
    #[serde(default)]
    pub(crate) standbys: Vec<Standby>,
    #[serde(default)]
    pub(crate) kills: Option<Kills>,
    #[serde(default)]
    pub(crate) bare: Vec<Bare>,
}

impl Results {
    /// Reads what [`Self::save`] wrote; none yet if there is no such file.
    pub(crate) fn load(path: &Path) -> anyhow::Result<Self> {
        match std::fs::read(path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Self::default()),
            read => {
                let text = read.with_context(|| format!("cannot read {}", path.display()))?;
                serde_json::from_slice(&text).with_context(|| {
                    let path = path.display();
                    format!("{path} holds no results of this program; move it away to begin anew")
                })
            }
        }
    }

    /// Writes them, whole or not at all.
    pub(crate) fn save(&self, path: &Path) -> anyhow::Result<()> {
        let cannot = || format!("cannot write {}", path.display());
        let dir = path.parent().unwrap_or(Path::new("."));
        std::fs::create_dir_all(dir).with_context(cannot)?;
        let partial = tempfile::NamedTempFile::new_in(dir).with_context(cannot)?;
        serde_json::to_writer_pretty(&partial, self).with_context(cannot)?;
        partial.persist(path).with_context(cannot)?;
        Ok(())
    }

    /// Takes the place of an older row of the same workload and way.
    pub(crate) fn replace(&mut self, row: Row) {
        self.rows
            .retain(|old| (&old.workload, old.way) != (&row.workload, row.way));
        self.rows.push(row);
    }

    /// As tables.
    pub(crate) fn markdown(&self) -> String {
        let mut text = format!("Measured on {}. The line: {}.\n", self.machine, self.line);
        let mut workloads: Vec<&str> = Vec::new();
        for row in &self.rows {
            if !workloads.contains(&row.workload.as_str()) {
                workloads.push(&row.workload);
            }
        }
        for workload in workloads {
            text += &format!(
                "\n**{workload}**\n\n| way | downtime | in all | on the wire | rounds | ended by itself | \
                 dirty pages over bytes sent | |\n|---|---|---|---|---|---|---|---|\n"
            );
            let mut rows: Vec<_> = self
                .rows
                .iter()
                .filter(|row| row.workload == workload)
                .collect();
            rows.sort_by_key(|row| row.way as u8);
            for row in rows {
                text += &format!(
                    "| {} | {:.2} s | {:.0} s | {:.1} MiB | {} | {} | {} | {} |\n",
                    row.way.name(),
                    row.downtime,
                    row.seconds,
                    mebibytes(row.bytes),
                    row.rounds,
                    if row.converged { "yes" } else { "no" },
                    row.factor()
                        .map_or_else(String::new, |factor| format!("{factor:.1}")),
                    row.note,
                );
            }
        }
        if let Some((first, rest)) = self.trips.split_first() {
            text += "\n**Back and forth** (in all: until the source has its stale copy in place, too)\n\n\
                     | trip | how | on the wire | runs there after | in all | downtime | of the first one's bytes | \
                     of its time, until it ran | in all |\n|---|---|---|---|---|---|---|---|---|\n";
            for (number, trip) in std::iter::once(first).chain(rest).enumerate() {
                text += &format!(
                    "| {} | `{}` | {:.2} MiB | {:.1} s | {:.1} s | {:.1} s | {:.2} % | {:.2} % | {:.2} % |\n",
                    number + 1,
                    trip.strategy,
                    mebibytes(trip.bytes),
                    trip.running,
                    trip.seconds,
                    trip.downtime,
                    100.0 * trip.bytes as f64 / first.bytes.max(1) as f64,
                    100.0 * trip.running / first.running.max(0.001),
                    100.0 * trip.seconds / first.seconds.max(0.001),
                );
            }
        }
        if let Some(first) = self.standbys.first() {
            text += &format!(
                "\n**A standby during the demo's session** ({:.0} s, an epoch each {}, a replay-friendly guest)\n\n\
                 | shipped by | epochs | stood still, median (longest) | shipped, by log | all of them | one of them, \
                 median | all there after the session | `switch`: downtime | in all | bytes |\n|---|---|---|---|---|---|---|---|---|---|\n",
                first.session_seconds, first.every,
            );
        }
        for standby in &self.standbys {
            text += &format!(
                "| {} | {} | {:.2} s ({:.2}) | {}, {} | {:.1} MiB | {:.1} s | {:.1} s | {:.2} s | {:.1} s | {:.2} MiB |\n",
                standby.by,
                standby.epochs,
                standby.paused,
                standby.longest_paused,
                standby.shipped,
                standby.by_log,
                mebibytes(standby.shipped_bytes),
                standby.shipped_seconds,
                standby.caught_up_seconds,
                standby.switch_downtime,
                standby.switch_seconds,
                mebibytes(standby.switch_bytes),
            );
        }
        if !self.bare.is_empty() {
            text += "\n**To a site that lacks the image of the disk** (some hundred files are read there as soon as the \
                     guest runs)\n\n| `migrate` | runs there after | downtime | bytes until then | all there after | \
                     bytes | reading took | pages out of turn |\n|---|---|---|---|---|---|---|---|\n";
        }
        for bare in &self.bare {
            text += &format!(
                "| `{}` | {:.1} s | {:.1} s | {:.1} MiB | {:.1} s | {:.1} MiB | {:.1} s | {} |\n",
                bare.how,
                bare.running,
                bare.downtime,
                mebibytes(bare.bytes_before),
                bare.all,
                mebibytes(bare.bytes),
                bare.reading,
                bare.wanted,
            );
        }
        if let Some(kills) = &self.kills {
            text += &format!(
                "\n**Killed while keeping a standby**: {} times, {} of them after something new had come \
                 there; of {} generations looked at {} were not whole.\n",
                kills.tries, kills.shipped, kills.generations, kills.not_whole,
            );
        }
        text
    }
}

fn mebibytes(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(way: Way, downtime: f64) -> Row {
        Row {
            workload: "writer".to_owned(),
            way,
            bytes: 3 << 20,
            seconds: 60.0,
            downtime,
            converged: true,
            rounds: 4,
            dirty_bytes: Some(1000),
            sent_for_dirty: Some(100),
            note: String::new(),
        }
    }

    #[test]
    fn rows_give_way_to_newer_ones_and_come_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bench/live.json");
        let mut results = Results::load(&path).unwrap();
        results.replace(row(Way::Live, 1.0));
        results.replace(row(Way::Qemu, 9.0));
        results.replace(row(Way::Live, 2.0));
        results.save(&path).unwrap();
        let back = Results::load(&path).unwrap();
        assert_eq!(back, results);
        assert_eq!(back.rows.len(), 2);
        let table = back.markdown();
        let (ours, theirs) = (table.find("2.00 s").unwrap(), table.find("9.00 s").unwrap());
        assert!(ours < theirs && table.contains("| 10.0 |"), "{table}");
    }

    #[test]
    fn nothing_sent_is_no_factor() {
        let mut none = row(Way::Live, 1.0);
        none.sent_for_dirty = Some(0);
        assert_eq!(none.factor(), None);
    }
}
