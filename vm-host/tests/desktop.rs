//! With a real desktop guest, as `replay-migrate guest build` makes it. Run with
//! `REPLAY_MIGRATE_TEST_GUEST=DIR cargo test -p vm-host --test desktop -- --ignored --nocapture`.

#![allow(clippy::unwrap_used)]

mod common;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use common::Bare;
use vm_host::disk::{self, Format, OverlayReader};
use vm_host::keys::linux_from_qnum;
use vm_host::{Boot, Input, Network, RamMap, Vm};

async fn until_screen_differs(vm: &Vm, from: &image::RgbImage) -> usize {
    let start = Instant::now();
    loop {
        let now = vm.screenshot().await.unwrap();
        let count = now
            .pixels()
            .zip(from.pixels())
            .filter(|(a, b)| a != b)
            .count();
        // More than what is typed, or a window's title: the guest's answer to it.
        if count > 1000 {
            return count;
        }
        assert!(
            start.elapsed() < Duration::from_secs(60),
            "the screen stays as it is but for {count} pixels"
        );
    }
}

fn typed(qnums: &[u8]) -> Vec<Input> {
    let key = |&q: &u8, down| Input::Key {
        code: linux_from_qnum(q).unwrap(),
        down,
    };
    qnums
        .iter()
        .flat_map(|q| [key(q, true), key(q, false)])
        .collect()
}

#[tokio::test]
#[ignore = "needs a guest and some minutes"]
async fn a_desktop_answers_and_moves() {
    let guest = PathBuf::from(std::env::var_os("REPLAY_MIGRATE_TEST_GUEST").unwrap());
    let json = std::fs::read_to_string(guest.join("guest.json")).unwrap();
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    let mut bare = Bare::new("desktop");
    let overlay = bare.path("desktop.qcow2");
    disk::create_overlay(&overlay, &guest.join("disk.raw"), Format::Raw).unwrap();
    bare.launch.disks = vec![overlay.clone()];
    bare.launch.hardware.memory_mib = 768;
    bare.launch.ram = Path::new("/dev/shm").join(bare.dir.path().file_name().unwrap());
    bare.launch.boot = Some(Boot {
        kernel: guest.join("vmlinuz"),
        initrd: Some(guest.join("initrd.img")),
        append: json["append"].as_str().unwrap().to_owned(),
    });
    let start = Instant::now();
    let vm = Vm::start(&bare.launch).await.unwrap();
    let marker = json["ready_marker"].as_str().unwrap();
    vm.wait_for_serial(marker, Duration::from_secs(600))
        .await
        .unwrap();
    eprintln!(
        "ready after {:?}, {:?} of it on the CPU",
        start.elapsed(),
        vm.cpu_time().unwrap()
    );

    let before = vm.screenshot().await.unwrap();
    vm.send(&[
        Input::Pointer { x: 300, y: 100 },
        Input::Button {
            code: 0x110,
            down: true,
        },
        Input::Button {
            code: 0x110,
            down: false,
        },
    ])
    .await
    .unwrap();
    // l, s, space, slash, enter: more lines than a prompt.
    let listing = typed(&[0x26, 0x1f, 0x39, 0x35, 0x1c]);
    vm.send(&listing).await.unwrap();
    eprintln!(
        "typing changed {} pixels",
        until_screen_differs(&vm, &before).await
    );

    let moment = Instant::now();
    vm.pause().await.unwrap();
    vm.snapshot_disks(&[bare.path("next.qcow2")]).await.unwrap();
    let state = vm.save_device_state().await.unwrap();
    eprintln!(
        "{} bytes of device state after {:?}",
        state.len(),
        moment.elapsed()
    );
    let reader = OverlayReader::open(&overlay).unwrap();
    let written = reader.allocated_above(&guest.join("disk.raw")).unwrap();
    let pages: u64 = written.iter().map(|range| range.end - range.start).sum();
    let moment = Instant::now();
    let mut buffer = vec![0; 1 << 20];
    for range in &written {
        for first in range.clone().step_by(256) {
            let length = 256.min(range.end - first) as usize * disk::PAGE_SIZE;
            reader.read_pages(first, &mut buffer[..length]).unwrap();
        }
    }
    eprintln!(
        "{pages} pages in {} ranges read in {:?}",
        written.len(),
        moment.elapsed()
    );
    let picture = vm.screenshot().await.unwrap();

    let mut copy = Bare::new("copy");
    copy.launch = vm_host::Launch {
        name: "copy".into(),
        runtime_dir: copy.launch.runtime_dir.clone(),
        ram: bare.launch.ram.with_extension("copy"),
        disks: vec![copy.path("fork.qcow2")],
        network: Network::Unplugged,
        incoming: true,
        ..bare.launch.clone()
    };
    disk::create_overlay(&copy.launch.disks[0], &overlay, Format::Qcow2).unwrap();
    std::fs::copy(&bare.launch.ram, &copy.launch.ram).unwrap();
    let fork = Vm::start(&copy.launch).await.unwrap();
    let moment = Instant::now();
    fork.load_device_state(&state).await.unwrap();
    eprintln!("loaded in {:?}", moment.elapsed());
    let rams = [&bare.launch.ram, &copy.launch.ram].map(|ram| RamMap::open(ram).unwrap());
    let differing = rams[0]
        .chunks(4096)
        .zip(rams[1].chunks(4096))
        .filter(|(a, b)| a != b)
        .count();
    drop(rams);
    eprintln!("{differing} pages of RAM differ after loading");
    assert!(
        fork.screenshot().await.unwrap() == picture,
        "another picture"
    );
    fork.resume().await.unwrap();
    vm.resume().await.unwrap();
    for vm in [&vm, &fork] {
        let before = vm.screenshot().await.unwrap();
        vm.send(&listing).await.unwrap();
        let count = until_screen_differs(vm, &before).await;
        eprintln!("typing into {} changed {count} pixels", vm.launch().name);
        vm.quit().await.unwrap();
    }
    assert_eq!(differing, 0);
}
