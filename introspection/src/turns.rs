//! Having a guest's programs take long turns while a session is recorded.
//!
//! Linux lets a program that has just woken up interrupt the one that runs, and the longest waiting
//! one after some milliseconds, by what each has used of the processor to the nanosecond
//! (`check_preempt_wakeup` and `check_preempt_tick` in `kernel/sched/fair.c`). So whether a program
//! has drawn two lines or three when the X server gets to see them, and which of two threads
//! allocates first, is chance, and whole heaps lie otherwise by it. With long turns programs hand
//! over where they wait for something, which a replay does in the same places.
//!
//! The guest's three figures are set for as long as it is recorded: a turn lasts as long as the user
//! allows, and who wakes up waits for its end, unless the one that runs waits for something
//! earlier. A program that computes for long holds up the others for that long at a time. The
//! kernel keeps what the figures were, scaled for one processor; by how much they had been scaled is
//! told by the last digits of what is put in their place, so that they can be brought back
//! whatever happened meanwhile.
//!
//! Linux up to 6.5 has these figures; later ones are left alone.

use std::time::Duration;

use crate::{Linux, Physical};

/// The shortest turn that can be asked for: longer than any kernel's own.
pub const SHORTEST: Duration = Duration::from_millis(50);
/// The longest; four times that, in nanoseconds, is about what the kernel's 32 bits hold.
pub const LONGEST: Duration = Duration::from_secs(1);

/// Figures: the variable, what keeps it as it is for one processor, and how many turns it is.
/// A program that has slept is owed at most half the first, so that with such a third it never
/// interrupts another.
const FIGURES: [(&str, &str, u32); 3] = [
    ("sysctl_sched_latency", "normalized_sysctl_sched_latency", 2),
    (
        "sysctl_sched_min_granularity",
        "normalized_sysctl_sched_min_granularity",
        1,
    ),
    (
        "sysctl_sched_wakeup_granularity",
        "normalized_sysctl_sched_wakeup_granularity",
        4,
    ),
];

/// The figures of one processor are within these bounds, unless someone has tuned them.
const PLAUSIBLE: std::ops::RangeInclusive<u32> = 100_000..=20_000_000;

/// Eight processors and more scale by four; this leaves room.
const MOST: u32 = 16;

/// Turns are whole milliseconds, which leaves the digits below for the scale.
const MILLI: u32 = 1_000_000;

/// Where the guest's figures are, and what they were.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Turns {
    figures: [Figure; 3],
    /// By how much they are scaled.
    scale: u32,
    held: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Figure {
    /// Offset in RAM.
    at: usize,
    /// For one processor, in nanoseconds.
    normal: u32,
    /// How many long turns it is.
    turns: u32,
}

/// Finds the figures of a guest that stands still; `None` if the guest is no Linux that has them,
/// or they are not as a kernel sets them.
pub fn find(ram: &[u8]) -> Option<Turns> {
    let linux = Linux::find(Physical::new(ram))?;
    let mut names = [""; 6];
    for (pair, (name, normal, _)) in names.as_chunks_mut::<2>().0.iter_mut().zip(FIGURES) {
        *pair = [name, normal];
    }
    let places = linux.variables(names);
    let number = |at: usize| -> Option<u32> {
        let bytes = ram.get(at..at.checked_add(4)?)?;
        Some(u32::from_le_bytes(bytes.try_into().ok()?))
    };
    let mut figures = [Figure {
        at: 0,
        normal: 0,
        turns: 0,
    }; 3];
    let mut scales = [(0, false); 3];
    for (index, place) in places.as_chunks::<2>().0.iter().enumerate() {
        let (at, normal) = (place[0]?, number(place[1]?)?);
        let (now, turns) = (number(at)?, FIGURES[index].2);
        if at % 4 != 0 || !PLAUSIBLE.contains(&normal) {
            return None;
        }
        figures[index] = Figure { at, normal, turns };
        scales[index] = match now % MILLI {
            scale @ 1..=MOST if now >= milliseconds(SHORTEST) * MILLI => (scale, true),
            _ if now % normal == 0 => (now / normal, false),
            _ => return None,
        };
    }
    let [(scale, held), ..] = scales;
    let plausible = scales == [(scale, held); 3] && (1..=MOST).contains(&scale);
    plausible.then_some(Turns {
        figures,
        scale,
        held,
    })
}

