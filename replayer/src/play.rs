//! The schedule: when each event is due, and what puts it off.
//!
//! Recorded times become real ones one interaction at a time. The pause before an interaction
//! is counted from when the one before it really ended, so that a late one puts off all that
//! follow; within it, each event is due as long after its first as it was recorded. A quick pace
//! only ever shortens that pause, and what it took off is given back where an anchor needs it.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep_until, timeout_at};
use traces::{Anchor, Event, GuestTime, Interaction, Match, Record, interactions};

use crate::course::Course;
use crate::guest::Guest;
use crate::moving::Moving;
use crate::rest::{SAMPLE, Stillness};
use crate::{
    Divergence, Error, Miss, MissPictures, Options, Pace, Progress, QuickOptions, ReplayReport,
};

/// Events due within this of each other go to QEMU together: its clock for input is no finer.
const TOGETHER: Duration = Duration::from_millis(1);

/// How often to look whether a typed key has been taken in.
const KEY_SAMPLE: Duration = Duration::from_millis(4);

/// Plays a log piece by piece.
pub(crate) struct Player<G> {
    guest: G,
    options: Options,
    begun: Instant,
    /// The recorded time of the last record, and when that was in reality.
    last: (GuestTime, Instant),
    /// Keys and buttons that are down in the guest.
    held: Vec<Event>,
    /// Think time that the guest was not given since the last anchor that matched.
    ahead: Duration,
    course: Course,
    report: ReplayReport,
}

/// The pause before an interaction.
struct Pause<'a> {
    /// How long it was.
    thought: Duration,
    /// When it ended, as recorded.
    until: GuestTime,
    /// What the screen showed at its end.
    anchor: Option<&'a Anchor>,
    /// Whether the screen is looked at before anything comes of the interaction: it only moves
    /// the pointer to where another begins, which has an anchor.
    leads: bool,
}

impl<G: Guest> Player<G> {
    pub(crate) fn new(guest: G, options: &Options) -> Result<Self, Error> {
        options.check()?;
        let begun = Instant::now();
        Ok(Self {
            guest,
            begun,
            last: (options.start, begun),
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
        self.think(&pause).await?;
        if let Some(anchor) = pause.anchor {
            self.await_anchor(anchor, act.start).await?;
        }
        if self.report.diverged.is_some() {
            self.release().await?;
            return Ok(false);
        }
        // Where it was late or a timer overslept, what follows moves as a whole.
        let start = Instant::now();
        let late = start.saturating_duration_since(self.in_time(act.start));
        tracing::debug!(at = act.start.micros, ?late, "an interaction begins");
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
            sleep_until(due(first, sooner)).await;
            let soon = (Instant::now() + TOGETHER).max(due(first, sooner));
            let now = |record: &&Record| due(record, sooner) <= soon;
            let count = left.iter().take_while(now).count();
            let (batch, rest) = left.split_at(count.max(1));
            self.inject(batch).await?;
            before = batch.last();
            left = rest;
        }
        let acted = between(act.start, act.end).saturating_sub(sooner);
        self.last = (act.end.max(recorded), start + acted);
        self.ahead += sooner;
        self.report.saved += sooner;
        self.report.interactions += 1;
        Ok(true)
    }

    /// Lets the guest have its time.
    async fn think(&mut self, pause: &Pause<'_>) -> Result<(), Error> {
        let (_, real) = self.last;
        // What is held repeats or drags meanwhile: that is no thinking.
        if !self.held.is_empty() {
            sleep_until(real + pause.thought).await;
            return Ok(());
        }
        let due = real + pause.thought.div_f64(self.options.speed);
        match &self.options.pace {
            Pace::Recorded => sleep_until(due).await,
            Pace::Quick(quick) => self.think_quickly(pause, quick, real, due).await?,
            Pace::Follow(quick) => {
                let in_time = self.in_time(pause.until);
                if in_time + quick.late < due {
                    self.think_quickly(pause, quick, in_time, due).await?;
                } else {
                    sleep_until(due).await;
                }
            }
        }
        // A guest that was late has had more time than it needed, which is no credit.
        let saved = (real + pause.thought).saturating_duration_since(Instant::now().max(real));
        self.ahead += saved;
        self.report.saved += saved;
        Ok(())
    }

    /// At a quick pace, does not wait out the time between one typed key and the next: only until
    /// the guest has taken in the one before. How much sooner than due that is.
    ///
    /// Between keys that make text, and no others: Enter acts on what was typed, and a dialog
    /// that checks a name in a timer of its own is idle before it has. What Enter began may just
    /// as well wait, for a disk or a timer, when the next letter comes.
    async fn type_on(
        &self,
        before: &Record,
        next: &Record,
        due: Instant,
    ) -> Result<Duration, Error> {
        let typed = matches!(before.event, Event::Key { down: false, code } if types(code))
            && matches!(next.event, Event::Key { down: true, code } if types(code))
            // A key that is held repeats, or means another one.
            && self.held.is_empty();
        let Pace::Quick(quick) = &self.options.pace else {
            return Ok(Duration::ZERO);
        };
        if !typed {
            return Ok(Duration::ZERO);
        }
        let gap = between(before.at, next.at);
        let bound = quick.at_most.map(|bound| gap.div_f64(bound));
        let earliest = Instant::now() + quick.key_gap.max(bound.unwrap_or_default());
        let mut rest = Stillness::new(quick.key_gap, self.options.rest.busy);
        loop {
            rest.sample_processors(&self.guest)?;
            let now = Instant::now();
            if now >= due || (now >= earliest && rest.idle(quick.key_gap)) {
                return Ok(due.saturating_duration_since(now));
            }
            sleep_until((now + KEY_SAMPLE).min(due)).await;
        }
    }

    /// When a recorded time comes, in a replay that was never late.
    fn in_time(&self, at: GuestTime) -> Instant {
        self.begun + between(self.options.start, at).div_f64(self.options.speed)
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
            sleep_until(due).await;
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
            let now = Instant::now();
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
            sleep_until((now + SAMPLE).min(due)).await;
        }
    }

    fn shows(&self, anchor: &Anchor) -> bool {
        let (_, seen) = self.guest.look(|pixels| anchor.matches(pixels).is_match());
        seen == Some(true)
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
    async fn await_anchor(&mut self, anchor: &Anchor, at: GuestTime) -> Result<(), Error> {
        let due = Instant::now();
        let (found, looks) = self.wait(anchor, due + self.ahead).await?;
        let waited = due.elapsed();
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
            let now = Instant::now();
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
            if let Ok(changed) = timeout_at(next, self.guest.changed(version)).await {
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
        sleep_until(wanted.min(Instant::now() + limit)).await;
        // Also where the limit cut it short: that much of the recorded time is over.
        self.last = (recorded.max(until), Instant::now().min(wanted));
    }

    pub(crate) async fn settle(&mut self) -> Result<ReplayReport, Error> {
        let limit = Instant::now() + self.options.rest.limit;
        let mut rest = Stillness::new(self.options.rest.window, self.options.rest.busy);
        loop {
            self.report.came_to_rest = rest.sample(&self.guest)?;
            if self.report.came_to_rest || Instant::now() >= limit {
                return Ok(self.report());
            }
            sleep_until((Instant::now() + SAMPLE).min(limit)).await;
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

/// Whether a key is part of writing text: it makes some, or is one of the Shifts.
fn types(code: u16) -> bool {
    const LEFT_SHIFT: u16 = 42;
    const RIGHT_SHIFT: u16 = 54;
    Event::makes_text(code) || matches!(code, LEFT_SHIFT | RIGHT_SHIFT)
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
