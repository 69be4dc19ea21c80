//! How fast the whole pipeline is on a line of a given rate, and what of it takes how long.
//!
//! Both ends run in this process, at the same time and on the same cores, with a line between them
//! that is as slow as the one asked about ([`reconciler::Overlapped`]). A run begins when the VM
//! stands still: the image is scanned, offered, looked up, sent and verified. What a target does
//! before that or meanwhile, hashing what it has, is not in it.
//!
//! What the machine can do besides is measured in the same run ([`Yardsticks`]), for another
//! machine, or other work on this one, moves both.

use std::fmt;
use std::time::Instant;

use rayon::prelude::*;
use reconciler::{Governor, ImageTree, PAGE_SIZE, SlicePages, Stats, no_progress};
use rustix::time::{ClockId, clock_gettime};
use serde::Serialize;

use crate::error::{Error, Result};
use crate::report::name_of;
use crate::states::State;

/// A measured run over a line.
#[derive(Clone, Debug, Serialize)]
pub struct Pace {
    /// The line's rate.
    pub bits_per_second: u64,
    /// The codecs of the literals, in the order in which they were taken up.
    pub codecs: Vec<String>,
    /// Bytes of the image.
    pub scanned: u64,
    /// Bytes of its pages that differ from the base.
    pub changed: u64,
    /// The source's: reading and hashing the image. Of a disk a migration reads but what was written.
    pub scan: f64,
    /// What the line took for the pages.
    pub line: f64,
    /// From the first page to the last: compressing, sending, unpacking.
    pub pages: f64,
    /// From the scan to the verdict.
    pub total: f64,
    /// What all of it took of processors, both ends together: beside other work it is what says
    /// how long it would take alone.
    pub processor: f64,
    /// How many runs there were, of which this is the median by `total`.
    pub runs: usize,
}

/// What a run took besides its stages.
#[derive(Clone, Copy, Default)]
pub(crate) struct Took {
    pub(crate) scan: f64,
    pub(crate) total: f64,
    pub(crate) processor: f64,
}

/// What this process has had of all processors, in seconds.
pub(crate) fn processor_time() -> f64 {
    let now = clock_gettime(ClockId::ProcessCPUTime);
    now.tv_sec as f64 + now.tv_nsec as f64 * 1e-9
}

impl Pace {
    pub(crate) fn of(
        governor: &Governor,
        bits_per_second: u64,
        trees: (&ImageTree, &ImageTree),
        stats: &Stats,
        took: Took,
    ) -> Self {
        let (tree, base) = trees;
        Self {
            bits_per_second,
            codecs: governor.taken().into_iter().map(name_of).collect(),
            scanned: tree.pages() * PAGE_SIZE as u64,
            changed: tree.differing(base).len() * PAGE_SIZE as u64,
            scan: took.scan,
            line: stats.times.line.as_secs_f64(),
            pages: stats.times.pages.as_secs_f64(),
            total: took.total,
            processor: took.processor,
            runs: 1,
        }
    }

    /// Bytes of the image that were dealt with in a second.
    pub fn scanned_per_second(&self) -> f64 {
        self.scanned as f64 / self.total
    }

    /// Bytes of changed pages that were dealt with in a second.
    pub fn changed_per_second(&self) -> f64 {
        self.changed as f64 / self.total
    }
}

/// What the machine does with the RAM of a capture by itself, in bytes a second: on all cores, the
/// median of several runs.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Yardsticks {
    /// Copying it.
    pub copy: f64,
    /// Hashing its pages with BLAKE3; zero pages are told by comparing.
    pub hash: f64,
    /// Compressing the pages that differ from the base with zstd at level 1, a MiB at a time.
    pub zstd: f64,
}

/// How often a yardstick is taken.
const RUNS: usize = 5;
/// Bytes that a thread takes at once.
const PIECE: usize = 1 << 20;

impl Yardsticks {
    pub(crate) fn take(source: &State, base: &State) -> Result<Self> {
        let ram = &source.ram[..];
        let mut copied = vec![0; ram.len()];
        let copy = median_rate(ram.len(), || {
            let pieces = copied.par_chunks_mut(PIECE).zip(ram.par_chunks(PIECE));
            pieces.for_each(|(to, from)| to.copy_from_slice(from));
            Ok(())
        })?;
        drop(copied);
        let hash = median_rate(ram.len(), || {
            ImageTree::build(&SlicePages(ram), &no_progress).map_err(Error::Hash)?;
            Ok(())
        })?;
        let changed = source.ram_tree.differing(&base.ram_tree);
        let mut pages = Vec::with_capacity(changed.len() as usize * PAGE_SIZE);
        for run in changed.runs() {
            let at = |page: u64| page as usize * PAGE_SIZE;
            pages.extend_from_slice(ram.get(at(run.start)..at(run.end)).unwrap_or_default());
        }
        let zstd = median_rate(pages.len(), || {
            pages.par_chunks(PIECE).try_for_each(|piece| {
                zstd::bulk::compress(piece, 1)
                    .map(drop)
                    .map_err(Error::Compress)
            })
        })?;
        Ok(Self { copy, hash, zstd })
    }
}

impl fmt::Display for Yardsticks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "this machine, on all cores: copying RAM {:.0} MB/s, hashing its pages {:.0} MB/s, zstd -1 of \
             changed pages {:.0} MB/s",
            self.copy / 1e6,
            self.hash / 1e6,
            self.zstd / 1e6
        )
    }
}

fn median_rate(bytes: usize, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
    let mut seconds = Vec::new();
    for _ in 0..RUNS {
        let begun = Instant::now();
        work()?;
        seconds.push(begun.elapsed().as_secs_f64());
    }
    seconds.sort_by(f64::total_cmp);
    Ok(bytes as f64 / seconds[RUNS / 2])
}

/// A line's rate as it is written: `10mbit`, `1gbit`.
///
/// # Errors
/// Says what would have been a rate.
pub fn rate_of(name: &str) -> std::result::Result<u64, String> {
    let units = [
        ("gbit", 1_000_000_000),
        ("mbit", 1_000_000),
        ("kbit", 1000),
        ("bit", 1),
    ];
    let number = |name: &str, unit: &str, times: u64| {
        name.strip_suffix(unit)?
            .parse::<u64>()
            .ok()?
            .checked_mul(times)
    };
    units
        .iter()
        .find_map(|(unit, times)| number(name, unit, *times))
        .filter(|rate| *rate > 0)
        .ok_or_else(|| format!("{name:?} is no rate; use such as 10mbit, 100mbit, 1gbit, 10gbit"))
}

/// As [`rate_of`] reads it.
pub fn rate_name(bits_per_second: u64) -> String {
    let units = [("gbit", 1_000_000_000), ("mbit", 1_000_000), ("kbit", 1000)];
    let unit = units
        .iter()
        .find(|(_, times)| bits_per_second.is_multiple_of(*times) && bits_per_second > 0);
    match unit {
        Some((unit, times)) => format!("{}{unit}", bits_per_second / times),
        None => format!("{bits_per_second}bit"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_have_names() {
        for name in ["1bit", "256kbit", "10mbit", "1500mbit", "10gbit"] {
            assert_eq!(rate_name(rate_of(name).unwrap()), name);
        }
        for name in [
            "",
            "10",
            "mbit",
            "0mbit",
            "-1mbit",
            "1tbit",
            "99999999999gbit",
        ] {
            assert!(rate_of(name).is_err(), "{name}");
        }
    }
}
