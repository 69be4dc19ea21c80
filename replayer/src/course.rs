//! Whether a replay is still on the source's course.
//!
//! One miss says little: a line of text is another, a page was loaded later. Many in a row, or a
//! few in which nearly nothing is as it was, say that what follows goes into other windows than
//! it was meant for, brings no page closer to the source's, and takes seconds of waiting each.

use std::collections::VecDeque;

use traces::Match;

use crate::{DivergenceOptions, Why};

/// The misses since the last anchor that matched.
#[derive(Default)]
pub(crate) struct Course {
    misses: usize,
    /// Tiles compared, and how many of them differed, in the last of them.
    last: VecDeque<(usize, usize)>,
}

impl Course {
    /// Takes note of an anchor; says what shows that the replay has diverged, if it has.
    pub(crate) fn note(&mut self, found: Match, options: &DivergenceOptions) -> Option<Why> {
        if found.is_match() {
            *self = Self::default();
            return None;
        }
        self.misses += 1;
        self.last.push_back((found.tiles, found.differing));
        while self.last.len() > options.anchors {
            self.last.pop_front();
        }
        let tiles: usize = self.last.iter().map(|(tiles, _)| tiles).sum();
        let differing: usize = self.last.iter().map(|(_, differing)| differing).sum();
        let anchors = self.last.len();
        if anchors > 0
            && anchors == options.anchors
            && differing as f64 >= tiles as f64 * options.differing
        {
            return Some(Why::Screen {
                anchors,
                tiles,
                differing,
            });
        }
        let anchors = self.misses;
        (anchors >= options.misses).then_some(Why::Misses { anchors })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(differing: usize) -> Match {
        let spread = if differing == 0 { (0, 0) } else { (6, 4) };
        Match {
            tiles: 24,
            differing,
            spread,
        }
    }

    fn noted(anchors: &[usize]) -> Vec<Option<Why>> {
        let (mut course, options) = (Course::default(), DivergenceOptions::default());
        let notes = anchors.iter().map(|n| course.note(found(*n), &options));
        notes.collect()
    }

    #[test]
    fn a_screen_that_is_another_one_shows_after_four_anchors() {
        let why = Why::Screen {
            anchors: 4,
            tiles: 96,
            differing: 84,
        };
        assert_eq!(noted(&[24, 20, 24, 16]), [None, None, None, Some(why)]);
        // What differed little before does not save it.
        assert_eq!(
            noted(&[3, 24, 20, 24, 16])[3..],
            [Some(why_of(71)), Some(why)]
        );
    }

    fn why_of(differing: usize) -> Why {
        Why::Screen {
            anchors: 4,
            tiles: 96,
            differing,
        }
    }

    #[test]
    fn small_differences_have_to_go_on_for_long() {
        let notes = noted(&[5; 8]);
        assert_eq!(notes[..7], [None; 7]);
        assert_eq!(notes[7], Some(Why::Misses { anchors: 8 }));
    }

    #[test]
    fn a_match_is_back_on_course() {
        assert_eq!(noted(&[24, 24, 24, 0, 24, 24, 24, 0, 24]), [None; 9]);
    }
}
