//! Which strategy, and what each would cost.
//!
//! The prediction goes the same way as a migration, without a target: what a target that has not
//! replayed would lack, as the exchange itself finds it, times what a sample of that takes in
//! the real encoder, over the measured line ([`predict`]). What a replay would leave over can't
//! be found out but by replaying; it is expected to be what it was in this VM's own earlier
//! moves, and before those, what it was over a suite of sessions ([`history`]). What live rounds
//! would take is played through with the pace at which the guest changes its memory ([`rounds`]).
//!
//! What was predicted for a move is kept beside what it took, so that who predicts can say how far
//! off the last ones were.

mod history;
mod predict;
mod rounds;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::generation::{GenerationId, Manifest};
use crate::local::{Live, blocking};
use crate::protocol::Welcome;
use crate::recording;
use crate::report::{MigrationReport, Strategy};
use crate::source::{CLOSE, LiveOptions};
use crate::state::{Base, State};
use crate::store::VmDir;
use crate::vm::VmRecord;

pub use history::Off;
use history::{History, Outcome};
pub(crate) use predict::bytes as state_bytes;
use rounds::Changing;

/// A shorter stand-still is worth no other cost unless it is shorter by so many seconds.
const WORTH: f64 = 1.0;

/// What can be done with what both sites have.
#[derive(Clone, Debug)]
pub(crate) struct Feasible {
    /// The newest generation that both have.
    common: Option<GenerationId>,
    /// The newest generation that both have and from which the logs reach to now.
    replayable: Option<GenerationId>,
    /// The generation that the running state rests on, if there is a log on top of it.
    recorded: Option<GenerationId>,
}

impl Feasible {
    pub(crate) fn of(vm: &VmDir, live: &Live, welcome: &Welcome) -> Result<Self> {
        let common = welcome.common.last().copied();
        let generations: Vec<GenerationId> =
            vm.generations()?.iter().map(Manifest::identity).collect();
        let has_log = |number: u64| vm.log_path(number).exists();
        // Back from the running state, for as long as every generation has its log, also those
        // that were pruned.
        let logged: Vec<GenerationId> = vm
            .line()?
            .into_iter()
            .rev()
            .skip_while(|number| Some(*number) != live.generation)
            .take_while(|number| has_log(*number))
            .filter_map(|number| generations.iter().find(|id| id.number == number).copied())
            .collect();
        let replayable = logged
            .iter()
            .find(|id| welcome.common.contains(id))
            .copied();
        Ok(Self {
            common,
            replayable,
            recorded: logged.first().copied(),
        })
    }

    /// The generation that a strategy starts from at the target.
    pub(crate) fn base_for(&self, vm: &VmDir, strategy: Strategy) -> Result<Option<GenerationId>> {
        let name = vm.name();
        match strategy {
            Strategy::Full => Ok(None),
            // From nothing, where there is nothing in common.
            Strategy::Live => Ok(self.common),
            Strategy::Base => self.common.map(Some).ok_or_else(|| {
                Error::Refused(format!(
                    "the target has no stale copy of {name}: `replay-migrate seed {name}` ships \
                     one, or use --strategy full"
                ))
            }),
            Strategy::Replay => self.replayable.or(self.recorded).map(Some).ok_or_else(|| {
                Error::Refused(format!(
                    "there is no log to replay: {name} was not being recorded. Use --strategy \
                     base or full, and `replay-migrate record {name}` from now on"
                ))
            }),
        }
    }
}

/// A site that follows the VM already.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Following {
    /// What it is called here.
    pub site: String,
    /// The generation that it began with; none, before it has begun.
    pub(crate) base: Option<GenerationId>,
    /// Records that it has been sent.
    pub records: u64,
    /// How long ago that was recorded which it replayed last, in seconds; none, before it has
    /// said so.
    pub seconds_behind: Option<f64>,
}

/// What each strategy would cost.
#[derive(Clone, Debug, Serialize)]
pub struct Estimates {
    /// The line, in bits per second.
    pub bits_per_second: f64,
    /// Per strategy that is possible.
    pub strategies: Vec<Estimate>,
    /// The one that `auto` takes: it needs the least time with the guest standing still, or
    /// hardly more than that and less besides. A VM that is followed is always moved by who
    /// follows it. Never [`Strategy::Live`], which is for who asks for it: it sends for as long as
    /// the user works on, and more in all.
    pub choice: Strategy,
    /// The target follows already: only the tail is left to replay.
    pub following: Option<Following>,
    /// What is taken for granted.
    pub assumed: Assumed,
}

/// What a prediction rests on that can't be measured before.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Assumed {
    /// What a replay leaves over of the bytes of `base`, as a share; none where there is no log.
    pub replay_leaves: Option<f64>,
    /// Replays of this VM from here that say so; without any, other sessions do.
    pub replays: usize,
    /// Seconds of standing still beyond those of sending, as in earlier moves of this VM from
    /// here. Without any, only sending is counted.
    pub seconds_besides: Option<f64>,
    /// How far off predictions for this VM were; none before there was one.
    pub off: Option<Off>,
}

