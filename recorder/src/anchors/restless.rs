//! Which parts of the screen change by themselves: a caret that blinks, a clock, a spinner.
//!
//! An anchor must not be taken of those: what they showed then is not what a replay shows. They
//! are told from what the user brought about by watching while there is no input, and from a
//! program's late answer by their rhythm ([`Rhythms`]). Nothing is learned near input, and nothing
//! forgotten; what began to move only then is left to the replayer.
//!
//! What changed last of all the rest is what the user most likely waited for: a prompt, a letter in
//! a dialog. Typing goes there, wherever the last click went.
//!
//! Not promised: what changes once a minute is not learned, as nobody does nothing for that
//! long; an anchor tolerates one such spot anyway. Output that scrolls evenly counts as restless
//! while it does, which is right: what it shows at one moment says nothing.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;
use traces::{Pixels, Region, Rhythms};
use vm_host::screen::{Observer, ScreenError};

/// What changes later than this after the last input does so by itself, or by a slow program.
const CALM: Duration = Duration::from_secs(1);
/// How often to look, at most: three times in a blink.
const LOOK: Duration = Duration::from_millis(100);
/// How often to look whether something has stopped.
const RECHECK: Duration = Duration::from_millis(500);

/// What is known to be restless now, as the watcher tells whoever takes anchors.
pub(crate) struct Restless {
    shared: Mutex<Shared>,
}

struct Shared {
    last_input: Instant,
    regions: Arc<[Region]>,
    /// Where the screen changed last, since then.
    answer: Option<(u16, u16)>,
}

impl Restless {
    pub(crate) fn new() -> Self {
        let shared = Shared {
            last_input: Instant::now(),
            regions: Arc::default(),
            answer: None,
        };
        Self {
            shared: Mutex::new(shared),
        }
    }

    /// Only whole values are stored under the lock.
    fn shared(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest was given input. Says where the screen had changed last since the input before,
    /// if it was still doing so some time later.
    pub(crate) fn disturbed(&self, now: Instant) -> Option<(u16, u16)> {
        let mut shared = self.shared();
        shared.last_input = now;
        shared.answer.take()
    }

    /// The regions that change by themselves.
    pub(crate) fn regions(&self) -> Arc<[Region]> {
        Arc::clone(&self.shared().regions)
    }

    /// Learns until told to stop.
    pub(crate) async fn watch(
        &self,
        observer: &Observer,
        stop: &CancellationToken,
    ) -> Result<(), ScreenError> {
        let learn = async {
            let mut rhythms = Rhythms::default();
            loop {
                let version = observer.version();
                let now = Instant::now();
                let calm = now.saturating_duration_since(self.shared().last_input);
                if let Some(wait) = CALM.checked_sub(calm).filter(|wait| !wait.is_zero()) {
                    rhythms.interrupt();
                    tokio::time::sleep(wait).await;
                    continue;
                }
                let seen = observer.with_frame(|frame| {
                    let pixels = Pixels {
                        width: frame.width,
                        height: frame.height,
                        rgb: frame.rgb,
                    };
                    frame.whole.then(|| rhythms.look(&pixels, now))
                });
                if seen.is_some() {
                    let mut shared = self.shared();
                    shared.regions = rhythms.restless().into();
                    // Input may have come meanwhile.
                    if shared.last_input < now {
                        shared.answer = rhythms.answer();
                    }
                }
                tokio::time::sleep(LOOK).await;
                // Also without a change: what was restless may have stopped.
                if let Ok(changed) = tokio::time::timeout(RECHECK, observer.changed(version)).await
                {
                    changed?;
                }
            }
        };
        tokio::select! {
            () = stop.cancelled() => Ok(()),
            failed = learn => failed,
        }
    }
}

/// Whether two regions share a pixel.
pub(crate) fn overlap(one: Region, other: Region) -> bool {
    let apart = |a: u16, a_size: u16, b: u16, b_size: u16| {
        u32::from(a) + u32::from(a_size) <= u32::from(b)
            || u32::from(b) + u32::from(b_size) <= u32::from(a)
    };
    !apart(one.x, one.width, other.x, other.width)
        && !apart(one.y, one.height, other.y, other.height)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_overlap_where_they_share_a_pixel() {
        let region = |x, y, width, height| Region {
            x,
            y,
            width,
            height,
        };
        let one = region(16, 16, 16, 16);
        assert!(overlap(one, region(31, 31, 16, 16)));
        assert!(overlap(one, region(0, 0, 100, 100)));
        assert!(!overlap(one, region(32, 16, 16, 16)));
        assert!(!overlap(one, region(16, 0, 16, 16)));
        assert!(!overlap(region(65535, 0, 65535, 9), region(0, 0, 65535, 9)));
    }
}
