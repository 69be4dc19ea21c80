//! What a migration reports when it is done, and the clock that measures its phases.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use reconciler::Root;
use serde::{Deserialize, Serialize};

use crate::phase::Phase;
use crate::plan::Estimate;
use crate::progress::Progress;
use crate::vm::VmName;

/// How the target's images come about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Strategy {
    /// Replay the log on the stale copy, then reconcile.
    Replay,
    /// Reconcile against the stale copy.
    Base,
    /// Send everything but what is in the read-only base images.
    Full,
    /// Send while the VM runs, and again what changes, before it stands still.
    Live,
}

impl std::fmt::Display for Strategy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Replay => "replay",
            Self::Base => "base",
            Self::Full => "full",
            Self::Live => "live",
        })
    }
}

/// The outcome of a migration, as `migrate --json` ends.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MigrationReport {
    /// Which VM.
    pub vm: VmName,
    /// How.
    pub strategy: Strategy,
    /// The generation that both sites had.
    pub generation_from: Option<u64>,
    /// The generation that both sites have now.
    pub generation_to: u64,
    /// What crossed the socket.
    pub bytes: ByteReport,
    /// How the pages of each image came about, by recipe.
    pub pages: PageReports,
    /// Seconds of each phase, with `downtime`, `usable` (from the beginning until the VM was there
    /// for its user) and `total` (until the source had its stale copy in place, too).
    pub seconds: BTreeMap<String, f64>,
    /// The roots that both sites computed of their own images.
    pub verified: Roots,
    /// Free pages of the guest that were not zero and are now, as was asked for.
    #[serde(default)]
    pub free_dropped: u64,
    /// Pages that were wrong at the first verification, and were sent again.
    pub refetched: u64,
    /// What the replay did, if there was one.
    pub replay: Option<ReplaySummary>,
    /// How the rounds went, if there were some.
    pub live: Option<LiveReport>,
    /// What came of the disk images after the VM had moved, where some of them came so.
    #[serde(default)]
    pub rest: Option<RestReport>,
    /// What was predicted for it, where the strategy was chosen by that.
    #[serde(default)]
    pub predicted: Option<Estimate>,
}

/// What came of the disk images after the VM had moved.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RestReport {
    /// Pages of disk images.
    pub pages: u64,
    /// Of them, those that went out of turn, for the guest waited for them, and those read along with them.
    pub wanted: u64,
    /// Bytes of pages, compressed.
    pub bytes: u64,
    /// Bytes sent, TLS included.
    pub sent: u64,
    /// Seconds.
    pub seconds: f64,
}

/// How rounds of pre-copy went.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LiveReport {
    /// Each round while the VM ran; the first one is against the base.
    pub rounds: Vec<RoundReport>,
    /// Why there was no other.
    pub ended: RoundsEnd,
    /// The seconds that the VM was expected to stand still, when it was stopped.
    pub expected_downtime: f64,
    /// Pages that were sent while it stood still, of RAM and disks.
    pub last_pages: u64,
    /// Bytes of pages that were sent while it stood still, the device state too.
    pub last_bytes: u64,
    /// Seconds of one processor that looking for changed pages took, while the VM ran.
    pub scan_seconds: f64,
    /// Bytes of RAM and disks that were looked at for it.
    pub scanned_bytes: u64,
    /// Bytes of a file that the versions sent took.
    pub shadow_bytes: u64,
}

/// One round.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RoundReport {
    /// Pages that were found to be changed and were sent.
    pub pages: u64,
    /// Of them, those sent at the end of the round, for they changed in the rounds before.
    pub hot: u64,
    /// Of them, those sent as the difference to the version before.
    pub deltas: u64,
    /// Bytes of pages, as compressed.
    pub bytes: u64,
    /// How long it took, until the target had applied it.
    pub seconds: f64,
    /// The seconds that the VM would have stood still, had it been stopped then.
    pub expected_downtime: f64,
}

/// Why rounds end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RoundsEnd {
    /// The VM would stand still no longer than was asked for.
    Short,
    /// Another round would not have made that shorter.
    NoGain,
    /// As many as were asked for.
    Rounds,
}

/// Bytes, by what they were for. Payloads are counted before TLS and framing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ByteReport {
    /// From the source, beneath TLS.
    pub sent: u64,
    /// From the target, beneath TLS.
    pub received: u64,
    /// The interaction log.
    pub log: u64,
    /// Page indices, truncated hashes, and the answers to them.
    pub hashes: u64,
    /// Pages of RAM.
    pub ram: u64,
    /// Blocks of disks.
    pub disk: u64,
    /// The device state.
    pub device: u64,
    /// Base generation and base files, where the target lacked them.
    pub base: u64,
    /// What was handed to a connection that was cut before it arrived, and so was sent again:
    /// part of `sent`, before TLS. Much of it never left this host's buffers.
    #[serde(default)]
    pub resent: u64,
}

