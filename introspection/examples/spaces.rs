//! The processes in a guest's RAM: `cargo run -p introspection --example spaces -- RAM`

#![allow(clippy::unwrap_used)] // A tool for looking may end where it cannot go on.

use introspection::{Linux, Physical, address_spaces};

fn main() {
    let path = std::env::args().nth(1).unwrap();
    let ram = std::fs::read(path).unwrap();
    let begun = std::time::Instant::now();
    let linux = Linux::find(Physical::new(&ram)).unwrap();
    println!("Linux {} after {:?}", linux.release(), begun.elapsed());
    for space in address_spaces(&linux) {
        println!(
            "{:7} pages  {} #{}",
            space.pages.len(),
            String::from_utf8_lossy(&space.name),
            space.ordinal
        );
    }
    println!("after {:?}", begun.elapsed());
}
