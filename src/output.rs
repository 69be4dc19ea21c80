//! What a person or a program sees: progress bars on a terminal, lines elsewhere, JSON if asked.

use std::io::{IsTerminal, Write};
use std::sync::Mutex;
use std::time::Duration;

use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use serde::Serialize;
use site::{Phase, Progress};

/// Where the commands print to.
#[derive(Debug)]
pub(crate) struct Output {
    json: bool,
    quiet: bool,
}

impl Output {
    pub(crate) fn new(json: bool, quiet: bool) -> Self {
        Self { json, quiet }
    }

    /// The result of a command: JSON if asked for, else what `text` makes of it.
    pub(crate) fn result<T: Serialize>(
        &self,
        value: &T,
        text: impl FnOnce(&T) -> String,
    ) -> anyhow::Result<()> {
        let line = if self.json {
            serde_json::to_string(value)?
        } else {
            text(value)
        };
        let mut out = std::io::stdout().lock();
        writeln!(out, "{}", line.trim_end())?;
        Ok(out.flush()?)
    }

    /// A remark for a person; programs do not get it.
    pub(crate) fn say(&self, text: &str) {
        if !self.json && !self.quiet {
            eprintln!("{text}");
        }
    }

    /// An error with its causes.
    pub(crate) fn error(&self, error: &anyhow::Error) {
        if self.json {
            let chain: Vec<String> = error.chain().map(ToString::to_string).collect();
            println!("{}", serde_json::json!({ "error": chain }));
        }
        eprint!("error: {error}");
        let mut before = error.to_string();
        for cause in error.chain().skip(1).map(ToString::to_string) {
            if !before.ends_with(&cause) {
                eprint!("\n  because {cause}");
            }
            before = cause;
        }
        eprintln!();
    }

    /// How something gets on that has no end of its own: a line of JSON for a program; a person
    /// hears of it through `progress`, where `text` has something to say.
    pub(crate) fn standing<T: Serialize>(
        &self,
        value: &T,
        progress: &dyn Progress,
        text: impl FnOnce(&T) -> Option<String>,
    ) {
        if self.quiet {
            return;
        }
        if !self.json {
            if let Some(text) = text(value) {
                progress.note(&text);
            }
        } else if let Ok(line) = serde_json::to_string(value) {
            println!("{line}");
        }
    }

    /// Progress of a long command, in the form that was asked for.
    pub(crate) fn progress(&self) -> Box<dyn Progress> {
        if self.quiet {
            Box::new(site::Silent)
        } else if self.json {
            Box::new(JsonLines)
        } else if std::io::stderr().is_terminal() {
            Box::new(Bar::new())
        } else {
            Box::new(PlainLines)
        }
    }
}

/// One JSON object a line, on standard output, before the result.
struct JsonLines;

impl Progress for JsonLines {
    fn phase(&self, phase: Phase) {
        println!("{}", serde_json::json!({ "phase": phase }));
    }

    fn advance(&self, phase: Phase, done: u64, total: Option<u64>) {
        println!(
            "{}",
            serde_json::json!({ "phase": phase, "done": done, "total": total })
        );
    }

    fn note(&self, text: &str) {
        println!("{}", serde_json::json!({ "note": text }));
    }
}

/// One line a phase, for logs.
struct PlainLines;

impl Progress for PlainLines {
    fn phase(&self, phase: Phase) {
        eprintln!("{phase} ...");
    }

    fn advance(&self, _: Phase, _: u64, _: Option<u64>) {}

    fn note(&self, text: &str) {
        eprintln!("{text}");
    }
}

/// A bar with bytes, rate and time left, on a terminal.
struct Bar {
    bar: ProgressBar,
    phase: Mutex<Option<Phase>>,
}

impl Bar {
    fn new() -> Self {
        let bar = ProgressBar::new_spinner();
        bar.enable_steady_tick(Duration::from_millis(120));
        Self {
            bar,
            phase: Mutex::new(None),
        }
    }

    fn style(phase: Phase, known: bool) -> ProgressStyle {
        let template = match (phase, known) {
            (Phase::Replay, true) => "{spinner} {msg:8} {wide_bar} {percent}% {eta} left",
            (_, true) => {
                "{spinner} {msg:8} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta} left"
            }
            (_, false) => "{spinner} {msg:8} {elapsed}",
        };
        // The templates are fixed and the tests build each: a wrong one would show there.
        ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_spinner())
    }
}

impl Progress for Bar {
    fn phase(&self, phase: Phase) {
        if let Ok(mut current) = self.phase.lock()
            && let Some(done) = current.replace(phase)
        {
            let amount = match self.bar.position() {
                0 => String::new(),
                _ if done == Phase::Replay => String::new(),
                bytes => format!("  {}", HumanBytes(bytes)),
            };
            self.bar
                .println(format!("  {done:8} {:.1?}{amount}", self.bar.elapsed()));
        }
        self.bar.reset();
        self.bar.set_style(Self::style(phase, false));
        self.bar.set_message(phase.name());
    }

    fn advance(&self, phase: Phase, done: u64, total: Option<u64>) {
        if let Some(total) = total
            && self.bar.length() != Some(total)
        {
            self.bar.set_style(Self::style(phase, true));
            self.bar.set_length(total);
        }
        self.bar.set_position(done);
    }

    fn note(&self, text: &str) {
        self.bar.println(text);
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// The libraries' own log, for `-v`; `REPLAY_MIGRATE_LOG` takes filter directives.
pub(crate) fn log_to_stderr(verbose: u8) {
    use tracing_subscriber::EnvFilter;
    let default = match verbose {
        0 => "warn",
        1 => "info",
        _ => "debug",
    };
    let filter =
        EnvFilter::try_from_env("REPLAY_MIGRATE_LOG").unwrap_or_else(|_| EnvFilter::new(default));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();
}

/// Bytes for a person: `6.9 MiB`.
pub(crate) fn bytes(amount: u64) -> String {
    HumanBytes(amount).to_string()
}

/// Columns, padded to their widest cell; the first is left-aligned.
pub(crate) fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        rows.iter()
            .filter_map(|row| row.get(column))
            .map(|cell| cell.chars().count())
            .max()
            .unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (column, cell) in row.iter().enumerate() {
            let width = widths[column];
            if column == 0 {
                line.push_str(&format!("{cell:width$}"));
            } else {
                line.push_str(&format!("  {cell:>width$}"));
            }
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bar_has_a_valid_template() {
        for phase in Phase::ALL {
            for known in [true, false] {
                let style = Bar::style(phase, known);
                let bar = ProgressBar::hidden();
                bar.set_style(style);
                bar.set_message(phase.name());
            }
        }
    }

    #[test]
    fn tables_line_up() {
        let rows = [["a", "10"], ["long", "7"]].map(|row| row.map(str::to_owned).to_vec());
        assert_eq!(table(&rows), "a     10\nlong   7\n");
    }
}
