//! The beginning of every conversation: hello, welcome, and how fast the line is.

use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::generation::Manifest;
use crate::line::{Line, LinkHistory};
use crate::local::Live;
use crate::phase::Phase;
use crate::protocol::{Hello, Purpose, ToSource, ToTarget, Welcome};
use crate::store::VmDir;
use crate::vm::{Id, VmRecord};

/// Bytes that time the line: enough to see a thin one, few beside what follows.
const PROBE_BYTES: usize = 32 << 10;

pub(super) fn hello(
    vm: &VmDir,
    record: &VmRecord,
    purpose: Purpose,
    transfer: Id,
    fence: u64,
    next: u64,
    qemu: &str,
) -> Result<Hello> {
    Ok(Hello {
        purpose,
        vm: record.clone(),
        transfer,
        fence,
        generations: vm.generations()?.iter().map(Manifest::identity).collect(),
        next,
        qemu: qemu.to_owned(),
    })
}

/// The beginning that all purposes share: hello, welcome, how fast the line is.
pub(super) async fn begin(line: &mut Line, vm: &VmDir, hello: Hello) -> Result<(Welcome, f64)> {
    let ours = hello.generations.clone();
    line.send(ToTarget::Hello(Box::new(hello))).await?;
    let ToSource::Welcome(welcome) = line.recv(Phase::Hello).await? else {
        return Err(line.unexpected(Phase::Hello, "no welcome"));
    };
    if let Some(strange) = welcome.common.iter().find(|theirs| !ours.contains(theirs)) {
        return Err(line.unexpected(
            Phase::Hello,
            format!(
                "it holds a generation {} that is not this site's",
                strange.number
            ),
        ));
    }
    // An empty probe gives the round trip, a full one the rate.
    let mut times = [Duration::ZERO; 2];
    for (time, size) in times.iter_mut().zip([0, PROBE_BYTES]) {
        let begun = Instant::now();
        line.send(ToTarget::Probe(vec![0; size])).await?;
        loop {
            match line.recv(Phase::Hello).await? {
                ToSource::Probed => break,
                // A standby that goes on meanwhile.
                ToSource::Following { .. } if welcome.standby.is_some() => {}
                _ => return Err(line.unexpected(Phase::Hello, "no answer to a probe")),
            }
        }
        *time = begun.elapsed();
    }
    let transfer = times[1]
        .saturating_sub(times[0])
        .max(Duration::from_micros(10));
    let probed = (PROBE_BYTES * 8) as f64 / transfer.as_secs_f64();
    // Slow start makes a fast, long line look thin in so short a probe; what was once reached
    // over it counts as well.
    let rate = probed.max(
        LinkHistory::load(vm.store())?
            .rate(line.peer())
            .unwrap_or(0.0),
    );
    tracing::info!(rtt = ?times[0], rate, "line measured");
    Ok((*welcome, rate))
}

pub(super) fn live(vm: &VmDir) -> Result<Live> {
    Live::load(vm)?.ok_or_else(|| Error::Damaged {
        path: vm.live_dir(),
        reason: "the VM runs, but what its disks rest on is not noted".into(),
    })
}
