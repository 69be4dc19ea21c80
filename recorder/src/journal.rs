//! The one place where what went to QEMU becomes a log.
//!
//! Promises: a record exists only for what QEMU's socket took; records have the order in which
//! it took them, over all viewers, because writing and logging happen under one lock; their
//! times never go back. Nothing here waits: a socket that is full is waited for outside.

use std::collections::BTreeSet;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use thiserror::Error;
use tokio::net::unix::OwnedWriteHalf;
use traces::{Anchor, Event, GuestTime, Pixels, Record};
use vm_host::screen::Observer;

use crate::anchors::{self, AnchorPlan, Load, Restless};
use crate::codec::Framed;
use crate::events::{Devices, ViewerInput};
use crate::messages::ClientMessage;
use crate::stats::Statistics;

/// Says how long the guest has run, and whether it does.
pub trait Clock: Send + Sync + 'static {
    /// Guest time; stands still while the guest is paused.
    fn now(&self) -> GuestTime;

    /// Makes [`Self::now`] as exact as can be, where that takes asking somebody.
    fn look(&self) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        Box::pin(std::future::ready(()))
    }

    /// After each key QEMU hands the guest no other for so long.
    fn key_delay(&self) -> Duration {
        KEY_DELAY
    }

    /// QEMU drops input for a guest that doesn't run, so such input isn't logged either.
    fn is_running(&self) -> bool {
        true
    }

    /// Time that the guest's processors have used, where that is known: a guest that is at work
    /// has not shown yet what the last input brings about.
    fn processor_time(&self) -> Option<Duration> {
        None
    }
}

impl<F: Fn() -> GuestTime + Send + Sync + 'static> Clock for F {
    fn now(&self) -> GuestTime {
        self()
    }
}

impl Clock for vm_host::GuestClock {
    fn now(&self) -> GuestTime {
        // Half a million years of microseconds fit.
        GuestTime {
            micros: vm_host::GuestClock::now(self).as_micros() as u64,
        }
    }

    fn is_running(&self) -> bool {
        vm_host::GuestClock::is_running(self)
    }

    fn look(&self) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        Box::pin(vm_host::GuestClock::look(self))
    }

    fn key_delay(&self) -> Duration {
        vm_host::GuestClock::key_delay(self)
    }
}

impl Clock for Arc<vm_host::GuestClock> {
    fn now(&self) -> GuestTime {
        Clock::now(self.as_ref())
    }

    fn is_running(&self) -> bool {
        vm_host::GuestClock::is_running(self)
    }

    fn look(&self) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        Clock::look(self.as_ref())
    }

    fn key_delay(&self) -> Duration {
        Clock::key_delay(self.as_ref())
    }
}

/// Nobody takes records any more.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("the log is closed; nothing is recorded any more")]
pub struct SinkClosed;

/// Where records go, in order.
///
/// Called with a lock held that every viewer's input passes through: hand over, don't wait.
pub trait RecordSink: Send + 'static {
    /// Takes the next record.
    fn record(&mut self, record: Record) -> Result<(), SinkClosed>;

    /// Everything taken so far should become durable now.
    fn flush(&mut self) -> Result<(), SinkClosed> {
        Ok(())
    }
}

impl RecordSink for tokio::sync::mpsc::UnboundedSender<Record> {
    fn record(&mut self, record: Record) -> Result<(), SinkClosed> {
        self.send(record).map_err(|_| SinkClosed)
    }
}

/// For a sink that never closes.
impl<F: FnMut(Record) + Send + 'static> RecordSink for F {
    fn record(&mut self, record: Record) -> Result<(), SinkClosed> {
        self(record);
        Ok(())
    }
}

impl RecordSink for std::sync::mpsc::Sender<Record> {
    fn record(&mut self, record: Record) -> Result<(), SinkClosed> {
        self.send(record).map_err(|_| SinkClosed)
    }
}

