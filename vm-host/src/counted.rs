//! The clock of a guest whose instructions are counted ([`crate::Hardware::icount`]).
//!
//! While such a guest has something to do its clock goes as fast as the host gets on with it, which is a
//! little different each time. What is to reach it at the same time in each replay has to be told by its
//! own clock. QEMU shows that to whoever reads the main counter of the HPET, which counts it in steps of 10 ns
//! (IA-PC HPET Specification 1.0a, 2.3.7; `hw/timer/hpet.c`).
//!
//! While the guest waits, QEMU adds the time that passes to that clock only once its processor's thread wakes up (`icount_warp_rt`
//! in `accel/tcg/tcg-accel-ops-icount.c` and its neighbours). So it is woken up before the clock is read: by a timer
//! of a filter of QEMU's networks, one that no card is at. Of that the guest notices nothing.
//!
//! A guest may write to its HPET. What its clock shows is believed within bounds, see [`Skew`].

use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use qapi::Empty;

use crate::qmp::Qmp;
use crate::qmp::commands::{HumanMonitorCommand, ObjectAdd, QomSet};
use crate::{Error, Result};

/// The network that no card is at.
pub(crate) const NETDEV: &str = "hubport,id=nowhere,hubid=0";
/// The filter whose timer wakes up the processor's thread.
const WAKER: &str = "waker";
/// So often while it is on, in microseconds; the guest's own timers come later than that as a rule.
const INTERVAL: u32 = 100;

/// The HPET's general configuration, whose lowest bit says that it counts, and its main counter.
const CONFIGURATION: u64 = 0xfed0_0010;
const COUNTER: u64 = 0xfed0_00f0;
/// A step of the counter (`HPET_CLK_PERIOD`).
const STEP: u64 = 10;

/// A guest's clock gets ahead of the host's by at most this many times the time that has passed, or falls behind it by all
/// of that: no host executes an instruction in less.
const FASTEST: i64 = 8;
/// What was looked at so long ago is as it was.
const FRESH: i64 = 1_000_000;
/// What a reading may be off.
const BLUR: i64 = 2_000_000;

/// How far a guest's clock is ahead of the time for which it ran, in nanoseconds.
#[derive(Debug, Default)]
pub(crate) struct Skew {
    state: Mutex<State>,
    /// One looks at a time: whoever is done lets the processor's thread sleep again.
    looking: tokio::sync::Mutex<()>,
}

#[derive(Clone, Copy, Debug, Default)]
struct State {
    /// What the clock showed when it had run for so long, both in nanoseconds: where counting begins.
    origin: Option<(i64, i64)>,
    /// How far ahead it was, and after it had run for how long.
    last: (i64, i64),
}

