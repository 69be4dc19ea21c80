//! The schedule: when each event is due, and what puts it off.
//!
//! Recorded times become real ones one interaction at a time. The pause before an interaction
//! is counted from when the one before it really ended, so that a late one puts off all that
//! follow, but for the little that timers oversleep; within it, each event is due as long after
//! its first as it was recorded. A quick pace only ever shortens that pause, and what it took off
//! is given back where an anchor needs it.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep_until, timeout_at};
use traces::{Anchor, Event, GuestTime, Interaction, Match, Record, interactions};

use crate::course::Course;
use crate::guest::Guest;
use crate::moving::Moving;
use crate::rest::{SAMPLE, Stillness};
use crate::{Divergence, Error, Miss, MissPictures, Options, Pace, Progress, ReplayReport};

mod pauses;

use pauses::Pause;

/// Events due within this of each other go to QEMU together: its clock for input is no finer.
const TOGETHER: Duration = Duration::from_millis(1);

/// Up to this much a replay that is late catches up: a guest that is slow enough to need more time
/// is later than that. Left alone what timers oversleep would add up, to a hundredth of a second or
/// two in a minute of typing, and so much later the guest's programs would note all that comes.
const CATCH_UP: Duration = Duration::from_millis(100);
/// QEMU takes input in within this time, unless its guest holds it up.
const MAX_LEAD: Duration = Duration::from_millis(2);

/// Plays a log piece by piece.
pub(crate) struct Player<G> {
    guest: G,
    options: Options,
    begun: Instant,
    /// The recorded time of the last record, and when that was in reality.
    last: (GuestTime, Instant),
    /// The same, but for what timers overslept.
    pace: (GuestTime, Instant),
    /// How long it takes from here until QEMU has taken in an event: that much sooner than due it
    /// is given one.
    lead: Duration,
    /// Keys and buttons that are down in the guest.
    held: Vec<Event>,
    /// Think time that the guest was not given since the last anchor that matched.
    ahead: Duration,
    course: Course,
    report: ReplayReport,
}

impl<G: Guest> Player<G> {
    pub(crate) fn new(guest: G, options: &Options) -> Result<Self, Error> {
        options.check()?;
        let now = guest.now();
        let begun = now.checked_sub(guest.ran_for()).unwrap_or(now);
        Ok(Self {
            guest,
            begun,
            last: (options.start, begun),
            pace: (options.start, begun),
            lead: Duration::ZERO,
            options: options.clone(),
            held: Vec::new(),
            ahead: Duration::ZERO,
            course: Course::default(),
            report: ReplayReport::default(),
        })
    }

    pub(crate) fn position(&self) -> GuestTime {
        self.last.0
    }

    pub(crate) fn report(&self) -> ReplayReport {
        ReplayReport {
            duration: self.begun.elapsed(),
            recorded: between(self.options.start, self.last.0),
            ..self.report.clone()
        }
    }

    pub(crate) async fn play(
        &mut self,
        records: &[Record],
        mut progress: impl FnMut(&Progress),
    ) -> Result<(), Error> {
        let acts = interactions(records);
        let from = self.last.0;
        let mut now = Progress {
            of_interactions: acts.len(),
            of_recorded: records
                .last()
                .map_or(Duration::ZERO, |last| between(from, last.at)),
            ..Progress::default()
        };
        for (index, act) in acts.iter().enumerate() {
            if self.report.diverged.is_some() {
                self.report.skipped += acts.len() - index;
                break;
            }
            progress(&now);
            let leads = acts
                .get(index + 1)
                .is_some_and(|next| leads(records, act, next));
            let acted = self.act(records, act, leads).await?;
            now.missed = self.report.missed.len();
            if !acted {
                self.report.skipped += 1;
                continue;
            }
            now.interactions += 1;
            now.played = between(from, self.last.0);
        }
        progress(&now);
        Ok(())
    }

