//! `replay-migrate sync` and `replay-migrate switch`

use std::time::Duration;

use site::source::Via;
use site::source::sync::{self, Policy, Route, SyncEnded, SyncEvent, SyncOptions, Why};
use site::{Store, source};

use super::serve::OnSignal;
use super::{migrate, peer_of, vm_of};
use crate::args::{self, SyncArgs};
use crate::output::{Output, bytes};

pub(crate) async fn run(store: &Store, args: &SyncArgs, output: &Output) -> anyhow::Result<()> {
    let vm = vm_of(store, &args.name).await?;
    vm.record()?;
    let routes = args
        .to
        .iter()
        .map(|to| route(store, to))
        .collect::<anyhow::Result<Vec<_>>>()?;
    let options = SyncOptions {
        policy: Policy {
            every: args.every,
            after_bytes: args.after,
            when_idle: args.when_idle,
            when_left: args.when_left,
            when_locked: args.when_locked,
        },
        by: match args.by {
            args::By::State => sync::By::State,
            args::By::Log => sync::By::Log,
            args::By::Less => sync::By::Less,
        },
        cap: args.cap,
        keep: args.keep as usize,
        once: args.once,
    };
    let stop = OnSignal::new();
    let progress = output.progress();
    let tell = |event: &SyncEvent| {
        output.standing(event, progress.as_ref(), |event| Some(describe(event)));
    };
    let outcome = sync::sync(&vm, &routes, options, &tell, &stop.token).await;
    drop(stop);
    drop(progress);
    output.result(&outcome?, |report| {
        let how = match report.ended {
            SyncEnded::Stopped => format!("standbys of {} are not kept any more", vm.name()),
            SyncEnded::Done => format!("the standbys of {} are up to date", vm.name()),
            SyncEnded::Moved => format!("{} has moved", vm.name()),
        };
        format!(
            "{how}; {} generations made, {} shipped, {} sent",
            report.epochs,
            report.shipped,
            bytes(report.bytes_sent)
        )
    })
}

/// A standby, and perhaps the hub where it fetches: `SITE` or `SITE@HUB`.
fn route(store: &Store, to: &str) -> anyhow::Result<Route> {
    // No site's name has that in it.
    let (to, via) = match to.split_once('@') {
        Some((to, hub)) => (to, Some(peer_of(store, hub)?)),
        None => (to, None),
    };
    let to = peer_of(store, to)?;
    Ok(Route { to, via })
}

/// Moves the VM to a standby.
pub(crate) async fn switch(
    store: &Store,
    name: &str,
    to: &str,
    downtime: Duration,
    output: &Output,
) -> anyhow::Result<()> {
    let vm = vm_of(store, name).await?;
    let peer = peer_of(store, to)?;
    let progress = output.progress();
    let cancel = OnSignal::new();
    let outcome = source::switch(&vm, &peer, downtime, progress.as_ref(), &cancel.token).await;
    drop(cancel);
    drop(progress);
    output.result(&outcome?, |report| {
        migrate::show_report(report, peer.name.as_str())
    })
}

fn describe(event: &SyncEvent) -> String {
    match event {
        SyncEvent::Epoch {
            generation,
            why,
            paused,
        } => {
            let why = match why {
                Why::First => "the first",
                Why::Time => "it was time",
                Why::Changed => "enough has changed",
                Why::Idle => "the guest is idle",
                Why::Left => "the viewers have left",
                Why::Locked => "the screen was locked",
                Why::Made => "made by another command",
            };
            format!("generation {generation} ({why}); the VM stood still for {paused:.2} s")
        }
        SyncEvent::Shipped(shipment) => {
            let how = match &shipment.by_log {
                None => String::new(),
                Some(by_log) => match by_log.state_expected {
                    None => ", by log".to_owned(),
                    Some(state) => format!(", by log, where the state would take {}", bytes(state)),
                },
            };
            let has = match &shipment.via {
                None => format!("{} has", shipment.site),
                Some(via) => format!("{} holds for {}", via.hub, shipment.site),
            };
            let said = match &shipment.via {
                Some(Via {
                    has: Some(has),
                    said: Some(ago),
                    ..
                }) => format!("; {} had {has} {ago} s ago", shipment.site),
                _ => String::new(),
            };
            format!(
                "{has} generation {}; {} sent in {:.1} s{how}{said}",
                shipment.generation,
                bytes(shipment.bytes.sent),
                shipment.seconds
            )
        }
        SyncEvent::Waiting { site, why, seconds } => {
            format!("{site} can't be brought up to date ({why}); trying again in {seconds:.0} s")
        }
        SyncEvent::Hindered { why } => {
            format!("no generation can be made for now ({why}); trying again")
        }
        SyncEvent::Held => "another command works on the VM; waiting for it".into(),
    }
}
