//! What a person does to a desktop, as the guest's input devices see it.
//!
//! Codes are Linux input event codes (`linux/input-event-codes.h`), the same numbers that
//! virtio-input carries, so that a log taken at a VNC viewer and one taken from
//! `/dev/input` are of one kind.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Time the guest has run since its base checkpoint; stands still while the VM is paused.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct GuestTime {
    /// Microseconds.
    pub micros: u64,
}

/// One entry of the log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// When it reached the guest.
    pub at: GuestTime,
    /// What reached the guest, or what was seen on its screen.
    pub event: Event,
}

/// What records take in memory, in bytes: for whoever keeps those of others.
pub fn memory_of(records: &[Record]) -> u64 {
    let tiles = |record: &Record| match &record.event {
        Event::Anchor(anchor) => size_of_val(anchor.tiles.as_slice()),
        _ => 0,
    };
    let beside: usize = records.iter().map(tiles).sum();
    (size_of_val(records) + beside) as u64
}

/// An input event, or a note that replay needs.
///
/// `Debug` hides which key it was: logs hold passwords, and a record must be safe to trace.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Event {
    /// A key of the keyboard, as `KEY_*`. Auto-repeat is the guest's own work and not logged.
    Key {
        /// Linux input code.
        code: u16,
        /// Pressed or released.
        down: bool,
    },
    /// The pointer's absolute position, in guest pixels from the top left.
    Pointer {
        /// Column.
        x: u16,
        /// Row.
        y: u16,
    },
    /// A pointer button, as `BTN_*`.
    Button {
        /// Linux input code.
        code: u16,
        /// Pressed or released.
        down: bool,
    },
    /// Wheel clicks; up and right are positive, as `REL_WHEEL` and `REL_HWHEEL` are.
    Wheel {
        /// Vertical clicks.
        vertical: i8,
        /// Horizontal clicks.
        horizontal: i8,
    },
    /// The guest's screen has this size from here on, in pixels.
    Screen {
        /// Columns.
        width: u16,
        /// Rows.
        height: u16,
    },
    /// An interaction begins; this is what its surroundings showed just before.
    Anchor(Anchor),
    /// Recording was paused and goes on: what was typed between is not here.
    Gap,
    /// A stretch was taken out afterwards (`log redact`).
    Redacted,
}

impl Event {
    /// Whether a key may make a character. Named are those that make none on any layout; whatever
    /// is not known to be harmless makes one. (`linux/input-event-codes.h`)
    #[must_use]
    pub fn makes_text(code: u16) -> bool {
        !matches!(
            code,
            1 | 14 | 15 | 28 | 29 | 42 | 54 | 56 | 58 // Esc Backspace Tab Enter Ctrl Shifts Alt Caps
                | 59..=70 // F1 to F10, Num Lock, Scroll Lock
                | 87 | 88 // F11 F12
                | 96 | 97 | 99 | 100 // keypad Enter, right Ctrl, SysRq, right Alt
                | 102..=111 // Home to Delete: the arrows and their neighbours
                | 119 | 125..=127 // Pause, Metas, Menu
        )
    }
}

impl fmt::Debug for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Key { down, .. } => write!(f, "Key {{ code: .., down: {down} }}"),
            Self::Pointer { x, y } => write!(f, "Pointer {{ x: {x}, y: {y} }}"),
            Self::Button { code, down } => write!(f, "Button {{ code: {code}, down: {down} }}"),
            Self::Wheel {
                vertical,
                horizontal,
            } => {
                write!(
                    f,
                    "Wheel {{ vertical: {vertical}, horizontal: {horizontal} }}"
                )
            }
            Self::Screen { width, height } => {
                write!(f, "Screen {{ width: {width}, height: {height} }}")
            }
            Self::Anchor(anchor) => anchor.fmt(f),
            Self::Gap => f.write_str("Gap"),
            Self::Redacted => f.write_str("Redacted"),
        }
    }
}

/// What a region of the screen showed, as small hashes of its tiles.
///
/// Tiles are [`Anchor::TILE`] pixels square and lie on a grid that starts at the region's
/// corner; those at the right and bottom edge may be narrower. Hashes are in row order.
///
/// `Debug` shows no hashes: those of a text field tell somebody who draws the same glyphs what
/// was typed in it.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Anchor {
    /// Where on the screen, in guest pixels.
    pub region: Region,
    /// One truncated BLAKE3 hash a tile, of its RGB bytes.
    pub tiles: Vec<u32>,
}

impl fmt::Debug for Anchor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Anchor {{ region: {:?}, tiles: {} }}",
            self.region,
            self.tiles.len()
        )
    }
}

/// A rectangle in guest pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Region {
    /// Left column.
    pub x: u16,
    /// Top row.
    pub y: u16,
    /// Columns.
    pub width: u16,
    /// Rows.
    pub height: u16,
}
