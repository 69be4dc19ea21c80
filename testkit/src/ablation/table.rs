//! Results as a section of a document, in Markdown.
//!
//! Each figure is a median over repeats, with the least and the greatest in brackets where they
//! differ. The aims that figures are held against are below; a section says of each whether it is
//! reached. Where there is no row there is no figure: the section says "not measured".

use super::words::{
    NOT_MEASURED, Table, counts, decimals, escape, multiple, multiples, named, percent_of,
    percents, ratio, reached, sessions, signed, spread, tenths,
};
use super::{BASE, Error, Guest, Mode, Network, REPLAY, Results, Row, Setting, Spread, TWIN};
use super::{kinds, moves};
use crate::session::SUITE;
use crate::user::User;

/// By how much less than `base` a replay is to send in the median over the sessions, in percent.
const AIM_MEDIAN: f64 = 90.0;
/// The same for each session: the best case of opportunistic replay.
const AIM_EACH: f64 = 80.5;
/// How much of the recorded time a quick replay is to take at most, in percent.
const AIM_TIME: f64 = 50.0;
/// How many times the bytes of a replay at the recorded pace it is to send at most.
const AIM_QUICK_BYTES: f64 = 1.3;
/// By how much more than `base` a failed replay is to send at most, in percent.
const AIM_FAILED: f64 = 2.0;

/// Everything that can be said of the results, with headings of the third level.
pub fn markdown(results: &Results) -> String {
    let parts = [
        head(results),
        against_base(results),
        counted(results),
        quick(results),
        ordinary_users(results),
        settings(results),
        failed(results),
        moves::markdown(results),
        kinds::markdown(results),
    ];
    parts.join("\n")
}

/// Puts `section` between the two lines `begin` and `end` of a document, in place of what is
/// there; everything else stays as it is.
///
/// # Errors
/// The document has not each of the lines once, in this order.
pub fn replace_section(doc: &str, section: &str, begin: &str, end: &str) -> Result<String, Error> {
    let (_, after_begin) = the_line(doc, begin)?;
    let (before_end, _) = the_line(doc, end)?;
    if before_end < after_begin {
        return Err(Error::MarkerOrder {
            begin: begin.to_owned(),
            end: end.to_owned(),
        });
    }
    let (head, tail) = (&doc[..after_begin], &doc[before_end..]);
    Ok(format!("{head}\n{}\n\n{tail}", section.trim()))
}

/// Where the only line that is `marker` begins, and where the next one does.
fn the_line(doc: &str, marker: &str) -> Result<(usize, usize), Error> {
    let mut at = 0;
    let lines = doc.split_inclusive('\n').map(|line| {
        at += line.len();
        (line, at - line.len(), at)
    });
    let found: Vec<_> = lines
        .filter(|(line, ..)| line.trim() == marker.trim())
        .collect();
    match found[..] {
        [(_, from, to)] => Ok((from, to)),
        _ => Err(Error::Marker {
            marker: marker.to_owned(),
            found: found.len(),
        }),
    }
}

fn head(results: &Results) -> String {
    let mut text = String::new();
    if !results.machine.trim().is_empty() {
        text += &format!("Measured on: {}\n\n", escape(results.machine.trim()));
    }
    text += "Figures are medians over the repeats of a session; the least and the greatest are in \
             brackets. Bytes are those of all images and, for a replay, of the log that it needs.\n";
    let measured = results.workloads();
    let missing: Vec<&str> = SUITE
        .iter()
        .map(|(name, _)| *name)
        .filter(|name| !measured.contains(name))
        .collect();
    if !missing.is_empty() {
        text += &format!(
            "\nOf the suite, not measured at all: {}.\n",
            missing.join(", ")
        );
    }
    text
}

