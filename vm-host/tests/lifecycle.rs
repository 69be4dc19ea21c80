//! A QEMU's life: started, paused, found again, moved, dead.

#![allow(clippy::unwrap_used)]

mod common;

use std::time::{Duration, Instant};

use common::{Bare, qmp};
use vm_host::{Error, GuestClock, Input, Network, RamMap, RamMapMut, Status, Vm};

/// SeaBIOS has written to the screen and found nothing to boot.
async fn booted(vm: &Vm) {
    let start = Instant::now();
    loop {
        let picture = vm.screenshot().await.unwrap();
        let lit = picture.pixels().filter(|p| p.0 != [0, 0, 0]).count();
        // "No bootable device." needs some thousand pixels; then the guest rests in a HLT loop.
        let before = vm.cpu_time().unwrap();
        tokio::time::sleep(Duration::from_millis(200)).await;
        if lit > 1000 && vm.cpu_time().unwrap().saturating_sub(before) < Duration::from_millis(50) {
            return;
        }
        assert!(
            start.elapsed() < Duration::from_secs(60),
            "SeaBIOS does not come to rest"
        );
    }
}

#[tokio::test]
async fn pause_resume_quit() {
    let bare = Bare::new("pause");
    let vm = Vm::start(&bare.launch).await.unwrap();
    assert_eq!(vm.status().await.unwrap(), Status::Running);
    let clock = GuestClock::follow(vm.clock_qmp_socket(), Duration::from_secs(5))
        .await
        .unwrap();
    let mut running = vm.watch_running();
    assert!(*running.borrow_and_update() && clock.is_running());

    vm.pause().await.unwrap();
    assert_eq!(vm.status().await.unwrap(), Status::Paused);
    running.changed().await.unwrap();
    assert!(!*running.borrow_and_update());
    // The clock's own connection hears of it at about the same time.
    while clock.is_running() {
        tokio::task::yield_now().await;
    }
    let stopped = clock.now();
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert_eq!(clock.now(), stopped);
    assert!(stopped > Duration::from_secs(5) && stopped < Duration::from_secs(65));

    let refused = vm
        .send(&[Input::Key {
            code: 30,
            down: true,
        }])
        .await
        .unwrap_err();
    assert!(matches!(refused, Error::State { .. }), "{refused}");

    vm.resume().await.unwrap();
    assert_eq!(vm.status().await.unwrap(), Status::Running);
    vm.quit().await.unwrap();
    assert!(
        Vm::attach(&bare.launch.runtime_dir)
            .await
            .unwrap()
            .is_none()
    );
    assert!(!vm.vnc_socket().exists());
}

#[tokio::test]
async fn device_state_moves_to_another_process() {
    let source = Bare::new("source");
    let vm = Vm::start(&source.launch).await.unwrap();
    booted(&vm).await;
    vm.pause().await.unwrap();
    let state = vm.save_device_state().await.unwrap();
    assert_eq!(vm.status().await.unwrap(), Status::Saved);
    assert_eq!(vm.save_device_state().await.unwrap(), state, "asked twice");
    let picture = vm.screenshot().await.unwrap();

    // Its RAM is what QEMU itself says it is.
    let dump = source.path("dump");
    let size = source.launch.hardware.memory_bytes();
    qmp(
        &vm,
        &format!(
            r#"{{"execute":"pmemsave","arguments":{{"val":1048576,"size":{},"filename":{:?}}}}}"#,
            size - (1 << 20),
            dump
        ),
    );
    let ram = RamMap::open(&source.launch.ram).unwrap();
    assert_eq!(ram.len() as u64, size);
    // Above the legacy window, which shows ROMs in place of RAM.
    assert!(
        ram[1 << 20..] == std::fs::read(&dump).unwrap()[..],
        "RAM differs from pmemsave"
    );
    assert!(ram.iter().any(|&byte| byte != 0));

    let mut target = Bare::new("target");
    target.launch.incoming = true;
    target.launch.network = Network::Unplugged;
    let mut copy = RamMapMut::create(&target.launch.ram, size).unwrap();
    copy.copy_from_slice(&ram);
    drop(copy);
    let restored = Vm::start(&target.launch).await.unwrap();
    assert_eq!(restored.status().await.unwrap(), Status::Incoming);
    assert!(matches!(restored.resume().await, Err(Error::State { .. })));
    let start = Instant::now();
    restored.load_device_state(&state).await.unwrap();
    eprintln!(
        "{} bytes of device state loaded in {:?}",
        state.len(),
        start.elapsed()
    );
    assert_eq!(restored.status().await.unwrap(), Status::Paused);
    assert!(
        RamMap::open(&target.launch.ram).unwrap()[..] == ram[..],
        "RAM changed by loading"
    );
    // The same picture, but for the text cursor, which blinks by the host's clock.
    let shown = restored.screenshot().await.unwrap();
    assert_eq!(shown.dimensions(), picture.dimensions());
    let differing = shown
        .pixels()
        .zip(picture.pixels())
        .filter(|(a, b)| a != b)
        .count();
    assert!(differing <= 9 * 16, "another picture in {differing} pixels");
    restored.resume().await.unwrap();
    assert_eq!(restored.status().await.unwrap(), Status::Running);

    // The source goes on as well, and can be saved again.
    vm.resume().await.unwrap();
    assert_eq!(vm.status().await.unwrap(), Status::Running);
    vm.pause().await.unwrap();
    vm.save_device_state().await.unwrap();
    vm.quit().await.unwrap();
    restored.quit().await.unwrap();
}

