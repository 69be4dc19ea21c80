//! What this host can do, found out before anything depends on it.
//!
//! Each [`Check`] says what was found and, if that won't do, what to do about it.

mod kvm;
pub mod storage;

use std::path::Path;

use serde::Serialize;

pub use kvm::kvm;
use storage::Storage;

use crate::error::Context as _;
use crate::fscrypt::Policy;
use crate::programs::{Version, default_machine, qemu, qemu_img, run, version};
use crate::{Accelerator, Result, SOCKET_PATH_MAX};

/// The oldest QEMU that is supported.
pub const OLDEST: Version = Version {
    major: 7,
    minor: 2,
    micro: 0,
};
/// The first QEMU that isn't known to work.
const UNTESTED: Version = Version {
    major: 11,
    minor: 0,
    micro: 0,
};
/// The longest name of a socket below a site's directory, with the VM's name in it: what is
/// left of a socket path's 107 bytes is for the directory.
const SOCKET_NAME_ROOM: usize = 48;

/// How a check ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// As it should be.
    Ok,
    /// It works, though not as well as it could.
    Warn,
    /// VMs can't run like this.
    Fail,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What.
    pub name: &'static str,
    /// How it is.
    pub outcome: Outcome,
    /// What was found.
    pub detail: String,
    /// What to do about it, if anything.
    pub remedy: Option<String>,
}

impl Check {
    fn ok(name: &'static str, detail: impl Into<String>) -> Self {
        Self {
            name,
            outcome: Outcome::Ok,
            detail: detail.into(),
            remedy: None,
        }
    }

    fn bad(
        name: &'static str,
        outcome: Outcome,
        detail: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self {
            name,
            outcome,
            detail: detail.into(),
            remedy: Some(remedy.into()),
        }
    }
}

/// The accelerator that [`Accelerator::Auto`] means on this host.
pub fn accelerator() -> Accelerator {
    if kvm().is_ok() {
        Accelerator::Kvm
    } else {
        Accelerator::Tcg
    }
}

/// Memory that can be given to guests, in bytes.
pub fn free_memory() -> Result<u64> {
    let path = Path::new("/proc/meminfo");
    let text = std::fs::read_to_string(path).context("read", path)?;
    available(&text)
        .ok_or_else(|| std::io::Error::from(std::io::ErrorKind::InvalidData))
        .context("understand", path)
}

fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

/// Space for files below an existing directory, in bytes, as an ordinary user may fill it.
pub fn free_space(dir: &Path) -> Result<u64> {
    let filesystem = rustix::fs::statvfs(dir).context("measure", dir)?;
    Ok(filesystem.f_bavail.saturating_mul(filesystem.f_frsize))
}

/// Looks at everything a VM needs: `state_dir` is the site's, or where it will be; `ram_dir`
/// holds RAM files (`/dev/shm` is best); `guest_memory` is in bytes.
pub fn host(state_dir: &Path, ram_dir: &Path, guest_memory: u64) -> Vec<Check> {
    // A directory that isn't there yet will be on its nearest ancestor's filesystem.
    let existing = state_dir
        .ancestors()
        .find(|dir| dir.is_dir())
        .unwrap_or(Path::new("/"));
    vec![
        check_qemu(),
        check_qemu_img(),
        check_machine(),
        check_devices(),
        check_accelerator(),
        check_memory(guest_memory),
        check_space("RAM files", ram_dir, guest_memory),
        // A base image and some generations of overlays and RAM.
        check_space(
            "disk space",
            existing,
            guest_memory.saturating_mul(4).max(4 << 30),
        ),
        check_socket_paths(state_dir),
        check_encryption(existing),
    ]
}

