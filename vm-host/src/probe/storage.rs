//! What files come to lie on: memory, a disk that is encrypted beneath its file system, or one
//! that is not.
//!
//! Source: sysfs. A device-mapper device of dm-crypt has a `dm/uuid` that cryptsetup begins with
//! `CRYPT-` and its kind; what a device rests on is in its `slaves/`, a partition lies in its
//! disk's folder, and a loop device names its file. What does its encryption by itself (drives, a
//! hypervisor, the other end of a network file system) can't be seen from here and counts as not
//! encrypted, or as unknown.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{major, minor};
use serde::Serialize;

/// A device that rests on more others than this rests on itself.
const DEPTH: usize = 16;

/// Kinds of dm-crypt devices; `VERITY` and `INTEGRITY` are cryptsetup's too, and hide nothing.
const KINDS: [&str; 8] = [
    "CRYPT-LUKS1-",
    "CRYPT-LUKS2-",
    "CRYPT-PLAIN-",
    "CRYPT-TCRYPT-",
    "CRYPT-LOOPAES-",
    "CRYPT-BITLK-",
    "CRYPT-FVAULT2-",
    "CRYPT-TEMP-",
];

/// What a file lies on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "on", content = "name", rename_all = "snake_case")]
pub enum Storage {
    /// Memory: gone without power.
    Memory,
    /// A disk of which the kernel encrypts every block (dm-crypt); its name.
    Encrypted(String),
    /// A disk in the clear, as far as this host can see; its name.
    Clear(String),
    /// Of which nothing is known, as of a network file system; its kind.
    Unknown(String),
}

/// What a file or folder lies on.
pub fn of(path: &Path) -> Storage {
    Host::here().of(path, 0)
}

/// The places that memory is swapped out to.
pub fn swap() -> Vec<Storage> {
    Host::here().swap(&fs::read_to_string("/proc/swaps").unwrap_or_default())
}

struct Host {
    sys: PathBuf,
    mounts: String,
}

impl Host {
    fn here() -> Self {
        Self {
            sys: "/sys".into(),
            mounts: fs::read_to_string("/proc/self/mountinfo").unwrap_or_default(),
        }
    }

    fn of(&self, path: &Path, depth: usize) -> Storage {
        let path = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        let Some(mount) = self.mount_of(&path) else {
            return Storage::Unknown("no mount".into());
        };
        if matches!(mount.kind, "tmpfs" | "ramfs") {
            return Storage::Memory;
        }
        let number = fs::metadata(&path).map_or(0, |metadata| metadata.dev());
        let source = || fs::metadata(unescape(mount.source)).map_or(0, |device| device.rdev());
        // Some file systems have numbers of their own, and name the device that they lie on.
        let device = match major(number) {
            0 => source(),
            _ => number,
        };
        if device == 0 {
            return Storage::Unknown(mount.kind.to_owned());
        }
        let all = match mount.kind {
            "btrfs" => self.btrfs(device),
            _ => vec![self.device(device)],
        };
        together(all.iter().map(|dir| self.block(dir, depth)).collect())
            .unwrap_or_else(|| Storage::Unknown(mount.kind.to_owned()))
    }

