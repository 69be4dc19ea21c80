//! Runs the strategies.

use std::path::{Path, PathBuf};

use introspection::Physical;
use introspection::kinds::{self, Kind};
use reconciler::{Codec, PageDelta, ReadPages, SlicePages};

use crate::deltas::{self, DeltaRow};
use crate::diverged::Diverged;
use crate::error::{Error, Result};
use crate::kinds::Kinds;
use crate::pace::Yardsticks;
use crate::report::{Report, Row, Strategy};
use crate::run::{Run, disk_name};
use crate::states::State;
use crate::told::Told;

/// What to measure.
#[derive(Clone, Debug)]
pub struct Options {
    /// Which ways; none for all that the capture has the states for.
    pub strategies: Vec<Strategy>,
    /// Which codecs. `full` has only the first, unless it is asked for: LZMA takes minutes for a
    /// whole disk.
    pub codecs: Vec<Codec>,
    /// Which delta codecs, on what a target with the base lacks.
    pub deltas: Vec<PageDelta>,
    /// Over lines of which rates, in bits a second: both ends at once, with the codecs that follow.
    pub rates: Vec<u64>,
    /// How often each is measured over a line; the median counts.
    pub runs: usize,
    /// The state that the target's replay left: a folder in the capture's, or elsewhere.
    pub replayed: PathBuf,
    /// What the source's own left.
    pub twin: PathBuf,
    /// Measure as if the source's free pages had been made zero before.
    pub drop_free: bool,
}

/// Measures a capture; `on_row` hears each result as it comes.
///
/// Takes as much room for temporary files as the source's images do.
///
/// # Errors
/// When the folder is no capture, a state that was asked for is not in it, or what came out is
/// not the source's state.
pub fn reconcile(dir: &Path, options: &Options, on_row: &mut dyn FnMut(&Row)) -> Result<Report> {
    let kinds_of = |ram: &[u8]| {
        let kinds = kinds::classify(Physical::new(ram))?;
        Some(kinds.all().to_vec())
    };
    measure(dir, options, &kinds_of, on_row)
}

/// The same, with the kinds of a RAM's pages as `kinds_of` tells them.
pub(crate) fn measure(
    dir: &Path,
    options: &Options,
    kinds_of: &dyn Fn(&[u8]) -> Option<Vec<Kind>>,
    on_row: &mut dyn FnMut(&Row),
) -> Result<Report> {
    for needed in ["base", "source"] {
        if !dir.join(needed).is_dir() {
            return Err(Error::NoCapture {
                dir: dir.to_owned(),
                missing: needed,
            });
        }
    }
    let (replayed_dir, twin_dir) = (dir.join(&options.replayed), dir.join(&options.twin));
    let has = |strategy: &Strategy| match strategy {
        Strategy::Full | Strategy::Base => true,
        Strategy::Replay => replayed_dir.is_dir(),
        Strategy::Twin => replayed_dir.is_dir() && twin_dir.is_dir(),
    };
    let strategies: Vec<Strategy> = if options.strategies.is_empty() {
        Strategy::ALL.into_iter().filter(has).collect()
    } else {
        options.strategies.clone()
    };
    if let Some(without) = strategies.iter().find(|strategy| !has(strategy)) {
        return Err(Error::NoState {
            state: "replay of its own",
            strategy: without.name(),
        });
    }
    let base = State::open(&dir.join("base"))?;
    let mut source = State::open(&dir.join("source"))?;
    let mut free_dropped = None;
    if options.drop_free {
        let (without, pages) = source.without_free()?;
        (source, free_dropped) = (without, Some(pages));
    }
    let replays = |strategy: &&Strategy| matches!(**strategy, Strategy::Replay | Strategy::Twin);
    let replayed = match strategies.iter().find(replays) {
        Some(_) => Some(State::open(&replayed_dir)?),
        None => None,
    };
    let diverged = replayed
        .as_ref()
        .map(|replayed| Diverged::between(&source, replayed));
    let mut kinds = match kinds_of(&source.ram) {
        // Against nothing everything has changed.
        Some(kinds)
            if !options.codecs.is_empty()
                && strategies.iter().any(|way| *way != Strategy::Full) =>
        {
            Some(Kinds::new(kinds, &source, &base)?)
        }
        _ => None,
    };
    let mut rows = Vec::new();
    let deltas = tell_deltas(&source, &base, &options.deltas)?;
    for strategy in strategies {
        let (base, begins) = match strategy {
            Strategy::Full => (None, None),
            Strategy::Base => (Some(&base), Some(&base)),
            Strategy::Replay | Strategy::Twin => (Some(&base), replayed.as_ref()),
        };
        let realigned = match (strategy, begins) {
            (Strategy::Twin, Some(begins)) => {
                Some(Told::new(&source, base, begins, State::open(&twin_dir)?)?)
            }
            _ => None,
        };
        let run = Run {
            strategy,
            source: &source,
            base,
            begins,
            realigned,
        };
        let codecs = match strategy {
            Strategy::Full if options.strategies.is_empty() => 1,
            _ => options.codecs.len(),
        };
        for codec in options.codecs.iter().take(codecs) {
            run.all(*codec, kinds.as_mut(), &mut |row| {
                on_row(&row);
                rows.push(row);
            })?;
        }
        for rate in &options.rates {
            run.paced(*rate, options.runs.max(1), &mut |row| {
                on_row(&row);
                rows.push(row);
            })?;
        }
    }
    let yardsticks = if options.rates.is_empty() {
        None
    } else {
        Some(Yardsticks::take(&source, &base)?)
    };
    Ok(Report {
        rows,
        yardsticks,
        deltas,
        free_dropped,
        diverged,
        kinds: kinds.map_or_else(Vec::new, Kinds::into_rows),
    })
}

/// Delta codecs on every image, as against a target that has the base.
fn tell_deltas(source: &State, base: &State, which: &[PageDelta]) -> Result<Vec<DeltaRow>> {
    let mut rows = deltas::measure(
        which,
        "device",
        (&SlicePages(&source.device), &source.device_tree),
        (&SlicePages(&base.device), &base.device_tree),
        &[],
    )?;
    let base_ram = (&SlicePages(&base.ram) as &dyn ReadPages, &base.ram_tree);
    for (index, (new, old)) in source.disks.iter().zip(&base.disks).enumerate() {
        rows.extend(deltas::measure(
            which,
            &disk_name(index),
            (&new.image, &new.tree),
            (&old.image, &old.tree),
            &[base_ram],
        )?);
    }
    let disks = source.disks.iter();
    let disks: Vec<deltas::Side<'_>> = disks.map(|disk| (&disk.image as _, &disk.tree)).collect();
    let ram = (&SlicePages(&source.ram) as &dyn ReadPages, &source.ram_tree);
    rows.extend(deltas::measure(which, "ram", ram, base_ram, &disks)?);
    Ok(rows)
}

#[cfg(test)]
#[path = "measure_tests.rs"]
mod tests;
