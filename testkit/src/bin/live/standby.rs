//! Standbys: what keeping one costs while a session goes on, what it takes to switch to it, and whether
//! one is ever seen that is not whole.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use serde_json::Value;
use testkit::link::{Link, LinkProfile};
use testkit::robot::Robot;
use testkit::sector;
use testkit::session::{SUITE, Session};
use testkit::site::{Site, newest_generation, whole_generation};

use crate::VM;
use crate::rows::{Kills, Standby, median};

/// A first epoch over a thin line.
const LIMIT: Duration = Duration::from_secs(3600);
/// How often there is an epoch.
const EVERY: &str = "30s";
/// A site's answer.
const SOON: Duration = Duration::from_secs(60);

/// Plays the demo's session at `a` while `b` is its standby over a thin line, with epochs `by` state or log, and
/// then switches.
pub(crate) async fn measure(
    a: &mut Site,
    b: &mut Site,
    profile: LinkProfile,
    by: &str,
) -> anyhow::Result<Standby> {
    // Once, over no line: a standby is set up ahead of time.
    a.json(&["checkpoint", VM]).await?;
    a.json(&["seed", VM, "--to", b.name()]).await?;
    let agent = b.serve().await?;
    let link = Link::start(agent.addr, profile).context("cannot lay a line")?;
    a.trust(b.name(), link.addr(), &agent.key).await?;
    let words = ["sync", VM, "--to", b.name(), "--every", EVERY, "--by", by];
    let mut sync = a.spawn(&words)?;
    let shipped = |line: &Value| line["sync"] == "shipped";
    sync.until("ship", LIMIT, shipped).await?;
    let recorder = a.record(VM).await?;
    let text = SUITE.iter().find(|(name, _)| *name == "demo");
    let session: Session = text.context("there is no session demo")?.1.parse()?;
    let mut robot = Robot::connect(&recorder.vnc).await?;
    let begun = Instant::now();
    session.play(&mut robot, None, |_, _| {}).await?;
    let session_seconds = begun.elapsed().as_secs_f64();
    drop(robot);
    // Until the standby has all of the session: what comes after is the switch's own.
    let made: Value = a.json(&["checkpoint", VM]).await?;
    let made = made["generation"]
        .as_u64()
        .context("no generation was made")?;
    let caught_up = |line: &Value| shipped(line) && line["generation"].as_u64() >= Some(made);
    sync.until("ship the session", LIMIT, caught_up).await?;
    let caught_up_seconds = begun.elapsed().as_secs_f64() - session_seconds;
    let before = link.bytes_up() + link.bytes_down();
    let moved = a.spawn(&["switch", VM, "--to", b.name()])?;
    let report: Value = moved.finish(LIMIT).await?.success()?.last()?;
    let after = link.bytes_up() + link.bytes_down();
    let ended = sync.finish(SOON).await?.success()?;
    let events: Vec<Value> = ended
        .lines
        .iter()
        .filter_map(|line| serde_json::from_str(line).ok())
        .collect();
    let of = |kind: &str, what: &str| {
        let found = events.iter().filter(|line| line["sync"] == kind);
        found
            .filter_map(|line| line[what].as_f64())
            .collect::<Vec<_>>()
    };
    let paused = of("epoch", "paused");
    println!("{report}");
    let mut by_log = 0;
    for shipped in events.iter().filter(|line| line["sync"] == "shipped") {
        println!("{shipped}");
        by_log += u64::from(!shipped["by_log"].is_null());
    }
    Ok(Standby {
        by: by.to_owned(),
        shipped: of("shipped", "seconds").len() as u64,
        by_log,
        every: EVERY.to_owned(),
        session_seconds,
        caught_up_seconds,
        epochs: paused.len() as u64,
        paused: median(&paused),
        longest_paused: paused.iter().copied().fold(0.0, f64::max),
        shipped_seconds: median(&of("shipped", "seconds")),
        shipped_bytes: before,
        switch_bytes: after - before,
        switch_seconds: report["seconds"]["total"].as_f64().unwrap_or_default(),
        switch_downtime: report["seconds"]["downtime"].as_f64().unwrap_or_default(),
    })
}

/// Kills those who keep a standby at moments spread over an epoch, and looks at all generations of
/// both sites after each.
pub(crate) async fn kills(
    a: &mut Site,
    b: &mut Site,
    dir: &Path,
    tries: u32,
) -> anyhow::Result<Kills> {
    const STEP: Duration = Duration::from_millis(37);
    let disk = dir.join("disk.raw");
    sector::write_disk(&disk, &sector::COUNTS, &[]).context("cannot write the guest's disk")?;
    let disk = disk.to_str().context("its path is no text")?;
    let small = ["--memory", "64", "--no-network"];
    a.json(&[&["vm", "create", VM, "--disk", disk], &small[..]].concat())
        .await?;
    a.json(&["vm", "start", VM]).await?;
    let mut kills = Kills::default();
    let mut newest = 0;
    for kill in 0..tries {
        let sync = a.spawn(&["sync", VM, "--to", b.name(), "--every", "1s"])?;
        tokio::time::sleep(STEP * (kill % 50)).await;
        if kill % 2 == 1 {
            b.kill_agent();
            b.serve_again().await?;
        }
        sync.kill();
        kills.tries += 1;
        for site in [&*a, &*b] {
            for generation in generations(site)? {
                kills.generations += 1;
                if let Err(error) = whole_generation(&generation) {
                    println!("after kill {kill}: {error}");
                    kills.not_whole += 1;
                }
            }
        }
        if let Ok((number, _)) = newest_generation(b.dir(), VM) {
            kills.shipped += u64::from(number > newest);
            newest = number;
        }
    }
    a.json(&["sync", VM, "--to", b.name(), "--once"]).await?;
    ensure!(
        newest_generation(b.dir(), VM)?.0 == newest_generation(a.dir(), VM)?.0,
        "the standby is not up to date in the end"
    );
    Ok(kills)
}

fn generations(site: &Site) -> anyhow::Result<Vec<std::path::PathBuf>> {
    let dir = site.dir().join("vms").join(VM).join("generations");
    if !dir.exists() {
        return Ok(Vec::new());
    }
    let mut all = Vec::new();
    for entry in std::fs::read_dir(&dir)? {
        let path = entry?.path();
        if path.join("manifest.json").exists() {
            all.push(path);
        }
    }
    Ok(all)
}
