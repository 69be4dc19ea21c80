//! Rows as a section of a document, in Markdown, and held against the aims.
//!
//! Where there is no row there is no figure: the section says so, and a peer that was not
//! measured is not one that was beaten.

use std::collections::{BTreeMap, BTreeSet};

use clap::ValueEnum as _;

use crate::rows::{RAM_AND_DEVICE, Results, Row, Way};

/// Of the best peer that does not replay, in percent, in the median over captures.
const AIM_PEER: f64 = 10.0;
/// Of QEMU's multifd with zstd, for RAM and device state.
const AIM_QEMU: f64 = 2.0;
/// Of what changed pages take in zstd -3, for `base` and RAM.
const AIM_BASE: f64 = 60.0;
/// What hashes take of the other bytes, with a twin.
const AIM_HASHES: f64 = 10.0;

const NOT_MEASURED: &str = "not measured";

/// What a capture's figures come to.
struct Verdict {
    /// The least that a peer takes which sends all images, and which that is.
    best: Option<(Way, u64)>,
    /// The shares in percent.
    of_best: Option<f64>,
    of_qemu: Option<f64>,
    base: Option<f64>,
    hashes: Option<f64>,
    /// Peers that do not take more than we do.
    unbeaten: Vec<Way>,
    /// Peers that there is no figure of.
    unmeasured: Vec<Way>,
}

/// One of a capture's shares, in percent.
type Share = fn(&Verdict) -> Option<f64>;

/// For a terminal.
pub(crate) fn line(row: &Row) -> String {
    let bytes = row.bytes.map_or_else(|| "-".to_owned(), count);
    let seconds = row
        .seconds
        .map_or_else(|| "-".to_owned(), |s| format!("{s:.1}"));
    let name = row.way.name().replace('`', "");
    format!(
        "{:<16} {name:<24} {:<10} {bytes:>13} {seconds:>7} s  {}",
        row.capture, row.images, row.note
    )
    .trim_end()
    .to_owned()
}

/// Everything that can be said, with headings of the third level.
pub(crate) fn markdown(results: &Results) -> String {
    let captures = results.captures();
    if captures.is_empty() {
        return "Not measured.\n".to_owned();
    }
    let verdicts: Vec<(&str, Verdict)> = captures
        .iter()
        .map(|capture| (*capture, verdict(results, capture)))
        .collect();
    let parts = [
        head(results),
        aims(&verdicts),
        all_images(results, &captures),
        ram_and_device(results, &captures),
        ram(results, &captures),
        seconds(results, &captures),
        notes(results),
    ];
    parts.join("\n")
}

fn is_ram_or_device(image: &str) -> bool {
    ["ram", "device", RAM_AND_DEVICE].contains(&image)
}

fn verdict(results: &Results, capture: &str) -> Verdict {
    let all = |way| results.bytes(capture, way, |_| true);
    let part = |way| results.bytes(capture, way, is_ram_or_device);
    let ram = |way| results.bytes(capture, way, |image| image == "ram");
    let share = |ours: Option<u64>, theirs: Option<u64>| {
        let theirs = theirs.filter(|bytes| *bytes > 0)?;
        Some(ours? as f64 / theirs as f64 * 100.0)
    };
    let whole = Way::WHOLE.iter().filter_map(|way| Some((*way, all(*way)?)));
    let best = whole.min_by_key(|(_, bytes)| *bytes);
    let mut unbeaten = Vec::new();
    let mut unmeasured = Vec::new();
    for (ways, figure) in [
        (&Way::WHOLE[..], &all as &dyn Fn(Way) -> Option<u64>),
        (&Way::QEMU[..], &part),
    ] {
        for way in ways {
            match (figure(Way::Twin), figure(*way)) {
                (Some(ours), Some(theirs)) if ours < theirs => {}
                (Some(_), Some(_)) => unbeaten.push(*way),
                _ => unmeasured.push(*way),
            }
        }
    }
    let hashes = results.hashes(capture, Way::Twin);
    let payload = all(Way::Twin)
        .zip(hashes)
        .map(|(all, hashes)| all.saturating_sub(hashes));
    Verdict {
        best,
        of_best: share(all(Way::Twin), best.map(|(_, bytes)| bytes)),
        of_qemu: share(part(Way::Twin), part(Way::QemuMultifdZstd)),
        base: share(ram(Way::Base), ram(Way::ChangedZstd)),
        hashes: share(hashes, payload),
        unbeaten,
        unmeasured,
    }
}

fn head(results: &Results) -> String {
    format!(
        "Measured on: {}\n\nA site holds the state `base` and must come to `source`. Our \
         strategies are run by `replay-migrate bench reconcile` with the codec that a line of 10 \
         Mbit/s gets; `replay` with a twin is what is sent by default, and what the aims are \
         about. The interaction log is not among its bytes. Peers are run on the same images: \
         QEMU migrates for real between two processes, over connections on which all bytes are \
         counted in both directions; it sends RAM and device state and no disk. Of rsync, too, \
         the bytes in both directions count, of the others those of the patch. No peer replays.\n",
        escape(&results.machine)
    )
}

