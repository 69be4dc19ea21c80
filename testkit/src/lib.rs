//! What end-to-end tests, benchmarks and the demonstration are made of, and no user needs.
//!
//! - [`ablation`]: what replays of the suite are worth, as a table and a plot.
//! - [`link`]: a thin line, as a TCP proxy.
//! - [`mounts`]: file systems that only this program sees.
//! - [`preload`]: faults that no real part makes at will.
//! - [`qmp`]: a QEMU, asked directly.
//! - [`robot`]: a person at a VNC viewer; [`session`]: what that person does; [`user`]: how quickly.
//! - [`sector`]: guests that need no operating system.
//! - [`site`]: sites, driven through the command line; [`suite`]: a session recorded at one.
//! - [`tap`]: two sites, listened in on; [`wire`]: what of that is kept as recordings of the wire.
//! - [`workload`]: programs that keep a guest busy.

pub mod ablation;
pub mod link;
pub mod mounts;
pub mod preload;
pub mod qmp;
pub mod robot;
pub mod sector;
pub mod session;
pub mod site;
pub mod suite;
pub mod tap;
pub mod user;
pub mod wire;
pub mod workload;
