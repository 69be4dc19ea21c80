//! `replay-migrate collect` and `replay-migrate hub`

use std::time::Duration;

use anyhow::bail;
use serde_json::json;
use site::hub::{self, CollectReport, Collector, Lies};
use site::{Silent, Store};

use super::peer_of;
use super::serve::OnSignal;
use crate::args::HubCommand;
use crate::output::{Output, bytes, table};

/// Fetches what lies at a hub, once or again and again.
pub(crate) async fn collect(
    store: &Store,
    from: &str,
    every: Option<Duration>,
    keep: usize,
    output: &Output,
) -> anyhow::Result<()> {
    let peer = peer_of(store, from)?;
    let stop = OnSignal::new();
    let mut collector = Collector::default();
    loop {
        // Again and again, what matters is what has come.
        let progress = match every {
            None => output.progress(),
            Some(_) => Box::new(Silent),
        };
        let collected = tokio::select! {
            // What was half fetched has no name, and what was half applied goes at the next call.
            () = stop.token.cancelled() => return Ok(()),
            collected = collector.collect(store, &peer, keep, progress.as_ref()) => collected,
        };
        drop(progress);
        let Some(every) = every else {
            let report = collected?;
            output.result(&report, |report| describe(report, from))?;
            if report.collected.is_empty() && !report.refused.is_empty() {
                bail!(site::Error::Refused(format!(
                    "nothing of what {from} holds could be taken"
                )));
            }
            return Ok(());
        };
        match collected {
            Ok(report) if report.collected.is_empty() && report.refused.is_empty() => {}
            Ok(report) => output.result(&report, |report| describe(report, from))?,
            // A hub that can't be reached now may be later.
            Err(error) => tracing::warn!(error = error.chain(), "nothing was fetched"),
        }
        tokio::select! {
            () = stop.token.cancelled() => return Ok(()),
            () = tokio::time::sleep(every) => {}
        }
    }
}

fn describe(report: &CollectReport, from: &str) -> String {
    let mut lines: Vec<_> = report
        .collected
        .iter()
        .map(|one| {
            format!(
                "{} has come to generation {}, made by {}; {:.1} s",
                one.vm, one.generation, one.by, one.seconds
            )
        })
        .collect();
    lines.extend(report.refused.iter().cloned());
    if lines.is_empty() {
        lines.push(format!(
            "{from} holds nothing for this site that it has not"
        ));
    } else {
        lines.push(format!("{} received from {from}", bytes(report.received)));
    }
    lines.join("\n")
}

/// What is held here for others.
pub(crate) fn run(store: &Store, command: &HubCommand, output: &Output) -> anyhow::Result<()> {
    match command {
        HubCommand::List => output.result(&hub::lies(store)?, |lies| as_table(lies)),
        HubCommand::Drop { recipient } => {
            let gone = hub::drop_for(store, recipient)?;
            output.result(&json!({ "dropped": gone }), |_| {
                format!("{gone} parcels for {recipient} are gone")
            })
        }
    }
}

fn as_table(lies: &[Lies]) -> String {
    if lies.is_empty() {
        return "nothing is held here for other sites".into();
    }
    let head = ["for", "from", "VM", "generation", "after", "size", "age"];
    let rows = lies.iter().map(|one| {
        vec![
            one.recipient.clone(),
            one.by.clone(),
            one.vm.to_string(),
            one.generation.to_string(),
            one.from.map_or("-".to_owned(), |from| from.to_string()),
            bytes(one.bytes),
            indicatif::HumanDuration(Duration::from_secs(one.age)).to_string(),
        ]
    });
    let rows: Vec<_> = std::iter::once(head.map(str::to_owned).to_vec())
        .chain(rows)
        .collect();
    table(&rows)
}