impl Turns {
    /// Whether turns are long.
    pub fn is_held(&self) -> bool {
        self.held
    }

    /// Offsets in RAM, and the 4 bytes to put there, for turns of this length: what is not between
    /// [`SHORTEST`] and [`LONGEST`] is taken as the nearer one.
    pub fn hold(&self, turn: Duration) -> [(usize, [u8; 4]); 3] {
        let turn = milliseconds(turn.clamp(SHORTEST, LONGEST)) * MILLI;
        // At most four turns of a second, and 16.
        self.figures
            .map(|figure| (figure.at, (turn * figure.turns + self.scale).to_le_bytes()))
    }

    /// Offsets in RAM, and the 4 bytes to put there, for turns as they were.
    pub fn release(&self) -> [(usize, [u8; 4]); 3] {
        // At most 20 ms times 16.
        self.figures
            .map(|figure| (figure.at, (figure.normal * self.scale).to_le_bytes()))
    }
}

/// Of at most [`LONGEST`].
const fn milliseconds(turn: Duration) -> u32 {
    turn.as_secs() as u32 * 1000 + turn.subsec_millis()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    fn put(ram: &mut [u8], words: [(usize, [u8; 4]); 3]) {
        for (at, bytes) in words {
            ram[at..at + 4].copy_from_slice(&bytes);
        }
    }

    fn figures(ram: &[u8]) -> Vec<u32> {
        let words = ram[testing::TURNS..][..24].as_chunks::<4>().0;
        words.iter().map(|word| u32::from_le_bytes(*word)).collect()
    }

    #[test]
    fn they_are_held_and_come_back() {
        let mut ram = testing::kernel();
        let before = figures(&ram);
        let turns = find(&ram).unwrap();
        assert!(!turns.is_held());
        for turn in [LONGEST, SHORTEST, Duration::from_millis(123)] {
            let length = u32::try_from(turn.as_nanos()).unwrap();
            put(&mut ram, turns.hold(turn));
            let held = figures(&ram);
            for (figure, turns) in [(held[0], 2), (held[2], 1), (held[4], 4)] {
                assert!((1..=MOST).contains(&(figure - length * turns)), "{turn:?}");
            }
            // Whoever finds them later knows what they were, and holds them as they are.
            let again = find(&ram).unwrap();
            assert!(again.is_held());
            put(&mut ram, again.hold(turn));
            assert_eq!(figures(&ram), held);
            put(&mut ram, again.release());
            assert_eq!(figures(&ram), before);
        }
    }

    #[test]
    fn a_turn_is_as_long_as_the_figures_hold() {
        let turns = find(&testing::kernel()).unwrap();
        assert_eq!(turns.hold(Duration::MAX), turns.hold(LONGEST));
        assert_eq!(turns.hold(Duration::ZERO), turns.hold(SHORTEST));
    }

    #[test]
    fn figures_held_before_turns_had_a_length_come_back() {
        let mut ram = testing::kernel();
        let before = figures(&ram);
        let turns = find(&ram).unwrap();
        for (figure, long) in turns.figures.iter().zip([200, 100, 1000]) {
            let held = long * MILLI + turns.scale;
            ram[figure.at..][..4].copy_from_slice(&held.to_le_bytes());
        }
        let held = find(&ram).unwrap();
        assert!(held.is_held());
        put(&mut ram, held.release());
        assert_eq!(figures(&ram), before);
    }

    #[test]
    fn figures_that_someone_has_set_are_left_alone() {
        for (place, value) in [
            (0, 18_000_001_u32),
            (8, 1_500_000),
            (20, 0),
            (4, 0),
            (16, 0),
        ] {
            let mut ram = testing::kernel();
            ram[testing::TURNS + place..][..4].copy_from_slice(&value.to_le_bytes());
            assert_eq!(find(&ram), None, "{place} {value}");
        }
        assert_eq!(find(&[0; 4096]), None);
    }
}
