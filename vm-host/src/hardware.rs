//! What a virtual machine is made of: the part of it that both sites must agree on, and how
//! one site runs it.
//!
//! [`Hardware`] and [`Boot`] travel in manifests: a QEMU started from equal ones can load the
//! other's device state. Everything in [`Launch`] besides is local to a site.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::{Error, Result, SOCKET_PATH_MAX};

/// The hardware a guest sees. It must not change over a VM's life.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hardware {
    /// QEMU's machine type with its version (`pc-q35-7.2`): an alias such as `q35` means other
    /// hardware in every QEMU.
    pub machine: String,
    /// A named CPU model, with its version (`Nehalem-v1`); `host` and `max` differ by host.
    pub cpu: String,
    /// RAM in MiB.
    pub memory_mib: u32,
    /// Number of virtual CPUs.
    pub cpus: u8,
    /// Preferred width of the screen in pixels.
    pub screen_width: u16,
    /// Preferred height of the screen in pixels.
    pub screen_height: u16,
    /// Whether there is a network card.
    pub network: bool,
    /// With N, the guest's time is counted by the instructions that it executes, 2^N ns each, see [`Self::ICOUNT`];
    /// otherwise the host's clock tells it. Part of the device state, and TCG alone can do it.
    #[serde(default)]
    pub icount: Option<u8>,
}

impl Hardware {
    /// The CPU model used when none is named: runs under KVM on any Intel host of the last
    /// decade and under TCG, and has no RDRAND and RDSEED, whose numbers no replay can repeat.
    pub const DEFAULT_CPU: &str = "Nehalem-v1";

    /// What an instruction takes where instructions are counted and nobody says how long: 2 ns, which is about what
    /// TCG needs for one on hosts of our day, so that the guest's clock goes like the host's.
    ///
    /// While the guest has something to do its clock goes as fast as it gets on, whatever else the host does; while
    /// it waits, as the host's. So what a program does before a timer expires, and who is interrupted
    /// where, is the same in each replay. QEMU calls it `-icount shift=N` (qemu-options, "TCG Instruction Counting" in
    /// its developers' manual).
    pub const ICOUNT: u8 = 1;

    /// A machine of the given versioned type with 768 MiB, one CPU and a 1280x800 screen.
    pub fn new(machine: impl Into<String>) -> Self {
        Self {
            machine: machine.into(),
            cpu: Self::DEFAULT_CPU.to_owned(),
            memory_mib: 768,
            cpus: 1,
            screen_width: 1280,
            screen_height: 800,
            network: true,
            icount: None,
        }
    }

    /// Size of the guest's RAM in bytes.
    pub fn memory_bytes(&self) -> u64 {
        u64::from(self.memory_mib) << 20
    }

    /// Checks every field against what QEMU takes and what makes sense, before anything is
    /// started or allocated. A description may come from another site.
    pub fn validate(&self) -> Result<()> {
        let bounds = |what, value: String, ok, bounds| {
            if ok {
                Ok(())
            } else {
                Err(Error::OutOfBounds {
                    what,
                    value,
                    bounds,
                })
            }
        };
        // Both end up inside a comma-separated QEMU option.
        let word = |text: &str, extra: &[char]| {
            (1..=64).contains(&text.len())
                && text
                    .chars()
                    .all(|c| c.is_ascii_alphanumeric() || "._-".contains(c) || extra.contains(&c))
        };
        let versioned = self
            .machine
            .strip_prefix("pc-q35-")
            .is_some_and(|version| version.starts_with(|c: char| c.is_ascii_digit()));
        bounds(
            "the machine type",
            format!("{:?}", self.machine),
            versioned && word(&self.machine, &[]),
            "a versioned q35 machine such as pc-q35-7.2",
        )?;
        bounds(
            "the CPU model",
            format!("{:?}", self.cpu),
            word(&self.cpu, &[',', '+', '=']) && self.cpu != "host",
            "a named model such as Nehalem-v1, optionally with features (max,-rdrand)",
        )?;
        bounds(
            "the memory",
            format!("{} MiB", self.memory_mib),
            (32..=1 << 20).contains(&self.memory_mib),
            "between 32 MiB and 1 TiB",
        )?;
        bounds(
            "the number of CPUs",
            self.cpus.to_string(),
            (1..=64).contains(&self.cpus),
            "between 1 and 64",
        )?;
        bounds(
            "the screen size",
            format!("{}x{}", self.screen_width, self.screen_height),
            (320..=5120).contains(&self.screen_width) && (200..=2160).contains(&self.screen_height),
            "between 320x200 and 5120x2160, what QEMU's VNC server shows",
        )?;
        let shift = self.icount.unwrap_or(Self::ICOUNT);
        bounds(
            "the time of an instruction",
            format!("2^{shift} ns"),
            shift <= 10,
            "2^0 to 2^10 ns",
        )
    }
}

/// A kernel that QEMU boots itself, for guests without a boot loader.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Boot {
    /// The kernel image.
    pub kernel: PathBuf,
    /// Its initial RAM disk, if it needs one.
    pub initrd: Option<PathBuf>,
    /// The kernel command line.
    pub append: String,
}

/// What executes the guest's instructions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accelerator {
    /// KVM where a probe shows that it runs guests, else TCG.
    #[default]
    Auto,
    /// The processor's virtualisation extensions.
    Kvm,
    /// QEMU's emulator.
    Tcg,
}

