//! The moves themselves, each over a thin line.

use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::ValueEnum;
use serde_json::Value;
use testkit::link::{Link, LinkProfile};
use testkit::site::{Agent, Running, Site};

use crate::{VM, mebibytes};

/// A whole migration over the thin line: `full` is some 200 MB.
const MIGRATE_LIMIT: Duration = Duration::from_secs(1800);
/// Until a replay at the target has begun to follow.
const FOLLOW_LIMIT: Duration = Duration::from_secs(120);
/// What crosses the line besides: TLS ends a connection with an alert each way, and an agent asks a site that it
/// hears of for the first time, over a connection of its own, whether that one knows more of the VM.
const BESIDES: u64 = 8 << 10;

/// When the sites replay.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Replays {
    /// While the user works
    Follow,
    /// When the user moves, both sites at once
    Beside,
    /// When the user moves, one site after the other
    After,
}

/// A site that follows over a thin line.
pub(crate) struct Following {
    link: Link,
    process: Running,
}

/// Has a site follow the VM, and waits until it does.
pub(crate) async fn follow(
    from: &Site,
    to: &Site,
    agent: &Agent,
    profile: LinkProfile,
) -> anyhow::Result<Following> {
    let link = Link::start(agent.addr, profile)?;
    from.trust(to.name(), link.addr(), &agent.key).await?;
    let mut process = from.spawn(&["follow", VM, "--to", to.name()])?;
    let begun = Instant::now();
    let line = process
        .until("follow", FOLLOW_LIMIT, |line| line["following"] == "behind")
        .await?;
    line.with_context(|| format!("`follow` ended early: {}", process.stderr()))?;
    println!(
        "{} follows over the thin line, after {:.1} s",
        to.name().to_uppercase(),
        begun.elapsed().as_secs_f64()
    );
    Ok(Following { link, process })
}

/// Moves the VM over the thin line, and leaves it paused.
pub(crate) async fn roam(
    from: &Site,
    to: &Site,
    agent: &Agent,
    profile: LinkProfile,
    strategy: &str,
    replays: Replays,
    following: Option<Following>,
) -> anyhow::Result<Value> {
    let (link, follower) = match following {
        Some(Following { link, process }) => (link, Some(process)),
        None => (Link::start(agent.addr, profile)?, None),
    };
    from.trust(to.name(), link.addr(), &agent.key).await?;
    println!(
        "{} to {} by {strategy} ...",
        from.name().to_uppercase(),
        to.name().to_uppercase()
    );
    let mut migration = from.spawn(&[
        "migrate",
        VM,
        "--to",
        to.name(),
        "--strategy",
        strategy,
        "--twin",
        match replays {
            Replays::After => "after",
            Replays::Follow | Replays::Beside => "beside",
        },
        "--paused",
    ])?;
    let begun = Instant::now();
    let mut phase = String::new();
    loop {
        let line = migration
            .until("get on", MIGRATE_LIMIT, |line| line["phase"].is_string())
            .await?;
        let Some(line) = line else { break };
        let now = line["phase"].as_str().unwrap_or_default();
        if now != phase {
            now.clone_into(&mut phase);
            println!("  {:6.1} s  {phase}", begun.elapsed().as_secs_f64());
        }
    }
    let report: Value = migration.finish(MIGRATE_LIMIT).await?.success()?.last()?;
    if let Some(follower) = follower {
        let followed = follower.finish(FOLLOW_LIMIT).await?.success()?;
        if std::env::var_os("REPLAY_MIGRATE_LOG").is_some() {
            eprint!("{}", followed.stderr);
        }
    }
    let (sent, received) = (link.bytes_up(), link.bytes_down());
    println!(
        "  {:6.1} s  there, verified; on the line: {} sent, {} received",
        begun.elapsed().as_secs_f64(),
        mebibytes(sent),
        mebibytes(received)
    );
    let said = report["bytes"]["sent"].as_u64().unwrap_or_default();
    if said + BESIDES < sent {
        bail!("the report says {said} bytes were sent, and {sent} came over the line");
    }
    Ok(report)
}
