//! Anchors whose surroundings move by themselves, though the recorder did not know.
//!
//! The recorder leaves out what changes by itself, but it learns that while nobody types or
//! clicks: what began to move a moment before the next click, as the frame around copied cells
//! does, is in the anchor as it was at that moment, and no replay ever shows the same. Here the
//! guest can be watched for as long as the anchor is waited for.

use tokio::time::Instant;
use traces::{Anchor, Match, Pixels, Region, Rhythms};

use crate::rest::SAMPLE;

/// What moves around one anchor.
pub(crate) struct Moving<'a> {
    anchor: &'a Anchor,
    rhythms: Rhythms,
    looked: Option<Instant>,
}

impl<'a> Moving<'a> {
    pub(crate) fn new(anchor: &'a Anchor) -> Self {
        Self {
            anchor,
            rhythms: Rhythms::default(),
            looked: None,
        }
    }

    /// Learns from what is shown now. More often than it is looked for, a window that is being
    /// drawn would have a rhythm.
    pub(crate) fn watch(&mut self, pixels: &Pixels<'_>, now: Instant) {
        if self.looked.is_some_and(|looked| now < looked + SAMPLE) {
            return;
        }
        let region = self.anchor.region;
        if let Some(rgb) = pixels.part(region) {
            self.looked = Some(now);
            let part = Pixels {
                width: region.width,
                height: region.height,
                rgb: &rgb,
            };
            self.rhythms.look(&part, now.into_std());
        }
    }

    /// How what is shown compares where nothing moves, if that is enough to tell: a quarter of
    /// the region, as the recorder asks for.
    pub(crate) fn compare(&self, pixels: &Pixels<'_>) -> Option<Match> {
        let Region { x, y, .. } = self.anchor.region;
        let moving = self.rhythms.restless();
        if moving.is_empty() {
            return None;
        }
        let still = self.anchor.except(|tile| {
            moving
                .iter()
                // Within a region that is on the screen.
                .any(|moves| (moves.x + x, moves.y + y) == (tile.x, tile.y))
        });
        (still.compared() * 4 >= still.tiles.len()).then(|| still.matches(pixels))
    }
}
