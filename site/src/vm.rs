//! What a VM is, independent of where it runs: a name, hardware, base images.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use vm_host::Hardware;

use crate::error::{Error, Result};

/// A VM's name at a site: letters, digits, `-`, `_` and `.`; at most 64.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct VmName(String);

impl VmName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for VmName {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        if text.is_empty()
            || text.len() > 64
            || text.starts_with(['.', '-'])
            || !text.chars().all(allowed)
        {
            return Err(Error::Refused(format!(
                "{text:?} can't name a VM: use up to 64 letters, digits, '-', '_' and '.', \
                 beginning with a letter or digit"
            )));
        }
        Ok(Self(text.to_owned()))
    }
}

impl TryFrom<String> for VmName {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse().map_err(|error: Error| error.to_string())
    }
}

impl From<VmName> for String {
    fn from(name: VmName) -> Self {
        name.0
    }
}

impl fmt::Display for VmName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Sixteen random bytes that name a VM or a transfer at all sites.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Id(pub [u8; 16]);

impl Id {
    /// A fresh one, from the kernel's random numbers.
    pub fn random() -> Result<Self> {
        use ring::rand::SecureRandom;
        let mut bytes = [0; 16];
        ring::rand::SystemRandom::new()
            .fill(&mut bytes)
            .map_err(|_| Error::Refused("the kernel gives no random numbers".into()))?;
        Ok(Self(bytes))
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl From<Id> for String {
    fn from(id: Id) -> Self {
        id.to_string()
    }
}

impl TryFrom<String> for Id {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        decode_hex(&text)
            .map(Self)
            .ok_or_else(|| "an id is 32 hexadecimal digits".into())
    }
}

/// The BLAKE3 hash of a file, by which both sites know it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct FileHash(pub [u8; 32]);

impl fmt::Display for FileHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for FileHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl From<FileHash> for String {
    fn from(hash: FileHash) -> Self {
        hash.to_string()
    }
}

impl TryFrom<String> for FileHash {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        decode_hex(&text)
            .map(Self)
            .ok_or_else(|| "a hash is 64 hexadecimal digits".into())
    }
}

pub(crate) fn decode_hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    if text.len() != 2 * N || !text.is_ascii() {
        return None;
    }
    let mut bytes = [0; N];
    for (byte, digits) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        let digits = std::str::from_utf8(digits).ok()?;
        if !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            return None;
        }
        *byte = u8::from_str_radix(digits, 16).ok()?;
    }
    Some(bytes)
}

/// A file that every site needs to run the VM and that never changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BaseFile {
    /// Its name at all sites.
    pub hash: FileHash,
    /// Its length in bytes.
    pub bytes: u64,
}

/// How the VM boots when the firmware's boot loader is not used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootFiles {
    /// The Linux kernel.
    pub kernel: BaseFile,
    /// Its initial RAM disk.
    pub initrd: Option<BaseFile>,
    /// Its command line.
    pub append: String,
}

/// A VM, as all sites know it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmRecord {
    /// Tells VMs of one name apart.
    pub id: Id,
    /// Its name.
    pub name: VmName,
    /// What QEMU emulates.
    pub hardware: Hardware,
    /// Read-only base disk images, raw.
    pub disks: Vec<BaseFile>,
    /// Direct kernel boot.
    pub boot: Option<BootFiles>,
    /// The line that the guest writes to its serial port once its desktop is up.
    pub ready_marker: Option<String>,
    /// Chance is taken out of the guest as far as that goes, see
    /// [`crate::local::REPLAY_FRIENDLY`].
    pub replay_friendly: bool,
}

#[cfg(test)]
impl VmRecord {
    /// The VM that tests have: with a disk of a page, whose file is nowhere.
    pub(crate) fn example() -> Self {
        Self {
            id: Id([1; 16]),
            name: "desk".parse().unwrap(),
            hardware: Hardware::new("pc-q35-7.2"),
            disks: vec![BaseFile {
                hash: FileHash([2; 32]),
                bytes: 4096,
            }],
            boot: None,
            ready_marker: None,
            replay_friendly: false,
        }
    }
}

impl VmRecord {
    /// No VM has more disks than this; a peer that says so is refused.
    pub const DISKS: usize = 8;

    /// All base files, each once.
    pub fn base_files(&self) -> Vec<BaseFile> {
        let boot = self
            .boot
            .iter()
            .flat_map(|boot| std::iter::once(boot.kernel).chain(boot.initrd));
        let mut files: Vec<BaseFile> = Vec::new();
        for file in self.disks.iter().copied().chain(boot) {
            if !files.contains(&file) {
                files.push(file);
            }
        }
        files
    }

    /// Checks a record that came from a peer.
    pub fn validate(&self) -> Result<()> {
        self.hardware
            .validate()
            .map_err(Error::host(format!("the hardware of {}", self.name)))?;
        if self.disks.is_empty() || self.disks.len() > Self::DISKS {
            return Err(Error::Refused(format!(
                "{} has {} disks; 1 to {} are possible",
                self.name,
                self.disks.len(),
                Self::DISKS
            )));
        }
        let append = self.boot.as_ref().map(|boot| (&boot.append, 2048));
        let marker = self.ready_marker.as_ref().map(|marker| (marker, 256));
        for (words, most) in append.into_iter().chain(marker) {
            if words.len() > most || words.chars().any(char::is_control) {
                return Err(Error::Refused(format!(
                    "{} has a kernel command line or readiness marker that is too long, or has \
                     control characters in it",
                    self.name
                )));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_can_not_leave_the_folder() {
        for bad in [
            "",
            ".",
            "..",
            "a/b",
            "-x",
            ".x",
            "a b",
            "é",
            &"x".repeat(65),
        ] {
            assert!(bad.parse::<VmName>().is_err(), "{bad:?}");
        }
        for good in ["desk", "Desk-1.old_2", "7", &"x".repeat(64)] {
            assert_eq!(good.parse::<VmName>().unwrap().as_str(), good);
        }
        assert!(serde_json::from_str::<VmName>("\"../x\"").is_err());
    }

    #[test]
    fn words_that_would_drive_the_terminal_are_refused() {
        let file = BaseFile {
            hash: FileHash([0; 32]),
            bytes: 1,
        };
        let with = |append: &str, marker: &str| VmRecord {
            boot: Some(BootFiles {
                kernel: file,
                initrd: None,
                append: append.into(),
            }),
            ready_marker: Some(marker.into()),
            ..VmRecord::example()
        };
        with("quiet", "desktop up").validate().unwrap();
        assert!(with("quiet\u{1b}[2J", "up").validate().is_err());
        assert!(with("quiet", "up\n").validate().is_err());
        assert!(with(&"x".repeat(2049), "up").validate().is_err());
        assert!(with("quiet", &"x".repeat(257)).validate().is_err());
    }

    #[test]
    fn ids_round_trip_as_text_and_refuse_what_is_none() {
        let id = Id([0xa5; 16]);
        let text = serde_json::to_string(&id).unwrap();
        assert_eq!(serde_json::from_str::<Id>(&text).unwrap(), id);
        for bad in ["\"\"", "\"a5\"", "\"+5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5\""] {
            assert!(serde_json::from_str::<Id>(bad).is_err(), "{bad}");
        }
    }
}
