//! What every way of reconciling costs on a captured session, in bytes, seconds and memory.
//!
//! A capture (`replay-migrate capture`) is a folder with the states `base`, `source`, `replayed`
//! and perhaps `twin`, each of which holds `ram.img`, `disk.img` (`disk1.img` and so on for
//! more) and `device.bin`. [`reconcile`] brings each image from what a target would hold to what
//! the source has, in the order and with the places to look in that a migration has, and
//! compares the result byte for byte: a figure from here is of a state that arrived.
//!
//! | strategy | the target begins with | and looks in | the source has besides |
//! |---|---|---|---|
//! | `full` | nothing | what came before | |
//! | `base` | the base | the base, disks for RAM | the base |
//! | `replay` | its replay | the same | the base |
//! | `twin` | its replay, in the source's layout | the same | the base and its own replay |
//!
//! The delta codecs of the papers are run on the pages that `base` sends ([`DeltaRow`]).
//! For a Linux guest comes what each kind of its RAM's pages takes ([`KindRow`]).
//!
//! Over a line of a given rate both ends work at once, and the whole pipeline is timed ([`Pace`]).
//!
//! Not promised: seconds that hold on another machine, or beside other work.

mod deltas;
mod diverged;
mod error;
mod kinds;
mod kinds_table;
mod measure;
mod memory;
mod pace;
mod report;
mod run;
mod states;
mod told;

pub use deltas::DeltaRow;
pub use diverged::Diverged;
pub use error::Error;
pub use kinds::{KindPages, KindRow, KindWay, TOGETHER};
pub use kinds_table::kinds_table;
pub use measure::{Options, reconcile};
pub use pace::{Pace, Yardsticks, rate_name, rate_of};
pub use reconciler::Codec;
pub use report::{
    Bytes, Named, Report, Row, Seconds, Strategy, codec_of, name_of, named, usual_codecs,
};
