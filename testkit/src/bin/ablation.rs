//! `make bench-replay`: how far replays of the suite's sessions diverge, and what that costs.
//!
//! For each workload and guest (chance taken out or not, with a network card or without) a
//! session is recorded anew and replayed several times, at its own pace and quickly; each replay
//! in turn stands for the target's, and the next one for the source's own. What can be told from
//! one recording is so told from one: the replays differ, and not what the user did. A replay
//! that failed is made up of what another workload's replay left. What a move takes where the target
//! follows is told by runs of the demo.
//!
//! Rows are kept after each recording, and what is there already is not measured again: a run
//! that was interrupted goes on.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use anyhow::Context;
use clap::{Parser, ValueEnum};
use serde_json::Value;
use testkit::ablation::moves::Move;
use testkit::ablation::{
    BASE, Diverged, Guest, ImageBytes, Mode, Network, Results, Row, plot, table,
};
use testkit::session::Session;
use testkit::site::{self, Site};
use testkit::suite::{self, Kept};
use testkit::user::User;

/// The workloads of the table; the demo's session is much as the reference's.
const WORKLOADS: [&str; 7] = [
    "writing",
    "spreadsheet",
    "drawing",
    "files",
    "compile",
    "reading",
    "reference",
];

/// Reconciling a capture once.
const BENCH_LIMIT: Duration = Duration::from_secs(1200);
/// Where a section of the document begins and ends.
const MARKS: (&str, &str) = ("<!-- bench-replay -->", "<!-- end of bench-replay -->");

/// Records sessions anew, replays them several times, and measures.
#[derive(Parser)]
#[command(name = "ablation")]
struct Options {
    /// Only these workloads
    #[arg(long, value_delimiter = ',', default_values = WORKLOADS)]
    workloads: Vec<String>,
    /// Only these guests
    #[arg(long, value_enum, value_delimiter = ',', default_values = ["friendly", "ordinary"])]
    guests: Vec<GuestArg>,
    /// Only with a network card, or without
    #[arg(long, value_enum, value_delimiter = ',', default_values = ["on", "off"])]
    networks: Vec<NetworkArg>,
    /// Only these users
    #[arg(long, value_enum, value_delimiter = ',', default_values = ["practised"])]
    users: Vec<User>,
    /// Replays of each recording and pace
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(2..=9))]
    repeats: u8,
    /// Runs of the demo, whose target follows while the user works
    #[arg(long, default_value_t = 3, value_name = "N")]
    moves: usize,
    /// Rows are read from here and kept here
    #[arg(long, value_name = "FILE", default_value = "target/bench/replay.json")]
    out: PathBuf,
    /// Captures are made here, some 15 GiB at a time, and removed again
    #[arg(long, value_name = "DIR", default_value = "target/bench/captures")]
    captures: PathBuf,
    /// Keep each capture here, with two of its replays: 7 GiB for each
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,
    /// Writes the table into this document, and the plot beside it as `replay.svg`
    #[arg(long, value_name = "FILE", default_value = "docs/benchmarks.md")]
    document: PathBuf,
    /// Measures nothing: writes table and plot of the rows that are there
    #[arg(long)]
    report_only: bool,
}

impl Options {
    /// What is asked for, in the order in which it is measured.
    fn settings(&self) -> Vec<Setting<'_>> {
        let mut settings = Vec::new();
        for user in &self.users {
            for network in &self.networks {
                for guest in &self.guests {
                    settings.extend(self.workloads.iter().map(|workload| Setting {
                        workload,
                        user: *user,
                        guest: (*guest).into(),
                        network: (*network).into(),
                    }));
                }
            }
        }
        settings
    }
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum GuestArg {
    /// Chance is taken out
    Friendly,
    /// As Debian makes it
    Ordinary,
    /// Chance is taken out, and its instructions are counted
    Counted,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum NetworkArg {
    /// With a card
    On,
    /// Without
    Off,
}

impl From<GuestArg> for Guest {
    fn from(guest: GuestArg) -> Self {
        match guest {
            GuestArg::Friendly => Self::Friendly,
            GuestArg::Ordinary => Self::Ordinary,
            GuestArg::Counted => Self::Counted,
        }
    }
}

impl From<NetworkArg> for Network {
    fn from(network: NetworkArg) -> Self {
        match network {
            NetworkArg::On => Self::On,
            NetworkArg::Off => Self::Off,
        }
    }
}

/// One recording.
struct Setting<'a> {
    workload: &'a str,
    user: User,
    guest: Guest,
    network: Network,
}

