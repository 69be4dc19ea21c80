//! The codec that follows the line and the processor, while pages are sent.
//!
//! VM handoff (SEC 2017) picks its codecs anew every five seconds, from what they take of the
//! processor, what they leave of the bytes, and what the line carries. So does this, every few
//! MiB. Each codec would bring pages over at the lesser of two rates: what the processor
//! compresses, and what the line carries of what is left. The codec with the highest is taken.
//!
//! What a codec takes and leaves is known beforehand from one machine and one guest
//! ([`LADDER`]). The first piece that is compressed shows how this machine and these pages
//! compare; that goes for all codecs, and each that was used is then known by itself. Threads'
//! own time is measured, so that other work on the machine does not look like a slow codec.
//!
//! The line's rate is what the caller measured or remembers. Where the line holds everything
//! back, what it takes is its rate, from when its buffers are full; it is believed to be faster
//! only little by little, for buffers grow. Where it never holds anything back it is at least
//! as fast as what went over it.
//!
//! Not promised: the best codec for a few hundred kB, which are over before anything is known.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::codec::{Codec, Effort};
use crate::encode::EncodeOptions;

/// A codec, what it takes of one core and what it leaves.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Rung {
    codec: Codec,
    /// Nanoseconds of one core for a byte of pages.
    nanos: f64,
    /// Bytes that leave for each that came.
    leaves: f64,
}

const fn rung(codec: Codec, nanos: f64, leaves: f64) -> Rung {
    Rung {
        codec,
        nanos,
        leaves,
    }
}

/// All codecs to choose from, the quickest first: what they took of the pages of a desktop session
/// that are sent as they are, of two such sessions where LZMA is compared with zstd.
const LADDER: [Rung; 8] = [
    rung(Codec::Zstd(-5), 1.15, 0.228),
    rung(Codec::Zstd(1), 1.35, 0.137),
    rung(Codec::Zstd(3), 2.1, 0.131),
    rung(Codec::Zstd(6), 6.7, 0.124),
    rung(Codec::Zstd(9), 10.5, 0.120),
    rung(Codec::Lzma(Effort::Fast), 35.0, 0.088),
    rung(Codec::Lzma(Effort::Normal), 100.0, 0.080),
    rung(Codec::Lzma(Effort::Strong), 240.0, 0.073),
];

/// What was seen of earlier pages counts half after so many bytes.
const HALF_LIFE: f64 = (16 << 20) as f64;
/// From so many bytes on a measurement says something.
const TELLING: f64 = (1 << 20) as f64;
/// So many bytes go by before a change of codec is followed by another.
const SETTLED: f64 = (8 << 20) as f64;
/// Another codec has to be this much quicker to be worth a change, which begins a new frame.
const WORTH: f64 = 1.1;
/// Codecs that are hardly slower than the quickest are taken for their fewer bytes.
const NEARLY: f64 = 0.97;
/// How long what the line takes is watched before it is believed.
const WATCHED: Duration = Duration::from_secs(1);
/// A line that lets nobody wait so long has room in its buffers.
const BLOCKED: Duration = Duration::from_millis(10);
/// The line is not believed to be faster than this many times what it was before.
const MOST_FASTER: f64 = 1.25;
/// What buffers between here and there may swallow at once.
const BUFFERED: f64 = (8 << 20) as f64;

/// Chooses the codec of each piece of a stream. One for all images of a migration: what was
/// learned from one is good for the next.
#[derive(Debug)]
pub struct Governor {
    workers: u32,
    fixed: Option<Codec>,
    /// The line is there, and what it takes is heard.
    watches: bool,
    state: Mutex<State>,
}

/// What was seen of a codec.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    raw: f64,
    packed: f64,
    seconds: f64,
}

#[derive(Debug)]
struct State {
    codec: Codec,
    /// Bytes a second.
    rate: f64,
    seen: [Seen; LADDER.len()],
    /// Bytes of pages since the codec was changed.
    since_change: f64,
    line: Watch,
    /// Codecs in the order in which they were taken up.
    taken: Vec<Codec>,
}

