//! What the command line understands.

mod migrate;
mod sync;
mod values;
mod vm;

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args as ClapArgs, Parser, Subcommand, ValueEnum};

use values::{duration, size, turn};

pub(crate) use migrate::{MigrateArgs, StrategyArg, TwinArg};
pub(crate) use sync::{By, SyncArgs};
pub(crate) use vm::{AccelArg, CreateArgs, GenerationsCommand, VmCommand};

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
    /// Keep this site's keys in this folder, apart from what they lock: on a token, on tmpfs, in a
    /// credential of the service manager. It is noted, so that it need be said but once [default:
    /// the folder that is noted, or else the state directory]
    #[arg(long, global = true, env = "REPLAY_MIGRATE_KEYS", value_name = "DIR")]
    pub(crate) keys: Option<PathBuf>,
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
        /// Of a VM that another site has, keep so many of the newest generations that are shipped here
        /// (`seed`, `sync`), besides those that somebody relies on; 0 for all
        #[arg(long, value_name = "N", default_value_t = 2)]
        keep_generations: u32,
        /// How much to hold for other sites that fetch it here, sealed: this site is their hub; 0 for
        /// nothing [default: 10GiB]
        #[arg(long, value_parser = size, value_name = "SIZE")]
        hub_room: Option<u64>,
        /// Refuse to serve (exit code 3) unless all images and VMs here are encrypted where they
        /// are stored: by the file system, or by dm-crypt beneath it. `site status` shows it
        #[arg(long)]
        require_encryption: bool,
    },
    /// This site's identity and state, and the sites it trusts
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
        /// Let the programs of a replay-friendly guest take turns of this length, 50ms to 1s: the
        /// longer they are the closer replays come, and the longer one that computes holds up the
        /// others. 400ms if no length is given
        #[arg(long, value_parser = turn, value_name = "TIME", num_args = 0..=1,
              require_equals = true, default_missing_value = "400ms")]
        long_turns: Option<Duration>,
        /// Have the guest go on in a new QEMU, as its replays begin in one: emulation is slow at
        /// first, which sets them apart else. It stands still for about a second; connections to
        /// QEMU itself end, and those that the guest has through user-mode networking
        #[arg(long)]
        fresh_qemu: bool,
        /// Have the recorder that runs log nothing from now on, as while a password is typed: it
        /// reaches the guest, and no log. The log has a gap there, at which a replay goes astray;
        /// a later checkpoint, as of a new recording, mends that
        #[arg(long, conflicts_with_all = ["resume", "listen", "evdev", "long_turns", "fresh_qemu"])]
        pause: bool,
        /// Have the recorder that runs go on logging
        #[arg(long, conflicts_with_all = ["listen", "evdev", "long_turns", "fresh_qemu"])]
        resume: bool,
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
    /// Bring the rest of a VM's disk to the site that has the VM, after `migrate --post-copy` was interrupted: as
    /// this site's agent does by itself
    Supply {
        /// The VM
        name: String,
    },
    /// Keep standbys of a VM: sites that have a whole generation of it, and soon a newer one. Until
    /// the VM moves, or this is ended
    Sync(SyncArgs),
    /// Fetch what lies for this site at a hub: generations of VMs that other sites keep it a standby of,
    /// with `sync --to THIS@HUB`
    Collect {
        /// The hub
        #[arg(long, value_name = "SITE")]
        from: String,
        /// Again so long after, until this is ended: 60s, 5m [default: once]
        #[arg(long, value_parser = duration, value_name = "TIME")]
        every: Option<Duration>,
        /// Keep so many of the newest generations of each VM, besides those that somebody relies on; 0
        /// for all
        #[arg(long, value_name = "N", default_value_t = 2)]
        keep_generations: u32,
    },
    /// What this site holds for other sites, as a hub: sealed, so that it can't read it
    #[command(subcommand)]
    Hub(HubCommand),
    /// Move a VM to one of its standbys: what has changed since goes over while it runs
    Switch {
        /// The VM
        name: String,
        /// The standby
        #[arg(long, value_name = "SITE")]
        to: String,
        /// Stop the VM once it is expected to stand still for no longer than this
        #[arg(long, value_parser = duration, value_name = "TIME", default_value = "1s")]
        downtime: Duration,
    },
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
        /// As if `migrate --drop-free` had made the source's free pages zero
        #[arg(long)]
        drop_free: bool,
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
        /// Keep the checkpoint of a guest as `vm create --icount` makes it
        #[arg(long, value_name = "N", num_args = 0..=1, require_equals = true,
              default_missing_value = "1")]
        icount: Option<u8>,
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
        /// `follow` those in use (its own here with `send`, this site's there with `receive`), `hold`:
        /// leave here what is sealed for others, and fetch what is for it; or `nothing` [default: all
        /// of it, and for a known site what it might before]
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
    /// Whether what lies here is encrypted at rest, by what, and where the keys are
    Status,
    /// Take the key of what is encrypted here from the kernel: until it is given again, which the
    /// next command does that has the keys at hand, nobody reads what lies here. No agent may
    /// serve, and no VM run
    Lock,
}

#[derive(Debug, Subcommand)]
pub(crate) enum HubCommand {
    /// List what lies here, for whom and from whom
    List,
    /// Throw away what lies here for a site. It is a standby as before, and is brought up to date by
    /// the next epoch
    Drop {
        /// The site, by its name here or by its key
        #[arg(long = "for", value_name = "SITE")]
        recipient: String,
    },
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

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }
}
