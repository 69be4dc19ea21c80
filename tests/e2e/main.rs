//! Through the command line, with real guests: what a person would see.
//!
//! All share one guest from the cache, booted once. Each has sites of its own in a temporary
//! folder, and leaves no process behind, also when it fails.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "what can't go on fails the test"
)]

mod at_rest;
mod bad_input;
mod bench;
mod capture;
mod common;
mod follow;
mod fresh_qemu;
mod generations;
mod harmless;
mod help;
mod hub;
mod interrupt;
mod live;
mod ownership;
mod pause;
mod permissions;
mod post_copy;
mod resume;
mod roam;
mod state;
mod sync;
