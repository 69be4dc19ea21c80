//! How much a recorder has done and how long its viewers waited for it.

use std::time::Duration;

/// Buckets for each doubling of the time.
const STEPS: u32 = 8;
/// Doublings from a microsecond on: up to about a minute.
const DOUBLINGS: u32 = 26;
const BUCKETS: usize = (STEPS * DOUBLINGS) as usize;

/// Times in buckets an eighth of a doubling wide, from a microsecond to a minute.
#[derive(Clone, PartialEq, Eq)]
pub struct Histogram {
    counts: Box<[u64; BUCKETS]>,
    total: u64,
    max: Duration,
}

impl Default for Histogram {
    fn default() -> Self {
        Self {
            counts: Box::new([0; BUCKETS]),
            total: 0,
            max: Duration::ZERO,
        }
    }
}

impl Histogram {
    pub(crate) fn add(&mut self, time: Duration) {
        self.counts[bucket(time)] += 1;
        self.total += 1;
        self.max = self.max.max(time);
    }

    /// How many times were taken.
    pub fn count(&self) -> u64 {
        self.total
    }

    /// The longest.
    pub fn max(&self) -> Duration {
        self.max
    }

    /// Half of the times are at most this, within an eighth of a doubling.
    pub fn median(&self) -> Duration {
        self.quantile(0.5)
    }

    /// A share `q` (0 to 1) of the times are at most this, within an eighth of a doubling; zero
    /// if there are none.
    pub fn quantile(&self, q: f64) -> Duration {
        let wanted = (self.total as f64 * q.clamp(0.0, 1.0)).ceil() as u64;
        let mut seen = 0;
        for (at, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= wanted && seen > 0 {
                return upper_bound(at).min(self.max);
            }
        }
        self.max
    }
}

impl std::fmt::Debug for Histogram {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Histogram")
            .field("count", &self.total)
            .field("median", &self.median())
            .field("p99", &self.quantile(0.99))
            .field("max", &self.max)
            .finish_non_exhaustive()
    }
}

fn bucket(time: Duration) -> usize {
    let micros = time.as_secs_f64() * 1e6;
    let at = (micros.max(1.0).log2() * f64::from(STEPS)).ceil() as usize;
    at.min(BUCKETS - 1)
}

fn upper_bound(bucket: usize) -> Duration {
    Duration::from_secs_f64((bucket as f64 / f64::from(STEPS)).exp2() / 1e6)
}

/// What a recorder has done so far.
#[derive(Clone, Debug, Default)]
pub struct Statistics {
    /// Viewers connected now.
    pub viewers: usize,
    /// Viewers that came in since the start.
    pub admitted: u64,
    /// Viewers turned away or cut off for what they said.
    pub refused: u64,
    /// Key and pointer messages that went to QEMU.
    pub forwarded: u64,
    /// How often keys were pressed with which a desktop is locked: Ctrl-Alt-L, the logo key with L, or the key that
    /// is there for it. Whether the guest locks by them is its own affair.
    pub locks: u64,
    /// Records put into the log.
    pub records: u64,
    /// Anchors among them.
    pub anchors: u64,
    /// From the moment a key or pointer message was read from its viewer to the moment QEMU's
    /// socket had it.
    pub latency: Histogram,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_close() {
        let mut histogram = Histogram::default();
        assert_eq!(histogram.median(), Duration::ZERO);
        for micros in 1..=1000 {
            histogram.add(Duration::from_micros(micros));
        }
        let median = histogram.median().as_micros();
        assert!((500..=550).contains(&median), "{median}");
        assert_eq!(histogram.quantile(1.0), Duration::from_millis(1));
        assert_eq!(histogram.max(), Duration::from_millis(1));
        histogram.add(Duration::from_secs(3600));
        assert_eq!(histogram.quantile(1.0), upper_bound(BUCKETS - 1));
    }
}
