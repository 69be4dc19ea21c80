//! The time between interactions and between typed keys, and how much of it a replay leaves out.

use std::time::Duration;

use tokio::time::Instant;
use traces::{Anchor, Event, GuestTime, Record};

use super::{Player, between, released};
use crate::guest::Guest;
use crate::rest::{SAMPLE, Stillness};
use crate::{Error, Pace, QuickOptions};

/// Of a pause, what is always left when catching up.
const KEPT_OF_PAUSE: f64 = 0.9;

/// How long before a pause ends the screen is looked at, so that looking puts nothing off.
const LOOK_AHEAD: Duration = Duration::from_millis(5);
/// How often to look whether a typed key has been taken in.
const KEY_SAMPLE: Duration = Duration::from_millis(4);

/// The pause before an interaction.
pub(super) struct Pause<'a> {
    /// How long it was.
    pub(super) thought: Duration,
    /// When it ended, as recorded.
    pub(super) until: GuestTime,
    /// What the screen showed at its end.
    pub(super) anchor: Option<&'a Anchor>,
    /// Whether the screen is looked at before anything comes of the interaction: it only moves
    /// the pointer to where another begins, which has an anchor.
    pub(super) leads: bool,
}

impl<G: Guest> Player<G> {
    /// Lets the guest have its time, or nearly: at a steady pace, until when exactly.
    pub(super) async fn think(&mut self, pause: &Pause<'_>) -> Result<Option<Instant>, Error> {
        let (_, real) = self.last;
        // What is held repeats or drags meanwhile: that is no thinking.
        if !self.held.is_empty() {
            let at = real + pause.thought;
            self.pace = (pause.until, at);
            return Ok(Some(self.rest_until(pause, at).await));
        }
        let due = real + pause.thought.div_f64(self.options.speed);
        let steady = match &self.options.pace {
            Pace::Recorded => true,
            Pace::Quick(quick) => {
                self.think_quickly(pause, quick, real, due).await?;
                false
            }
            Pace::Follow(quick) => {
                let in_time = self.in_time(pause.until);
                let late = in_time + quick.late < due;
                if late {
                    self.think_quickly(pause, quick, in_time, due).await?;
                }
                !late
            }
        };
        let mut over = self.guest.now();
        let mut start = None;
        if steady {
            over = over.max(due);
            let caught_up = self.caught_up(pause, due);
            start = Some(self.rest_until(pause, caught_up).await);
        }
        // A guest that was late has had more time than it needed, which is no credit.
        let saved = (real + pause.thought).saturating_duration_since(over.max(real));
        self.ahead += saved;
        self.report.saved += saved;
        Ok(start)
    }

    /// Waits until then, but for what it takes to look at the screen and to give input.
    async fn rest_until(&self, pause: &Pause<'_>, at: Instant) -> Instant {
        let look = pause.anchor.map_or(Duration::ZERO, |_| LOOK_AHEAD);
        self.guest.until(at - self.lead - look).await;
        at
    }

    /// At a quick pace, does not wait out the time between one typed key and the next, nor that
    /// for which one is tapped: only until the guest has taken in what came before. How much
    /// sooner than due that is.
    ///
    /// Of keys that make text, and no others: Enter acts on what was typed, and a dialog
    /// that checks a name in a timer of its own is idle before it has. What Enter began may just
    /// as well wait, for a disk or a timer, when the next letter comes.
    pub(super) async fn type_on(
        &self,
        before: &Record,
        next: &Record,
        due: Instant,
    ) -> Result<Duration, Error> {
        let Pace::Quick(quick) = &self.options.pace else {
            return Ok(Duration::ZERO);
        };
        let gap = between(before.at, next.at);
        let typed = match (&before.event, &next.event) {
            (
                &Event::Key { down: false, code },
                &Event::Key {
                    down: true,
                    code: other,
                },
            ) => types(code) && types(other) && self.held.is_empty(),
            // A Shift means another key by being held, and by itself perhaps a shortcut.
            (&Event::Key { down: true, code }, release) => {
                Event::makes_text(code)
                    && *release == released(&before.event)
                    && self.held == [release.clone()]
                    && gap <= quick.tap
            }
            _ => false,
        };
        if !typed {
            return Ok(Duration::ZERO);
        }
        let bound = quick.at_most.map(|bound| gap.div_f64(bound));
        let earliest = self.guest.now() + quick.key_gap.max(bound.unwrap_or_default());
        let mut rest = Stillness::new(quick.key_gap, self.options.rest.busy);
        loop {
            rest.sample_processors(&self.guest)?;
            let now = self.guest.now();
            if now >= due || (now >= earliest && rest.idle(quick.key_gap)) {
                return Ok(due.saturating_duration_since(now));
            }
            let next = if now < earliest { earliest } else { due };
            self.sleep_until((now + KEY_SAMPLE).min(next).min(due))
                .await;
        }
    }

