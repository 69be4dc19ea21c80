//! `replay-migrate supply`

use anyhow::bail;
use site::{Store, source};

use super::serve::OnSignal;
use super::vm_of;
use crate::output::{Output, bytes};

pub(crate) async fn run(store: &Store, name: &str, output: &Output) -> anyhow::Result<()> {
    let vm = vm_of(store, name).await?;
    vm.record()?;
    let progress = output.progress();
    let cancel = OnSignal::new();
    let brought = source::supply(&vm, progress.as_ref(), &cancel.token).await;
    drop(cancel);
    drop(progress);
    let Some(report) = brought? else {
        bail!(site::Error::Refused(format!(
            "nothing of the disk of {name} is to be brought anywhere, or somebody is at it (the agent of this site)"
        )));
    };
    output.result(&report, |report| {
        format!(
            "all of the disk of {name} is there; {} sent in {:.1} s",
            bytes(report.sent),
            report.seconds
        )
    })
}
