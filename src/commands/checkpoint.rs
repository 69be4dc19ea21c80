//! `replay-migrate checkpoint`

use site::{VmDir, local};

use crate::output::{Output, bytes};

pub(crate) async fn run(vm: &VmDir, output: &Output) -> anyhow::Result<()> {
    let manifest = local::checkpoint(vm).await?;
    output.result(&manifest, |manifest| {
        format!(
            "{} is at generation {}: {} of RAM, {} of device state",
            vm.name(),
            manifest.generation,
            bytes(manifest.ram.bytes),
            bytes(manifest.device.bytes)
        )
    })
}
