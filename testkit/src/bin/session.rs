//! `make capture SESSION=…`: records a session anew, by a robot at a real viewer, and captures it.
//!
//! One site, one guest: what the session makes of the base, and what replays of its log do. The
//! captures are what `bench reconcile` and the ablation of replay work on.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Parser;
use serde_json::{Value, json};
use testkit::robot::Robot;
use testkit::session::Session;
use testkit::site::{self, Site};

const VM: &str = "desk";
/// A build of the guest downloads packages, and a first boot is emulated.
const GUEST_LIMIT: Duration = Duration::from_secs(1800);
/// Two replays of a session of a few minutes.
const CAPTURE_LIMIT: Duration = Duration::from_secs(1800);

/// Records a session of a robot at a real desktop, and captures its states.
#[derive(Parser)]
#[command(name = "session")]
struct Options {
    /// What the user does: the name of a session of the suite, or a file
    #[arg(long, default_value = "demo")]
    session: String,
    /// The capture's folder, to be made
    #[arg(long, value_name = "DIR", required_unless_present = "record_only")]
    out: Option<PathBuf>,
    /// Plays and records, but keeps and captures nothing: to see whether a session goes well
    #[arg(long, conflicts_with_all = ["out", "speed"])]
    record_only: bool,
    /// Then replays it once, and throws that away too: to see what a replay misses
    #[arg(long, requires = "record_only")]
    replay: bool,
    /// Folder for the screenshots that the session asks for
    #[arg(long, value_name = "DIR")]
    looks: Option<PathBuf>,
    /// With a guest that chance is taken out of, see `vm create --replay-friendly`
    #[arg(long)]
    replay_friendly: bool,
    /// The replays pass pauses this many times faster
    #[arg(long, default_value_t = 1.0)]
    speed: f64,
}

#[tokio::main]
async fn main() -> ExitCode {
    let options = Options::parse();
    let outcome = tokio::select! {
        outcome = run(&options) => outcome,
        _ = tokio::signal::ctrl_c() => Err(anyhow::anyhow!("interrupted")),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(options: &Options) -> anyhow::Result<()> {
    let program = site::program()?;
    let session = Session::named(&options.session)?;
    if let Some(out) = options.out.as_ref().filter(|out| out.exists()) {
        bail!("{} is there already", out.display());
    }
    if let Some(looks) = &options.looks {
        std::fs::create_dir_all(looks)
            .with_context(|| format!("cannot make {}", looks.display()))?;
    }
    let temporary = tempfile::tempdir().context("cannot make a folder for the site")?;
    let site = Site::new(&program, "session", temporary.path().join("site"));
    let outcome = record(options, &site, &session).await;
    Site::clear_leftovers(&program, site.dir());
    outcome
}

async fn record(options: &Options, site: &Site, session: &Session) -> anyhow::Result<()> {
    let friendly = options.replay_friendly.then_some("--replay-friendly");
    let mut build = vec!["guest", "build"];
    build.extend(friendly);
    let built = site.spawn(&build)?.finish(GUEST_LIMIT).await?.success()?;
    let built: Value = built.last()?;
    let guest = built["dir"]
        .as_str()
        .context("`guest build` does not say where the guest is")?;
    let mut create = vec!["vm", "create", VM, "--disk", guest];
    create.extend(friendly);
    site.json(&create).await?;
    site.json(&["vm", "start", VM]).await?;
    let recorder = site.record(VM).await?;
    let mut robot = Robot::connect(&recorder.vnc).await?;
    let played = session
        .play(&mut robot, options.looks.as_deref(), |at, text| {
            println!("{:5.0} s  the user {text}", at.as_secs_f64());
        })
        .await?;
    drop(robot);
    println!("{:5.0} s  the session ends", played.time.as_secs_f64());
    for line in &played.limits {
        println!("the wait in line {line} of the session ended by its limit");
    }
    let captured = match &options.out {
        Some(out) => capture(site, out, options.speed).await?,
        None => Value::Null,
    };
    let recorded: Value = recorder.process.stop().await?.success()?.last()?;
    let replayed = match recorded["log"].as_str().filter(|_| options.replay) {
        Some(log) => {
            let replay = site.spawn(&["replay", VM, "--log", log])?;
            replay.finish(CAPTURE_LIMIT).await?.success()?.last()?
        }
        None => Value::Null,
    };
    let report = json!({
        "session": options.session,
        "seconds": played.time.as_secs_f64(),
        "waits_ended_by_limit": played.limits,
        "recorded": recorded,
        "replayed": replayed,
        "captured": captured,
    });
    println!("{}", serde_json::to_string_pretty(&report)?);
    Ok(())
}

async fn capture(site: &Site, out: &Path, speed: f64) -> anyhow::Result<Value> {
    let out = std::path::absolute(out)?;
    let (out, speed) = (out.to_string_lossy(), speed.to_string());
    let capture = ["capture", VM, "--out", &out, "--speed", &speed];
    let captured = site.spawn(&capture)?.finish(CAPTURE_LIMIT).await?;
    Ok(captured.success()?.last()?)
}
