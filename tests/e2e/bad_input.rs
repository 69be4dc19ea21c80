//! Bad input gets one clear sentence, before anything is changed; the VM goes on running.

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use testkit::robot::{Robot, Waited};
use testkit::site::{Finished, Site};

use crate::common::{SOON, VM, World, start_vm, work};

/// What must not change when something is refused.
async fn state_of(site: &Site) -> serde_json::Value {
    let status = site.status(VM).await.unwrap();
    assert_eq!(status["state"], "running");
    serde_json::json!([status["pid"], status["generations"], status["lease"]])
}

fn assert_clear(refused: &Finished, needles: &[&str]) {
    let text = &refused.stderr;
    assert_eq!(refused.code, Some(3), "{}: {text}", refused.command);
    assert!(text.starts_with("error: "), "{text}");
    for needle in needles {
        assert!(text.contains(needle), "{needle:?} not in {text:?}");
    }
    // The error and its chain of causes; no panic, no backtrace.
    assert!(
        text.lines()
            .skip(1)
            .all(|line| line.starts_with("  because ")),
        "{text}"
    );
    assert!(text.lines().count() <= 4, "{text}");
}

async fn refused(site: &Site, words: &[&str], needles: &[&str]) {
    let finished = site.run(words).await.unwrap();
    assert_clear(&finished, needles);
}

#[tokio::test(flavor = "multi_thread")]
async fn peers_and_hosts_that_will_not_do_are_refused() {
    let mut world = World::new().await;
    start_vm(&world.a).await;
    let agent = world.b.serve().await.unwrap();
    let (own, foreign) = (
        world.a.key().await.unwrap(),
        Site::new(crate::common::program(), "x", world.dir.path().join("x")),
    );
    let foreign = foreign.key().await.unwrap();
    let a = &mut world.a;
    let before = state_of(a).await;
    let migrate = ["migrate", VM, "--to", "b", "--strategy", "full"];

    refused(
        a,
        &["migrate", "nobody", "--to", "b"],
        &["nobody", "vm list"],
    )
    .await;
    refused(a, &migrate, &["b"]).await;
    a.trust("b", agent.addr, &foreign).await.unwrap();
    refused(a, &migrate, &["b", "key"]).await;
    a.trust("b", agent.addr, &agent.key).await.unwrap();
    // Now A trusts B, but B does not know A.
    refused(a, &migrate, &["trust"]).await;
    world.b.trust("a", agent.addr, &own).await.unwrap();
    // Nobody listens there.
    a.trust("b", "127.0.0.1:1".parse().unwrap(), &agent.key)
        .await
        .unwrap();
    refused(a, &migrate, &["127.0.0.1:1"]).await;
    a.trust("b", agent.addr, &agent.key).await.unwrap();
    // There is neither a stale copy nor a log.
    for strategy in ["base", "replay"] {
        refused(
            a,
            &["migrate", VM, "--to", "b", "--strategy", strategy],
            &["full"],
        )
        .await;
    }
    // B takes its trust back, and gives it again.
    world.b.json(&["site", "untrust", "a"]).await.unwrap();
    refused(a, &migrate, &["trust"]).await;
    refused(&world.b, &["site", "untrust", "a"], &["a"]).await;
    world.b.trust("a", agent.addr, &own).await.unwrap();
    let busy = agent.addr.to_string();
    refused(a, &["serve", "--listen", &busy], &[&busy]).await;
    refused(a, &["record", VM, "--listen", &busy], &[&busy]).await;
    refused(
        a,
        &["vm", "create", VM, "--disk", crate::common::guest().await],
        &[VM],
    )
    .await;

    a.set_env("REPLAY_MIGRATE_QEMU", "/nonexistent/qemu");
    refused(a, &migrate, &["/nonexistent/qemu"]).await;
    a.set_env("REPLAY_MIGRATE_QEMU", "qemu-system-x86_64");
    let machine = a.status(VM).await.unwrap()["hardware"]["machine"]
        .as_str()
        .unwrap()
        .to_owned();
    world.b.stop_serving();
    world.b.set_env(
        "REPLAY_MIGRATE_QEMU",
        lacks_machine(world.dir.path(), &machine),
    );
    let agent = world.b.serve().await.unwrap();
    a.trust("b", agent.addr, &agent.key).await.unwrap();
    refused(a, &migrate, &["b refused", &machine]).await;

    assert_eq!(state_of(a).await, before);
    assert!(
        !world.b.dir().join("vms").join(VM).exists(),
        "the target has something of the VM"
    );
}

