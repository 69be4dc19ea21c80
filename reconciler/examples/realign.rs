//! What realigning does for a captured session, before anything is sent:
//!
//! `cargo run --release -p reconciler --example realign -- BASE SOURCE REPLAYED TWIN [OUT]`
//!
//! OUT is a folder for the realigned images.

#![allow(clippy::unwrap_used)] // A tool for measuring may end where it cannot go on.

use std::time::Instant;

use introspection::{Linux, Physical, address_spaces};
use reconciler::{ImageTree, Layout, Processes, SlicePages, Space, no_progress};

fn spaces(ram: &[u8]) -> Vec<Space> {
    let linux = Linux::find(Physical::new(ram)).unwrap();
    address_spaces(&linux)
        .into_iter()
        .map(|space| Space {
            key: space.key(),
            pages: space.pages,
        })
        .collect()
}

fn main() {
    let mut paths: Vec<_> = std::env::args().skip(1).collect();
    let out = (paths.len() > 4).then(|| paths.remove(4));
    let images: Vec<Vec<u8>> = paths
        .iter()
        .map(|path| std::fs::read(path).unwrap())
        .collect();
    let trees: Vec<_> = images
        .iter()
        .map(|ram| ImageTree::build(&SlicePages(ram), &no_progress).unwrap())
        .collect();
    let begun = Instant::now();
    let spaces: Vec<_> = images.iter().map(|ram| spaces(ram)).collect();
    println!("processes after {:?}", begun.elapsed());
    let processes = |at: usize| Processes {
        ram: &images[at],
        tree: &trees[at],
        spaces: &spaces[at],
    };
    let begun = Instant::now();
    let (layout, twin) = Layout::between(processes(1), processes(3), &trees[0]);
    let encoded = layout.encode().unwrap();
    println!(
        "{} pages, {} landmarks, {} bytes, after {:?}",
        layout.pages(),
        layout.landmarks(),
        encoded.len(),
        begun.elapsed()
    );
    let begun = Instant::now();
    let layout = Layout::decode(&encoded, trees[0].pages()).unwrap();
    let replayed = layout.realign(processes(2), &trees[0]);
    println!("realigned after {:?}", begun.elapsed());
    for (name, at, pages) in [("twin", 3, &twin), ("replayed", 2, &replayed)] {
        let (mut same, mut near, mut before) = (0, 0, 0);
        for (index, page) in pages {
            let range = index.0 as usize * 4096..(index.0 as usize + 1) * 4096;
            let wrong = |other: &[u8]| {
                let words = |bytes| <[u8]>::as_chunks::<8>(bytes).0;
                let source = words(&images[1][range.clone()]);
                source
                    .iter()
                    .zip(words(other))
                    .filter(|(a, b)| a != b)
                    .count()
            };
            same += usize::from(wrong(&**page) == 0);
            near += usize::from(wrong(&**page) < 64);
            before += usize::from(wrong(&images[at][range.clone()]) < 64);
        }
        println!(
            "{name}: {} pages, {same} right, {near} with fewer than 64 words wrong, {before} before",
            pages.len()
        );
        if let Some(out) = &out {
            let mut ram = images[at].clone();
            for (index, page) in pages {
                let start = index.0 as usize * 4096;
                ram[start..start + 4096].copy_from_slice(&**page);
            }
            std::fs::write(format!("{out}/{name}.img"), ram).unwrap();
        }
    }
}
