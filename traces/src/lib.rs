//! The interaction log.

mod event;

pub use event::{Anchor, Event, GuestTime, Record, Region};

impl Anchor {
    /// Edge of a tile, in pixels.
    pub const TILE: u16 = 16;
}
