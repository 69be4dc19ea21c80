//! Our own moves, through the command line, over the thin line.

use std::time::Duration;

use anyhow::Context as _;
use serde_json::Value;
use testkit::link::{Link, LinkProfile};
use testkit::robot::{Button, Robot};
use testkit::site::Site;

use crate::VM;
use crate::rows::{Row, Trip, Way};

/// A whole move over a thin line.
const LIMIT: Duration = Duration::from_secs(3600);
/// What a trip is rested from.
const REST: Duration = Duration::from_secs(3);

/// Moves the VM over a line; the report and the bytes on the line, both ways.
async fn over(
    from: &Site,
    to: &mut Site,
    profile: LinkProfile,
    options: &[&str],
) -> anyhow::Result<(Value, u64)> {
    let agent = to.serve().await?;
    let link = Link::start(agent.addr, profile).context("cannot lay a line")?;
    from.trust(to.name(), link.addr(), &agent.key).await?;
    let words = [&["migrate", VM, "--to", to.name()], options].concat();
    let moved = from.spawn(&words)?.finish(LIMIT).await?;
    let report: Value = moved.success()?.last()?;
    // The next one may take the short way.
    from.trust(to.name(), agent.addr, &agent.key).await?;
    Ok((report, link.bytes_up() + link.bytes_down()))
}

fn seconds(report: &Value, name: &str) -> f64 {
    report["seconds"][name].as_f64().unwrap_or_default()
}

/// Moves the VM from `a` to `b` over a thin line, and back over none.
pub(crate) async fn measure(
    a: &mut Site,
    b: &mut Site,
    workload: &str,
    way: Way,
    profile: LinkProfile,
    downtime: &str,
) -> anyhow::Result<Row> {
    match way {
        Way::LiveStale => drop(a.json(&["seed", VM, "--to", b.name()]).await?),
        // From nothing: what an earlier move left there goes. There may be nothing.
        _ => drop(b.run(&["vm", "delete", VM, "--yes"]).await?),
    }
    let live = ["--strategy", "live", "--downtime", downtime];
    let options = match way {
        Way::Full => &["--strategy", "full"][..],
        _ => &live[..],
    };
    let (report, bytes) = over(a, b, profile, options).await?;
    println!("{}", report["live"]);
    println!("{}", report["seconds"]);
    b.json(&["migrate", VM, "--to", a.name(), "--strategy", "base"])
        .await?;
    let rounds = report["live"]["rounds"].as_array();
    let later = || rounds.into_iter().flatten().skip(1);
    let sum = |what: &str| {
        later()
            .filter_map(|round| round[what].as_u64())
            .sum::<u64>()
    };
    let ended = report["live"]["ended"].as_str().unwrap_or_default();
    Ok(Row {
        workload: workload.to_owned(),
        way,
        bytes,
        seconds: seconds(&report, "total"),
        downtime: seconds(&report, "downtime"),
        converged: true,
        rounds: rounds.map_or(1, |rounds| rounds.len() as u64 + 1),
        dirty_bytes: rounds.map(|_| sum("pages") * 4096),
        sent_for_dirty: rounds.map(|_| sum("bytes")),
        note: match ended {
            "short" => "stopped as asked for".to_owned(),
            "no_gain" => "stopped when rounds gained nothing".to_owned(),
            other => other.to_owned(),
        },
    })
}

/// A VM goes to a site that has nothing, then back and forth, with a little work in between.
pub(crate) async fn back_and_forth(
    a: &mut Site,
    b: &mut Site,
    profile: LinkProfile,
    strategy: &str,
    trips: usize,
) -> anyhow::Result<Vec<Trip>> {
    let mut all = Vec::new();
    let (mut from, mut to) = (a, b);
    for trip in 0..trips {
        let how = if trip == 0 { "full" } else { strategy };
        let (report, bytes) = over(from, to, profile, &["--strategy", how]).await?;
        let trip = Trip {
            strategy: how.to_owned(),
            bytes,
            seconds: seconds(&report, "total"),
            running: seconds(&report, "usable"),
            downtime: seconds(&report, "downtime"),
        };
        println!("{trip:?} {}", report["seconds"]);
        all.push(trip);
        std::mem::swap(&mut from, &mut to);
        let mut robot = Robot::connect(&from.vnc(VM).await?).await?;
        robot.click(300, 100, Button::Left).await?;
        robot.type_text("ls -l /usr | tail -3\n").await?;
        robot.wait_quiet(None, REST, 10 * REST).await?;
    }
    Ok(all)
}