/// What was seen of the line.
#[derive(Debug)]
struct Watch {
    /// Since when, and whether the line holds back since then.
    since: Instant,
    blocked: bool,
    sent: f64,
    waited: Duration,
    /// Since the beginning.
    total: f64,
    busy: Duration,
}

impl Watch {
    fn new() -> Self {
        Self {
            since: Instant::now(),
            blocked: false,
            sent: 0.0,
            waited: Duration::ZERO,
            total: 0.0,
            busy: Duration::ZERO,
        }
    }

    fn again(&mut self, now: Instant, blocked: bool) {
        self.since = now;
        self.blocked = blocked;
        self.sent = 0.0;
        self.waited = Duration::ZERO;
    }
}

impl Governor {
    /// Always this codec.
    pub fn fixed(options: EncodeOptions) -> Self {
        Self::new(options.codec, Some(options.codec), options.workers, 0.0)
    }

    /// For a line of this many bits a second, as far as is known, with so many threads to compress.
    pub fn for_line(bits_per_second: u64, workers: u32) -> Self {
        let rate = bits_per_second as f64 / 8.0;
        let costs = LADDER.map(|rung| (rung.nanos * 1e-9, rung.leaves));
        let codec = LADDER[quickest(&costs, rate, workers)].codec;
        Self::new(codec, None, workers, rate)
    }

    /// The same, where what is compressed goes over that line only later: how fast it is taken now says
    /// nothing about it.
    pub fn for_later(bits_per_second: u64, workers: u32) -> Self {
        Self {
            watches: false,
            ..Self::for_line(bits_per_second, workers)
        }
    }

