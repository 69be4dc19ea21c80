//! Small made-up results, of which every figure can be told by hand.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;

use super::table::{markdown, replace_section};
use super::*;

/// A row of which `base` takes a million bytes and the log none.
fn row(workload: &str, setting: Setting, repeat: u32, replay: u64, twin: u64) -> Row {
    let ram = |ram| ImageBytes {
        ram,
        ..ImageBytes::default()
    };
    let failed = setting.mode == Mode::Failed;
    let measured = |figure: u64| if failed { 0 } else { figure };
    let bytes = [(BASE, 1_000_000), (REPLAY, replay), (TWIN, twin)];
    Row {
        workload: workload.to_owned(),
        user: setting.user,
        guest: setting.guest,
        network: setting.network,
        mode: setting.mode,
        repeat,
        recorded_seconds: 80.0,
        seconds: match setting.mode {
            Mode::Real => 84.0,
            Mode::Quick => 36.0,
            Mode::Failed => 0.0,
        },
        events: measured(500),
        matched: measured(20),
        missed: measured(u64::from(repeat - 1)),
        log_bytes: 0,
        diverged: Diverged {
            ram: 3000,
            ..Diverged::default()
        },
        bytes: bytes.map(|(name, n)| (name.to_owned(), ram(n))).into(),
    }
}

const REAL: Setting = Setting::REFERENCE;
const QUICK: Setting = Setting::QUICK;
const FAILED: Setting = Setting {
    mode: Mode::Failed,
    ..REAL
};
const ORDINARY: Setting = Setting {
    guest: Guest::Ordinary,
    ..REAL
};

fn of(rows: impl IntoIterator<Item = Row>) -> Results {
    let mut results = Results::new("a machine");
    rows.into_iter().for_each(|row| results.push(row));
    results
}

/// The line of a table that begins so, in the part with this heading; without its bars.
fn line(text: &str, heading: &str, begins: &str) -> Vec<String> {
    let (_, part) = text.split_once(heading).unwrap();
    let part = part.split("\n### ").next().unwrap();
    let line = part
        .lines()
        .find(|line| line.starts_with(&format!("| {begins} |")));
    let line = line.unwrap_or_else(|| panic!("no line {begins:?} in {part}"));
    let cells = line.trim_matches('|').split('|');
    cells.map(|cell| cell.trim().to_owned()).collect()
}

#[test]
fn the_median_of_an_even_number_is_between_the_middle_two() {
    let median = |figures: &[f64]| Spread::of(figures.iter().copied()).map(|all| all.median);
    assert_eq!(median(&[]), None);
    assert_eq!(median(&[3.0]), Some(3.0));
    assert_eq!(median(&[9.0, 1.0, 2.0]), Some(2.0));
    assert_eq!(median(&[8.0, 1.0, 100.0, 4.0]), Some(6.0));
    let all = Spread::of([8.0, 1.0, 100.0, 4.0]).unwrap();
    assert_eq!((all.min, all.max, all.count), (1.0, 100.0, 4));
}

#[test]
fn results_are_read_as_they_were_saved() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bench/replay.json");
    assert_eq!(Results::load(&path).unwrap(), None);
    let mut first = row("files", ORDINARY, 1, 7, 5);
    first.diverged.kinds = BTreeMap::from([("slab".to_owned(), 4)]);
    let results = of([first, row("files", FAILED, 1, 9, 9)]);
    results.save(&path).unwrap();
    assert_eq!(Results::load(&path).unwrap().as_ref(), Some(&results));

    let mut more = results;
    more.push(row("files", QUICK, 2, 8, 8));
    more.save(&path).unwrap();
    assert_eq!(Results::load(&path).unwrap(), Some(more));
    let files: Vec<_> = fs::read_dir(path.parent().unwrap()).unwrap().collect();
    assert_eq!(files.len(), 1, "a temporary file was left: {files:?}");
    let mode = fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o600, 0o600);
}

#[test]
fn the_file_says_what_it_holds_in_plain_words() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("replay.json");
    of([row("files", QUICK, 1, 7, 5)]).save(&path).unwrap();
    let json: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    assert_eq!(json["machine"], "a machine");
    let row = &json["rows"][0];
    assert_eq!(row["guest"], "friendly");
    assert_eq!(row["network"], "on");
    assert_eq!(row["mode"], "quick");
    assert_eq!(row["bytes"]["twin"]["ram"], 5);
    assert_eq!(row["diverged"]["ram"], 3000);
}

