//! `make bench-live`: moving a VM that runs on, ours and QEMU's own, on the same guest and line.
//!
//! A guest is kept busy by a program of [`testkit::workload`], and moved over a thin line in each
//! way; what crosses the line is counted there. Then it goes back and forth between two sites.
//!
//! Rows are kept in a file after each way, and are put as tables into a section of a document.

mod images;
mod ours;
mod qemu;
mod rows;
mod standby;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use clap::{Parser, ValueEnum};
use testkit::ablation::table::replace_section;
use testkit::link::{LinkProfile, Rate, parse_delay};
use testkit::robot::Robot;
use testkit::site::{Site, guest_options, introduce, program};
use testkit::workload::Workload;

use rows::{Results, Way};

const VM: &str = "desk";

/// Where a section of the document begins and ends.
const MARKS: (&str, &str) = ("<!-- bench-live -->", "<!-- end of bench-live -->");

/// Measures live migration, ours and QEMU's.
#[derive(Parser)]
#[command(name = "live")]
struct Options {
    /// Only these ways
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Way>,
    /// Only these workloads; none for none
    #[arg(long, value_enum, value_delimiter = ',', num_args = 0..,
          default_values = ["video", "counter", "counters"])]
    workloads: Vec<Busy>,
    /// Trips back and forth; 0 for none
    #[arg(long, default_value_t = 10)]
    trips: usize,
    /// Keep a standby during the demo's session, and switch to it: once for each of these ways to ship epochs
    #[arg(long, value_delimiter = ',', default_values = ["state", "log", "less"], num_args = 0..,
          value_parser = ["state", "log", "less"])]
    standby: Vec<String>,
    /// Do not move the VM to a site that lacks the image of its disk, in any way
    #[arg(long)]
    no_images: bool,
    /// Kills of who keeps a standby; 0 for none
    #[arg(long, default_value_t = 100)]
    kills: u32,
    /// How the VM goes on all trips but the first
    #[arg(long, default_value = "base")]
    trip_strategy: String,
    /// The line's rate
    #[arg(long, default_value = "10mbit")]
    rate: Rate,
    /// The line's delay, each way
    #[arg(long, default_value = "10ms", value_parser = parse_delay)]
    delay: Duration,
    /// Ours stops the VM once it is expected to stand still no longer
    #[arg(long, default_value = "500ms")]
    downtime: String,
    /// Seconds after its first pass in which QEMU may end by itself
    #[arg(long, default_value_t = 60)]
    patience: u64,
    /// Rows are kept here
    #[arg(long, value_name = "FILE", default_value = "target/bench/live.json")]
    out: PathBuf,
    /// Writes the tables into this document
    #[arg(long, value_name = "FILE", default_value = "docs/benchmarks.md")]
    document: PathBuf,
    /// Measures nothing: writes the tables of the rows that are there
    #[arg(long)]
    report_only: bool,
}

/// What keeps the guest busy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Busy {
    /// Moving colours on the screen
    Video,
    /// A counter in each of many pages
    Counter,
    /// Many counters in each of many pages
    Counters,
}

impl Busy {
    fn workload(self) -> Workload {
        // 64 MiB, of which 31 MiB change in a second: thirty times what 10 Mbit/s carry.
        let (pages, per_second) = (16_384, 8000);
        match self {
            Self::Video => Workload::Video { per_second: 5 },
            Self::Counter => Workload::Writer {
                pages,
                per_second,
                words: 1,
            },
            Self::Counters => Workload::Writer {
                pages,
                per_second,
                words: 64,
            },
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Video => "A video-like region of the screen",
            Self::Counter => {
                "A program that counts in one word of each of 16,384 pages, 8,000 pages a second"
            }
            Self::Counters => {
                "A program that counts in 64 words of each of 16,384 pages, 8,000 pages a second"
            }
        }
    }
}