    fn mount_of(&self, path: &Path) -> Option<Mount<'_>> {
        let mounts = self.mounts.lines().filter_map(Mount::parse);
        // Of two at one place the later one is seen.
        mounts
            .filter(|mount| path.starts_with(&mount.at))
            .max_by_key(|mount| mount.at.components().count())
    }

    /// The folder of a device, by its number.
    fn device(&self, number: u64) -> PathBuf {
        let number = format!("{}:{}", major(number), minor(number));
        let link = self.sys.join("dev/block").join(number);
        fs::canonicalize(&link).unwrap_or(link)
    }

    /// The folders of all devices of the btrfs that this one is of.
    fn btrfs(&self, number: u64) -> Vec<PathBuf> {
        let one = self.device(number);
        let all = list(&self.sys.join("fs/btrfs"))
            .into_iter()
            .map(|system| list(&system.join("devices")))
            .find(|devices| devices.contains(&one));
        all.unwrap_or_else(|| vec![one])
    }

    /// What a block device is, by its folder.
    fn block(&self, dir: &Path, depth: usize) -> Storage {
        let name = dir.file_name().unwrap_or_default().to_string_lossy();
        if depth >= DEPTH || !dir.is_dir() {
            return Storage::Unknown(name.into_owned());
        }
        let read = |file: &str| fs::read_to_string(dir.join(file)).unwrap_or_default();
        let uuid = read("dm/uuid");
        if KINDS.iter().any(|kind| uuid.starts_with(kind)) {
            return Storage::Encrypted(read("dm/name").trim().to_owned());
        }
        if name.starts_with("zram") && matches!(read("backing_dev").trim(), "" | "none") {
            return Storage::Memory;
        }
        let file = read("loop/backing_file");
        if !file.is_empty() {
            return self.of(Path::new(file.trim_end_matches('\n')), depth + 1);
        }
        let beneath = list(&dir.join("slaves"));
        if let Some(all) = together(
            beneath
                .iter()
                .map(|one| self.block(one, depth + 1))
                .collect(),
        ) {
            return all;
        }
        match dir.parent() {
            Some(disk) if dir.join("partition").exists() => match self.block(disk, depth + 1) {
                Storage::Clear(_) => Storage::Clear(name.into_owned()),
                other => other,
            },
            _ => Storage::Clear(name.into_owned()),
        }
    }

    fn swap(&self, swaps: &str) -> Vec<Storage> {
        let lines = swaps.lines().skip(1);
        lines
            .filter_map(|line| line.split_whitespace().next())
            .map(|name| {
                let path = unescape(name);
                match fs::metadata(&path) {
                    Ok(device) if device.rdev() != 0 => self.block(&self.device(device.rdev()), 0),
                    Ok(_) => self.of(&path, 0),
                    Err(_) => Storage::Unknown(path.display().to_string()),
                }
            })
            .collect()
    }
}

/// Several disks are what the worst of them is; `None` of none.
fn together(all: Vec<Storage>) -> Option<Storage> {
    all.into_iter().max_by_key(|one| match one {
        Storage::Memory => 0,
        Storage::Encrypted(_) => 1,
        Storage::Unknown(_) => 2,
        Storage::Clear(_) => 3,
    })
}

/// What a folder of links leads to.
fn list(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .map(|entry| fs::canonicalize(entry.path()).unwrap_or_else(|_| entry.path()))
        .collect()
}

/// A line of `/proc/self/mountinfo`, see `proc_pid_mountinfo(5)`.
struct Mount<'a> {
    at: PathBuf,
    kind: &'a str,
    source: &'a str,
}

impl<'a> Mount<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let (mount, system) = line.split_once(" - ")?;
        let mut system = system.split(' ');
        Some(Self {
            at: unescape(mount.split(' ').nth(4)?),
            kind: system.next()?,
            source: system.next()?,
        })
    }
}

