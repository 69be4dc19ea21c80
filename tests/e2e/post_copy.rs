//! A VM goes on at a site that has nothing of its disk yet.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tempfile::TempDir;
use testkit::link::{Link, LinkProfile, Rate};
use testkit::robot::Robot;
use testkit::sector::{READ_AT, READ_COUNT, READ_STEP, READS};
use testkit::site::{Running, Site};

use crate::common::{SOON, VM, assert_same_images, boot_sector, eventually, program, start_sector};

/// The length of its disk, of which nothing but the first sector is ever in the guest's memory.
const DISK: usize = 48 << 20;
/// What it reads here is there only after some seconds, were it to come in its turn.
const THERE: &str = "b";

/// A disk that no compressor makes smaller; what is on it.
fn disk(dir: &Path) -> (PathBuf, Vec<u8>) {
    let path = boot_sector(dir, &READS, &[]);
    let mut content = std::fs::read(&path).unwrap();
    // Any numbers do, as long as they don't repeat.
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    while content.len() < DISK {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        content.extend(state.to_le_bytes());
    }
    std::fs::write(&path, &content).unwrap();
    (path, content)
}

async fn press(site: &Site, keys: &str) {
    let vnc = site.vnc(VM).await.unwrap();
    Robot::connect(&vnc)
        .await
        .unwrap()
        .type_text(keys)
        .await
        .unwrap();
}

/// How many sectors the guest has read, and the newest of them.
fn read(ram: &Path) -> (u8, Vec<u8>) {
    let ram = std::fs::read(ram).unwrap();
    (ram[READ_COUNT], ram[READ_AT..READ_AT + 512].to_vec())
}

async fn arriving(site: &Site) -> u64 {
    site.status(VM).await.unwrap()["arriving"].as_u64().unwrap()
}

/// A VM that has read once at A, and has just gone on at B; what it is being moved by, over which line, and its disk.
struct Moving {
    a: Site,
    b: Site,
    command: Running,
    link: Link,
    image: PathBuf,
    content: Vec<u8>,
    /// Bound first, it goes last: what runs in it is ended before.
    _dir: TempDir,
}