#[test]
fn a_damaged_file_is_neither_taken_nor_overwritten_unasked() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("replay.json");
    fs::write(&path, "{\"machine\": \"x\", \"rows\": [{}]}").unwrap();
    assert!(matches!(Results::load(&path), Err(Error::Format { .. })));
    File::create(&path).unwrap().set_len(MAX_FILE + 1).unwrap();
    assert!(matches!(Results::load(&path), Err(Error::TooLarge { .. })));
    assert!(matches!(
        Results::load(dir.path()),
        Err(Error::File { what: "read", .. })
    ));
}

#[test]
fn seconds_that_json_cannot_say_are_refused_and_the_file_stays() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("replay.json");
    let mut results = of([row("files", REAL, 1, 7, 5)]);
    results.save(&path).unwrap();
    let mut bad = row("files", REAL, 2, 7, 5);
    bad.seconds = f64::NAN;
    results.push(bad);
    assert!(matches!(
        results.save(&path),
        Err(Error::NotANumber { repeat: 2, .. })
    ));
    assert_eq!(Results::load(&path).unwrap().unwrap().rows.len(), 1);
}

#[test]
fn a_combination_is_complete_with_all_repeats_at_both_paces() {
    let mut results = of([
        row("files", REAL, 1, 7, 5),
        row("files", REAL, 2, 7, 5),
        row("files", QUICK, 1, 7, 5),
        row("files", ORDINARY, 1, 7, 5),
        row("files", FAILED, 1, 7, 5),
        row("files", FAILED, 2, 7, 5),
    ]);
    let has = |results: &Results, repeats| {
        results.has(
            "files",
            User::Practised,
            Guest::Friendly,
            Network::On,
            repeats,
        )
    };
    assert!(has(&results, 1));
    assert!(!has(&results, 2));
    results.push(row("files", QUICK, 1, 8, 6));
    assert!(!has(&results, 2), "the same repeat twice is one");
    assert_eq!(results.rows.len(), 6);
    results.push(row("files", QUICK, 2, 8, 6));
    assert!(has(&results, 2));
    assert!(!results.has("files", User::Practised, Guest::Ordinary, Network::On, 1));
    assert!(!results.has("files", User::Practised, Guest::Friendly, Network::Off, 1));
    assert!(!results.has("writing", User::Practised, Guest::Friendly, Network::On, 1));
}

#[test]
fn the_log_counts_for_replays_alone() {
    let mut row = row("files", REAL, 1, 150_000, 100_000);
    row.log_bytes = 50_000;
    assert_eq!(row.sent(BASE), Some(1_000_000));
    assert_eq!(row.sent(REPLAY), Some(200_000));
    assert_eq!(row.sent(TWIN), Some(150_000));
    assert_eq!(row.fewer(TWIN).map(f64::round), Some(85.0));
    assert_eq!(row.sent("full"), None);
    row.bytes.remove(BASE);
    assert_eq!(row.fewer(TWIN), None);
}

#[test]
fn sessions_are_in_the_order_of_the_suite() {
    let results = of(["mine", "files", "writing"].map(|name| row(name, REAL, 1, 7, 5)));
    assert_eq!(results.workloads(), ["writing", "files", "mine"]);
}

#[test]
fn bytes_are_medians_and_held_against_the_aims() {
    let results = of([
        row("writing", REAL, 1, 300_000, 50_000),
        row("writing", REAL, 2, 200_000, 40_000),
        row("writing", REAL, 3, 250_000, 90_000),
        row("files", REAL, 1, 300_000, 150_000),
        row("compile", REAL, 1, 1_234_567, 500_000),
    ]);
    let text = markdown(&results);
    assert!(text.contains("Measured on: a machine"));
    assert!(text.contains("not measured at all: spreadsheet, drawing, reading, reference, demo."));
    let part = "### Bytes against";
    assert_eq!(
        line(&text, part, "writing"),
        [
            "writing",
            "3",
            "1,000,000",
            "250,000 (200,000–300,000)",
            "50,000 (40,000–90,000)",
            "95.0 % (91.0–96.0)",
            "0, 1, 2"
        ]
    );
    assert_eq!(line(&text, part, "compile")[3], "1,234,567");
    assert!(text.contains("In the median over 3 sessions"), "{text}");
    assert!(text.contains("sends 85.0 % (50.0–95.0) fewer bytes"));
    assert!(text.contains("at least 90 %; it is not reached"));
    assert!(text.contains("Below 80.5 %, the aim for each session: compile (50.0 %)"));
    assert!(text.contains("; from there to 90 %: files (85.0 %)."));
}

