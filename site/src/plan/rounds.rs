//! What live rounds would take, by how fast the guest changes its memory.
//!
//! A page in 32 of the running guest is looked at three times. How many have changed after a moment and
//! after a longer one tells how many will have after any time: `n(t) = n(1) t^p`, where `p` is one for a
//! guest that writes ever new pages, and less for one that writes the same again. What they differ in,
//! compressed, tells what one of them takes. Rounds are then played as they would be.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use reconciler::{PAGE_SIZE, PageHash, ZERO_PAGE};

use crate::error::{Error, Result};
use crate::source::{Judge, LiveOptions, SHARE};

/// Of so many pages one is looked at.
const STRIDE: u64 = 32;
/// After these moments.
const MOMENTS: [Duration; 2] = [Duration::from_millis(500), Duration::from_secs(2)];
/// As rounds compress.
const LEVEL: i32 = 3;

/// How a guest changes its memory.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Changing {
    /// Pages after a second.
    first: f64,
    /// How that goes on.
    power: f64,
    /// What one of them takes.
    bytes_a_page: f64,
    /// Pages in all.
    pages: f64,
    /// Seconds that looking at all of them takes beside a guest that works.
    look: f64,
}

/// What rounds come to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Rounds {
    /// All that is sent.
    pub(super) bytes: f64,
    /// Seconds while the VM runs.
    pub(super) before: f64,
    /// Seconds that it stands still.
    pub(super) down: f64,
}

impl Changing {
    /// Looks at the RAM of a running guest, for as long as the last of [`MOMENTS`].
    pub(super) fn of(ram: &Path) -> Result<Self> {
        // What is waited for is that time passes.
        Self::watched(ram, &mut std::thread::sleep)
    }

    fn watched(ram: &Path, wait: &mut dyn FnMut(Duration)) -> Result<Self> {
        let cannot = || Error::file("read the guest's RAM in", ram);
        let file = File::open(ram).map_err(cannot())?;
        let length = file.metadata().map_err(cannot())?.len();
        let begun = Instant::now();
        let (before, hashing) = sample(&file, length).map_err(cannot())?;
        let mut changed = [0_u64; 2];
        let mut differences = Vec::new();
        for (moment, changed) in MOMENTS.iter().zip(&mut changed) {
            wait(moment.saturating_sub(begun.elapsed()));
            let (now, _) = sample(&file, length).map_err(cannot())?;
            let pages = before.chunks(PAGE_SIZE).zip(now.chunks(PAGE_SIZE));
            differences.clear();
            for (one, other) in pages.filter(|(one, other)| one != other) {
                *changed += 1;
                differences.extend(one.iter().zip(other).map(|(one, other)| one ^ other));
            }
        }
        let packed = zstd::bulk::compress(&differences, LEVEL)
            .map_err(Error::file("compress what has changed in", ram))?;
        let [short, long] = changed.map(|pages| (pages * STRIDE) as f64);
        Ok(Self::measured(
            [short, long],
            packed.len() as f64 / (changed[1].max(1)) as f64,
            (length / PAGE_SIZE as u64) as f64,
            hashing.as_secs_f64() * STRIDE as f64 / SHARE,
        ))
    }

    fn measured(changed: [f64; 2], bytes_a_page: f64, pages: f64, look: f64) -> Self {
        let [short, long] = MOMENTS.map(|moment| moment.as_secs_f64());
        let power = if changed[0] > 0.0 {
            (changed[1] / changed[0]).ln() / (long / short).ln()
        } else {
            1.0
        };
        let power = power.clamp(0.0, 1.0);
        Self {
            first: changed[1] / long.powf(power),
            power,
            bytes_a_page,
            pages,
            look,
        }
    }

    /// Bytes that tell of what has changed after so many seconds.
    fn after(&self, seconds: f64) -> f64 {
        (self.first * seconds.powf(self.power)).min(self.pages) * self.bytes_a_page
    }

