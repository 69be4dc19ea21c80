//! Which strategy, and what each would cost.
//!
//! The prediction goes the same way as a migration, without a target: pages that differ, found by
//! hashing, less those that a target finds by itself, times what a sample of them takes in the
//! real encoder, over the measured line. What a replay leaves over is taken from this
//! VM's own earlier migrations; a VM without any gets [`RESIDUAL_PRIOR`].

use reconciler::{
    EncodeOptions, Holdings, ImageTree, Offer, OfferOptions, PageIndex, Place, PlaceKind,
    ReadPages, References, Salt, SlicePages,
};
use serde::{Deserialize, Serialize};
use vm_host::RamMap;

use crate::disks::{self, DiskImage};
use crate::error::{Error, Result};
use crate::files;
use crate::generation::{GenerationId, Manifest};
use crate::local::{Live, blocking};
use crate::protocol::{ImageKind, Welcome};
use crate::recording;
use crate::report::{MigrationReport, Strategy};
use crate::state::{Base, tree_of};
use crate::store::VmDir;
use crate::vm::VmRecord;

/// The share of the changed pages' bytes that a replay leaves over, where nothing was measured
/// yet: 6.9 MiB of 64.8 in the measurements that began this project.
const RESIDUAL_PRIOR: f64 = 6.9 / 64.8;

/// Pages compressed to predict what all would compress to.
const SAMPLE: usize = 512;

/// The line that the sample is compressed for, in bits per second: the level matters little.
const SAMPLED_LINE: u64 = 100_000_000;

/// For the length of truncated hashes: more pages than a target has to search.
const SEARCHED: u64 = 1 << 22;

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
        // Back from the running state, for as long as every generation has its log.
        let logged: Vec<GenerationId> = generations
            .iter()
            .rev()
            .skip_while(|id| Some(id.number) != live.generation)
            .take_while(|id| has_log(id.number))
            .copied()
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

/// What each strategy would cost.
#[derive(Clone, Debug, Serialize)]
pub struct Estimates {
    /// The line, in bits per second.
    pub bits_per_second: f64,
    /// Per strategy that is possible.
    pub strategies: Vec<Estimate>,
    /// The one to take: it needs the least time with the guest standing still.
    pub choice: Strategy,
}

/// What one strategy would cost.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Estimate {
    /// Which.
    pub strategy: Strategy,
    /// Bytes on the line.
    pub bytes: u64,
    /// Seconds while the guest still runs.
    pub seconds_before: f64,
    /// Seconds that the guest stands still.
    pub seconds_down: f64,
}

impl Estimates {
    /// The choice in a sentence.
    pub fn why(&self) -> String {
        let of = |strategy| self.strategies.iter().find(|e| e.strategy == strategy);
        let Some(chosen) = of(self.choice) else {
            return String::new();
        };
        let others: Vec<String> = self
            .strategies
            .iter()
            .filter(|other| other.strategy != self.choice)
            .map(|other| format!("{} {:.0} s", other.strategy, other.seconds_down))
            .collect();
        let against = match others.as_slice() {
            [] => "nothing else is possible".to_owned(),
            others => format!("against {}", others.join(" and ")),
        };
        format!(
            "strategy {}: the guest stands still for about {:.0} s, {against}, at {:.1} Mbit/s",
            self.choice,
            chosen.seconds_down,
            self.bits_per_second / 1e6
        )
    }
}

