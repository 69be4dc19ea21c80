//! What a device state tells of the machine that it is of: a capture does not keep its hardware.
//!
//! The format is QEMU's migration stream (`migration/savevm.c`): a head, the configuration with
//! the machine's type, sections, and at the end a description of all devices in JSON.

use anyhow::{Context as _, ensure};
use serde::Deserialize;

const MAGIC: &[u8] = b"QEVM\0\0\0\x03";
const CONFIGURATION: u8 = 7;
const DESCRIPTION: u8 = 6;
/// No description comes near this.
const DESCRIPTION_MAX: usize = 16 << 20;

/// A machine, as far as device state must fit it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Machine {
    /// Its type, as `pc-q35-7.2`.
    pub(super) name: String,
    pub(super) cpus: u8,
    pub(super) network: bool,
    pub(super) disks: usize,
}

#[derive(Deserialize)]
struct Description {
    devices: Vec<Device>,
}

#[derive(Deserialize)]
struct Device {
    name: String,
}

/// Reads the machine out of its device state.
pub(super) fn machine_of(state: &[u8]) -> anyhow::Result<Machine> {
    let name = machine_type(state).context("the device state has no machine type")?;
    let description = description(state).context("the device state does not describe itself")?;
    let description: Description = serde_json::from_slice(description)
        .context("the device state's description is not understood")?;
    let count = |which: fn(&str) -> bool| {
        let devices = description.devices.iter();
        devices.filter(|device| which(&device.name)).count()
    };
    let cpus = count(|name| name == "cpu_common");
    ensure!(cpus > 0, "the device state has no CPU");
    Ok(Machine {
        name: name.to_owned(),
        cpus: cpus
            .try_into()
            .context("the device state has too many CPUs")?,
        network: count(|name| name.ends_with("/virtio-net")) > 0,
        disks: count(|name| name.ends_with("/virtio-blk")),
    })
}

fn machine_type(state: &[u8]) -> Option<&str> {
    let (kind, rest) = state.strip_prefix(MAGIC)?.split_first()?;
    let (length, rest) = rest.split_first_chunk()?;
    let length = u32::from_be_bytes(*length) as usize;
    let name = rest.get(..length).filter(|_| *kind == CONFIGURATION)?;
    str::from_utf8(name).ok()
}

/// What the last section holds, which says how long it is and ends where the state does.
fn description(state: &[u8]) -> Option<&[u8]> {
    let head = 1 + size_of::<u32>();
    let from = state.len().saturating_sub(DESCRIPTION_MAX);
    (from..state.len().checked_sub(head)?).rev().find_map(|at| {
        let length = u32::from_be_bytes(state.get(at + 1..at + head)?.try_into().ok()?);
        let text = &state[at + head..];
        let fits = state[at] == DESCRIPTION && length as usize == text.len();
        (fits && text.first() == Some(&b'{')).then_some(text)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(json: &str) -> Vec<u8> {
        let mut state = MAGIC.to_vec();
        state.push(CONFIGURATION);
        state.extend(10_u32.to_be_bytes());
        state.extend(b"pc-q35-7.2");
        state.extend(b"\x04 sections \x00");
        state.push(DESCRIPTION);
        state.extend((json.len() as u32).to_be_bytes());
        state.extend(json.as_bytes());
        state
    }

    #[test]
    fn the_machine_is_read() {
        let devices = ["timer", "cpu_common", "cpu", "0000:00:04.0/virtio-net"];
        let more = ["cpu_common", "0000:00:08.0/virtio-blk"];
        let devices: Vec<_> = devices.iter().chain(&more).collect();
        let devices: Vec<_> = devices
            .iter()
            .map(|name| serde_json::json!({ "name": name, "instance_id": 0 }))
            .collect();
        let json = serde_json::json!({ "page_size": 4096, "devices": devices }).to_string();
        let expected = Machine {
            name: "pc-q35-7.2".to_owned(),
            cpus: 2,
            network: true,
            disks: 1,
        };
        assert_eq!(machine_of(&state(&json)).unwrap(), expected);
    }

    #[test]
    fn what_is_no_device_state_is_refused() {
        let good = state(r#"{"devices":[{"name":"cpu_common"}]}"#);
        assert!(machine_of(&good).is_ok());
        assert!(machine_of(&good[..good.len() - 1]).is_err());
        assert!(machine_of(&good[1..]).is_err());
        assert!(machine_of(&good[..15]).is_err());
        assert!(machine_of(b"").is_err());
        assert!(machine_of(&state(r#"{"devices":[]}"#)).is_err());
        assert!(machine_of(&state("{")).is_err());
    }
}
