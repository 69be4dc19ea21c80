//! What the pages of a guest's RAM are used for, and of those that differ from another RAM:
//! `cargo run --release -p introspection --example kinds -- RAM [OTHER]...`

#![allow(clippy::unwrap_used)] // A tool for looking may end where it cannot go on.

use std::fmt::Display;

use introspection::Physical;
use introspection::kinds::{self, ByKind};

fn main() {
    let mut paths = std::env::args().skip(1);
    let ram = std::fs::read(paths.next().unwrap()).unwrap();
    let begun = std::time::Instant::now();
    let Some(found) = kinds::classify(Physical::new(&ram)) else {
        println!("no Linux that says what its pages are");
        return;
    };
    let taken = begun.elapsed();
    let totals = found.totals();
    let others: Vec<_> = paths
        .map(|path| found.differing(&ram, &std::fs::read(path).unwrap()))
        .collect();
    let line = |name: &dyn Display, counts: Vec<u64>| {
        print!("{name:14}");
        for pages in counts {
            print!(" {pages:>9}");
        }
        println!();
    };
    println!("kind                 all  and how many pages differ");
    for (kind, pages) in totals.iter() {
        let differing = others.iter().map(|other| other[kind]);
        line(&kind, [*pages].into_iter().chain(differing).collect());
    }
    let sums = [&totals].into_iter().chain(&others);
    let sum = |counts: &ByKind<u64>| counts.iter().map(|(_, pages)| pages).sum();
    line(&"together", sums.map(sum).collect());
    println!("after {taken:?}");
}
