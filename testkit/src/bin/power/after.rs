//! The program itself, on the disks of two sites that lost power: it reads what is there, both agree on
//! who has the VM, it runs there and only there, and it moves.

use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use testkit::site::{Finished, Site};

use crate::look::{self, Right};
use crate::story::{Known, SITES, VM};

/// Sites that can talk agree within this.
const AGREE_LIMIT: Duration = Duration::from_secs(60);
/// How often it is looked whether they do.
const STEP: Duration = Duration::from_millis(50);
/// `replay-migrate` refused, and nothing changed.
const REFUSED: Option<i32> = Some(3);

/// What is there can be read, and the keys are what they were.
pub(crate) async fn reads(sites: &[Site; 2], known: &Known) -> anyhow::Result<()> {
    for (site, key) in sites.iter().zip(&known.keys) {
        let name = site.name();
        let listed = site.json(&["vm", "list"]).await;
        let listed = listed.with_context(|| format!("at {name}"))?;
        for vm in listed.as_array().into_iter().flatten() {
            let vm = vm["name"].as_str().unwrap_or_default();
            for words in [["generations", "list", vm], ["log", "list", vm]] {
                let read = site.json(&words).await;
                read.with_context(|| format!("at {name}"))?;
            }
        }
        site.json(&["site", "list"]).await?;
        if let Some(key) = key {
            ensure!(
                *key == site.key().await?,
                "{name} has another key than before"
            );
        }
    }
    Ok(())
}

/// With the agents up again: one owner, where the VM runs, and from where it moves.
pub(crate) async fn goes_on(sites: &mut [Site; 2], known: &Known) -> anyhow::Result<()> {
    for site in &mut *sites {
        site.serve_again().await?;
    }
    let Some(owner) = agree(sites).await? else {
        ensure!(!known.made, "the VM is lost");
        return Ok(());
    };
    if let Some(known) = known.owner {
        ensure!(known == owner, "the VM is not {}'s any more", SITES[known]);
    }
    let (here, there) = (&sites[owner], &sites[1 - owner]);
    runs(here).await?;
    let refused = there.run(&["vm", "start", VM]).await?;
    ensure!(
        refused.code == REFUSED,
        "{} does not refuse to run it: {}",
        there.name(),
        refused.stderr
    );
    if !known.trust {
        return Ok(());
    }
    let moved = patiently(here, &["migrate", VM, "--to", there.name()]).await?;
    moved.success().context("it does not move")?;
    runs(there).await
}

/// Waits until both know who has the VM; nobody, where there is none.
async fn agree(sites: &[Site; 2]) -> anyhow::Result<Option<usize>> {
    let end = Instant::now() + AGREE_LIMIT;
    loop {
        let rights = [look::right(sites[0].dir())?, look::right(sites[1].dir())?];
        match rights {
            [Right::Held, Right::Held] => bail!("both sites hold the lease"),
            [Right::Held, Right::Elsewhere | Right::Unknown] => return Ok(Some(0)),
            [Right::Elsewhere | Right::Unknown, Right::Held] => return Ok(Some(1)),
            [Right::Unknown, Right::Unknown] => return Ok(None),
            _ => ensure!(Instant::now() < end, "they do not agree: {rights:?}"),
        }
        tokio::time::sleep(STEP).await;
    }
}

/// Has it run here; the agent may be at it, too.
async fn runs(site: &Site) -> anyhow::Result<()> {
    let end = Instant::now() + AGREE_LIMIT;
    loop {
        let state = site.state(VM).await.unwrap_or_default();
        let words = match state.as_str() {
            "running" => return Ok(()),
            "paused" => ["vm", "resume", VM],
            _ => ["vm", "start", VM],
        };
        let went = site.run(&words).await?;
        ensure!(
            went.code == Some(0) || Instant::now() < end,
            "it is {state} at {}, and does not go on: {}",
            site.name(),
            went.stderr
        );
    }
}

/// Runs a command, again where somebody else works on the VM at the moment.
async fn patiently(site: &Site, words: &[&str]) -> anyhow::Result<Finished> {
    let end = Instant::now() + AGREE_LIMIT;
    loop {
        let finished = site.run(words).await?;
        let busy = finished.code == REFUSED && finished.stderr.contains("another replay-migrate");
        if !busy || Instant::now() >= end {
            return Ok(finished);
        }
        tokio::time::sleep(STEP).await;
    }
}