fn against_base(results: &Results) -> String {
    let mut text = "### Bytes against `base`\n\nA replay-friendly guest with a network, \
                    replayed at the recorded pace. *With a twin* is what is sent by default, and \
                    what *fewer* is about; *missed* are the anchors that each repeat missed.\n\n"
        .to_owned();
    let workloads = results.workloads();
    text += &bytes_against_base(results, &workloads, Setting::REFERENCE);
    text
}

fn counted(results: &Results) -> String {
    let mut text = "### Bytes against `base`, instructions counted\n\nThe same with `vm create --icount`: the guest's clock \
                    counts its instructions, and replays go by that. Other recordings than those above.\n\n"
        .to_owned();
    let setting = Setting {
        guest: Guest::Counted,
        ..Setting::REFERENCE
    };
    let mut workloads = results.workloads();
    workloads.retain(|workload| results.of(workload, setting).next().is_some());
    if workloads.is_empty() {
        return text + "Not measured.\n";
    }
    text += &bytes_against_base(results, &workloads, setting);
    text
}

/// What replays of these sessions send, held against the aims.
fn bytes_against_base(results: &Results, workloads: &[&str], setting: Setting) -> String {
    let mut table = Table::new(
        1,
        &[
            "session",
            "repeats",
            "`base`",
            "replay without a twin",
            "replay with a twin",
            "fewer than `base`",
            "missed",
        ],
    );
    let mut fewer = Vec::new();
    for workload in workloads.iter().copied() {
        let sent = |strategy| results.spread(workload, setting, |row| sent(row, strategy));
        let share = results.spread(workload, setting, |row| row.fewer(TWIN));
        fewer.extend(share.map(|share| (workload, share.median)));
        let missed: Vec<String> = results
            .of(workload, setting)
            .map(|row| row.missed.to_string())
            .collect();
        table.line(&[
            escape(workload),
            missed.len().to_string(),
            counts(sent(BASE)),
            counts(sent(REPLAY)),
            counts(sent(TWIN)),
            percents(share),
            match missed[..] {
                [] => NOT_MEASURED.to_owned(),
                _ => missed.join(", "),
            },
        ]);
    }
    let mut text = table.text();
    text.push('\n');
    let Some(all) = Spread::of(fewer.iter().map(|(_, share)| *share)) else {
        return text + "Fewer bytes than `base`: not measured.\n";
    };
    text += &format!(
        "In the median over {}, a replay with a twin sends {} fewer bytes than `base`. The aim is \
         at least {} %; it is {}.\n",
        sessions(all.count),
        percents(Some(all)),
        tenths(AIM_MEDIAN),
        reached(all.median >= AIM_MEDIAN),
    );
    let each = tenths(AIM_EACH);
    let worse = named(&fewer, |share| share < AIM_EACH, percent_of);
    text += &match worse.as_str() {
        "" => format!("No session is below {each} %, the aim for each of them"),
        _ => format!("Below {each} %, the aim for each session: {worse}"),
    };
    let between = named(
        &fewer,
        |share| (AIM_EACH..AIM_MEDIAN).contains(&share),
        percent_of,
    );
    text += &match between.as_str() {
        "" => ".\n".to_owned(),
        _ => format!("; from there to {} %: {between}.\n", tenths(AIM_MEDIAN)),
    };
    text
}

fn quick(results: &Results) -> String {
    "### Quick against real time\n\nThe same guests and recordings, of a user who types 150 words a minute and pauses \
     for half a second to four. *Bytes* are those of a quick replay with a twin, as a multiple of what the replay at the \
     recorded pace sends in the same repeat.\n\n"
        .to_owned()
        + &quick_table(results, User::Practised)
}

fn ordinary_users(results: &Results) -> String {
    "### Quick against real time, of an ordinary user\n\nThe same sessions and guests, recorded anew of a user who is as \
     quick as the [Keystroke-Level Model](https://doi.org/10.1145/358886.358895)'s average skilled typist: 200 ms a \
     key, and 1.35 s at least for each pause.\n\n"
        .to_owned()
        + &quick_table(results, User::Ordinary)
}

