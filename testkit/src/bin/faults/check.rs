//! What must hold after a fault, looked at from outside.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context;
use reconciler::{FilePages, ImageTree, Root, no_progress};
use serde_json::Value;
use testkit::site::{Difference, Site, compare_disks, compare_files, newest_generation};

use crate::case::Side;
use crate::world::{VM, World};

/// Cleaning up after a conversation that was cut off takes a moment.
const CLEAN_LIMIT: Duration = Duration::from_secs(20);
/// How often it is looked whether it is done.
const STEP: Duration = Duration::from_millis(50);
/// `replay-migrate` refused, and nothing changed.
const REFUSED: Option<i32> = Some(3);

/// What is found to be wrong, in sentences.
pub(crate) type Violations = Vec<String>;

/// Who has the VM, and how it was found there.
pub(crate) struct Owner {
    pub(crate) side: Side,
    pub(crate) found: String,
}

/// Exactly one site can run the VM, and it runs there when this returns.
///
/// # Errors
/// If it can't be found out, or nobody has it: nothing more can be done with this VM.
pub(crate) async fn one_owner(world: &World, violations: &mut Violations) -> anyhow::Result<Owner> {
    if world.right(Side::Source)? == "offered" {
        // Whatever it answers: to ask is all that is wanted of it.
        world.site(Side::Source).run(&["vm", "resume", VM]).await?;
    }
    let rights = [world.right(Side::Source)?, world.right(Side::Target)?];
    let side = match rights.each_ref().map(|right| right == "held") {
        [true, false] => Side::Source,
        [false, true] => Side::Target,
        [true, true] => {
            violations.push("both sites hold the lease".into());
            anyhow::bail!("both sites hold the lease");
        }
        [false, false] => {
            violations.push(format!("nobody holds the lease: {}", rights.join(", ")));
            anyhow::bail!("nobody holds the lease: {}", rights.join(", "));
        }
    };
    let other = opposite(side);
    let refused = world.site(other).run(&["vm", "start", VM]).await?;
    if refused.code != REFUSED {
        violations.push(format!(
            "the site without the lease does not refuse to start the VM: {:?} {}",
            refused.code, refused.stderr
        ));
    }
    let site = world.site(side);
    let end = Instant::now() + CLEAN_LIMIT;
    let found = state(site, end).await?;
    let (mut now, mut refusal) = (found.clone(), String::new());
    // The site's agent may be at it, too.
    while now != "running" && Instant::now() < end {
        let go_on: &[&str] = match now.as_str() {
            "paused" => &["vm", "resume", VM],
            _ => &["vm", "start", VM],
        };
        let went_on = site.run(go_on).await?;
        if went_on.code != Some(0) {
            refusal = went_on.stderr;
            tokio::time::sleep(STEP).await;
        }
        now = state(site, end).await?;
    }
    if now != "running" {
        violations.push(format!("it is {now} at its owner: {refusal}"));
    }
    Ok(Owner { side, found })
}

/// The VM runs at the target, and nobody had to say so.
pub(crate) async fn goes_on(world: &World, violations: &mut Violations) {
    let end = Instant::now() + CLEAN_LIMIT;
    let mut now = String::new();
    while now != "running" && Instant::now() < end {
        tokio::time::sleep(STEP).await;
        // While an agent starts it, QEMU talks with nobody else.
        now = world.site(Side::Target).state(VM).await.unwrap_or_default();
    }
    if now != "running" {
        violations.push(format!("it does not go on by itself: it is {now}"));
    }
}

/// What the VM does at a site. While an agent starts it, QEMU talks with nobody else.
async fn state(site: &Site, end: Instant) -> anyhow::Result<String> {
    loop {
        match site.state(VM).await {
            Err(_) if Instant::now() < end => tokio::time::sleep(STEP).await,
            state => return Ok(state?),
        }
    }
}

const fn opposite(side: Side) -> Side {
    match side {
        Side::Source => Side::Target,
        Side::Target => Side::Source,
    }
}

/// With the VM at rest at the side that is the source of the next move: no process and no working
/// folder is left, at the latest when the agents have started again. Before, a target may well
/// keep what it has for another attempt.
pub(crate) async fn clean(world: &mut World, violations: &mut Violations) -> anyhow::Result<()> {
    if !cleared(world).await {
        world.restart_agents().await?;
        if !cleared(world).await {
            violations.push(format!("left behind: {}", leftovers(world).join(", ")));
        }
    }
    Ok(())
}

async fn cleared(world: &World) -> bool {
    let end = Instant::now() + CLEAN_LIMIT;
    while !leftovers(world).is_empty() {
        if Instant::now() >= end {
            return false;
        }
        tokio::time::sleep(STEP).await;
    }
    true
}

