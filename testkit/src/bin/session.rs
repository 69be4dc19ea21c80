//! `make capture SESSION=…`: records a session anew, by a robot at a real viewer, and captures it.
//!
//! One site, one guest: what the session makes of the base, and what replays of its log do. The
//! captures are what `bench reconcile` and the ablation of replay work on.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::Parser;
use testkit::session::Session;
use testkit::site::{self, Site};
use testkit::suite::{self, Guest, Kept};
use testkit::user::User;

/// Records a session of a robot at a real desktop, and captures its states.
#[derive(Parser)]
#[command(name = "session")]
struct Options {
    /// What the user does: the name of a session of the suite, or a file
    #[arg(long, default_value = "demo")]
    session: String,
    /// Who does it
    #[arg(long, value_enum, default_value_t)]
    user: User,
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
    /// With a guest whose clock counts its instructions, see `vm create --icount`
    #[arg(long)]
    icount: bool,
    /// A guest without a network card
    #[arg(long)]
    no_network: bool,
    /// The replays pass pauses this many times faster
    #[arg(long, default_value_t = 1.0)]
    speed: f64,
    /// The replays do not wait out pauses
    #[arg(long, conflicts_with = "record_only")]
    quick: bool,
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
    let session = Session::named(&options.session)?.by(options.user);
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
    let guest = Guest {
        friendly: options.replay_friendly,
        counted: options.icount,
        network: !options.no_network,
    };
    let mut capture = vec!["--speed".to_owned(), options.speed.to_string()];
    if options.quick {
        capture.push("--quick".to_owned());
    }
    let kept = Kept {
        capture: options.out.as_deref().map(|out| (out, &capture[..])),
        looks: options.looks.as_deref(),
        replay: options.replay,
    };
    let recording = suite::record(site, session, guest, &kept).await?;
    let mut report = serde_json::to_value(&recording)?;
    report["session"] = options.session.clone().into();
    report["user"] = options.user.to_string().into();
    println!("{}", serde_json::to_string_pretty(&report)?);
    Ok(())
}
