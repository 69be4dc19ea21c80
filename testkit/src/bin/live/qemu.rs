//! QEMU's own migration of the same guest over the same line: its RAM and devices, no disk.
//!
//! The source is the QEMU that runs the VM at its site; a second one waits for it behind the
//! thin line. A way that does not end by itself is ended as an operator would: the guest is
//! stopped, and the rest goes over.

use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use serde_json::{Value, json};
use testkit::link::{Link, LinkProfile};
use testkit::qmp::{Qmp, port_of};
use testkit::robot::VncAddr;
use testkit::site::{Site, newest_generation};
use vm_host::disk::{Format, create_overlay};
use vm_host::{Accelerator, Hardware, Launch, Network, Vm};

use crate::VM;
use crate::rows::{Row, Way};

/// All of it, whatever the way.
const LIMIT: Duration = Duration::from_secs(3600);
/// Until the guest runs at the target, when the source says that it is done.
const RESUME_LIMIT: Duration = Duration::from_secs(60);
/// QEMU takes 1 if it is not told; this is what ours takes for rounds.
const ZSTD_LEVEL: u32 = 3;
const CHANNELS: u32 = 2;
/// Four times what QEMU takes if it is not told: the whole working set fits.
const XBZRLE_CACHE: u64 = 256 << 20;

fn settings(way: Way) -> (Vec<&'static str>, Value, String) {
    match way {
        Way::QemuXbzrle => (
            vec!["xbzrle"],
            json!({ "xbzrle-cache-size": XBZRLE_CACHE }),
            format!("cache {} MiB", XBZRLE_CACHE >> 20),
        ),
        Way::QemuMultifdZstd => (
            vec!["multifd"],
            json!({
                "multifd-compression": "zstd",
                "multifd-zstd-level": ZSTD_LEVEL,
                "multifd-channels": CHANNELS,
            }),
            format!("level {ZSTD_LEVEL}, {CHANNELS} channels"),
        ),
        _ => (Vec::new(), json!({}), String::new()),
    }
}

/// Migrates the VM that runs at a site to a QEMU behind a thin line; neither goes on afterwards.
pub(crate) async fn measure(
    site: &Site,
    workload: &str,
    way: Way,
    profile: LinkProfile,
    patience: Duration,
    scratch: &Path,
) -> anyhow::Result<Row> {
    let status = site.status(VM).await?;
    let hardware: Hardware = serde_json::from_value(status["hardware"].clone())
        .context("the VM's hardware is not understood")?;
    let VncAddr::Unix(vnc) = site.vnc(VM).await? else {
        bail!("the VM has no runtime folder");
    };
    let runtime = vnc.parent().context("the VM has no runtime folder")?;
    let source = Vm::attach(runtime).await?.context("the VM does not run")?;
    let clock = source.clock_qmp_socket().to_owned();
    drop(source);

    let folder = tempfile::tempdir_in(scratch).context("cannot make a folder")?;
    // Sockets have short paths.
    let sockets = tempfile::tempdir().context("cannot make a folder for QEMU")?;
    let ram = sockets.path().join("ram.img");
    std::fs::File::create(&ram)
        .and_then(|file| file.set_len(hardware.memory_bytes()))
        .context("cannot make the target's RAM")?;
    let (_, generation) = newest_generation(site.dir(), VM)?;
    let overlay = folder.path().join("disk0.qcow2");
    create_overlay(&overlay, &generation.join("disk0.qcow2"), Format::Qcow2)?;
    let target = Launch {
        name: "bench-live".to_owned(),
        hardware,
        boot: None,
        accelerator: Accelerator::Auto,
        runtime_dir: sockets.path().join("qemu"),
        ram,
        disks: vec![overlay],
        arriving: Vec::new(),
        network: Network::Unplugged,
        incoming: true,
    };
    // A QEMU outlives whoever starts it: from here to its end nothing returns early.
    let target = Vm::start(&target).await?;
    let moving = migrate(&clock, &target, way, profile, patience);
    let moved = tokio::time::timeout(LIMIT, moving).await;
    target.kill().await?;
    let (mut row, note) = moved.context("QEMU's migration does not end")??;
    workload.clone_into(&mut row.workload);
    row.note = note;
    Ok(row)
}

