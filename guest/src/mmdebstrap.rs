//! One run of mmdebstrap: packages in, kernel, initrd and disk out.
//!
//! Everything that crosses between us and the new system goes by mmdebstrap's special hooks (`upload`, `download`),
//! which work alike for root and in a user namespace. The disk is too large for that and holes would be lost: the
//! hook that makes it gets the open file as its standard input.

use std::collections::{BTreeSet, VecDeque};
use std::fs::{File, Permissions};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::image::Description;
use crate::recipe::{self, DISK_MIB};
use crate::sources::{self, Sources};
use crate::{GuestError, Progress};

/// How much of mmdebstrap's messages goes into an error.
const LAST_WORDS_LINES: usize = 12;
const LINE_LIMIT_BYTES: usize = 500;

/// Builds into the empty folder `dir`, which ends up with the three image files of [`Description`].
pub(crate) fn run(
    dir: &Path,
    sources: &Sources,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<(), GuestError> {
    recipe::stage(dir)?;
    let disk_path = dir.join(Description::DISK);
    let disk = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&disk_path)
        .map_err(GuestError::io("create", &disk_path))?;
    // In a user namespace the hook is another user. The folder is ours alone, and what is finished is sealed.
    disk.set_permissions(Permissions::from_mode(0o666))
        .map_err(GuestError::io("open", &disk_path))?;
    let disk_for_hook = disk
        .try_clone()
        .map_err(GuestError::io("open", &disk_path))?;

    let mut child = command(dir, sources)
        .stdin(Stdio::from(disk_for_hook))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(GuestError::io("run", "mmdebstrap"))?;
    let mut last_words = VecDeque::new();
    if let Some(stderr) = child.stderr.take() {
        for line in BufReader::new(stderr).split(b'\n').map_while(Result::ok) {
            let line =
                String::from_utf8_lossy(&line[..line.len().min(LINE_LIMIT_BYTES)]).into_owned();
            if let Some(step) = line
                .strip_prefix("I: ")
                .filter(|step| !step.starts_with("running "))
            {
                progress(Progress::Step(step));
            }
            if last_words.len() == LAST_WORDS_LINES {
                last_words.pop_front();
            }
            last_words.push_back(line);
        }
    }
    let status = child.wait().map_err(GuestError::io("run", "mmdebstrap"))?;
    if !status.success() {
        return Err(failure(status.to_string(), last_words.make_contiguous()));
    }
    // The hook leaves out zeros, also at the end.
    disk.set_len(DISK_MIB << 20)
        .map_err(GuestError::io("write", &disk_path))?;
    unstage(dir)
}

fn command(dir: &Path, sources: &Sources) -> Command {
    let mut command = Command::new("mmdebstrap");
    command
        .current_dir(dir)
        .env("LC_ALL", "C")
        .env("PATH", path_with_sbin())
        .env("TMPDIR", work_dir())
        .env("SOURCE_DATE_EPOCH", recipe::SOURCE_DATE_EPOCH.to_string())
        .env("DISK_MIB", DISK_MIB.to_string())
        .env("DISK_SCRIPT", recipe::DISK_SCRIPT)
        .args([
            "--variant=minbase",
            "--architectures=amd64",
            "--format=null",
        ])
        // The unpacked system is thrown away, so it needs no tidying once the disk is made of it, and nothing of it
        // needs to be durable.
        .args(["--skip=cleanup/apt", "--dpkgopt=force-unsafe-io"])
        .arg(format!(
            "--include={}",
            recipe::packages().collect::<Vec<_>>().join(",")
        ));
    for option in sources::apt_options() {
        command.arg(format!("--aptopt={option}"));
    }
    // Our files come before the packages: what configures the initrd must be there when the kernel makes it.
    let folders: BTreeSet<_> = recipe::FILES
        .iter()
        .filter_map(|file| Path::new(file.path).parent())
        .map(|folder| folder.display())
        .map(|folder| format!("\"$1/{folder}\""))
        .collect();
    let folders = folders.into_iter().collect::<Vec<_>>().join(" ");
    command.arg(format!("--essential-hook=mkdir -p {folders}"));
    for (index, file) in recipe::FILES.iter().enumerate() {
        let mode = if file.executable { "755" } else { "644" };
        command
            .arg(format!(
                "--essential-hook=upload {} /{}",
                recipe::staged_name(index),
                file.path
            ))
            .arg(format!(
                "--essential-hook=chmod {mode} \"$1/{}\"",
                file.path
            ));
    }
    command
        .arg(format!(
            "--customize-hook=upload {} /customise.sh",
            recipe::CUSTOMISE_STAGED
        ))
        .arg(r#"--customize-hook=chroot "$1" sh /customise.sh >&2 && rm "$1/customise.sh""#)
        .arg(format!(
            "--customize-hook=download /vmlinuz {}",
            Description::KERNEL
        ))
        .arg(format!(
            "--customize-hook=download /initrd.img {}",
            Description::INITRD
        ))
        .arg(r#"--customize-hook=sh -c "$DISK_SCRIPT" disk "$1""#)
        .args([recipe::SUITE, "/dev/null"])
        .args(sources.lines());
    command
}

/// Where mmdebstrap unpacks: not `/tmp`, which is memory on many systems.
pub(crate) fn work_dir() -> PathBuf {
    std::env::var_os("TMPDIR")
        .filter(|dir| !dir.is_empty())
        .map_or_else(|| "/var/tmp".into(), PathBuf::from)
}

/// mke2fs is for administrators, so ordinary users' PATH lacks it.
pub(crate) fn path_with_sbin() -> std::ffi::OsString {
    let mut path = std::env::var_os("PATH").unwrap_or_else(|| "/usr/bin:/bin".into());
    path.push(":/usr/sbin:/sbin");
    path
}

fn unstage(dir: &Path) -> Result<(), GuestError> {
    let staged = (0..recipe::FILES.len())
        .map(recipe::staged_name)
        .chain([recipe::CUSTOMISE_STAGED.to_owned()]);
    for path in staged.map(|name| dir.join(name)) {
        std::fs::remove_file(&path).map_err(GuestError::io("remove", &path))?;
    }
    Ok(())
}

/// Tells a lost network from everything else.
fn failure(status: String, last_words: &[String]) -> GuestError {
    const NETWORK: [&str; 6] = [
        "Could not resolve",
        "Temporary failure resolving",
        "Could not connect",
        "Unable to connect",
        "Connection failed",
        "Failed to fetch",
    ];
    match last_words
        .iter()
        .find(|line| NETWORK.iter().any(|sign| line.contains(sign)))
    {
        Some(line) => GuestError::Network {
            said: line.trim().trim_start_matches("E: ").to_owned(),
        },
        None => GuestError::Mmdebstrap {
            status,
            said: last_words.join("\n"),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.lines().map(str::to_owned).collect()
    }

    #[test]
    fn a_lost_network_is_told_from_other_failures() {
        let network = failure(
            "exit status: 25".into(),
            &words(
                "I: running apt-get update...\nW: Failed to fetch http://x/  Could not resolve 'x'\nE: apt-get failed",
            ),
        );
        assert!(
            matches!(network, GuestError::Network { said } if said.contains("Could not resolve 'x'"))
        );
        let other = failure("exit status: 1".into(), &words("E: command failed: mke2fs"));
        assert!(
            matches!(other, GuestError::Mmdebstrap { said, .. } if said == "E: command failed: mke2fs")
        );
    }
}