/// What one strategy would cost.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    /// Which.
    pub strategy: Strategy,
    /// Bytes on the line, but for the device state.
    pub bytes: u64,
    /// Seconds while the guest still runs.
    pub seconds_before: f64,
    /// Seconds that the guest stands still.
    pub seconds_down: f64,
}

impl Estimates {
    /// What is predicted of the choice.
    pub(crate) fn chosen(&self) -> Option<Estimate> {
        let mut all = self.strategies.iter();
        all.find(|estimate| estimate.strategy == self.choice)
            .copied()
    }

    /// The choice in a sentence.
    pub fn why(&self) -> String {
        let Some(chosen) = self.chosen() else {
            return String::new();
        };
        let before = match (&self.following, chosen.seconds_before) {
            (Some(Following { site, .. }), wait) if wait >= 1.0 => {
                format!(
                    "{site} follows already and needs {} to catch up; ",
                    time(wait)
                )
            }
            (Some(following), _) => format!(
                "{} follows already, {} behind, and only that tail is left to replay; ",
                following.site,
                time(following.seconds_behind.unwrap_or_default())
            ),
            (None, wait) if wait >= 1.0 => {
                format!("{} of replaying while the guest runs on, then ", time(wait))
            }
            (None, _) => String::new(),
        };
        let others: Vec<String> = self
            .strategies
            .iter()
            .filter(|other| other.strategy != self.choice)
            .map(|other| {
                let after = match (other.seconds_before, other.strategy) {
                    (wait, Strategy::Live) => {
                        format!(" after {} of sending while it runs on", time(wait))
                    }
                    (wait, _) if wait >= 1.0 => format!(" after {} of replaying", time(wait)),
                    _ => String::new(),
                };
                let (down, bytes) = (time(other.seconds_down), mebibytes(other.bytes));
                format!("{down} and {bytes} with {}{after}", other.strategy)
            })
            .collect();
        let against = match others.as_slice() {
            [] => "nothing else is possible".to_owned(),
            others => format!("against {}", others.join(", and ")),
        };
        format!(
            "strategy {}: {before}the guest stands still for about {} while {} are sent at {:.1} \
             Mbit/s, {against}",
            self.choice,
            time(chosen.seconds_down),
            mebibytes(chosen.bytes),
            self.bits_per_second / 1e6,
        )
    }
}

impl Assumed {
    /// What is taken for granted, in a sentence.
    pub fn said(&self) -> String {
        let leaves = self.replay_leaves.map(|share| {
            let seen = match self.replays {
                0 => "as other sessions did".to_owned(),
                1 => "as the last replay of this VM from here did".to_owned(),
                some => format!("as the last {some} replays of this VM from here did"),
            };
            format!(
                "a replay leaves {:.0} % of what base sends, {seen}; ",
                100.0 * share
            )
        });
        let besides = match self.seconds_besides {
            Some(seconds) => format!(
                "standing still takes {} beside sending, as it did before",
                time(seconds)
            ),
            None => "what standing still takes beside sending is not known yet".to_owned(),
        };
        let off = self.off.map_or_else(String::new, |off| {
            format!(
                "; the last {} of this VM's moves from here took {:.2} times the bytes and {:.2} times \
                 the seconds of standing still that were predicted, in the median",
                off.moves, off.bytes, off.seconds
            )
        });
        format!("assumed: {}{besides}{off}", leaves.unwrap_or_default())
    }
}

fn time(seconds: f64) -> String {
    if seconds < 10.0 {
        format!("{seconds:.1} s")
    } else {
        format!("{seconds:.0} s")
    }
}

