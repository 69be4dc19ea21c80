//! What must hold on the disks of two sites that lost power at the same moment, looked at from
//! outside; violations are sentences.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, ensure};
use serde_json::Value;
use testkit::site::whole_generation;
use vm_host::disk::OverlayReader;

use crate::story::{Known, SITES, VM};

/// What is found to be wrong.
pub(crate) type Violations = Vec<String>;

/// What a site says of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Right {
    /// It knows no such VM.
    Unknown,
    Held,
    Offered,
    Elsewhere,
}

/// Looks at the state directories of both sites.
pub(crate) fn files(dirs: [&Path; 2], known: &Known) -> Violations {
    let mut wrong = Violations::new();
    for (site, dir) in dirs.into_iter().enumerate() {
        let name = SITES[site];
        let mut says = |error: anyhow::Error| wrong.push(format!("at {name}: {error:#}"));
        let vms = match vms(dir) {
            Ok(vms) => vms,
            Err(error) => {
                says(error);
                continue;
            }
        };
        for vm in &vms {
            for looked in [state(vm), overlays(vm), states(vm)] {
                if let Err(error) = looked {
                    says(error);
                }
            }
        }
        let found = generations(dir, VM).unwrap_or_default();
        for lost in known.generations[site]
            .iter()
            .filter(|n| !found.contains(n))
        {
            wrong.push(format!("at {name}: generation {lost} is lost"));
        }
        if known.spare_gone && vms.iter().any(|vm| !vm.ends_with(VM)) {
            wrong.push(format!("at {name}: the VM that was deleted is back"));
        }
    }
    match [right(dirs[0]), right(dirs[1])] {
        [Ok(one), Ok(other)] => wrong.extend(ownership([one, other], known)),
        rights => {
            let errors = rights.into_iter().filter_map(Result::err);
            wrong.extend(errors.map(|error| format!("{error:#}")));
        }
    }
    wrong
}

/// Whether these rights can be put right, and are what is known.
fn ownership(rights: [Right; 2], known: &Known) -> Option<String> {
    let held = rights.iter().filter(|right| **right == Right::Held).count();
    let offered = rights.contains(&Right::Offered);
    if held > 1 {
        return Some("both sites hold the lease".into());
    }
    match known.owner {
        Some(owner) if rights[owner] != Right::Held => Some(format!(
            "the VM is {}'s, and the leases say {rights:?}",
            SITES[owner]
        )),
        None if known.made && held == 0 && !offered => {
            Some(format!("nobody has the VM: {rights:?}"))
        }
        _ => None,
    }
}

/// What a site's lease says of the VM.
pub(crate) fn right(dir: &Path) -> anyhow::Result<Right> {
    let vm = dir.join("vms").join(VM);
    if !vm.join("vm.json").exists() {
        return Ok(Right::Unknown);
    }
    let lease = json(&vm.join("lease.json"))?;
    Ok(match lease["state"].as_str() {
        Some("held") => Right::Held,
        Some("offered") => Right::Offered,
        Some("elsewhere") => Right::Elsewhere,
        _ => anyhow::bail!("the lease says {lease}"),
    })
}

/// The folders of VMs that are there: with a description, and a name that a VM can have.
fn vms(dir: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut vms = entries(&dir.join("vms"))?;
    vms.retain(|vm| {
        let name = vm.file_name().and_then(|name| name.to_str());
        name.is_some_and(|name| !name.starts_with('.')) && vm.join("vm.json").exists()
    });
    Ok(vms)
}

/// The entries of a folder; none where there is no folder.
fn entries(dir: &Path) -> anyhow::Result<Vec<PathBuf>> {
    if !dir.exists() {
        return Ok(Vec::new());
    }
    let what = || format!("cannot list {}", dir.display());
    let entries = fs::read_dir(dir).with_context(what)?;
    entries.map(|entry| Ok(entry?.path())).collect()
}

fn json(path: &Path) -> anyhow::Result<Value> {
    let text = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("{} is damaged", path.display()))
}

/// What is noted of a VM can be read.
fn state(vm: &Path) -> anyhow::Result<()> {
    json(&vm.join("vm.json"))?;
    json(&vm.join("lease.json"))?;
    for name in ["moving.json", "resuming.json"] {
        let path = vm.join(name);
        if path.exists() {
            json(&path)?;
        }
    }
    Ok(())
}

/// What the last run rests on is there, and a disk.
fn overlays(vm: &Path) -> anyhow::Result<()> {
    let run = vm.join("live/run");
    let noted = run.join("live.json");
    if !noted.exists() {
        return Ok(());
    }
    let live = json(&noted)?;
    for name in live["overlays"].as_array().into_iter().flatten() {
        let top = run.join(name.as_str().unwrap_or_default());
        // A run that never began goes on from its generation.
        if live["ran"] == false && !top.exists() {
            continue;
        }
        let disk = OverlayReader::open(&top);
        disk.with_context(|| format!("{} is no disk", top.display()))?;
        let checked = Command::new("qemu-img")
            .args(["check", "-q", "-f", "qcow2"])
            .arg(&top)
            .output()
            .context("cannot start qemu-img")?;
        // 3: room was lost, which QEMU's order of writing allows, and no data.
        ensure!(
            matches!(checked.status.code(), Some(0 | 3)),
            "{} is no sound disk: {}",
            top.display(),
            String::from_utf8_lossy(&checked.stderr).trim()
        );
    }
    Ok(())
}

/// The numbers of the generations that are there: with a manifest.
pub(crate) fn generations(site: &Path, vm: &str) -> anyhow::Result<Vec<u64>> {
    let dir = site.join("vms").join(vm).join("generations");
    let mut numbers = Vec::new();
    for path in entries(&dir)? {
        let name = path.file_name().and_then(|name| name.to_str());
        let number = name.and_then(|name| name.parse::<u64>().ok());
        numbers.extend(number.filter(|_| path.join("manifest.json").exists()));
    }
    numbers.sort_unstable();
    Ok(numbers)
}

/// Each generation that is there is whole.
fn states(vm: &Path) -> anyhow::Result<()> {
    for dir in entries(&vm.join("generations"))? {
        if dir.join("manifest.json").exists() {
            whole_generation(&dir)?;
        }
    }
    Ok(())
}
