//! Making a VM.

use std::path::PathBuf;

use vm_host::Hardware;

use super::blocking;
use crate::chain::Chain;
use crate::error::{Error, Result};
use crate::lease::{Lease, Title};
use crate::leftovers;
use crate::store::VmDir;
use crate::vm::{BootFiles, Id, VmRecord};

/// Kernel parameters that take chance out of a Linux guest, so that a replay comes closer.
///
/// - `norandmaps`: programs get the same addresses in every run. It costs address-space
///   randomisation, a defence against exploits of memory errors in programs.
/// - `init_on_free=1`: freed memory is zero and not garbage that no replay repeats. It costs some
///   time, and is a defence.
/// - `transparent_hugepage=never`: the kernel does not move memory about in idle time, which the
///   original has more of than its copy. It costs some speed in programs with much memory.
/// - `random.trust_cpu=off`: the kernel's random numbers are not stirred by the host's RDRAND.
/// - `randomize_kstack_offset=off`: system calls get the same stack in every run. It costs a
///   defence against exploits of memory errors in the kernel.
/// - `systemd.setenv=`: what systemd starts has an environment in which the C library and GLib allocate
///   memory in the simplest way they know. Freed pieces go back to one list of the heap at once
///   (`tcache_count=0`, `mxfast=0`, `G_SLICE`), so that a program that asked for some more in
///   between has the same heap as before, and pieces hold no garbage (`perturb=255`: zeros when they
///   are given out). It costs programs some time; one that reads memory that it has freed breaks.
/// - `XSERVER_OPTIONS`, by the same way, for whatever starts the X server, if it heeds that:
///   without a thread for input and signals of a timer (`-dumbSched`), it does things in an order that
///   depends less on chance. While it is busy for a program, the pointer stands still.
///
/// With an initial RAM disk `rootflags=noatime` is added, unless `rootflags=` is there: reading a file does not write
/// to the disk. (Without one the kernel itself would have to know the option.)
///
/// See `kernel-parameters.txt` of Linux, kernel-command-line(7) of systemd, Xserver(1), "Memory Allocation Tunables"
/// in the GNU C library's manual, and "Running GLib Applications" in GLib's.
pub const REPLAY_FRIENDLY: &str = "norandmaps init_on_free=1 transparent_hugepage=never random.trust_cpu=off \
     randomize_kstack_offset=off \
     systemd.setenv=GLIBC_TUNABLES=glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0:glibc.malloc.perturb=255 \
     systemd.setenv=G_SLICE=always-malloc systemd.setenv=XSERVER_OPTIONS=-dumbSched";

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
    /// Boot it with [`REPLAY_FRIENDLY`].
    pub replay_friendly: bool,
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

/// A kernel's command line with what takes chance out of the guest.
fn friendly(append: &str, has_initrd: bool) -> String {
    let mut has_rootflags = append.split_ascii_whitespace();
    let noatime = has_initrd && !has_rootflags.any(|word| word.starts_with("rootflags="));
    let more = if noatime { " rootflags=noatime" } else { "" };
    format!("{append} {REPLAY_FRIENDLY}{more}")
        .trim_start()
        .to_owned()
}

/// Removes what a VM of this name has left that did not arrive whole: a new one has nothing of it.
fn clear_place(vm: &VmDir) -> Result<()> {
    if vm.dir().exists() {
        let _lock = vm.lock()?;
        if vm.try_record()?.is_none() {
            leftovers::remove_vm(vm)?;
        }
    }
    Ok(())
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
    if new.replay_friendly && new.boot.is_none() {
        return Err(Error::Refused(format!(
            "a disk that boots by itself has its own kernel parameters: add '{REPLAY_FRIENDLY}' \
             in the guest, or boot it with --kernel"
        )));
    }
    clear_place(vm)?;
    let store = vm.store();
    let boot = match &new.boot {
        None => None,
        Some((kernel, initrd, append)) => Some(BootFiles {
            kernel: store.import_file(kernel)?,
            initrd: initrd
                .as_deref()
                .map(|path| store.import_file(path))
                .transpose()?,
            append: if new.replay_friendly {
                friendly(append, initrd.is_some())
            } else {
                append.clone()
            },
        }),
    };
    let record = VmRecord {
        id: Id::random()?,
        name: vm.name().clone(),
        hardware: new.hardware.clone(),
        disks: vec![store.import_disk(&new.disk)?],
        boot,
        ready_marker: new.ready_marker.clone(),
        replay_friendly: new.replay_friendly,
    };
    record.validate()?;
    let held = Lease::Held {
        fence: 1,
        transfer: None,
    };
    let chain = Chain::start(record.id, held.fence(), &store.identity()?);
    vm.create(&record, Title::new(held, chain))?;
    Ok(record)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_command_line_says_already_is_not_taken_back() {
        let asked = "root=/dev/vda rw \"x=a  b\"";
        let line = friendly(asked, true);
        assert_eq!(
            line,
            format!("{asked} {REPLAY_FRIENDLY} rootflags=noatime"),
            "the user's own first, letter by letter"
        );
        // The kernel itself mounts the disk, and refuses options that its file system does not know.
        assert!(!friendly(asked, false).contains("rootflags"));
        let own = "root=/dev/vda rootflags=subvol=@";
        assert_eq!(friendly(own, true), format!("{own} {REPLAY_FRIENDLY}"));
        assert!(!friendly("", false).starts_with(' '));
    }
}
