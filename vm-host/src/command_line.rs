//! QEMU's command line.
//!
//! Devices, their identifiers and their PCI slots are part of what device state can be loaded
//! into: changing any of them here makes old generations unloadable. What is not visible to
//! the guest (sockets, files, the accelerator, the network's far end) may change.

use std::path::Path;

use serde_json::{Value, json};

use crate::counted;
use crate::hardware::{Accelerator, Launch, Network};
use crate::runtime::Paths;
use crate::snapshot::file_node;

/// Translated code kept by TCG, in MiB. QEMU's default is an eighth of the RAM up to 1 GiB.
const TB_SIZE_MIB: u32 = 256;
/// The PCI slot of the first disk; the slots before it are taken or reserved.
const FIRST_DISK_SLOT: usize = 8;

/// In QEMU's comma-separated options a comma in a value is written twice.
fn value(path: &Path) -> String {
    path.to_string_lossy().replace(',', ",,")
}

/// The arguments, for a launch with absolute paths and an accelerator that is decided.
///
/// `nodes` are what disks are opened by whose chain of overlays does not end in a file.
pub(crate) fn arguments(
    launch: &Launch,
    accelerator: Accelerator,
    paths: &Paths,
    nodes: &[Vec<Value>],
) -> Vec<String> {
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
    match (accelerator, hardware.icount) {
        (Accelerator::Kvm, _) => add(&["-accel", "kvm"]),
        (_, None) => add(&["-accel", &format!("tcg,thread=multi,tb-size={TB_SIZE_MIB}")]),
        (_, Some(shift)) => {
            // One thread for all processors: who is first must not be chance.
            add(&[
                "-accel",
                &format!("tcg,thread=single,tb-size={TB_SIZE_MIB}"),
            ]);
            // While the guest waits its clock goes as the host's, and does not jump to the next timer.
            add(&["-icount", &format!("shift={shift},sleep=on")]);
            add(&["-netdev", counted::NETDEV]);
        }
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
        let arriving = nodes.get(index).map_or(&[][..], Vec::as_slice);
        for node in arriving {
            add(&["-blockdev", &node.to_string()]);
        }
        if arriving.is_empty() {
            let node = json!({
                "driver": "qcow2",
                "node-name": format!("disk{index}"),
                "discard": "unmap",
                "file": { "driver": "file", "filename": disk, "node-name": file_node(&format!("disk{index}")) },
            });
            add(&["-blockdev", &node.to_string()]);
        }
        let slot = FIRST_DISK_SLOT + index;
        // What can't be read now can be later: the guest stands still until then, and sees no error.
        let patient = if arriving.is_empty() {
            ""
        } else {
            ",rerror=stop,werror=stop"
        };
        add(&["-device"]);
        add(&[&format!(
            "virtio-blk-pci,id=disk{index},drive=disk{index},bus=pcie.0,addr={slot:#x}{patient}"
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
    // And after each key it waits for 10 ms by the guest's clock, which it may read much later than that where instructions are
    // counted.
    let delay = hardware.icount.map_or("", |_| ",key-delay-ms=0");
    let vnc = format!("unix:{},share=ignore{delay}", value(&paths.vnc));
    add(&["-vnc", &vnc]);
    add(&["-S"]);
    if launch.incoming {
        // Deferred: the capability must be set before it listens.
        add(&["-incoming", "defer"]);
    }
    args
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Hardware;

    fn launch() -> Launch {
        Launch {
            name: "desk".into(),
            hardware: Hardware::new("pc-q35-7.2"),
            boot: None,
            accelerator: Accelerator::Auto,
            runtime_dir: "/run/desk".into(),
            ram: "/run/desk/ram.img".into(),
            disks: vec!["/vm/disk0.qcow2".into()],
            arriving: Vec::new(),
            network: Network::Connected,
            incoming: false,
        }
    }

    fn arguments_for(launch: &Launch) -> Vec<String> {
        let paths = Paths::new(&launch.runtime_dir).unwrap();
        arguments(launch, Accelerator::Tcg, &paths, &[])
    }

    fn arguments_of(network: Option<Network>, incoming: bool) -> Vec<String> {
        let mut launch = launch();
        launch.hardware.network = network.is_some();
        launch.network = network.unwrap_or(Network::Connected);
        launch.incoming = incoming;
        arguments_for(&launch)
    }

    /// What follows each mention of an option.
    fn values<'a>(arguments: &'a [String], option: &str) -> Vec<&'a str> {
        let pairs = arguments.windows(2).filter(|pair| pair[0] == option);
        pairs.map(|pair| pair[1].as_str()).collect()
    }

    #[test]
    fn instructions_are_counted_where_that_was_asked_for() {
        let mut launch = launch();
        let arguments = arguments_for(&launch);
        assert!(values(&arguments, "-icount").is_empty());
        assert_eq!(
            values(&arguments, "-accel"),
            ["tcg,thread=multi,tb-size=256"]
        );
        launch.hardware.icount = Some(3);
        let arguments = arguments_for(&launch);
        assert_eq!(values(&arguments, "-icount"), ["shift=3,sleep=on"]);
        assert_eq!(
            values(&arguments, "-accel"),
            ["tcg,thread=single,tb-size=256"]
        );
        launch.checked().unwrap();
        launch.accelerator = Accelerator::Kvm;
        let refused = launch.checked().unwrap_err().to_string();
        assert!(refused.contains("KVM"), "{refused}");
    }

    #[test]
    fn every_qemu_runs_in_its_sandbox_with_what_was_asked_for_and_no_more() {
        for incoming in [false, true] {
            for network in [None, Some(Network::Connected), Some(Network::Unplugged)] {
                let arguments = arguments_of(network, incoming);
                let sandbox = values(&arguments, "-sandbox");
                assert_eq!(sandbox.len(), 1);
                let parts: Vec<_> = sandbox[0].split(',').collect();
                for part in [
                    "on",
                    "obsolete=deny",
                    "elevateprivileges=deny",
                    "spawn=deny",
                    "resourcecontrol=deny",
                ] {
                    assert!(parts.contains(&part), "{part} not in {parts:?}");
                }
                for alone in ["-nodefaults", "-no-user-config"] {
                    assert!(arguments.iter().any(|word| word == alone), "{alone}");
                }
                let netdevs = values(&arguments, "-netdev");
                let cards = arguments.iter().filter(|word| word.contains("virtio-net"));
                match network {
                    None => assert!(netdevs.is_empty() && cards.count() == 0),
                    Some(_) => assert!(netdevs.len() == 1 && cards.count() == 1),
                }
                // A fork's network leads nowhere, and nothing leads into a guest from here.
                let closed = network == Some(Network::Unplugged);
                let restricted = |netdev: &&str| netdev.contains("restrict=on");
                assert!(netdevs.iter().all(|netdev| restricted(netdev) == closed));
                assert!(!arguments.iter().any(|word| word.contains("hostfwd")));
                // What it listens on is a socket in a folder of this user alone.
                for address in values(&arguments, "-vnc") {
                    assert!(address.starts_with("unix:/run/desk/"), "{address}");
                }
                for device in values(&arguments, "-chardev") {
                    assert!(device.contains("path=/run/desk/"), "{device}");
                }
            }
        }
    }
}
