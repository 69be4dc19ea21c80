//! `bench reconcile` on a capture made here: no guest is needed.

use std::fs;
use std::path::Path;

use assert_cmd::Command;
use serde_json::Value;

const PAGE: usize = 4096;

/// A page that looks like no other.
fn page(seed: u8) -> Vec<u8> {
    let words =
        (1..=PAGE as u32 / 4).map(|word| word.wrapping_mul(2_654_435_761) ^ u32::from(seed));
    words.flat_map(u32::to_le_bytes).collect()
}

fn state(dir: &Path, name: &str, ram: &[u8], device: u8) {
    let dir = dir.join(name);
    fs::create_dir_all(&dir).unwrap();
    let ram: Vec<u8> = ram.iter().flat_map(|seed| page(*seed)).collect();
    fs::write(dir.join("ram.img"), ram).unwrap();
    let disk = fs::File::create(dir.join("disk.img")).unwrap();
    disk.set_len(1 << 30).unwrap();
    fs::write(dir.join("device.bin"), [device; 5000]).unwrap();
}

fn bench(dir: &Path, more: &[&str]) -> Command {
    let mut command = Command::new(crate::common::program());
    command
        .args(["--json", "--quiet", "bench", "reconcile"])
        .arg(dir)
        .args(more);
    command
}

#[test]
fn a_capture_is_measured_by_every_strategy() {
    let dir = tempfile::tempdir().unwrap();
    let base: Vec<u8> = (0..64).collect();
    let mut source = base.clone();
    source[10..30].fill(100);
    source[30..40].copy_from_slice(&(200..210).collect::<Vec<u8>>());
    let mut replayed = source.clone();
    replayed[35] = 250;
    state(dir.path(), "base", &base, 1);
    state(dir.path(), "source", &source, 2);
    state(dir.path(), "replayed", &replayed, 3);
    state(dir.path(), "twin", &source, 4);
    let codecs = ["--codec", "zstd:3", "--codec", "xbzrle"];
    let ended = bench(dir.path(), &codecs).assert().success();
    let report: Value = serde_json::from_slice(&ended.get_output().stdout).unwrap();
    let rows = report["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 4 * 3);
    let ram = |strategy: &str| {
        let mut rows = rows.iter();
        let row = rows.find(|row| row["strategy"] == strategy && row["image"] == "ram");
        row.unwrap_or_else(|| panic!("no {strategy} in {report}"))
    };
    let total = |strategy| ram(strategy)["bytes"]["total"].as_u64().unwrap();
    assert!(total("base") < total("full"), "{report}");
    assert!(total("replay") < total("base"), "{report}");
    assert_eq!(ram("replay")["pages"]["literal"], 1);
    let deltas = report["deltas"].as_array().unwrap();
    let mut xbzrle = deltas.iter().filter(|row| row["codec"] == "xbzrle");
    let told = xbzrle.find(|row| row["image"] == "ram").unwrap();
    // Pages 30 to 39, and one of those that all became alike.
    assert_eq!(told["pages"], 11, "{report}");
    assert!(ram("twin")["seconds"]["encode"].as_f64().unwrap() > 0.0);
    assert_eq!(report["diverged"]["ram"], 1, "{report}");
    // Any state may stand in for the replayed one: here the base, as if nothing had been replayed.
    let strategies = ["--strategy", "base", "--strategy", "replay"];
    let mut failed = bench(
        dir.path(),
        &[&strategies[..], &["--replayed", "base"]].concat(),
    );
    let failed = failed.assert().success();
    let failed: Value = serde_json::from_slice(&failed.get_output().stdout).unwrap();
    assert_eq!(failed["diverged"]["ram"], 30, "{failed}");

    fs::remove_dir_all(dir.path().join("twin")).unwrap();
    let ended = bench(dir.path(), &["--strategy", "twin"]).assert().code(1);
    let said = String::from_utf8_lossy(&ended.get_output().stderr).into_owned();
    assert!(said.contains("the capture has no"), "{said}");
}

#[test]
fn what_is_no_capture_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let ended = bench(dir.path(), &[]).assert().failure();
    let said = String::from_utf8_lossy(&ended.get_output().stderr).into_owned();
    assert!(said.contains("is no capture"), "{said}");
    bench(dir.path(), &["--codec", "magic"]).assert().code(2);
}
