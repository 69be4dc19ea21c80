//! What a guest's processors use.

use std::io;
use std::path::Path;
use std::time::Duration;

use crate::error::{Context as _, Result};
use crate::process::thread_cpu_time;

/// The threads that are a QEMU's virtual CPUs. They may have ended.
#[derive(Clone, Debug)]
pub struct Vcpus {
    pid: u32,
    threads: Vec<u32>,
}

impl Vcpus {
    pub(crate) fn new(pid: u32, threads: Vec<u32>) -> Self {
        Self { pid, threads }
    }

    /// Time they have been executing on the host. Under TCG an idle guest uses none.
    ///
    /// # Errors
    /// When they have ended.
    pub fn cpu_time(&self) -> Result<Duration> {
        cpu_time(self.pid, &self.threads)
    }
}

pub(crate) fn cpu_time(pid: u32, threads: &[u32]) -> Result<Duration> {
    let each = threads.iter().map(|thread| thread_cpu_time(pid, *thread));
    let sum: io::Result<Duration> = each.sum();
    sum.context("read the CPU time of", Path::new(&format!("/proc/{pid}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_computes_is_seen_and_one_that_has_ended_is_an_error() {
        let pid = std::process::id();
        let own = Vcpus::new(pid, vec![pid]);
        own.cpu_time().unwrap();
        assert!(Vcpus::new(pid, vec![u32::MAX]).cpu_time().is_err());
    }
}
