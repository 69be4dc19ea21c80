//! QEMU's own migration between two QEMUs: what a site without this project would do.
//!
//! The source's state is restored and stands still; its RAM, left out wherever this project moves
//! a VM itself, travels. Both ends and the line are on this machine, and every byte over every
//! connection is counted on its way. Disks are not sent: both have the source's.

mod stream;

use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use testkit::link::{Link, LinkProfile, Rate};
use testkit::qmp::{Qmp, port_of};
use vm_host::disk::{Format, create_overlay};
use vm_host::{Accelerator, Hardware, Launch, Network, Vm};

use crate::Interrupt;
use crate::capture::{Capture, copy_part, gives};
use crate::rows::{RAM_AND_DEVICE, Row, Way};
use stream::machine_of;

const LIMIT: Duration = Duration::from_secs(900);
/// Faster than what is at its ends: nothing waits for the line.
const RATE: &str = "100gbit";
const BUFFER: usize = 4 << 20;
/// QEMU takes 1 if it is not told; this is what the others here have.
const ZSTD_LEVEL: u32 = 3;
const CHANNELS: u32 = 2;

/// A way's capabilities, parameters, and what to know of it.
fn settings(way: Way) -> (Vec<&'static str>, Value, String) {
    match way {
        Way::QemuXbzrle => (
            vec!["xbzrle"],
            json!({}),
            "the guest is paused: no page is sent twice, which is what xbzrle is for".to_owned(),
        ),
        Way::QemuMultifdZstd => (
            vec!["multifd"],
            json!({
                "multifd-compression": "zstd",
                "multifd-zstd-level": ZSTD_LEVEL,
                "multifd-channels": CHANNELS,
            }),
            format!("level {ZSTD_LEVEL}, where QEMU takes 1 by itself; {CHANNELS} channels"),
        ),
        _ => (Vec::new(), json!({}), String::new()),
    }
}

/// Migrates the source's state; the RAM that arrived is compared.
pub(crate) async fn measure(
    capture: &Capture,
    way: Way,
    scratch: &Path,
    interrupt: &Interrupt,
) -> anyhow::Result<Vec<Row>> {
    let image = |name: &str| {
        let mut images = capture.images.iter();
        images
            .find(|image| image.name == name)
            .context("an image is missing")
    };
    let ram = capture.path("source", image("ram")?);
    let state = capture.map("source", image("device")?)?;
    let machine = machine_of(&state)?;
    ensure!(
        machine.disks == capture.disks().count(),
        "the device state is of a machine with {} disks, the capture has {}",
        machine.disks,
        capture.disks().count()
    );
    let memory = ram.metadata().context("cannot find the RAM")?.len();
    let mut hardware = Hardware::new(machine.name);
    hardware.memory_mib = (memory >> 20).try_into().context("the RAM is too large")?;
    hardware.cpus = machine.cpus;
    hardware.network = machine.network;

    let folder = tempfile::tempdir_in(scratch).context("cannot make a folder")?;
    // Sockets have short paths.
    let runtime = tempfile::tempdir().context("cannot make a folder for QEMU")?;
    let (from, to) = (
        folder.path().join("source.ram"),
        folder.path().join("target.ram"),
    );
    let (whole, copy) = (capture.map("source", image("ram")?)?, from.clone());
    let copied = tokio::task::spawn_blocking(move || copy_part(&whole, &copy));
    interrupt.guard(copied).await???;
    std::fs::File::create(&to)
        .and_then(|file| file.set_len(memory))
        .context("cannot make the target's RAM")?;

    let launch = |name: &str, ram: &Path| -> anyhow::Result<Launch> {
        let mut disks = Vec::new();
        for disk in capture.disks() {
            let overlay = folder.path().join(format!("{name}-{}.qcow2", disk.name));
            create_overlay(&overlay, &capture.path("source", disk), Format::Raw)?;
            disks.push(overlay);
        }
        Ok(Launch {
            name: format!("peers-{name}"),
            hardware: hardware.clone(),
            // A kernel would be read when the guest starts again, which it does not.
            boot: None,
            accelerator: Accelerator::Auto,
            runtime_dir: runtime.path().join(name),
            ram: ram.to_owned(),
            disks,
            arriving: Vec::new(),
            network: Network::Unplugged,
            incoming: true,
        })
    };
    let (source, target) = (launch("source", &from)?, launch("target", &to)?);
    // A QEMU outlives whoever starts it: from here to its end nothing returns early.
    let target = Vm::start(&target).await?;
    let source = match Vm::start(&source).await {
        Ok(source) => source,
        Err(error) => {
            target.kill().await?;
            return Err(error.into());
        }
    };
    let migrated = tokio::time::timeout(LIMIT, migrate(&source, &target, &state, way));
    let migrated = interrupt.guard(migrated).await;
    let killed = [source.kill().await, target.kill().await];
    let late = || format!("the migration took more than {} s", LIMIT.as_secs());
    let (bytes, seconds) = migrated?.with_context(late)??;
    killed.into_iter().collect::<Result<(), _>>()?;

    let expected = capture.map("source", image("ram")?)?;
    let compared = tokio::task::spawn_blocking(move || {
        std::fs::File::open(&to).and_then(|file| gives(file, &expected))
    });
    let same = interrupt
        .guard(compared)
        .await??
        .context("cannot read the target's RAM")?;
    ensure!(same, "the RAM that arrived is not the source's");
    let mut row = capture.row(way, RAM_AND_DEVICE, bytes, seconds);
    let (_, _, note) = settings(way);
    row.note = note;
    Ok(vec![row])
}