fn mebibytes(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

/// What of a replay is still to be done before the VM stands still.
#[derive(Debug, PartialEq)]
struct Ahead {
    /// Records of the log that the target lacks.
    records: usize,
    /// Seconds of recorded time to replay.
    seconds: f64,
}

impl Ahead {
    /// All of a log that has so many records until that recorded time, or what is left of it
    /// where the target follows.
    fn of(records: usize, recorded: Duration, following: Option<&Following>) -> Self {
        let Some(following) = following.filter(|following| following.base.is_some()) else {
            return Self {
                records,
                seconds: recorded.as_secs_f64(),
            };
        };
        let sent = usize::try_from(following.records).unwrap_or(usize::MAX);
        Self {
            records: records.saturating_sub(sent),
            seconds: match following.seconds_behind {
                // That much it catches up while the VM stands still and is hashed.
                Some(behind) if behind <= CLOSE.as_secs_f64() => 0.0,
                Some(behind) => behind,
                None => recorded.as_secs_f64(),
            },
        }
    }
}

/// Predicts; reads the RAM of the running guest, which is near enough for that. With `rounds` also
/// what those would take, for which the guest is watched for two seconds.
pub(crate) async fn estimate(
    vm: &VmDir,
    record: &VmRecord,
    live: &Live,
    feasible: Feasible,
    rate: f64,
    following: Option<Following>,
    rounds: Option<LiveOptions>,
) -> Result<Estimates> {
    let (vm, record, live) = (vm.clone(), record.clone(), live.clone());
    blocking(move || {
        let ram = vm.runtime_dir("live")?.join("ram.img");
        let overlays = live.overlay_paths(&vm);
        let state = State::of_paused(&vm, &record, live.generation, &ram, &overlays, Vec::new())?;
        let mut known: HashMap<Option<u64>, f64> = HashMap::new();
        let mut since = |generation: Option<GenerationId>| -> Result<f64> {
            let number = generation.map(|id| id.number);
            if let Some(&bytes) = known.get(&number) {
                return Ok(bytes);
            }
            let bytes = predict::bytes(&state, &Base::load(&vm, &record, number)?, rate)?;
            known.insert(number, bytes);
            Ok(bytes)
        };
        let history = past(&vm);
        let on_line = |bytes: f64| bytes * 8.0 / rate.max(1.0);
        let besides = history.besides();
        let down = |bytes: f64| on_line(bytes) + besides.unwrap_or_default();
        let mut strategies = Vec::new();
        let mut replay_leaves = None;
        let begun = following.as_ref().and_then(|following| following.base);
        if let Some(base) = begun.or(feasible.replayable) {
            let records = recording::records_since(&vm, base.number)?;
            let recorded = records.last().map_or(0, |last| last.at.micros);
            let recorded = Duration::from_micros(recorded);
            let ahead = Ahead::of(records.len(), recorded, following.as_ref());
            let log = match &records[records.len() - ahead.records..] {
                [] => 0.0,
                lacking => traces::encode_records(lacking)
                    .map_err(Error::log("cannot pack the log"))?
                    .len() as f64,
            };
            let would = since(Some(base))?;
            let rest = history.left_over(would);
            replay_leaves = Some(rest / would.max(1.0));
            strategies.push(Estimate {
                strategy: Strategy::Replay,
                bytes: (log + rest) as u64,
                seconds_before: ahead.seconds + on_line(log),
                seconds_down: down(rest),
            });
        }
        let others = feasible
            .common
            .map(|base| (Strategy::Base, Some(base)))
            .into_iter()
            .chain([(Strategy::Full, None)]);
        for (strategy, base) in others {
            let bytes = since(base)?;
            strategies.push(Estimate {
                strategy,
                bytes: bytes as u64,
                seconds_before: 0.0,
                seconds_down: down(bytes),
            });
        }
        let choice = match &following {
            Some(_) => Strategy::Replay,
            None => choose(&strategies),
        };
        if let Some(options) = rounds {
            let copy = since(feasible.common)?;
            let changing = Changing::of(&ram)?;
            let rounds = changing.rounds(copy, rate, besides.unwrap_or_default(), options);
            strategies.push(Estimate {
                strategy: Strategy::Live,
                bytes: rounds.bytes as u64,
                seconds_before: rounds.before,
                seconds_down: rounds.down,
            });
        }
        Ok(Estimates {
            bits_per_second: rate,
            strategies,
            choice,
            following,
            assumed: Assumed {
                replay_leaves,
                replays: history.replays(),
                seconds_besides: besides,
                off: history.off(),
            },
        })
    })
    .await
}

/// The least time with the guest standing still. What saves less than [`WORTH`] of that does not
/// decide: then the user is not made to wait before, and then bytes count.
fn choose(strategies: &[Estimate]) -> Strategy {
    let down = strategies.iter().map(|estimate| estimate.seconds_down);
    let most = down.fold(f64::INFINITY, f64::min) + WORTH;
    strategies
        .iter()
        .filter(|estimate| estimate.seconds_down <= most)
        .min_by(|a, b| {
            a.seconds_before
                .total_cmp(&b.seconds_before)
                .then(a.bytes.cmp(&b.bytes))
        })
        .map_or(Strategy::Full, |best| best.strategy)
}

/// Seconds that this VM stood still beyond those of sending, in earlier moves from here.
pub(crate) fn besides(vm: &VmDir) -> Option<f64> {
    past(vm).besides()
}

/// What earlier moves took. A file that can't be read hinders no move.
fn past(vm: &VmDir) -> History {
    History::load(vm).unwrap_or_else(|error| {
        tracing::warn!(error = error.chain(), "earlier moves are not counted on");
        History::default()
    })
}

/// What a move was sent and what it was sent against, to learn from it.
pub(crate) struct Lesson {
    /// The VM as it left.
    pub(crate) state: Arc<State>,
    /// What the target had before.
    pub(crate) base: Arc<Base>,
    /// The line, in bits per second.
    pub(crate) rate: f64,
}

/// Learns from a migration that was done: after a replay, also what `base` would have sent.
pub(crate) async fn learn(vm: &VmDir, report: &MigrationReport, lesson: Lesson) -> Result<()> {
    let (vm, report) = (vm.clone(), report.clone());
    blocking(move || {
        let Lesson { state, base, rate } = lesson;
        let foreseen = match report.strategy {
            Strategy::Replay => Some(predict::bytes(&state, &base, rate)? as u64),
            _ => None,
        };
        let outcome = Outcome::of(&report, foreseen, rate);
        tracing::info!(?outcome, "noted");
        let mut history = past(&vm);
        history.note(outcome);
        history.store(&vm)
    })
    .await
}

#[cfg(test)]
mod tests;
