//! A guest that wakes up later than it was put to sleep: its clocks set ahead in its device
//! state.
//!
//! A fork that begins to live some seconds after its source did would stay that much younger, and
//! every time that it takes down would be another one. To the guest it looks as if it had slept
//! through that time, as an idle one does.

use std::ops::Range;
use std::time::Duration;

use crate::Accelerator;

/// Linux takes a processor that did nothing for 20 s to be stuck (`watchdog_thresh`), and says so
/// in its log.
const MAX: Duration = Duration::from_secs(15);

/// Name, instance and version of the section (`vmstate_timers` in QEMU's `cpu-timers.c`).
const SECTION: &[u8] = b"\x05timer\0\0\0\0\0\0\0\x02";
/// Before it: what kind of section it is (`QEMU_VM_SECTION_FULL`), and its number.
const FULL: u8 = 4;
const NUMBER: usize = 4;
/// In it: the processor's time stamp counter, 8 bytes that are not used, and the virtual clock in
/// nanoseconds, from which all devices count.
const TICKS: Range<usize> = 0..8;
const CLOCK: Range<usize> = 16..24;
/// After it (`QEMU_VM_SECTION_FOOTER`), before its number once more.
const FOOTER: u8 = 0x7e;
/// After it instead, where instructions are counted: a part of its own (`QEMU_VM_SUBSECTION`), its name and version
/// (`icount_vmstate_timers`).
const COUNTED: &[u8] = b"\x05\x0ctimer/icount\0\0\0\x01";
/// In it: how far the guest's clock, and the processor's time stamp counter, which is the same then, are ahead of the
/// time that the instructions took, in nanoseconds.
const BIAS: Range<usize> = CLOCK.end + COUNTED.len()..CLOCK.end + COUNTED.len() + 8;

/// The device state of a guest that has slept for as long as `by` since this one was saved.
///
/// None where the guest would not take it for sleep: under KVM it is hardware that counts, and
/// more than 15 s are too long; or where the state is not one of QEMU's that we know.
pub fn asleep_for(state: &[u8], by: Duration, accelerator: Accelerator) -> Option<Vec<u8>> {
    if accelerator != Accelerator::Tcg || by > MAX {
        return None;
    }
    let at = find(state)?;
    let by = i64::try_from(by.as_nanos()).ok()?;
    if is_counted(state, at) {
        let bias = read(state, at, BIAS)?.checked_add(by)?;
        let mut state = state.to_vec();
        write(&mut state, at, BIAS, bias)?;
        return Some(state);
    }
    let ticks = read(state, at, TICKS)?;
    let clock = read(state, at, CLOCK)?;
    // Both have counted since the guest was booted, the one at the rate of that host, which is
    // what the guest reckons with.
    if ticks <= 0 || clock <= 0 {
        return None;
    }
    let more = i128::from(ticks) * i128::from(by) / i128::from(clock);
    let ticks = ticks.checked_add(i64::try_from(more).ok()?)?;
    let clock = clock.checked_add(by)?;
    let mut state = state.to_vec();
    write(&mut state, at, TICKS, ticks)?;
    write(&mut state, at, CLOCK, clock)?;
    Some(state)
}

/// Whether a section's virtual clock is the count of instructions.
fn is_counted(state: &[u8], section: usize) -> bool {
    let rest = state.get(section + CLOCK.end..);
    rest.is_some_and(|rest| rest.starts_with(COUNTED))
}

/// Where the section's fields begin, if there is just one.
fn find(state: &[u8]) -> Option<usize> {
    let fits = |at: &usize| {
        let number = at.checked_sub(NUMBER).and_then(|from| state.get(from..*at));
        let fields = at + SECTION.len();
        let kind = at.checked_sub(NUMBER + 1).and_then(|at| state.get(at));
        let end = fields + CLOCK.end;
        let footer = state.get(end + 1..end + 1 + NUMBER);
        let ends = state.get(end) == Some(&FOOTER) && footer == number;
        kind == Some(&FULL) && number.is_some() && (ends || is_counted(state, fields))
    };
    let named = state.windows(SECTION.len()).enumerate();
    let mut found = named
        .filter(|(_, bytes)| *bytes == SECTION)
        .map(|(at, _)| at)
        .filter(fits);
    let at = found.next()?;
    found.next().is_none().then_some(at + SECTION.len())
}

fn read(state: &[u8], section: usize, field: Range<usize>) -> Option<i64> {
    let bytes = state.get(section + field.start..section + field.end)?;
    Some(i64::from_be_bytes(bytes.try_into().ok()?))
}

fn write(state: &mut [u8], section: usize, field: Range<usize>, value: i64) -> Option<()> {
    let field = state.get_mut(section + field.start..section + field.end)?;
    field.copy_from_slice(&value.to_be_bytes());
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TCG: Accelerator = Accelerator::Tcg;

    fn state(ticks: i64, clock: i64) -> Vec<u8> {
        let mut state = b"QEVM\0\0\0\x03 something \x05timer of another kind".to_vec();
        state.extend([4, 0, 0, 0, 7]);
        state.extend(SECTION);
        state.extend(ticks.to_be_bytes());
        state.extend([0; 8]);
        state.extend(clock.to_be_bytes());
        state.extend([0x7e, 0, 0, 0, 7]);
        state.extend(b"\x04 and more");
        state
    }

    #[test]
    fn both_clocks_go_ahead_together_and_nothing_else_changes() {
        let before = state(2_600_000, 1_000_000);
        let later = asleep_for(&before, Duration::from_millis(2), TCG);
        assert_eq!(later, Some(state(7_800_000, 3_000_000)));
        assert_eq!(asleep_for(&before, Duration::ZERO, TCG), Some(before));
    }

    #[test]
    fn a_count_of_instructions_goes_ahead_by_its_bias() {
        let counted = |bias: i64| {
            let mut state = state(2_600_000, 1_000_000);
            let footer = state.len() - 15;
            assert_eq!(state[footer], 0x7e);
            let end = state.split_off(footer);
            state.extend(COUNTED);
            state.extend(bias.to_be_bytes());
            state.extend(77_i64.to_be_bytes());
            state.extend(end);
            state
        };
        let by = Duration::from_millis(2);
        assert_eq!(asleep_for(&counted(-5), by, TCG), Some(counted(1_999_995)));
        assert_eq!(asleep_for(&counted(i64::MAX), by, TCG), None);
        let whole = counted(0);
        let cut = &whole[..whole.len() - 15 - 12];
        assert_eq!(asleep_for(cut, by, TCG), None);
    }

    #[test]
    fn what_is_not_understood_is_left_alone() {
        let by = Duration::from_secs(1);
        let good = state(1, 1);
        assert!(asleep_for(&good, by, TCG).is_some());
        assert_eq!(asleep_for(&good, by, Accelerator::Kvm), None);
        assert_eq!(asleep_for(&good, Duration::from_secs(16), TCG), None);
        assert_eq!(asleep_for(&[good.clone(), good].concat(), by, TCG), None);
        assert_eq!(asleep_for(&state(0, 0), by, TCG), None);
        assert_eq!(asleep_for(&state(i64::MAX, 1), by, TCG), None);
        assert_eq!(asleep_for(b"QEVM", by, TCG), None);
        let mut subsection = state(1, 1);
        let footer = subsection.len() - 10;
        assert_eq!(subsection[footer - 5], 0x7e);
        subsection[footer - 5] = 5;
        assert_eq!(asleep_for(&subsection, by, TCG), None);
    }
}
