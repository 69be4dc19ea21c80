//! How much memory a piece of work takes at its peak.

use std::fs;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

/// How often the process's memory is looked at: short spikes may be missed.
const EVERY: Duration = Duration::from_millis(2);

/// Runs `work`; the bytes by which the memory of this process's own (not of mapped files) grew
/// at most meanwhile, where the system tells.
pub(crate) fn peak<T>(work: impl FnOnce() -> T) -> (T, Option<u64>) {
    let before = own();
    let (done, is_done) = channel::<()>();
    thread::scope(|scope| {
        let watcher = scope.spawn(move || {
            let mut most = own();
            while matches!(is_done.recv_timeout(EVERY), Err(RecvTimeoutError::Timeout)) {
                most = most.max(own());
            }
            most
        });
        let made = work();
        drop(done);
        let most = watcher.join().ok().flatten();
        let grown = before.zip(most);
        (
            made,
            grown.map(|(before, most)| most.saturating_sub(before)),
        )
    })
}

/// Anonymous memory of this process, `RssAnon` of proc(5).
fn own() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_held_for_a_while_counts() {
        let (sum, grown) = peak(|| {
            let held = vec![1_u8; 64 << 20];
            // Held until the watcher has looked.
            let mut sum = 0_u64;
            let begun = std::time::Instant::now();
            while begun.elapsed() < EVERY * 20 {
                sum += held.iter().map(|&byte| u64::from(byte)).sum::<u64>();
            }
            sum
        });
        assert!(sum > 0);
        assert!(grown.unwrap() >= 60 << 20, "{grown:?}");
    }
}
