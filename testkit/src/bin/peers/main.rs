//! `make bench-reconcile`: our strategies and their peers on the same captured states.
//!
//! A site that holds `base` is to come to `source`. Each way of doing so is run for real, what it
//! takes is counted, and what arrived is compared with the source byte for byte. Peers that are
//! tools of the system are run if they are installed, and reported as missing if they are not.
//!
//! Rows are kept in a file after each way, and are put as tables into a section of a document.

mod capture;
mod dedup;
mod ours;
mod qemu;
mod report;
mod rows;
mod tools;

use std::future::Future;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use clap::{Parser, ValueEnum as _};
use tempfile::TempDir;
use testkit::ablation::table::replace_section;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use capture::Capture;
use rows::{Results, Row, Way};
use tools::NotInstalled;

/// Where a section of the document begins and ends.
const MARKS: (&str, &str) = (
    "<!-- bench-reconcile -->",
    "<!-- end of bench-reconcile -->",
);

/// Measures our strategies and their peers on captures.
#[derive(Parser)]
#[command(name = "peers")]
struct Options {
    /// Folders that `make capture` made; each is known by its name
    #[arg(value_name = "CAPTURE", required_unless_present = "report_only")]
    captures: Vec<PathBuf>,
    /// Only these ways
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Way>,
    /// Rows are kept here; those of other captures that are there stay
    #[arg(
        long,
        value_name = "FILE",
        default_value = "target/bench/reconcile.json"
    )]
    out: PathBuf,
    /// Temporary files, some GiB, are made in a folder here and removed again [default: beside
    /// the rows]
    #[arg(long, value_name = "DIR")]
    scratch: Option<PathBuf>,
    /// Writes the tables into this document
    #[arg(long, value_name = "FILE", default_value = "docs/benchmarks.md")]
    document: PathBuf,
    /// Measures nothing: writes the tables of the rows that are there
    #[arg(long, conflicts_with = "captures")]
    report_only: bool,
}

/// Ctrl-C, or being asked to end: what is under way cleans up after itself first.
#[derive(Clone)]
pub(crate) struct Interrupt(watch::Receiver<bool>);

/// Somebody wants this to end.
#[derive(Debug, thiserror::Error)]
#[error("interrupted")]
struct Interrupted;

impl Interrupt {
    fn listen() -> anyhow::Result<Self> {
        let mut terminate = signal(SignalKind::terminate()).context("cannot wait for a signal")?;
        let (sender, receiver) = watch::channel(false);
        tokio::spawn(async move {
            tokio::select! {
                _ = tokio::signal::ctrl_c() => {}
                _ = terminate.recv() => {}
            }
            sender.send_replace(true);
            sender.closed().await;
        });
        Ok(Self(receiver))
    }

    #[cfg(test)]
    pub(crate) fn never() -> Self {
        Self(watch::channel(false).1)
    }

