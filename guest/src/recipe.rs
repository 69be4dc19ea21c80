//! The recipe: everything that decides what the guest is, embedded from `guest/recipe/`, and its hash.

use std::path::Path;

use crate::image::Screen;
use crate::{GuestError, sources::Sources};

/// The Debian release that the guest is made of. Later ones start slower under emulation.
pub(crate) const SUITE: &str = "bookworm";
/// Size of the disk: packages take 1.6 GiB of it, the rest is for the user.
pub(crate) const DISK_MIB: u64 = 3072;
/// The date of files and file system that have none of their own (2025-06-15), in seconds since 1970.
pub(crate) const SOURCE_DATE_EPOCH: u64 = 1_750_000_000;
/// The kernel's command line: the disk holds one file system, and messages go to the serial port too. Without the
/// mitigations booting takes two thirds of the time: under emulation they guard nothing, and each system call would
/// throw away the emulator's translated addresses.
pub(crate) const APPEND: &str = "root=/dev/vda rw quiet mitigations=off console=tty0 console=ttyS0";
/// Written by `announce-ready` in the guest.
pub(crate) const READY_MARKER: &str = "replay-migrate: desktop ready";
/// Enough for all applications at once without swapping.
pub(crate) const MEMORY_MIB: u32 = 768;
/// What virtio-vga offers first.
pub(crate) const SCREEN: Screen = Screen {
    width: 1280,
    height: 800,
};

const PACKAGES: &str = include_str!("../recipe/packages");
/// Runs inside the new system.
pub(crate) const CUSTOMISE: &str = include_str!("../recipe/customise.sh");
/// Runs outside of it, and makes the disk.
pub(crate) const DISK_SCRIPT: &str = include_str!("../recipe/disk.sh");

/// A file of ours in the guest.
pub(crate) struct RecipeFile {
    /// From the guest's root, without a leading slash.
    pub(crate) path: &'static str,
    pub(crate) text: &'static str,
    pub(crate) executable: bool,
}

macro_rules! recipe_file {
    ($path:literal, executable: $executable:literal) => {
        RecipeFile {
            path: $path,
            text: include_str!(concat!("../recipe/files/", $path)),
            executable: $executable,
        }
    };
}

/// All files under `recipe/files/`; a test compares this list with the folder.
pub(crate) const FILES: &[RecipeFile] = &[
    recipe_file!("etc/X11/xorg.conf.d/10-screen.conf", executable: false),
    recipe_file!("etc/initramfs-tools/conf.d/replay-migrate", executable: false),
    recipe_file!("etc/initramfs-tools/modules", executable: false),
    recipe_file!("etc/systemd/system/desktop-ready.service", executable: false),
    recipe_file!("etc/systemd/system/desktop.service", executable: false),
    recipe_file!("home/user/.config/gtk-3.0/settings.ini", executable: false),
    recipe_file!("home/user/.gtkrc-2.0", executable: false),
    recipe_file!("home/user/tally/Makefile", executable: false),
    recipe_file!("home/user/tally/main.c", executable: false),
    recipe_file!("home/user/tally/table.c", executable: false),
    recipe_file!("home/user/tally/tally.h", executable: false),
    recipe_file!("home/user/tally/words.c", executable: false),
    recipe_file!("usr/local/lib/desktop/announce-ready", executable: true),
    recipe_file!("usr/local/lib/desktop/session", executable: true),
];

/// The packages to install.
pub(crate) fn packages() -> impl Iterator<Item = &'static str> {
    PACKAGES
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
}

/// Names the guest that this recipe makes from these sources: 32 hexadecimal digits.
pub(crate) fn hash(sources: &Sources) -> String {
    let mut hasher = blake3::Hasher::new_derive_key("replay-migrate 2026-11 guest recipe");
    let mut field = |bytes: &[u8]| {
        hasher.update(&(bytes.len() as u64).to_le_bytes());
        hasher.update(bytes);
    };
    for text in [
        SUITE,
        APPEND,
        READY_MARKER,
        PACKAGES,
        CUSTOMISE,
        DISK_SCRIPT,
    ] {
        field(text.as_bytes());
    }
    for number in [DISK_MIB, SOURCE_DATE_EPOCH, u64::from(MEMORY_MIB)] {
        field(&number.to_le_bytes());
    }
    for number in [SCREEN.width, SCREEN.height] {
        field(&number.to_le_bytes());
    }
    for file in FILES {
        field(file.path.as_bytes());
        field(file.text.as_bytes());
        field(&[u8::from(file.executable)]);
    }
    for line in sources.lines() {
        field(line.as_bytes());
    }
    hasher.finalize().to_hex()[..32].to_owned()
}

/// Writes the recipe's files to `dir`, under the name that [`staged_name`] gives.
pub(crate) fn stage(dir: &Path) -> Result<(), GuestError> {
    let write = |name: String, text: &str| {
        let path = dir.join(name);
        std::fs::write(&path, text).map_err(GuestError::io("write", path))
    };
    for (index, file) in FILES.iter().enumerate() {
        write(staged_name(index), file.text)?;
    }
    write(CUSTOMISE_STAGED.into(), CUSTOMISE)
}

/// The staged name of [`CUSTOMISE`].
pub(crate) const CUSTOMISE_STAGED: &str = "customise.sh";

/// The staged name of [`FILES`]`[index]`: flat, so that no folder's mode or owner leaks into the guest.
pub(crate) fn staged_name(index: usize) -> String {
    format!("file-{index}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files_below(dir: &Path, found: &mut Vec<String>, root: &Path) {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                files_below(&path, found, root);
            } else {
                found.push(
                    path.strip_prefix(root)
                        .unwrap()
                        .to_str()
                        .unwrap()
                        .to_owned(),
                );
            }
        }
    }

    #[test]
    fn every_file_of_the_folder_is_in_the_recipe() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("recipe/files");
        let mut found = Vec::new();
        files_below(&root, &mut found, &root);
        found.sort();
        let mut listed: Vec<_> = FILES.iter().map(|file| file.path).collect();
        listed.sort_unstable();
        assert_eq!(found, listed);
    }

    #[test]
    fn names_survive_the_shells_on_their_way() {
        let plain = |text: &str| {
            text.chars()
                .all(|c| c.is_ascii_alphanumeric() || "._-+/".contains(c))
        };
        assert!(FILES.iter().all(|file| plain(file.path)));
        assert!(packages().all(plain));
        assert!(packages().any(|name| name == "abiword"));
    }

    #[test]
    fn the_guest_announces_what_the_host_waits_for() {
        let announcer = FILES
            .iter()
            .find(|file| file.path.ends_with("announce-ready"))
            .unwrap();
        assert!(announcer.text.contains(&format!("\"{READY_MARKER}\"")));
    }

    #[test]
    fn the_hash_follows_the_sources() {
        let one = Sources::from_mirror("http://one.example/debian");
        let other = Sources::from_mirror("http://other.example/debian");
        assert_eq!(hash(&one), hash(&one));
        assert_ne!(hash(&one), hash(&other));
        assert_eq!(hash(&one).len(), 32);
    }
}
