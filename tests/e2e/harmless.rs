//! A replay does nothing outside of itself: what the guest sent when it was recorded is not sent
//! again.

use std::path::Path;
use std::time::Duration;

use serde_json::Value;
use testkit::robot::Robot;
use testkit::session::Session;
use tokio::net::UdpSocket;
use tokio::time::timeout;

use crate::common::{VM, World, guest};

/// The guest computes its answer to a key, under emulation.
const LIMIT: Duration = Duration::from_secs(60);

/// Packets that the user sends.
const PACKETS: usize = 3;

/// Root's shell on a console of its own, with the network up, and packets to the host: 10.0.2.2
/// is this machine in QEMU's user-mode network. A console's cursor blinks for ever, so that its
/// rest can't be waited for; the shell reads what is typed ahead.
fn session(port: u16) -> Session {
    format!(
        r#"
        key     ctrl+alt+F9
        changed 10s
        think   2s
        type    "bash\n"
        type    "cd /sys/class/net; ip link set e* up; ip addr add 10.0.2.15/24 dev $(echo e*)\n"
        type    "for i in 1 2 {PACKETS}; do echo $i >/dev/udp/10.0.2.2/{port}; sleep 1; done\n"
        type    "clear; echo All of it was sent.\n"
        think   8s
        click   100 8
        "#
    )
    .parse()
    .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn packets_that_were_sent_are_not_sent_again_by_a_replay() {
    let world = World::new().await;
    let site = &world.a;
    let outside = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let port = outside.local_addr().unwrap().port();

    let dir = Path::new(guest().await);
    let facts: Value =
        serde_json::from_slice(&std::fs::read(dir.join("guest.json")).unwrap()).unwrap();
    let file = |name: &str| {
        let path = dir.join(facts[name].as_str().unwrap());
        path.to_str().unwrap().to_owned()
    };
    let append = format!(
        "{} systemd.debug-shell=1",
        facts["append"].as_str().unwrap()
    );
    let marker = facts["ready_marker"].as_str().unwrap();
    let (disk, kernel, initrd) = (file("disk"), file("kernel"), file("initrd"));
    let create = [
        "vm",
        "create",
        VM,
        "--disk",
        &disk,
        "--kernel",
        &kernel,
        "--initrd",
        &initrd,
        "--append",
        &append,
        "--memory",
        "768",
        "--ready-marker",
        marker,
    ];
    site.json(&create).await.unwrap();
    site.json(&["vm", "start", VM, "--wait"]).await.unwrap();

    let recorder = site.record(VM).await.unwrap();
    let log = recorder.begun["log"].as_str().unwrap().to_owned();
    let mut robot = Robot::connect(&recorder.vnc).await.unwrap();
    let playing = session(port);
    playing.play(&mut robot, None, |_, _| {}).await.unwrap();
    drop(robot);
    let mut packet = [0; 64];
    for _ in 0..PACKETS {
        // Otherwise this test would show nothing.
        let received = timeout(LIMIT, outside.recv(&mut packet)).await;
        received.expect("the guest reaches this machine").unwrap();
    }
    recorder.process.stop().await.unwrap().success().unwrap();
    assert!(outside.try_recv(&mut packet).is_err(), "more than was sent");

    let replay: Value = site.json(&["replay", VM, "--log", &log]).await.unwrap();
    // It did the same: what is said at the end stood where the user clicked.
    assert!(replay["matched"].as_u64().unwrap() >= 1, "{replay}");
    assert_eq!(replay["missed"], 0, "{replay}");
    assert!(
        outside.try_recv(&mut packet).is_err(),
        "a packet of the replay came out"
    );
}
