//! Input taken from the devices of this machine, for a thin client without a viewer.
//!
//! The devices are grabbed, so that nothing else on the machine reacts to what is typed. Each is
//! a viewer that shows nothing: its input goes to QEMU as RFB messages, as everybody's does.
//! Movements of a mouse are added up to a position, because the guest has a tablet: that way the
//! log is of one kind. Source: the kernel's `Documentation/input/event-codes.rst`.
//!
//! Devices are behind [`DeviceSource`], so that all of this runs where there are none.

use std::collections::BTreeSet;
use std::future::Future;
use std::io;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use evdev::{AbsoluteAxisCode, Device, EventStream, EventType};
use thiserror::Error;
use traces::Event;
use vm_host::keys::qnum_from_linux;

use crate::events::BUTTONS;
use crate::messages::ClientMessage;

const EV_SYN: u16 = 0;
const EV_KEY: u16 = 1;
const EV_REL: u16 = 2;
const EV_ABS: u16 = 3;
const SYN_REPORT: u16 = 0;
const SYN_DROPPED: u16 = 3;
const X: u16 = 0;
const Y: u16 = 1;
const REL_HWHEEL: u16 = 6;
const REL_WHEEL: u16 = 8;
const FIRST_BUTTON: u16 = 0x100;
const BTN_LEFT: u16 = 0x110;
const BTN_TASK: u16 = 0x117;
const BTN_TOUCH: u16 = 0x14a;
const FIRST_KEY_AFTER_BUTTONS: u16 = 0x160;
/// Events of one report that are kept; a device that never ends its report can't fill memory.
const REPORT_MAX: usize = 256;

/// One event as the kernel delivers it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct RawEvent {
    /// `EV_*`.
    pub kind: u16,
    /// `KEY_*`, `BTN_*`, `REL_*`, `ABS_*` or `SYN_*`.
    pub code: u16,
    /// Pressed, moved by, moved to.
    pub value: i32,
}

/// Not which key: that is what the user types.
impl std::fmt::Debug for RawEvent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RawEvent")
            .field("kind", &self.kind)
            .finish_non_exhaustive()
    }
}

/// An input device, or what stands for one.
pub trait DeviceSource: Send + 'static {
    /// The next event. An error ends the capture of this device; dropping the future loses
    /// nothing.
    fn next(&mut self) -> impl Future<Output = io::Result<RawEvent>> + Send;

    /// The range of `ABS_X` and of `ABS_Y`, if the device tells positions.
    fn position_range(&self) -> Option<[RangeInclusive<i32>; 2]>;
}

