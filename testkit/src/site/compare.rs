//! Images compared from outside: byte by byte, without a word from the program under test.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::Command;

use super::SiteError;

/// Bytes compared at a time.
const CHUNK: usize = 1 << 20;

/// Where two images differ first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Difference {
    /// None: every byte is the same.
    None,
    /// One is longer.
    Length(u64, u64),
    /// At this byte.
    At(u64),
    /// Between two disks, as `qemu-img compare` puts it.
    Disk(String),
}

/// The newest generation of a VM in a state directory: its number and its folder.
pub fn newest_generation(site: &Path, vm: &str) -> Result<(u64, PathBuf), SiteError> {
    let dir = site.join("vms").join(vm).join("generations");
    let failed = |source| SiteError::File {
        path: dir.clone(),
        source,
    };
    let mut newest = None;
    for entry in std::fs::read_dir(&dir).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let number = path
            .file_name()
            .and_then(|name| name.to_str()?.parse::<u64>().ok());
        if let Some(number) = number
            && path.join("manifest.json").exists()
            && newest.as_ref().is_none_or(|(known, _)| *known < number)
        {
            newest = Some((number, path));
        }
    }
    newest.ok_or_else(|| failed(io::ErrorKind::NotFound.into()))
}

/// Compares two plain files.
pub fn compare_files(one: &Path, other: &Path) -> Result<Difference, SiteError> {
    let open = |path: &Path| {
        let failed = |source| SiteError::File {
            path: path.to_owned(),
            source,
        };
        let file = File::open(path).map_err(failed)?;
        let length = file.metadata().map_err(failed)?.len();
        Ok::<_, SiteError>((file, length))
    };
    let ((mut a, length_a), (mut b, length_b)) = (open(one)?, open(other)?);
    if length_a != length_b {
        return Ok(Difference::Length(length_a, length_b));
    }
    let (mut left, mut right) = (vec![0; CHUNK], vec![0; CHUNK]);
    let mut at = 0;
    while at < length_a {
        let length = (CHUNK as u64).min(length_a - at) as usize;
        for (file, buffer, path) in [(&mut a, &mut left, one), (&mut b, &mut right, other)] {
            file.read_exact(&mut buffer[..length])
                .map_err(|source| SiteError::File {
                    path: path.to_owned(),
                    source,
                })?;
        }
        if left[..length] != right[..length] {
            let offset = left.iter().zip(&right).take_while(|(a, b)| a == b).count();
            return Ok(Difference::At(at + offset as u64));
        }
        at += length as u64;
    }
    Ok(Difference::None)
}

/// Compares what two qcow2 overlays show through all they rest on, with QEMU's own program.
pub fn compare_disks(one: &Path, other: &Path) -> Result<Difference, SiteError> {
    // What a paused VM rests on is open elsewhere, and does not change.
    let output = Command::new("qemu-img")
        .args(["compare", "--force-share", "-f", "qcow2", "-F", "qcow2"])
        .args([one, other])
        .output()
        .map_err(|source| SiteError::Start {
            program: "qemu-img".into(),
            source,
        })?;
    match output.status.code() {
        Some(0) => Ok(Difference::None),
        Some(1) => Ok(Difference::Disk(
            String::from_utf8_lossy(&output.stdout).trim().to_owned(),
        )),
        code => Err(SiteError::Failed {
            command: format!("qemu-img compare {} {}", one.display(), other.display()),
            code,
            stderr: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_byte_makes_the_difference() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, bytes: &[u8]| {
            let path = dir.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            path
        };
        let mut bytes = vec![7; 2 * CHUNK + 5];
        let one = write("one", &bytes);
        assert_eq!(
            compare_files(&one, &write("same", &bytes)).unwrap(),
            Difference::None
        );
        let last = bytes.len() - 1;
        bytes[last] = 8;
        let other = write("other", &bytes);
        assert_eq!(
            compare_files(&one, &other).unwrap(),
            Difference::At(last as u64)
        );
        let short = write("short", &bytes[..last]);
        assert!(matches!(
            compare_files(&one, &short).unwrap(),
            Difference::Length(..)
        ));
    }

    #[test]
    fn disks_are_compared_by_what_they_show() {
        let dir = tempfile::tempdir().unwrap();
        let disk = |name: &str, write: &str| {
            let path = dir.path().join(name);
            let run = |program: &str, args: &[&str]| {
                let done = Command::new(program)
                    .args(args)
                    .arg(&path)
                    .output()
                    .unwrap();
                assert!(done.status.success(), "{done:?}");
            };
            let create = Command::new("qemu-img")
                .args(["create", "-q", "-f", "qcow2"])
                .arg(&path)
                .arg("1M")
                .output()
                .unwrap();
            assert!(create.status.success(), "{create:?}");
            run("qemu-io", &["-f", "qcow2", "-c", write]);
            path
        };
        let one = disk("one", "write -P 1 64k 4k");
        // Zeros that are written and zeros that are not are the same to a guest.
        let same = disk("same", "write -P 1 64k 4k");
        let other = disk("other", "write -P 2 64k 4k");
        assert_eq!(compare_disks(&one, &same).unwrap(), Difference::None);
        assert!(matches!(
            compare_disks(&one, &other).unwrap(),
            Difference::Disk(_)
        ));
    }

    #[test]
    fn only_whole_generations_count() {
        let dir = tempfile::tempdir().unwrap();
        let generations = dir.path().join("vms/desk/generations");
        for number in ["2", "10", "11"] {
            std::fs::create_dir_all(generations.join(number)).unwrap();
        }
        for number in ["2", "10"] {
            std::fs::write(generations.join(number).join("manifest.json"), "").unwrap();
        }
        assert_eq!(newest_generation(dir.path(), "desk").unwrap().0, 10);
    }
}
