//! When to note what the screen shows, and of which part of it.
//!
//! A replayed guest is a little faster or slower than the recorded one, so the replayer has to
//! know what the user was looking at when they began to click or type. An anchor is worth its
//! bytes where an interaction begins, at the place it is aimed at: around the pointer when a
//! button goes down or a wheel turns; when typing starts, where the screen changed last since the
//! input before, which is what the user waited for, or else around the last click. Mere movement
//! gets none: what it leads to does; nor does typing while the guest is still at work. Tiles that change by themselves are left out of it.

mod load;
mod restless;

use std::time::{Duration, Instant};

use traces::{Anchor, Event, Pixels, Region};

pub(crate) use load::{LOOK, Load};
pub(crate) use restless::Restless;

/// Without input for this long, what comes next is a new interaction.
const PAUSE: Duration = Duration::from_millis(400);
/// Typing and scrolling get no more than one anchor in this time.
const SPACING: Duration = Duration::from_secs(2);
/// A button pressed somewhere else is worth one more often.
const PRESS_SPACING: Duration = Duration::from_secs(1);
/// Size of the region, in pixels: a button or a few words of text, and what is next to them.
const WIDTH: u16 = 96;
const HEIGHT: u16 = 64;

/// Decides which events an anchor goes with.
#[derive(Default)]
pub(crate) struct AnchorPlan {
    last_input: Option<Instant>,
    last_anchor: Option<Instant>,
    moved: bool,
    focus: Option<(u16, u16)>,
}

/// What kind of beginning an event is.
enum Beginning {
    Press,
    Wheel,
    Key,
}

impl AnchorPlan {
    /// The point that the interaction beginning with `events` is aimed at, if one does begin.
    ///
    /// `pointer` is where the pointer is after them, `answer` where the screen changed last;
    /// `at_work` whether the guest still is, so that whoever types does not wait for it.
    pub(crate) fn aim(
        &mut self,
        events: &[Event],
        pointer: Option<(u16, u16)>,
        answer: Option<(u16, u16)>,
        at_work: bool,
        now: Instant,
    ) -> Option<(u16, u16)> {
        if events.is_empty() {
            return None;
        }
        let elapsed = |since: Option<Instant>| since.map(|s| now.saturating_duration_since(s));
        let rested = elapsed(self.last_input).is_none_or(|d| d >= PAUSE);
        let since_anchor = elapsed(self.last_anchor);
        self.last_input = Some(now);
        self.moved |= events.iter().any(|e| matches!(e, Event::Pointer { .. }));

        let (aim, spacing) = match beginning(events)? {
            Beginning::Press => {
                self.focus = pointer;
                let elsewhere = std::mem::take(&mut self.moved);
                (pointer.filter(|_| rested || elsewhere)?, PRESS_SPACING)
            }
            Beginning::Wheel => (pointer.filter(|_| rested || self.moved)?, SPACING),
            Beginning::Key => {
                let aim = answer.or(self.focus).or(pointer);
                (aim.filter(|_| rested && !at_work)?, SPACING)
            }
        };
        if since_anchor.is_some_and(|d| d < spacing) {
            return None;
        }
        self.last_anchor = Some(now);
        Some(aim)
    }
}

fn beginning(events: &[Event]) -> Option<Beginning> {
    events.iter().find_map(|event| match event {
        Event::Button { down: true, .. } => Some(Beginning::Press),
        Event::Wheel { .. } => Some(Beginning::Wheel),
        Event::Key { down: true, .. } => Some(Beginning::Key),
        _ => None,
    })
}

/// What the screen shows around a point, but for what changes by itself. None where so much does
/// that hardly a quarter would be compared: that would match anything.
pub(crate) fn capture(
    frame: &Pixels<'_>,
    point: (u16, u16),
    restless: &[Region],
) -> Option<Anchor> {
    let region = region_around(point, (frame.width, frame.height));
    let anchor = Anchor::capture_except(frame, region, |tile| {
        restless.iter().any(|other| restless::overlap(tile, *other))
    });
    (anchor.compared() * 4 >= anchor.tiles.len()).then_some(anchor)
}

