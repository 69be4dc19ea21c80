//! Our own strategies, through the command that a user has.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde::Deserialize;
use testkit::site::{self, Site};

use crate::Interrupt;
use crate::capture::Capture;
use crate::rows::{Row, Way};

/// The codec that a line of 10 Mbit/s gets.
const CODEC: &str = "lzma:fast";
const LIMIT: Duration = Duration::from_secs(1800);

/// What `bench reconcile` prints, cut to what is used.
#[derive(Deserialize)]
struct Report {
    rows: Vec<Measured>,
}

#[derive(Deserialize)]
struct Measured {
    strategy: String,
    image: String,
    bytes: Bytes,
    /// By stage.
    seconds: std::collections::BTreeMap<String, f64>,
}

#[derive(Deserialize)]
struct Bytes {
    total: u64,
    hashes: u64,
}

const fn strategy_of(way: Way) -> &'static str {
    match way {
        Way::Base => "base",
        Way::Replay => "replay",
        _ => "twin",
    }
}

/// Runs one of our strategies. Its result is compared byte for byte by the command itself.
pub(crate) async fn measure(
    capture: &Capture,
    way: Way,
    interrupt: &Interrupt,
) -> anyhow::Result<Vec<Row>> {
    let needs: &[&str] = match way {
        Way::Base => &[],
        Way::Replay => &["replayed"],
        _ => &["replayed", "twin"],
    };
    for state in needs {
        ensure!(
            capture.has(state),
            "the capture has no {state}/; make it anew with `make capture`"
        );
    }
    let program = site::program()?;
    let home = tempfile::tempdir().context("cannot make a folder for a site")?;
    let site = Site::new(program, "peers", home.path());
    let dir = capture.dir().to_string_lossy();
    let strategy = strategy_of(way);
    let words = [
        "bench",
        "reconcile",
        &dir,
        "--codec",
        CODEC,
        "--strategy",
        strategy,
    ];
    let running = site.spawn(&words)?;
    let report = interrupt.guard(running.finish(LIMIT)).await??.success()?;
    rows(capture, way, report.last()?)
}

fn rows(capture: &Capture, way: Way, report: Report) -> anyhow::Result<Vec<Row>> {
    let strategy = strategy_of(way);
    let rows: Vec<Row> = report
        .rows
        .into_iter()
        .filter(|row| row.strategy == strategy)
        .map(|measured| {
            let seconds = measured.seconds.values().sum();
            let mut row = capture.row(way, &measured.image, measured.bytes.total, seconds);
            row.hashes = Some(measured.bytes.hashes);
            CODEC.clone_into(&mut row.note);
            row
        })
        .collect();
    let complete = rows.len() == capture.images.len()
        && capture
            .images
            .iter()
            .all(|image| rows.iter().any(|row| row.images == image.name));
    ensure!(
        complete,
        "`bench reconcile` did not measure each image with {strategy} once"
    );
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capture::tests::small;

    #[test]
    fn the_commands_report_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let capture = small(dir.path());
        let row = |strategy: &str, image: &str| {
            serde_json::json!({
                "strategy": strategy, "codec": "lzma:fast", "image": image,
                "bytes": { "total": 70, "hashes": 7 },
                "seconds": { "offer": 1.0, "encode": 0.5, "decode": 0.25 },
            })
        };
        let report = |images: &[&str]| -> Report {
            let mut rows: Vec<_> = images.iter().map(|image| row("twin", image)).collect();
            rows.push(row("base", "ram"));
            serde_json::from_value(serde_json::json!({ "rows": rows, "deltas": [] })).unwrap()
        };
        let read = rows(&capture, Way::Twin, report(&["device", "disk", "ram"])).unwrap();
        assert_eq!(read.len(), 3);
        assert_eq!((read[2].bytes, read[2].seconds), (Some(70), Some(1.75)));
        assert_eq!(read[2].hashes, Some(7));
        for bad in [&["device", "ram"][..], &["device", "ram", "ram"]] {
            assert!(rows(&capture, Way::Twin, report(bad)).is_err(), "{bad:?}");
        }
    }
}
