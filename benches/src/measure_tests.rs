use std::fs;

use reconciler::{PAGE_SIZE, PageDelta};

use super::*;
use crate::report::codec_of;

/// Writes a state: pages of RAM, of a disk and of devices by the byte they are filled with.
fn state(dir: &Path, name: &str, ram: &[u8], disk: &[u8], device: &[u8]) {
    let dir = dir.join(name);
    fs::create_dir_all(&dir).unwrap();
    for (file, pages) in [("ram.img", ram), ("disk.img", disk), ("device.bin", device)] {
        let bytes: Vec<u8> = pages.iter().flat_map(|byte| [*byte; PAGE_SIZE]).collect();
        fs::write(dir.join(file), bytes).unwrap();
    }
}

fn options(strategies: &[Strategy]) -> Options {
    Options {
        strategies: strategies.to_vec(),
        codecs: vec![codec_of("zstd:3").unwrap(), codec_of("lzma:fast").unwrap()],
        deltas: PageDelta::ALL.to_vec(),
        rates: Vec::new(),
        runs: 1,
        replayed: "replayed".into(),
        twin: "twin".into(),
        drop_free: false,
    }
}

#[test]
fn every_strategy_sends_what_its_target_lacks() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    state(at, "base", &[1, 2, 3, 0], &[0, 0, 0, 0], &[8, 9]);
    state(at, "source", &[1, 4, 5, 6], &[0, 0, 7, 0], &[8, 10, 11]);
    state(at, "replayed", &[1, 4, 9, 6], &[0, 0, 7, 1], &[8, 10]);
    state(at, "twin", &[1, 4, 5, 9], &[0, 0, 7, 0], &[8, 10]);
    let mut heard = 0;
    let report = reconcile(at, &options(&[]), &mut |_| heard += 1).unwrap();
    assert_eq!((report.rows.len(), heard), (7 * 3, 7 * 3));
    let sent = |strategy, image: &str| {
        let mut rows = report.rows.iter();
        let row = rows.find(|row| row.strategy == strategy && row.image == image);
        let pages = &row.unwrap().pages;
        pages.literal + pages.delta + pages.patched + pages.lines
    };
    let counts = |image| Strategy::ALL.map(|strategy| sent(strategy, image));
    assert_eq!(counts("ram"), [4, 3, 1, 1]);
    assert_eq!(counts("disk"), [1, 1, 0, 0]);
    assert_eq!(counts("device"), [3, 2, 1, 1]);
    assert!(report.rows.iter().all(|row| row.bytes.total > 0));
    let mut deltas = report.deltas.iter();
    let ram =
        deltas.find(|row| (row.codec.as_str(), row.image.as_str()) == ("changed-bytes", "ram"));
    let ram = ram.unwrap();
    // Pages 1 to 3, every byte of which has changed.
    assert_eq!((ram.pages, ram.overflows), (3, 3));
    assert_eq!((ram.changed_bytes, ram.encoded_bytes), (3 * 4096, 3 * 4096));
    assert_eq!(report.deltas.len(), 3 * 4);
    // A guest that nobody understands.
    assert!(report.kinds.is_empty());
}

#[test]
fn without_a_replay_there_are_two_ways() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["base", "source"] {
        state(dir.path(), name, &[1, 2], &[3], &[4]);
    }
    let report = reconcile(dir.path(), &options(&[]), &mut |_| ()).unwrap();
    let last = report.rows.last().unwrap();
    assert_eq!((report.rows.len(), last.strategy), (3 * 3, Strategy::Base));
    let asked = reconcile(dir.path(), &options(&[Strategy::Twin]), &mut |_| ());
    assert!(matches!(asked, Err(Error::NoState { .. })), "{asked:?}");
    let none = reconcile(&dir.path().join("base"), &options(&[]), &mut |_| ());
    assert!(matches!(
        none,
        Err(Error::NoCapture {
            missing: "base",
            ..
        })
    ));
}

#[test]
fn over_a_line_every_strategy_arrives_and_is_timed() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    state(at, "base", &[1, 2, 3, 0], &[0, 0, 0, 0], &[8, 9]);
    state(at, "source", &[1, 4, 5, 6], &[0, 0, 7, 0], &[8, 10, 11]);
    state(at, "replayed", &[1, 4, 9, 6], &[0, 0, 7, 1], &[8, 10]);
    state(at, "twin", &[1, 4, 5, 9], &[0, 0, 7, 0], &[8, 10]);
    let options = Options {
        codecs: Vec::new(),
        deltas: Vec::new(),
        rates: vec![100_000_000],
        runs: 3,
        ..options(&[])
    };
    let report = reconcile(at, &options, &mut |_| ()).unwrap();
    assert_eq!(report.rows.len(), 4 * 3);
    for row in &report.rows {
        let pace = row.pace.as_ref().unwrap();
        let parts = pace.scan + row.seconds.offer + row.seconds.resolve + pace.pages;
        assert!(pace.total >= parts, "{row:?}");
        assert_eq!((pace.runs, pace.codecs.len()), (3, 1));
        assert!(row.pace_line().unwrap().len() >= Row::pace_heads().len());
    }
    let ram = report
        .rows
        .iter()
        .find(|row| row.strategy == Strategy::Base && row.image == "ram");
    let pace = ram.unwrap().pace.as_ref().unwrap();
    assert_eq!((pace.scanned, pace.changed), (4 * 4096, 3 * 4096));
    assert!(report.yardsticks.unwrap().copy > 0.0);
}

#[test]
fn a_delta_codec_is_measured_alone() {
    let dir = tempfile::tempdir().unwrap();
    state(dir.path(), "base", &[1, 2], &[3], &[4]);
    state(dir.path(), "source", &[1, 5], &[3], &[4]);
    let options = Options {
        codecs: Vec::new(),
        deltas: vec![PageDelta::Xbzrle],
        ..options(&[])
    };
    let report = reconcile(dir.path(), &options, &mut |_| ()).unwrap();
    assert!(report.rows.is_empty());
    let names: Vec<_> = report
        .deltas
        .iter()
        .map(|row| (&row.codec[..], row.pages))
        .collect();
    assert_eq!(names, [("xbzrle", 0), ("xbzrle", 0), ("xbzrle", 1)]);
}