    /// Injects an interaction, unless the replay turns out to have diverged.
    async fn act(
        &mut self,
        records: &[Record],
        act: &Interaction,
        leads: bool,
    ) -> Result<bool, Error> {
        let (recorded, _) = self.last;
        let anchor = act
            .anchor
            .and_then(|index| match &records.get(index)?.event {
                Event::Anchor(anchor) => Some(anchor),
                _ => None,
            });
        let pause = Pause {
            thought: between(recorded, act.start),
            until: act.start,
            // One of which everything changes by itself says nothing.
            anchor: anchor.filter(|anchor| anchor.tiles.is_empty() || anchor.compared() > 0),
            leads,
        };
        let steady = self.think(&pause).await?;
        if let Some(anchor) = pause.anchor {
            // Where it is overdue, the guest has its time for the screen all the same.
            let now = self.guest.now();
            let due = steady.map_or(now, |start| start.max(now));
            self.await_anchor(anchor, act.start, due).await?;
        }
        if self.report.diverged.is_some() {
            self.release().await?;
            return Ok(false);
        }
        if let Some(start) = steady {
            self.guest.until(start - self.lead).await;
        }
        // Where it was late or a timer overslept, what follows moves as a whole.
        let start = self.guest.now() + self.lead;
        let late = start.saturating_duration_since(self.in_time(act.start));
        tracing::debug!(at = act.start.micros, ?late, "an interaction begins");
        let paced = self.paced(act.start);
        let caught_up = paced <= start && start.duration_since(paced) <= CATCH_UP;
        let paced = if caught_up { paced } else { start };
        let mut sooner = Duration::ZERO;
        let mut before: Option<&Record> = None;
        let mut left = records.get(act.records.clone()).unwrap_or(&[]);
        while let Some(first) = left.first() {
            let due = |record: &Record, sooner| {
                start + between(act.start, record.at).saturating_sub(sooner)
            };
            if let Some(before) = before {
                sooner += self.type_on(before, first, due(first, sooner)).await?;
            }
            let begin = due(first, sooner) - self.lead;
            let waited = begin > self.guest.now();
            self.guest.until(begin).await;
            let soon = (self.guest.now() + self.lead + TOGETHER).max(due(first, sooner));
            let now = |record: &&Record| due(record, sooner) <= soon;
            let count = left.iter().take_while(now).count();
            let (batch, rest) = left.split_at(count.max(1));
            self.inject(batch).await?;
            if waited && batch.len() == 1 {
                self.learn_lead(first, begin.elapsed());
            }
            before = batch.last();
            left = rest;
        }
        let acted = between(act.start, act.end).saturating_sub(sooner);
        self.last = (act.end.max(recorded), start + acted);
        self.pace = (act.end.max(recorded), paced + acted);
        self.ahead += sooner;
        self.report.saved += sooner;
        self.report.interactions += 1;
        Ok(true)
    }

    /// Learns from an event how long it takes until QEMU has one: the mean of the last eight or so.
    ///
    /// Not from a wheel's click, which is two reports, nor at a quick pace, whose times are others
    /// anyway.
    fn learn_lead(&mut self, record: &Record, took: Duration) {
        let one_report = matches!(
            record.event,
            Event::Key { .. } | Event::Button { .. } | Event::Pointer { .. }
        );
        if !one_report || matches!(self.options.pace, Pace::Quick(_)) {
            return;
        }
        let took = took.min(MAX_LEAD);
        self.lead = if self.lead.is_zero() {
            took
        } else {
            (self.lead * 7 + took) / 8
        };
    }

    /// Leaves no key or button down in a guest that is given nothing more.
    async fn release(&mut self) -> Result<(), Error> {
        let held = std::mem::take(&mut self.held);
        if held.is_empty() {
            return Ok(());
        }
        self.guest.send(&held).await
    }

    async fn inject(&mut self, records: &[Record]) -> Result<(), Error> {
        let mut events = Vec::with_capacity(records.len());
        for Record { event, .. } in records {
            match event {
                Event::Key { .. } | Event::Button { .. } => {
                    let key = released(event);
                    self.held.retain(|held| *held != key);
                    if key != *event {
                        self.held.push(key);
                    }
                    events.push(event.clone());
                }
                // Whatever was down has been released while nobody recorded.
                Event::Gap => events.append(&mut self.held),
                Event::Anchor(_) | Event::Redacted => {}
                Event::Pointer { .. } | Event::Wheel { .. } | Event::Screen { .. } => {
                    events.push(event.clone());
                }
            }
        }
        if !events.is_empty() {
            self.guest.send(&events).await?;
            self.report.events += events.len();
        }
        Ok(())
    }

    /// Waits for what an interaction was begun on, and counts how that went.
    async fn await_anchor(
        &mut self,
        anchor: &Anchor,
        at: GuestTime,
        due: Instant,
    ) -> Result<(), Error> {
        let (found, looks) = self.wait(anchor, due + self.ahead).await?;
        let waited = self.guest.now().saturating_duration_since(due);
        self.report.waited += waited;
        if found.is_match() {
            self.report.matched += 1;
            self.ahead = Duration::ZERO;
        } else {
            self.ahead = self.ahead.saturating_sub(waited);
            let miss = Miss {
                at,
                region: anchor.region,
                tiles: found.tiles,
                differing: found.differing,
                waited,
                looks,
                pictures: self.pictures(anchor),
            };
            tracing::debug!(?miss, "the screen does not show what it showed");
            self.report.missed.push(miss);
        }
        let options = self.options.divergence.as_ref();
        if let Some(why) = options.and_then(|options| self.course.note(found, options)) {
            let diverged = Divergence { at, why };
            tracing::info!(%diverged, "the replay is given up");
            self.report.diverged = Some(diverged);
        }
        Ok(())
    }

