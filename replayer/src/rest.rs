//! Telling when a guest has nothing left to do.
//!
//! Neither sign is enough alone: a guest that computes may show nothing for a while, and one
//! that waits for its disk uses no CPU. Together, over a window, they are what a person would
//! call "it has finished". A caret that blinks and a clock that ticks are not activity; the
//! screen is compared as anchors are, with one small spot that may differ.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;
use traces::{Anchor, Pixels, Region};

use crate::Error;
use crate::guest::Guest;

/// How often to look.
pub(crate) const SAMPLE: Duration = Duration::from_millis(100);

/// Follows a guest from one moment on.
pub(crate) struct Stillness<V> {
    window: Duration,
    busy: f64,
    /// What the screen has shown since `still_since`, but for a small spot.
    shown: Option<(V, Anchor)>,
    still_since: Instant,
    /// When the vCPUs had used how much, over the last window.
    used: VecDeque<(Instant, Duration)>,
}

impl<V: Copy + PartialEq> Stillness<V> {
    pub(crate) fn new(window: Duration, busy: f64) -> Self {
        Self {
            window,
            busy,
            shown: None,
            still_since: Instant::now(),
            used: VecDeque::new(),
        }
    }

    /// Looks at the guest, and says whether it has been at rest for the window.
    pub(crate) fn sample<G: Guest<Version = V>>(&mut self, guest: &G) -> Result<bool, Error> {
        let now = Instant::now();
        self.look(guest, now);
        self.used.push_back((now, guest.cpu_time()?));
        // The last sample before the window stays, so that the whole window is covered.
        while self
            .used
            .get(1)
            .is_some_and(|(at, _)| now.duration_since(*at) >= self.window)
        {
            self.used.pop_front();
        }
        let quiet = now.duration_since(self.still_since) >= self.window;
        Ok(quiet && self.share().is_some_and(|share| share <= self.busy))
    }

    fn look<G: Guest<Version = V>>(&mut self, guest: &G, now: Instant) {
        if let Some((version, _)) = &self.shown
            && *version == guest.version()
        {
            return;
        }
        let shown = self.shown.take();
        let (version, anchor) = guest.look(|pixels| match shown {
            Some((_, anchor)) if covers(&anchor, pixels) && anchor.matches(pixels).is_match() => {
                (anchor, true)
            }
            _ => (Anchor::capture(pixels, whole(pixels)), false),
        });
        match anchor {
            Some((anchor, same)) => {
                self.shown = Some((version, anchor));
                if !same {
                    self.still_since = now;
                }
            }
            // Its size is just changing.
            None => self.still_since = now,
        }
    }

    /// Share of one CPU that was used over the window, once that has passed.
    fn share(&self) -> Option<f64> {
        let ((from, before), (to, after)) = (self.used.front()?, self.used.back()?);
        let span = to.duration_since(*from);
        (span >= self.window)
            .then(|| after.saturating_sub(*before).as_secs_f64() / span.as_secs_f64())
    }
}

fn whole(pixels: &Pixels<'_>) -> Region {
    Region {
        x: 0,
        y: 0,
        width: pixels.width,
        height: pixels.height,
    }
}

fn covers(anchor: &Anchor, pixels: &Pixels<'_>) -> bool {
    anchor.region == whole(pixels)
}