fn aims(verdicts: &[(&str, Verdict)]) -> String {
    let mut text = "### Against the aims\n\n*Best peer* is the one with the fewest bytes for all \
                    images.\n\n"
        .to_owned();
    text += "| capture | best peer | with a twin, of the best peer | with a twin, of QEMU multifd \
             zstd (RAM, device) | `base`, of changed pages in zstd -3 (RAM) | hashes with a twin, of the \
             other bytes |\n\
             | --- | --- | ---: | ---: | ---: | ---: |\n";
    for (capture, verdict) in verdicts {
        let best = verdict.best.map_or(NOT_MEASURED, |(way, _)| way.name());
        let shares = [
            verdict.of_best,
            verdict.of_qemu,
            verdict.base,
            verdict.hashes,
        ];
        let [peer, qemu, base, hashes] = shares.map(percent);
        text += &format!(
            "| {} | {best} | {peer} | {qemu} | {base} | {hashes} |\n",
            escape(capture)
        );
    }
    let shares: [(Share, f64, &str); 4] = [
        (|v| v.of_best, AIM_PEER, "of the best peer's bytes"),
        (|v| v.of_qemu, AIM_QEMU, "of the bytes of QEMU multifd zstd"),
        (
            |v| v.base,
            AIM_BASE,
            "of changed pages in zstd -3 (by `base`, for RAM)",
        ),
        (
            |v| v.hashes,
            AIM_HASHES,
            "of the other bytes for hashes (with a twin)",
        ),
    ];
    let medians = shares.map(|(share, ..)| median(verdicts.iter().filter_map(|(_, v)| share(v))));
    let [peer, qemu, base, hashes] = medians.map(percent);
    text += &format!(
        "| **median** | | **{peer}** | **{qemu}** | **{base}** | **{hashes}** |\n\
         | aim, at most | | {AIM_PEER} % | {AIM_QEMU} % | {AIM_BASE} % | {AIM_HASHES} % |\n\n"
    );
    for ((share, aim, what), median) in shares.into_iter().zip(medians) {
        let count = verdicts.iter().filter(|(_, v)| share(v).is_some()).count();
        text += &match median {
            None => format!("- At most {aim} % {what}: {NOT_MEASURED}.\n"),
            Some(median) => format!(
                "- At most {aim} % {what} in the median: {}, at {} over {}.\n",
                if median <= aim {
                    "reached"
                } else {
                    "**missed**"
                },
                percent(Some(median)),
                captures_of(count)
            ),
        };
    }
    let unbeaten = named(verdicts, |verdict| &verdict.unbeaten);
    let unmeasured = named(verdicts, |verdict| &verdict.unmeasured);
    let peers = Way::WHOLE.len() + Way::QEMU.len();
    let none = verdicts.iter().all(|(_, v)| v.unmeasured.len() == peers);
    text += &match (unbeaten.as_str(), unmeasured.as_str()) {
        _ if none => format!("- Fewer bytes than every peer on every capture: {NOT_MEASURED}.\n"),
        ("", "") => "- Fewer bytes than every peer on every capture: reached.\n".to_owned(),
        ("", _) => {
            "- Fewer bytes than every peer that was measured, on every capture.\n".to_owned()
        }
        _ => format!(
            "- Fewer bytes than every peer on every capture: **missed**. No more bytes than ours: \
             {unbeaten}.\n"
        ),
    };
    if !unmeasured.is_empty() {
        text += &format!("- Not measured, and so not compared with: {unmeasured}.\n");
    }
    text
}

/// Captures with the ways that are picked of each.
fn named(verdicts: &[(&str, Verdict)], which: impl Fn(&Verdict) -> &Vec<Way>) -> String {
    let picked = verdicts.iter().filter(|(_, v)| !which(v).is_empty());
    let texts: Vec<String> = picked
        .map(|(capture, verdict)| {
            let names: Vec<&str> = which(verdict).iter().map(|way| way.name()).collect();
            format!("{} ({})", escape(capture), names.join(", "))
        })
        .collect();
    texts.join("; ")
}

fn all_images(results: &Results, captures: &[&str]) -> String {
    let ways = [&Way::OURS[..], &Way::WHOLE[..]].concat();
    "### Bytes for RAM, disks and device state\n\n".to_owned()
        + &table(captures, &ways, |capture, way| {
            results.bytes(capture, way, |_| true)
        })
}

fn ram_and_device(results: &Results, captures: &[&str]) -> String {
    let ways = [&Way::OURS[..], &Way::QEMU[..]].concat();
    "### Bytes for RAM and device state alone\n\n".to_owned()
        + &table(captures, &ways, |capture, way| {
            results.bytes(capture, way, is_ram_or_device)
        })
}

fn ram(results: &Results, captures: &[&str]) -> String {
    let ways = [&Way::OURS[..], &[Way::ChangedZstd][..], &Way::WHOLE[..]].concat();
    "### Bytes for RAM alone\n\n*Changed pages in zstd -3* are those that differ from the base at \
     the same place, in one stream: a yardstick, not a peer.\n\n"
        .to_owned()
        + &table(captures, &ways, |capture, way| {
            results.bytes(capture, way, |image| image == "ram")
        })
}

