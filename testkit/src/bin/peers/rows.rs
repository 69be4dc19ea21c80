//! What was measured: one row for each capture, way and set of images, kept in a file.
//!
//! Rows of other captures stay in the file when one is measured; those of the same capture, way
//! and images give way. What could not be measured has a row without bytes that says why.

use std::fs::{self, File, Permissions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use anyhow::{Context as _, ensure};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// No honest file is longer, in bytes.
const MAX_FILE: u64 = 16 << 20;

/// A way of bringing a site that holds `base` to `source`.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ValueEnum,
)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Way {
    /// Ours: against the stale copy
    Base,
    /// Ours: against what a replay made of it
    Replay,
    /// Ours: the same, told by the source's own replay; what is sent by default
    Twin,
    /// QEMU's migration
    Qemu,
    /// QEMU's migration with the capability `xbzrle`
    QemuXbzrle,
    /// QEMU's migration with the capability `multifd`, compressing with zstd
    QemuMultifdZstd,
    /// rsync -z
    Rsync,
    /// rsync -z with blocks of a page
    RsyncPages,
    /// zstd --patch-from
    ZstdPatch,
    /// xdelta3
    Xdelta3,
    /// Pages found nowhere through xz, as VM handoff does it
    DedupXz,
    /// Pages that changed through zstd: a yardstick, and no peer
    ChangedZstd,
}

impl Way {
    /// Our own strategies.
    pub(crate) const OURS: [Self; 3] = [Self::Base, Self::Replay, Self::Twin];
    /// Those of QEMU, which send RAM and device state and no disk.
    pub(crate) const QEMU: [Self; 3] = [Self::Qemu, Self::QemuXbzrle, Self::QemuMultifdZstd];
    /// The peers that send all images. None of them replays.
    pub(crate) const WHOLE: [Self; 5] = [
        Self::Rsync,
        Self::RsyncPages,
        Self::ZstdPatch,
        Self::Xdelta3,
        Self::DedupXz,
    ];

    /// As a table's head has it.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Base => "`base`",
            Self::Replay => "`replay` without a twin",
            Self::Twin => "`replay` with a twin",
            Self::Qemu => "QEMU plain",
            Self::QemuXbzrle => "QEMU xbzrle",
            Self::QemuMultifdZstd => "QEMU multifd zstd",
            Self::Rsync => "rsync -z",
            Self::RsyncPages => "rsync -z -B 4096",
            Self::ZstdPatch => "zstd --patch-from",
            Self::Xdelta3 => "xdelta3",
            Self::DedupXz => "dedup + xz",
            Self::ChangedZstd => "changed pages in zstd -3",
        }
    }

    /// Whether the notes of its rows say how many pages there were: of interest for one capture,
    /// and not for all together.
    pub(crate) const fn notes_are_numbers(self) -> bool {
        matches!(self, Self::DedupXz | Self::ChangedZstd)
    }
}

/// The images of a row that are not one alone: what QEMU sends.
pub(crate) const RAM_AND_DEVICE: &str = "ram+device";

/// One measurement.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Row {
    /// The name of the capture's folder.
    pub(crate) capture: String,
    /// Which way.
    pub(crate) way: Way,
    /// `ram`, `disk` (`disk1` and so on for more), `device`, or [`RAM_AND_DEVICE`].
    pub(crate) images: String,
    /// What crosses the line, or is stored to be sent. `None` if it was not measured.
    pub(crate) bytes: Option<u64>,
    /// How many of them say which pages differ and what is in them; of our own ways alone.
    #[serde(default)]
    pub(crate) hashes: Option<u64>,
    /// What that took, on this machine beside whatever else it did.
    pub(crate) seconds: Option<f64>,
    /// Whether what arrived was compared with the source's state byte for byte.
    pub(crate) checked: bool,
    /// What there is to know about it.
    pub(crate) note: String,
}

/// All rows, and what they were measured on.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Results {
    /// In a sentence for readers.
    pub(crate) machine: String,
    /// In the order of their measurement.
    pub(crate) rows: Vec<Row>,
}

