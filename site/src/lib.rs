//! A site: the VMs of a host, what is kept of them, and how they come and go.
//!
//! - [`Store`] and [`VmDir`]: the state directory. [`generation`], [`lease`] and [`vm`] are what
//!   lies in it; [`generations`] says what of it may go, [`at_rest`] what of it is encrypted.
//! - [`local`]: VMs made, started, stopped and checkpointed here. [`recording`]: what is typed.
//!   [`moving`]: what a move that was killed has left, put right.
//! - [`identity`], [`peers`], [`transport`]: who the sites are, and how they talk safely.
//! - [`protocol`]: what they say. [`source`] and [`agent`] are the two ends of a migration, in
//!   the phases of [`Phase`]. [`hub`]: what one site holds for others, and can't read.
//!
//! Promises: a generation exists as a whole or not at all; at most one site runs a VM; what
//! arrives is verified before it becomes a state of the VM; before the commit the source can go
//! on as if nothing had happened, and the target is clean after whatever end.

mod admission;
pub mod agent;
mod arriving;
pub mod at_rest;
pub mod booted;
pub mod capture;
pub mod chain;
mod chance;
mod control_socket;
mod disks;
mod error;
mod exchange;
mod files;
mod fork;
pub mod generation;
pub mod generations;
pub mod hub;
pub mod identity;
mod keeper;
mod keys;
mod layout;
pub mod lease;
mod leftovers;
mod line;
pub mod local;
pub mod moving;
mod ownership;
pub mod peers;
pub mod phase;
pub mod plan;
pub mod progress;
pub mod protocol;
pub mod recording;
pub mod redaction;
pub mod replaying;
pub mod report;
mod resuming;
pub mod retention;
pub mod source;
mod state;
mod store;
mod target;
pub mod transport;
pub mod vm;
mod work;

pub use error::{Class, Error, chain_of};
pub use lease::Lease;
pub use phase::Phase;
pub use progress::{Progress, Silent};
pub use store::{Store, VmDir, runtime_base};
