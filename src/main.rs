//! The `replay-migrate` command: moves a running desktop VM between sites.
//!
//! The command line only: each command of [`args`] has a file in [`commands`], which calls the
//! libraries and prints what they say. Exit codes are [`exit`]'s.

mod args;
mod commands;
mod exit;
mod output;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let args = args::Args::parse();
    let output = output::Output::new(args.json, args.quiet);
    output::log_to_stderr(args.verbose);
    let outcome = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(anyhow::Error::from)
        .and_then(|runtime| runtime.block_on(commands::run(args, &output)));
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            output.error(&error);
            exit::code_of(&error)
        }
    }
}