fn leftovers(world: &World) -> Vec<String> {
    let mut left = Vec::new();
    for &side in Side::ALL {
        let (qemus, due) = (world.qemus(side), usize::from(side == Side::Source));
        if qemus != due {
            left.push(format!("{qemus} QEMUs at the {side}, not {due}"));
        }
        for folder in ["incoming", "following"] {
            let path = world.vm_dir(side).join(folder);
            let within = std::fs::read_dir(&path).map_or(0, Iterator::count);
            if within != 0 {
                left.push(format!("{within} files in {folder} at the {side}"));
            }
        }
    }
    left
}

/// The newest generation of each site is what its manifest says, and the same at both if it has
/// the same number. Whether all of it is so.
///
/// A disk is compared where `disks` says so: it takes longest, and whatever arrives by another
/// attempt is compared then.
pub(crate) async fn generations(
    world: &World,
    disks: bool,
    violations: &mut Violations,
) -> anyhow::Result<bool> {
    let newest = Side::ALL
        .iter()
        // A site that has never had one is none the worse.
        .filter_map(|&side| Some((side, newest_generation(world.site(side).dir(), VM).ok()?)))
        .collect::<Vec<_>>();
    let found = tokio::task::spawn_blocking(move || {
        let mut wrong = Vec::new();
        let mut roots = Vec::new();
        for (side, (number, dir)) in &newest {
            for image in ["ram", "device"] {
                let (told, root) = roots_of(dir, image)?;
                if told != root {
                    wrong.push(format!(
                        "{image} of generation {number} at the {side} is not what its manifest says"
                    ));
                }
                roots.push((*number, image, root));
            }
        }
        if let [(_, (one, left)), (_, (other, right))] = newest.as_slice()
            && one == other
        {
            // Content is the same where the roots are.
            roots.sort_unstable_by_key(|(number, image, _)| (*number, *image));
            roots.dedup();
            if roots.len() != 2 {
                wrong.push(format!("generation {one} differs between the sites"));
            }
            if disks {
                wrong.extend(compare_first_disks(left, right)?);
            }
        }
        Ok::<_, anyhow::Error>(wrong)
    });
    let found = found.await??;
    let fine = found.is_empty();
    violations.extend(found);
    Ok(fine)
}

/// The root that the manifest of a generation tells of an image, and the one that it has.
fn roots_of(dir: &Path, image: &str) -> anyhow::Result<(Root, Root)> {
    let path = dir.join("manifest.json");
    let manifest: Value = serde_json::from_slice(&std::fs::read(&path)?)
        .with_context(|| format!("{} is damaged", path.display()))?;
    let told = serde_json::from_value(manifest[image]["root"].clone())?;
    let file = match image {
        "ram" => "ram.img",
        _ => "device.bin",
    };
    let pages = std::fs::File::open(dir.join(file)).and_then(FilePages::new)?;
    let tree = ImageTree::build(&pages, &no_progress)?;
    Ok((told, tree.root()))
}

fn compare_first_disks(left: &Path, right: &Path) -> anyhow::Result<Option<String>> {
    let disk = "disk0.qcow2";
    let difference = compare_disks(&left.join(disk), &right.join(disk))?;
    Ok((difference != Difference::None)
        .then(|| format!("the disk differs between the sites: {difference:?}")))
}

/// After the second attempt, with the VM paused at the target: what it is to go on with is what
/// stood still at the source, byte by byte, and what the command said it verified.
pub(crate) async fn arrived(
    world: &World,
    report: &Value,
    violations: &mut Violations,
) -> anyhow::Result<bool> {
    let mut fine = generations(world, false, violations).await?;
    let (number, kept) = newest_generation(world.site(Side::Source).dir(), VM)?;
    let (other, taken) = newest_generation(world.site(Side::Target).dir(), VM)?;
    if number != other {
        violations.push(format!(
            "the source kept generation {number}, the target has {other}"
        ));
        fine = false;
    }
    let ram = world.site(Side::Target).live_ram(VM).await?;
    let disk = world.vm_dir(Side::Target).join("live/run/disk0.qcow2");
    let manifest: Value = serde_json::from_slice(&std::fs::read(taken.join("manifest.json"))?)?;
    if manifest["ram"]["root"] != report["verified"]["ram"] {
        violations.push("the command verified another state than was kept".into());
        fine = false;
    }
    let found = tokio::task::spawn_blocking(move || same_run(&kept, &ram, &disk)).await??;
    fine &= found.is_empty();
    violations.extend(found);
    Ok(fine)
}

/// The paused VM itself.
fn same_run(kept: &Path, ram: &Path, disk: &Path) -> anyhow::Result<Vec<String>> {
    let mut wrong = Vec::new();
    let difference = compare_files(&kept.join("ram.img"), ram)?;
    if difference != Difference::None {
        wrong.push(format!("RAM of the paused VM differs: {difference:?}"));
    }
    let difference = compare_disks(&kept.join("disk0.qcow2"), disk)?;
    if difference != Difference::None {
        wrong.push(format!("the paused VM's disk differs: {difference:?}"));
    }
    Ok(wrong)
}
