//! The programs of QEMU that are run, and their versions.

use std::ffi::OsStr;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use crate::{Error, Result};

/// Names another QEMU than the one on the `PATH`.
pub const QEMU_VARIABLE: &str = "REPLAY_MIGRATE_QEMU";
/// Names another `qemu-img` than the one on the `PATH`.
pub const QEMU_IMG_VARIABLE: &str = "REPLAY_MIGRATE_QEMU_IMG";

/// The emulator.
pub fn qemu() -> PathBuf {
    chosen(QEMU_VARIABLE, "qemu-system-x86_64")
}

/// The image tool.
pub fn qemu_img() -> PathBuf {
    chosen(QEMU_IMG_VARIABLE, "qemu-img")
}

fn chosen(variable: &str, default: &str) -> PathBuf {
    std::env::var_os(variable)
        .filter(|v| !v.is_empty())
        .map_or_else(|| default.into(), Into::into)
}

/// The Debian package of a program.
fn package_of(program: &Path) -> &'static str {
    if program.to_string_lossy().contains("qemu-img") {
        "qemu-utils"
    } else {
        "qemu-system-x86"
    }
}

/// A version of QEMU, as 7.2.22.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version {
    /// First number.
    pub major: u32,
    /// Second number.
    pub minor: u32,
    /// Third number.
    pub micro: u32,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

impl Version {
    /// Finds the version in what `--version` prints: the first word that is one.
    fn parse(text: &str) -> Option<Self> {
        text.split_ascii_whitespace().find_map(|word| {
            let mut numbers = word.split('.').map(|n| n.parse().ok());
            let (major, minor) = (numbers.next()??, numbers.next()??);
            Some(Self {
                major,
                minor,
                micro: numbers.next().flatten().unwrap_or(0),
            })
        })
    }
}

/// The version of a QEMU program.
pub fn version(program: &Path) -> Result<Version> {
    let said = run(program, ["--version"], "tell its version")?;
    Version::parse(&said).ok_or_else(|| Error::Program {
        program: program.to_owned(),
        doing: "tell its version".into(),
        reason: format!("it said {:?}", said.lines().next().unwrap_or_default()),
    })
}

/// A machine type of a QEMU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MachineType {
    /// Its name, as `pc-q35-7.2`.
    pub name: String,
    /// The moving name for it, as `q35`.
    pub alias: Option<String>,
}

/// The versioned q35 machine types of a QEMU, newest first.
pub fn machine_types(program: &Path) -> Result<Vec<MachineType>> {
    Ok(parse_machines(&run(
        program,
        ["-machine", "help"],
        "list its machine types",
    )?))
}

fn parse_machines(help: &str) -> Vec<MachineType> {
    let mut aliases = std::collections::HashMap::new();
    let mut machines = Vec::new();
    for line in help.lines() {
        let Some((name, description)) = line.split_once(char::is_whitespace) else {
            continue;
        };
        if let Some(target) = description
            .split_once("(alias of ")
            .and_then(|(_, rest)| rest.split_once(')'))
        {
            aliases.insert(target.0.to_owned(), name.to_owned());
        } else if let Some(version) = machine_version(name) {
            machines.push((version, name.to_owned()));
        }
    }
    machines.sort_unstable_by(|a, b| b.cmp(a));
    let with_alias = |name: String| MachineType {
        alias: aliases.remove(&name),
        name,
    };
    machines
        .into_iter()
        .map(|(_, name)| name)
        .map(with_alias)
        .collect()
}

/// The QEMU release that a versioned q35 machine type came with.
pub fn machine_version(machine: &str) -> Option<Version> {
    let text = machine.strip_prefix("pc-q35-")?;
    text.starts_with(|c: char| c.is_ascii_digit())
        .then(|| Version::parse(text))?
}

/// The machine type that `q35` means in this QEMU: what new VMs get.
pub fn default_machine(program: &Path) -> Result<String> {
    let machines = machine_types(program)?;
    let aliased = machines.iter().find(|m| m.alias.as_deref() == Some("q35"));
    aliased
        .or(machines.first())
        .map(|m| m.name.clone())
        .ok_or_else(|| Error::Program {
            program: program.to_owned(),
            doing: "offer a q35 machine".into(),
            reason: "it has none".into(),
        })
}

/// Runs a program to its end and returns its output; its standard error is the error's reason.
pub(crate) fn run<S: AsRef<OsStr>>(
    program: &Path,
    args: impl IntoIterator<Item = S>,
    doing: &str,
) -> Result<String> {
    let output = std::process::Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .output()
        .map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => Error::MissingProgram {
                program: program.into(),
                package: package_of(program),
            },
            _ => Error::Io {
                doing: "start",
                path: program.into(),
                source,
            },
        })?;
    if !output.status.success() {
        let words = String::from_utf8_lossy(&output.stderr);
        let words = words.trim();
        return Err(Error::Program {
            program: program.to_owned(),
            doing: doing.to_owned(),
            reason: if words.is_empty() {
                output.status.to_string()
            } else {
                words.to_owned()
            },
        });
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_found() {
        let parse = |text| Version::parse(text).unwrap().to_string();
        assert_eq!(
            parse("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)"),
            "7.2.22"
        );
        assert_eq!(
            parse("qemu-img version 10.0.2 (Debian 1:10.0.2+ds)\nCopyright"),
            "10.0.2"
        );
        assert_eq!(Version::parse("no version here"), None);
        assert!(machine_version("pc-q35-10.0") > machine_version("pc-q35-9.2"));
        assert_eq!(machine_version("pc-i440fx-7.2"), None);
    }

    #[test]
    fn machines_are_sorted_by_version() {
        let help = "Supported machines are:\n\
            pc-q35-7.2  Standard PC (Q35 + ICH9, 2009)\n\
            q35  Standard PC (Q35 + ICH9, 2009) (alias of pc-q35-10.0)\n\
            pc-q35-10.0  Standard PC (Q35 + ICH9, 2009)\n\
            pc-i440fx-7.2  Standard PC\n";
        let machines = parse_machines(help);
        assert_eq!(machines.len(), 2);
        assert_eq!(machines[0].name, "pc-q35-10.0");
        assert_eq!(machines[0].alias.as_deref(), Some("q35"));
        assert_eq!(machines[1].alias, None);
    }
}
