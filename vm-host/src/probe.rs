//! What this host can do.

use crate::Accelerator;

/// The accelerator that works here.
pub(crate) fn accelerator() -> Accelerator {
    Accelerator::Tcg
}