/// Where the network card's cable goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Network {
    /// Into QEMU's user-mode network: the guest reaches out, nobody reaches in.
    #[default]
    Connected,
    /// Nowhere: link down, and nothing forwarded. For replays.
    Unplugged,
}

/// Everything needed to start a VM on this host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Launch {
    /// The VM's name, for messages and the process list.
    pub name: String,
    /// What the guest sees.
    pub hardware: Hardware,
    /// A kernel to boot directly; the disk's boot loader otherwise. Needed again when device
    /// state is loaded, as the guest may reboot.
    pub boot: Option<Boot>,
    /// What runs the guest.
    pub accelerator: Accelerator,
    /// Where sockets, logs and the process record go; made with mode 0700 if missing. One VM a
    /// directory.
    pub runtime_dir: PathBuf,
    /// The guest's RAM: a file, best on a tmpfs. Kept when `incoming`, made anew otherwise.
    pub ram: PathBuf,
    /// qcow2 images, in the guest's order.
    pub disks: Vec<PathBuf>,
    /// For each disk whose base image has not arrived yet, the unix socket at which it is read instead, see
    /// [`crate::nbd`]. Disks beyond its end have theirs.
    #[serde(default)]
    pub arriving: Vec<Option<PathBuf>>,
    /// Whether the network is plugged in.
    pub network: Network,
    /// Start empty and wait for [`crate::Vm::load_device_state`] instead of booting.
    pub incoming: bool,
}

/// Most disks a machine gets: they have fixed PCI slots.
pub const DISKS_MAX: usize = 8;

impl Launch {
    /// Makes paths absolute and checks what can be checked before QEMU is started.
    pub(crate) fn checked(&self) -> Result<Self> {
        self.hardware.validate()?;
        if self.hardware.icount.is_some() && self.accelerator == Accelerator::Kvm {
            return Err(Error::OutOfBounds {
                what: "the accelerator",
                value: "KVM".into(),
                bounds: "TCG, or the one that is chosen by itself, for a VM whose instructions are counted",
            });
        }
        let name_ok = (1..=64).contains(&self.name.len())
            && self
                .name
                .chars()
                .all(|c| c.is_alphanumeric() || "._- ".contains(c));
        if !name_ok {
            return Err(Error::OutOfBounds {
                what: "the VM's name",
                value: format!("{:?}", self.name),
                bounds: "1 to 64 bytes of letters, digits, dots, dashes, underscores and spaces",
            });
        }
        if self.disks.len() > DISKS_MAX {
            return Err(Error::OutOfBounds {
                what: "the number of disks",
                value: self.disks.len().to_string(),
                bounds: "at most 8",
            });
        }
        let mut launch = self.clone();
        launch.runtime_dir = absolute(&self.runtime_dir)?;
        launch.ram = absolute(&self.ram)?;
        launch.disks = self
            .disks
            .iter()
            .map(|disk| absolute(disk))
            .collect::<Result<_>>()?;
        for socket in launch.arriving.iter_mut().flatten() {
            *socket = absolute(socket)?;
            check_socket_path(socket)?;
        }
        if let Some(boot) = &mut launch.boot {
            boot.kernel = absolute(&boot.kernel)?;
            boot.initrd = boot.initrd.as_deref().map(absolute).transpose()?;
        }
        Ok(launch)
    }
}

fn absolute(path: &Path) -> Result<PathBuf> {
    if path.to_str().is_none() {
        let problem = "is not UTF-8, which QMP can't carry; rename it";
        return Err(Error::Path {
            path: path.to_owned(),
            problem,
        });
    }
    std::path::absolute(path).map_err(|source| Error::Io {
        doing: "make absolute the path",
        path: path.to_owned(),
        source,
    })
}

/// Checks that a unix socket can have this path.
pub(crate) fn check_socket_path(path: &Path) -> Result<()> {
    let length = path.as_os_str().len();
    if length > SOCKET_PATH_MAX {
        return Err(Error::SocketPath {
            path: path.to_owned(),
            length,
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_are_checked() {
        let good = Hardware::new("pc-q35-7.2");
        good.validate().unwrap();
        let bad: [fn(&mut Hardware); 10] = [
            |h| h.machine = "q35".into(),
            |h| h.machine = "pc-q35-7.2,usb=on".into(),
            |h| h.machine = "pc-i440fx-7.2".into(),
            |h| h.cpu = "host".into(),
            |h| h.cpu = "Nehalem-v1 -device x".into(),
            |h| h.memory_mib = 0,
            |h| h.memory_mib = u32::MAX,
            |h| h.cpus = 0,
            |h| h.screen_width = 10_000,
            |h| h.icount = Some(11),
        ];
        for (index, spoil) in bad.iter().enumerate() {
            let mut hardware = good.clone();
            spoil(&mut hardware);
            assert!(hardware.validate().is_err(), "case {index}: {hardware:?}");
        }
    }

    #[test]
    fn hardware_from_before_there_was_counting_does_not_count() {
        let hardware = Hardware::new("pc-q35-7.2");
        let mut json = serde_json::to_value(&hardware).unwrap();
        json.as_object_mut().unwrap().remove("icount");
        assert_eq!(serde_json::from_value::<Hardware>(json).unwrap(), hardware);
    }

    #[test]
    fn socket_paths_have_a_limit() {
        let path = |length: usize| PathBuf::from("/".to_owned() + &"x".repeat(length - 1));
        check_socket_path(&path(107)).unwrap();
        let error = check_socket_path(&path(108)).unwrap_err().to_string();
        assert!(
            error.contains("108 bytes") && error.contains("107"),
            "{error}"
        );
    }
}
