//! What the overlays of a VM's last run rest on.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use vm_host::Vm;

use crate::error::{Error, Result};
use crate::files;
use crate::store::VmDir;

/// What the overlays of a VM's last run rest on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Live {
    /// The generation it was restored from or last checkpointed as; `None` after a first boot.
    pub generation: Option<u64>,
    /// File names of the top overlays in the live folder, one a disk.
    pub overlays: Vec<String>,
    /// Whether the guest has run since that generation.
    pub ran: bool,
}

impl Live {
    fn path(vm: &VmDir) -> PathBuf {
        vm.live_dir().join("live.json")
    }

    pub(crate) fn load(vm: &VmDir) -> Result<Option<Self>> {
        files::read_json(&Self::path(vm))
    }

    pub(crate) fn store(&self, vm: &VmDir) -> Result<()> {
        files::write_json(&Self::path(vm), self)
    }

    /// What the disks of a running VM rest on, as QEMU has it: a checkpoint that was killed
    /// after it swapped the overlays has not noted that.
    pub(crate) async fn of_running(vm: &VmDir, qemu: &Vm) -> Result<Self> {
        let live = Self::load(vm)?.ok_or_else(|| Error::Damaged {
            path: vm.live_dir(),
            reason: "the VM runs, but what its disks rest on is not noted".into(),
        })?;
        let tops = qemu.disks().await.map_err(Error::host(format!(
            "cannot ask the QEMU of {} for its disks",
            vm.name()
        )))?;
        let healed = live.with_tops(&tops)?;
        if healed != live {
            tracing::warn!(vm = %vm.name(), "noting overlays that a checkpoint left unnoted");
            healed.store(vm)?;
        }
        Ok(healed)
    }

    /// The same, with the overlays that are really on top.
    pub(super) fn with_tops(&self, tops: &[PathBuf]) -> Result<Self> {
        let overlays = tops
            .iter()
            .map(|top| {
                top.file_name()
                    .and_then(|name| name.to_str())
                    .map(str::to_owned)
                    .ok_or_else(|| Error::Damaged {
                        path: top.clone(),
                        reason: "QEMU uses it as a disk, and it is none of ours".into(),
                    })
            })
            .collect::<Result<Vec<_>>>()?;
        if overlays == self.overlays {
            return Ok(self.clone());
        }
        Ok(Self {
            generation: self.generation,
            overlays,
            ran: true,
        })
    }

    /// The top overlays, as paths.
    pub(crate) fn overlay_paths(&self, vm: &VmDir) -> Vec<PathBuf> {
        self.overlays
            .iter()
            .map(|name| vm.live_dir().join(name))
            .collect()
    }
}