/// Undoes the kernel's `\040`.
fn unescape(text: &str) -> PathBuf {
    use std::os::unix::ffi::OsStringExt;
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        let code = match after {
            [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', ..] if first == b'\\' => {
                Some((a - b'0') * 64 + (b - b'0') * 8 + (c - b'0'))
            }
            _ => None,
        };
        bytes.push(code.unwrap_or(first));
        rest = if code.is_some() { &after[3..] } else { after };
    }
    std::ffi::OsString::from_vec(bytes).into()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// A sysfs of these devices: name, what it rests on, its `dm/uuid`.
    fn sysfs(devices: &[(&str, &[&str], &str)]) -> (tempfile::TempDir, Host) {
        let dir = tempfile::tempdir().unwrap();
        let block = dir.path().join("block");
        for (name, slaves, uuid) in devices {
            let device = block.join(name);
            fs::create_dir_all(device.join("slaves")).unwrap();
            if !uuid.is_empty() {
                fs::create_dir_all(device.join("dm")).unwrap();
                fs::write(device.join("dm/uuid"), uuid).unwrap();
                fs::write(device.join("dm/name"), format!("{name}-name\n")).unwrap();
            }
            for slave in *slaves {
                symlink(block.join(slave), device.join("slaves").join(slave)).unwrap();
            }
            // A name with a slash is a partition.
            if name.contains('/') {
                fs::write(device.join("partition"), "1\n").unwrap();
            }
        }
        let host = Host {
            sys: dir.path().to_owned(),
            mounts: String::new(),
        };
        (dir, host)
    }

    #[test]
    fn dm_crypt_is_found_however_deep_it_lies() {
        const LUKS: &str = "CRYPT-LUKS2-0123-home\n";
        let (dir, host) = sysfs(&[
            ("sda", &[], ""),
            ("sda/sda1", &[], ""),
            ("dm-0", &["sda"], LUKS),
            ("dm-1", &["dm-0"], "LVM-abc\n"),
            ("dm-2", &["dm-0", "sda"], "LVM-striped\n"),
            ("dm-3", &["sda"], "CRYPT-VERITY-0123-root\n"),
            ("dm-4", &["dm-4"], "LVM-loop\n"),
            ("dm-0/dm-0p1", &[], ""),
            ("zram0", &[], ""),
        ]);
        let look = |name: &str| host.block(&dir.path().join("block").join(name), 0);
        let encrypted = Storage::Encrypted("dm-0-name".into());
        assert_eq!(look("dm-0"), encrypted);
        assert_eq!(look("dm-1"), encrypted, "a volume on it");
        assert_eq!(look("dm-0/dm-0p1"), encrypted, "a partition of it");
        assert_eq!(look("sda"), Storage::Clear("sda".into()));
        assert_eq!(look("sda/sda1"), Storage::Clear("sda1".into()));
        assert_eq!(
            look("dm-2"),
            Storage::Clear("sda".into()),
            "half of it is not"
        );
        assert_eq!(look("dm-3"), Storage::Clear("sda".into()), "only verified");
        assert!(
            matches!(look("dm-4"), Storage::Unknown(_)),
            "rests on itself"
        );
        assert!(matches!(look("gone"), Storage::Unknown(_)));
        assert_eq!(look("zram0"), Storage::Memory);
    }

    #[test]
    fn a_file_system_over_several_disks_is_as_the_worst_of_them() {
        let (dir, host) = sysfs(&[("sda", &[], ""), ("dm-0", &["sda"], "CRYPT-LUKS2-a\n")]);
        let block = dir.path().join("block");
        fs::create_dir_all(dir.path().join("dev/block")).unwrap();
        let devices = dir.path().join("fs/btrfs/uuid/devices");
        fs::create_dir_all(&devices).unwrap();
        symlink(block.join("dm-0"), dir.path().join("dev/block/252:0")).unwrap();
        let number = rustix::fs::makedev(252, 0);
        symlink(block.join("dm-0"), devices.join("dm-0")).unwrap();
        let state = |host: &Host| {
            let all = host.btrfs(number);
            together(all.iter().map(|dir| host.block(dir, 0)).collect())
        };
        assert!(matches!(state(&host), Some(Storage::Encrypted(_))));
        symlink(block.join("sda"), devices.join("sda")).unwrap();
        assert!(matches!(state(&host), Some(Storage::Clear(_))));
    }

    #[test]
    fn mounts_are_found_by_their_folders() {
        let host = Host {
            sys: "/nonexistent".into(),
            mounts: "1 0 8:1 / / rw - ext4 /dev/sda1 rw\n\
                     2 1 0:30 / /a\\040b rw shared:1 - tmpfs none rw\n\
                     3 1 0:31 / /a\\040b/c rw - nfs4 server:/x rw\n"
                .into(),
        };
        let kind = |path: &str| host.mount_of(Path::new(path)).unwrap().kind;
        assert_eq!(kind("/a b/x"), "tmpfs");
        assert_eq!(kind("/a b/c/x"), "nfs4");
        assert_eq!(kind("/a bc"), "ext4");
        assert_eq!(host.of(Path::new("/a b/x"), 0), Storage::Memory);
        assert_eq!(
            host.of(Path::new("/a b/c/x"), 0),
            Storage::Unknown("nfs4".into())
        );
        // Nobody swaps.
        assert_eq!(host.swap("Filename Type Size\n"), Vec::new());
        assert_eq!(
            host.swap("Filename Type\n/dev/none partition 5\n"),
            vec![Storage::Unknown("/dev/none".into())]
        );
    }

    #[test]
    fn memory_is_memory_on_this_host() {
        assert_eq!(of(Path::new("/dev/shm")), Storage::Memory);
    }
}
