//! `replay-migrate migrate`

use std::time::Duration;

use site::plan::Estimates;
use site::report::{MigrationReport, Strategy};
use site::source::{self, LiveOptions, MigrateOptions, TwinTurn};
use site::{Phase, Store};

use super::serve::OnSignal;
use super::{peer_of, vm_of};
use crate::args::{MigrateArgs, StrategyArg, TwinArg};
use crate::output::{Output, bytes, table};

pub(crate) async fn run(store: &Store, args: &MigrateArgs, output: &Output) -> anyhow::Result<()> {
    let vm = vm_of(store, &args.name).await?;
    vm.record()?;
    let peer = peer_of(store, &args.to)?;
    let progress = output.progress();
    if args.dry_run {
        let estimates = source::dry_run(&vm, &peer, progress.as_ref()).await?;
        drop(progress);
        return output.result(&estimates, show_estimates);
    }
    let options = MigrateOptions {
        strategy: match args.strategy {
            StrategyArg::Auto => None,
            StrategyArg::Replay => Some(Strategy::Replay),
            StrategyArg::Base => Some(Strategy::Base),
            StrategyArg::Full => Some(Strategy::Full),
            StrategyArg::Live => Some(Strategy::Live),
        },
        paused: args.paused,
        quick: args.quick,
        drop_free: args.drop_free,
        post_copy: args.post_copy,
        live: LiveOptions {
            downtime: args.downtime,
            rounds: args.rounds,
            replay: args.replay_first,
        },
        twin: match args.twin {
            TwinArg::Beside => TwinTurn::Beside,
            TwinArg::After => TwinTurn::After,
            TwinArg::Never => TwinTurn::Never,
        },
        give_up_after: Duration::from_secs(args.give_up_after.into()),
    };
    let cancel = OnSignal::new();
    let outcome = source::migrate(&vm, &peer, options, progress.as_ref(), &cancel.token).await;
    drop(cancel);
    drop(progress);
    let report = outcome?;
    output.result(&report, |report| show_report(report, peer.name.as_str()))
}

fn show_estimates(estimates: &Estimates) -> String {
    let mut rows = vec![vec![
        "strategy".to_owned(),
        "bytes".into(),
        "before".into(),
        "standing still".into(),
    ]];
    rows.extend(estimates.strategies.iter().map(|estimate| {
        vec![
            estimate.strategy.to_string(),
            bytes(estimate.bytes),
            format!("{:.1} s", estimate.seconds_before),
            format!("{:.1} s", estimate.seconds_down),
        ]
    }));
    format!(
        "{}{}\n{}",
        table(&rows),
        estimates.why(),
        estimates.assumed.said()
    )
}

pub(crate) fn show_report(report: &MigrationReport, site: &str) -> String {
    let seconds = |name: &str| report.seconds.get(name).copied().unwrap_or_default();
    let mut rows = vec![];
    for phase in Phase::ALL {
        if let Some(spent) = report.seconds.get(phase.name()) {
            rows.push(vec![phase.name().to_owned(), format!("{spent:.2} s")]);
        }
    }
    let sent = &report.bytes;
    let astray = report.replay.as_ref().and_then(|replay| {
        let why = replay.diverged.as_ref()?;
        Some(format!(
            "\nthe replay was given up, with {} interactions left: {why}",
            replay.skipped
        ))
    });
    let rounds = report.live.as_ref().map(|live| {
        let while_running: u64 = live.rounds.iter().map(|round| round.bytes).sum();
        format!(
            "\n{} rounds with {} while it ran, {} while it stood still, which was expected to take \
             {:.1} s; looking for changes took {:.1} s of a processor",
            live.rounds.len(),
            bytes(while_running),
            bytes(live.last_bytes),
            live.expected_downtime,
            live.scan_seconds,
        )
    });
    let dropped = match report.free_dropped {
        0 => String::new(),
        pages => format!("\n{pages} free pages of the guest were made zero"),
    };
    format!(
        "{} is at {site}, generation {}, verified\n{}\
         downtime {:.1} s, there for its user after {:.1} s, {:.1} s in all\n\
         {} sent, {} received: log {}, hashes {}, RAM {}, disk {}, devices {}{}{}{dropped}",
        report.vm,
        report.generation_to,
        table(&rows),
        seconds("downtime"),
        seconds("usable"),
        seconds("total"),
        bytes(sent.sent),
        bytes(sent.received),
        bytes(sent.log),
        bytes(sent.hashes),
        bytes(sent.ram),
        bytes(sent.disk),
        bytes(sent.device),
        astray.unwrap_or_default(),
        rounds.unwrap_or_default(),
    )
}
