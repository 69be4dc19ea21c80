//! Plays a session at a VNC server, to see what it does.

use std::path::PathBuf;

use clap::Parser;
use testkit::robot::{Robot, VncAddr};
use testkit::session::Session;

/// Plays a session of a user at a VNC server.
#[derive(Parser)]
#[command(name = "robot")]
struct Arguments {
    /// ADDRESS:PORT or unix:PATH
    #[arg(long, value_name = "ADDR")]
    vnc: VncAddr,
    /// The name of a session of the suite, or a file
    #[arg(long, default_value = "demo")]
    session: String,
    /// Folder for the screenshots that the session asks for
    #[arg(long, value_name = "DIR")]
    looks: Option<PathBuf>,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let session = Session::named(&arguments.session)?;
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
