//! `replay-migrate bench`

use anyhow::Context;
use benches::{DeltaRow, Named, Options, Report, Row, Strategy};

use crate::args::{BenchCommand, BenchStrategyArg};
use crate::output::Output;

pub(crate) async fn run(command: BenchCommand, output: &Output) -> anyhow::Result<()> {
    let BenchCommand::Reconcile {
        capture,
        strategy,
        codec,
        rate,
        runs,
        replayed,
        twin,
        drop_free,
    } = command;
    let paced = codec.is_empty() && !rate.is_empty();
    let named = if codec.is_empty() && !paced {
        benches::usual_codecs()
    } else {
        codec
    };
    let (mut codecs, mut deltas) = (Vec::new(), Vec::new());
    for name in named {
        match name {
            Named::Stream(codec) => codecs.push(codec),
            Named::Delta(delta) => deltas.push(delta),
        }
    }
    let options = Options {
        strategies: strategy.into_iter().map(strategy_of).collect(),
        codecs,
        deltas,
        rates: rate,
        runs,
        replayed,
        twin,
        drop_free,
    };
    // Rows come as they are measured; the table that is the result stands by itself.
    let (rows, mut heard) = tokio::sync::mpsc::unbounded_channel();
    let measured = tokio::task::spawn_blocking(move || {
        benches::reconcile(&capture, &options, &mut |row| {
            // Nobody hears it when the command is ending.
            let _ = rows.send(row.pace_line().unwrap_or_else(|| row.line()));
        })
    });
    let heads = if paced {
        Row::pace_heads()
    } else {
        Row::heads()
    };
    output.say(&heads);
    while let Some(line) = heard.recv().await {
        output.say(&line);
    }
    let report = measured.await.context("measuring ended early")??;
    output.result(&report, table)
}

fn table(report: &Report) -> String {
    let mut lines = Vec::new();
    let in_turn: Vec<&Row> = report
        .rows
        .iter()
        .filter(|row| row.pace.is_none())
        .collect();
    if !in_turn.is_empty() {
        lines.push(Row::heads());
        lines.extend(in_turn.into_iter().map(Row::line));
    }
    if let Some(yardsticks) = &report.yardsticks {
        lines.extend([String::new(), Row::pace_heads()]);
        lines.extend(report.rows.iter().filter_map(Row::pace_line));
        lines.extend([String::new(), yardsticks.to_string()]);
    }
    if !report.deltas.is_empty() {
        lines.extend([String::new(), DeltaRow::heads()]);
        lines.extend(report.deltas.iter().map(DeltaRow::line));
    }
    if let Some(pages) = report.free_dropped {
        let dropped = format!("{pages} free pages of the source count as zero");
        lines.extend([String::new(), dropped]);
    }
    if let Some(diverged) = &report.diverged {
        lines.extend([String::new(), diverged.to_string()]);
    }
    if !report.kinds.is_empty() {
        lines.extend([String::new(), benches::kinds_table(&report.kinds)]);
    }
    lines.join("\n")
}

const fn strategy_of(arg: BenchStrategyArg) -> Strategy {
    match arg {
        BenchStrategyArg::Full => Strategy::Full,
        BenchStrategyArg::Base => Strategy::Base,
        BenchStrategyArg::Replay => Strategy::Replay,
        BenchStrategyArg::Twin => Strategy::Twin,
    }
}
