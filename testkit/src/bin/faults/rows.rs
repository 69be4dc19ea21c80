//! What came of each case, kept in a file as it comes, and shown as a table.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Context;
use serde::{Deserialize, Serialize};

use crate::case::{Case, Fault, Phase, Side};

/// What came of a case.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Row {
    #[serde(flatten)]
    pub(crate) case: Case,
    /// `replay` or `base`.
    pub(crate) strategy: String,
    /// `moved` or `stayed`: where the VM was when all processes were up again.
    pub(crate) outcome: String,
    /// Of the command that was struck; none where it was killed.
    pub(crate) exit: Option<i32>,
    /// Who holds the lease: `source` or `target` of this migration.
    pub(crate) owner: String,
    /// How the VM was found there before anybody touched it.
    pub(crate) found: String,
    /// Whether every image that was looked at is a state that existed.
    pub(crate) identical: bool,
    /// What the next `migrate` did: `moved` anew, `went on` with what the target had kept, or
    /// `not needed`.
    pub(crate) second_attempt: String,
    /// On the line, both ways, until the VM had moved.
    pub(crate) bytes: u64,
    /// Of them, what was sent again: what the move says of lines that were cut, and all of a first
    /// attempt of which nothing was kept.
    pub(crate) bytes_resent: u64,
    /// All of it, the checks too.
    pub(crate) seconds: f64,
    /// What must not be, in sentences.
    pub(crate) violations: Vec<String>,
    /// What the command said at last.
    pub(crate) said: String,
}

impl Row {
    /// Nothing was found that must not be.
    pub(crate) fn holds(&self) -> bool {
        self.violations.is_empty()
    }

    /// For a table: where the VM was, and the exit code.
    fn cell(&self) -> String {
        let exit = self.exit.map_or("killed".into(), |code| code.to_string());
        let mark = if self.holds() { "" } else { " **✗**" };
        format!("{}, {exit}{mark}", self.outcome)
    }
}

/// All rows, and what they were taken on.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Results {
    pub(crate) machine: String,
    /// By the case's name.
    pub(crate) rows: Vec<Row>,
}

impl Results {
    /// Reads them; nothing where there is no file.
    pub(crate) fn load(path: &Path) -> anyhow::Result<Option<Self>> {
        match std::fs::read(path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
            Ok(text) => serde_json::from_slice(&text)
                .map(Some)
                .with_context(|| format!("{} holds something else", path.display())),
        }
    }

    /// Writes them, whole or not at all.
    pub(crate) fn store(&self, path: &Path) -> anyhow::Result<()> {
        let partial = path.with_extension("partial");
        let text = serde_json::to_vec_pretty(self)?;
        std::fs::write(&partial, text)
            .and_then(|()| std::fs::rename(&partial, path))
            .with_context(|| format!("cannot write {}", path.display()))
    }

    /// Takes a row in, in place of an older one of the same case.
    pub(crate) fn put(&mut self, row: Row) {
        self.rows.retain(|old| old.case != row.case);
        self.rows.push(row);
    }

    /// Whether a case was run before and held.
    pub(crate) fn has(&self, case: Case) -> bool {
        self.rows.iter().any(|row| row.case == case && row.holds())
    }

    /// In a sentence.
    pub(crate) fn summary(&self) -> String {
        let (mut moved, mut second, mut broken) = (0, 0, 0);
        for row in &self.rows {
            broken += usize::from(!row.holds());
            match row.outcome.as_str() {
                "moved" => moved += 1,
                _ => second += usize::from(row.second_attempt != "not needed" && row.holds()),
            }
        }
        format!(
            "{} cases of {}: in {moved} the VM had moved, in {second} it stayed and moved at the \
             second attempt; {broken} broke a promise",
            self.rows.len(),
            Case::all().len(),
        )
    }

    /// As a section of a document.
    pub(crate) fn markdown(&self) -> String {
        let mut columns: Vec<(Fault, Side)> = Vec::new();
        for &fault in Fault::ALL {
            for &side in Side::ALL {
                if self.rows.iter().any(|row| at(row) == (fault, side)) {
                    columns.push((fault, side));
                }
            }
        }
        let rows: BTreeMap<_, _> = self.rows.iter().map(|row| (row.case, row)).collect();
        let mut text = format!("Measured on: {}\n\n{}.\n\n", self.machine, self.summary());
        let head = columns
            .iter()
            .map(|(fault, side)| format!("{fault}, {side}"));
        line(&mut text, "phase", head);
        line(&mut text, "---", columns.iter().map(|_| "---".to_owned()));
        for &phase in Phase::ALL {
            let cells = columns.iter().map(|&(fault, side)| {
                let row = rows.get(&Case { phase, side, fault });
                row.map_or_else(String::new, |row| row.cell())
            });
            line(&mut text, phase.name(), cells);
        }
        for row in self.rows.iter().filter(|row| !row.holds()) {
            text.push_str(&format!("\n- {}: {}", row.case, row.violations.join("; ")));
        }
        text
    }
}

fn at(row: &Row) -> (Fault, Side) {
    (row.case.fault, row.case.side)
}

fn line(text: &mut String, first: &str, rest: impl Iterator<Item = String>) {
    text.push_str(&format!("| {first} |"));
    for cell in rest {
        text.push_str(&format!(" {cell} |"));
    }
    text.push('\n');
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(phase: Phase, outcome: &str, violations: &[&str]) -> Row {
        Row {
            case: Case {
                phase,
                side: Side::Target,
                fault: Fault::Cut,
            },
            strategy: "base".into(),
            outcome: outcome.into(),
            exit: Some(1),
            owner: "source".into(),
            found: "running".into(),
            identical: true,
            second_attempt: "moved".into(),
            bytes: 10,
            bytes_resent: 5,
            seconds: 1.0,
            violations: violations.iter().map(ToString::to_string).collect(),
            said: String::new(),
        }
    }

    #[test]
    fn a_case_is_kept_once_and_comes_back_from_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("faults.json");
        assert!(Results::load(&path).unwrap().is_none());
        let mut results = Results::default();
        results.put(row(Phase::Ram, "stayed", &["two owners"]));
        results.put(row(Phase::Stop, "moved", &[]));
        assert!(!results.has(results.rows[0].case));
        results.put(row(Phase::Ram, "stayed", &[]));
        assert!(results.has(results.rows[1].case));
        results.store(&path).unwrap();
        let back = Results::load(&path).unwrap().unwrap();
        assert_eq!(back.rows.len(), 2);
        assert_eq!(back.rows[0].case.phase, Phase::Stop);
    }

    #[test]
    fn the_table_has_a_line_for_each_phase_and_tells_what_broke() {
        let mut results = Results::default();
        results.put(row(Phase::Ram, "stayed", &["two owners"]));
        let text = results.markdown();
        let table = text.lines().filter(|line| line.starts_with('|'));
        assert_eq!(table.count(), Phase::ALL.len() + 2);
        assert!(text.contains("| ram | stayed, 1 **✗** |"), "{text}");
        assert!(text.contains("- ram/target/cut: two owners"), "{text}");
    }
}
