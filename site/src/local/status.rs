//! What a VM is and does at this site.

use std::path::PathBuf;

use serde::Serialize;
use vm_host::{Status, Vm};

use super::{Live, attach, guest_status};
use crate::arriving;
use crate::error::Result;
use crate::lease::Lease;
use crate::recording::{self, Logging};
use crate::source;
use crate::store::VmDir;
use crate::vm::VmRecord;

/// What a VM does at this site.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum VmState {
    /// Its guest runs.
    Running,
    /// QEMU holds it, stopped.
    Paused,
    /// There is no QEMU; it starts from its newest generation, or boots.
    Stopped,
    /// Another site runs it; here is a stale copy.
    Elsewhere,
    /// Its hand-over was cut off; see [`Lease::Offered`].
    InDoubt,
}

/// One line of `vm list`.
#[derive(Clone, Debug, Serialize)]
pub struct VmStatus {
    /// What the VM is.
    #[serde(flatten)]
    pub record: VmRecord,
    /// What it does here.
    pub state: VmState,
    /// Whether this site may run it.
    pub lease: Lease,
    /// The generations held here.
    pub generations: Vec<u64>,
    /// The generation that the running state rests on.
    pub base: Option<u64>,
    /// QEMU's process.
    pub pid: Option<u32>,
    /// Where a VNC viewer can reach the guest without being recorded.
    pub vnc: Option<PathBuf>,
    /// Whether it is being recorded, and what is typed gets into the log.
    pub recording: Option<Logging>,
    /// Bytes of its disks that are still to come from another site, by what was noted last.
    pub arriving: u64,
    /// The site that the rest of its disks is owed, where it moved there and not all of them has.
    pub owed: Option<String>,
}

/// What a VM is and does.
pub async fn status(vm: &VmDir) -> Result<VmStatus> {
    let record = vm.record()?;
    let lease = vm.lease()?;
    let qemu = attach(vm).await?;
    let recording = match &qemu {
        Some(_) => recording::logging(vm).await,
        None => None,
    };
    let state = match (&lease, &qemu) {
        (Lease::Offered { .. }, _) => VmState::InDoubt,
        (Lease::Elsewhere { .. }, _) => VmState::Elsewhere,
        (Lease::Held { .. }, None) => VmState::Stopped,
        (Lease::Held { .. }, Some(qemu)) => match guest_status(vm, qemu).await? {
            Status::Running => VmState::Running,
            _ => VmState::Paused,
        },
    };
    let mut arriving = 0;
    for disk in &record.disks {
        arriving += arriving::missing(vm.store(), disk.hash)?.map_or(0, |(bytes, _)| bytes);
    }
    Ok(VmStatus {
        arriving,
        owed: source::owed(vm)?.map(|(_, name)| name),
        record,
        state,
        lease,
        generations: vm
            .generations()?
            .iter()
            .map(|manifest| manifest.generation)
            .collect(),
        base: Live::load(vm)?.and_then(|live| live.generation),
        pid: qemu.as_ref().map(Vm::pid),
        vnc: qemu.as_ref().map(|qemu| qemu.vnc_socket().to_owned()),
        recording,
    })
}
