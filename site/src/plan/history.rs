//! What earlier moves of a VM took, in `history.json` of its folder at the site it left.
//!
//! What a replay leaves over depends on the session more than on anything that can be looked at
//! before. Over a suite of sessions it was about half of what `base` sends, and hardly more than
//! a million and a half of bytes however much that was: the heap of one program and the kernel's
//! own account, see `docs/sessions.md`. That is where a prediction begins. A VM that has been
//! replayed corrects it by how far off it was then.

use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::files;
use crate::report::{MigrationReport, Strategy};
use crate::store::VmDir;

/// Of what `base` sends, what a replay of a light session leaves over.
const SHARE: f64 = 0.5;
/// What a replay leaves over of the programs' and the kernel's own memory, in bytes.
const OWN: f64 = 1_500_000.0;
/// What it leaves over beside that where a session makes much data.
const SHARE_OF_MUCH: f64 = 0.02;
/// A replay that fails costs so much over `base` at most.
const FAILED: f64 = 1.02;
/// Older moves say little of the next one.
const MOVES: usize = 8;

/// What one move took.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Outcome {
    /// How the VM moved.
    pub(super) strategy: Strategy,
    /// Bytes that were sent while it stood still.
    pub(super) sent: u64,
    /// Bytes that `base` was predicted to send in place of a replay.
    pub(super) base: Option<u64>,
    /// Seconds that it stood still beyond those that sending took on the line.
    pub(super) besides: f64,
    /// How many times the bytes, and the seconds of standing still, that were predicted; none where
    /// the strategy was said by a person.
    #[serde(default)]
    pub(super) off: Option<[f64; 2]>,
}

/// How far off predictions were.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Off {
    /// Of so many moves.
    pub moves: usize,
    /// How many times the bytes that were predicted, in the median.
    pub bytes: f64,
    /// How many times the seconds of standing still.
    pub seconds: f64,
}

impl Outcome {
    /// Of a move over a line of `rate` bits per second.
    pub(super) fn of(report: &MigrationReport, base: Option<u64>, rate: f64) -> Self {
        let bytes = &report.bytes;
        let sent = match &report.live {
            Some(live) => live.last_bytes,
            None => bytes.hashes + bytes.ram + bytes.disk + bytes.device,
        };
        let downtime = report.seconds.get("downtime").copied().unwrap_or_default();
        Self {
            strategy: report.strategy,
            sent,
            base,
            besides: (downtime - sent as f64 * 8.0 / rate.max(1.0)).max(0.0),
            off: report.predicted.map(|predicted| {
                // The device state is predicted by nobody.
                let told = bytes.log + bytes.hashes + bytes.ram + bytes.disk;
                [
                    told as f64 / (predicted.bytes as f64).max(1.0),
                    downtime / predicted.seconds_down.max(0.001),
                ]
            }),
        }
    }

    /// How many times what was expected of it a replay left over.
    fn factor(&self) -> Option<f64> {
        let base = self.base.filter(|_| self.strategy == Strategy::Replay)?;
        let expected = usual(base as f64);
        (expected > 0.0).then(|| self.sent as f64 / expected)
    }
}

/// The last moves of a VM from this site, oldest first.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct History {
    moves: Vec<Outcome>,
}

impl History {
    pub(super) fn load(vm: &VmDir) -> Result<Self> {
        Ok(files::read_json(&path(vm))?.unwrap_or_default())
    }

    pub(super) fn store(&self, vm: &VmDir) -> Result<()> {
        files::write_json(&path(vm), self)
    }

    pub(super) fn note(&mut self, outcome: Outcome) {
        self.moves.push(outcome);
        let old = self.moves.len().saturating_sub(MOVES);
        self.moves.drain(..old);
    }

    /// The replays that are known of.
    pub(super) fn replays(&self) -> usize {
        self.moves.iter().filter_map(Outcome::factor).count()
    }

    /// Bytes that a replay is expected to leave over, where `base` would send so many.
    pub(super) fn left_over(&self, base: f64) -> f64 {
        let factors = self.moves.iter().filter_map(Outcome::factor).collect();
        (usual(base) * median(factors).unwrap_or(1.0)).min(base * FAILED)
    }

    /// How far off the predictions were that there were.
    pub(super) fn off(&self) -> Option<Off> {
        let all: Vec<_> = self
            .moves
            .iter()
            .filter_map(|outcome| outcome.off)
            .collect();
        Some(Off {
            moves: all.len(),
            bytes: median(all.iter().map(|off| off[0]).collect())?,
            seconds: median(all.iter().map(|off| off[1]).collect())?,
        })
    }