    /// Sleeps until it is about that time by the guest's clock.
    async fn sleep_until(&self, at: Instant) {
        sleep_until(self.guest.host_time(at)).await;
    }

    fn pictures(&self, anchor: &Anchor) -> Option<Arc<MissPictures>> {
        if self.report.missed.len() >= self.options.pictures {
            return None;
        }
        let (_, pictures) = self.guest.look(|pixels| MissPictures::take(pixels, anchor));
        pictures.flatten().map(Arc::new)
    }

    /// Looks again and again until the anchor matches, or it is in vain: not before `from`, as
    /// the guest had that long when it was recorded. Also says how often.
    async fn wait(&self, anchor: &Anchor, from: Instant) -> Result<(Match, usize), Error> {
        let limit = from + self.options.anchor_limit;
        let mut rest = Stillness::new(self.options.anchor_rest, self.options.rest.busy);
        let mut moving = Moving::new(anchor);
        let mut looks = 0;
        loop {
            let now = self.guest.now();
            let (version, seen) = self.guest.look(|pixels| {
                let found = anchor.matches(pixels);
                if found.is_match() {
                    return found;
                }
                moving.watch(pixels, now);
                // Not while a program may still be at it.
                let settled = now >= from + self.options.anchor_rest;
                let still = settled.then(|| moving.compare(pixels)).flatten();
                still.filter(Match::is_match).unwrap_or(found)
            });
            looks += 1;
            // No whole picture is no picture of the anchor's region.
            let tiles = anchor.compared();
            let found = seen.unwrap_or(Match {
                tiles,
                differing: tiles.max(1),
                spread: (9, 9),
            });
            if found.is_match() || now >= limit || (rest.sample(&self.guest)? && now >= from) {
                return Ok((found, looks));
            }
            // A change, or the time to see whether the guest is at rest.
            let next = (now + SAMPLE).min(limit);
            if let Ok(changed) =
                timeout_at(self.guest.host_time(next), self.guest.changed(version)).await
            {
                changed?;
            }
        }
    }

    pub(crate) async fn idle(&mut self, until: GuestTime, limit: Duration) {
        if self.report.diverged.is_some() {
            return;
        }
        let (recorded, real) = self.last;
        let wanted = match self.options.pace {
            Pace::Follow(_) => self.in_time(until),
            _ => real + between(recorded, until),
        };
        self.guest.until(wanted.min(self.guest.now() + limit)).await;
        // Also where the limit cut it short: that much of the recorded time is over.
        self.last = (recorded.max(until), self.guest.now().min(wanted));
        self.pace = self.last;
    }

    pub(crate) async fn settle(&mut self) -> Result<ReplayReport, Error> {
        let limit = self.guest.now() + self.options.rest.limit;
        let mut rest = Stillness::new(self.options.rest.window, self.options.rest.busy);
        loop {
            self.report.came_to_rest = rest.sample(&self.guest)?;
            if self.report.came_to_rest || self.guest.now() >= limit {
                return Ok(self.report());
            }
            self.sleep_until((self.guest.now() + SAMPLE).min(limit))
                .await;
        }
    }
}

/// Whether an interaction only moves the pointer to where the next one begins, which has an
/// anchor.
fn leads(records: &[Record], act: &Interaction, next: &Interaction) -> bool {
    let moves = |record: &Record| matches!(record.event, Event::Pointer { .. });
    next.anchor.is_some()
        && between(act.end, next.start) < Interaction::PAUSE
        && records
            .get(act.records.clone())
            .is_some_and(|records| records.iter().all(moves))
}

/// The event that ends what this one began.
fn released(event: &Event) -> Event {
    match *event {
        Event::Key { code, .. } => Event::Key { code, down: false },
        Event::Button { code, .. } => Event::Button { code, down: false },
        ref other => other.clone(),
    }
}

/// From one recorded time to another; zero where a clock went backwards.
fn between(from: GuestTime, to: GuestTime) -> Duration {
    Duration::from_micros(to.micros.saturating_sub(from.micros))
}
