//! reconciler
mod answer;
mod error;
mod offer;
mod page;
mod page_set;
mod resolve;
mod tree;
mod tree_codec;
mod wire;
pub use error::Error;
pub use offer::*;
pub use page::*;
pub use page_set::PageSet;
pub use resolve::*;
pub use tree::*;
pub use wire::*;