impl Results {
    /// Reads what [`Self::save`] wrote; none yet if there is no such file.
    pub(crate) fn load(path: &Path) -> anyhow::Result<Self> {
        let read = || format!("cannot read {}", path.display());
        let file = match File::open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            file => file.with_context(read)?,
        };
        let mut text = Vec::new();
        file.take(MAX_FILE + 1)
            .read_to_end(&mut text)
            .with_context(read)?;
        ensure!(
            text.len() as u64 <= MAX_FILE,
            "{} is longer than {MAX_FILE} bytes; move it away to begin anew",
            path.display()
        );
        serde_json::from_slice(&text).with_context(|| {
            let path = path.display();
            format!("{path} holds no results of this program; move it away to begin anew")
        })
    }

    /// Writes all. A reader finds either what was there before or all of the new.
    pub(crate) fn save(&self, path: &Path) -> anyhow::Result<()> {
        let write = || format!("cannot write {}", path.display());
        let mut text = serde_json::to_vec_pretty(self).with_context(write)?;
        text.push(b'\n');
        let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty());
        let dir = dir.unwrap_or(Path::new("."));
        fs::create_dir_all(dir).with_context(write)?;
        // Results are for all to read, unlike other temporary files.
        let mut file = tempfile::Builder::new()
            .prefix(".peers.")
            .permissions(Permissions::from_mode(0o644))
            .tempfile_in(dir)
            .with_context(write)?;
        file.write_all(&text)
            .and_then(|()| file.as_file().sync_all())
            .with_context(write)?;
        file.persist(path).with_context(write)?;
        Ok(())
    }

    /// Puts rows in place of all that there are of the same capture and way.
    pub(crate) fn replace(&mut self, capture: &str, way: Way, rows: Vec<Row>) {
        self.rows
            .retain(|row| row.capture != capture || row.way != way);
        self.rows.extend(rows);
    }

    /// The captures that have rows, in the order of their first.
    pub(crate) fn captures(&self) -> Vec<&str> {
        let mut names: Vec<&str> = Vec::new();
        for row in &self.rows {
            if !names.contains(&row.capture.as_str()) {
                names.push(&row.capture);
            }
        }
        names
    }

    /// The rows of a way of bringing a capture over.
    pub(crate) fn of(&self, capture: &str, way: Way) -> impl Iterator<Item = &Row> {
        self.rows
            .iter()
            .filter(move |row| row.capture == capture && row.way == way)
    }

    /// The bytes of all images that `which` picks by name; `None` if one of them was not
    /// measured, or there is none.
    pub(crate) fn bytes(
        &self,
        capture: &str,
        way: Way,
        which: impl Fn(&str) -> bool,
    ) -> Option<u64> {
        sum(
            self.of(capture, way).filter(|row| which(&row.images)),
            |row| row.bytes,
        )
    }

    /// The hashes of all images; `None` as for [`Self::bytes`].
    pub(crate) fn hashes(&self, capture: &str, way: Way) -> Option<u64> {
        sum(self.of(capture, way), |row| row.hashes)
    }
}

/// `None` for no rows, and where one has no such figure.
fn sum<'a>(rows: impl Iterator<Item = &'a Row>, figure: fn(&Row) -> Option<u64>) -> Option<u64> {
    let mut sum = None;
    for row in rows {
        sum = Some(sum.unwrap_or(0) + figure(row)?);
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(capture: &str, way: Way, images: &str, bytes: Option<u64>) -> Row {
        Row {
            capture: capture.to_owned(),
            way,
            images: images.to_owned(),
            bytes,
            hashes: None,
            seconds: Some(1.5),
            checked: true,
            note: "a note".to_owned(),
        }
    }

    #[test]
    fn what_is_kept_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bench/reconcile.json");
        assert_eq!(Results::load(&path).unwrap(), Results::default());
        let mut results = Results {
            machine: "a machine".to_owned(),
            rows: vec![row("a", Way::QemuMultifdZstd, RAM_AND_DEVICE, Some(7))],
        };
        results.save(&path).unwrap();
        assert_eq!(Results::load(&path).unwrap(), results);
        results.replace("a", Way::QemuMultifdZstd, Vec::new());
        results.save(&path).unwrap();
        assert_eq!(Results::load(&path).unwrap(), results);
        fs::write(&path, "{}").unwrap();
        let refused = Results::load(&path).unwrap_err().to_string();
        assert!(refused.contains("move it away"), "{refused}");
    }

    #[test]
    fn a_capture_measured_again_gives_way() {
        let mut results = Results::default();
        results.replace("a", Way::Rsync, vec![row("a", Way::Rsync, "ram", Some(1))]);
        results.replace("b", Way::Rsync, vec![row("b", Way::Rsync, "ram", Some(2))]);
        results.replace("a", Way::Rsync, vec![row("a", Way::Rsync, "ram", Some(3))]);
        assert_eq!(results.bytes("a", Way::Rsync, |_| true), Some(3));
        assert_eq!(results.bytes("b", Way::Rsync, |_| true), Some(2));
        assert_eq!(results.captures(), ["b", "a"]);
    }

    #[test]
    fn a_sum_lacks_nothing() {
        let mut results = Results::default();
        let rows = |disk| {
            let way = Way::Twin;
            vec![row("a", way, "ram", Some(5)), row("a", way, "disk", disk)]
        };
        results.replace("a", Way::Twin, rows(None));
        assert_eq!(results.bytes("a", Way::Twin, |_| true), None);
        assert_eq!(results.hashes("a", Way::Twin), None);
        assert_eq!(
            results.bytes("a", Way::Twin, |image| image == "ram"),
            Some(5)
        );
        assert_eq!(results.bytes("a", Way::Base, |_| true), None);
        results.replace("a", Way::Twin, rows(Some(6)));
        assert_eq!(results.bytes("a", Way::Twin, |_| true), Some(11));
    }
}