/// Pages by recipe, for each kind of image.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageReports {
    /// Guest RAM.
    pub ram: BTreeMap<String, u64>,
    /// All disks together.
    pub disk: BTreeMap<String, u64>,
    /// The device state.
    pub device: BTreeMap<String, u64>,
}

/// Roots of the images.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Roots {
    /// Guest RAM.
    pub ram: Root,
    /// The disks, in order.
    pub disk: Vec<Root>,
    /// The device state.
    pub device: Root,
}

/// What a replay did.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ReplaySummary {
    /// Input events given to the guest.
    pub events: u64,
    /// Interactions whose anchor matched in time.
    pub matched: u64,
    /// Interactions whose anchor did not: the replay went on without.
    pub missed: u64,
    /// How long it took.
    pub seconds: f64,
    /// How long the recorded session was.
    pub recorded_seconds: f64,
    /// Whether the guest came to rest at the end.
    pub came_to_rest: bool,
    /// Why it was given up, if it went astray.
    pub diverged: Option<String>,
    /// Interactions that it was not given because of that.
    pub skipped: u64,
    /// What it cost the target until then, if it followed the user there.
    pub standby: Option<StandbyCost>,
}

/// What a site pays for following a VM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StandbyCost {
    /// How long its replay has lived.
    pub seconds: f64,
    /// Processor time that its QEMU has used, user and system.
    pub qemu_cpu_seconds: f64,
    /// Processor time that its agent has used meanwhile, for whatever it did.
    pub agent_cpu_seconds: f64,
    /// Memory of QEMU's process that it shares with nobody, the guest's RAM not counted.
    pub process_bytes: u64,
    /// Memory that the guest's RAM takes.
    pub ram_bytes: u64,
}

impl StandbyCost {
    /// Processor time of QEMU and the agent, in percent of one processor.
    pub fn cpu_percent(&self) -> f64 {
        let used = self.qemu_cpu_seconds + self.agent_cpu_seconds;
        100.0 * used / self.seconds.max(0.01)
    }

    /// Memory in all, in bytes.
    pub fn memory_bytes(&self) -> u64 {
        self.process_bytes.saturating_add(self.ram_bytes)
    }
}

impl ReplaySummary {
    pub(crate) fn of(report: &replayer::ReplayReport) -> Self {
        Self {
            events: report.events as u64,
            matched: report.matched as u64,
            missed: report.missed.len() as u64,
            seconds: report.duration.as_secs_f64(),
            recorded_seconds: report.recorded.as_secs_f64(),
            came_to_rest: report.came_to_rest,
            diverged: report.diverged.as_ref().map(ToString::to_string),
            skipped: report.skipped as u64,
            standby: None,
        }
    }
}

/// Measures phases; one runs at a time.
pub(crate) struct PhaseClock<'a> {
    progress: &'a dyn Progress,
    begun: Instant,
    current: Option<(Phase, Instant)>,
    spent: BTreeMap<Phase, Duration>,
    stopped: Option<Instant>,
    downtime: Option<Duration>,
    usable: Option<Duration>,
}

impl<'a> PhaseClock<'a> {
    pub(crate) fn start(progress: &'a dyn Progress) -> Self {
        Self {
            progress,
            begun: Instant::now(),
            current: None,
            spent: BTreeMap::new(),
            stopped: None,
            downtime: None,
            usable: None,
        }
    }

    /// A phase begins; entering the one that runs changes nothing.
    pub(crate) fn enter(&mut self, phase: Phase) {
        if self.current.is_some_and(|(current, _)| current == phase) {
            return;
        }
        self.leave();
        tracing::debug!(%phase, "phase");
        self.progress.phase(phase);
        self.current = Some((phase, Instant::now()));
    }

    fn leave(&mut self) {
        if let Some((phase, since)) = self.current.take() {
            *self.spent.entry(phase).or_default() += since.elapsed();
        }
    }

    /// The phase that runs, or the first one.
    pub(crate) fn phase(&self) -> Phase {
        self.current.map_or(Phase::Hello, |(phase, _)| phase)
    }

    /// The guest stands still from now on.
    pub(crate) fn down(&mut self) {
        self.stopped = Some(Instant::now());
    }

    /// The guest is usable at the target: the last phase ends.
    pub(crate) fn up(&mut self) {
        self.leave();
        self.downtime = self.stopped.map(|since| since.elapsed());
        self.usable = Some(self.begun.elapsed());
    }

    /// Seconds by phase, with `downtime`, `usable` and `total`.
    pub(crate) fn seconds(mut self) -> BTreeMap<String, f64> {
        self.leave();
        let mut seconds: BTreeMap<String, f64> = self
            .spent
            .iter()
            .map(|(phase, spent)| (phase.name().to_owned(), spent.as_secs_f64()))
            .collect();
        seconds.insert(
            "downtime".into(),
            self.downtime.unwrap_or_default().as_secs_f64(),
        );
        let usable = self.usable.map(|usable| usable.as_secs_f64());
        seconds.extend(usable.map(|usable| ("usable".to_owned(), usable)));
        seconds.insert("total".into(), self.begun.elapsed().as_secs_f64());
        seconds
    }
}
