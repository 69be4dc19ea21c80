//! The demo desktop: a plain Debian with a window manager, a terminal, an editor, a file manager, a word processor,
//! a spreadsheet and an image editor, made from packages with mmdebstrap.
//!
//! Why it exists: a migration can only be shown and tested on a desktop that a person could work with, and shipping
//! one as a binary image would be large, stale and opaque. Any other bootable disk works with `vm create`; this one is
//! the default.
//!
//! What it promises:
//! - [`build`] gives the same folder for the same recipe (`guest/recipe/`), at once if it was built before: the cache
//!   is keyed by a BLAKE3 hash of everything that goes in. Several builders at once wait for one of them.
//! - A folder that [`GuestImage::load`] accepts is complete: it appears by one rename, its disk is read-only.
//! - The guest writes [`GuestImage::ready_marker`] to its first serial port when its windows are up and its processor
//!   has come to rest; nobody needs to sleep. Left alone it then stays at rest: no timers, nothing blinks.
//! - It builds as root, and as an ordinary user where user namespaces are allowed.
//!
//! What it does not promise: two builds on different days hold different package updates, and the inodes' change
//! times differ even between two builds of one hour. Sites share a guest by copying it.
//!
//! Sources: mmdebstrap(1), section HOOKS; mke2fs(8), option `-d`; sources.list(5).

mod builder;
mod copy;
mod error;
mod image;
mod mmdebstrap;
mod recipe;
mod sources;

pub use builder::{BuildOptions, Progress, build, default_cache};
pub use error::GuestError;
pub use image::{GuestImage, Screen};