async fn migrate(
    clock: &Path,
    target: &Vm,
    way: Way,
    profile: LinkProfile,
    patience: Duration,
) -> anyhow::Result<(Row, String)> {
    let mut here = Qmp::connect(clock).await?;
    let mut there = Qmp::connect(target.clock_qmp_socket()).await?;
    let (wanted, parameters, note) = settings(way);
    let mut capabilities = vec![
        json!({ "capability": "events", "state": true }),
        // On where this project moves a VM: there the RAM has ways of its own.
        json!({ "capability": "x-ignore-shared", "state": false }),
    ];
    let more = wanted.iter();
    capabilities.extend(more.map(|name| json!({ "capability": name, "state": true })));
    for end in [&mut here, &mut there] {
        let all = json!({ "capabilities": capabilities });
        end.ask("migrate-set-capabilities", all).await?;
        end.ask("migrate-set-parameters", parameters.clone())
            .await?;
    }
    let fast = json!({ "max-bandwidth": 1_u64 << 40 });
    here.ask("migrate-set-parameters", fast).await?;
    let anywhere = json!({ "uri": "tcp:127.0.0.1:0" });
    there.ask("migrate-incoming", anywhere).await?;
    let listening = there.ask("query-migrate", json!({})).await?;
    let port = port_of(&listening).context("QEMU does not say where it listens")?;
    let link = Link::start(SocketAddr::from(([127, 0, 0, 1], port)), profile)
        .context("cannot lay a line between the two")?;

    let mut forced = None;
    if way == Way::QemuStopped {
        here.ask("stop", json!({})).await?;
        forced = Some(Instant::now());
    }
    let began = Instant::now();
    let uri = json!({ "uri": format!("tcp:{}", link.addr()) });
    here.ask("migrate", uri).await?;
    let (mut stopped, mut second_pass) = (None, None);
    loop {
        let event = tokio::time::timeout(Duration::from_secs(1), here.event()).await;
        let Ok(event) = event else {
            if passes(&mut here).await? >= 2 {
                second_pass.get_or_insert_with(Instant::now);
            }
            let late = second_pass.is_some_and(|since: Instant| since.elapsed() > patience);
            if late && forced.is_none() {
                here.ask("stop", json!({})).await?;
                forced = Some(Instant::now());
            }
            continue;
        };
        let event = event?;
        match (event["event"].as_str(), event["data"]["status"].as_str()) {
            (Some("STOP"), _) => stopped = stamp(&event),
            (Some("MIGRATION"), Some("completed")) => break,
            (Some("MIGRATION"), Some("failed" | "cancelled")) => bail!("QEMU's migration failed"),
            _ => {}
        }
    }
    let downtime = if let Some(forced) = forced {
        there.migrated().await?;
        forced.elapsed().as_secs_f64()
    } else {
        let resumed = async {
            // Like any QEMU here it was started to wait for that word.
            there.migrated().await?;
            there.ask("cont", json!({})).await?;
            loop {
                let event = there.event().await?;
                if event["event"] == "RESUME" {
                    return anyhow::Ok(stamp(&event));
                }
            }
        };
        let resumed = tokio::time::timeout(RESUME_LIMIT, resumed).await;
        let resumed = resumed.context("the guest does not run at the target")??;
        resumed.context("no time")? - stopped.context("the source did not stop")?
    };
    let seconds = began.elapsed().as_secs_f64();
    let row = Row {
        workload: String::new(),
        way,
        bytes: link.bytes_up() + link.bytes_down(),
        seconds,
        downtime,
        converged: forced.is_none() || way == Way::QemuStopped,
        rounds: passes(&mut here).await?,
        dirty_bytes: None,
        sent_for_dirty: None,
        note: String::new(),
    };
    let note = match (forced, way) {
        (Some(_), way) if way != Way::QemuStopped => {
            let waited = format!("stopped {} s after its first pass", patience.as_secs());
            if note.is_empty() {
                waited
            } else {
                format!("{note}; {waited}")
            }
        }
        _ => note,
    };
    Ok((row, note))
}

/// How often QEMU has gone over the guest's memory.
async fn passes(qmp: &mut Qmp) -> anyhow::Result<u64> {
    let info = qmp.ask("query-migrate", json!({})).await?;
    Ok(info["ram"]["dirty-sync-count"].as_u64().unwrap_or_default())
}

/// When an event took place, in seconds.
fn stamp(event: &Value) -> Option<f64> {
    let time = &event["timestamp"];
    Some(time["seconds"].as_f64()? + time["microseconds"].as_f64()? / 1e6)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_of_an_event_is_read() {
        let event = json!({ "timestamp": { "seconds": 5, "microseconds": 250_000 } });
        assert_eq!(stamp(&event), Some(5.25));
        assert_eq!(stamp(&json!({})), None);
    }
}
