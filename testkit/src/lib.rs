//! What end-to-end tests, benchmarks and the demonstration are made of, and no user needs.
//!
//! - [`link`]: a thin line, as a TCP proxy.
//! - [`robot`]: a person at a VNC viewer; [`session`]: what that person does.

pub mod link;
pub mod robot;
pub mod session;
