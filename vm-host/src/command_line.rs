//! QEMU's command line.
//!
//! Devices, their identifiers and their PCI slots are part of what device state can be loaded
//! into: changing any of them here makes old generations unloadable. What is not visible to
//! the guest (sockets, files, the accelerator, the network's far end) may change.

use std::path::Path;

use serde_json::json;

use crate::hardware::{Accelerator, Launch, Network};
use crate::runtime::Paths;

/// Translated code kept by TCG, in MiB. QEMU's default is an eighth of the RAM up to 1 GiB.
const TB_SIZE_MIB: u32 = 256;
/// The PCI slot of the first disk; the slots before it are taken or reserved.
const FIRST_DISK_SLOT: usize = 8;

/// In QEMU's comma-separated options a comma in a value is written twice.
fn value(path: &Path) -> String {
    path.to_string_lossy().replace(',', ",,")
}

/// The arguments, for a launch with absolute paths and an accelerator that is decided.
pub(crate) fn arguments(launch: &Launch, accelerator: Accelerator, paths: &Paths) -> Vec<String> {
    let hardware = &launch.hardware;
    let mut args = Vec::new();
    let mut add = |words: &[&str]| args.extend(words.iter().map(|&word| word.to_owned()));

    add(&[
        "-name",
        &launch.name,
        "-no-user-config",
        "-nodefaults",
        "-display",
        "none",
    ]);
    // It parses what guests, viewers and other sites send; it needs none of these.
    add(&[
        "-sandbox",
        "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
    ]);
    add(&[
        "-machine",
        &format!("{},memory-backend=ram0", hardware.machine),
    ]);
    add(&["-cpu", &hardware.cpu, "-smp", &hardware.cpus.to_string()]);
    match accelerator {
        Accelerator::Kvm => add(&["-accel", "kvm"]),
        _ => add(&["-accel", &format!("tcg,thread=multi,tb-size={TB_SIZE_MIB}")]),
    }
    add(&["-m", &format!("{}M", hardware.memory_mib), "-object"]);
    add(&[&format!(
        "memory-backend-file,id=ram0,size={}M,mem-path={},share=on",
        hardware.memory_mib,
        value(&launch.ram)
    )]);
    // The guest's clock stands still while it is paused, or moved.
    add(&["-rtc", "base=utc,clock=vm"]);

    add(&["-vga", "none", "-device"]);
    add(&[&format!(
        "virtio-vga,id=screen,bus=pcie.0,addr=1,xres={},yres={}",
        hardware.screen_width, hardware.screen_height
    )]);
    add(&[
        "-device",
        "virtio-keyboard-pci,id=keyboard,bus=pcie.0,addr=2",
    ]);
    add(&["-device", "virtio-tablet-pci,id=tablet,bus=pcie.0,addr=3"]);
    if hardware.network {
        // Slirp has migrated state of its own, so unplugged isn't another back end, but the
        // same one with nothing to reach.
        let restrict = if launch.network == Network::Unplugged {
            ",restrict=on"
        } else {
            ""
        };
        add(&["-netdev", &format!("user,id=net0{restrict}"), "-device"]);
        // No boot ROM: it would be migrated, and come from a package of its own.
        add(&["virtio-net-pci,id=nic0,netdev=net0,bus=pcie.0,addr=4,romfile="]);
    }
    for (index, disk) in launch.disks.iter().enumerate() {
        let node = json!({
            "driver": "qcow2",
            "node-name": format!("disk{index}"),
            "discard": "unmap",
            "file": { "driver": "file", "filename": disk },
        });
        let slot = FIRST_DISK_SLOT + index;
        add(&["-blockdev", &node.to_string(), "-device"]);
        add(&[&format!(
            "virtio-blk-pci,id=disk{index},drive=disk{index},bus=pcie.0,addr={slot:#x}"
        )]);
    }
    if let Some(boot) = &launch.boot {
        add(&["-kernel", &boot.kernel.to_string_lossy()]);
        if let Some(initrd) = &boot.initrd {
            add(&["-initrd", &initrd.to_string_lossy()]);
        }
        add(&["-append", &boot.append]);
    }

    add(&[
        "-chardev",
        &format!("file,id=serial0,path={}", value(&paths.serial_log)),
    ]);
    add(&["-serial", "chardev:serial0"]);
    for (id, socket) in [("control", &paths.control), ("clock", &paths.clock)] {
        add(&[
            "-chardev",
            &format!("socket,id={id},path={},server=on,wait=off", value(socket)),
        ]);
        add(&["-mon", &format!("chardev={id},mode=control")]);
    }
    // QEMU's default share policy throws others out when a viewer asks to be alone.
    add(&["-vnc", &format!("unix:{},share=ignore", value(&paths.vnc))]);
    add(&["-S"]);
    if launch.incoming {
        // Deferred: the capability must be set before it listens.
        add(&["-incoming", "defer"]);
    }
    args
}
