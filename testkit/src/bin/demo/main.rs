//! `make demo`: a desktop in use roams over a thin line, from site to site.
//!
//! A user works at site A for more than a minute. Sites B and C hold a stale copy from before
//! that; D has only the read-only disk image. The VM then moves A to B by `replay`, B to C by
//! `base` and C to D by `full`, paused all the while: all three strategies face the same state.
//! Nothing the program says of itself is believed: all images are compared from outside, byte by
//! byte. At D the desktop goes on.

mod images;
mod roam;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Parser;
use serde_json::{Value, json};
use testkit::link::{LinkProfile, Rate, parse_delay};
use testkit::robot::{Robot, Waited};
use testkit::session::{Played, Session};
use testkit::site::{self, Agent, Site, guest_options};

use images::{differing_pixels, same_images, same_state, screenshot, side_by_side};
use roam::{Replays, roam};

const VM: &str = "desk";
/// What is typed at the end, to see the desktop alive.
const SIGN_OF_LIFE: &str = "date\n";

/// A desktop roams between sites over a thin line, three ways.
#[derive(Parser)]
#[command(name = "demo")]
struct Options {
    /// What the line carries, each way
    #[arg(long, default_value = "10mbit")]
    rate: Rate,
    /// How long a bit travels, each way
    #[arg(long, default_value = "50ms", value_parser = parse_delay)]
    delay: Duration,
    /// What the user does: demo, reference, short, or a file
    #[arg(long, default_value = "demo")]
    session: String,
    /// Where to put everything
    #[arg(long, default_value = "target/demo", value_name = "DIR")]
    out: PathBuf,
    /// With a guest that chance is taken out of, see `vm create --replay-friendly` and
    /// `record --long-turns --fresh-qemu`
    #[arg(long)]
    replay_friendly: bool,
    /// When the sites replay [default: while the user works]
    #[arg(long, value_enum, default_value_t = Replays::Follow)]
    replays: Replays,
    /// Keep the sites' state directories
    #[arg(long)]
    keep: bool,
}