fn quick_table(results: &Results, user: User) -> String {
    let with = |setting| Setting { user, ..setting };
    let (real_pace, quick_pace) = (with(Setting::REFERENCE), with(Setting::QUICK));
    let mut table = Table::new(
        1,
        &[
            "session",
            "recorded, s",
            "real, s",
            "quick, s",
            "quick, of the recorded time",
            "bytes, quick to real",
            "missed, quick",
        ],
    );
    let (mut times, mut ratios) = (Vec::new(), Vec::new());
    for workload in results.workloads() {
        let quick =
            |figure: fn(&Row) -> f64| results.spread(workload, quick_pace, |row| Some(figure(row)));
        let real =
            |figure: fn(&Row) -> f64| results.spread(workload, real_pace, |row| Some(figure(row)));
        let recorded = |row: &Row| row.recorded_seconds;
        let time = results.spread(workload, quick_pace, |row| {
            (row.recorded_seconds > 0.0).then(|| row.seconds / row.recorded_seconds * 100.0)
        });
        let bytes = results.spread(workload, quick_pace, |row| {
            let mut reals = results.of(workload, real_pace);
            let real = reals.find(|real| real.repeat == row.repeat)?;
            ratio(sent(row, TWIN)?, sent(real, TWIN)?)
        });
        if user != User::Practised && real(recorded).or_else(|| quick(recorded)).is_none() {
            continue;
        }
        times.extend(time.map(|time| (workload, time.median)));
        ratios.extend(bytes.map(|bytes| (workload, bytes.median)));
        table.line(&[
            escape(workload),
            decimals(real(recorded).or_else(|| quick(recorded))),
            decimals(real(|row| row.seconds)),
            decimals(quick(|row| row.seconds)),
            percents(time),
            multiples(bytes),
            spread(quick(|row| row.missed as f64), tenths, ""),
        ]);
    }
    let mut text = table.text();
    text.push('\n');
    text += &at_most("Time", &times, AIM_TIME, percent_of, percents);
    text += &at_most("Bytes", &ratios, AIM_QUICK_BYTES, multiple, multiples);
    text
}

/// Whether the median over the sessions is within an aim, and which sessions are not.
fn at_most(
    what: &str,
    figures: &[(&str, f64)],
    aim: f64,
    one: fn(f64) -> String,
    all: fn(Option<Spread>) -> String,
) -> String {
    let Some(spread) = Spread::of(figures.iter().map(|(_, figure)| *figure)) else {
        return format!("- {what}: {NOT_MEASURED}.\n");
    };
    let above = named(figures, |figure| figure > aim, one);
    let above = match above.as_str() {
        "" => "No session is above it".to_owned(),
        _ => format!("Above it: {above}"),
    };
    format!(
        "- {what}: {} in the median over {}. The aim is at most {}; it is {}. {above}.\n",
        all(Some(spread)),
        sessions(spread.count),
        one(aim),
        reached(spread.median <= aim),
    )
}

fn settings(results: &Results) -> String {
    let mut text = "### What each setting is worth\n\nMedians over the sessions, with the \
                    least and the greatest session in brackets, of replays with a twin. The \
                    multiples are of the first line, each session compared with itself. *Pages* \
                    are those of RAM that differ from the source's at the same place.\n\n"
        .to_owned();
    let mut table = Table::new(
        3,
        &[
            "guest",
            "network",
            "pace",
            "sessions",
            "bytes",
            "to the first line",
            "fewer than `base`",
            "pages",
            "to the first line",
        ],
    );
    for guest in Guest::ALL {
        for network in Network::ALL {
            for mode in Mode::PACES {
                let setting = Setting {
                    user: User::Practised,
                    guest,
                    network,
                    mode,
                };
                table.line(&setting_line(results, setting));
            }
        }
    }
    text += &table.text();
    text
}

