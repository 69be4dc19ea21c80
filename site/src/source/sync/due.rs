//! When another epoch begins: whichever of the reasons that were asked for comes first.

use std::time::{Duration, Instant};

use serde::Serialize;

use crate::recording::Viewers;

/// Of one processor, what an idle guest uses at most: its clock, its caret.
const IDLE_SHARE: f64 = 0.1;

/// Which reasons there are for an epoch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// So long after the last.
    pub every: Option<Duration>,
    /// So many bytes of RAM and disk have changed since, as far as a sample tells.
    pub after_bytes: Option<u64>,
    /// The guest has done nothing for so long, after it did something.
    pub when_idle: Option<Duration>,
    /// The last viewer of a recording has left.
    pub when_left: bool,
    /// Keys were pressed in a recording with which a desktop is locked.
    pub when_locked: bool,
}

impl Policy {
    /// What there is where nothing was asked for.
    pub const DEFAULT_EVERY: Duration = Duration::from_secs(300);

    /// The same, with a reason if it has none.
    #[must_use]
    pub fn or_default(self) -> Self {
        if self == Self::default() {
            return Self {
                every: Some(Self::DEFAULT_EVERY),
                ..self
            };
        }
        self
    }
}

/// Why an epoch began.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Why {
    /// It is the first.
    First,
    /// It was time.
    Time,
    /// Enough has changed.
    Changed,
    /// The guest is idle.
    Idle,
    /// The viewers have left.
    Left,
    /// The user has locked the screen.
    Locked,
    /// Somebody else has made a generation.
    Made,
}

/// How the VM is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sight {
    pub(super) now: Instant,
    /// What the guest's processors have used so far, while it runs.
    pub(super) used: Option<Duration>,
    /// Who looks on, where that is known.
    pub(super) viewers: Option<Viewers>,
    /// Bytes that have changed since the last epoch, where that is asked for.
    pub(super) changed: u64,
}

/// Remembers what the reasons need.
#[derive(Debug)]
pub(super) struct Due {
    policy: Policy,
    /// The last epoch.
    epoch: Instant,
    used: Option<(Instant, Duration)>,
    /// The guest has been idle since then.
    idle: Option<Instant>,
    /// It has done something since the last epoch.
    worked: bool,
    viewers: Viewers,
    left: bool,
    locked: bool,
}

impl Due {
    pub(super) fn new(policy: Policy, now: Instant) -> Self {
        Self {
            policy,
            epoch: now,
            used: None,
            idle: None,
            worked: false,
            viewers: Viewers::default(),
            left: false,
            locked: false,
        }
    }

    /// Whether it matters how much has changed.
    pub(super) const fn asks_for_change(&self) -> bool {
        self.policy.after_bytes.is_some()
    }

    /// Whether it matters who looks on.
    pub(super) const fn asks_for_viewers(&self) -> bool {
        self.policy.when_left || self.policy.when_locked
    }

    /// There was an epoch.
    pub(super) fn began(&mut self, now: Instant) {
        self.epoch = now;
        self.worked = false;
        self.left = false;
        self.locked = false;
    }

    /// Whether an epoch is due, by what is seen now.
    pub(super) fn look(&mut self, sight: Sight) -> Option<Why> {
        self.see_work(sight);
        if let Some(viewers) = sight.viewers {
            // Some come and leave between two looks. A recorder that began anew counts from none.
            let came = viewers.admitted > self.viewers.admitted;
            self.left |= viewers.now == 0 && (came || self.viewers.now > 0);
            self.locked |= viewers.locks > self.viewers.locks;
            self.viewers = viewers;
        }
        let policy = self.policy;
        let since = sight.now.saturating_duration_since(self.epoch);
        // A guest that stands still has nothing new.
        sight.used?;
        if policy.when_left && self.left {
            Some(Why::Left)
        } else if policy.when_locked && self.locked {
            Some(Why::Locked)
        } else if policy
            .after_bytes
            .is_some_and(|after| sight.changed >= after)
        {
            Some(Why::Changed)
        } else if policy
            .when_idle
            .is_some_and(|idle| self.worked && self.idle_for(sight.now) >= idle)
        {
            Some(Why::Idle)
        } else if policy.every.is_some_and(|every| since >= every) {
            Some(Why::Time)
        } else {
            None
        }
    }

    fn idle_for(&self, now: Instant) -> Duration {
        let idle = self.idle.map(|since| now.saturating_duration_since(since));
        idle.unwrap_or_default()
    }

