//! `make faults`: real migrations between two sites, each struck by one fault.
//!
//! A case is a phase of the migration, a side, and what goes wrong there. After each, whatever
//! the command said: exactly one site can run the VM, the other refuses; all images that are
//! there are states that existed, byte by byte; nothing is left behind; and the same command
//! moves the VM, if it has not moved already. Whether the first attempt was given up or went on
//! by itself is noted, and not judged.
//!
//! The VM goes to and fro, so that a case begins where the one before ended. After one that broke
//! a promise there is a fresh VM. Rows are kept after each case, and those that hold are not
//! run again: a run that was interrupted goes on.
//!
//! Faults are real where that can be had: processes are killed, the VMs' files lie on a file
//! system that gets full, bytes change on the line. Only a disk that refuses an fsync is played,
//! by a preloaded library. What no fault of a process shows, power cuts,
//! is for `make power-cuts`.

mod case;
mod check;
mod rows;
mod strike;
mod volume;
mod world;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Parser;
use serde_json::Value;
use testkit::ablation::table::replace_section;
use testkit::link::parse_delay;
use testkit::mounts;
use testkit::site::{self, Site};

use case::{Case, Side, Way};
use rows::{Results, Row};
use world::{VM, World};

/// A recorder whose VM has moved ends by itself.
const RECORDER_LIMIT: Duration = Duration::from_secs(30);
/// Where the section of the document begins and ends.
const MARKS: (&str, &str) = ("<!-- faults -->", "<!-- end of faults -->");

/// Strikes migrations with faults, and looks at what is left.
#[derive(Parser)]
#[command(name = "faults")]
struct Options {
    /// Only cases whose name holds one of these: `commit`, `ram/target`, `fsync-error`
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Run anew what is in the file already
    #[arg(long)]
    anew: bool,
    /// Begin no case after so long: what is left is for the next run
    #[arg(long, value_name = "TIME", value_parser = parse_delay)]
    within: Option<Duration>,
    /// How long a stalled line stalls
    #[arg(long, value_name = "TIME", value_parser = parse_delay, default_value = "4s")]
    stall: Duration,
    /// Rows are read from here and kept here
    #[arg(long, value_name = "FILE", default_value = "target/faults.json")]
    out: PathBuf,
    /// The sites' state directories are made here, and removed again
    #[arg(long, value_name = "DIR", default_value = "target/faults")]
    sites: PathBuf,
    /// Writes the table into this document
    #[arg(long, value_name = "FILE", default_value = "docs/faults.md")]
    document: PathBuf,
    /// Runs nothing: lists the cases, and those that are none with the reason
    #[arg(long)]
    list: bool,
    /// Runs nothing: writes the table of the rows that are there
    #[arg(long)]
    report_only: bool,
}

fn main() -> ExitCode {
    let options = Options::parse();
    if options.list {
        list();
        return ExitCode::SUCCESS;
    }
    match begin(&options) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whether all cases that were run hold.
fn begin(options: &Options) -> anyhow::Result<bool> {
    if !options.report_only {
        mounts::enter_namespace()?;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        // Whatever ends it, dropping the future ends all processes.
        tokio::select! {
            outcome = run(options) => outcome,
            _ = tokio::signal::ctrl_c() => {
                println!("\ninterrupted; ending what runs ...");
                Err(anyhow::anyhow!("interrupted"))
            }
        }
    })
}

fn list() {
    for case in Case::all() {
        println!("{case}");
    }
    for &fault in case::Fault::ALL {
        for &phase in case::Phase::ALL {
            for &side in Side::ALL {
                let case = Case { phase, side, fault };
                if let Some(why) = case.left_out() {
                    println!("left out: {case}: {why}");
                }
            }
        }
    }
}

async fn run(options: &Options) -> anyhow::Result<bool> {
    let mut results = Results::load(&options.out)?.unwrap_or_default();
    let fine = if options.report_only {
        true
    } else {
        results.machine = machine();
        run_cases(options, &mut results).await?
    };
    let document = &options.document;
    let text = std::fs::read_to_string(document)
        .with_context(|| format!("cannot read {}", document.display()))?;
    let text = replace_section(&text, &results.markdown(), MARKS.0, MARKS.1)?;
    std::fs::write(document, text)
        .with_context(|| format!("cannot write {}", document.display()))?;
    println!("{}", results.summary());
    Ok(fine)
}

async fn run_cases(options: &Options, results: &mut Results) -> anyhow::Result<bool> {
    let begun = Instant::now();
    let program = site::program()?;
    std::fs::create_dir_all(&options.sites)
        .with_context(|| format!("cannot make {}", options.sites.display()))?;
    let out = options.sites.canonicalize()?;
    let shim = volume::build_shim(&out)?;
    let guest = Site::new(&program, "builder", out.join("builder"))
        .build_guest(&[])
        .await?;
    let cases: Vec<Case> = Case::all()
        .into_iter()
        .filter(|case| wanted(options, *case) && (options.anew || !results.has(*case)))
        .collect();
    println!("{} cases", cases.len());
    let mut fine = true;
    let mut world: Option<World> = None;
    for case in cases {
        if options
            .within
            .is_some_and(|within| begun.elapsed() > within)
        {
            println!("the time is over; the same command goes on");
            break;
        }
        if case.way() == Way::Replay && world.as_ref().is_some_and(|world| !world.desktop) {
            world = None;
        }
        let mut here = match world.take() {
            Some(world) => world,
            None => World::new(&program, &out, &shim, &guest).await?,
        };
        let (row, sound) = run_case(&mut here, case, options.stall).await;
        println!(
            "{case}: {}, exit {}, second attempt {}, {} KiB ({} again), {:.1} s{}",
            row.outcome,
            row.exit.map_or("none".into(), |code| code.to_string()),
            row.second_attempt,
            row.bytes >> 10,
            row.bytes_resent >> 10,
            row.seconds,
            if row.holds() { "" } else { " BROKEN" },
        );
        for violation in &row.violations {
            println!("  {violation}");
        }
        fine &= row.holds();
        if sound {
            world = Some(here);
        } else {
            tell_agents(&here);
        }
        results.put(row);
        results.store(&options.out)?;
    }
    drop(world);
    for name in ["a", "b"] {
        let dir = out.join(name);
        if dir.exists() {
            std::fs::remove_dir_all(&dir)
                .with_context(|| format!("cannot remove {}", dir.display()))?;
        }
    }
    Ok(fine)
}

