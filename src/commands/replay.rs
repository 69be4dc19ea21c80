//! `replay-migrate replay`

use std::path::Path;

use site::{VmDir, replaying};

use crate::output::Output;

pub(crate) async fn run(vm: &VmDir, log: &Path, speed: f64, output: &Output) -> anyhow::Result<()> {
    let progress = output.progress();
    let summary = replaying::replay_and_discard(vm, log, speed, progress.as_ref()).await?;
    drop(progress);
    output.result(&summary, |summary| {
        format!(
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
        )
    })
}