async fn moving() -> Moving {
    let dir = tempfile::tempdir().unwrap();
    let site = |name: &str| Site::new(program(), name, dir.path().join(name));
    let (mut a, mut b) = (site("a"), site(THERE));
    let (of_a, of_b) = (a.serve().await.unwrap(), b.serve().await.unwrap());
    a.trust(THERE, of_b.addr, &of_b.key).await.unwrap();
    b.trust("a", of_a.addr, &of_a.key).await.unwrap();
    let (image, content) = disk(dir.path());
    start_sector(&a, &image).await;
    let ram = a.live_ram(VM).await.unwrap();
    eventually("the sector is run", || {
        std::fs::read(&ram).unwrap()[testkit::sector::START..].starts_with(&READS[..16])
    })
    .await;
    press(&a, "x").await;
    eventually("it has read at A", || read(&ram).0 == 1).await;

    // Over a line on which the disk takes twelve seconds.
    let rate: Rate = "32mbit".parse().unwrap();
    let profile = LinkProfile::symmetric(rate, Duration::from_millis(5));
    let link = Link::start(of_b.addr, profile).unwrap();
    a.trust(THERE, link.addr(), &of_b.key).await.unwrap();
    let words = [
        "migrate",
        VM,
        "--to",
        THERE,
        "--strategy",
        "full",
        "--post-copy",
    ];
    let mut command = a.spawn(&words).unwrap();
    let rest = command.until("bring the rest", SOON, |line| line["phase"] == "rest");
    let rest = rest.await.unwrap();
    assert!(rest.is_some(), "{}\n{}", command.stderr(), b.agent_log());
    Moving {
        a,
        b,
        command,
        link,
        image,
        content,
        _dir: dir,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_goes_on_before_its_disk_is_there() {
    let Moving {
        _dir,
        a,
        mut b,
        command,
        link,
        content,
        ..
    } = moving().await;
    assert_eq!(b.state(VM).await.unwrap(), "running");
    let missing = arriving(&b).await;
    assert!(
        missing > DISK as u64 / 2,
        "{missing} of {DISK} bytes are missing"
    );
    let owed = a.status(VM).await.unwrap();
    assert_eq!(owed["owed"], THERE, "{owed}");

    // What it reads comes out of turn.
    let ram = b.live_ram(VM).await.unwrap();
    press(&b, "abcdef").await;
    eventually("it has read at B", || read(&ram).0 == 7).await;
    let at = 7 * READ_STEP;
    assert_eq!(read(&ram).1, content[at..at + 512]);
    assert!(
        arriving(&b).await > 8 << 20,
        "all of it was there too soon to tell"
    );
    let on = b
        .run(&["migrate", VM, "--to", "a", "--strategy", "full"])
        .await
        .unwrap();
    assert_eq!(on.code, Some(3), "{}", on.stderr);
    assert!(on.stderr.contains("still to come from a"), "{}", on.stderr);

    // Without a line it stands still at what is missing, and goes on when there is one again.
    link.cut();
    press(&b, "g").await;
    let still = tokio::time::Instant::now() + 2 * SOON;
    while b.state(VM).await.unwrap() == "running" {
        assert!(
            tokio::time::Instant::now() < still,
            "it runs without its disk"
        );
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    assert_eq!(read(&ram).0, 7);
    link.mend();
    eventually("it goes on", || read(&ram).0 == 8).await;
    let at = 8 * READ_STEP;
    assert_eq!(read(&ram).1, content[at..at + 512]);

    // Whoever brings it may die: the agent of A goes on, and what had come does not come again.
    drop(command);
    let sent = link.bytes_up();
    let end = tokio::time::Instant::now() + 2 * SOON;
    while arriving(&b).await > 0 || !a.status(VM).await.unwrap()["owed"].is_null() {
        let log = b.agent_log();
        assert!(
            tokio::time::Instant::now() < end,
            "it does not get there: {log}"
        );
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    assert!(link.bytes_up() - sent < missing, "what had come came again");
    let name = b.status(VM).await.unwrap()["disks"][0]["hash"]
        .as_str()
        .unwrap()
        .to_owned();
    let there = b.dir().join("images").join(name);
    assert!(std::fs::read(&there).unwrap() == content);

    // From here on it is like any other image, also to the QEMU that runs.
    b.kill_agent();
    press(&b, "h").await;
    eventually("it has read without an agent", || read(&ram).0 == 9).await;
    b.json(&["vm", "stop", VM]).await.unwrap();
    b.json(&["vm", "start", VM]).await.unwrap();
    let ram = b.live_ram(VM).await.unwrap();
    press(&b, "i").await;
    eventually("it has read after a restart", || read(&ram).0 == 10).await;
    let back = b.json(&["migrate", VM, "--to", "a", "--strategy", "base"]);
    back.await.unwrap();
    assert_same_images(&a, &b);
    assert_eq!(a.state(VM).await.unwrap(), "running");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_comes_by_hand_need_not_come_over_the_line() {
    let Moving {
        _dir,
        mut a,
        mut b,
        command,
        image,
        content,
        link: _link,
    } = moving().await;
    // Nobody brings it.
    drop(command);
    a.kill_agent();
    let missing = arriving(&b).await;
    let ram = b.live_ram(VM).await.unwrap();
    assert!(missing > DISK as u64 / 2);
    let doubted = a.run(&["vm", "delete", VM, "--yes"]).await.unwrap();
    assert_eq!(doubted.code, Some(3), "{}", doubted.stderr);
    let disk = image.to_str().unwrap();
    let other = ["vm", "create", "other", "--disk", disk];
    b.json(&other).await.unwrap();
    assert_eq!(arriving(&b).await, 0);
    press(&b, "a").await;
    eventually("it has read what came by hand", || read(&ram).0 == 2).await;
    assert_eq!(read(&ram).1, content[2 * READ_STEP..2 * READ_STEP + 512]);
    // Its QEMU reads the file soon, and the agent is needed no longer.
    let end = tokio::time::Instant::now() + SOON;
    while !reads_file(&b).await {
        assert!(tokio::time::Instant::now() < end, "{}", b.agent_log());
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    b.kill_agent();
    press(&b, "b").await;
    eventually("it has read without an agent", || read(&ram).0 == 3).await;
    // What is owed is settled without a page.
    let again = b.serve_again().await.unwrap();
    a.trust(THERE, again.addr, &again.key).await.unwrap();
    let supplied = a.json(&["supply", VM]).await.unwrap();
    assert_eq!(supplied["pages"].as_u64(), Some(0), "{supplied}");
    assert!(a.status(VM).await.unwrap()["owed"].is_null());
    let nothing = a.run(&["supply", VM]).await.unwrap();
    assert_eq!(nothing.code, Some(3), "{}", nothing.stderr);
}

/// Whether the QEMU of a site has the image of the disk open.
async fn reads_file(site: &Site) -> bool {
    let status = site.status(VM).await.unwrap();
    let hash = status["disks"][0]["hash"].as_str().unwrap();
    let image = site.dir().join("images").join(hash);
    let image = std::fs::metadata(image).unwrap();
    let files = std::fs::read_dir(format!("/proc/{}/fd", status["pid"])).unwrap();
    let mut files = files.filter_map(|file| std::fs::metadata(file.ok()?.path()).ok());
    files.any(|file| (file.dev(), file.ino()) == (image.dev(), image.ino()))
}
