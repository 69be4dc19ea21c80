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
    /// The longest window that will be asked about.
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
        self.look(guest, Instant::now());
        self.sample_processors(guest)?;
        Ok(self.at_rest(self.window))
    }

    /// Looks at the guest's processors alone.
    pub(crate) fn sample_processors<G: Guest<Version = V>>(
        &mut self,
        guest: &G,
    ) -> Result<(), Error> {
        let now = Instant::now();
        self.used.push_back((now, guest.cpu_time()?));
        // The last sample before the window stays, so that the whole window is covered.
        while self
            .used
            .get(1)
            .is_some_and(|(at, _)| now.duration_since(*at) >= self.window)
        {
            self.used.pop_front();
        }
        Ok(())
    }

    /// Whether it was at rest over this window, no longer than the one to follow, up to the last
    /// sample.
    pub(crate) fn at_rest(&self, window: Duration) -> bool {
        self.quiet(window) && self.idle(window)
    }

    /// Whether the screen was.
    fn quiet(&self, window: Duration) -> bool {
        let now = self.used.back().map(|(at, _)| *at);
        now.is_some_and(|now| now.duration_since(self.still_since) >= window)
    }

    /// Whether the vCPUs were.
    pub(crate) fn idle(&self, window: Duration) -> bool {
        self.share(window).is_some_and(|share| share <= self.busy)
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

    /// Share of one CPU that was used over a window, once that has passed.
    fn share(&self, window: Duration) -> Option<f64> {
        let (to, after) = self.used.back()?;
        let covers = |(from, _): &&(Instant, Duration)| to.duration_since(*from) >= window;
        let (from, before) = self.used.iter().rev().find(covers)?;
        let span = to.duration_since(*from);
        (!span.is_zero()).then(|| after.saturating_sub(*before).as_secs_f64() / span.as_secs_f64())
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
