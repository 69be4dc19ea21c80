//! To a site that has nothing, not even the image that the VM's disk rests on: all of it before the VM, or most of
//! it after.

use std::time::{Duration, Instant};

use anyhow::Context as _;
use serde_json::Value;
use testkit::link::{Link, LinkProfile};
use testkit::robot::{Button, Robot};
use testkit::site::Site;

use crate::VM;
use crate::rows::Bare;

/// A whole move over a thin line.
const LIMIT: Duration = Duration::from_secs(3600);
/// The screen has come to rest when nothing on it changes for so long.
const REST: Duration = Duration::from_secs(3);

/// Moves the VM to a site without its image, and has the guest read there what it never read before.
pub(crate) async fn measure(
    a: &Site,
    b: &mut Site,
    profile: LinkProfile,
    how: &[&str],
) -> anyhow::Result<Bare> {
    let agent = b.serve().await?;
    let link = Link::start(agent.addr, profile).context("cannot lay a line")?;
    a.trust(b.name(), link.addr(), &agent.key).await?;
    let words = [&["migrate", VM, "--to", b.name()], how].concat();
    let mut moving = a.spawn(&words)?;
    let begun = Instant::now();
    let rest = moving
        .until("get on", LIMIT, |line| line["phase"] == "rest")
        .await?;
    let (mut running, mut before) = (begun.elapsed(), link.bytes_up() + link.bytes_down());
    let mut row = Bare {
        how: how.join(" "),
        ..Bare::default()
    };
    if rest.is_some() {
        row.reading = read(b).await?;
    }
    let report: Value = moving.finish(LIMIT).await?.success()?.last()?;
    let all = begun.elapsed();
    if rest.is_none() {
        (running, before) = (all, link.bytes_up() + link.bytes_down());
        row.reading = read(b).await?;
    }
    let seconds = |name: &str| report["seconds"][name].as_f64().unwrap_or_default();
    println!("{} {}", report["seconds"], report["rest"]);
    Ok(Bare {
        running: running.as_secs_f64(),
        downtime: seconds("downtime"),
        bytes_before: before,
        all: all.as_secs_f64(),
        bytes: link.bytes_up() + link.bytes_down(),
        wanted: report["rest"]["wanted"].as_u64().unwrap_or_default(),
        ..row
    })
}

/// Some hundred files that nobody has read since the guest was booted; the seconds that takes.
async fn read(site: &Site) -> anyhow::Result<f64> {
    let mut robot = Robot::connect(&site.vnc(VM).await?).await?;
    robot.click(300, 100, Button::Left).await?;
    robot.wait_quiet(None, REST, 20 * REST).await?;
    let begun = Instant::now();
    // A line for each file: the screen changes until it is done.
    robot
        .type_text("md5sum /usr/share/doc/[a-l]*/copyright\n")
        .await?;
    robot.wait_quiet(None, 2 * REST, 100 * REST).await?;
    Ok(begun.elapsed().saturating_sub(2 * REST).as_secs_f64())
}