/// A QEMU that does not have this machine type.
fn lacks_machine(dir: &Path, machine: &str) -> std::path::PathBuf {
    let path = dir.join("old-qemu");
    let script = format!(
        "#!/bin/sh\ncase \"$*\" in\n\
         *'-machine help'*) qemu-system-x86_64 \"$@\" | grep -v -e '^{machine} ' -e '({machine})' ;;\n\
         *) exec qemu-system-x86_64 \"$@\" ;;\nesac\n"
    );
    std::fs::write(&path, script).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// A file system of 64 MiB, for as long as this lives.
struct SmallDisk(std::path::PathBuf);

impl SmallDisk {
    fn at(dir: &Path) -> Self {
        std::fs::create_dir(dir).unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=64m", "tmpfs"])
            .arg(dir)
            .status();
        assert!(mounted.unwrap().success(), "cannot mount a small disk");
        Self(dir.to_owned())
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

/// The program, on a host that seems to have hardly any memory left: nothing else can be had
/// without taking it from all other tests.
fn short_of_memory(dir: &Path) -> std::path::PathBuf {
    let meminfo = dir.join("meminfo");
    std::fs::write(&meminfo, "MemTotal: 524288 kB\nMemAvailable: 262144 kB\n").unwrap();
    let path = dir.join("short-of-memory");
    let script = format!(
        "#!/bin/sh\nexec unshare --mount sh -c \
         'mount --bind {} /proc/meminfo && exec {} \"$@\"' sh \"$@\"\n",
        meminfo.display(),
        crate::common::program().display()
    );
    std::fs::write(&path, script).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_without_room_refuses() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("not tested: only root may mount a small disk");
        return;
    }
    let world = World::new().await;
    start_vm(&world.a).await;
    let before = state_of(&world.a).await;
    let dir = world.dir.path();
    let disk = SmallDisk::at(&dir.join("small"));
    let own = world.a.key().await.unwrap();
    let sites = [
        (
            "small",
            Site::new(crate::common::program(), "small", &disk.0),
            "MiB on the disk with",
        ),
        (
            "poor",
            Site::new(short_of_memory(dir), "poor", dir.join("poor")),
            "this host has 256 MiB available",
        ),
    ];
    for (name, mut site, reason) in sites {
        let agent = site.serve().await.unwrap();
        site.trust("a", agent.addr, &own).await.unwrap();
        world.a.trust(name, agent.addr, &agent.key).await.unwrap();
        for command in ["migrate", "seed"] {
            let reasons = [&format!("{name} refused"), reason];
            refused(&world.a, &[command, VM, "--to", name], &reasons).await;
        }
        assert!(
            !site.dir().join("vms").join(VM).exists(),
            "{name} has something of the VM"
        );
        site.stop_serving();
    }
    assert_eq!(state_of(&world.a).await, before);
}

#[tokio::test(flavor = "multi_thread")]
async fn logs_that_do_not_fit_are_refused() {
    let world = World::new().await;
    let a = &world.a;
    start_vm(a).await;
    let recorder = a.record(VM).await.unwrap();
    work(&recorder).await;

    // A viewer that talks nonsense is thrown out; the one beside it works on.
    let testkit::robot::VncAddr::Tcp(addr) = recorder.vnc else {
        panic!("{:?}", recorder.vnc)
    };
    let mut robot = Robot::connect(&recorder.vnc).await.unwrap();
    for garbage in [
        &b"GET / HTTP/1.1\r\n\r\n"[..],
        b"RFB 003.008\n\x01\x01\xee\xee\xee\xee",
    ] {
        let thrown_out = garbage.to_vec();
        tokio::task::spawn_blocking(move || {
            let mut stream = std::net::TcpStream::connect(addr).unwrap();
            stream.set_read_timeout(Some(SOON)).unwrap();
            // It may be closed while this is still written.
            let _ = stream.write_all(&thrown_out);
            let _ = std::io::copy(&mut stream, &mut std::io::sink());
        })
        .await
        .unwrap();
    }
    robot
        .click(300, 100, testkit::robot::Button::Left)
        .await
        .unwrap();
    robot.type_text("echo still here\n").await.unwrap();
    assert_eq!(
        robot.wait_changed(None, SOON).await.unwrap(),
        Waited::Happened
    );
    drop(robot);

    let log = recorder.begun["log"].as_str().unwrap().to_owned();
    recorder.process.stop().await.unwrap().success().unwrap();
    let before = state_of(a).await;
    let file = |name: &str, bytes: &[u8]| {
        let path = world.dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path.to_string_lossy().into_owned()
    };
    let whole = std::fs::read(&log).unwrap();
    let truncated = file("truncated.rmlog", &whole[..20]);
    refused(
        a,
        &["replay", VM, "--log", &truncated],
        &["truncated.rmlog"],
    )
    .await;
    let foreign = file("foreign.rmlog", &[0x5a; 4096]);
    refused(a, &["replay", VM, "--log", &foreign], &["foreign.rmlog"]).await;
    refused(
        a,
        &["replay", VM, "--log", "/nonexistent.rmlog"],
        &["/nonexistent.rmlog"],
    )
    .await;
    let mut damaged = whole.clone();
    let middle = damaged.len() / 2;
    damaged[middle] ^= 1;
    let damaged = file("damaged.rmlog", &damaged);
    let outcome = a.run(&["replay", VM, "--log", &damaged]).await.unwrap();
    // Readable up to the last whole block, or refused: in no case half of it as if all was well.
    assert!(matches!(outcome.code, Some(0 | 3)), "{}", outcome.stderr);

    a.json(&[
        "vm",
        "create",
        "other",
        "--disk",
        crate::common::guest().await,
    ])
    .await
    .unwrap();
    refused(
        a,
        &["replay", "other", "--log", &log],
        &["give this VM's own log"],
    )
    .await;
    // The log of a generation that is gone.
    let number: u64 = Path::new(&log)
        .file_stem()
        .unwrap()
        .to_str()
        .unwrap()
        .parse()
        .unwrap();
    let generations = a.dir().join("vms").join(VM).join("generations");
    let aside = world.dir.path().join("aside");
    std::fs::rename(generations.join(number.to_string()), &aside).unwrap();
    refused(
        a,
        &["replay", VM, "--log", &log],
        &["generation", "not here any more"],
    )
    .await;
    std::fs::rename(&aside, generations.join(number.to_string())).unwrap();
    assert_eq!(state_of(a).await, before);
}
