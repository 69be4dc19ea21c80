//! What is stored is encrypted, where the file system can: a disk that is stolen tells nothing,
//! and nothing opens without the key.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use tempfile::TempDir;
use testkit::site::{Site, newest_generation};

use crate::common::{SOON, VM, boot_sector, eventually, program, start_sector};

/// Room for some generations of a guest that only boots its first sector.
const ROOM: u64 = 384 << 20;
/// In that sector, and from there in the guest's RAM and on its disk.
const MARKER: &[u8] = b"what nobody else is to read";
/// Where a PC's firmware puts the first sector.
const LOADED: usize = 0x7c00;
/// Where it says that it has written to the disk.
const DONE: usize = 0x7e00;

/// An ext4 that can encrypt, on a file of its own; unmounted when dropped.
struct Volume {
    dir: TempDir,
    /// Not encrypted, and not on it.
    elsewhere: TempDir,
}

impl Volume {
    /// `None`, with a word, where this user or this kernel can't.
    fn mount() -> Option<Self> {
        let skipped = |why: &str| {
            eprintln!("skipped: {why}");
            None
        };
        if !rustix::process::getuid().is_root() {
            return skipped("only root mounts a file system of its own");
        }
        let [dir, elsewhere] = [(); 2].map(|()| tempfile::tempdir().unwrap());
        let volume = Self { dir, elsewhere };
        let image = volume.image();
        std::fs::File::create(&image)
            .unwrap()
            .set_len(ROOM)
            .unwrap();
        let made = run(
            "mkfs.ext4",
            &["-q".as_ref(), "-O".as_ref(), "encrypt".as_ref(), &image],
        );
        if !made {
            return skipped("there is no mkfs.ext4 that knows encryption");
        }
        let at = volume.at();
        std::fs::create_dir(&at).unwrap();
        if !run("mount", &["-o".as_ref(), "loop".as_ref(), &image, &at]) {
            return skipped("no loop device, or a kernel without encryption of ext4");
        }
        if vm_host::fscrypt::policy(&at).unwrap() != vm_host::fscrypt::Policy::None {
            return skipped("this kernel does not encrypt ext4");
        }
        Some(volume)
    }

    fn image(&self) -> PathBuf {
        self.elsewhere.path().join("volume.img")
    }

    fn at(&self) -> PathBuf {
        self.dir.path().join("mounted")
    }

    /// Whether these bytes are anywhere on the disk, as somebody reads it who has stolen it.
    fn shows(&self, what: &[u8]) -> bool {
        assert!(run("sync", &["-f".as_ref(), &self.at()]));
        let raw = std::fs::read(self.image()).unwrap();
        memchr::memmem::find(&raw, what).is_some()
    }

    fn site(&self, name: &str) -> Site {
        Site::new(program(), name, self.at().join(name))
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        run("umount", &[&self.at()]);
    }
}

fn run(program: &str, args: &[&Path]) -> bool {
    let output = Command::new(program).args(args).output();
    output.is_ok_and(|output| output.status.success())
}

/// Writes its sector to the second of its disk, and rests.
const CODE: [u8; 31] = [
    0x31, 0xc0, // xor ax, ax
    0x8e, 0xd8, // mov ds, ax
    0x8e, 0xc0, // mov es, ax
    0xb8, 0x01, 0x03, // mov ax, 0x0301: write one sector
    0xb9, 0x02, 0x00, // mov cx, 2: the second
    0xba, 0x80, 0x00, // mov dx, 0x80: of the first disk
    0xbb, 0x00, 0x7c, // mov bx, 0x7c00: this one
    0xcd, 0x13, // int 0x13
    0x72, 0xf0, // jc: once more
    0xc7, 0x06, 0x00, 0x7e, b'O', b'K', // mov word [0x7e00], "OK"
    0xf4, // hlt
    0xeb, 0xfd, // jmp: to hlt
];

fn holds(path: &Path, what: &[u8]) -> bool {
    memchr::memmem::find(&std::fs::read(path).unwrap(), what).is_some()
}

