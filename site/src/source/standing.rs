//! What who watches is told of a site that follows.

use serde::Serialize;

use crate::report::{MigrationReport, StandbyCost};

/// How to follow.
#[derive(Clone, Copy, Debug)]
pub struct FollowOptions {
    /// Replay here as well, which saves bytes.
    pub twin: bool,
}

/// How the target gets on, for who watches.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "following", rename_all = "snake_case")]
pub enum Standing {
    /// It follows.
    Behind {
        /// Records that it has.
        records: u64,
        /// How long ago that was recorded which it replayed last, in seconds.
        seconds: f64,
        /// Interactions so far that its screen did not match.
        missed: u64,
        /// Bytes sent so far, TLS included.
        sent: u64,
        /// What it costs the target, if that is known there.
        cost: Option<StandbyCost>,
    },
    /// It can't be reached, and is called again.
    Waiting {
        /// Why.
        why: String,
        /// In so many seconds.
        seconds: f64,
    },
}

/// How following ended.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Followed {
    /// Somebody wanted it to end: the VM goes on here.
    Left,
    /// The VM has moved.
    Moved(Box<MigrationReport>),
}
