//! How quickly a user acts, in the terms of the Keystroke-Level Model (Card, Moran and Newell,
//! "The keystroke-level model for user performance time with interactive systems", CACM 23:7,
//! 1980): K, a key; M, the mental preparation before an action.

use std::fmt;
use std::time::Duration;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// Who is at the keyboard.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Serialize,
    Deserialize,
    ValueEnum,
)]
#[serde(rename_all = "snake_case")]
pub enum User {
    /// Types 150 words a minute, and knows before each step what the next one is: as quick as a
    /// session gets, so that little of it is pauses.
    #[default]
    Practised,
    /// The model's average skilled typist, of 55 words a minute (K is 200 ms), who prepares for
    /// each step where the session has a pause (M is 1.35 s), or as long as the session says.
    Ordinary,
}

impl User {
    /// From one key to the next.
    pub const fn key_spacing(self) -> Duration {
        Duration::from_millis(match self {
            Self::Practised => 80,
            Self::Ordinary => 200,
        })
    }

    /// For how long a key is held; the model has no figure, so it is as much of the spacing.
    pub const fn hold(self) -> Duration {
        Duration::from_millis(match self {
            Self::Practised => 30,
            Self::Ordinary => 75,
        })
    }

    /// How long this user takes where a session says `think`.
    pub fn think(self, said: Duration) -> Duration {
        match self {
            Self::Practised => said,
            Self::Ordinary => said.max(Duration::from_millis(1350)),
        }
    }
}

impl fmt::Display for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Practised => "practised",
            Self::Ordinary => "ordinary",
        })
    }
}
