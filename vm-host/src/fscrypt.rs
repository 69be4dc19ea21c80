//! Folders that the kernel encrypts: `fscrypt`, as ext4, f2fs and ubifs have it.
//!
//! Why: images are mapped, have holes, and are opened by QEMU. A format of our own would take all
//! of that away; the kernel encrypts beneath it, file contents (AES-256-XTS) and names
//! (AES-256-CBC-CTS) alike. Policies are those of version 2, which an ordinary user may give to an
//! empty folder of their own, with a key of which the kernel itself derives the identifier.
//!
//! Source: <https://docs.kernel.org/filesystems/fscrypt.html> and `include/uapi/linux/fscrypt.h`.
//! No crate wraps it; these five calls are all that is needed.
//!
//! Promises: a key is wiped from this process' memory when it has been handed to the kernel, and
//! is never part of an error or of `Debug` output. What is not promised: sizes, times and owners
//! of files, and how many there are, stay in the clear.

#![allow(unsafe_code)]

use std::fmt;
use std::fs::File;
use std::mem::size_of;
use std::path::Path;

use rustix::io::Errno;
use rustix::ioctl::{Opcode, Setter, Updater, ioctl, opcode};
use zeroize::Zeroize;

use crate::Result;
use crate::error::Context as _;

/// Bytes of a key: `FSCRYPT_MAX_KEY_SIZE`, which every kernel takes for AES-256-XTS.
pub const KEY_BYTES: usize = 64;

const IDENTIFIER: usize = 16;
const POLICY_V2: u8 = 2;
const MODE_AES_256_XTS: u8 = 1;
const MODE_AES_256_CTS: u8 = 4;
/// `FSCRYPT_POLICY_FLAGS_PAD_32`: names' lengths show in steps of 32 bytes only.
const PAD_32: u8 = 3;
const SPEC_IDENTIFIER: u32 = 2;
const STATUS_PRESENT: u32 = 2;
const STATUS_INCOMPLETELY_REMOVED: u32 = 3;
const FILES_BUSY: u32 = 1;
const OTHER_USERS: u32 = 2;

/// Names a key without giving it away: the kernel derives it from the key.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct KeyIdentifier([u8; IDENTIFIER]);

impl KeyIdentifier {
    /// The key of this name.
    pub const fn from_bytes(name: [u8; IDENTIFIER]) -> Self {
        Self(name)
    }
}

impl fmt::Display for KeyIdentifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for KeyIdentifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KeyIdentifier({self})")
    }
}

/// How a folder is, and with it what is made in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// Its file system can't encrypt at all.
    Unsupported,
    /// Its kind of file system can, and this one, or this kernel, is not set up for it.
    NotSetUp,
    /// In the clear, on a file system that could do otherwise.
    None,
    /// Encrypted with the key of this name.
    Encrypted(KeyIdentifier),
    /// Encrypted by a policy of version 1.
    Other,
}

/// Whether the kernel has a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyState {
    /// It has not.
    Absent,
    /// It has.
    Present,
    /// It was taken away, and files that were open then still are.
    Leaving,
}

/// What became of a key that was taken away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Removed {
    /// Somebody has files open, which can still be read by who has them open.
    pub files_busy: bool,
    /// Another user has given the key too: nothing is locked.
    pub other_users: bool,
}

#[repr(C)]
struct PolicyV2 {
    version: u8,
    contents: u8,
    names: u8,
    flags: u8,
    reserved: [u8; 4],
    identifier: [u8; IDENTIFIER],
}

#[repr(C)]
struct GetPolicy {
    size: u64,
    policy: PolicyV2,
}

#[repr(C)]
struct Specifier {
    kind: u32,
    reserved: u32,
    identifier: [u8; IDENTIFIER],
    rest: [u8; 16],
}

#[repr(C)]
struct AddKeyHead {
    spec: Specifier,
    raw_size: u32,
    key_id: u32,
    reserved: [u32; 8],
}

