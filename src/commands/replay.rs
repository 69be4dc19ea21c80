//! `replay-migrate replay`

use std::fmt::Write as _;
use std::path::Path;

use site::VmDir;
use site::replaying::{Pace, ReplayOptions, Replayed, replay_and_discard};

use crate::args::ReplayArgs;
use crate::output::Output;

pub(crate) async fn run(
    vm: &VmDir,
    log: &Path,
    args: ReplayArgs,
    output: &Output,
) -> anyhow::Result<()> {
    let (speed, pace) = pace(args.quick, args.speed);
    let options = ReplayOptions {
        speed,
        pace,
        pictures: args.misses,
    };
    let progress = output.progress();
    let replayed = replay_and_discard(vm, log, &options, progress.as_ref()).await?;
    drop(progress);
    output.result(&replayed, |replayed| told(replayed, &options))
}

/// How `--quick` and `--speed` go together: the one makes a bound of the other.
pub(super) fn pace(quick: bool, speed: Option<f64>) -> (f64, Pace) {
    match (quick, speed) {
        (true, at_most) => (1.0, Pace::quick(at_most)),
        (false, speed) => (speed.unwrap_or(1.0), Pace::Recorded),
    }
}

fn told(replayed: &Replayed, options: &ReplayOptions) -> String {
    let summary = &replayed.summary;
    let mut told = format!(
        "{} events replayed in {:.1} s (recorded in {:.1} s); {} anchors matched, {} missed; \
         the guest {} to rest",
        summary.events,
        summary.seconds,
        summary.recorded_seconds,
        summary.matched,
        summary.missed,
        if summary.came_to_rest {
            "came"
        } else {
            "did not come"
        }
    );
    // Writing to a string does not fail.
    if let Some(diverged) = replayed.diverged {
        let _ = write!(
            told,
            "; given up {diverged}, {} interactions left out",
            replayed.skipped
        );
    }
    if let Some(dir) = options
        .pictures
        .as_deref()
        .filter(|_| replayed.pictures > 0)
    {
        let _ = write!(
            told,
            "; {} pictures of what was missed in {}",
            replayed.pictures,
            dir.display()
        );
    }
    told
}