#[tokio::test]
async fn a_state_that_never_runs_is_the_same_after_loading_it() {
    let source = Bare::new("same");
    let vm = Vm::start(&source.launch).await.unwrap();
    booted(&vm).await;
    vm.pause().await.unwrap();
    let state = vm.save_device_state().await.unwrap();
    let mut target = Bare::new("same2");
    target.launch.incoming = true;
    std::fs::copy(&source.launch.ram, &target.launch.ram).unwrap();
    let restored = Vm::start(&target.launch).await.unwrap();
    restored.load_device_state(&state).await.unwrap();
    let again = restored.save_device_state().await.unwrap();
    let differing = state.iter().zip(&again).filter(|(a, b)| a != b).count();
    eprintln!("{differing} of {} bytes differ", state.len());
    assert_eq!(again.len(), state.len());
    vm.kill().await.unwrap();
    restored.kill().await.unwrap();
}

#[tokio::test]
async fn a_broken_state_is_refused_with_the_reason() {
    let mut bare = Bare::new("broken");
    bare.launch.incoming = true;
    RamMapMut::create(&bare.launch.ram, bare.launch.hardware.memory_bytes()).unwrap();
    let vm = Vm::start(&bare.launch).await.unwrap();
    let error = vm
        .load_device_state(b"this is not device state, not at all")
        .await
        .unwrap_err();
    let text = error.to_string();
    assert!(text.contains("Not a migration stream"), "{text}");
}

#[tokio::test]
async fn a_qemu_outlives_us_and_is_found_again() {
    let bare = Bare::new("attach");
    let vm = Vm::start(&bare.launch).await.unwrap();
    let pid = vm.pid();
    let taken = Vm::start(&bare.launch).await.unwrap_err();
    assert!(
        matches!(taken, Error::AlreadyRunning { pid: p, .. } if p == pid),
        "{taken}"
    );
    drop(vm);
    let vm = Vm::attach(&bare.launch.runtime_dir).await.unwrap().unwrap();
    assert_eq!(vm.pid(), pid);
    assert_eq!(vm.launch(), &bare.launch);
    assert_eq!(vm.status().await.unwrap(), Status::Running);
    // Its session is its own: what ends our terminal doesn't reach it.
    let session = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let field = session
        .rsplit(')')
        .next()
        .unwrap()
        .split_whitespace()
        .nth(3)
        .unwrap();
    assert_eq!(field, pid.to_string());
    vm.kill().await.unwrap();
    assert!(
        Vm::attach(&bare.launch.runtime_dir)
            .await
            .unwrap()
            .is_none()
    );
}

#[tokio::test]
async fn death_has_a_reason() {
    let bare = Bare::new("murdered");
    let vm = Vm::start(&bare.launch).await.unwrap();
    let killed = std::process::Command::new("kill")
        .args(["-9", &vm.pid().to_string()])
        .status();
    assert!(killed.unwrap().success());
    let text = vm.death().await.to_string();
    assert!(text.contains("signal: 9"), "{text}");
    let text = vm.pause().await.unwrap_err().to_string();
    assert!(
        text.contains("murdered") && text.contains("pause") && text.contains("SIGKILL"),
        "{text}"
    );
    let text = vm
        .wait_for_serial("x", Duration::from_secs(60))
        .await
        .unwrap_err()
        .to_string();
    assert!(text.contains("died while asked to print"), "{text}");
}

#[tokio::test]
async fn launches_that_cannot_work_say_so() {
    let bare = Bare::new("impossible");
    let fails = async |spoil: &dyn Fn(&mut vm_host::Launch)| {
        let mut launch = bare.launch.clone();
        spoil(&mut launch);
        let error = Vm::start(&launch).await.unwrap_err();
        // Nothing is left of it.
        assert!(
            Vm::attach(&bare.launch.runtime_dir)
                .await
                .unwrap()
                .is_none()
        );
        let source = std::error::Error::source(&error).map(|s| format!(": {s}"));
        format!("{error}{}", source.unwrap_or_default())
    };
    let text = fails(&|l| l.hardware.machine = "pc-q35-99.1".into()).await;
    assert!(
        text.contains("pc-q35-99.1") && text.contains("QEMU 99.1"),
        "{text}"
    );
    let text = fails(&|l| l.hardware.cpu = "Abacus-v1".into()).await;
    assert!(text.contains("Abacus"), "{text}");
    let text = fails(&|l| {
        l.incoming = true;
        l.ram = "/nonexistent/ram".into();
    })
    .await;
    assert!(
        text.contains("RAM file") && text.contains("No such file"),
        "{text}"
    );
    let text = fails(&|l| l.disks = vec!["/nonexistent/disk".into()]).await;
    assert!(text.contains("/nonexistent/disk"), "{text}");
    let text = fails(&|l| l.disks = vec![bare.path("run").join("qemu.log")]).await;
    assert!(text.contains("qcow2"), "{text}");
    let text = fails(&|l| l.runtime_dir = bare.path(&"long".repeat(30))).await;
    assert!(text.contains("107"), "{text}");
}

#[tokio::test]
async fn input_reaches_the_guest() {
    let bare = Bare::new("input");
    let vm = Vm::start(&bare.launch).await.unwrap();
    booted(&vm).await;
    // SeaBIOS has no driver for virtio keyboards, so nothing on the screen answers; QEMU must
    // take every kind without complaint.
    vm.send(&[
        Input::Key {
            code: 30,
            down: true,
        },
        Input::Key {
            code: 30,
            down: false,
        },
        Input::Key {
            code: 122,
            down: true,
        },
        Input::Screen {
            width: 720,
            height: 400,
        },
        Input::Pointer { x: 719, y: 399 },
        Input::Button {
            code: 0x110,
            down: true,
        },
        Input::Button {
            code: 0x110,
            down: false,
        },
        Input::Wheel {
            vertical: -1,
            horizontal: 1,
        },
    ])
    .await
    .unwrap();
    vm.kill().await.unwrap();
}
