//! The `replay-migrate` command.

fn main() {}
