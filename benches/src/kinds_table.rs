//! Rows of kinds as tables in a terminal.

use std::fmt::Write as _;

use crate::kinds::{KindRow, KindWay, TOGETHER};
use crate::report::Strategy;

/// Bytes by kind, a table for each codec, and pages by recipe, of kinds that changed; nothing
/// without kinds.
pub fn kinds_table(rows: &[KindRow]) -> String {
    let Some((together, kinds)) = rows.split_last() else {
        return String::new();
    };
    let mut tables = Vec::new();
    let mut codecs: Vec<&str> = Vec::new();
    for way in &together.ways {
        if !codecs.contains(&way.codec.as_str()) {
            codecs.push(&way.codec);
        }
    }
    for codec in codecs {
        tables.push(bytes(kinds, together, codec));
    }
    if let Some(first) = together.ways.first() {
        tables.push(pages(kinds, together, &first.codec));
    }
    tables.join("\n\n")
}

/// What each kind takes in this codec.
fn bytes(kinds: &[KindRow], together: &KindRow, codec: &str) -> String {
    let ways = |row: &KindRow| -> Vec<(Strategy, u64)> {
        let own = row.ways.iter().filter(|way| way.codec == codec);
        own.map(|way| (way.strategy, way.bytes)).collect()
    };
    let plain: u64 = kinds.iter().map(|row| row.changed_zstd_bytes).sum();
    let mut sums: Vec<(Strategy, u64)> = Vec::new();
    for (index, (strategy, _)) in ways(together).into_iter().enumerate() {
        let each = kinds.iter().filter_map(|row| ways(row).get(index).copied());
        sums.push((strategy, each.map(|(_, bytes)| bytes).sum()));
    }
    let mut out = format!(
        "bytes of ram by kind, {codec}\n{:13} {:>8} {:>8} {:>11} {:>6}",
        "kind", "pages", "changed", "zstd -3", "share"
    );
    for (strategy, _) in &sums {
        append(&mut out, format_args!(" {:>11} {:>6}", strategy, "share"));
        if *strategy == Strategy::Base {
            append(&mut out, format_args!(" {:>8}", "of zstd"));
        }
    }
    let mut line = |name: &str, pages: (u64, u64), of_plain: u64, taken: &[(Strategy, u64)]| {
        let share = percent(of_plain, plain);
        append(
            &mut out,
            format_args!(
                "\n{name:13} {:>8} {:>8} {of_plain:>11} {share:>6}",
                pages.0, pages.1
            ),
        );
        for ((strategy, bytes), (_, sum)) in taken.iter().zip(&sums) {
            let share = percent(*bytes, *sum);
            append(&mut out, format_args!(" {bytes:>11} {share:>6}"));
            if *strategy == Strategy::Base {
                append(&mut out, format_args!(" {:>8}", percent(*bytes, of_plain)));
            }
        }
    };
    for row in kinds.iter().filter(|row| row.changed > 0) {
        line(
            &row.kind,
            (row.pages, row.changed),
            row.changed_zstd_bytes,
            &ways(row),
        );
    }
    let sum = |of: fn(&KindRow) -> u64| kinds.iter().map(of).sum::<u64>();
    let pages = (sum(|row| row.pages), sum(|row| row.changed));
    line("sum", pages, plain, &sums);
    let pages = (together.pages, together.changed);
    line(
        TOGETHER,
        pages,
        together.changed_zstd_bytes,
        &ways(together),
    );
    out
}

/// How each kind is told: no codec changes that.
fn pages(kinds: &[KindRow], together: &KindRow, codec: &str) -> String {
    let mut out = format!(
        "{:8} {:13} {:>8} {:>8} {:>8} {:>9} {:>8} {:>8} {:>8} {:>8}",
        "strategy",
        "kind",
        "changed",
        "zero",
        "same",
        "elsewhere",
        "literal",
        "delta",
        "patched",
        "lines"
    );
    let of_codec = |way: &&KindWay| way.codec == codec;
    for strategy in together
        .ways
        .iter()
        .filter(of_codec)
        .map(|way| way.strategy)
    {
        let changed = kinds.iter().filter(|row| row.changed > 0);
        for row in changed.chain([together]) {
            let mut ways = row.ways.iter().filter(of_codec);
            let Some(way) = ways.find(|way| way.strategy == strategy) else {
                continue;
            };
            let (kind, changed, pages) = (&row.kind, row.changed, &way.pages);
            append(
                &mut out,
                format_args!(
                    "\n{strategy:8} {kind:13} {changed:>8} {:>8} {:>8} {:>9} {:>8} {:>8} {:>8} {:>8}",
                    pages.zero,
                    pages.same,
                    pages.elsewhere,
                    pages.literal,
                    pages.delta,
                    pages.patched,
                    pages.lines,
                ),
            );
        }
    }
    out
}

fn append(out: &mut String, text: std::fmt::Arguments<'_>) {
    // A string takes whatever is written.
    let _ = out.write_fmt(text);
}

fn percent(part: u64, whole: u64) -> String {
    if whole == 0 {
        return "-".to_owned();
    }
    format!("{:.1}%", part as f64 * 100.0 / whole as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kinds::KindPages;

    fn row(kind: &str, changed: u64, plain: u64, bytes: u64) -> KindRow {
        let way = |strategy| KindWay {
            strategy,
            codec: "zstd:3".to_owned(),
            pages: KindPages {
                literal: changed,
                ..KindPages::default()
            },
            bytes,
        };
        KindRow {
            kind: kind.to_owned(),
            pages: 2 * changed + 1,
            changed,
            changed_zstd_bytes: plain,
            ways: vec![way(Strategy::Base), way(Strategy::Twin)],
        }
    }

    #[test]
    fn columns_stand_below_their_heads() {
        let rows = [
            row("slab", 10, 600, 300),
            row("free", 0, 0, 0),
            row("anonymous", 30, 200, 100),
            row(TOGETHER, 40, 790, 390),
        ];
        let table = kinds_table(&rows);
        let blocks: Vec<&str> = table.split("\n\n").collect();
        assert_eq!(blocks.len(), 2, "{table}");
        for block in blocks {
            let lines = block
                .lines()
                .skip_while(|line| line.starts_with("bytes of"));
            let widths: Vec<usize> = lines.map(str::len).collect();
            assert!(widths.windows(2).all(|pair| pair[0] == pair[1]), "{table}");
        }
        let line = |kind: &str| {
            let line = table.lines().find(|line| line.starts_with(kind)).unwrap();
            line.split_whitespace().collect::<Vec<_>>()
        };
        let slab = "slab 21 10 600 75.0% 300 75.0% 50.0% 300 75.0%";
        assert_eq!(line("slab").join(" "), slab);
        assert_eq!(line("sum")[1..4], ["83", "40", "800"]);
        assert_eq!(
            line(TOGETHER)[3..8],
            ["790", "98.8%", "390", "97.5%", "49.4%"]
        );
        assert!(!table.contains("free"));
        assert_eq!(kinds_table(&[]), "");
    }
}