impl Skew {
    /// How far it was ahead when that was last looked at.
    pub(crate) fn last(&self) -> i64 {
        self.state().last.0
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes in what the clock showed; what no host can have brought about is not believed.
    fn take(&self, clock: i64, ran: Duration) {
        let ran = i64::try_from(ran.as_nanos()).unwrap_or(i64::MAX);
        let mut state = self.state();
        let (clock0, ran0) = *state.origin.get_or_insert((clock, ran));
        let ahead = clock
            .saturating_sub(clock0)
            .saturating_sub(ran.saturating_sub(ran0));
        let (before, at) = state.last;
        let passed = ran.saturating_sub(at).max(0);
        let least = before.saturating_sub(passed).saturating_sub(BLUR);
        let most = before
            .saturating_add(passed.saturating_mul(FASTEST))
            .saturating_add(BLUR);
        if (least..=most).contains(&ahead) {
            state.last = (ahead, ran);
        }
    }

    /// Whether there is nothing new to be seen.
    fn is_fresh(&self, ran: Duration) -> bool {
        let ran = i64::try_from(ran.as_nanos()).unwrap_or(i64::MAX);
        let state = self.state();
        state.origin.is_some() && ran.saturating_sub(state.last.1) < FRESH
    }

    /// Looks at the clock, unless somebody just has, and says how far it is ahead.
    pub(crate) async fn look(&self, qmp: &Qmp) -> Result<i64> {
        let _alone = self.looking.lock().await;
        let stopwatch = qmp.stopwatch();
        let running = stopwatch.is_running();
        // While the guest stands still nothing wakes that thread, and the clock may show less than it will.
        let known = !running && self.state().origin.is_some();
        if known || self.is_fresh(stopwatch.elapsed(Instant::now())) {
            return Ok(self.last());
        }
        if running {
            wake(qmp, true).await?;
            // By the time that this is answered it is awake.
            read(qmp, COUNTER).await?;
        }
        let before = Instant::now();
        let read = read(qmp, COUNTER).await;
        let at = before + before.elapsed() / 2;
        if running {
            wake(qmp, false).await?;
        }
        let clock = read?.saturating_mul(STEP);
        let ran = qmp.stopwatch().elapsed(at);
        self.take(i64::try_from(clock).unwrap_or(i64::MAX), ran);
        Ok(self.last())
    }
}

/// Whether that clock can be read: instructions are counted, and the guest has its HPET count.
pub(crate) async fn is_readable(qmp: &Qmp) -> bool {
    // It is there already if somebody else has looked. Its timer runs until it is told not to.
    let waker = ObjectAdd {
        qom_type: "filter-buffer",
        id: WAKER,
        netdev: "nowhere",
        interval: INTERVAL,
    };
    let _: Result<Empty> = qmp.execute(waker).await;
    wake(qmp, false).await.is_ok() && read(qmp, CONFIGURATION).await.is_ok_and(|set| set & 1 == 1)
}

async fn wake(qmp: &Qmp, on: bool) -> Result<()> {
    let command = QomSet {
        path: format!("/objects/{WAKER}"),
        property: "status".into(),
        value: if on { "on" } else { "off" }.into(),
    };
    let _: Empty = qmp.execute(command).await?;
    Ok(())
}

/// Reads eight bytes of physical memory, as two words of four.
async fn read(qmp: &Qmp, address: u64) -> Result<u64> {
    let command = HumanMonitorCommand {
        command_line: format!("xp /2xw {address:#x}"),
    };
    let answer = qmp.execute(command).await?;
    parse(&answer).ok_or_else(|| Error::Protocol {
        command: "xp",
        reason: format!("{answer:?} is not two words of memory"),
    })
}

/// `00000000fed000f0: 0x54baee97 0x00000000`
fn parse(answer: &str) -> Option<u64> {
    let (_, words) = answer.split_once(':')?;
    let mut words = words
        .split_ascii_whitespace()
        .map(|word| u32::from_str_radix(word.strip_prefix("0x")?, 16).ok());
    let (low, high) = (words.next()??, words.next()??);
    words
        .next()
        .is_none()
        .then_some(u64::from(high) << 32 | u64::from(low))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_as_the_monitor_prints_it() {
        let answer = "00000000fed000f0: 0x54baee97 0x00000002\r\n";
        assert_eq!(parse(answer), Some(0x2_54ba_ee97));
        for other in [
            "",
            "x: ",
            "x: 0x1",
            "x: 0x1 0x2 0x3",
            "x: 1 2",
            "x: 0xfffffffff 0x1",
        ] {
            assert_eq!(parse(other), None, "{other}");
        }
    }

    #[test]
    fn what_was_just_looked_at_is_fresh() {
        let skew = Skew::default();
        let ran = Duration::from_micros;
        assert!(!skew.is_fresh(ran(0)), "nobody has looked yet");
        skew.take(7_000, ran(500));
        assert!(skew.is_fresh(ran(1_000)));
        assert!(!skew.is_fresh(ran(1_500)));
    }

    #[test]
    fn what_no_host_brings_about_is_not_believed() {
        let skew = Skew::default();
        let ms = |ms: i64| ms * 1_000_000;
        let ran = |ms| Duration::from_millis(ms);
        skew.take(ms(500), ran(10));
        assert_eq!(skew.last(), 0);
        skew.take(ms(580), ran(110));
        assert_eq!(skew.last(), ms(-20), "a busy guest on a slow host");
        skew.take(ms(600), ran(110));
        assert_eq!(skew.last(), ms(-20));
        skew.take(ms(0), ran(111));
        assert_eq!(skew.last(), ms(-20), "a clock that goes back");
        skew.take(i64::MAX, ran(112));
        assert_eq!(skew.last(), ms(-20));
        skew.take(ms(605), ran(115));
        assert_eq!(skew.last(), 0);
    }
}