#[tokio::main]
async fn main() -> ExitCode {
    let options = Options::parse();
    let outcome = tokio::select! {
        outcome = run(&options) => outcome,
        _ = tokio::signal::ctrl_c() => Err(anyhow::anyhow!("interrupted")),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(options: &Options) -> anyhow::Result<()> {
    let mut results = Results::load(&options.out)?.unwrap_or_else(|| Results::new(machine()));
    if !options.report_only {
        measure(options, &mut results).await?;
    }
    report(options, &results)
}

async fn measure(options: &Options, results: &mut Results) -> anyhow::Result<()> {
    let program = site::program()?;
    make_dir(&options.captures)?;
    // What the last recording's first replay left, for the next one's failed replay.
    let mut last: Option<PathBuf> = None;
    for setting in options.settings() {
        if results.has(
            setting.workload,
            setting.user,
            setting.guest,
            setting.network,
            options.repeats,
        ) {
            println!("{}: measured already", setting.name());
            continue;
        }
        println!("{}", setting.name());
        let capture = options.captures.join(setting.name());
        remove_dir(&capture)?;
        // How much a failed replay costs does not depend on who was recorded.
        let other = last.as_deref().filter(|_| setting.user == User::Practised);
        let rows = setting
            .measure(&program, &capture, options.repeats, other)
            .await;
        let rows = match rows {
            Ok(rows) => rows,
            Err(error) => {
                remove_dir(&capture)?;
                return Err(error.context(setting.name()));
            }
        };
        for row in rows {
            results.push(row);
        }
        results.save(&options.out)?;
        if let Some(keep) = &options.keep {
            keep_capture(&capture, &keep.join(setting.name()))?;
        }
        last = Some(keep_one(&options.captures, &capture)?);
    }
    remove_dir(&options.captures)?;
    while results.moves.len() < options.moves {
        println!("the demo");
        results.moves.push(demo(&program, &options.captures).await?);
        results.save(&options.out)?;
    }
    Ok(())
}

/// Runs the demo once, by the program beside this one.
async fn demo(program: &Path, out: &Path) -> anyhow::Result<Move> {
    let demo = std::env::current_exe()
        .context("cannot find this program's folder")?
        .with_file_name("demo");
    let mut running = tokio::process::Command::new(&demo)
        .env("CARGO_BIN_EXE_replay-migrate", program)
        .args(["--replay-friendly", "--out"])
        .arg(out)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .with_context(|| format!("cannot start {}: `cargo build` it first", demo.display()))?;
    let ended = running.wait().await.context("cannot wait for the demo")?;
    if !ended.success() {
        anyhow::bail!("the demo ended with {ended}");
    }
    let path = out.join("report.json");
    let failed = || format!("cannot read {}", path.display());
    let report = std::fs::read(&path).with_context(failed)?;
    let report: Value = serde_json::from_slice(&report).with_context(failed)?;
    let moved = Move::of(&report).with_context(|| format!("{} lacks a figure", path.display()))?;
    remove_dir(out)?;
    Ok(moved)
}

/// Copies a capture without the replays that only an ablation needs.
fn keep_capture(capture: &Path, to: &Path) -> anyhow::Result<()> {
    let failed = || format!("cannot keep {} in {}", capture.display(), to.display());
    remove_dir(to)?;
    make_dir(to)?;
    let kept = ["base", "source", "replayed", "twin", "capture.json"];
    // Sparse files stay so, and blocks are shared where the file system can.
    let copied = Command::new("cp")
        .args(["--recursive", "--sparse=always", "--reflink=auto"])
        .args(kept.map(|name| capture.join(name)))
        .arg(to)
        .status()
        .with_context(failed)?;
    if copied.success() {
        Ok(())
    } else {
        Err(anyhow::anyhow!("cp ended with {copied}")).with_context(failed)
    }
}

/// Keeps what one replay left of a capture, and nothing else.
fn keep_one(captures: &Path, capture: &Path) -> anyhow::Result<PathBuf> {
    let last = captures.join("another");
    remove_dir(&last)?;
    make_dir(&last)?;
    for state in ["replayed", "twin"] {
        std::fs::rename(capture.join(state), last.join(state))
            .with_context(|| format!("cannot keep {}", capture.join(state).display()))?;
    }
    remove_dir(capture)?;
    Ok(last)
}

impl Setting<'_> {
    fn name(&self) -> String {
        let guest = self.guest;
        let network = match self.network {
            Network::Off => "-without-network",
            Network::On => "",
        };
        let user = match self.user {
            User::Practised => "",
            User::Ordinary => "-ordinary-user",
        };
        format!("{}-{guest}{network}{user}", self.workload)
    }

    async fn measure(
        &self,
        program: &Path,
        capture: &Path,
        repeats: u8,
        other: Option<&Path>,
    ) -> anyhow::Result<Vec<Row>> {
        let session = Session::named(self.workload)?.by(self.user);
        let temporary = tempfile::tempdir().context("cannot make a folder for the site")?;
        let site = Site::new(program, "ablation", temporary.path().join("site"));
        let guest = suite::Guest {
            friendly: self.guest != Guest::Ordinary,
            counted: self.guest == Guest::Counted,
            network: self.network == Network::On,
        };
        let (count, often) = (repeats.to_string(), "--quick-replays".to_owned());
        let more = ["--replays".to_owned(), count.clone(), often, count];
        let kept = Kept {
            capture: Some((capture, &more)),
            ..Kept::default()
        };
        let recording = suite::record(&site, &session, guest, &kept).await;
        Site::clear_leftovers(program, site.dir());
        let recording = recording?;
        let log_bytes = number(&recording.recorded, "log_bytes")?;
        let empty = Vec::new();
        let replays = recording.captured["replays"].as_array().unwrap_or(&empty);
        let mut rows: Vec<Row> = Vec::new();
        // What `base` takes is the same for all replays of a recording.
        let mut base = None;
        for (mode, quick) in [(Mode::Real, false), (Mode::Quick, true)] {
            let states: Vec<&Value> = replays
                .iter()
                .filter(|replay| state_of(replay).starts_with("quick") == quick)
                .collect();
            for (index, replay) in states.iter().enumerate() {
                // The next one stands for the source's own replay.
                let twin = state_of(states[(index + 1) % states.len()]);
                let report = bench(&site, capture, state_of(replay), twin, base.is_none()).await?;
                let mut row = self.row(mode, index, replay, &report, log_bytes)?;
                base = base.or(row.bytes.get(BASE).copied());
                row.bytes.extend(base.map(|bytes| (BASE.to_owned(), bytes)));
                rows.push(row);
            }
        }
        if let Some(other) = other {
            let (replayed, twin) = (other.join("replayed"), other.join("twin"));
            let [replayed, twin] = [replayed, twin].map(|path| std::path::absolute(&path));
            let (replayed, twin) = (replayed?, twin?);
            let states = (replayed.to_string_lossy(), twin.to_string_lossy());
            let report = bench(&site, capture, &states.0, &states.1, false).await?;
            let mut row = self.row(Mode::Failed, 0, &Value::Null, &report, log_bytes)?;
            row.bytes.extend(base.map(|bytes| (BASE.to_owned(), bytes)));
            rows.push(row);
        }
        Ok(rows)
    }

    fn row(
        &self,
        mode: Mode,
        index: usize,
        replay: &Value,
        report: &Value,
        log_bytes: u64,
    ) -> anyhow::Result<Row> {
        // A failed one has no summary of its own.
        let count = |key: &str| replay[key].as_u64().unwrap_or_default();
        let seconds = |key: &str| replay[key].as_f64().unwrap_or_default();
        let mut bytes: BTreeMap<String, ImageBytes> = BTreeMap::new();
        for row in report["rows"].as_array().into_iter().flatten() {
            let strategy = row["strategy"].as_str().unwrap_or_default();
            let total = number(&row["bytes"], "total")?;
            let of = bytes.entry(strategy.to_owned()).or_default();
            match row["image"].as_str().unwrap_or_default() {
                "device" => of.device += total,
                "ram" => of.ram += total,
                _ => of.disk += total,
            }
        }
        let diverged: Diverged = serde_json::from_value(report["diverged"].clone())
            .context("`bench reconcile` does not say how far a replay diverged")?;
        Ok(Row {
            workload: self.workload.to_owned(),
            user: self.user,
            guest: self.guest,
            network: self.network,
            mode,
            repeat: index as u32 + 1,
            recorded_seconds: seconds("recorded_seconds"),
            seconds: seconds("seconds"),
            events: count("events"),
            matched: count("matched"),
            missed: count("missed"),
            log_bytes,
            diverged,
            bytes,
        })
    }
}

fn state_of(replay: &Value) -> &str {
    replay["state"].as_str().unwrap_or_default()
}

fn number(of: &Value, key: &str) -> anyhow::Result<u64> {
    of[key]
        .as_u64()
        .with_context(|| format!("{key:?} is missing in {of}"))
}

/// What reconciling a capture takes, with the codec of a line of 10 Mbit/s.
async fn bench(
    site: &Site,
    capture: &Path,
    replayed: &str,
    twin: &str,
    base: bool,
) -> anyhow::Result<Value> {
    let capture = capture.to_string_lossy();
    let mut words = vec!["bench", "reconcile", &capture, "--codec", "lzma:fast"];
    words.extend(["--replayed", replayed, "--twin", twin]);
    words.extend(["--strategy", "replay", "--strategy", "twin"]);
    words.extend(base.then_some(["--strategy", "base"]).into_iter().flatten());
    let measured = site.spawn(&words)?.finish(BENCH_LIMIT).await?.success()?;
    Ok(measured.last()?)
}

fn report(options: &Options, results: &Results) -> anyhow::Result<()> {
    let document = &options.document;
    let text = std::fs::read_to_string(document)
        .with_context(|| format!("cannot read {}", document.display()))?;
    let text = table::replace_section(&text, &table::markdown(results), MARKS.0, MARKS.1)?;
    let plot_path = document.with_file_name("replay.svg");
    for (path, content) in [(document, text), (&plot_path, plot::svg(results))] {
        std::fs::write(path, content)
            .with_context(|| format!("cannot write {}", path.display()))?;
        println!("{}", path.display());
    }
    Ok(())
}

/// What the figures were taken on.
fn machine() -> String {
    let cpus = std::thread::available_parallelism().map_or(0, usize::from);
    let model = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = model
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let model = model.map_or("unknown processor", |(_, model)| model);
    format!("{cpus} cores, {model}")
}

fn make_dir(dir: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))
}

fn remove_dir(dir: &Path) -> anyhow::Result<()> {
    if dir.exists() {
        std::fs::remove_dir_all(dir).with_context(|| format!("cannot remove {}", dir.display()))?;
    }
    Ok(())
}