#[repr(C)]
struct AddKey {
    head: AddKeyHead,
    raw: [u8; KEY_BYTES],
}

#[repr(C)]
struct RemoveKey {
    spec: Specifier,
    status: u32,
    reserved: [u32; 5],
}

#[repr(C)]
struct KeyStatus {
    spec: Specifier,
    reserved: [u32; 6],
    status: u32,
    flags: u32,
    users: u32,
    out_reserved: [u32; 13],
}

/// `_IOR('f', 19, struct fscrypt_policy_v1)`, twelve bytes, whatever the policy's version.
const SET_POLICY: Opcode = opcode::read::<[u8; 12]>(b'f', 19);
/// `_IOWR('f', 22, __u8[9])`.
const GET_POLICY: Opcode = opcode::read_write::<[u8; 9]>(b'f', 22);
/// `_IOWR('f', 23, struct fscrypt_add_key_arg)`, whose key comes after its end.
const ADD_KEY: Opcode = opcode::read_write::<AddKeyHead>(b'f', 23);
const REMOVE_KEY: Opcode = opcode::read_write::<RemoveKey>(b'f', 24);
const KEY_STATUS: Opcode = opcode::read_write::<KeyStatus>(b'f', 26);

impl Specifier {
    fn of(key: KeyIdentifier) -> Self {
        Self {
            kind: SPEC_IDENTIFIER,
            reserved: 0,
            identifier: key.0,
            rest: [0; 16],
        }
    }
}

/// How a folder is encrypted.
///
/// # Errors
/// If it can't be opened or asked.
pub fn policy(dir: &Path) -> Result<Policy> {
    let folder = File::open(dir).context("open", dir)?;
    let mut asked = GetPolicy {
        size: size_of::<PolicyV2>() as u64,
        policy: PolicyV2 {
            version: 0,
            contents: 0,
            names: 0,
            flags: 0,
            reserved: [0; 4],
            identifier: [0; IDENTIFIER],
        },
    };
    // SAFETY: the structure is `fscrypt_get_policy_ex_arg`: a size, and as many bytes after it, of
    // which the kernel writes no more than the size says. All bytes are valid values of it.
    let answer = unsafe { ioctl(&folder, Updater::<GET_POLICY, _>::new(&mut asked)) };
    match answer {
        Ok(()) if asked.policy.version == POLICY_V2 => {
            Ok(Policy::Encrypted(KeyIdentifier(asked.policy.identifier)))
        }
        Ok(()) => Ok(Policy::Other),
        Err(Errno::NODATA) => Ok(Policy::None),
        Err(Errno::OPNOTSUPP) => Ok(Policy::NotSetUp),
        // Also of kernels before 5.4, which have no policies of version 2.
        Err(Errno::NOTTY) => Ok(Policy::Unsupported),
        Err(error) => Err(error).context("ask for the encryption of", dir),
    }
}

/// Has all that will be made in an empty folder encrypted with a key that was given before.
///
/// # Errors
/// If the folder is not empty, not of this user, or the kernel has not got the key from them.
/// Nothing has changed then.
pub fn encrypt(dir: &Path, key: KeyIdentifier) -> Result<()> {
    let folder = File::open(dir).context("open", dir)?;
    let policy = PolicyV2 {
        version: POLICY_V2,
        contents: MODE_AES_256_XTS,
        names: MODE_AES_256_CTS,
        flags: PAD_32,
        reserved: [0; 4],
        identifier: key.0,
    };
    // SAFETY: the kernel reads the version, then as many bytes as `fscrypt_policy_v2` has, which
    // this structure is, and writes nothing.
    unsafe { ioctl(&folder, Setter::<SET_POLICY, _>::new(policy)) }.context("encrypt", dir)
}