    /// Rounds after a copy of so many bytes, over a line of `rate` bits per second, where standing still
    /// takes `besides` seconds beside sending.
    pub(super) fn rounds(
        &self,
        copy: f64,
        rate: f64,
        besides: f64,
        options: LiveOptions,
    ) -> Rounds {
        let on_line = |bytes: f64| bytes * 8.0 / rate.max(1.0);
        let mut took = self.look + on_line(copy);
        let mut all = Rounds {
            bytes: copy,
            before: took,
            down: 0.0,
        };
        let mut judge = Judge::new(options.downtime, options.rounds);
        loop {
            let bytes = self.after(took);
            took = on_line(bytes).max(self.look);
            all.bytes += bytes;
            all.before += took;
            let last = self.after(took);
            all.down = besides + on_line(last);
            if judge.after(all.down).is_some() {
                all.bytes += last;
                return all;
            }
        }
    }
}

/// A page of each stride, and what hashing them took.
fn sample(file: &File, length: u64) -> io::Result<(Vec<u8>, Duration)> {
    let pages = (0..length / PAGE_SIZE as u64).step_by(STRIDE as usize);
    let mut all = Vec::new();
    let mut page = ZERO_PAGE;
    let begun = Instant::now();
    for number in pages {
        file.read_exact_at(&mut page, number * PAGE_SIZE as u64)?;
        std::hint::black_box(PageHash::of(&page));
        all.extend_from_slice(&page);
    }
    Ok((all, begun.elapsed()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGES: f64 = 196_608.0;

    fn options() -> LiveOptions {
        LiveOptions::default()
    }

    #[test]
    fn a_guest_that_writes_the_same_again_is_stopped_soon() {
        let same = Changing::measured([500.0, 500.0], 30.0, PAGES, 1.0);
        assert!((same.after(0.1) - same.after(100.0)).abs() < 1e-6);
        let rounds = same.rounds(20e6, 10e6, 0.5, options());
        assert!((rounds.down - 0.512).abs() < 1e-6, "{rounds:?}");
        assert!(
            (rounds.before - (1.0 + 16.0 + 1.0)).abs() < 1e-6,
            "{rounds:?}"
        );
        assert!(
            (rounds.bytes - (20e6 + 2.0 * 15_000.0)).abs() < 1.0,
            "{rounds:?}"
        );
    }

    #[test]
    fn one_that_writes_more_than_the_line_carries_stands_still_for_long() {
        // Ever new pages, in no pattern: 8,000 a second.
        let ever = Changing::measured([4000.0, 16_000.0], 4096.0, PAGES, 1.0);
        let rounds = ever.rounds(20e6, 10e6, 0.5, options());
        assert!(rounds.down > 60.0, "{rounds:?}");
        // No more than there is.
        assert!(ever.after(1e9) <= PAGES * 4096.0);
        assert!(rounds.bytes < 10.0 * PAGES * 4096.0, "{rounds:?}");
    }

    #[test]
    fn one_that_rests_takes_two_looks() {
        let still = Changing::measured([0.0, 0.0], 0.0, PAGES, 1.5);
        let rounds = still.rounds(0.0, 10e6, 0.25, options());
        assert!((rounds.before - 3.0).abs() < 1e-9 && rounds.bytes.abs() < 1e-9);
        assert!((rounds.down - 0.25).abs() < 1e-9, "{rounds:?}");
    }

    #[test]
    fn what_changes_in_a_file_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ram");
        std::fs::write(&path, vec![1; 4096 * PAGE_SIZE]).unwrap();
        // What the guest does in the meantime, and again.
        let mut works = |_: Duration| {
            let file = File::options().write(true).open(&path).unwrap();
            for page in 0..1024 {
                file.write_all_at(&[2; 8], page * PAGE_SIZE as u64).unwrap();
            }
        };
        let changing = Changing::watched(&path, &mut works).unwrap();
        assert!((changing.first - 1024.0).abs() < 1.0, "{changing:?}");
        assert!(
            changing.power < 1e-9 && changing.bytes_a_page < 64.0,
            "{changing:?}"
        );
    }
}
