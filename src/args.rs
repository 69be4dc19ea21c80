//! What the command line understands.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args as ClapArgs, Parser, Subcommand, ValueEnum};

/// Moves a person's running desktop between sites over a thin line.
///
/// Exit codes: 0 done, 1 failed, 2 usage, 3 refused before anything changed, 4 interrupted; the
/// same command starts again.
#[derive(Debug, Parser)]
#[command(name = "replay-migrate", version, propagate_version = true)]
pub(crate) struct Args {
    /// This site's state directory [default: replay-migrate/site under $XDG_DATA_HOME]
    #[arg(long, global = true, env = "REPLAY_MIGRATE_SITE", value_name = "DIR")]
    pub(crate) site: Option<PathBuf>,
    /// Print one JSON object, or JSON lines for progress
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// No progress
    #[arg(short, long, global = true)]
    pub(crate) quiet: bool,
    /// More about what happens; twice for everything
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub(crate) verbose: u8,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Say what this host can do, check by check
    Doctor,
    /// The demo desktop
    #[command(subcommand)]
    Guest(GuestCommand),
    /// Run this site's agent: other sites send VMs to it
    Serve {
        /// Where to listen; a port of 0 takes a free one
        #[arg(long, value_name = "ADDR", default_value = site::transport::DEFAULT_LISTEN)]
        listen: String,
        /// Delete logs of any VM that began longer ago than this, now and each hour, as `log
        /// prune` does: 12h, 30d, 8w [default: all are kept]
        #[arg(long, value_parser = duration, value_name = "TIME")]
        keep_logs: Option<Duration>,
    },
    /// This site's identity, and the sites it trusts
    #[command(subcommand)]
    Site(SiteCommand),
    /// The VMs of this site
    #[command(subcommand)]
    Vm(VmCommand),
    /// Make a new generation of a running VM
    Checkpoint {
        /// The VM
        name: String,
    },
    /// The generations of a VM: what they take, and what of it nobody needs
    #[command(subcommand)]
    Generations(GenerationsCommand),
    /// Checkpoint a VM, then record what is typed and pointed at through a VNC proxy
    Record {
        /// The VM
        name: String,
        /// Where VNC viewers connect: HOST:PORT or unix:PATH; a port of 0 takes a free one
        #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:5900")]
        listen: String,
        /// Take the input devices of this machine too (evdev, grabbed)
        #[arg(long, value_name = "DEVICE")]
        evdev: Vec<PathBuf>,
        /// Let the programs of a replay-friendly guest take turns of 100 ms: replays of light
        /// work come closer, and one that computes holds up the others
        #[arg(long)]
        long_turns: bool,
    },
    /// Ship the current generation to another site ahead of time
    Seed {
        /// The VM
        name: String,
        /// The site
        #[arg(long, value_name = "SITE")]
        to: String,
    },
    /// Have another site replay what is recorded while the user works, a few seconds behind them:
    /// `migrate` then has only the tail left to do
    Follow {
        /// The VM, which is being recorded
        name: String,
        /// The site
        #[arg(long, value_name = "SITE")]
        to: String,
        /// Do not replay at this site as well: it takes less here, and more bytes
        #[arg(long)]
        no_twin: bool,
    },
    /// Move a VM to another site
    Migrate(MigrateArgs),
    /// Replay a log on a fork of a generation, and throw the fork away
    Replay {
        /// The VM
        name: String,
        /// The log
        #[arg(long, value_name = "FILE")]
        log: PathBuf,
        /// How to replay it
        #[command(flatten)]
        options: ReplayArgs,
    },
    /// The interaction logs
    #[command(subcommand)]
    Log(LogCommand),
    /// Save the images of a recorded session: base, source and replayed states
    Capture(CaptureArgs),
    /// Measure on a capture
    #[command(subcommand)]
    Bench(BenchCommand),
}

