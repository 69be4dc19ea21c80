//! The schedule: when each event is due, and what puts it off.
//!
//! Recorded times become real ones one interaction at a time. The pause before an interaction
//! is counted from when the one before it really ended, so that a late one puts off all that
//! follow; within it, each event is due as long after its first as it was recorded.

use std::time::Duration;

use tokio::time::{Instant, sleep_until, timeout_at};
use traces::{Anchor, Event, GuestTime, Interaction, Match, Record, interactions};

use crate::guest::Guest;
use crate::rest::{SAMPLE, Stillness};
use crate::{Error, Miss, Options, Progress, ReplayReport};

/// Events due within this of each other go to QEMU together: its clock for input is no finer.
const TOGETHER: Duration = Duration::from_millis(1);

/// Plays a log piece by piece.
pub(crate) struct Player<G> {
    guest: G,
    options: Options,
    begun: Instant,
    /// The recorded time of the last record, and when that was in reality.
    last: (GuestTime, Instant),
    /// Keys and buttons that are down in the guest.
    held: Vec<Event>,
    report: ReplayReport,
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
        for act in &acts {
            progress(&now);
            self.act(records, act).await?;
            now.interactions += 1;
            now.played = between(from, self.last.0);
            now.missed = self.report.missed.len();
        }
        progress(&now);
        Ok(())
    }

    async fn act(&mut self, records: &[Record], act: &Interaction) -> Result<(), Error> {
        let (recorded, real) = self.last;
        let thought = between(recorded, act.start);
        // What is held repeats or drags meanwhile: that is no thinking.
        let speed = if self.held.is_empty() {
            self.options.speed
        } else {
            1.0
        };
        sleep_until(real + thought.div_f64(speed)).await;
        let anchor = act
            .anchor
            .and_then(|index| match &records.get(index)?.event {
                Event::Anchor(anchor) => Some(anchor),
                _ => None,
            });
        if let Some(anchor) = anchor {
            self.await_anchor(anchor, act.start).await?;
        }
        // Where it was late or a timer overslept, what follows moves as a whole.
        let start = Instant::now();
        let due = |record: &Record| start + between(act.start, record.at);
        let mut left = records.get(act.records.clone()).unwrap_or(&[]);
        while let Some(first) = left.first() {
            sleep_until(due(first)).await;
            let soon = (Instant::now() + TOGETHER).max(due(first));
            let count = left.iter().take_while(|record| due(record) <= soon).count();
            let (batch, rest) = left.split_at(count.max(1));
            self.inject(batch).await?;
            left = rest;
        }
        self.last = (act.end.max(recorded), start + between(act.start, act.end));
        self.report.interactions += 1;
        Ok(())
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
        let found = self.wait(anchor, due + self.options.anchor_limit).await?;
        let waited = due.elapsed();
        self.report.waited += waited;
        if found.is_match() {
            self.report.matched += 1;
        } else {
            let Match {
                tiles, differing, ..
            } = found;
            let miss = Miss {
                at,
                region: anchor.region,
                tiles,
                differing,
                waited,
            };
            tracing::debug!(?miss, "the screen does not show what it showed");
            self.report.missed.push(miss);
        }
        Ok(())
    }

    async fn wait(&self, anchor: &Anchor, limit: Instant) -> Result<Match, Error> {
        let mut rest = Stillness::new(self.options.anchor_rest, self.options.rest.busy);
        loop {
            let (version, seen) = self.guest.look(|pixels| anchor.matches(pixels));
            // No whole picture is no picture of the anchor's region.
            let tiles = anchor.tiles.len();
            let found = seen.unwrap_or(Match {
                tiles,
                differing: tiles.max(1),
                spread: (9, 9),
            });
            if found.is_match() || Instant::now() >= limit || rest.sample(&self.guest)? {
                return Ok(found);
            }
            // A change, or the time to see whether the guest is at rest.
            let next = (Instant::now() + SAMPLE).min(limit);
            if let Ok(changed) = timeout_at(next, self.guest.changed(version)).await {
                changed?;
            }
        }
    }

    pub(crate) async fn idle(&mut self, until: GuestTime, limit: Duration) {
        let (recorded, real) = self.last;
        let wanted = real + between(recorded, until);
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