    /// Seconds that the VM stands still beyond those that sending takes, if that is known.
    pub(super) fn besides(&self) -> Option<f64> {
        median(self.moves.iter().map(|outcome| outcome.besides).collect())
    }
}

/// What a replay leaves over in most sessions, where `base` would send so many bytes.
fn usual(base: f64) -> f64 {
    (SHARE * base).min(OWN + SHARE_OF_MUCH * base)
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    let upper = values.get(middle).copied()?;
    Some(if values.len() % 2 == 1 {
        upper
    } else {
        f64::midpoint(values.get(middle - 1).copied()?, upper)
    })
}

fn path(vm: &VmDir) -> std::path::PathBuf {
    vm.dir().join("history.json")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Store;

    fn replay(sent: u64, base: u64) -> Outcome {
        Outcome {
            strategy: Strategy::Replay,
            sent,
            base: Some(base),
            besides: 4.0,
            off: None,
        }
    }

    #[test]
    fn without_replays_the_suites_figures_are_met_by_and_large() {
        // `base` and `replay` of docs/sessions.md.
        let suite = [
            (30_949_263.0, 1_495_668.0),
            (3_614_978.0, 1_491_665.0),
            (1_329_967.0, 560_144.0),
            (3_997_897.0, 1_844_322.0),
            (759_150.0, 405_147.0),
            (1_347_621.0, 842_251.0),
            (2_885_422.0, 2_289_328.0),
        ];
        for (base, sent) in suite {
            let expected = History::default().left_over(base);
            let off = sent / expected;
            assert!((0.6..1.7).contains(&off), "{base}: {expected}, not {sent}");
        }
    }

    #[test]
    fn a_vms_own_replays_correct_the_prediction() {
        let mut history = History::default();
        let before = history.left_over(4e6);
        history.note(replay(2 * before as u64, 4_000_000));
        assert!((history.left_over(4e6) / before - 2.0).abs() < 0.01);
        // One that failed is one of three.
        history.note(replay(40_000_000, 40_000_000));
        history.note(replay(2 * before as u64, 4_000_000));
        assert!((history.left_over(4e6) / before - 2.0).abs() < 0.01);
        assert_eq!(history.replays(), 3);
    }

    #[test]
    fn no_replay_is_expected_to_cost_more_than_one_that_fails() {
        let mut history = History::default();
        history.note(replay(50_000_000, 1_000_000));
        assert!(history.left_over(1e6) <= 1.02e6);
        assert!(History::default().left_over(0.0).abs() < f64::EPSILON);
    }

    #[test]
    fn other_moves_say_only_what_stands_still_besides_sending() {
        let mut history = History::default();
        assert_eq!(history.besides(), None);
        for besides in [2.0, 9.0, 4.0] {
            history.note(Outcome {
                strategy: Strategy::Base,
                sent: 1 << 20,
                base: None,
                besides,
                off: None,
            });
        }
        assert_eq!(history.besides(), Some(4.0));
        assert_eq!(history.replays(), 0);
        assert!((history.left_over(4e6) - usual(4e6)).abs() < 1.0);
    }

    #[test]
    fn how_far_off_predictions_were_is_known() {
        let mut history = History::default();
        history.note(replay(1, 1));
        assert_eq!(history.off(), None);
        for (bytes, seconds) in [(1.2, 0.5), (0.9, 1.5), (3.0, 1.0)] {
            history.note(Outcome {
                off: Some([bytes, seconds]),
                ..replay(1, 1)
            });
        }
        let off = Off {
            moves: 3,
            bytes: 1.2,
            seconds: 1.0,
        };
        assert_eq!(history.off(), Some(off));
    }

    #[test]
    fn the_last_moves_are_kept_and_come_back() {
        let dir = tempfile::tempdir().unwrap();
        let vm = Store::open(dir.path())
            .unwrap()
            .vm(&"desk".parse().unwrap());
        std::fs::create_dir_all(vm.dir()).unwrap();
        assert_eq!(History::load(&vm).unwrap(), History::default());
        let mut history = History::default();
        for sent in 0..20 {
            history.note(replay(sent, 1000));
        }
        assert_eq!(history.moves.len(), MOVES);
        assert_eq!(history.moves.last().unwrap().sent, 19);
        history.store(&vm).unwrap();
        assert_eq!(History::load(&vm).unwrap(), history);
        // What an earlier version kept says nothing here, and is no error.
        std::fs::write(path(&vm), r#"{"residual":0.1}"#).unwrap();
        assert_eq!(History::load(&vm).unwrap(), History::default());
    }
}
