//! What end-to-end tests, benchmarks and the demonstration are made of, and no user needs.
//!
//! - [`ablation`]: what replays of the suite are worth, as a table and a plot.
//! - [`link`]: a thin line, as a TCP proxy.
//! - [`qmp`]: a QEMU, asked directly.
//! - [`robot`]: a person at a VNC viewer; [`session`]: what that person does.
//! - [`site`]: sites, driven through the command line; [`suite`]: a session recorded at one.
//! - [`workload`]: programs that keep a guest busy.

pub mod ablation;
pub mod link;
pub mod qmp;
pub mod robot;
pub mod session;
pub mod site;
pub mod suite;
pub mod workload;