fn seconds(results: &Results, captures: &[&str]) -> String {
    let all = Way::value_variants();
    let mut text = "### Seconds\n\nFor all images that a way sends. Of ours all stages at both \
                    ends, of QEMU the migration, of rsync both ends; of the others packing alone. \
                    Other work may have run at the same time: an order of magnitude.\n\n"
        .to_owned();
    text += &heads(all);
    for capture in captures {
        text += &format!("| {} |", escape(capture));
        for way in all {
            let seconds: Option<Vec<f64>> =
                results.of(capture, *way).map(|row| row.seconds).collect();
            text += &match seconds {
                Some(seconds) if !seconds.is_empty() => {
                    format!(" {:.0} |", seconds.iter().sum::<f64>().ceil())
                }
                _ => format!(" {NOT_MEASURED} |"),
            };
        }
        text.push('\n');
    }
    text
}

/// What there is to know of each way.
fn notes(results: &Results) -> String {
    let mut text = "### Notes\n\n".to_owned();
    for way in Way::value_variants() {
        let rows: Vec<&Row> = results.rows.iter().filter(|row| row.way == *way).collect();
        if rows.is_empty() {
            text += &format!("- {}: {NOT_MEASURED}.\n", way.name());
            continue;
        }
        let measured = rows.iter().any(|row| row.bytes.is_some());
        let mut said: Vec<String> = Vec::new();
        if way.notes_are_numbers() && measured {
            said.push("which pages these are is not counted, in its favour".to_owned());
        }
        said.extend(distinct(*way, &rows));
        if rows.iter().any(|row| row.bytes.is_some() && !row.checked) {
            said.push("not all results were compared with the source".to_owned());
        } else if Way::QEMU.contains(way) && measured {
            said.push(
                "the RAM that arrives is compared with the source's, byte for byte, and the \
                 device state is one that QEMU accepts"
                    .to_owned(),
            );
        } else if measured {
            said.push("what arrives is compared with the source, byte for byte".to_owned());
        }
        text += &format!("- {}: {}.\n", way.name(), said.join("; "));
    }
    text
}

/// The different notes of a way: each with the images that it is about, if there are others, and
/// with the captures, where nothing was measured.
fn distinct(way: Way, rows: &[&Row]) -> Vec<String> {
    let mut notes: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for row in rows {
        match row.bytes {
            Some(_) if way.notes_are_numbers() || row.note.is_empty() => {}
            Some(_) => drop(notes.entry(&row.note).or_default().insert(&row.images)),
            None => drop(notes.entry(&row.note).or_default().insert(&row.capture)),
        }
    }
    let all = notes.len() == 1 && rows.iter().all(|row| row.bytes.is_some());
    let told = notes.into_iter().map(|(note, places)| {
        let places: Vec<&str> = places.into_iter().collect();
        if all {
            escape(note)
        } else {
            format!("{} ({})", escape(note), escape(&places.join(", ")))
        }
    });
    told.collect()
}

fn heads(ways: &[Way]) -> String {
    let names: Vec<&str> = ways.iter().map(|way| way.name()).collect();
    let rules = " ---: |".repeat(ways.len());
    format!("| capture | {} |\n| --- |{rules}\n", names.join(" | "))
}

fn table(captures: &[&str], ways: &[Way], figure: impl Fn(&str, Way) -> Option<u64>) -> String {
    let mut text = heads(ways);
    for capture in captures {
        text += &format!("| {} |", escape(capture));
        for way in ways {
            let bytes = figure(capture, *way).map_or_else(|| NOT_MEASURED.to_owned(), count);
            text += &format!(" {bytes} |");
        }
        text.push('\n');
    }
    text
}

/// The middle one; of an even number, the mean of the two in the middle.
fn median(figures: impl Iterator<Item = f64>) -> Option<f64> {
    let mut figures: Vec<f64> = figures.collect();
    figures.sort_by(f64::total_cmp);
    let last = figures.len().checked_sub(1)?;
    Some(f64::midpoint(figures[last / 2], figures[figures.len() / 2]))
}

fn percent(share: Option<f64>) -> String {
    share.map_or_else(|| NOT_MEASURED.to_owned(), |share| format!("{share:.1} %"))
}

fn captures_of(number: usize) -> String {
    match number {
        1 => "1 capture".to_owned(),
        _ => format!("{number} captures"),
    }
}

/// With commas between thousands.
fn count(bytes: u64) -> String {
    let digits = bytes.to_string();
    let mut text = String::new();
    for (at, digit) in digits.char_indices() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// As plain text of one line in Markdown.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '\n' | '\r' => escaped.push(' '),
            '<' => escaped.push_str("&lt;"),
            '&' => escaped.push_str("&amp;"),
            '|' | '\\' | '`' | '*' | '_' | '[' | ']' => escaped.extend(['\\', letter]),
            _ => escaped.push(letter),
        }
    }
    escaped
}

#[cfg(test)]
#[path = "report_tests.rs"]
mod tests;