pub(crate) struct Journal {
    clock: Arc<dyn Clock>,
    inner: Mutex<Inner>,
    viewers: AtomicUsize,
    observer: Arc<Observer>,
    restless: Restless,
}

struct Inner {
    devices: Devices,
    plan: AnchorPlan,
    load: Load,
    sink: Box<dyn RecordSink>,
    clock: Arc<dyn Clock>,
    last: GuestTime,
    /// QEMU hands the guest no key before this.
    next_key: GuestTime,
    paused: bool,
    closed: bool,
    /// Keys and buttons that the log says are down, and that the guest therefore holds down.
    logged_down: BTreeSet<u16>,
    /// The same, when recording was paused.
    held_at_pause: BTreeSet<u16>,
    stats: Statistics,
    scratch: Vec<Event>,
}

impl Journal {
    pub(crate) fn new(
        observer: Arc<Observer>,
        sink: Box<dyn RecordSink>,
        clock: Arc<dyn Clock>,
    ) -> Self {
        let inner = Inner {
            devices: Devices::default(),
            plan: AnchorPlan::default(),
            load: Load::default(),
            sink,
            clock: Arc::clone(&clock),
            last: GuestTime::default(),
            next_key: GuestTime::default(),
            paused: false,
            closed: false,
            logged_down: BTreeSet::new(),
            held_at_pause: BTreeSet::new(),
            stats: Statistics::default(),
            scratch: Vec::new(),
        };
        Self {
            clock,
            inner: Mutex::new(inner),
            viewers: AtomicUsize::new(0),
            observer,
            restless: Restless::new(),
        }
    }

    /// Each critical section leaves its invariants intact before anything that could panic.
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Before input: when it comes is to be known exactly.
    pub(crate) async fn look_at_clock(&self) {
        self.clock.look().await;
    }

    /// Hands an input message to QEMU and logs it; returns how many of its bytes QEMU's socket
    /// took. Fails with `WouldBlock`, and logs nothing, if it took none.
    pub(crate) fn forward(
        &self,
        viewer: &mut ViewerInput,
        framed: &Framed,
        read_at: Instant,
        qemu: &OwnedWriteHalf,
    ) -> io::Result<usize> {
        let mut inner = self.lock();
        let written = qemu.try_write(&framed.bytes)?;
        inner.stats.latency.add(read_at.elapsed());
        inner.stats.forwarded += 1;
        let mut events = std::mem::take(&mut inner.scratch);
        inner.devices.apply(viewer, &framed.message, &mut events);
        if events
            .iter()
            .any(|event| locks(event, &inner.devices.down()))
        {
            inner.stats.locks += 1;
        }
        let lifted = releases(&inner.devices.take_lifted());
        if !lifted.is_empty() && written == framed.bytes.len() {
            // A few dozen bytes that a socket which just took some has room for.
            let _ = qemu.try_write(&lifted);
        }
        // Captured now, the screen is still the one from before: the guest needs milliseconds
        // to react, and QEMU more to show it.
        let anchor = self.anchor(&mut inner, &events);
        inner.log(anchor, &mut events);
        inner.scratch = events;
        Ok(written)
    }

    /// Takes note of a message that is no input and has been forwarded.
    pub(crate) fn note(&self, viewer: &mut ViewerInput, message: &ClientMessage) {
        let mut none = Vec::new();
        self.lock().devices.apply(viewer, message, &mut none);
    }

    /// A viewer leaves. QEMU releases all keys then, but only when it next looks; telling it
    /// which makes the time certain. A button that was held would stay pressed for ever.
    pub(crate) fn leave(&self, mut viewer: ViewerInput, qemu: Option<&OwnedWriteHalf>) {
        let mut inner = self.lock();
        let mut events = std::mem::take(&mut inner.scratch);
        let drag = viewer.dragging_at();
        let mut farewell = releases(&inner.devices.held_qnums());
        let buttons = drag.map(|(x, y)| ClientMessage::Pointer { x, y, buttons: 0 });
        farewell.extend(
            buttons
                .and_then(Framed::input)
                .into_iter()
                .flat_map(|f| f.bytes),
        );
        // If QEMU has gone there is nothing left to release.
        let told = qemu.is_some_and(|q| q.try_write(&farewell).is_ok_and(|n| n == farewell.len()));
        if let Some((x, y)) = drag.filter(|_| told) {
            let released = ClientMessage::Pointer { x, y, buttons: 0 };
            inner.devices.apply(&mut viewer, &released, &mut events);
        }
        inner.devices.leave(&mut events);
        inner.log(None, &mut events);
        inner.scratch = events;
    }

