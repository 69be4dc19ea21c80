//! Plays a session at a VNC server, to see what it does.

use std::path::PathBuf;

use anyhow::Context;
use clap::Parser;
use testkit::robot::{Robot, VncAddr};
use testkit::session::{DEMO, REFERENCE, SHORT, Session};

/// Plays a session of a user at a VNC server.
#[derive(Parser)]
#[command(name = "robot")]
struct Arguments {
    /// ADDRESS:PORT or unix:PATH
    #[arg(long, value_name = "ADDR")]
    vnc: VncAddr,
    /// demo, reference, short, or a file
    #[arg(long, default_value = "demo")]
    session: String,
    /// Folder for the screenshots that the session asks for
    #[arg(long, value_name = "DIR")]
    looks: Option<PathBuf>,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let text = match arguments.session.as_str() {
        "demo" => DEMO.to_owned(),
        "reference" => REFERENCE.to_owned(),
        "short" => SHORT.to_owned(),
        path => std::fs::read_to_string(path).with_context(|| format!("cannot read {path}"))?,
    };
    let session: Session = text.parse()?;
    let mut robot = Robot::connect(&arguments.vnc).await?;
    let played = session
        .play(&mut robot, arguments.looks.as_deref(), |at, text| {
            println!("{:6.1} s  the user {text}", at.as_secs_f64());
        })
        .await?;
    println!("{:6.1} s  done", played.time.as_secs_f64());
    for line in played.limits {
        println!("the wait in line {line} ended by its limit");
    }
    Ok(())
}