/// Gives the kernel a key for the file system that holds `dir`; what it is called there. To give
/// it once more changes nothing. `key` is wiped.
///
/// # Errors
/// If the file system has no encryption, or this user has given too many keys.
pub fn add_key(dir: &Path, key: &mut [u8; KEY_BYTES]) -> Result<KeyIdentifier> {
    let mut asked = AddKey {
        head: AddKeyHead {
            spec: Specifier::of(KeyIdentifier([0; IDENTIFIER])),
            raw_size: KEY_BYTES as u32,
            key_id: 0,
            reserved: [0; 8],
        },
        raw: *key,
    };
    key.zeroize();
    let answer = File::open(dir).context("open", dir).and_then(|folder| {
        // SAFETY: the structure is `fscrypt_add_key_arg` with the `raw_size` bytes of its key
        // after it; the kernel reads those and writes the identifier. All bytes are valid values.
        unsafe { ioctl(&folder, Updater::<ADD_KEY, _>::new(&mut asked)) }
            .context("give the kernel the key of", dir)
    });
    asked.raw.zeroize();
    answer.map(|()| KeyIdentifier(asked.head.spec.identifier))
}

/// Takes a key away, so that what is encrypted with it can't be read any more, and forgets what
/// the kernel has cached of it.
///
/// # Errors
/// If this user has not given the key.
pub fn remove_key(dir: &Path, key: KeyIdentifier) -> Result<Removed> {
    let folder = File::open(dir).context("open", dir)?;
    let mut asked = RemoveKey {
        spec: Specifier::of(key),
        status: 0,
        reserved: [0; 5],
    };
    // SAFETY: the structure is `fscrypt_remove_key_arg`, of which the kernel writes the status.
    unsafe { ioctl(&folder, Updater::<REMOVE_KEY, _>::new(&mut asked)) }
        .context("take away the key of", dir)?;
    Ok(Removed {
        files_busy: asked.status & FILES_BUSY != 0,
        other_users: asked.status & OTHER_USERS != 0,
    })
}

/// Whether the kernel has this key for the file system that holds `dir`.
///
/// # Errors
/// If it can't be asked.
pub fn key_state(dir: &Path, key: KeyIdentifier) -> Result<KeyState> {
    let folder = File::open(dir).context("open", dir)?;
    let mut asked = KeyStatus {
        spec: Specifier::of(key),
        reserved: [0; 6],
        status: 0,
        flags: 0,
        users: 0,
        out_reserved: [0; 13],
    };
    // SAFETY: the structure is `fscrypt_get_key_status_arg`, of which the kernel writes the end.
    unsafe { ioctl(&folder, Updater::<KEY_STATUS, _>::new(&mut asked)) }
        .context("ask for the key of", dir)?;
    Ok(match asked.status {
        STATUS_PRESENT => KeyState::Present,
        STATUS_INCOMPLETELY_REMOVED => KeyState::Leaving,
        _ => KeyState::Absent,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_calls_are_those_of_the_kernels_header() {
        // `FS_IOC_*` of x86-64, as a C compiler has them.
        assert_eq!(SET_POLICY, 0x800c_6613);
        assert_eq!(GET_POLICY, 0xc009_6616);
        assert_eq!(ADD_KEY, 0xc050_6617);
        assert_eq!(REMOVE_KEY, 0xc040_6618);
        assert_eq!(KEY_STATUS, 0xc080_661a);
        assert_eq!(size_of::<PolicyV2>(), 24);
        assert_eq!(size_of::<AddKey>(), size_of::<AddKeyHead>() + KEY_BYTES);
    }

    #[test]
    fn a_file_system_that_can_not_says_so() {
        // The kernel's own: encrypted nowhere.
        assert_eq!(policy(Path::new("/proc")).unwrap(), Policy::Unsupported);
        assert!(policy(Path::new("/nonexistent")).is_err());
        let mut key = [7; KEY_BYTES];
        assert!(add_key(Path::new("/proc"), &mut key).is_err());
        assert_eq!(key, [0; KEY_BYTES], "wiped whatever comes of it");
    }
}