    fn anchor(&self, inner: &mut Inner, events: &[Event]) -> Option<Anchor> {
        let now = Instant::now();
        let answer = (!events.is_empty())
            .then(|| self.restless.disturbed(now))
            .flatten();
        if inner.is_silent() {
            return None;
        }
        let pointer = inner.devices.pointer();
        let at_work = inner.load.at_work(now, inner.clock.processor_time());
        let aim = inner.plan.aim(events, pointer, answer, at_work, now);
        // Waiting for the screen in replay would make a held key repeat.
        let aim = aim.filter(|_| inner.logged_down.iter().all(|c| MODIFIERS.contains(c)))?;
        self.capture(aim)
    }

    fn capture(&self, aim: (u16, u16)) -> Option<Anchor> {
        let restless = self.restless.regions();
        self.observer.with_frame(|frame| {
            let pixels = Pixels {
                width: frame.width,
                height: frame.height,
                rgb: frame.rgb,
            };
            let whole = frame.whole.then_some(pixels)?;
            anchors::capture(&whole, aim, &restless)
        })
    }

    /// Looks what the guest's processors have used.
    pub(crate) fn note_load(&self) {
        let mut inner = self.lock();
        let used = inner.clock.processor_time();
        inner.load.note(Instant::now(), used);
    }

    /// What changes on the screen without input.
    pub(crate) fn restless(&self) -> &Restless {
        &self.restless
    }

    /// Columns and rows of the screen, in pixels.
    pub(crate) fn screen_size(&self) -> (u16, u16) {
        self.observer.with_frame(|f| (f.width, f.height))
    }

    /// The screen's size, as the observer sees it, goes before what happens on it.
    pub(crate) fn note_screen(&self) {
        let (width, height) = self.screen_size();
        let mut inner = self.lock();
        let mut events = Vec::new();
        inner.devices.set_screen(width, height, &mut events);
        inner.log(None, &mut events);
    }

    pub(crate) fn pause(&self) {
        let mut inner = self.lock();
        if !inner.paused {
            inner.put(Event::Gap);
            inner.paused = true;
            // For the log, a gap releases everything.
            inner.held_at_pause = std::mem::take(&mut inner.logged_down);
        }
    }

    pub(crate) fn resume(&self) {
        let mut inner = self.lock();
        if !inner.paused {
            return;
        }
        inner.paused = false;
        // What has been held all the time, and where the pointer has gone.
        let down = inner.devices.down();
        let held = std::mem::take(&mut inner.held_at_pause);
        let mut events: Vec<Event> = held.intersection(&down).map(|c| edge(*c, true)).collect();
        events.extend(
            inner
                .devices
                .pointer()
                .map(|(x, y)| Event::Pointer { x, y }),
        );
        inner.log(None, &mut events);
    }

    pub(crate) fn flush(&self) -> Result<(), SinkClosed> {
        let mut inner = self.lock();
        if inner.closed {
            Err(SinkClosed)
        } else {
            inner.sink.flush()
        }
    }

    pub(crate) fn check_sink(&self) -> Result<(), SinkClosed> {
        if self.lock().closed {
            Err(SinkClosed)
        } else {
            Ok(())
        }
    }

    pub(crate) fn statistics(&self) -> Statistics {
        Statistics {
            viewers: self.viewers.load(Ordering::Relaxed),
            ..self.lock().stats.clone()
        }
    }

