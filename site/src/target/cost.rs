//! What a standby costs its host while it follows, from `/proc` (see proc(5)).
//!
//! Processor time is that of QEMU's process, all its threads, since it was started, and beside it
//! that of the agent's process meanwhile: the agent watches the standby's screen and plays the
//! log, and whatever else it served then is in that figure too. Memory is the proportional set
//! size of QEMU without what it shares, and the file with the guest's RAM as far as it lies in
//! memory, counted by itself: pages of it that QEMU has not touched yet are in no process's set.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::local::blocking;
use crate::report::StandbyCost;

/// Ticks of processor time in `/proc/PID/stat` a second; Linux says so on every platform it has.
const USER_HZ: f64 = 100.0;

/// Adding up a process's memory walks its page tables: not more often than this.
const LOOK_AGAIN: Duration = Duration::from_secs(5);

/// Measures one standby.
pub(super) struct Meter {
    qemu: u32,
    ram: PathBuf,
    since: Instant,
    /// What the agent had used when the standby began.
    agent: f64,
    memory: Option<(Memory, Instant)>,
}

/// Bytes in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Memory {
    process: u64,
    ram: u64,
}

impl Meter {
    /// Of a QEMU that was started just now; `ram` is the file with its guest's RAM.
    pub(super) fn start(qemu: u32, ram: PathBuf, since: Instant) -> Result<Self> {
        Ok(Self {
            qemu,
            ram,
            since,
            agent: cpu_seconds(std::process::id())?,
            memory: None,
        })
    }

    /// What it costs. Memory may be as it was some seconds ago.
    pub(super) async fn look(&mut self) -> Result<StandbyCost> {
        if self.memory.is_none_or(|(_, at)| at.elapsed() >= LOOK_AGAIN) {
            let (qemu, ram) = (self.qemu, self.ram.clone());
            let memory = blocking(move || memory(qemu, &ram)).await?;
            self.memory = Some((memory, Instant::now()));
        }
        self.glance()
    }

    /// The same, with memory as it was looked at last: at once.
    pub(super) fn glance(&self) -> Result<StandbyCost> {
        let memory = self.memory.map(|(memory, _)| memory).unwrap_or_default();
        Ok(StandbyCost {
            seconds: self.since.elapsed().as_secs_f64(),
            qemu_cpu_seconds: cpu_seconds(self.qemu)?,
            agent_cpu_seconds: (cpu_seconds(std::process::id())? - self.agent).max(0.0),
            process_bytes: memory.process,
            ram_bytes: memory.ram,
        })
    }
}

fn memory(qemu: u32, ram: &Path) -> Result<Memory> {
    let path = PathBuf::from(format!("/proc/{qemu}/smaps_rollup"));
    let text = std::fs::read_to_string(&path).map_err(Error::file("read", &path))?;
    let process = unshared(&text).ok_or_else(|| Error::Damaged {
        path,
        reason: "it says nothing of memory as this kernel's should".into(),
    })?;
    let file = std::fs::metadata(ram).map_err(Error::file("measure", ram))?;
    Ok(Memory {
        process,
        // On tmpfs a block is a page in memory.
        ram: file.blocks().saturating_mul(512),
    })
}

/// Processor time that a process has used, user and system, in seconds.
fn cpu_seconds(pid: u32) -> Result<f64> {
    let path = PathBuf::from(format!("/proc/{pid}/stat"));
    let stat = std::fs::read_to_string(&path).map_err(Error::file("read", &path))?;
    ticks(&stat)
        .map(|ticks| ticks as f64 / USER_HZ)
        .ok_or_else(|| Error::Damaged {
            path,
            reason: "it says nothing of processor time as this kernel's should".into(),
        })
}

/// User and system time in `/proc/PID/stat`: fields 14 and 15. The second field is the program's
/// name in parentheses, and may hold anything.
fn ticks(stat: &str) -> Option<u64> {
    let fields = stat.get(stat.rfind(')')? + 1..)?;
    let mut times = fields.split_ascii_whitespace().skip(11);
    let user: u64 = times.next()?.parse().ok()?;
    let system: u64 = times.next()?.parse().ok()?;
    user.checked_add(system)
}

/// The proportional set size in `/proc/PID/smaps_rollup` without shared memory, in bytes.
fn unshared(rollup: &str) -> Option<u64> {
    let kibibytes = |name: &str| -> Option<u64> {
        let mut lines = rollup.lines();
        let value = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        value.trim().strip_suffix("kB")?.trim().parse().ok()
    };
    let all = kibibytes("Pss")?;
    all.saturating_sub(kibibytes("Pss_Shmem")?)
        .checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROLLUP: &str = "\
55d0c0000000-7ffd5a9f4000 ---p 00000000 00:00 0                          [rollup]
Rss:             1000200 kB
Pss:              900100 kB
Pss_Dirty:        880000 kB
Pss_Anon:         110000 kB
Pss_File:           4100 kB
Pss_Shmem:        786000 kB
Shared_Clean:      12000 kB
";

    #[test]
    fn shared_memory_is_told_apart() {
        assert_eq!(unshared(ROLLUP), Some((900_100 - 786_000) * 1024));
        // Kernels before 5.4 do not say what is shared memory.
        let old = ROLLUP.replace("Pss_Shmem", "Other");
        assert_eq!(unshared(&old), None);
        assert_eq!(unshared(&ROLLUP.replace("900100 kB", "many")), None);
        assert_eq!(unshared(""), None);
    }

    #[test]
    fn processor_time_is_found_behind_any_name() {
        let stat = "77 (qemu) 1 (x) S 1 77 77 0 -1 4194560 1 0 0 0 2345 155 9 9 20 0 5 0 12 1 1";
        assert_eq!(ticks(stat), Some(2500));
        assert_eq!(ticks("77 (qemu) S 1 77"), None);
        assert_eq!(ticks("no name"), None);
        assert_eq!(ticks(&stat.replace("2345", "-1")), None);
    }

    #[tokio::test]
    async fn what_runs_here_is_measured() {
        let dir = tempfile::tempdir().unwrap();
        let ram = dir.path().join("ram.img");
        std::fs::write(&ram, vec![1; 1 << 20]).unwrap();
        std::fs::File::open(&ram).unwrap().sync_all().unwrap();
        let mut meter = Meter::start(std::process::id(), ram, Instant::now()).unwrap();
        assert_eq!(meter.glance().unwrap().process_bytes, 0);
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_millis(100) {
            std::hint::black_box(0);
        }
        let cost = meter.look().await.unwrap();
        assert!(cost.seconds >= 0.1);
        assert!(cost.qemu_cpu_seconds > 0.05, "{cost:?}");
        assert!(cost.process_bytes > 1 << 20, "{cost:?}");
        assert!(cost.ram_bytes >= 1 << 20, "{cost:?}");
        assert_eq!(meter.glance().unwrap().ram_bytes, cost.ram_bytes);
    }

    #[tokio::test]
    async fn who_is_gone_costs_an_error() {
        let mut meter = Meter::start(u32::MAX, "/nowhere".into(), Instant::now()).unwrap();
        assert!(meter.look().await.is_err());
        assert!(meter.glance().is_err());
    }
}
