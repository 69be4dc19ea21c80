//! What is compared from outside: the images of two sites, and the pictures of their screens.

use std::path::Path;

use anyhow::Context;
use image::RgbImage;
use testkit::site::{Difference, Site, compare_disks, compare_files, newest_generation};

use crate::VM;

/// Compares what both sites hold after a migration, and the paused VM itself.
pub(crate) async fn same_images(from: &Site, to: &Site) -> anyhow::Result<bool> {
    let (number, left) = newest_generation(from.dir(), VM)?;
    let (other, right) = newest_generation(to.dir(), VM)?;
    if number != other {
        println!(
            "  generation {number} at {}, but {other} at {}",
            from.name(),
            to.name()
        );
        return Ok(false);
    }
    let live_ram = to.live_ram(VM).await?;
    let live_disk = to.dir().join("vms").join(VM).join("live/run/disk0.qcow2");
    let disk = left.join("disk0.qcow2");
    let compared = tokio::task::spawn_blocking(move || -> anyhow::Result<_> {
        Ok([
            (
                "RAM",
                compare_files(&left.join("ram.img"), &right.join("ram.img"))?,
            ),
            (
                "devices",
                compare_files(&left.join("device.bin"), &right.join("device.bin"))?,
            ),
            ("disk", compare_disks(&disk, &right.join("disk0.qcow2"))?),
            (
                "RAM of the paused VM",
                compare_files(&left.join("ram.img"), &live_ram)?,
            ),
            ("disk of the paused VM", compare_disks(&disk, &live_disk)?),
        ])
    })
    .await??;
    let mut same = true;
    for (what, difference) in compared {
        if difference != Difference::None {
            println!("  {what}: DIFFERENT, {difference:?}");
            same = false;
        }
    }
    if same {
        println!("  images of generation {number} at both sites, and the paused VM: identical");
    }
    Ok(same)
}

/// Compares what left A with what came to D: all strategies faced one state only if it is the same.
pub(crate) async fn same_state(first: &Site, last: &Site) -> anyhow::Result<bool> {
    let (_, left) = newest_generation(first.dir(), VM)?;
    let (_, right) = newest_generation(last.dir(), VM)?;
    let compared = tokio::task::spawn_blocking(move || -> anyhow::Result<_> {
        Ok([
            compare_files(&left.join("ram.img"), &right.join("ram.img"))?,
            compare_files(&left.join("device.bin"), &right.join("device.bin"))?,
            compare_disks(&left.join("disk0.qcow2"), &right.join("disk0.qcow2"))?,
        ])
    })
    .await??;
    let same = compared
        .iter()
        .all(|difference| *difference == Difference::None);
    if same {
        println!("what left A and what came to D: identical, so all three moved the same state");
    } else {
        println!("what left A and what came to D: DIFFERENT, {compared:?}");
    }
    Ok(same)
}

pub(crate) async fn screenshot(site: &Site, path: &Path) -> anyhow::Result<RgbImage> {
    site.json(&["vm", "screenshot", VM, "--out", &path.to_string_lossy()])
        .await?;
    println!(
        "screen of {}: {}",
        site.name().to_uppercase(),
        path.display()
    );
    Ok(image::open(path)
        .with_context(|| format!("cannot read {}", path.display()))?
        .into_rgb8())
}

pub(crate) fn differing_pixels(one: &RgbImage, other: &RgbImage) -> usize {
    let missing = one.pixels().len().abs_diff(other.pixels().len());
    missing
        + one
            .pixels()
            .zip(other.pixels())
            .filter(|(a, b)| a != b)
            .count()
}

pub(crate) fn side_by_side(left: &RgbImage, right: &RgbImage) -> RgbImage {
    let gap = 16;
    let height = left.height().max(right.height());
    let mut both = RgbImage::new(left.width() + gap + right.width(), height);
    image::imageops::replace(&mut both, left, 0, 0);
    image::imageops::replace(&mut both, right, i64::from(left.width() + gap), 0);
    both
}
