//! `replay-migrate sync` and `replay-migrate switch`

use std::time::Duration;

use site::source::sync::{self, Policy, SyncEnded, SyncEvent, SyncOptions, Why};
use site::{Store, source};

use super::serve::OnSignal;
use super::{migrate, peer_of, vm_of};
use crate::args::{self, SyncArgs};
use crate::output::{Output, bytes};

pub(crate) async fn run(store: &Store, args: &SyncArgs, output: &Output) -> anyhow::Result<()> {
    let vm = vm_of(store, &args.name).await?;
    vm.record()?;
    let peers = args
        .to
        .iter()
        .map(|name| peer_of(store, name))
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
    let outcome = sync::sync(&vm, &peers, options, &tell, &stop.token).await;
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
            format!(
                "{} has generation {}; {} sent in {:.1} s{how}",
                shipment.site,
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