/// Predicts; reads the RAM of the running guest, which is near enough for that.
pub(crate) async fn estimate(
    vm: &VmDir,
    record: &VmRecord,
    live: &Live,
    feasible: Feasible,
    rate: f64,
) -> Result<Estimates> {
    let (vm, record, live) = (vm.clone(), record.clone(), live.clone());
    blocking(move || {
        let ram_path = vm.runtime_dir("live")?.join("ram.img");
        let ram = RamMap::open(&ram_path).map_err(Error::host("cannot read the guest's RAM"))?;
        let ram_pages = SlicePages(&ram);
        let ram_tree = tree_of(&ram_pages, "RAM")?;
        let mut disks = Vec::new();
        for (index, top) in live.overlay_paths(&vm).iter().enumerate() {
            let image = DiskImage::open(top)?;
            let tree = disks::tree_since(&vm, &record, live.generation, index, &image)?;
            disks.push((image, tree));
        }
        let since = |generation: Option<GenerationId>| -> Result<f64> {
            let base = Base::load(&vm, &record, generation.map(|id| id.number))?;
            let mut bytes = 0.0;
            for (index, (image, tree)) in disks.iter().enumerate() {
                let kind = ImageKind::Disk(index as u8);
                let base_tree = base.tree(kind)?;
                bytes +=
                    base.with_pages(kind, |pages| packed(image, tree, (&base_tree, pages), &[]))?;
            }
            let places: Vec<Place<'_>> = disks
                .iter()
                .map(|(image, tree)| Place {
                    kind: PlaceKind::Disk,
                    tree,
                    reader: image,
                })
                .collect();
            let base_tree = base.tree(ImageKind::Ram)?;
            bytes += base.with_pages(ImageKind::Ram, |pages| {
                packed(&ram_pages, &ram_tree, (&base_tree, pages), &places)
            })?;
            Ok(bytes)
        };
        let seconds = |bytes: f64| bytes * 8.0 / rate.max(1.0);
        let mut strategies = Vec::new();
        let residual = History::load(&vm)?.residual;
        if let Some(base) = feasible.replayable {
            let records = recording::records_since(&vm, base.number)?;
            let recorded = records
                .last()
                .map_or(0.0, |last| last.at.micros as f64 / 1e6);
            let log = traces::encode_records(&records)
                .map_err(Error::log("cannot pack the log"))?
                .len() as f64;
            let rest = since(Some(base))? * residual;
            strategies.push(Estimate {
                strategy: Strategy::Replay,
                bytes: (log + rest) as u64,
                seconds_before: recorded + seconds(log),
                seconds_down: seconds(rest),
            });
        }
        if let Some(base) = feasible.common {
            let bytes = since(Some(base))?;
            strategies.push(Estimate {
                strategy: Strategy::Base,
                bytes: bytes as u64,
                seconds_before: 0.0,
                seconds_down: seconds(bytes),
            });
        }
        let bytes = since(None)?;
        strategies.push(Estimate {
            strategy: Strategy::Full,
            bytes: bytes as u64,
            seconds_before: 0.0,
            seconds_down: seconds(bytes),
        });
        let choice = strategies
            .iter()
            .min_by(|a, b| a.seconds_down.total_cmp(&b.seconds_down))
            .map_or(Strategy::Full, |least| least.strategy);
        Ok(Estimates {
            bits_per_second: rate,
            strategies,
            choice,
        })
    })
    .await
}

/// About how many bytes an image takes that is reconciled with a base: what a target would find
/// by itself is left out, a sample of the rest goes through the real encoder.
fn packed(
    image: &dyn ReadPages,
    tree: &ImageTree,
    base: (&ImageTree, Option<&dyn ReadPages>),
    places: &[Place<'_>],
) -> Result<f64> {
    let failed = || Error::reconcile("cannot predict what an image takes");
    let options = OfferOptions {
        salt: Salt([0; 32]),
        candidates: SEARCHED,
        force_bits: None,
    };
    let offer = Offer::new(tree, base.0, &options).map_err(failed())?;
    let holdings = Holdings {
        base: base.0,
        base_reader: base.1,
        current: base.0,
        places,
    };
    let resolution = reconciler::resolve(&offer, &holdings).map_err(failed())?;
    let answer = resolution.answer(&offer).map_err(failed())?;
    let lacking = offer.decode_answer(&answer).map_err(failed())?;
    let hashes = offer.encode().map_err(failed())?.len() + answer.len();
    if lacking.is_empty() {
        return Ok(hashes as f64);
    }
    let step = lacking.len().div_ceil(SAMPLE);
    let sample: Vec<PageIndex> = lacking.iter().copied().step_by(step).collect();
    let options = EncodeOptions::for_line(SAMPLED_LINE);
    let references = References::base(base.1);
    let stats = reconciler::encode_pages(image, references, &sample, options, &mut |_| Ok(()))
        .map_err(failed())?;
    Ok(hashes as f64 + stats.bytes() as f64 / sample.len() as f64 * lacking.len() as f64)
}

/// What earlier migrations of a VM have shown.
#[derive(Debug, Serialize, Deserialize)]
struct History {
    /// The share of changed pages that a replay left to send.
    residual: f64,
}

impl History {
    fn load(vm: &VmDir) -> Result<Self> {
        let path = vm.dir().join("history.json");
        Ok(files::read_json(&path)?.unwrap_or(Self {
            residual: RESIDUAL_PRIOR,
        }))
    }
}

/// Learns from a migration that was done.
pub(crate) fn note_outcome(vm: &VmDir, report: &MigrationReport) -> Result<()> {
    if report.strategy != Strategy::Replay {
        return Ok(());
    }
    let sent = |recipe: &str| report.pages.ram.get(recipe).copied().unwrap_or(0);
    let left = sent("literal") + sent("delta");
    let all: u64 = report
        .pages
        .ram
        .iter()
        // What failed is counted once more as what came of it.
        .filter(|(recipe, _)| {
            let other = ["zero", "reverted", "patch_failed", "lines_failed"];
            !other.contains(&recipe.as_str())
        })
        .map(|(_, count)| count)
        .sum();
    if all == 0 {
        return Ok(());
    }
    let history = History {
        residual: left as f64 / all as f64,
    };
    files::write_json(&vm.dir().join("history.json"), &history)
}
