//! Making a VM.

use std::path::PathBuf;

use vm_host::Hardware;

use super::blocking;
use crate::error::{Error, Result};
use crate::lease::Lease;
use crate::store::VmDir;
use crate::vm::{BootFiles, Id, VmRecord};

/// What to make a VM from.
#[derive(Clone, Debug)]
pub struct NewVm {
    /// The disk image, of any format that qemu-img reads; it is copied, unless nobody may write
    /// to it.
    pub disk: PathBuf,
    /// Direct kernel boot: kernel, initial RAM disk, command line.
    pub boot: Option<(PathBuf, Option<PathBuf>, String)>,
    /// What QEMU emulates.
    pub hardware: Hardware,
    /// The line that the guest writes to its serial port once its desktop is up.
    pub ready_marker: Option<String>,
    /// The cache of booted guests, see [`crate::booted`]: a VM that is in it need not boot.
    pub booted: Option<PathBuf>,
}

/// Makes a VM; it does not run yet. One that is in the cache of booted guests begins with a
/// generation.
pub async fn create_from(vm: &VmDir, new: &NewVm) -> Result<VmRecord> {
    let record = {
        let (vm, new) = (vm.clone(), new.clone());
        blocking(move || create(&vm, &new)).await?
    };
    if let Some(cache) = &new.booted {
        crate::booted::adopt(vm, &record, cache).await?;
    }
    Ok(record)
}

/// Makes a VM that has not booted.
pub(crate) fn create(vm: &VmDir, new: &NewVm) -> Result<VmRecord> {
    new.hardware
        .validate()
        .map_err(Error::host(format!("the hardware of {}", vm.name())))?;
    if vm.try_record()?.is_some() {
        return Err(Error::Refused(format!(
            "there is a VM {} already; take another name, or `replay-migrate vm delete` it",
            vm.name()
        )));
    }
    let store = vm.store();
    let boot = match &new.boot {
        None => None,
        Some((kernel, initrd, append)) => Some(BootFiles {
            kernel: store.import_file(kernel)?,
            initrd: initrd
                .as_deref()
                .map(|path| store.import_file(path))
                .transpose()?,
            append: append.clone(),
        }),
    };
    let record = VmRecord {
        id: Id::random()?,
        name: vm.name().clone(),
        hardware: new.hardware.clone(),
        disks: vec![store.import_disk(&new.disk)?],
        boot,
        ready_marker: new.ready_marker.clone(),
    };
    record.validate()?;
    vm.create(
        &record,
        &Lease::Held {
            fence: 1,
            transfer: None,
        },
    )?;
    Ok(record)
}
