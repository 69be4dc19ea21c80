//! `replay-migrate seed`

use site::{Store, source};

use super::vm_of;
use crate::output::{Output, bytes};

pub(crate) async fn run(
    store: &Store,
    name: &str,
    to: &str,
    output: &Output,
) -> anyhow::Result<()> {
    let vm = vm_of(store, name).await?;
    vm.record()?;
    let peer = super::peer_of(store, to)?;
    let progress = output.progress();
    let report = source::seed(&vm, &peer, progress.as_ref()).await?;
    drop(progress);
    output.result(&report, |report| {
        format!(
            "{} has generation {} of {name}; {} sent in {:.1} s",
            peer.name,
            report.generation,
            bytes(report.bytes.sent),
            report.seconds
        )
    })
}
