//! Whether the guest is still at work on what it was given.
//!
//! Who types on before the screen has answered waits for nothing, and what it shows then is a
//! picture between two, that a replay sees only if it is late by as much.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// How often to look.
pub(crate) const LOOK: Duration = Duration::from_millis(50);
/// Over this much of the past, and little more.
const WINDOW: Duration = Duration::from_millis(100);
/// Share of a processor from which on a guest is at work: an idle desktop was measured to use 0.2
/// to 2 % of one under emulation.
const AT_WORK: f64 = 0.1;

/// What the guest's processors used lately.
#[derive(Debug, Default)]
pub(crate) struct Load {
    used: VecDeque<(Instant, Duration)>,
}

impl Load {
    /// Notes what they have used up to now, where that is known.
    pub(crate) fn note(&mut self, now: Instant, used: Option<Duration>) {
        let Some(used) = used else {
            return;
        };
        self.used.push_back((now, used));
        // The last look before the window stays.
        while self
            .used
            .get(1)
            .is_some_and(|(at, _)| now.saturating_duration_since(*at) >= WINDOW)
        {
            self.used.pop_front();
        }
    }

    /// Whether the guest was at work over the window up to now; not, where that is not known.
    pub(crate) fn at_work(&mut self, now: Instant, used: Option<Duration>) -> bool {
        self.note(now, used);
        let (Some((from, before)), Some((to, after))) = (self.used.front(), self.used.back())
        else {
            return false;
        };
        let span = to.saturating_duration_since(*from);
        span >= WINDOW && after.saturating_sub(*before).as_secs_f64() > span.as_secs_f64() * AT_WORK
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Looks every 50 ms at a guest that has used so many milliseconds by then.
    fn watched(used: &[u64]) -> bool {
        let (mut load, begun) = (Load::default(), Instant::now());
        let mut at_work = false;
        for (look, used) in (0..).zip(used) {
            at_work = load.at_work(begun + LOOK * look, Some(Duration::from_millis(*used)));
        }
        at_work
    }

    #[test]
    fn a_guest_that_computes_is_at_work_and_one_that_has_done_is_not() {
        assert!(watched(&[0, 40, 90, 140]));
        assert!(!watched(&[0, 40, 90, 140, 141, 142]));
        // A host that has other work gives it less.
        assert!(watched(&[0, 9, 12, 30]));
        assert!(!watched(&[0, 1, 2, 3, 4]));
    }

    #[test]
    fn what_is_not_known_is_no_work() {
        assert!(!watched(&[]));
        assert!(!watched(&[50]));
        // One look, long ago, says nothing of now.
        let (mut load, begun) = (Load::default(), Instant::now());
        load.note(begun, Some(Duration::ZERO));
        assert!(!load.at_work(begun + Duration::from_secs(9), None));
    }
}
