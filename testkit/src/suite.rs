//! A session recorded anew: a robot at a real viewer of a real guest, at a site of its own.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context;
use serde::Serialize;
use serde_json::Value;

use crate::robot::Robot;
use crate::session::Session;
use crate::site::{Site, guest_options};

const VM: &str = "desk";
/// A build of the guest downloads packages, and a first boot is emulated.
const GUEST_LIMIT: Duration = Duration::from_secs(1800);
/// Replays of a session of a few minutes.
const CAPTURE_LIMIT: Duration = Duration::from_secs(3600);
/// A guest that uses a tenth of a processor for so long is at rest.
const REST: Duration = Duration::from_secs(5);
/// One that is not at rest by then will not be.
const REST_LIMIT: Duration = Duration::from_secs(180);

/// The guest that is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Guest {
    /// Chance is taken out of it, see [`guest_options`].
    pub friendly: bool,
    /// Its instructions are counted, see `vm create --icount`.
    pub counted: bool,
    /// It has a network card.
    pub network: bool,
}

/// What is kept of a session.
#[derive(Clone, Debug, Default)]
pub struct Kept<'a> {
    /// The capture, in a folder to be made, with more options of `replay-migrate capture`.
    pub capture: Option<(&'a Path, &'a [String])>,
    /// Pictures of the screen, in this folder.
    pub looks: Option<&'a Path>,
    /// Nothing, but it is replayed once, to see what a replay misses.
    pub replay: bool,
}

/// A session as it went.
#[derive(Debug, Serialize)]
pub struct Recording {
    /// From the first step to the end of the last.
    pub seconds: f64,
    /// Lines of the session whose wait ended by its limit.
    pub waits_ended_by_limit: Vec<usize>,
    /// What `record` said at its end.
    pub recorded: Value,
    /// What `replay` said.
    pub replayed: Value,
    /// What `capture` said.
    pub captured: Value,
}

/// How a replay-friendly guest is recorded, beside what is done of itself.
pub const FRIENDLY: &[&str] = &["--long-turns", "--fresh-qemu"];

/// Plays a session in a fresh guest of a fresh site, and records it.
///
/// # Errors
/// When a command fails, or the session can't be played to its end.
pub async fn record(
    site: &Site,
    session: &Session,
    guest: Guest,
    kept: &Kept<'_>,
) -> anyhow::Result<Recording> {
    let mut options = guest_options(guest.friendly).to_vec();
    options.extend(guest.counted.then_some("--icount"));
    let dir = site.build_guest(&options).await?;
    let mut create = vec!["vm", "create", VM, "--disk", &dir];
    create.extend(options);
    create.extend((!guest.network).then_some("--no-network"));
    site.json(&create).await?;
    // One without a network card is not among the guests that have booted already.
    let start = site.spawn(&["vm", "start", VM, "--wait"])?;
    start.finish(GUEST_LIMIT).await?.success()?;
    come_to_rest(site).await?;
    let more = if guest.friendly { FRIENDLY } else { &[] };
    let recorder = site.record_with(VM, more).await?;
    let mut robot = Robot::connect(&recorder.vnc).await?;
    let played = session
        .play(&mut robot, kept.looks, |at, text| {
            println!("{:5.0} s  the user {text}", at.as_secs_f64());
        })
        .await?;
    drop(robot);
    println!("{:5.0} s  the session ends", played.time.as_secs_f64());
    for line in &played.limits {
        println!("the wait in line {line} of the session ended by its limit");
    }
    let captured = match kept.capture {
        Some((out, options)) => capture(site, out, options).await?,
        None => Value::Null,
    };
    let recorded: Value = recorder.process.stop().await?.success()?.last()?;
    let replayed = match recorded["log"].as_str().filter(|_| kept.replay) {
        Some(log) => {
            let replay = site.spawn(&["replay", VM, "--log", log])?;
            replay.finish(CAPTURE_LIMIT).await?.success()?.last()?
        }
        None => Value::Null,
    };
    Ok(Recording {
        seconds: played.time.as_secs_f64(),
        waits_ended_by_limit: played.limits,
        recorded,
        replayed,
        captured,
    })
}

/// Waits until a guest has done what it does once it is up, as a user's has long since: what a
/// session sets off would happen in between else.
async fn come_to_rest(site: &Site) -> anyhow::Result<()> {
    let status = site.status(VM).await?;
    let pid = status["pid"].as_u64().context("the VM has no QEMU")?;
    let begun = Instant::now();
    loop {
        let before = cpu_time(pid)?;
        tokio::time::sleep(REST).await;
        if cpu_time(pid)?.saturating_sub(before) < REST / 10 || begun.elapsed() > REST_LIMIT {
            return Ok(());
        }
    }
}

/// What a process has used of processors (proc_pid_stat(5)).
fn cpu_time(pid: u64) -> anyhow::Result<Duration> {
    let path = format!("/proc/{pid}/stat");
    let stat = std::fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    // The name, in parentheses, may hold anything; 11 fields come between it and these two.
    let fields = stat.rsplit_once(") ").map_or("", |(_, fields)| fields);
    let mut fields = fields.split(' ').skip(11).map(str::parse::<u64>);
    let (Some(Ok(user)), Some(Ok(system))) = (fields.next(), fields.next()) else {
        anyhow::bail!("{path} is not as proc_pid_stat(5) says");
    };
    let ticks = rustix::param::clock_ticks_per_second();
    Ok(Duration::from_millis((user + system) * 1000 / ticks.max(1)))
}

async fn capture(site: &Site, out: &Path, options: &[String]) -> anyhow::Result<Value> {
    let out: PathBuf = std::path::absolute(out)?;
    let out = out.to_string_lossy();
    let mut capture = vec!["capture", VM, "--out", &out];
    capture.extend(options.iter().map(String::as_str));
    let captured = site.spawn(&capture)?.finish(CAPTURE_LIMIT).await?;
    Ok(captured.success()?.last()?)
}
