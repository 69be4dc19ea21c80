//! What the targets and the generator of their seeds agree on.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use site::identity::Identity;

/// The protocol that the seeds of `conversation` speak.
pub const VERSION: u16 = 11;

/// Bytes of the disk that the agent of `conversation` has: zeros.
pub const DISK: usize = 1 << 16;

/// The keys of the two sites in `conversation`, of which the first signs its hand-overs to the second:
/// everybody's. Their secrets are the numbers from 0 to 31, and from 32 on.
const KEYS: [&str; 2] = [
    "MC4CAQAwBQYDK2VwBCIEIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f",
    "MC4CAQAwBQYDK2VwBCIEICAhIiMkJSYnKCkqKywtLi8wMTIzNDU2Nzg5Ojs8PT4/",
];

/// The site that calls. Its key is put into `dir`, which others may not write to.
///
/// # Errors
/// As those of files, and of a key that can't be used.
pub fn caller(dir: &Path) -> Result<Identity, Box<dyn std::error::Error>> {
    site(dir, KEYS[0])
}

/// The site that is called.
///
/// # Errors
/// As [`caller`]'s.
pub fn called(dir: &Path) -> Result<Identity, Box<dyn std::error::Error>> {
    site(dir, KEYS[1])
}

fn site(dir: &Path, key: &str) -> Result<Identity, Box<dyn std::error::Error>> {
    let path = dir.join("site.key");
    let pem = format!("-----BEGIN PRIVATE KEY-----\n{key}\n-----END PRIVATE KEY-----\n");
    fs::write(&path, pem)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
    Ok(Identity::load_or_create(dir)?)
}