/// Why a device can't be captured.
#[derive(Debug, Error)]
pub enum DeviceError {
    /// No such device, or not ours to open.
    #[error("cannot open input device {}; run as root or join the group that owns it", path.display())]
    Open {
        /// The device file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Somebody else has it.
    #[error("cannot grab input device {}; another program has grabbed it", path.display())]
    Grab {
        /// The device file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// A grabbed device under `/dev/input`; let go of when dropped.
pub struct GrabbedDevice {
    events: EventStream,
    range: Option<[RangeInclusive<i32>; 2]>,
}

impl GrabbedDevice {
    /// Takes a device for ourselves. Must be called within a tokio runtime.
    pub fn open(path: &Path) -> Result<Self, DeviceError> {
        let open = |source| DeviceError::Open {
            path: path.to_owned(),
            source,
        };
        let mut device = Device::open(path).map_err(open)?;
        device.grab().map_err(|source| DeviceError::Grab {
            path: path.to_owned(),
            source,
        })?;
        let range = position_range(&device).map_err(open)?;
        Ok(Self {
            events: device.into_event_stream().map_err(open)?,
            range,
        })
    }
}

/// Keyboards, mice, tablets and touch screens of this machine: what has keys or buttons.
pub fn devices() -> Vec<PathBuf> {
    let usable = |device: &Device| device.supported_events().contains(EventType::KEY);
    evdev::enumerate()
        .filter(|(_, device)| usable(device))
        .map(|(path, _)| path)
        .collect()
}

fn position_range(device: &Device) -> io::Result<Option<[RangeInclusive<i32>; 2]>> {
    let (mut x, mut y) = (None, None);
    for (axis, info) in device.get_absinfo()? {
        let range = Some(info.minimum()..=info.maximum());
        match axis {
            AbsoluteAxisCode::ABS_X => x = range,
            AbsoluteAxisCode::ABS_Y => y = range,
            _ => {}
        }
    }
    Ok(x.zip(y).map(|(x, y)| [x, y]))
}

impl DeviceSource for GrabbedDevice {
    async fn next(&mut self) -> io::Result<RawEvent> {
        let event = self.events.next_event().await?;
        Ok(RawEvent {
            kind: event.event_type().0,
            code: event.code(),
            value: event.value(),
        })
    }

    fn position_range(&self) -> Option<[RangeInclusive<i32>; 2]> {
        self.range.clone()
    }
}

/// Speaks RFB for the devices of this machine, so that their input takes the very way of a
/// viewer's: through QEMU's keyboard state, in the same order, into the same log.
pub(crate) struct LocalViewer {
    reports: Reports,
    buttons: u8,
    pointer: (u16, u16),
}

impl LocalViewer {
    pub(crate) fn new(range: Option<[RangeInclusive<i32>; 2]>) -> Self {
        Self {
            reports: Reports::new(range),
            buttons: 0,
            pointer: (0, 0),
        }
    }

    /// The messages that a device's event leads to, given the size of the screen in pixels.
    pub(crate) fn say(&mut self, event: RawEvent, screen: (u16, u16)) -> Vec<ClientMessage> {
        let mut messages = Vec::new();
        for event in self.reports.push(event, screen).unwrap_or_default() {
            self.translate(&event, &mut messages);
        }
        messages
    }

    fn translate(&mut self, event: &Event, out: &mut Vec<ClientMessage>) {
        match *event {
            Event::Key { code, down } => {
                // No keysym: QEMU leaves the lock keys to a keyboard that has them.
                let key = |qnum| ClientMessage::ExtendedKey {
                    keysym: 0,
                    qnum,
                    down,
                };
                out.extend(qnum_from_linux(code).map(u32::from).map(key));
            }
            Event::Pointer { x, y } => {
                self.pointer = (x, y);
                out.push(self.pointer(self.buttons));
            }
            Event::Button { code, down } => {
                let Some(bit) = BUTTONS.iter().position(|button| *button == code) else {
                    return;
                };
                self.buttons = self.buttons & !(1 << bit) | u8::from(down) << bit;
                out.push(self.pointer(self.buttons));
            }
            Event::Wheel {
                vertical,
                horizontal,
            } => {
                for (clicks, negative, positive) in [(vertical, 4, 3), (horizontal, 5, 6)] {
                    let bit = if clicks < 0 { negative } else { positive };
                    for _ in 0..clicks.unsigned_abs() {
                        out.push(self.pointer(self.buttons | 1 << bit));
                        out.push(self.pointer(self.buttons));
                    }
                }
            }
            _ => {}
        }
    }

    fn pointer(&self, buttons: u8) -> ClientMessage {
        ClientMessage::Pointer {
            x: self.pointer.0,
            y: self.pointer.1,
            buttons,
        }
    }
}

/// Turns a device's raw events into the guest's, report by report.
struct Reports {
    range: Option<[RangeInclusive<i32>; 2]>,
    pending: Vec<RawEvent>,
    /// Until the report ends, what comes is incomplete.
    dropping: bool,
    down: BTreeSet<u16>,
    position: Option<(u16, u16)>,
}

impl Reports {
    fn new(range: Option<[RangeInclusive<i32>; 2]>) -> Self {
        let pending = Vec::new();
        Self {
            range,
            pending,
            dropping: false,
            down: BTreeSet::new(),
            position: None,
        }
    }

    /// The guest's events once a report is complete and says anything.
    fn push(&mut self, event: RawEvent, screen: (u16, u16)) -> Option<Vec<Event>> {
        match (event.kind, event.code) {
            (EV_SYN, SYN_REPORT) => {
                let report = std::mem::take(&mut self.pending);
                let events = if std::mem::take(&mut self.dropping) {
                    // What was lost is unknown, so nothing may stay pressed.
                    self.release_all()
                } else {
                    self.translate(&report, screen)
                };
                return (!events.is_empty()).then_some(events);
            }
            (EV_SYN, SYN_DROPPED) => self.dropping = true,
            _ if self.pending.len() < REPORT_MAX => self.pending.push(event),
            _ => self.dropping = true,
        }
        None
    }

    fn translate(&mut self, report: &[RawEvent], screen: (u16, u16)) -> Vec<Event> {
        let mut events = Vec::new();
        let mut wheel = (0_i32, 0_i32);
        let last = (i32::from(screen.0) - 1, i32::from(screen.1) - 1);
        // A mouse starts in the middle: where the guest shows its pointer is not known.
        let (x0, y0) = self.position.unwrap_or((screen.0 / 2, screen.1 / 2));
        let (mut x, mut y) = (i32::from(x0), i32::from(y0));
        for event in report {
            match (event.kind, event.code) {
                (EV_REL, X) => x = x.saturating_add(event.value).clamp(0, last.0.max(0)),
                (EV_REL, Y) => y = y.saturating_add(event.value).clamp(0, last.1.max(0)),
                (EV_ABS, X) => x = self.scale(0, event.value, last.0).unwrap_or(x),
                (EV_ABS, Y) => y = self.scale(1, event.value, last.1).unwrap_or(y),
                (EV_REL, REL_WHEEL) => wheel.0 = wheel.0.saturating_add(event.value),
                (EV_REL, REL_HWHEEL) => wheel.1 = wheel.1.saturating_add(event.value),
                _ => {}
            }
        }
        // Clamped above to what the screen has.
        let position = (x as u16, y as u16);
        let moved = report
            .iter()
            .any(|e| matches!((e.kind, e.code), (EV_REL | EV_ABS, X | Y)));
        if moved && self.position != Some(position) {
            self.position = Some(position);
            events.push(Event::Pointer {
                x: position.0,
                y: position.1,
            });
        }
        for event in report.iter().filter(|e| e.kind == EV_KEY) {
            self.key(event.code, event.value, &mut events);
        }
        if wheel != (0, 0) {
            let clicks = |n: i32| n.clamp(i8::MIN.into(), i8::MAX.into()) as i8;
            events.push(Event::Wheel {
                vertical: clicks(wheel.0),
                horizontal: clicks(wheel.1),
            });
        }
        events
    }

    fn scale(&self, axis: usize, value: i32, last: i32) -> Option<i32> {
        let range = self.range.as_ref()?.get(axis)?;
        let (from, to) = (i64::from(*range.start()), i64::from(*range.end()));
        if from >= to {
            return None;
        }
        let at = i64::from(value).clamp(from, to) - from;
        // At most `last`, which is an i32.
        Some((at * i64::from(last.max(0)) / (to - from)) as i32)
    }

    fn key(&mut self, code: u16, value: i32, events: &mut Vec<Event>) {
        let code = match code {
            BTN_TOUCH => BTN_LEFT,
            // Joysticks, pens' tools: the guest has no such device.
            FIRST_BUTTON..BTN_LEFT => return,
            code if code > BTN_TASK && code < FIRST_KEY_AFTER_BUTTONS => return,
            code => code,
        };
        // Value 2 is auto-repeat, which the guest does by itself.
        let changed = match value {
            0 => self.down.remove(&code),
            1 => self.down.insert(code),
            _ => false,
        };
        if changed {
            events.push(edge(code, value == 1));
        }
    }

    fn release_all(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.down)
            .into_iter()
            .map(|code| edge(code, false))
            .collect()
    }
}

fn edge(code: u16, down: bool) -> Event {
    if (BTN_LEFT..=BTN_TASK).contains(&code) {
        Event::Button { code, down }
    } else {
        Event::Key { code, down }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SCREEN: (u16, u16) = (1000, 500);
    const SYN: (u16, u16, i32) = (EV_SYN, SYN_REPORT, 0);

    fn run(reports: &mut Reports, raw: &[(u16, u16, i32)]) -> Vec<Event> {
        let push = |&(kind, code, value)| reports.push(RawEvent { kind, code, value }, SCREEN);
        raw.iter().filter_map(push).flatten().collect()
    }

    #[test]
    fn a_mouse_moves_a_position_and_stops_at_the_edges() {
        let mut reports = Reports::new(None);
        let events = run(
            &mut reports,
            &[
                (EV_REL, X, 10),
                (EV_REL, Y, -5),
                SYN,
                (EV_REL, X, i32::MAX),
                SYN,
                (EV_REL, Y, i32::MIN),
                SYN,
                (EV_REL, Y, -1),
                SYN,
            ],
        );
        let at = |x, y| Event::Pointer { x, y };
        assert_eq!(events, [at(510, 245), at(999, 245), at(999, 0)]);
    }

    #[test]
    fn a_tablet_is_scaled_to_the_screen_and_clicks_there() {
        let mut reports = Reports::new(Some([0..=32767, 100..=200]));
        let raw = [
            (EV_KEY, BTN_TOUCH, 1),
            (EV_ABS, X, 32767),
            (EV_ABS, Y, 150),
            SYN,
            (EV_ABS, X, -5),
            SYN,
        ];
        assert_eq!(
            run(&mut reports, &raw),
            [
                Event::Pointer { x: 999, y: 249 },
                Event::Button {
                    code: BTN_LEFT,
                    down: true
                },
                Event::Pointer { x: 0, y: 249 },
            ]
        );
        assert_eq!(
            reports.release_all(),
            [Event::Button {
                code: BTN_LEFT,
                down: false
            }]
        );
    }

    #[test]
    fn auto_repeat_wheels_and_lost_reports() {
        let mut reports = Reports::new(None);
        let raw = [
            (EV_KEY, 30, 1),
            SYN,
            (EV_KEY, 30, 2),
            SYN,
            (EV_REL, REL_WHEEL, -2),
            SYN,
            (EV_SYN, SYN_DROPPED, 0),
            (EV_KEY, 31, 1),
            SYN,
        ];
        assert_eq!(
            run(&mut reports, &raw),
            [
                Event::Key {
                    code: 30,
                    down: true
                },
                Event::Wheel {
                    vertical: -2,
                    horizontal: 0
                },
                Event::Key {
                    code: 30,
                    down: false
                },
            ]
        );
    }

    #[test]
    fn a_report_without_end_does_not_grow() {
        let mut reports = Reports::new(None);
        let endless = vec![(EV_REL, X, 1); 10 * REPORT_MAX];
        assert_eq!(run(&mut reports, &endless), []);
        assert!(reports.pending.len() <= REPORT_MAX);
    }
}
