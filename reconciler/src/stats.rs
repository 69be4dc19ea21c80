//! What a reconciliation did, in pages.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::resolve::PlaceKind;

/// Pages of the new image by the recipe they were built with. Pages that nobody changed since
/// the base are in none of them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageCounts {
    /// Became zero since the base.
    pub zero: u64,
    /// Were at their place already, thanks to replay.
    pub same: u64,
    /// Copied from a place at the target.
    pub moved: BTreeMap<PlaceKind, u64>,
    /// Have the content of another page that was sent.
    pub repeated: u64,
    /// Sent as they are.
    pub literal: u64,
    /// Sent as what differs from the base.
    pub delta: u64,
    /// Made of what replay had made of them, and the words in which the source differs from
    /// its twin.
    pub patched: u64,
    /// Sent as patches that did not fit; then sent anew, and counted as what they were then.
    pub patch_failed: u64,
    /// Made of a patch that did not fit and the lines in which the source still differed.
    pub lines: u64,
    /// Sent as lines that did not fit either; then sent whole, and counted as that.
    pub lines_failed: u64,
    /// Changed by replay alone, and put back.
    pub reverted: u64,
    /// Sent again because a short hash had matched the wrong page.
    pub refetched: u64,
}
