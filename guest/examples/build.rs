//! Builds the demo desktop without the command line: `cargo run -p guest --example build -- [OUT]`.

use guest::{BuildOptions, GuestError, Progress, build, default_cache};

fn main() -> Result<(), GuestError> {
    let options = BuildOptions {
        out: std::env::args_os().nth(1).map(Into::into),
        cache: default_cache()?,
    };
    let image = build(&options, |progress| match progress {
        Progress::Step(step) => eprintln!("{step}"),
        other => eprintln!("{other:?}"),
    })?;
    println!("{image:#?}");
    Ok(())
}