fn main() -> ExitCode {
    let options = Options::parse();
    let outcome = tokio::runtime::Runtime::new()
        .context("cannot start")
        .and_then(|runtime| runtime.block_on(run(&options)));
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(options: &Options) -> anyhow::Result<()> {
    let mut results = Results::load(&options.out)?;
    if !options.report_only {
        results.machine = machine();
        results.line = format!(
            "{} each way, {} ms of delay each way",
            options.rate,
            options.delay.as_millis()
        );
        let profile = LinkProfile::symmetric(options.rate, options.delay);
        let dir = tempfile::tempdir().context("cannot make a folder")?;
        for busy in Busy::value_variants() {
            if options.workloads.contains(busy) {
                measure(options, *busy, profile, dir.path(), &mut results).await?;
            }
        }
        if options.trips > 0 {
            let (mut a, mut b) = sites(&dir.path().join("trips")).await?;
            start(&a, false).await?;
            let strategy = &options.trip_strategy;
            results.trips =
                ours::back_and_forth(&mut a, &mut b, profile, strategy, options.trips + 1).await?;
            results.save(&options.out)?;
        }
        for by in &options.standby {
            let (mut a, mut b) = sites(&dir.path().join(format!("standby-{by}"))).await?;
            start(&a, true).await?;
            let row = standby::measure(&mut a, &mut b, profile, by).await?;
            println!("{row:?}");
            results.standbys.retain(|other| other.by != row.by);
            results.standbys.push(row);
            results.save(&options.out)?;
        }
        let ways: [&[&str]; 3] = [
            &["--strategy", "full"],
            &["--strategy", "full", "--post-copy"],
            &["--strategy", "live", "--post-copy"],
        ];
        for (number, how) in ways.iter().enumerate().filter(|_| !options.no_images) {
            let (a, mut b) = sites(&dir.path().join(format!("images-{number}"))).await?;
            start(&a, false).await?;
            let row = images::measure(&a, &mut b, profile, how).await?;
            println!("{row:?}");
            results.bare.retain(|other| other.how != row.how);
            results.bare.push(row);
            results.save(&options.out)?;
        }
        if options.kills > 0 {
            let folder = dir.path().join("kills");
            let (mut a, mut b) = sites(&folder).await?;
            let row = standby::kills(&mut a, &mut b, &folder, options.kills).await?;
            println!("{row:?}");
            results.kills = Some(row);
            results.save(&options.out)?;
        }
    }
    let document = &options.document;
    let text = std::fs::read_to_string(document)
        .with_context(|| format!("cannot read {}", document.display()))?;
    let text = replace_section(&text, &results.markdown(), MARKS.0, MARKS.1)?;
    std::fs::write(document, text)
        .with_context(|| format!("cannot write {}", document.display()))?;
    println!("{}", document.display());
    Ok(())
}

/// Two sites that know each other and have nothing.
async fn sites(dir: &Path) -> anyhow::Result<(Site, Site)> {
    let program = program()?;
    let site = |name: &str| Site::new(&program, name, dir.join(name));
    let (mut a, mut b) = (site("a"), site("b"));
    introduce(&mut a, &mut b).await?;
    Ok((a, b))
}

/// Makes and starts the VM, as Debian makes it or with chance taken out.
async fn start(site: &Site, replay_friendly: bool) -> anyhow::Result<()> {
    let guest = site.build_guest(guest_options(replay_friendly)).await?;
    let mut words = vec!["vm", "create", VM, "--disk", &guest];
    words.extend(guest_options(replay_friendly));
    site.json(&words).await?;
    site.json(&["vm", "start", VM]).await?;
    Ok(())
}

async fn measure(
    options: &Options,
    busy: Busy,
    profile: LinkProfile,
    dir: &Path,
    results: &mut Results,
) -> anyhow::Result<()> {
    let folder = dir.join(format!("{busy:?}"));
    let (mut a, mut b) = sites(&folder).await?;
    start(&a, false).await?;
    // The read-only image is at both sites.
    a.json(&["checkpoint", VM]).await?;
    a.json(&["seed", VM, "--to", b.name()]).await?;
    let mut robot = Robot::connect(&a.vnc(VM).await?).await?;
    busy.workload().start(&mut robot).await?;
    drop(robot);
    // Every way begins here, or soon after.
    a.json(&["checkpoint", VM]).await?;
    for way in Way::value_variants() {
        if !(options.only.is_empty() || options.only.contains(way)) {
            continue;
        }
        let row = match way {
            Way::Live | Way::LiveStale | Way::Full => {
                let downtime = &options.downtime;
                ours::measure(&mut a, &mut b, busy.name(), *way, profile, downtime).await?
            }
            _ => {
                let patience = Duration::from_secs(options.patience);
                let row = qemu::measure(&a, busy.name(), *way, profile, patience, &folder).await;
                a.json(&["vm", "stop", "--discard", VM]).await?;
                a.json(&["vm", "start", VM]).await?;
                row?
            }
        };
        println!("{row:?}");
        results.replace(row);
        results.save(&options.out)?;
    }
    Ok(())
}

/// What the figures were taken on.
fn machine() -> String {
    let cpus = std::thread::available_parallelism().map_or(0, usize::from);
    let qemu = vm_host::programs::version(&vm_host::programs::qemu());
    let qemu = qemu.map_or_else(
        |_| "no QEMU".to_owned(),
        |version| format!("QEMU {version}"),
    );
    format!("{cpus} processors, which all sites and guests share; {qemu}")
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Options::command().debug_assert();
        let options = Options::try_parse_from(["live", "--only", "live,qemu-xbzrle"]).unwrap();
        assert_eq!(options.only, [Way::Live, Way::QemuXbzrle]);
    }
}
