//! Records what a person does to a desktop, while they do it.
//!
//! Why: a migration replays the user's input at the other site in place of sending what it
//! changed. So all of it has to be known, as the guest got it, with its timing and with what the
//! screen showed when each interaction began.
//!
//! - [`Recorder`] stands between any VNC viewer and QEMU's VNC server. What a viewer says is
//!   parsed in full and forwarded as it came ([`ClientCodec`]); what QEMU says is not looked at.
//! - [`evdev`] takes input at the machine itself, where a thin client has no viewer.
//!
//! Promises: an event is logged if and only if it was handed to QEMU, and in that order; one
//! viewer can't disturb another; recording adds far less than a millisecond to an event. Typed
//! text appears in no error, `Debug` output or trace.
//!
//! No goals: viewers with passwords or TLS (the socket is local), relative pointers (the VM has
//! a tablet), ExtendedMouseButtons (QEMU has none), keyboards laid out by QEMU's `-k`, more than
//! some 300 keys within three seconds (QEMU passes on one in 10 ms and forgets what piles up).

#[cfg(test)]
mod codec_tests;

mod anchors;
mod codec;
pub mod evdev;
mod events;
mod handshake;
mod journal;
mod keyboard;
mod keysym;
mod listen;
mod messages;
mod proxy;
mod recorder;
mod stats;

pub use codec::{ClientCodec, DecodeError, Framed};
pub use handshake::HandshakeError;
// For `fuzz/`: it reads what another program says.
#[doc(hidden)]
pub use handshake::approach;
pub use journal::{Clock, RecordSink, SinkClosed};
pub use listen::Listen;
pub use messages::{CUT_TEXT_MAX, ClientMessage, Malformed};
pub use recorder::{Held, Recorder, RecorderConfig, RecorderError, RecorderHandle};
pub use stats::{Histogram, Statistics};
