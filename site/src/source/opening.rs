//! The beginning of every conversation: hello, welcome, and how fast the line is.

use std::time::{Duration, Instant};

use crate::arriving;
use crate::chain::Chain;
use crate::error::{Error, Result};
use crate::generation::Manifest;
use crate::generations::seen;
use crate::line::{Line, LinkHistory};
use crate::local::Live;
use crate::ownership;
use crate::peers::Peer;
use crate::phase::Phase;
use crate::protocol::{Hello, Purpose, ToSource, ToTarget, Welcome};
use crate::store::VmDir;
use crate::vm::{Id, VmRecord};

/// Bytes that time the line: enough to see a thin one, few beside what follows.
const PROBE_BYTES: usize = 32 << 10;

/// For a line that takes those in less than [`TELLING`]: then they tell more of the hosts.
const LONG_PROBE_BYTES: usize = 256 << 10;

/// Shorter times are as much the hosts' as the line's.
const TELLING: Duration = Duration::from_millis(4);

/// No transfer is taken for shorter: a round trip that was late must not make a line look endless.
const SHORTEST: Duration = Duration::from_micros(200);

/// What a conversation with this site begins with.
#[expect(clippy::too_many_arguments, reason = "a Hello has as many parts")]
pub(super) fn hello(
    vm: &VmDir,
    record: &VmRecord,
    peer: &Peer,
    purpose: Purpose,
    transfer: Id,
    fence: u64,
    next: u64,
    qemu: &str,
) -> Result<Hello> {
    let chain = match purpose {
        Purpose::Settle(_) | Purpose::Supply => Chain::default(),
        Purpose::Migrate | Purpose::Seed | Purpose::Estimate => {
            ownership::proof(vm)?.since(record.id, peer)
        }
    };
    if matches!(purpose, Purpose::Migrate | Purpose::Seed) {
        arriving::require_whole(vm, record)?;
    }
    Ok(Hello {
        purpose,
        vm: record.clone(),
        transfer,
        fence,
        chain,
        generations: vm.generations()?.iter().map(Manifest::identity).collect(),
        next,
        qemu: qemu.to_owned(),
        follows: false,
    })
}

/// The beginning that all purposes share: hello, welcome, how fast the line is.
pub(super) async fn begin(line: &mut Line, vm: &VmDir, hello: Hello) -> Result<(Welcome, f64)> {
    let ours = hello.generations.clone();
    let asks = !matches!(hello.purpose, Purpose::Migrate | Purpose::Seed);
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
    if !asks {
        seen::met(vm, line.peer(), &welcome.common)?;
    }
    let (rtt, probed) = measure(line, welcome.standby.is_some()).await?;
    // Slow start makes a fast, long line look thin in so short a probe; what was once reached
    // over it counts as well.
    let rate = probed.max(
        LinkHistory::load(vm.store())?
            .rate(line.peer())
            .unwrap_or(0.0),
    );
    tracing::info!(?rtt, rate, "line measured");
    Ok((*welcome, rate))
}

/// The round trip, and the rate in bits per second.
async fn measure(line: &mut Line, standby: bool) -> Result<(Duration, f64)> {
    // A busy host makes one round trip late; of two, the shorter counts.
    let first = probe(line, 0, standby).await?;
    let mut size = PROBE_BYTES;
    let mut full = probe(line, size, standby).await?;
    let rtt = first.min(probe(line, 0, standby).await?);
    if full.saturating_sub(rtt) < TELLING {
        size = LONG_PROBE_BYTES;
        full = probe(line, size, standby).await?;
    }
    Ok((rtt, rate_of(size, full, rtt)))
}

fn rate_of(bytes: usize, took: Duration, rtt: Duration) -> f64 {
    let transfer = took.saturating_sub(rtt).max(SHORTEST);
    (bytes * 8) as f64 / transfer.as_secs_f64()
}

/// How long so many bytes take to the target, and its answer back.
async fn probe(line: &mut Line, size: usize, standby: bool) -> Result<Duration> {
    let begun = Instant::now();
    line.send(ToTarget::Probe(vec![0; size])).await?;
    loop {
        match line.recv(Phase::Hello).await? {
            ToSource::Probed => return Ok(begun.elapsed()),
            // A standby that goes on meanwhile.
            ToSource::Following { .. } if standby => {}
            _ => return Err(line.unexpected(Phase::Hello, "no answer to a probe")),
        }
    }
}

pub(super) fn live(vm: &VmDir) -> Result<Live> {
    Live::load(vm)?.ok_or_else(|| Error::Damaged {
        path: vm.live_dir(),
        reason: "the VM runs, but what its disks rest on is not noted".into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_late_round_trip_makes_no_line_endless() {
        let millis = Duration::from_millis;
        let thin = rate_of(PROBE_BYTES, millis(126), millis(100));
        assert!((9.5e6..10.5e6).contains(&thin), "{thin}");
        for took in [millis(99), millis(100)] {
            let fast = rate_of(LONG_PROBE_BYTES, took, millis(100));
            assert!((1e9..20e9).contains(&fast), "{fast}");
        }
    }
}
