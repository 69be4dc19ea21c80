//! Virtual machines on this host.
//!
//! Why: moving a running desktop needs its parts in our hands. RAM is a file that both QEMU and
//! we map ([`ram`]), disks are chains of qcow2 overlays that we read and write ([`disk`]), and
//! what is left, the device state, goes through a socket as an array of bytes
//! ([`Vm::save_device_state`]). How QEMU is made to do this is in [`Vm`]; what this host can do
//! at all, in [`probe`]. Folders that the kernel encrypts are [`fscrypt`]'s.
//!
//! Promises: a QEMU outlives us and is found again ([`Vm::attach`]); one that dies says why in
//! the error; a guest started from equal [`Hardware`] loads the other's state. QEMU 7.2 to 10.x.
//!
//! No goals: the network between sites, generations and their files; recording and replay.

pub mod ahead;
pub mod alarm;
mod arriving;
mod clock;
mod command_line;
mod counted;
mod device_state;
pub mod disk;
mod error;
pub mod fscrypt;
mod hardware;
mod input;
pub mod keys;
mod merge;
pub mod nbd;
pub mod probe;
mod process;
pub mod programs;
mod qmp;
pub mod ram;
mod runtime;
pub mod screen;
mod screenshot;
mod serial;
mod snapshot;
mod start;
mod vcpus;
mod vm;

pub use clock::{GuestClock, KEY_DELAY};
pub use device_state::DEVICE_STATE_MAX;
pub use error::{Error, Result};
pub use hardware::{Accelerator, Boot, DISKS_MAX, Hardware, Launch, Network};
pub use input::Input;
pub use merge::Merge;
pub use process::Death;
pub use ram::{RamMap, RamMapMut, clear_ram};
pub use vcpus::Vcpus;
pub use vm::{Status, Vm};

/// Bytes a unix socket's path may have: `sun_path` of `unix(7)` less its final zero.
pub const SOCKET_PATH_MAX: usize = 107;
