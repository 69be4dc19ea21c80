//! Puts a thin line before any TCP port, until Ctrl-C.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use clap::Parser;
use testkit::link::{Link, LinkProfile, Rate, parse_delay};

/// A thin line before a TCP port: limited rate, late arrival.
#[derive(Parser)]
#[command(name = "thin-link")]
struct Arguments {
    /// Where to listen; port 0 takes a free one, which is printed.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    /// The port behind the line.
    #[arg(long, value_name = "ADDR")]
    to: SocketAddr,
    /// Payload per second, each way, such as 10mbit.
    #[arg(long)]
    rate: Rate,
    /// From the port behind the line back to the caller, where that differs.
    #[arg(long, value_name = "RATE")]
    rate_down: Option<Rate>,
    /// Propagation each way, such as 50ms.
    #[arg(long, value_parser = parse_delay)]
    delay: Duration,
}

fn main() -> io::Result<()> {
    let arguments = Arguments::parse();
    let mut profile = LinkProfile::symmetric(arguments.rate, arguments.delay);
    profile.down = arguments.rate_down.unwrap_or(profile.down);
    let link = Link::start_on(arguments.listen, arguments.to, profile)?;
    println!(
        "{} -> {}: {} there, {} back, {:?} each way; Ctrl-C ends it",
        link.addr(),
        arguments.to,
        profile.up,
        profile.down,
        profile.delay
    );
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(tokio::signal::ctrl_c())?;
    println!(
        "{} bytes there, {} back",
        link.bytes_up(),
        link.bytes_down()
    );
    Ok(())
}