/// Is there a QEMU, of a version that's known to work?
pub fn check_qemu() -> Check {
    const NAME: &str = "QEMU";
    let program = qemu();
    match version(&program) {
        Err(error) => Check::bad(
            NAME,
            Outcome::Fail,
            describe(&error),
            "apt install qemu-system-x86",
        ),
        Ok(found) if found < OLDEST => Check::bad(
            NAME,
            Outcome::Fail,
            format!("{} is version {found}", program.display()),
            format!("install QEMU {OLDEST} or later, as in Debian 12"),
        ),
        Ok(found) if found >= UNTESTED => Check::bad(
            NAME,
            Outcome::Warn,
            format!(
                "{} is version {found}, which is newer than any tested",
                program.display()
            ),
            "if something fails, try a QEMU before 11.0",
        ),
        Ok(found) => Check::ok(NAME, format!("{} {found}", program.display())),
    }
}

/// Is there a `qemu-img`, of the same version?
pub fn check_qemu_img() -> Check {
    const NAME: &str = "qemu-img";
    let program = qemu_img();
    match (version(&program), version(&qemu())) {
        (Err(error), _) => Check::bad(
            NAME,
            Outcome::Fail,
            describe(&error),
            "apt install qemu-utils",
        ),
        (Ok(image), Ok(emulator)) if image != emulator => Check::bad(
            NAME,
            Outcome::Warn,
            format!(
                "{} is version {image}, QEMU is {emulator}",
                program.display()
            ),
            "install qemu-utils and qemu-system-x86 from one release",
        ),
        (Ok(image), _) => Check::ok(NAME, format!("{} {image}", program.display())),
    }
}

/// Which machine type do new VMs get?
pub fn check_machine() -> Check {
    const NAME: &str = "machine type";
    match default_machine(&qemu()) {
        Ok(machine) => Check::ok(NAME, format!("q35 is {machine}")),
        Err(error) => Check::bad(
            NAME,
            Outcome::Fail,
            describe(&error),
            "apt install qemu-system-x86",
        ),
    }
}

/// Does this QEMU have the devices? Some distributions package them apart.
pub fn check_devices() -> Check {
    const NAME: &str = "devices";
    const NEEDED: [&str; 5] = [
        "virtio-vga",
        "virtio-keyboard-pci",
        "virtio-tablet-pci",
        "virtio-blk-pci",
        "virtio-net-pci",
    ];
    match run(&qemu(), ["-device", "help"], "list its devices") {
        Err(error) => Check::bad(
            NAME,
            Outcome::Fail,
            describe(&error),
            "apt install qemu-system-x86",
        ),
        Ok(list) => {
            let missing: Vec<&str> = NEEDED
                .into_iter()
                .filter(|device| !list.contains(&format!("name \"{device}\"")))
                .collect();
            if missing.is_empty() {
                return Check::ok(NAME, "virtio screen, input, disk and network");
            }
            let detail = format!("this QEMU lacks {}", missing.join(", "));
            let remedy = "install all of qemu-system-x86 and qemu-system-common";
            Check::bad(NAME, Outcome::Fail, detail, remedy)
        }
    }
}

/// Does KVM run guests?
pub fn check_accelerator() -> Check {
    const NAME: &str = "accelerator";
    match kvm() {
        Ok(()) => Check::ok(NAME, "KVM runs guests"),
        Err(why) => Check::bad(
            NAME,
            Outcome::Warn,
            format!("KVM doesn't work: {why}; guests are emulated (TCG), ten times slower"),
            "for KVM, use a machine with virtualisation enabled, and be in the group kvm",
        ),
    }
}

/// Is there memory for a guest?
pub fn check_memory(needed: u64) -> Check {
    const NAME: &str = "memory";
    // Besides the guest's RAM: QEMU itself, and translated code.
    let needed = needed.saturating_add(512 << 20);
    match free_memory() {
        Ok(free) if free < needed => Check::bad(
            NAME,
            Outcome::Fail,
            format!(
                "{} MiB are available, a guest needs {} MiB",
                free >> 20,
                needed >> 20
            ),
            "give the guest less memory, or end something else",
        ),
        Ok(free) => Check::ok(NAME, format!("{} MiB are available", free >> 20)),
        Err(error) => Check::bad(NAME, Outcome::Warn, describe(&error), "mount /proc"),
    }
}