#[test]
fn a_guest_whose_instructions_are_counted_has_a_table_of_its_own() {
    let counted = Setting {
        guest: Guest::Counted,
        ..REAL
    };
    let results = of([
        row("files", REAL, 1, 0, 400_000),
        row("writing", REAL, 1, 0, 500_000),
        row("files", counted, 1, 0, 100_000),
    ]);
    let text = markdown(&results);
    assert_eq!(
        line(&text, "### Bytes against `base`\n", "files")[4],
        "400,000"
    );
    let part = "### Bytes against `base`, instructions counted";
    assert_eq!(line(&text, part, "files")[4], "100,000");
    let (_, part) = text.split_once(part).unwrap();
    let part = part.split("\n### ").next().unwrap();
    assert!(part.contains("In the median over 1 session,"), "{part}");
    assert!(!part.contains("writing"), "{part}");
}

#[test]
fn what_reaches_the_aims_is_said_to() {
    let text = markdown(&of([row("writing", REAL, 1, 60_000, 50_000)]));
    assert!(text.contains("at least 90 %; it is reached"), "{text}");
    assert!(text.contains("No session is below 80.5 %, the aim for each of them.\n"));
}

#[test]
fn a_quick_replay_is_compared_within_its_repeat() {
    let results = of([
        row("writing", REAL, 1, 0, 100_000),
        row("writing", REAL, 2, 0, 200_000),
        row("writing", QUICK, 1, 0, 150_000),
        row("writing", QUICK, 2, 0, 220_000),
        row("writing", QUICK, 3, 0, 1),
        row("files", QUICK, 1, 0, 1),
        row("compile", REAL, 1, 0, 1),
    ]);
    let text = markdown(&results);
    let part = "### Quick against real";
    assert_eq!(
        line(&text, part, "writing"),
        [
            "writing",
            "80.0",
            "84.0",
            "36.0",
            "45.0 %",
            "×1.30 (1.10–1.50)",
            "1 (0–2)"
        ]
    );
    assert_eq!(
        line(&text, part, "files")[1..4],
        ["80.0", "not measured", "36.0"]
    );
    assert_eq!(line(&text, part, "files")[5], "not measured");
    assert_eq!(
        line(&text, part, "compile")[1..5],
        ["80.0", "84.0", "not measured", "not measured"]
    );
    assert!(text.contains("- Time: 45.0 % in the median over 2 sessions."));
    assert!(text.contains("at most 50.0 %; it is reached. No session is above it."));
}

#[test]
fn settings_are_compared_session_by_session() {
    let mut other = row("files", ORDINARY, 1, 0, 400_000);
    other.diverged.ram = 6000;
    let results = of([
        row("files", REAL, 1, 0, 100_000),
        row("writing", REAL, 1, 0, 300_000),
        other,
    ]);
    let text = markdown(&results);
    let (_, part) = text.split_once("### What each").unwrap();
    let lines: Vec<&str> = part.lines().filter(|line| line.starts_with("| ")).collect();
    assert_eq!(lines.len(), 2 + 12);
    assert_eq!(
        lines[2],
        "| friendly | on | real | 2 | 200,000 (100,000–300,000) | 1 | 80.0 % (70.0–90.0) | \
         3,000 | 1 |"
    );
    assert_eq!(
        lines[6],
        "| ordinary | on | real | 1 | 400,000 | ×4.00 | 60.0 % | 6,000 | ×2.00 |"
    );
    assert!(lines[9].starts_with("| ordinary | off | quick | not measured |"));
}

#[test]
fn failed_replays_are_judged_by_the_dearest() {
    let mut results = of([
        row("files", FAILED, 1, 1_005_000, 990_000),
        row("files", FAILED, 2, 1_015_000, 1_000_000),
    ]);
    let text = markdown(&results);
    assert_eq!(
        line(&text, "### Failed", "files"),
        [
            "files",
            "1,000,000",
            "+1.0 % (+0.5 to +1.5)",
            "−0.5 % (−1.0 to 0.0)"
        ]
    );
    assert!(text.contains(
        "Without a twin, the dearest of 2 failed replays sends +1.5 % of `base` more. The aim is \
         at most 2 %; it is reached."
    ));
    results.push(row("writing", FAILED, 1, 1_030_000, 990_000));
    assert!(
        markdown(&results).contains("+3.0 % of `base` more. The aim is at most 2 %; it is not")
    );
}