#[tokio::main]
async fn main() -> ExitCode {
    let options = Options::parse();
    // Whatever ends it, dropping the future ends all processes.
    let outcome = tokio::select! {
        outcome = run(&options) => outcome,
        _ = tokio::signal::ctrl_c() => {
            println!("\ninterrupted; ending what runs ...");
            Err(anyhow::anyhow!("interrupted"))
        }
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Sites of the demonstration, with what they need to talk.
struct Sites {
    a: Site,
    b: Site,
    c: Site,
    d: Site,
}

/// Whether all images were identical.
async fn run(options: &Options) -> anyhow::Result<bool> {
    let program = site::program()?;
    let session = Session::named(&options.session)?;
    let out = clear(&program, &options.out)?;
    let guest = build_guest(&program, &out, options.replay_friendly).await?;

    heading("Four sites on this machine");
    let [a, b, c, d] = ["a", "b", "c", "d"].map(|name| Site::new(&program, name, out.join(name)));
    let mut sites = Sites { a, b, c, d };
    let agents = open_sites(&mut sites, &guest).await?;

    heading("The desktop at A");
    let mut create = vec!["vm", "create", VM, "--disk", &guest];
    create.extend(guest_options(options.replay_friendly));
    sites.a.json(&create).await?;
    let created = Instant::now();
    sites.a.json(&["vm", "start", VM]).await?;
    println!("runs after {:.1} s", created.elapsed().as_secs_f64());
    // Whoever takes chance out of a guest takes out all of it.
    let more: &[&str] = if options.replay_friendly {
        testkit::suite::FRIENDLY
    } else {
        &[]
    };
    let recorder = sites.a.record_with(VM, more).await?;
    println!(
        "recorded on top of generation {}{}",
        recorder.begun["generation"],
        if more.is_empty() {
            ""
        } else {
            ", in a fresh QEMU, its programs taking long turns"
        }
    );
    for (name, agent) in [("b", &agents[0]), ("c", &agents[1])] {
        sites.a.trust(name, agent.addr, &agent.key).await?;
        let seeded = sites.a.json(&["seed", VM, "--to", name]).await?;
        println!(
            "{} has a stale copy, shipped ahead of time over a fast line: {}",
            name.to_uppercase(),
            mebibytes(seeded["bytes"]["sent"].as_u64().unwrap_or_default())
        );
    }

    let profile = LinkProfile::symmetric(options.rate, options.delay);
    let mut following = match options.replays {
        Replays::Follow => Some(roam::follow(&sites.a, &sites.b, &agents[0], profile).await?),
        Replays::Beside | Replays::After => None,
    };

    heading("A user works at A");
    let mut robot = Robot::connect(&recorder.vnc).await?;
    let looks = out.join("session");
    std::fs::create_dir_all(&looks)?;
    let played = session
        .play(&mut robot, Some(&looks), |at, text| {
            println!("{:5.0} s  the user {text}", at.as_secs_f64());
        })
        .await?;
    drop(robot);
    tell_session(&played);

    heading("It roams");
    println!(
        "line: {} each way, {} ms there and {} ms back",
        options.rate,
        options.delay.as_millis(),
        options.delay.as_millis()
    );
    let before = screenshot(&sites.a, &out.join("a.png")).await?;
    let mut reports = serde_json::Map::new();
    let mut identical = true;
    let mut after = None;
    for (strategy, from, to, agent) in [
        ("replay", &sites.a, &sites.b, &agents[0]),
        ("base", &sites.b, &sites.c, &agents[1]),
        ("full", &sites.c, &sites.d, &agents[2]),
    ] {
        let following = following.take();
        let report = roam(
            from,
            to,
            agent,
            profile,
            strategy,
            options.replays,
            following,
        )
        .await?;
        identical &= same_images(from, to).await?;
        reports.insert(strategy.to_owned(), report);
        if strategy == "replay" {
            after = Some(screenshot(&sites.b, &out.join("b.png")).await?);
        }
    }
    identical &= same_state(&sites.a, &sites.d).await?;
    let recorded: Value = recorder
        .process
        .finish(Duration::from_secs(30))
        .await?
        .last()?;
    if let Some(after) = after {
        let path = out.join("both-sides.png");
        side_by_side(&before, &after).save(&path)?;
        // A ran on for the time of the replay: a cursor that blinks may well differ, and the
        // images, not this picture, tell whether the state is the same.
        println!(
            "screen of A before the replay and of B after: {} of {} pixels differ; see {}",
            differing_pixels(&before, &after),
            before.pixels().len(),
            path.display()
        );
    }

    heading("The desktop goes on at D");
    alive(&sites.d, &out).await?;

    let session_seconds = played.time.as_secs_f64();
    let standby = standby(&reports["replay"]);
    let report = json!({
        "standby": standby,
        "strategies": reports,
        "identical": identical,
        "log_bytes": recorded["log_bytes"],
        "session_seconds": session_seconds,
    });
    let path = out.join("report.json");
    std::fs::write(&path, serde_json::to_string_pretty(&report)?)?;
    heading("What it cost");
    print!("{}", cost_table(&report));
    println!(
        "log: {} bytes for {session_seconds:.0} s of work",
        recorded["log_bytes"].as_u64().unwrap_or_default()
    );
    if let Some(told) = tell_standby(&report["standby"]) {
        println!("{told}");
    }
    println!(
        "all images compared byte by byte from outside: {}",
        if identical { "identical" } else { "DIFFERENT" }
    );
    println!("report: {}", path.display());
    drop(sites);
    if !options.keep {
        for name in ["a", "b", "c", "d"] {
            std::fs::remove_dir_all(out.join(name))?;
        }
    }
    Ok(identical)
}

fn heading(text: &str) {
    println!("\n== {text}");
}

fn mebibytes(bytes: u64) -> String {
    format!("{:.2} MiB", bytes as f64 / f64::from(1 << 20))
}

/// Removes what an earlier demonstration left, its processes first.
fn clear(program: &Path, out: &Path) -> anyhow::Result<PathBuf> {
    std::fs::create_dir_all(out).with_context(|| format!("cannot make {}", out.display()))?;
    let out = out.canonicalize()?;
    for name in ["a", "b", "c", "d"] {
        let dir = out.join(name);
        if dir.exists() {
            Site::clear_leftovers(program, &dir);
            std::fs::remove_dir_all(&dir)
                .with_context(|| format!("cannot remove {}", dir.display()))?;
        }
    }
    let _ = std::fs::remove_file(out.join("report.json"));
    Ok(out)
}

/// The folder of the guest.
async fn build_guest(program: &Path, out: &Path, replay_friendly: bool) -> anyhow::Result<String> {
    heading(if replay_friendly {
        "The guest: a Debian desktop that chance is taken out of"
    } else {
        "The guest: a Debian desktop"
    });
    let begun = Instant::now();
    // No site's state is needed for it, and none is made.
    let builder = Site::new(program, "builder", out.join("builder"));
    let dir = builder.build_guest(guest_options(replay_friendly)).await?;
    println!("{dir}, ready after {:.0} s", begun.elapsed().as_secs_f64());
    Ok(dir)
}

/// Starts the agents of B, C and D, and introduces all along the way. Agents of B, C, D.
async fn open_sites(sites: &mut Sites, guest: &str) -> anyhow::Result<[Agent; 3]> {
    let mut agents = Vec::new();
    for site in [&mut sites.b, &mut sites.c, &mut sites.d] {
        // The read-only base images are at every site; a VM that is made and removed leaves them.
        site.json(&["vm", "create", "images", "--disk", guest])
            .await?;
        site.json(&["vm", "delete", "images", "--yes"]).await?;
        agents.push(site.serve().await?);
        println!(
            "{} listens on {}",
            site.name().to_uppercase(),
            agents[agents.len() - 1].addr
        );
    }
    // Only who is called must know who calls; the caller's own address is never used.
    let nobody = SocketAddr::from(([127, 0, 0, 1], 1));
    for (caller, called) in [
        (&sites.a, &sites.b),
        (&sites.a, &sites.c),
        (&sites.b, &sites.c),
        (&sites.c, &sites.d),
    ] {
        called
            .trust(caller.name(), nobody, &caller.key().await?)
            .await?;
    }
    agents
        .try_into()
        .map_err(|_| anyhow::anyhow!("three agents were started"))
}

/// Lets the VM run, types a little, and sees that the screen answers.
async fn alive(site: &Site, out: &Path) -> anyhow::Result<()> {
    site.json(&["vm", "resume", VM]).await?;
    let mut robot = Robot::connect(&site.vnc(VM).await?).await?;
    robot.click(300, 100, testkit::robot::Button::Left).await?;
    robot.type_text(SIGN_OF_LIFE).await?;
    let waited = robot.wait_changed(None, Duration::from_secs(30)).await?;
    if waited == Waited::Limit {
        bail!(
            "the desktop does not answer at {}",
            site.name().to_uppercase()
        );
    }
    robot
        .wait_quiet(None, Duration::from_secs(1), Duration::from_secs(15))
        .await?;
    drop(robot);
    screenshot(site, &out.join("d.png")).await?;
    println!("it answers what is typed");
    Ok(())
}

fn tell_session(played: &Played) {
    println!("{:5.0} s  the user pauses", played.time.as_secs_f64());
    for line in &played.limits {
        println!("the wait in line {line} of the session ended by its limit");
    }
}

/// What following cost B, from the report of the move; nothing where it did not follow.
fn standby(replay: &Value) -> Value {
    let cost = &replay["replay"]["standby"];
    let part = |name: &str| cost[name].as_f64();
    let (Some(seconds), Some(qemu), Some(agent), Some(process), Some(ram)) = (
        part("seconds").filter(|seconds| *seconds > 0.0),
        part("qemu_cpu_seconds"),
        part("agent_cpu_seconds"),
        part("process_bytes"),
        part("ram_bytes"),
    ) else {
        return Value::Null;
    };
    let mebi = f64::from(1 << 20);
    json!({
        "cpu_percent": 100.0 * (qemu + agent) / seconds,
        "of_it_agent_percent": 100.0 * agent / seconds,
        "memory_mib": (process + ram) / mebi,
        "of_it_guest_ram_mib": ram / mebi,
        "seconds": seconds,
    })
}

fn tell_standby(standby: &Value) -> Option<String> {
    let part = |name: &str| standby[name].as_f64();
    Some(format!(
        "following took B {:.0} % of a processor ({:.0} % its agent's) over {:.0} s, and {:.0} MiB \
         of memory ({:.0} MiB the guest's RAM)",
        part("cpu_percent")?,
        part("of_it_agent_percent")?,
        part("seconds")?,
        part("memory_mib")?,
        part("of_it_guest_ram_mib")?,
    ))
}

fn cost_table(report: &Value) -> String {
    let bytes = |strategy: &str| {
        let bytes = &report["strategies"][strategy]["bytes"];
        let part = |name: &str| bytes[name].as_u64().unwrap_or_default();
        part("sent") + part("received")
    };
    let mut table = format!(
        "{:8} {:>14} {:>12} {:>10} {:>9} {:>9} {:>9}\n",
        "strategy", "bytes", "MiB", "downtime", "usable", "total", "refetched"
    );
    for strategy in ["replay", "base", "full"] {
        let one = &report["strategies"][strategy];
        let seconds = |name: &str| one["seconds"][name].as_f64().unwrap_or_default();
        table += &format!(
            "{strategy:8} {:>14} {:>12.2} {:>8.1} s {:>7.1} s {:>7.1} s {:>9}\n",
            bytes(strategy),
            bytes(strategy) as f64 / f64::from(1 << 20),
            seconds("downtime"),
            seconds("usable"),
            seconds("total"),
            one["refetched"].as_u64().unwrap_or_default(),
        );
    }
    let share = |of: &str| 100.0 * bytes("replay") as f64 / (bytes(of) as f64).max(1.0);
    table += &format!(
        "replay sends {:.1} % of what base does, and {:.1} % of what full does\n",
        share("base"),
        share("full")
    );
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_following_cost_is_told() {
        let report = json!({"replay": {"standby": {
            "seconds": 100.0,
            "qemu_cpu_seconds": 38.0,
            "agent_cpu_seconds": 4.0,
            "process_bytes": 100 << 20,
            "ram_bytes": 700 << 20,
        }}});
        let cost = standby(&report);
        assert_eq!(cost["cpu_percent"], 42.0);
        assert_eq!(cost["memory_mib"], 800.0);
        assert_eq!(
            tell_standby(&cost).unwrap(),
            "following took B 42 % of a processor (4 % its agent's) over 100 s, and 800 MiB of \
             memory (700 MiB the guest's RAM)"
        );
    }

    #[test]
    fn nothing_is_told_where_nobody_followed() {
        for report in [json!({"replay": {"standby": null}}), json!({})] {
            assert_eq!(standby(&report), Value::Null);
            assert_eq!(tell_standby(&standby(&report)), None);
        }
    }
}
