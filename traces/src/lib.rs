//! The interaction log: what a person did to a desktop, kept small, private and whole.
//!
//! A migration replays this log on a stale copy of the VM, so it has to hold everything that
//! reached the guest's input devices, in order and with its timing, plus what the screen
//! showed when each interaction began. It holds passwords too, so it is encrypted at rest, and
//! neither `Debug` nor any error of this crate prints what was typed.
//!
//! - [`Record`], [`Event`], [`Anchor`]: what is logged.
//! - [`LogWriter`], [`LogReader`], [`Log`]: the file (its layout is in `format.rs`).
//! - [`encode_records`], [`decode_records`]: the same records in one piece, to send.
//! - [`export_json_lines`], [`redact`], [`Summary`], [`interactions`]: what can be done with it.
//!
//! This crate depends on nothing else of the project.

mod anchor;
mod coding;
mod error;
mod event;
mod export;
mod files;
mod format;
mod interaction;
mod key;
mod pack;
mod reader;
mod redact;
mod rhythm;
mod summary;
mod wire;
mod writer;

#[cfg(test)]
mod file_tests;
#[cfg(test)]
mod testing;

pub use anchor::{Match, Pixels, TileMatch};
pub use coding::Limits;
pub use error::Error;
pub use event::{Anchor, Event, GuestTime, Record, Region, memory_of};
pub use export::{Masking, export_json_lines};
pub use format::{Header, LogId};
pub use interaction::{Interaction, interactions};
pub use key::{KeyId, LogKey};
pub use reader::{End, Log, LogReader};
pub use redact::{Redaction, redact, redact_records};
pub use rhythm::Rhythms;
pub use summary::{Counts, Summary};
pub use wire::{decode_records, encode_records};
pub use writer::{LogWriter, Resumed};