#[test]
fn kinds_are_medians_summed_over_sessions() {
    let with = |workload, setting, repeat, kinds: &[(&str, u64)]| {
        let mut row = row(workload, setting, repeat, 0, 1);
        let kinds = kinds.iter().map(|(kind, n)| ((*kind).to_owned(), *n));
        row.diverged.kinds = kinds.collect();
        row
    };
    let results = of([
        with("files", REAL, 1, &[("slab", 100), ("page table", 10)]),
        with("files", REAL, 2, &[("slab", 200)]),
        with("writing", REAL, 1, &[("slab", 50), ("anonymous", 1795)]),
        with("files", ORDINARY, 1, &[("slab", 450), ("vmalloc", 7)]),
        // Whose kinds are not known.
        row("drawing", REAL, 1, 0, 1),
    ]);
    let text = markdown(&results);
    let part = "### Pages of RAM";
    let missing = "not measured";
    assert_eq!(
        line(&text, part, "anonymous"),
        ["anonymous", "1,795", "89.8 %", missing, "none", missing]
    );
    assert_eq!(
        line(&text, part, "slab"),
        ["slab", "200", "10.0 %", missing, "×3.00", missing]
    );
    assert_eq!(line(&text, part, "page table")[1..3], ["5", "0.2 %"]);
    assert_eq!(line(&text, part, "vmalloc")[4], "7, from none");
    assert_eq!(line(&text, part, "together")[1], "2,000");
    assert!(text.find("| anonymous |") < text.find("| slab |"));
    assert!(text.contains("Over 2 sessions; not measured: drawing."));
}

#[test]
fn what_an_ordinary_user_did_is_compared_with_itself() {
    let ordinary = |setting| Setting {
        user: User::Ordinary,
        ..setting
    };
    let results = of([
        row("writing", REAL, 1, 0, 100_000),
        row("writing", QUICK, 1, 0, 150_000),
        row("writing", ordinary(REAL), 1, 0, 400_000),
        row("writing", ordinary(QUICK), 1, 0, 480_000),
    ]);
    assert_eq!(results.rows.len(), 4);
    assert!(results.has("writing", User::Ordinary, Guest::Friendly, Network::On, 1));
    assert!(!results.has("writing", User::Ordinary, Guest::Ordinary, Network::On, 1));
    let text = markdown(&results);
    assert_eq!(text.matches("| files |").count(), 0);
    let cell = |part, cell: usize| line(&text, part, "writing")[cell].clone();
    assert_eq!(cell("### Bytes against", 4), "100,000");
    assert_eq!(cell("### Quick against real time\n", 5), "×1.50");
    assert_eq!(
        cell("### Quick against real time, of an ordinary user", 5),
        "×1.20"
    );
}

#[test]
fn nothing_measured_is_said_and_no_figure_made_up() {
    let text = markdown(&Results::default());
    for part in ["Bytes against", "Quick against", "Failed", "Pages of RAM"] {
        let (_, part) = text.split_once(&format!("### {part}")).unwrap();
        let part = part.split("\n### ").next().unwrap();
        assert!(part.to_lowercase().contains("not measured"), "{part}");
    }
    assert!(!text.contains("NaN"));

    let text = markdown(&of([row("files", FAILED, 1, 0, 0)]));
    let cells = line(&text, "### Bytes against", "files");
    assert_eq!(cells[1], "0");
    assert!(cells[2..].iter().all(|cell| cell == "not measured"));
}

#[test]
fn names_cannot_break_a_table() {
    let text = markdown(&of([row("a|b\n<!-- end -->", REAL, 1, 7, 5)]));
    assert!(text.contains("| a\\|b &lt;!-- end --> | 1 |"), "{text}");
}

const DOC: &str = "# Head\r\n<!-- begin -->\nold\n<!-- end -->\ntail, without an end of line";

#[test]
fn a_section_takes_the_place_of_the_old_one() {
    let replaced = replace_section(DOC, "\nnew\n\n", "<!-- begin -->", "<!-- end -->").unwrap();
    assert_eq!(
        replaced,
        "# Head\r\n<!-- begin -->\n\nnew\n\n<!-- end -->\ntail, without an end of line"
    );
    let again = replace_section(&replaced, "new", "<!-- begin -->", "<!-- end -->").unwrap();
    assert_eq!(again, replaced);
    let side_by_side = replace_section("b\ne", "new", "b", "e").unwrap();
    assert_eq!(side_by_side, "b\n\nnew\n\ne");
}