fn wanted(options: &Options, case: Case) -> bool {
    let name = case.to_string();
    options.only.is_empty() || options.only.iter().any(|part| name.contains(part))
}

/// What the agents said, to find out what went wrong.
fn tell_agents(world: &World) {
    for &side in Side::ALL {
        let site = world.site(side);
        eprintln!(
            "-- agent of {}, the {side}:\n{}",
            site.name(),
            site.agent_log()
        );
    }
}

/// Runs a case; the row, and whether the world is fit for another.
async fn run_case(world: &mut World, case: Case, stall: Duration) -> (Row, bool) {
    let begun = Instant::now();
    let before = world.bytes();
    let mut row = Row {
        case,
        strategy: match case.way() {
            Way::Replay => "replay",
            Way::Base => "base",
        }
        .to_owned(),
        outcome: String::new(),
        exit: None,
        owner: String::new(),
        found: String::new(),
        identical: false,
        second_attempt: String::new(),
        bytes: 0,
        bytes_resent: 0,
        seconds: 0.0,
        violations: Vec::new(),
        said: String::new(),
    };
    let went = judge(world, case, stall, before, &mut row).await;
    let sound = match went {
        Ok(()) => row.holds(),
        Err(error) => {
            row.violations.push(format!("{error:#}"));
            false
        }
    };
    row.seconds = begun.elapsed().as_secs_f64();
    (row, sound)
}

async fn judge(
    world: &mut World,
    case: Case,
    stall: Duration,
    before: u64,
    row: &mut Row,
) -> anyhow::Result<()> {
    let struck = strike::strike(world, case, stall).await?;
    row.exit = struck.finished.code;
    row.said = last_words(&struck.finished.stderr);
    if case.goes_on_by_itself() {
        check::goes_on(world, &mut row.violations).await;
    }
    let owner = check::one_owner(world, &mut row.violations).await?;
    row.owner = owner.side.name().into();
    row.found = owner.found;
    let outcome = match owner.side {
        Side::Source => "stayed",
        Side::Target => "moved",
    };
    row.outcome = outcome.into();
    let moved = owner.side == Side::Target;
    row.identical = check::generations(world, moved, &mut row.violations).await?;
    let now = world.qemu(Side::Source).map(|qemu| qemu.pid);
    if owner.side == Side::Source && !case.loses_the_run() && now != struck.qemu {
        row.violations
            .push("what runs at the source is not what ran there before".into());
    }
    let at_first = world.bytes() - before;
    if owner.side == Side::Source {
        let again = strike::again(world, case).await?;
        row.second_attempt = if again.kept { "went on" } else { "moved" }.into();
        row.identical &= check::arrived(world, &again.report, &mut row.violations).await?;
        let target = world.site(Side::Target);
        target.json(&["vm", "resume", VM]).await?;
        row.bytes = world.bytes() - before;
        // What was kept is not sent again; what was not had been sent in vain.
        row.bytes_resent = resent(&again.report) + if again.kept { 0 } else { at_first };
    } else {
        row.second_attempt = "not needed".into();
        row.bytes = at_first;
        // One that was killed, or did not hear of its success, counted nothing.
        let report = struck.finished.last::<Value>().unwrap_or_default();
        row.bytes_resent = resent(&report);
        if let Some(counted) = counted(&report) {
            row.bytes_resent = row.bytes_resent.max(at_first.saturating_sub(counted));
        }
    }
    if let Some(recorder) = struck.recorder {
        // One whose QEMU was killed, or whose VM has moved, has ended.
        let _ = recorder.process.finish(RECORDER_LIMIT).await;
    }
    world.moved();
    check::clean(world, &mut row.violations).await?;
    world.desktop &= !case.loses_the_run();
    world.prune().await
}

/// What a migration counted on its socket, if it did.
fn counted(report: &Value) -> Option<u64> {
    let part = |name: &str| report["bytes"][name].as_u64();
    Some(part("sent")? + part("received")?)
}

/// What a migration says that it sent again as a line was cut.
fn resent(report: &Value) -> u64 {
    report["bytes"]["resent"].as_u64().unwrap_or_default()
}

/// The end of what a command wrote to standard error.
fn last_words(stderr: &str) -> String {
    const LINES: usize = 6;
    let lines: Vec<_> = stderr.lines().collect();
    lines[lines.len().saturating_sub(LINES)..].join("\n")
}

/// What this was run on.
fn machine() -> String {
    let cpus = std::thread::available_parallelism().map_or(0, usize::from);
    let model = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = model
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let model = model.map_or("unknown processor", |(_, model)| model);
    format!("{cpus} cores, {model}")
}