/// Migrates; the bytes over all connections, both ways, and the seconds.
async fn migrate(source: &Vm, target: &Vm, state: &[u8], way: Way) -> anyhow::Result<(u64, f64)> {
    source.load_device_state(state).await?;
    let mut here = Qmp::connect(source.clock_qmp_socket()).await?;
    let mut there = Qmp::connect(target.clock_qmp_socket()).await?;
    let (wanted, parameters, _) = settings(way);
    let mut capabilities = vec![
        json!({ "capability": "events", "state": true }),
        // On where this project has moved a VM: there the RAM has ways of its own.
        json!({ "capability": "x-ignore-shared", "state": false }),
    ];
    let more = wanted.iter();
    capabilities.extend(more.map(|name| json!({ "capability": name, "state": true })));
    for end in [&mut here, &mut there] {
        let all = json!({ "capabilities": capabilities });
        end.ask("migrate-set-capabilities", all).await?;
        end.ask("migrate-set-parameters", parameters.clone())
            .await?;
    }
    here.ask(
        "migrate-set-parameters",
        json!({ "max-bandwidth": 1_u64 << 40 }),
    )
    .await?;
    let anywhere = json!({ "uri": "tcp:127.0.0.1:0" });
    there.ask("migrate-incoming", anywhere).await?;
    let listening = there.ask("query-migrate", json!({})).await?;
    let port = port_of(&listening).context("QEMU does not say where it listens")?;
    let rate: Rate = RATE.parse().context("the line has no rate")?;
    let profile = LinkProfile {
        up: rate,
        down: rate,
        delay: Duration::ZERO,
        buffer: BUFFER,
    };
    let link = Link::start(SocketAddr::from(([127, 0, 0, 1], port)), profile)
        .context("cannot lay a line between the two")?;
    let began = Instant::now();
    here.ask("migrate", json!({ "uri": format!("tcp:{}", link.addr()) }))
        .await?;
    tokio::try_join!(here.migrated(), there.migrated())?;
    let seconds = began.elapsed().as_secs_f64();
    Ok((link.bytes_up() + link.bytes_down(), seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_is_faster_than_its_ends() {
        RATE.parse::<Rate>().unwrap();
    }

    /// A machine without anything to boot, its RAM what its firmware left, and its capture.
    async fn bare_machine(dir: &Path) -> Capture {
        let machine = vm_host::programs::default_machine(&vm_host::programs::qemu()).unwrap();
        let mut hardware = Hardware::new(machine);
        hardware.memory_mib = 64;
        let state = dir.join("capture/source");
        std::fs::create_dir_all(&state).unwrap();
        std::fs::write(state.join("disk.img"), vec![0; 1 << 20]).unwrap();
        let disk = dir.join("disk.qcow2");
        create_overlay(&disk, &state.join("disk.img"), Format::Raw).unwrap();
        let launch = Launch {
            name: "bare".to_owned(),
            hardware,
            boot: None,
            accelerator: Accelerator::Tcg,
            runtime_dir: dir.join("run"),
            ram: state.join("ram.img"),
            disks: vec![disk],
            arriving: Vec::new(),
            network: Network::Unplugged,
            incoming: false,
        };
        let vm = Vm::start(&launch).await.unwrap();
        vm.pause().await.unwrap();
        let device = vm.save_device_state().await.unwrap();
        vm.quit().await.unwrap();
        std::fs::write(state.join("device.bin"), device).unwrap();
        let base = dir.join("capture/base");
        std::fs::create_dir(&base).unwrap();
        for file in ["disk.img", "ram.img", "device.bin"] {
            std::fs::copy(state.join(file), base.join(file)).unwrap();
        }
        Capture::open(&dir.join("capture")).unwrap()
    }

    #[tokio::test]
    async fn two_qemus_migrate() {
        let (dir, scratch) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let capture = bare_machine(dir.path()).await;
        let device = capture.path("source", &capture.images[0]);
        let device = device.metadata().unwrap().len();
        let mut bytes = Vec::new();
        for way in Way::QEMU {
            let rows = measure(&capture, way, scratch.path(), &Interrupt::never()).await;
            let rows = rows.unwrap();
            assert_eq!(rows.len(), 1);
            assert!(rows[0].checked && rows[0].images == RAM_AND_DEVICE);
            bytes.push(rows[0].bytes.unwrap());
        }
        let [plain, xbzrle, multifd] = bytes[..] else {
            panic!("{bytes:?}")
        };
        // Video RAM is in the device state there and among the RAM here: half of it is empty.
        assert!(plain > 100_000 && plain < device + (64 << 20), "{plain}");
        assert!(xbzrle.abs_diff(plain) < plain / 100, "{xbzrle} {plain}");
        assert!(multifd < plain, "{multifd} {plain}");
        assert_eq!(std::fs::read_dir(scratch.path()).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn another_machines_disks_are_refused() {
        let (dir, scratch) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let capture = bare_machine(dir.path()).await;
        for state in ["base", "source"] {
            let disk = capture.dir().join(state).join("disk1.img");
            std::fs::write(disk, [0; 4096]).unwrap();
        }
        let capture = Capture::open(capture.dir()).unwrap();
        let refused = measure(&capture, Way::Qemu, scratch.path(), &Interrupt::never()).await;
        let refused = refused.unwrap_err().to_string();
        assert!(refused.contains("1 disks, the capture has 2"), "{refused}");
    }
}