    /// Waits for some work, or drops it where it stands.
    pub(crate) async fn guard<T>(&self, work: impl Future<Output = T>) -> anyhow::Result<T> {
        let mut told = self.0.clone();
        let interrupted = async {
            if told.wait_for(|told| *told).await.is_err() {
                // Nobody is left to tell.
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            biased;
            () = interrupted => Err(Interrupted.into()),
            done = work => Ok(done),
        }
    }
}

fn main() -> ExitCode {
    let options = Options::parse();
    let outcome = || -> anyhow::Result<bool> {
        let runtime = tokio::runtime::Runtime::new().context("cannot start")?;
        let outcome = runtime.block_on(async { run(&options, &Interrupt::listen()?).await });
        // Interrupted, a compression may go on for minutes.
        runtime.shutdown_timeout(Duration::ZERO);
        outcome
    };
    match outcome() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whether all went well that could be tried.
async fn run(options: &Options, interrupt: &Interrupt) -> anyhow::Result<bool> {
    let mut results = Results::load(&options.out)?;
    let mut well = true;
    if !options.report_only {
        let captures: Vec<Capture> = options
            .captures
            .iter()
            .map(|dir| Capture::open(dir))
            .collect::<Result<_, _>>()?;
        results.machine = machine();
        let scratch = scratch(options)?;
        for capture in &captures {
            for way in Way::value_variants() {
                if !(options.only.is_empty() || options.only.contains(way)) {
                    continue;
                }
                let outcome = measure(capture, *way, scratch.path(), interrupt).await;
                let rows = match outcome {
                    Ok(rows) => rows,
                    Err(error) if error.is::<Interrupted>() => return Err(error),
                    Err(error) => {
                        well &= error.is::<NotInstalled>();
                        vec![missing(capture, *way, &error)]
                    }
                };
                for row in &rows {
                    println!("{}", report::line(row));
                }
                results.replace(&capture.name, *way, rows);
                results.save(&options.out)?;
            }
        }
        let path = scratch.path().to_owned();
        scratch
            .close()
            .with_context(|| format!("cannot remove {}", path.display()))?;
    }
    let document = &options.document;
    let text = std::fs::read_to_string(document)
        .with_context(|| format!("cannot read {}", document.display()))?;
    let text = replace_section(&text, &report::markdown(&results), MARKS.0, MARKS.1)?;
    std::fs::write(document, text)
        .with_context(|| format!("cannot write {}", document.display()))?;
    println!("{}", document.display());
    Ok(well)
}

async fn measure(
    capture: &Capture,
    way: Way,
    scratch: &Path,
    interrupt: &Interrupt,
) -> anyhow::Result<Vec<Row>> {
    let compute = async |work: fn(&Capture) -> anyhow::Result<Vec<Row>>| {
        let capture = capture.clone();
        let working = tokio::task::spawn_blocking(move || work(&capture));
        interrupt.guard(working).await??
    };
    match way {
        Way::Base | Way::Replay | Way::Twin => ours::measure(capture, way, interrupt).await,
        Way::Qemu | Way::QemuXbzrle | Way::QemuMultifdZstd => {
            qemu::measure(capture, way, scratch, interrupt).await
        }
        Way::Rsync => tools::rsync(capture, false, scratch, interrupt).await,
        Way::RsyncPages => tools::rsync(capture, true, scratch, interrupt).await,
        Way::ZstdPatch => tools::zstd_patch(capture, scratch, interrupt).await,
        Way::Xdelta3 => tools::xdelta3(capture, scratch, interrupt).await,
        Way::DedupXz => compute(dedup::dedup_xz).await,
        Way::ChangedZstd => compute(dedup::changed_zstd).await,
    }
}

/// Says why there is no figure.
fn missing(capture: &Capture, way: Way, error: &anyhow::Error) -> Row {
    let note = if error.is::<NotInstalled>() {
        error.to_string()
    } else {
        format!("failed: {error:#}")
    };
    Row {
        capture: capture.name.clone(),
        way,
        images: "none".to_owned(),
        bytes: None,
        hashes: None,
        seconds: None,
        checked: false,
        note,
    }
}

fn scratch(options: &Options) -> anyhow::Result<TempDir> {
    let beside = options
        .out
        .parent()
        .filter(|dir| !dir.as_os_str().is_empty());
    let dir = options.scratch.as_deref().or(beside);
    let dir = dir.unwrap_or(Path::new("."));
    let cannot = || format!("cannot make a folder in {}", dir.display());
    std::fs::create_dir_all(dir).with_context(cannot)?;
    // Tools are given paths that must hold wherever they run.
    let dir = dir.canonicalize().with_context(cannot)?;
    let mut builder = tempfile::Builder::new();
    builder
        .prefix("peers.")
        .tempdir_in(&dir)
        .with_context(cannot)
}

/// What the figures were taken on.
fn machine() -> String {
    let cpus = std::thread::available_parallelism().map_or(0, usize::from);
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let model = model.map_or("unknown processor", |(_, model)| model);
    let qemu = vm_host::programs::version(&vm_host::programs::qemu());
    let qemu = qemu.map_or_else(
        |_| "no QEMU".to_owned(),
        |version| format!("QEMU {version}"),
    );
    format!("{cpus} cores, {model}; {qemu}")
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Options::command().debug_assert();
        assert!(Options::try_parse_from(["peers"]).is_err());
        assert!(Options::try_parse_from(["peers", "--report-only"]).is_ok());
        let only = ["peers", "a", "b", "--only", "rsync,qemu-multifd-zstd"];
        let options = Options::try_parse_from(only).unwrap();
        assert_eq!(options.only, [Way::Rsync, Way::QemuMultifdZstd]);
    }

    #[tokio::test]
    async fn work_is_dropped_when_interrupted() {
        let (sender, receiver) = watch::channel(false);
        let interrupt = Interrupt(receiver);
        assert_eq!(interrupt.guard(async { 7 }).await.unwrap(), 7);
        sender.send_replace(true);
        let error = interrupt
            .guard(std::future::pending::<()>())
            .await
            .unwrap_err();
        assert!(error.is::<Interrupted>());
        assert_eq!(Interrupt::never().guard(async { 8 }).await.unwrap(), 8);
    }
}
