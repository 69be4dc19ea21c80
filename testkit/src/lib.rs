//! testkit
pub mod link;