    pub(crate) fn count_refused(&self) {
        self.lock().stats.refused += 1;
    }

    pub(crate) fn count_admitted(&self) {
        self.lock().stats.admitted += 1;
    }

    /// Counts a connection as long as the guard lives, unless there are `limit` already.
    pub(crate) fn seat(self: &Arc<Self>, limit: usize) -> Option<Seat> {
        let free = |taken: usize| (taken < limit).then_some(taken + 1);
        self.viewers
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, free)
            .ok()?;
        Some(Seat(Arc::clone(self)))
    }
}

/// Messages that release keys, by qnum.
fn releases(qnums: &[u8]) -> Vec<u8> {
    let release = |&qnum: &u8| ClientMessage::ExtendedKey {
        keysym: 0,
        qnum: qnum.into(),
        down: false,
    };
    let framed = qnums.iter().map(release).filter_map(Framed::input);
    framed.flat_map(|f| f.bytes).collect()
}

/// A place among the viewers.
pub(crate) struct Seat(Arc<Journal>);

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.viewers.fetch_sub(1, Ordering::Relaxed);
    }
}

/// QEMU's VNC server lets this much time pass between two keys (`key-delay-ms`, its default).
const KEY_DELAY: Duration = vm_host::KEY_DELAY;
/// Keys and buttons share Linux's numbering; buttons begin at `BTN_MISC`.
const FIRST_BUTTON: u16 = 0x100;

/// Shift, Ctrl, Alt, AltGr and the logo keys, which do nothing by being held.
const MODIFIERS: [u16; 8] = [29, 42, 54, 56, 97, 100, 125, 126];

/// Whether this is what a desktop is locked by, with those keys held. In Linux's numbering.
fn locks(event: &Event, held: &BTreeSet<u16>) -> bool {
    const L: u16 = 38;
    const SCREEN_LOCK: u16 = 152;
    let any = |keys: [u16; 2]| keys.iter().any(|key| held.contains(key));
    let (ctrl, alt, logo) = (any([29, 97]), any([56, 100]), any([125, 126]));
    match *event {
        Event::Key {
            code: L,
            down: true,
        } => logo || ctrl && alt,
        Event::Key { code, down } => down && code == SCREEN_LOCK,
        _ => false,
    }
}

fn edge(code: u16, down: bool) -> Event {
    if code >= FIRST_BUTTON {
        Event::Button { code, down }
    } else {
        Event::Key { code, down }
    }
}

impl Inner {
    /// Whether input isn't logged at the moment.
    fn is_silent(&self) -> bool {
        self.closed || self.paused || !self.clock.is_running()
    }

    /// Logs and empties `events`.
    fn log(&mut self, anchor: Option<Anchor>, events: &mut Vec<Event>) {
        if let Some(anchor) = anchor {
            self.stats.anchors += 1;
            self.put(Event::Anchor(anchor));
        }
        for event in events.drain(..) {
            self.put(event);
        }
    }

    fn put(&mut self, event: Event) {
        let is_input = !matches!(event, Event::Screen { .. } | Event::Gap);
        let skipped = if is_input {
            self.is_silent()
        } else {
            self.closed
        };
        if skipped {
            return;
        }
        if let Event::Key { code, down } | Event::Button { code, down } = event {
            let changed = if down {
                self.logged_down.insert(code)
            } else {
                self.logged_down.remove(&code)
            };
            if !changed {
                // Pressed while recording or the guest was paused, or held on two devices.
                return;
            }
        }
        let mut now = self.clock.now();
        if matches!(event, Event::Key { .. }) {
            now = now.max(self.next_key);
            self.next_key.micros = now.micros + self.clock.key_delay().as_micros() as u64;
        }
        self.last = self.last.max(now);
        self.stats.records += 1;
        if self
            .sink
            .record(Record {
                at: self.last,
                event,
            })
            .is_err()
        {
            self.closed = true;
            tracing::error!(
                "nobody takes the recorder's events any more: input goes on unrecorded"
            );
        }
    }
}
