//! `replay-migrate capture`

use site::VmDir;
use site::capture::{CaptureOptions, capture};

use super::replay;
use crate::args::CaptureArgs;
use crate::output::Output;

pub(crate) async fn run(vm: &VmDir, args: CaptureArgs, output: &Output) -> anyhow::Result<()> {
    let (speed, pace) = replay::pace(args.quick, args.speed);
    let options = CaptureOptions {
        out: args.out,
        speed,
        pace,
        replays: args.replays,
        quick_replays: args.quick_replays,
    };
    let progress = output.progress();
    let captured = capture(vm, &options, progress.as_ref()).await?;
    drop(progress);
    output.result(&captured, |captured| {
        format!(
            "{}: {:.1} s of {} after generation {}, replayed {} times",
            options.out.display(),
            captured.micros as f64 / 1e6,
            captured.vm,
            captured.generation,
            captured.replays.len()
        )
    })
}
