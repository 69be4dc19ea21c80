//! What the targets and the generator of their seeds agree on.

/// The protocol that the seeds of `conversation` speak.
pub const VERSION: u16 = 6;

/// Bytes of the disk that the agent of `conversation` has: zeros.
pub const DISK: usize = 1 << 16;
