//! Which pages of RAM a replay makes otherwise, by what the guest uses them for, and how many
//! times as many there are at the quick pace, in an ordinary guest, and without a network.

use std::collections::{BTreeMap, BTreeSet};

use super::words::{NOT_MEASURED, Table, count, escape, multiple, percent_of, ratio, sessions};
use super::{Guest, Network, Results, Row, Setting, Spread};

/// Pages by kind of each session, medians over repeats.
type Kinds<'a> = BTreeMap<&'a str, BTreeMap<&'a str, f64>>;

/// The part of the section that says which pages differ.
pub(super) fn markdown(results: &Results) -> String {
    let mut text = "### Pages of RAM that differ, by kind\n\nMedians over the repeats, summed \
                    over the sessions: of a replay-friendly guest with a network, at the \
                    recorded pace. The columns to the right take one thing away from that, as a \
                    multiple over the sessions that were measured both ways.\n\n"
        .to_owned();
    let first = kinds_of(results, Setting::REFERENCE);
    if first.is_empty() {
        return text + "Not measured.\n";
    }
    let others = [
        Setting::QUICK,
        Setting {
            guest: Guest::Ordinary,
            ..Setting::REFERENCE
        },
        Setting {
            network: Network::Off,
            ..Setting::REFERENCE
        },
    ]
    .map(|setting| kinds_of(results, setting));
    let mut table = Table::new(
        1,
        &[
            "kind",
            "pages",
            "share",
            "quick",
            "ordinary guest",
            "network off",
        ],
    );
    let names: BTreeSet<&str> = std::iter::once(&first)
        .chain(&others)
        .flat_map(|kinds| kinds.values().flat_map(BTreeMap::keys).copied())
        .collect();
    let mut sums: Vec<(&str, f64)> = names
        .into_iter()
        .map(|kind| (kind, sum(first.values(), Some(kind))))
        .collect();
    sums.sort_by(|(_, a), (_, b)| b.total_cmp(a));
    let all = sum(first.values(), None);
    let to_first = |kind| others.each_ref().map(|other| against(other, &first, kind));
    for (kind, pages) in &sums {
        let share = ratio(pages * 100.0, all).map_or_else(String::new, percent_of);
        let mut cells = vec![escape(kind), count(*pages), share];
        cells.extend(to_first(Some(kind)));
        table.line(&cells);
    }
    let mut cells = vec!["together".to_owned(), count(all), String::new()];
    cells.extend(to_first(None));
    table.line(&cells);
    text += &table.text();
    let unknown: Vec<String> = results
        .workloads()
        .into_iter()
        .filter(|workload| !first.contains_key(workload))
        .map(escape)
        .collect();
    text += &match unknown[..] {
        [] => format!("\nOver {}.\n", sessions(first.len())),
        _ => format!(
            "\nOver {}; not measured: {}.\n",
            sessions(first.len()),
            unknown.join(", ")
        ),
    };
    text
}

/// Pages as a multiple of the first ones, over the sessions that have both.
fn against(these: &Kinds<'_>, first: &Kinds<'_>, kind: Option<&str>) -> String {
    let both: Vec<_> = these
        .iter()
        .filter_map(|(workload, kinds)| Some((kinds, first.get(workload)?)))
        .collect();
    if both.is_empty() {
        return NOT_MEASURED.to_owned();
    }
    let pages = sum(both.iter().map(|(these, _)| *these), kind);
    let first = sum(both.iter().map(|(_, first)| *first), kind);
    match ratio(pages, first) {
        Some(times) => multiple(times),
        None if pages > 0.0 => format!("{}, from none", count(pages)),
        None => "none".to_owned(),
    }
}

fn kinds_of(results: &Results, setting: Setting) -> Kinds<'_> {
    let mut all = Kinds::new();
    for workload in results.workloads() {
        let known = |row: &&Row| !row.diverged.kinds.is_empty();
        let rows: Vec<&Row> = results.of(workload, setting).filter(known).collect();
        let names: BTreeSet<&str> = rows
            .iter()
            .flat_map(|row| row.diverged.kinds.keys().map(String::as_str))
            .collect();
        for kind in names {
            let pages = |row: &&Row| row.diverged.kinds.get(kind).map_or(0.0, |n| *n as f64);
            if let Some(spread) = Spread::of(rows.iter().map(pages)) {
                all.entry(workload).or_default().insert(kind, spread.median);
            }
        }
    }
    all
}

/// Of one kind over the sessions, or of all kinds.
fn sum<'a>(
    sessions: impl IntoIterator<Item = &'a BTreeMap<&'a str, f64>>,
    kind: Option<&str>,
) -> f64 {
    sessions
        .into_iter()
        .map(|kinds| match kind {
            Some(kind) => kinds.get(kind).copied().unwrap_or(0.0),
            None => kinds.values().sum(),
        })
        .sum()
}