/// Is there space in a directory?
pub fn check_space(name: &'static str, dir: &Path, needed: u64) -> Check {
    match free_space(dir) {
        Ok(free) if free < needed => Check::bad(
            name,
            Outcome::Fail,
            format!(
                "{} has {} MiB, {} MiB are needed",
                dir.display(),
                free >> 20,
                needed >> 20
            ),
            format!(
                "make space in {}, or choose another directory",
                dir.display()
            ),
        ),
        Ok(free) => Check::ok(name, format!("{} MiB in {}", free >> 20, dir.display())),
        Err(error) => {
            let remedy = format!("make the directory {}", dir.display());
            Check::bad(name, Outcome::Fail, describe(&error), remedy)
        }
    }
}

/// Do socket paths below a directory fit?
pub fn check_socket_paths(dir: &Path) -> Check {
    const NAME: &str = "socket paths";
    let length = std::path::absolute(dir).map_or(0, |dir| dir.as_os_str().len());
    let most = SOCKET_PATH_MAX - SOCKET_NAME_ROOM;
    if length <= most {
        return Check::ok(NAME, format!("the directory's path has {length} bytes"));
    }
    let detail = format!(
        "the path {} has {length} bytes, {most} leave room",
        dir.display()
    );
    let remedy = "use a directory with a shorter path: the kernel limits unix sockets to 107 bytes";
    Check::bad(NAME, Outcome::Fail, detail, remedy)
}

/// Would what is kept in a directory be encrypted where it is stored?
pub fn check_encryption(dir: &Path) -> Check {
    const NAME: &str = "at rest";
    let (policy, storage) = (crate::fscrypt::policy(dir), storage::of(dir));
    let place = dir.display();
    match (policy, storage) {
        (Ok(Policy::Encrypted(_) | Policy::Other), _) => {
            Check::ok(NAME, format!("{place} is encrypted by its file system"))
        }
        (_, Storage::Encrypted(name)) => {
            Check::ok(NAME, format!("{place} lies on {name}, encrypted"))
        }
        (_, Storage::Memory) => Check::ok(NAME, format!("{place} lies in memory")),
        (Ok(Policy::None), _) => Check::ok(
            NAME,
            format!("the file system of {place} encrypts what is kept from now on"),
        ),
        (_, Storage::Clear(name) | Storage::Unknown(name)) => Check::bad(
            NAME,
            Outcome::Warn,
            format!("{place} lies on {name} in the clear, as far as can be seen"),
            "use ext4 with encryption switched on (`tune2fs -O encrypt`), or dm-crypt",
        ),
    }
}

/// An error and its causes.
fn describe(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_host_is_described() {
        let dir = tempfile::tempdir().unwrap();
        let checks = host(&dir.path().join("not/yet/there"), dir.path(), 64 << 20);
        for check in &checks {
            // A remedy exactly where there is something to remedy.
            assert_eq!(
                check.remedy.is_some(),
                check.outcome != Outcome::Ok,
                "{check:?}"
            );
        }
        for name in ["QEMU", "machine type", "devices"] {
            let check = checks.iter().find(|check| check.name == name).unwrap();
            assert_eq!(check.outcome, Outcome::Ok, "{check:?}");
        }
        assert_eq!(accelerator() == Accelerator::Kvm, kvm().is_ok());
    }

    #[test]
    fn too_little_is_noticed() {
        assert_eq!(check_memory(u64::MAX / 2).outcome, Outcome::Fail);
        assert_eq!(
            check_space("x", Path::new("/"), u64::MAX).outcome,
            Outcome::Fail
        );
        assert_eq!(
            check_space("x", Path::new("/nonexistent"), 1).outcome,
            Outcome::Fail
        );
        let long = Path::new("/").join("x".repeat(60));
        assert_eq!(check_socket_paths(&long).outcome, Outcome::Fail);
        assert_eq!(
            available("MemTotal: 9 kB\nMemAvailable:   12 kB\n"),
            Some(12 << 10)
        );
        assert_eq!(available("MemTotal: 9 kB\n"), None);
    }
}