#[derive(Debug, Subcommand)]
pub(crate) enum BenchCommand {
    /// Bytes, seconds and memory of every strategy; each result is compared byte for byte
    Reconcile {
        /// The capture's folder
        capture: PathBuf,
        /// Only this strategy; may be given more than once [default: all that have their states]
        #[arg(long, value_enum, value_name = "STRATEGY")]
        strategy: Vec<BenchStrategyArg>,
        /// With this codec: of the page streams zstd:1 to zstd:19, zstd:-1 and below for speed,
        /// lzma:fast, lzma:normal, lzma:strong; of single pages xbrle, xbzrle, word-xor,
        /// changed-bytes. May be given more than once [default: zstd:3, lzma:fast and those of
        /// single pages, unless there is a rate]
        #[arg(long, value_parser = benches::named, value_name = "CODEC")]
        codec: Vec<benches::Named>,
        /// Over a line of this rate (10mbit, 100mbit, 1gbit, 10gbit), with the codecs that follow
        /// it: the whole pipeline is timed, both ends at once; may be given more than once
        #[arg(long, value_parser = benches::rate_of, value_name = "RATE")]
        rate: Vec<u64>,
        /// How often each strategy is measured over a line; the median counts
        #[arg(long, value_name = "RUNS", default_value_t = 1, requires = "rate")]
        runs: usize,
        /// What the target's replay left: a folder of the capture, or of another one
        #[arg(long, value_name = "STATE", default_value = "replayed")]
        replayed: PathBuf,
        /// What the source's own replay left
        #[arg(long, value_name = "STATE", default_value = "twin")]
        twin: PathBuf,
    },
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum BenchStrategyArg {
    /// Against nothing
    Full,
    /// Against the stale copy
    Base,
    /// Against what a replay made of it
    Replay,
    /// The same, told by the source's own replay
    Twin,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct ReplayArgs {
    /// Think time runs this many times faster; with --quick, at most so many times
    #[arg(long, value_name = "X")]
    pub(crate) speed: Option<f64>,
    /// Think time ends as soon as the guest is ready for what comes next
    #[arg(long)]
    pub(crate) quick: bool,
    /// Keep pictures of what was missed in this folder; they show the user's screen
    #[arg(long, value_name = "DIR")]
    pub(crate) misses: Option<PathBuf>,
}

#[derive(clap::Args, Debug)]
pub(crate) struct CaptureArgs {
    /// The VM, which is being recorded
    pub name: String,
    /// The folder to make
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Think time runs this many times faster in the replays; with --quick, at most so many times
    #[arg(long, value_name = "X")]
    pub speed: Option<f64>,
    /// In the replays think time ends as soon as the guest is ready for what comes next
    #[arg(long)]
    pub quick: bool,
    /// Replay it so many times: `replayed`, `twin`, `replayed-3` and so on
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u8).range(..=99))]
    pub replays: u8,
    /// And so many times quickly: `quick-1` and so on
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u8).range(..=99))]
    pub quick_replays: u8,
}

