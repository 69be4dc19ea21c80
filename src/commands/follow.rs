//! `replay-migrate follow`

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use site::Store;
use site::report::StandbyCost;
use site::source::{self, FollowOptions, Followed, Standing};

use super::serve::OnSignal;
use super::{peer_of, vm_of};
use crate::output::{Output, bytes};

pub(crate) async fn run(
    store: &Store,
    name: &str,
    to: &str,
    twin: bool,
    output: &Output,
) -> anyhow::Result<()> {
    let vm = vm_of(store, name).await?;
    vm.record()?;
    let peer = peer_of(store, to)?;
    let stop = OnSignal::new();
    let progress = output.progress();
    let told = Mutex::new(Told::default());
    let standing = |standing: &Standing| {
        output.standing(standing, progress.as_ref(), |standing| {
            let mut told = told.lock().unwrap_or_else(PoisonError::into_inner);
            told.worth_telling(standing)
                .then(|| format!("{} {}", peer.name, describe(standing)))
        });
    };
    let options = FollowOptions { twin };
    let following = source::follow(
        &vm,
        &peer,
        options,
        progress.as_ref(),
        &standing,
        &stop.token,
    );
    let followed = Box::pin(following).await;
    drop(stop);
    drop(progress);
    output.result(&followed?, |followed| match followed {
        Followed::Left => format!(
            "{} is not followed any more; {name} goes on here",
            peer.name
        ),
        Followed::Moved(report) => {
            let replay = report.replay.as_ref();
            let cost = replay.and_then(|replay| replay.standby.as_ref());
            format!(
                "{name} has moved to {}: generation {}, verified{}",
                peer.name,
                report.generation_to,
                cost.map(told_cost).unwrap_or_default()
            )
        }
    })
}

/// What a person was told last: the same again is worth a line now and then only.
#[derive(Default)]
struct Told {
    following: Option<bool>,
    at: Option<Instant>,
}

impl Told {
    const AGAIN: Duration = Duration::from_secs(60);

    fn worth_telling(&mut self, standing: &Standing) -> bool {
        let follows = matches!(standing, Standing::Behind { .. });
        let news = self.following != Some(follows)
            || !follows
            || self.at.is_none_or(|at| at.elapsed() >= Self::AGAIN);
        if news {
            *self = Self {
                following: Some(follows),
                at: Some(Instant::now()),
            };
        }
        news
    }
}

/// Processor time and memory that following takes there.
fn told_cost(cost: &StandbyCost) -> String {
    format!(
        "; it took {:.0} % of a processor there over {:.0} s, and {} of memory",
        cost.cpu_percent(),
        cost.seconds,
        bytes(cost.memory_bytes())
    )
}

fn describe(standing: &Standing) -> String {
    match standing {
        Standing::Behind {
            records,
            seconds,
            missed,
            sent,
            cost,
        } => format!(
            "follows, {seconds:.1} s behind, {records} records, {missed} misses, {} sent{}",
            bytes(*sent),
            cost.as_ref().map(told_cost).unwrap_or_default()
        ),
        Standing::Waiting { why, seconds } => {
            format!("cannot be reached ({why}); calling again in {seconds:.1} s")
        }
    }
}