    fn new(codec: Codec, fixed: Option<Codec>, workers: u32, rate: f64) -> Self {
        Self {
            workers,
            fixed,
            watches: fixed.is_none(),
            state: Mutex::new(State {
                codec,
                rate,
                seen: [Seen::default(); LADDER.len()],
                // The first is but a guess.
                since_change: SETTLED,
                line: Watch::new(),
                taken: vec![codec],
            }),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every change leaves it whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Threads that compress.
    pub(crate) const fn workers(&self) -> u32 {
        self.workers
    }

    /// The codec for what comes next.
    pub fn codec(&self) -> Codec {
        self.fixed.unwrap_or_else(|| self.state().codec)
    }

    /// The codecs that were used, in the order in which they were taken up.
    pub fn taken(&self) -> Vec<Codec> {
        self.state().taken.clone()
    }

    /// The rate of the line, in bits per second, as far as it is known; 0 with a fixed codec.
    pub fn bits_per_second(&self) -> u64 {
        (self.state().rate * 8.0) as u64
    }

    /// Hears what compressing some pages took, of one thread's own time.
    pub(crate) fn compressed(&self, codec: Codec, raw: u64, packed: u64, took: Duration) {
        if self.fixed.is_some() {
            return;
        }
        let Some(rung) = LADDER.iter().position(|rung| rung.codec == codec) else {
            return;
        };
        let mut state = self.state();
        let seen = &mut state.seen[rung];
        let fades = 0.5_f64.powf(raw as f64 / HALF_LIFE);
        seen.raw = seen.raw * fades + raw as f64;
        seen.packed = seen.packed * fades + packed as f64;
        seen.seconds = seen.seconds * fades + took.as_secs_f64();
        state.since_change += raw as f64;
        if state.since_change >= SETTLED {
            state.choose(self.workers);
        }
    }

    /// Hears what the line took, and how long it took to take it.
    pub(crate) fn sent(&self, bytes: u64, waited: Duration) {
        if self.watches {
            self.state().sent(bytes, waited, Instant::now());
        }
    }
}

impl State {
    fn sent(&mut self, bytes: u64, waited: Duration, now: Instant) {
        let line = &mut self.line;
        line.total += bytes as f64;
        line.busy += waited;
        if !line.blocked && waited >= BLOCKED {
            // From here on its buffers are full.
            line.again(now, true);
            return;
        }
        line.sent += bytes as f64;
        line.waited += waited;
        let passed = now - line.since;
        if passed < WATCHED {
            return;
        }
        let carried = line.sent / passed.as_secs_f64();
        let holds_back = line.blocked && line.waited * 2 > passed;
        if holds_back {
            self.rate = carried.min(self.rate * MOST_FASTER);
        } else if line.total > BUFFERED {
            self.rate = self.rate.max(carried);
        }
        line.again(now, holds_back);
    }

    /// Seconds of one core and bytes left, for each byte of pages.
    fn costs(&self) -> [(f64, f64); LADDER.len()] {
        let of = |seen: &Seen, rung: &Rung| {
            let (seconds, leaves) = (seen.seconds / seen.raw, seen.packed / seen.raw);
            (seconds / (rung.nanos * 1e-9), leaves / rung.leaves)
        };
        // How this machine and these pages compare with those of the ladder.
        let (mut slower, mut harder, mut weight) = (0.0, 0.0, 0.0);
        for (seen, rung) in self.seen.iter().zip(&LADDER) {
            if seen.raw >= TELLING {
                let (times, share) = of(seen, rung);
                slower += times * seen.raw;
                harder += share * seen.raw;
                weight += seen.raw;
            }
        }
        let (slower, harder) = if weight > 0.0 {
            (slower / weight, harder / weight)
        } else {
            (1.0, 1.0)
        };
        std::array::from_fn(|at| {
            let (seen, rung) = (&self.seen[at], &LADDER[at]);
            let (slower, harder) = match seen.raw {
                raw if raw >= TELLING => of(seen, rung),
                _ => (slower, harder),
            };
            (rung.nanos * 1e-9 * slower, rung.leaves * harder)
        })
    }

    fn choose(&mut self, workers: u32) {
        let costs = self.costs();
        let best = quickest(&costs, self.rate, workers);
        let now = LADDER.iter().position(|rung| rung.codec == self.codec);
        let speed = |at: usize| speed(&LADDER[at], costs[at], self.rate, workers);
        if now.is_none_or(|now| speed(best) > speed(now) * WORTH) {
            self.codec = LADDER[best].codec;
            self.since_change = 0.0;
            self.taken.push(self.codec);
        }
    }
}

/// Bytes of pages a second that a codec brings over.
fn speed(rung: &Rung, (seconds, leaves): (f64, f64), rate: f64, workers: u32) -> f64 {
    let cores = match rung.codec {
        Codec::Zstd(_) => f64::from(workers.max(1)),
        Codec::Lzma(_) => 1.0,
    };
    (cores / seconds).min(rate / leaves)
}

/// The rung of the codec that brings pages over soonest, or nearly so in fewer bytes.
fn quickest(costs: &[(f64, f64); LADDER.len()], rate: f64, workers: u32) -> usize {
    let speeds: Vec<f64> = LADDER
        .iter()
        .zip(costs)
        .map(|(rung, cost)| speed(rung, *cost, rate, workers))
        .collect();
    let most = speeds.iter().copied().fold(0.0, f64::max);
    let good = speeds.iter().rposition(|speed| *speed >= most * NEARLY);
    good.unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn nanos(codec: Codec) -> f64 {
        LADDER
            .iter()
            .find(|rung| rung.codec == codec)
            .unwrap()
            .nanos
    }

    /// Compresses so many MiB on a machine that takes so many times as long.
    fn compress(governor: &Governor, mib: u64, slower: f64) {
        for _ in 0..mib {
            let codec = governor.codec();
            let took = Duration::from_secs_f64(nanos(codec) * 1e-9 * slower * MIB as f64);
            governor.compressed(codec, MIB, MIB / 6, took);
        }
    }

    #[test]
    fn slower_lines_get_stronger_codecs() {
        let rungs = [
            100_000_000_000,
            10_000_000_000,
            1_000_000_000,
            100_000_000,
            10_000_000,
            1_000_000,
        ]
        .map(|rate| {
            let codec = Governor::for_line(rate, 2).codec();
            LADDER.iter().position(|rung| rung.codec == codec).unwrap()
        });
        assert!(rungs.is_sorted(), "{rungs:?}");
        assert_eq!((rungs[0], rungs[5]), (0, LADDER.len() - 1));
    }

    #[test]
    fn a_slow_machine_takes_a_quicker_codec_and_a_quick_one_a_stronger() {
        let rung = |slower: f64| {
            let governor = Governor::for_line(20_000_000, 2);
            compress(&governor, 40, slower);
            let codec = governor.codec();
            LADDER.iter().position(|rung| rung.codec == codec).unwrap()
        };
        let rungs = [20.0, 1.0, 0.05].map(rung);
        assert!(rungs.is_sorted_by(|a, b| a < b), "{rungs:?}");
    }

    #[test]
    fn a_fixed_codec_stays() {
        let options = EncodeOptions {
            codec: Codec::Zstd(3),
            workers: 2,
        };
        let governor = Governor::fixed(options);
        compress(&governor, 40, 50.0);
        governor.sent(MIB, Duration::from_secs(9));
        assert_eq!(governor.taken(), [Codec::Zstd(3)]);
    }

    /// Sends over a line of this rate for so many seconds, in chunks; `buffer` is what it swallows
    /// at once.
    fn send(governor: &Governor, rate: f64, seconds: f64, mut buffer: f64) {
        let chunk = f64::from(256 << 10);
        let mut now = governor.state().line.since;
        let end = now + Duration::from_secs_f64(seconds);
        while now < end {
            let takes = Duration::from_secs_f64((chunk - buffer).max(0.0) / rate);
            buffer = (buffer - chunk).max(0.0);
            now += takes.max(Duration::from_micros(50));
            governor.state().sent(chunk as u64, takes, now);
        }
    }

    #[test]
    fn a_line_that_holds_back_is_as_slow_as_it_is() {
        let governor = Governor::for_line(1_000_000_000, 2);
        // What its buffers swallow at first says nothing.
        send(&governor, 1.25e6, 5.0, 4e6);
        let rate = governor.state().rate;
        assert!((1.2e6..1.3e6).contains(&rate), "{rate}");
        compress(&governor, 10, 1.0);
        assert!(matches!(governor.codec(), Codec::Lzma(_)));
    }

    #[test]
    fn a_line_of_later_is_as_fast_as_it_is_said_to_be() {
        let governor = Governor::for_later(10_000_000, 2);
        let codec = governor.codec();
        for _ in 0..100 {
            governor.sent(MIB, Duration::ZERO);
        }
        assert_eq!(governor.bits_per_second(), 10_000_000);
        assert_eq!(governor.codec(), codec);
        compress(&governor, 64, 100.0);
        assert_ne!(governor.codec(), codec, "the processor counts");
    }

    #[test]
    fn a_line_is_believed_to_be_faster_little_by_little() {
        let governor = Governor::for_line(10_000_000, 2);
        send(&governor, 12.5e6, 1.5, 0.0);
        let rate = governor.state().rate;
        assert!(rate <= 1.25e6 * MOST_FASTER, "{rate}");
        send(&governor, 12.5e6, 20.0, 0.0);
        let rate = governor.state().rate;
        assert!((12e6..13e6).contains(&rate), "{rate}");
    }

    #[test]
    fn a_line_that_never_holds_back_is_at_least_as_fast_as_what_it_carried() {
        let governor = Governor::for_line(10_000_000, 2);
        let begun = governor.state().line.since;
        for tenth in 1..=30 {
            let now = begun + Duration::from_millis(100 * tenth);
            governor.state().sent(10_000_000, Duration::ZERO, now);
        }
        let rate = governor.state().rate;
        assert!((95e6..110e6).contains(&rate), "{rate}");
    }
}