#[derive(Debug, Subcommand)]
pub(crate) enum GuestCommand {
    /// Build the demo desktop from Debian packages, or take it from the cache
    Build {
        /// Put it there, too
        #[arg(long, value_name = "DIR")]
        out: Option<PathBuf>,
        /// Only the disk: do not boot it once and keep the checkpoint
        #[arg(long)]
        no_boot: bool,
        /// Keep the checkpoint of a guest as `vm create --replay-friendly` makes it
        #[arg(long)]
        replay_friendly: bool,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum SiteCommand {
    /// Print this site's key, for the other site's `site trust`
    Id {
        /// Make a new key first, for good: other sites do not know this one until they are told,
        /// with `site trust`, that the name they have for it has this key now
        #[arg(long)]
        rotate: bool,
    },
    /// Trust a site, or change what is known of it. A known name with another key is the same
    /// site with a new key
    Trust {
        /// What to call it here
        name: String,
        /// Where its agent listens
        addr: String,
        /// Its key, as its `site id` prints it
        key: String,
        /// What it may do, with commas between: `send` VMs here, `receive` VMs from here, and
        /// `follow` those in use (its own here with `send`, this site's there with `receive`); or
        /// `nothing` [default: all of it, and for a known site what it might before]
        #[arg(long, value_name = "WHAT")]
        may: Option<site::peers::Permissions>,
    },
    /// Trust a site no longer: its connections end at once, and no new one is accepted
    Untrust {
        /// What it is called here
        name: String,
    },
    /// The sites that are trusted
    List,
}

#[derive(Debug, Subcommand)]
pub(crate) enum VmCommand {
    /// Make a VM
    Create(CreateArgs),
    /// Start a VM: from its newest generation, or by booting it
    Start {
        /// The VM
        name: String,
        /// Restore it, but do not let it run yet
        #[arg(long)]
        paused: bool,
        /// Wait until its desktop is up, if it boots
        #[arg(long)]
        wait: bool,
        /// How QEMU runs the guest
        #[arg(long, value_enum, default_value_t = AccelArg::Auto)]
        accel: AccelArg,
    },
    /// Stop a VM: a checkpoint, then QEMU quits
    Stop {
        /// The VM
        name: String,
        /// No checkpoint: what the guest did since its last generation is lost
        #[arg(long)]
        discard: bool,
    },
    /// Pause the guest
    Pause {
        /// The VM
        name: String,
    },
    /// Let a paused guest run
    Resume {
        /// The VM
        name: String,
    },
    /// All VMs of this site
    List,
    /// What a VM is and does
    Status {
        /// The VM
        name: String,
    },
    /// Save what the guest's screen shows
    Screenshot {
        /// The VM
        name: String,
        /// PNG file
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
    },
    /// Go on with the stale copy here, because the site that has the VM is gone for good. What was
    /// done there since is lost; should it come back, its copy is stale for ever
    Takeover {
        /// The VM
        name: String,
        /// The fencing number under which it goes on: at least 1000 beyond the one known here,
        /// which `vm status` shows, so that the lost site can have none as high
        #[arg(long, value_name = "N")]
        fence: u64,
        /// Do it: without this, it is only said what it would mean
        #[arg(long)]
        yes: bool,
    },
    /// Remove a VM with its generations and logs
    Delete {
        /// The VM
        name: String,
        /// Do not ask
        #[arg(long)]
        yes: bool,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum GenerationsCommand {
    /// Size, age, who relies on each, and what `prune` would make of it
    List {
        /// The VM
        name: String,
    },
    /// Take those that nobody relies on, the logs that only they were good for, and what was
    /// left half-made. The newest stays, and what the VM runs on, what its newest log continues,
    /// and what trusted sites have in common with this one
    Prune {
        /// The VM
        name: String,
        /// Keep so many of the newest, too
        #[arg(long, value_name = "N", default_value_t = 1,
              value_parser = clap::value_parser!(u32).range(1..))]
        keep: u32,
        /// Take no more, the oldest first, than until they fit: 500M, 20G [default: all that may
        /// go]
        #[arg(long, value_name = "SIZE", value_parser = size)]
        max_bytes: Option<u64>,
        /// Say what would go, and stop
        #[arg(long)]
        dry_run: bool,
    },
}

#[derive(Debug, ClapArgs)]
pub(crate) struct CreateArgs {
    /// The VM
    pub(crate) name: String,
    /// A bootable disk image, or the folder of a guest from `guest build`
    #[arg(long, value_name = "IMG")]
    pub(crate) disk: PathBuf,
    /// Boot this Linux kernel
    #[arg(long, value_name = "FILE")]
    pub(crate) kernel: Option<PathBuf>,
    /// With this initial RAM disk
    #[arg(long, value_name = "FILE", requires = "kernel")]
    pub(crate) initrd: Option<PathBuf>,
    /// And this command line
    #[arg(long, value_name = "TEXT", requires = "kernel")]
    pub(crate) append: Option<String>,
    /// Guest memory in MiB
    #[arg(long, value_name = "MIB")]
    pub(crate) memory: Option<u32>,
    /// Virtual CPUs
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) cpus: u8,
    /// No network card
    #[arg(long)]
    pub(crate) no_network: bool,
    /// Take chance out of a Linux guest that boots a kernel: no address-space randomisation for
    /// its programs, kernel objects in order once it is recorded (defences less), freed memory
    /// zeroed
    #[arg(long)]
    pub(crate) replay_friendly: bool,
    /// The line on the guest's serial port that says that its desktop is up
    #[arg(long, value_name = "TEXT")]
    pub(crate) ready_marker: Option<String>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum TwinArg {
    /// At the same time as the target
    Beside,
    /// After the target, where both share processors
    After,
    /// Not at all
    Never,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum AccelArg {
    /// KVM where it works, else software emulation
    Auto,
    /// KVM
    Kvm,
    /// Software emulation
    Tcg,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct MigrateArgs {
    /// The VM
    pub(crate) name: String,
    /// The site to move it to
    #[arg(long, value_name = "SITE")]
    pub(crate) to: String,
    /// How: by predicted time, or as said
    #[arg(long, value_enum, default_value_t = StrategyArg::Auto)]
    pub(crate) strategy: StrategyArg,
    /// When this site replays as well, which saves bytes
    #[arg(long, value_enum, default_value_t = TwinArg::Beside)]
    pub(crate) twin: TwinArg,
    /// Replay without waiting out the time in which the user thought: as fast as the guest can,
    /// for some more bytes. A site that follows has replayed already
    #[arg(long)]
    pub(crate) quick: bool,
    /// With `live`: stop the VM once it is expected to stand still for no longer than this. Where
    /// that can't be reached, it is stopped when another round gains nothing
    #[arg(long, value_parser = duration, value_name = "TIME", default_value = "1s")]
    pub(crate) downtime: Duration,
    /// With `live`: no more rounds than these
    #[arg(long, value_name = "N", default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) rounds: u32,
    /// With `live`: first replay the log on the stale copy at the target, while the VM runs
    #[arg(long)]
    pub(crate) replay_first: bool,
    /// Say what each strategy would cost, and stop
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Leave the VM paused at the target
    #[arg(long)]
    pub(crate) paused: bool,
    /// Call the target again for so long when the line is lost. After that it is exit code 4: the
    /// VM goes on here, the target keeps what it has for some minutes, and the same command goes
    /// on with that
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    pub(crate) give_up_after: u32,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum StrategyArg {
    /// What is predicted to be quickest
    Auto,
    /// Replay the log on the stale copy, then reconcile
    Replay,
    /// Reconcile against the stale copy
    Base,
    /// Send everything but what is in the read-only base images
    Full,
    /// Send while the VM runs, against the stale copy if there is one, and again what changes
    Live,
}

#[derive(Debug, Subcommand)]
pub(crate) enum LogCommand {
    /// The logs of a VM
    List {
        /// The VM
        name: String,
    },
    /// What a log holds, by kind and time; never what was typed
    Show(LogFile),
    /// A log as JSON lines
    Export {
        #[command(flatten)]
        log: LogFile,
        /// What was typed, too: passwords among it
        #[arg(long)]
        unmask: bool,
    },
    /// Delete logs that began longer ago than this; the one that is being recorded stays. A VM
    /// whose newest log is gone moves without a replay
    Prune {
        /// The VM
        name: String,
        /// 12h, 30d, 8w
        #[arg(long, value_parser = duration, value_name = "TIME")]
        older_than: Duration,
        /// Say what would go, and stop
        #[arg(long)]
        dry_run: bool,
    },
    /// Take a stretch out of a log for good
    Redact {
        #[command(flatten)]
        log: LogFile,
        /// From this time on, in guest time since the log began: 90s, 2m
        #[arg(long, value_parser = duration, value_name = "TIME")]
        from: Duration,
        /// To this time
        #[arg(long, value_parser = duration, value_name = "TIME")]
        to: Duration,
    },
}

#[derive(Debug, ClapArgs)]
pub(crate) struct LogFile {
    /// The VM
    pub(crate) name: String,
    /// The generation that the log continues [default: the newest log]
    #[arg(long, value_name = "N")]
    pub(crate) generation: Option<u64>,
}

/// A number of bytes as `4096`, `500M`, `1.5GiB`; units are powers of 1024.
fn size(text: &str) -> Result<u64, String> {
    let split = text
        .find(|c: char| c.is_ascii_alphabetic())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let bad = || format!("{text:?} is no size; try 500M or 20G");
    let number: f64 = number.trim().parse().map_err(|_| bad())?;
    let unit = unit.to_ascii_lowercase();
    let letter = unit
        .strip_suffix("ib")
        .or_else(|| unit.strip_suffix('b'))
        .unwrap_or(&unit);
    let power = match letter {
        "" if unit != "ib" => 0,
        "k" => 1,
        "m" => 2,
        "g" => 3,
        "t" => 4,
        _ => return Err(bad()),
    };
    let bytes = number * 1024_f64.powi(power);
    if (0.0..1e18).contains(&bytes) {
        Ok(bytes as u64)
    } else {
        Err(format!("{text:?} is out of range"))
    }
}

/// A time as `90`, `90s`, `2m` or `1500ms`.
fn duration(text: &str) -> Result<Duration, String> {
    let split = text
        .find(|c: char| c.is_ascii_alphabetic())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let number: f64 = number
        .parse()
        .map_err(|_| format!("{text:?} is no time; try 90s"))?;
    let scale = match unit {
        "" | "s" => 1.0,
        "ms" => 1e-3,
        "m" | "min" => 60.0,
        "h" => 3600.0,
        "d" => 86_400.0,
        "w" => 604_800.0,
        _ => {
            return Err(format!(
                "{unit:?} is no unit of time; use ms, s, m, h, d or w"
            ));
        }
    };
    Duration::try_from_secs_f64(number * scale).map_err(|_| format!("{text:?} is out of range"))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn durations_have_units_and_bounds() {
        assert_eq!(duration("1500ms"), Ok(Duration::from_millis(1500)));
        assert_eq!(duration("90"), Ok(Duration::from_secs(90)));
        assert_eq!(duration("2m"), Ok(Duration::from_secs(120)));
        assert_eq!(duration("30d"), Ok(Duration::from_secs(2_592_000)));
        assert_eq!(duration("8w"), Ok(Duration::from_secs(4_838_400)));
        for bad in ["", "s", "-1s", "1y", "1e400s"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn sizes_have_units_and_bounds() {
        assert_eq!(size("4096"), Ok(4096));
        assert_eq!(size("500M"), Ok(500 << 20));
        assert_eq!(size("1.5GiB"), Ok(3 << 29));
        assert_eq!(size("2 tb"), Ok(2 << 40));
        for bad in ["", "G", "-1G", "1X", "1iB", "NaN", "9e9T"] {
            assert!(size(bad).is_err(), "{bad}");
        }
    }
}