/// The region around a point, moved rather than cut at the edges of the screen.
///
/// It begins on the grid of tiles of the whole screen, unless that would leave out the point, so
/// that a restless tile of that is one of the anchor's, too, and not up to four.
pub(crate) fn region_around(point: (u16, u16), screen: (u16, u16)) -> Region {
    let span = |at: u16, size: u16, limit: u16| {
        let size = size.min(limit);
        let from = at.saturating_sub(size / 2).min(limit - size);
        let on_grid = from - from % Anchor::TILE;
        let from = if at - on_grid < size { on_grid } else { from };
        (from, size)
    };
    let (x, width) = span(point.0, WIDTH, screen.0);
    let (y, height) = span(point.1, HEIGHT, screen.1);
    Region {
        x,
        y,
        width,
        height,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PRESS: Event = Event::Button {
        code: 0x110,
        down: true,
    };
    const KEY: Event = Event::Key {
        code: 30,
        down: true,
    };
    const MOVE: Event = Event::Pointer { x: 1, y: 1 };

    fn aims(script: &[(u64, &[Event], (u16, u16))]) -> Vec<Option<(u16, u16)>> {
        let (mut plan, start) = (AnchorPlan::default(), Instant::now());
        let at = |ms| start + Duration::from_millis(ms);
        script
            .iter()
            .map(|(ms, events, p)| plan.aim(events, Some(*p), None, false, at(*ms)))
            .collect()
    }

    #[test]
    fn a_press_after_movement_is_a_beginning_and_a_double_click_is_none() {
        let seen = aims(&[
            (0, &[MOVE], (9, 9)),
            (50, &[PRESS], (9, 9)),
            (150, &[PRESS], (9, 9)),
            (1100, &[MOVE, PRESS], (20, 9)),
            (1200, &[MOVE, PRESS], (30, 9)),
        ]);
        assert_eq!(seen, [None, Some((9, 9)), None, Some((20, 9)), None]);
    }

    #[test]
    fn typing_is_anchored_where_the_last_click_was_after_a_pause() {
        let seen = aims(&[
            (0, &[PRESS], (5, 5)),
            (2100, &[MOVE], (80, 80)),
            (2600, &[KEY], (80, 80)),
            (2700, &[KEY], (80, 80)),
            (3200, &[KEY], (80, 80)),
            (5000, &[KEY], (80, 80)),
            (5100, &[], (80, 80)),
        ]);
        let focus = Some((5, 5));
        assert_eq!(seen, [focus, None, focus, None, None, focus, None]);
    }

    #[test]
    fn typing_is_anchored_where_the_screen_answered_and_clicking_where_it_is_aimed() {
        let (mut plan, start) = (AnchorPlan::default(), Instant::now());
        let answer = Some((70, 7));
        assert_eq!(
            plan.aim(&[PRESS], Some((5, 5)), answer, true, start),
            Some((5, 5))
        );
        let later = start + Duration::from_secs(3);
        let mut typed = |at_work, at| plan.aim(&[KEY], Some((5, 5)), answer, at_work, at);
        assert_eq!(typed(false, later), answer);
        // Typed ahead: of what the screen shows in between, nobody waits for anything.
        assert_eq!(typed(true, later + Duration::from_secs(3)), None);
        assert_eq!(typed(false, later + Duration::from_secs(6)), answer);
    }

    #[test]
    fn regions_keep_their_size_at_the_edges() {
        let all = |x, y| region_around((x, y), (640, 480));
        assert_eq!(
            all(0, 479),
            Region {
                x: 0,
                y: 416,
                width: 96,
                height: 64
            }
        );
        assert_eq!(
            all(320, 240),
            Region {
                x: 272,
                y: 208,
                width: 96,
                height: 64
            }
        );
        let edge = region_around((1365, 300), (1366, 768));
        assert_eq!((edge.x, edge.width), (1270, 96));
        let within = all(333, 251);
        assert_eq!((within.x, within.y, within.width), (272, 208, 96));
        assert_eq!(
            region_around((5, 5), (10, 10)),
            Region {
                x: 0,
                y: 0,
                width: 10,
                height: 10
            }
        );
    }
    #[test]
    fn an_anchor_leaves_out_what_is_restless_and_is_none_where_all_is() {
        let rgb = vec![7; 640 * 480 * 3];
        let frame = Pixels {
            width: 640,
            height: 480,
            rgb: &rgb,
        };
        let tile = |x, y, size| Region {
            x,
            y,
            width: size,
            height: size,
        };
        let compared = |restless: &[Region]| {
            capture(&frame, (320, 240), restless).map(|anchor| anchor.compared())
        };
        assert_eq!(compared(&[]), Some(24));
        assert_eq!(compared(&[tile(272, 208, 16), tile(0, 0, 16)]), Some(23));
        assert_eq!(compared(&[tile(0, 0, 640)]), None);
    }
}