    /// When a recorded time comes, in a replay that was never late.
    pub(super) fn in_time(&self, at: GuestTime) -> Instant {
        self.begun + between(self.options.start, at).div_f64(self.options.speed)
    }

    /// When a pause that ends at a recorded time is over, timers that overslept left aside.
    pub(super) fn paced(&self, at: GuestTime) -> Instant {
        let (recorded, real) = self.pace;
        real + between(recorded, at).div_f64(self.options.speed)
    }

    /// When a pause ends of which so much is cut as the replay is late, if that is not much.
    fn caught_up(&self, pause: &Pause<'_>, due: Instant) -> Instant {
        let (_, real) = self.last;
        let thought = pause.thought.div_f64(self.options.speed);
        // Two clicks are not to become a double-click.
        if thought < QuickOptions::default().floor {
            return due;
        }
        due.min(
            self.paced(pause.until)
                .max(real + thought.mul_f64(KEPT_OF_PAUSE)),
        )
    }

    /// Waits until the guest is ready for what comes next, but not before `from`, or it is due.
    async fn think_quickly(
        &self,
        pause: &Pause<'_>,
        quick: &QuickOptions,
        from: Instant,
        due: Instant,
    ) -> Result<(), Error> {
        let (_, real) = self.last;
        let bound = quick.at_most.map(|bound| pause.thought.div_f64(bound));
        let earliest = from.max(real + quick.floor.max(bound.unwrap_or_default()));
        if earliest >= due {
            self.sleep_until(due).await;
            return Ok(());
        }
        let watched = pause.anchor.is_some() || pause.leads;
        let mut rest = Stillness::new(
            quick.rest.max(quick.unanchored_rest),
            self.options.rest.busy,
        );
        let mut shown_since = None;
        loop {
            rest.sample(&self.guest)?;
            let now = self.guest.now();
            let shown = pause.anchor.is_none_or(|anchor| self.shows(anchor));
            shown_since = shown.then(|| shown_since.unwrap_or(now));
            let shown_for = shown_since.map(|since| now.duration_since(since));
            let rested = if watched {
                // Where something moves for ever, the anchor has to have stood still for as long.
                rest.at_rest(quick.rest)
                    || (shown_for >= Some(quick.unanchored_rest)
                        && rest.idle(quick.unanchored_rest))
            } else {
                rest.at_rest(quick.unanchored_rest)
            };
            if (shown && rested && now >= earliest) || now >= due {
                return Ok(());
            }
            self.sleep_until((now + SAMPLE).min(due)).await;
        }
    }

    fn shows(&self, anchor: &Anchor) -> bool {
        let (_, seen) = self.guest.look(|pixels| anchor.matches(pixels).is_match());
        seen == Some(true)
    }
}

/// Whether a key is part of writing text: it makes some, or is one of the Shifts.
fn types(code: u16) -> bool {
    const LEFT_SHIFT: u16 = 42;
    const RIGHT_SHIFT: u16 = 54;
    Event::makes_text(code) || matches!(code, LEFT_SHIFT | RIGHT_SHIFT)
}
