//! What the pages of a guest's RAM are used for, and of those that differ from another RAM:
//! `cargo run --release -p introspection --example kinds -- RAM [OTHER]...`

#![allow(clippy::unwrap_used)] // A tool for looking may end where it cannot go on.

use std::collections::BTreeMap;
use std::fmt::Display;

use introspection::kinds::{self, ByKind};
use introspection::{Linux, Physical, slabs};

fn main() {
    let mut paths = std::env::args().skip(1);
    let ram = std::fs::read(paths.next().unwrap()).unwrap();
    let begun = std::time::Instant::now();
    let linux = Linux::find(Physical::new(&ram));
    let Some((found, linux)) = linux.and_then(|linux| Some((kinds::of(&linux)?, linux))) else {
        println!("no Linux that says what its pages are");
        return;
    };
    let taken = begun.elapsed();
    let totals = found.totals();
    let others: Vec<_> = paths.map(|path| std::fs::read(path).unwrap()).collect();
    let differing: Vec<_> = others
        .iter()
        .map(|other| found.differing(&ram, other))
        .collect();
    let line = |name: &dyn Display, counts: Vec<u64>| {
        print!("{name:20}");
        for pages in counts {
            print!(" {pages:>9}");
        }
        println!();
    };
    println!("kind                       all  and how many pages differ");
    for (kind, pages) in totals.iter() {
        let differing = differing.iter().map(|counts| counts[kind]);
        line(&kind, [*pages].into_iter().chain(differing).collect());
    }
    let sums = [&totals].into_iter().chain(&differing);
    let sum = |counts: &ByKind<u64>| counts.iter().map(|(_, pages)| pages).sum();
    line(&"together", sums.map(sum).collect());
    println!("after {taken:?}");
    let Some(slabs) = slabs::of(&linux, &found) else {
        return;
    };
    println!("\nof slab pages");
    let mut caches: BTreeMap<&str, Vec<u64>> = BTreeMap::new();
    for page in 0..found.all().len() as u64 {
        let Some(name) = slabs.name(page) else {
            continue;
        };
        let counts = caches
            .entry(name)
            .or_insert_with(|| vec![0; others.len() + 1]);
        counts[0] += 1;
        for (other, count) in others.iter().zip(&mut counts[1..]) {
            *count += u64::from(differs(&ram, other, page as usize));
        }
    }
    let mut caches: Vec<_> = caches.into_iter().collect();
    caches.sort_by_key(|(_, counts)| std::cmp::Reverse(counts.clone()));
    for (name, counts) in caches.into_iter().take(20) {
        line(&name, counts);
    }
    println!("after {:?}", begun.elapsed());
}

fn differs(one: &[u8], other: &[u8], page: usize) -> bool {
    let range = page * 4096..(page + 1) * 4096;
    one.get(range.clone()) != other.get(range)
}
