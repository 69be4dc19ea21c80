use super::*;

fn row(capture: &str, way: Way, images: &str, bytes: u64) -> Row {
    Row {
        capture: capture.to_owned(),
        way,
        images: images.to_owned(),
        bytes: Some(bytes),
        hashes: None,
        seconds: Some(1.0),
        checked: true,
        note: String::new(),
    }
}

/// All ways of one capture: ours takes `twin` for RAM and 10 besides, the best peer 2,010.
fn capture(results: &mut Results, name: &str, twin: u64) {
    for way in Way::value_variants() {
        let rows = if Way::QEMU.contains(way) {
            vec![row(name, *way, RAM_AND_DEVICE, 10_000)]
        } else {
            let ram = match way {
                Way::Base => 700,
                Way::Twin => twin,
                Way::ChangedZstd => 1000,
                Way::DedupXz => 2000,
                _ => 3000,
            };
            let others = [("disk", 7), ("device", 3)];
            let mut rows = vec![row(name, *way, "ram", ram)];
            rows.extend(others.map(|(image, bytes)| row(name, *way, image, bytes)));
            if *way == Way::Twin {
                for row in &mut rows {
                    row.hashes = Some(1);
                }
            }
            rows
        };
        results.replace(name, *way, rows);
    }
}

#[test]
fn shares_are_of_the_same_images() {
    let mut results = Results::default();
    capture(&mut results, "a", 191);
    let verdict = verdict(&results, "a");
    assert_eq!(verdict.best, Some((Way::DedupXz, 2010)));
    assert_eq!(verdict.of_best, Some(201.0 / 2010.0 * 100.0));
    assert_eq!(verdict.of_qemu, Some(194.0 / 10_000.0 * 100.0));
    assert_eq!(verdict.base, Some(70.0));
    assert_eq!(verdict.hashes, Some(3.0 / 198.0 * 100.0));
    assert!(verdict.unbeaten.is_empty() && verdict.unmeasured.is_empty());
}

#[test]
fn aims_are_held_against_medians() {
    let mut results = Results::default();
    capture(&mut results, "a", 191);
    capture(&mut results, "b", 1);
    capture(&mut results, "c", 100_000);
    let text = markdown(&results);
    for sentence in [
        "- At most 10 % of the best peer's bytes in the median: reached, at 10.0 % over 3 captures.",
        "- At most 2 % of the bytes of QEMU multifd zstd in the median: reached, at 1.9 % over 3",
        "- At most 60 % of changed pages in zstd -3 (by `base`, for RAM) in the median: **missed**",
        "- At most 10 % of the other bytes for hashes (with a twin) in the median: reached, at 1.5 %",
        "- Fewer bytes than every peer on every capture: **missed**. No more bytes than ours: c \
         (rsync -z, rsync -z -B 4096, zstd --patch-from, xdelta3, dedup + xz, QEMU plain,",
        "| c | dedup + xz | 4975.6 % |",
    ] {
        assert!(text.contains(sentence), "{sentence}\n{text}");
    }
    assert!(!text.contains("so not compared"), "{text}");
}

#[test]
fn what_was_not_measured_is_not_beaten() {
    let mut results = Results::default();
    capture(&mut results, "a", 1);
    let mut missing = row("a", Way::Rsync, "none", 0);
    (missing.bytes, missing.seconds, missing.checked) = (None, None, false);
    missing.note = "not installed; install it".to_owned();
    results.replace("a", Way::Rsync, vec![missing]);
    results.replace("a", Way::QemuMultifdZstd, Vec::new());
    let text = markdown(&results);
    for sentence in [
        "- Fewer bytes than every peer that was measured, on every capture.",
        "- Not measured, and so not compared with: a (rsync -z, QEMU multifd zstd).",
        "- At most 2 % of the bytes of QEMU multifd zstd: not measured.",
        "- rsync -z: not installed; install it (a).",
        "- QEMU multifd zstd: not measured.",
        "| a | 710 | 3,010 | 11 | not measured | 3,010 |",
    ] {
        assert!(text.contains(sentence), "{sentence}\n{text}");
    }
    results.replace("a", Way::Twin, Vec::new());
    let text = markdown(&results);
    let sentence = "- Fewer bytes than every peer on every capture: not measured.";
    assert!(text.contains(sentence), "{text}");
    assert_eq!(markdown(&Results::default()), "Not measured.\n");
}

#[test]
fn medians_and_numbers() {
    assert_eq!(median([3.0, 1.0, 2.0].into_iter()), Some(2.0));
    assert_eq!(median([4.0, 1.0, 2.0, 3.0].into_iter()), Some(2.5));
    assert_eq!(median([].into_iter()), None);
    let counts = [0, 999, 1000, 1_234_567].map(count);
    assert_eq!(counts, ["0", "999", "1,000", "1,234,567"]);
}

#[test]
fn a_row_fits_a_line() {
    let line = line(&row("a", Way::Twin, "ram", 12_345));
    assert!(
        line.contains("replay with a twin") && line.contains("12,345"),
        "{line}"
    );
}