    fn see_work(&mut self, sight: Sight) {
        let before = self.used.take();
        self.used = sight.used.map(|used| (sight.now, used));
        let (Some((then, before)), Some(used)) = (before, sight.used) else {
            self.idle = None;
            return;
        };
        let time = sight.now.saturating_duration_since(then);
        if time.is_zero() {
            return;
        }
        // Another QEMU, that of a VM that was started anew, has used less.
        let used = used.saturating_sub(before);
        if used.as_secs_f64() > IDLE_SHARE * time.as_secs_f64() {
            self.worked = true;
            self.idle = None;
        } else if self.idle.is_none() {
            self.idle = Some(then);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// Looks once a second; what each second uses of a processor, in percent.
    struct World {
        due: Due,
        now: Instant,
        used: Duration,
        admitted: u64,
        locks: u64,
    }

    impl World {
        fn new(policy: Policy) -> Self {
            let now = Instant::now();
            let mut due = Due::new(policy, now);
            let used = Duration::ZERO;
            let sight = Sight {
                now,
                used: Some(used),
                viewers: Some(Viewers::default()),
                changed: 0,
            };
            assert_eq!(due.look(sight), None);
            Self {
                due,
                now,
                used,
                admitted: 0,
                locks: 0,
            }
        }

        fn second(&mut self, percent: u32, viewers: usize, changed: u64) -> Option<Why> {
            self.admitted += viewers as u64;
            self.now += SECOND;
            self.used += SECOND * percent / 100;
            let why = self.due.look(Sight {
                now: self.now,
                used: Some(self.used),
                viewers: Some(Viewers {
                    now: viewers,
                    admitted: self.admitted,
                    locks: self.locks,
                }),
                changed,
            });
            if why.is_some() {
                self.due.began(self.now);
            }
            why
        }
    }

    #[test]
    fn time_begins_epochs() {
        let mut world = World::new(Policy {
            every: Some(3 * SECOND),
            ..Policy::default()
        });
        let whys: Vec<_> = (0..7).map(|_| world.second(0, 0, 1 << 40)).collect();
        let time = Some(Why::Time);
        assert_eq!(whys, [None, None, time, None, None, time, None]);
    }

    #[test]
    fn an_idle_guest_has_one_epoch_for_each_time_that_it_worked() {
        let mut world = World::new(Policy {
            when_idle: Some(2 * SECOND),
            ..Policy::default()
        });
        // It has not worked yet.
        assert!((0..9).all(|_| world.second(2, 0, 0).is_none()));
        assert!((0..9).all(|_| world.second(80, 0, 0).is_none()));
        let whys: Vec<_> = (0..6).map(|_| world.second(2, 0, 0)).collect();
        assert_eq!(whys, [None, Some(Why::Idle), None, None, None, None]);
        assert_eq!(world.second(50, 0, 0), None);
        assert_eq!(world.second(0, 0, 0), None);
        assert_eq!(world.second(0, 0, 0), Some(Why::Idle));
    }

    #[test]
    fn a_viewer_that_leaves_and_enough_change_begin_one_too() {
        let mut world = World::new(Policy {
            when_left: true,
            after_bytes: Some(1000),
            ..Policy::default()
        });
        assert_eq!(world.second(0, 0, 999), None);
        assert_eq!(world.second(0, 2, 0), None);
        assert_eq!(world.second(0, 1, 0), None);
        assert_eq!(world.second(0, 0, 0), Some(Why::Left));
        assert_eq!(world.second(0, 0, 0), None);
        assert_eq!(world.second(0, 0, 1000), Some(Why::Changed));
        // One that came and left since the last look.
        world.admitted += 1;
        assert_eq!(world.second(0, 0, 0), Some(Why::Left));
    }

    #[test]
    fn locking_the_screen_begins_one() {
        let mut world = World::new(Policy {
            when_locked: true,
            ..Policy::default()
        });
        assert_eq!(world.second(50, 1, 0), None);
        world.locks += 1;
        assert_eq!(world.second(50, 1, 0), Some(Why::Locked));
        assert_eq!(world.second(50, 0, 0), None);
        // A recorder that began anew counts from none.
        world.locks = 0;
        assert_eq!(world.second(50, 1, 0), None);
        world.locks = 2;
        assert_eq!(world.second(50, 1, 0), Some(Why::Locked));
    }

    #[test]
    fn a_vm_that_is_stopped_has_no_epoch_until_it_runs_again() {
        let mut world = World::new(Policy {
            every: Some(SECOND),
            ..Policy::default()
        });
        world.now += 9 * SECOND;
        let gone = Sight {
            now: world.now,
            used: None,
            viewers: None,
            changed: 0,
        };
        assert_eq!(world.due.look(gone), None);
        world.used = Duration::ZERO;
        assert_eq!(world.second(0, 0, 0), Some(Why::Time));
    }

    #[test]
    fn without_a_reason_time_is_one() {
        let every = Some(Policy::DEFAULT_EVERY);
        assert_eq!(Policy::default().or_default().every, every);
        let left = Policy {
            when_left: true,
            ..Policy::default()
        };
        assert_eq!(left.or_default(), left);
    }
}