#[test]
fn a_document_without_its_markers_stays_as_it_is() {
    let replace = |doc: &str| replace_section(doc, "new", "<!-- begin -->", "<!-- end -->");
    let missing = |doc: &str| match replace(doc) {
        Err(Error::Marker { marker, found }) => (marker, found),
        other => panic!("{other:?}"),
    };
    assert_eq!(missing("nothing"), ("<!-- begin -->".to_owned(), 0));
    let without_end = DOC.replace("<!-- end -->", "");
    assert_eq!(missing(&without_end), ("<!-- end -->".to_owned(), 0));
    let within_a_line = DOC.replace("<!-- begin -->", "see <!-- begin -->");
    assert_eq!(missing(&within_a_line).1, 0);
    assert_eq!(missing(&format!("{DOC}\n<!-- end -->")).1, 2);
    assert!(matches!(
        replace("<!-- end -->\n<!-- begin -->\n"),
        Err(Error::MarkerOrder { .. })
    ));
    assert!(matches!(
        replace_section("m\n", "new", "m", "m"),
        Err(Error::MarkerOrder { .. })
    ));
}

/// Every tag closed in its turn, attributes quoted, no bare ampersand: what this writer can
/// get wrong.
fn assert_well_formed(xml: &str) {
    let mut open = Vec::new();
    let mut rest = xml;
    while let Some((text, after)) = rest.split_once('<') {
        assert!(!text.contains('>'), "{text}");
        let (tag, next) = after.split_once('>').expect("a tag ends");
        assert!(!tag.contains('<'), "{tag}");
        assert_eq!(tag.matches('"').count() % 2, 0, "{tag}");
        let name = tag.split([' ', '/', '\n']).find(|name| !name.is_empty());
        if tag.starts_with('/') {
            assert_eq!(open.pop(), name, "{tag}");
        } else if !tag.ends_with('/') {
            open.push(name.unwrap());
        }
        rest = next;
    }
    assert!(open.is_empty(), "{open:?}");
    for (at, _) in xml.match_indices('&') {
        let entities = ["&lt;", "&gt;", "&amp;", "&quot;", "&apos;"];
        assert!(entities.iter().any(|name| xml[at..].starts_with(name)));
    }
    assert!(!xml.contains("NaN") && !xml.contains("inf"), "{xml}");
}

#[test]
fn a_picture_is_well_formed_whatever_sessions_are_called() {
    let pictures = [
        Results::default(),
        of([row("<a & \"b\">\u{1}", REAL, 1, 0, u64::MAX)]),
        of([row("files", FAILED, 1, 7, 5)]),
        of([row("files", REAL, 1, 0, 0), row("writing", QUICK, 1, 2, 3)]),
    ]
    .map(|results| plot::svg(&results));
    for picture in &pictures {
        assert_well_formed(picture);
    }
    assert!(pictures[0].contains("not measured"));
    assert!(pictures[1].contains("&lt;a &amp; &quot;b&quot;&gt;<"));
    assert!(
        pictures[2].contains("not measured"),
        "a failed replay is no bar"
    );
    assert!(pictures[3].contains(">files<"));
}

#[test]
fn a_longer_bar_is_more_bytes() {
    let picture = plot::svg(&of([
        row("files", REAL, 1, 120_000, 30_000),
        row("files", REAL, 2, 100_000, 30_000),
        row("files", QUICK, 1, 0, 60_000),
    ]));
    let bars: Vec<f64> = picture
        .lines()
        .filter(|line| line.contains("height=\"13\""))
        .map(|line| {
            let (_, width) = line.split_once(" width=\"").unwrap();
            width.split_once('"').unwrap().0.parse().unwrap()
        })
        .collect();
    let [base, replay, twin, quick] = bars[..] else {
        panic!("{bars:?}");
    };
    assert!(base > replay && replay > quick && quick > twin && twin > 0.0);
    for label in [">1.00 MB<", ">110 kB<", ">30.0 kB<", ">60.0 kB<"] {
        assert!(picture.contains(label), "{label} in {picture}");
    }
}

#[test]
fn bytes_are_written_with_three_digits() {
    let written = [0.0, 999.0, 1000.0, 99_950.0, 999_600.0, 30_949_263.0];
    let texts = ["0 B", "999 B", "1.00 kB", "100 kB", "1.00 MB", "30.9 MB"];
    assert_eq!(written.map(plot::bytes), texts);
    assert_eq!(plot::round_bytes(200_000.0), "200 kB");
    assert_eq!(plot::round_bytes(1_000_000.0), "1 MB");
}