fn setting_line(results: &Results, setting: Setting) -> Vec<String> {
    let workloads = results.workloads();
    let over_sessions = |figure: &dyn Fn(&Row) -> Option<f64>| {
        let median = |workload: &&str| Some(results.spread(workload, setting, figure)?.median);
        Spread::of(workloads.iter().filter_map(median))
    };
    let against_first = |figure: &dyn Fn(&Row) -> Option<f64>| {
        let multiple = |workload: &&str| {
            let first = results.spread(workload, Setting::REFERENCE, figure)?;
            let this = results.spread(workload, setting, figure)?;
            ratio(this.median, first.median)
        };
        Spread::of(workloads.iter().filter_map(multiple))
    };
    let bytes = |row: &Row| sent(row, TWIN);
    let pages = |row: &Row| Some(row.diverged.ram as f64);
    let relative = |figure: &dyn Fn(&Row) -> Option<f64>| match setting {
        Setting::REFERENCE => "1".to_owned(),
        _ => multiples(against_first(figure)),
    };
    let measured = over_sessions(&pages).map_or(0, |spread| spread.count);
    let mut cells = vec![
        setting.guest.to_string(),
        setting.network.to_string(),
        setting.mode.to_string(),
    ];
    if measured == 0 {
        cells.push(NOT_MEASURED.to_owned());
        cells.resize(9, String::new());
        return cells;
    }
    cells.extend([
        measured.to_string(),
        counts(over_sessions(&bytes)),
        relative(&bytes),
        percents(over_sessions(&|row| row.fewer(TWIN))),
        counts(over_sessions(&pages)),
        relative(&pages),
    ]);
    cells
}

fn failed(results: &Results) -> String {
    let mut text = "### Failed replays\n\nThe replayed state of another session, under this \
                    one's source: as wrong as a replay can be. What it sends more than `base`, \
                    its log included.\n\n"
        .to_owned();
    let mut table = Table::new(1, &["session", "`base`", "without a twin", "with a twin"]);
    let mut any = false;
    for workload in results.workloads() {
        for guest in Guest::ALL {
            for network in Network::ALL {
                let setting = Setting {
                    user: User::Practised,
                    guest,
                    network,
                    mode: Mode::Failed,
                };
                if results.of(workload, setting).next().is_none() {
                    continue;
                }
                any = true;
                let over = |strategy| {
                    let over = results.spread(workload, setting, |row| over_base(row, strategy));
                    spread(over, signed, " %")
                };
                let base = results.spread(workload, setting, |row| sent(row, BASE));
                let name = match (guest, network) {
                    (Guest::Friendly, Network::On) => escape(workload),
                    _ => format!("{} ({guest} guest, network {network})", escape(workload)),
                };
                table.line(&[name, counts(base), over(REPLAY), over(TWIN)]);
            }
        }
    }
    if !any {
        return text + "Not measured.\n";
    }
    text += &table.text();
    text.push('\n');
    for (strategy, name) in [(REPLAY, "Without a twin"), (TWIN, "With a twin")] {
        let rows = results.rows.iter().filter(|row| row.mode == Mode::Failed);
        let over = Spread::of(rows.filter_map(|row| over_base(row, strategy)));
        text += &match over {
            None => format!("- {name}: {NOT_MEASURED}.\n"),
            Some(over) => format!(
                "- {name}, the dearest of {} failed replays sends {} % of `base` more. The aim is \
                 at most {} %; it is {}.\n",
                over.count,
                signed(over.max),
                tenths(AIM_FAILED),
                reached(over.max <= AIM_FAILED),
            ),
        };
    }
    text
}

/// By how much more than the base copy this way sends, in percent.
fn over_base(row: &Row, strategy: &str) -> Option<f64> {
    row.fewer(strategy).map(|fewer| -fewer)
}

fn sent(row: &Row, strategy: &str) -> Option<f64> {
    row.sent(strategy).map(|bytes| bytes as f64)
}
