//! A line between two ends in one process: as fast as the one that is asked about, and with
//! little room in it. Both ends work at the same time, as on the way from site to site.

use std::thread;
use std::time::{Duration, Instant};

use crossbeam::channel::bounded;

use crate::apply::Applier;
use crate::encode::{Closed, EncodeStats, References, encode_pages_by};
use crate::error::Error;
use crate::governor::Governor;
use crate::memory::Times;
use crate::page::{PageIndex, ReadPages};

/// Chunks that are on their way.
const QUEUE: usize = 4;
/// What a line carries in so short a time need not be waited for.
const SLACK: Duration = Duration::from_millis(1);

/// Both ends at work at once.
#[derive(Clone, Copy, Debug)]
pub struct Overlapped<'a> {
    /// Picks the codec.
    pub governor: &'a Governor,
    /// What the line carries.
    pub bits_per_second: u64,
}

/// A line that has been sent over.
struct Line {
    seconds_per_byte: f64,
    free_at: Instant,
    busy: Duration,
}

impl Line {
    fn new(bits_per_second: u64) -> Self {
        Self {
            seconds_per_byte: 8.0 / bits_per_second.max(1) as f64,
            free_at: Instant::now(),
            busy: Duration::ZERO,
        }
    }

    /// Waits until the line has carried so many bytes, but for little.
    fn carry(&mut self, bytes: usize) {
        let takes = Duration::from_secs_f64(bytes as f64 * self.seconds_per_byte);
        let now = Instant::now();
        self.busy += takes;
        self.free_at = self.free_at.max(now) + takes;
        let ahead = self.free_at - now;
        if ahead > SLACK {
            thread::sleep(ahead);
        }
    }
}

impl Overlapped<'_> {
    /// Encodes pages on one thread and applies them on this one.
    pub(crate) fn send(
        &self,
        image: &dyn ReadPages,
        references: References<'_>,
        pages: &[PageIndex],
        applier: &mut Applier<'_>,
        times: &mut Times,
    ) -> Result<EncodeStats, Error> {
        let begun = Instant::now();
        let (to, from) = bounded(QUEUE);
        let encode = move || {
            let (mut line, mut waited) = (Line::new(self.bits_per_second), Duration::ZERO);
            let begun = Instant::now();
            let mut sink = |chunk: crate::stream::PageChunk| {
                let begun = Instant::now();
                line.carry(chunk.bytes.len());
                let sent = to.send(chunk).map_err(|_| Closed);
                waited += begun.elapsed();
                sent
            };
            let sent = encode_pages_by(image, references, pages, self.governor, &mut sink);
            (sent, begun.elapsed().saturating_sub(waited), line.busy)
        };
        let (applied, encoded) = thread::scope(|scope| {
            let encoder = scope.spawn(encode);
            let mut applied = Ok(());
            for chunk in &from {
                let begun = Instant::now();
                applied = applier.push(&chunk);
                times.decode += begun.elapsed();
                if applied.is_err() {
                    break;
                }
            }
            drop(from);
            (applied, encoder.join())
        });
        applied?;
        let (sent, encode, line) = encoded.map_err(|_| Error::WorkerDied)?;
        times.encode += encode;
        times.line += line;
        times.pages += begun.elapsed();
        sent
    }
}