async fn protection(site: &Site, part: &str) -> Value {
    let status = site.json(&["site", "status"]).await.unwrap();
    let folders = status["folders"].as_array().unwrap();
    let found = folders.iter().find(|folder| folder["name"] == part);
    found.map_or(Value::Null, |folder| folder["is"].clone())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stolen_disk_tells_nothing_and_nothing_opens_without_the_key() {
    let Some(volume) = Volume::mount() else {
        return;
    };
    let site = volume.site("site");
    let keys = volume.elsewhere.path().join("token");
    let made = ["--keys", keys.to_str().unwrap(), "site", "id"];
    site.json(&made).await.unwrap();
    for part in ["images", "vms"] {
        assert_eq!(protection(&site, part).await, "unlocked");
    }

    let disk = boot_sector(volume.elsewhere.path(), &CODE, MARKER);
    start_sector(&site, &disk).await;
    let ram = site.live_ram(VM).await.unwrap();
    let written = || std::fs::read(&ram).unwrap()[DONE..].starts_with(b"OK");
    eventually("the guest has written to its disk", written).await;
    site.json(&["checkpoint", VM]).await.unwrap();
    assert!(!volume.shows(MARKER), "while it runs");
    let early = site.run(&["site", "lock"]).await.unwrap();
    assert_eq!(early.code, Some(3), "{}", early.stderr);
    site.json(&["vm", "stop", VM]).await.unwrap();

    // It is there, for who may read it.
    let (_, generation) = newest_generation(site.dir(), VM).unwrap();
    let stored = std::fs::read(generation.join("ram.img")).unwrap();
    assert!(stored[LOADED + CODE.len()..].starts_with(MARKER));
    let first = site.dir().join("vms").join(VM).join("generations/1");
    assert!(holds(&first.join("disk0.qcow2"), MARKER));

    let locked = site.json(&["site", "lock"]).await.unwrap();
    assert_eq!(locked["locked"], "locked");
    assert_eq!(protection(&site, "vms").await, "locked");
    for hidden in [
        MARKER,
        b"ram.img",
        b"disk0.qcow2",
        b"manifest.json",
        b"lease.json",
    ] {
        assert!(!volume.shows(hidden), "{}", String::from_utf8_lossy(hidden));
    }
    assert!(volume.shows(b"site.json"), "what is in the clear is found");

    // Without the key, with another one, and with the right one.
    let away = volume.elsewhere.path().join("state.key");
    let key = keys.join("state.key");
    std::fs::rename(&key, &away).unwrap();
    let start = ["vm", "start", VM];
    for why in ["is not there", "is another one"] {
        let refused = site.run(&start).await.unwrap();
        assert_eq!(refused.code, Some(3), "{}", refused.stderr);
        assert!(refused.stderr.contains(why), "{}", refused.stderr);
        let digits = "0123456789abcdef".repeat(8);
        std::fs::write(&key, format!("replay-migrate-state-key-1 {digits}\n")).unwrap();
        run("chmod", &["600".as_ref(), &key]);
    }
    assert_eq!(protection(&site, "vms").await, "locked");
    std::fs::rename(&away, &key).unwrap();
    site.json(&start).await.unwrap();
    assert_eq!(site.state(VM).await.unwrap(), "running");
    assert!(written(), "where it was");
    site.json(&["vm", "stop", VM, "--discard"]).await.unwrap();
    site.json(&["site", "lock"]).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_there_before_stays_in_the_clear_and_is_told() {
    let Some(volume) = Volume::mount() else {
        return;
    };
    let site = volume.site("site");
    // As made when nobody encrypted.
    let old = site.dir().join("vms/old");
    std::fs::create_dir_all(&old).unwrap();
    std::fs::write(old.join("vm.json"), "{}").unwrap();
    std::fs::write(site.dir().join("site.json"), r#"{ "version": 1 }"#).unwrap();
    std::fs::create_dir(site.dir().join("images")).unwrap();
    let disk = boot_sector(volume.elsewhere.path(), &CODE, MARKER);
    let create = ["vm", "create", VM, "--disk", disk.to_str().unwrap()];
    site.json(&create).await.unwrap();
    assert_eq!(protection(&site, "vms/old").await, "clear");
    assert_eq!(protection(&site, &format!("vms/{VM}")).await, "unlocked");
    assert_eq!(protection(&site, "images").await, "unlocked");
    let serve = ["serve", "--listen", "127.0.0.1:0", "--require-encryption"];
    let refused = site.run(&serve).await.unwrap();
    assert_eq!(refused.code, Some(3), "{}", refused.stderr);
    assert!(refused.stderr.contains("vms/old"), "{}", refused.stderr);

    // Where all is encrypted it serves.
    std::fs::remove_dir_all(&old).unwrap();
    let mut serving = site.spawn(&serve).unwrap();
    let told: Value = serving.next("listen", SOON).await.unwrap();
    assert!(told["listening"].is_string(), "{told}");
    let busy = site.run(&["site", "lock"]).await.unwrap();
    assert_eq!(busy.code, Some(3), "{}", busy.stderr);
    drop(serving);
    site.json(&["site", "lock"]).await.unwrap();
    assert_eq!(protection(&site, &format!("vms/{VM}")).await, "locked");
}
