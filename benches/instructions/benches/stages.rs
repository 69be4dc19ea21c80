//! Instructions of each stage, by Callgrind: the same in every run to some in ten thousand,
//! whatever else the machine does.

#![allow(missing_docs)] // The macros document nothing.

use std::hint::black_box;

use gungraun::Callgrind;
use gungraun::prelude::*;
use instructions::{Asked, States, asked, encode, holdings, offer, states, tree};
use reconciler::{
    Applier, ApplyOptions, Codec, Effort, ImageTree, Offer, PageChunk, SlicePages, SlicePagesMut,
    resolve,
};

fn encoded_tree() -> Vec<u8> {
    states().source_tree.encode()
}

fn encoded_offer() -> (Vec<u8>, u64) {
    let states = states();
    let pages = states.source_tree.pages();
    (offer(&states).encode().expect("it fits"), pages)
}

fn chunks() -> (Asked, Vec<PageChunk>, Vec<u8>) {
    let asked = asked();
    let chunks = encode(&asked, Codec::Zstd(3));
    let image = asked.states.base.clone();
    (asked, chunks, image)
}

#[library_benchmark]
#[bench::of_16_mib(setup = states)]
fn build_tree(states: States) -> ImageTree {
    black_box(tree(&states.source))
}

#[library_benchmark]
#[bench::of_16_mib(setup = states)]
fn differing(states: States) -> u64 {
    black_box(states.source_tree.differing(&states.base_tree).len())
}

#[library_benchmark]
#[bench::of_16_mib(setup = states)]
fn encode_tree(states: States) -> Vec<u8> {
    black_box(states.source_tree.encode())
}

#[library_benchmark]
#[bench::of_16_mib(setup = encoded_tree)]
fn decode_tree(bytes: Vec<u8>) -> u64 {
    let pages = 16 << 8;
    black_box(
        ImageTree::decode(&bytes, pages)
            .expect("it was just encoded")
            .pages(),
    )
}

#[library_benchmark]
#[bench::of_16_mib(setup = states)]
fn make_offer(states: States) -> Vec<u8> {
    black_box(offer(&states).encode().expect("it fits"))
}

#[library_benchmark]
#[bench::of_16_mib(setup = encoded_offer)]
fn decode_offer((bytes, pages): (Vec<u8>, u64)) -> u64 {
    black_box(
        Offer::decode(&bytes, pages)
            .expect("it was just encoded")
            .distinct(),
    )
}

#[library_benchmark]
#[bench::of_16_mib(setup = asked)]
fn resolve_offer(asked: Asked) -> u64 {
    let pages = SlicePages(&asked.states.base);
    let resolution = resolve(&asked.offer, &holdings(&asked.states, &pages));
    black_box(resolution.expect("the same base").lacking())
}

#[library_benchmark]
#[bench::zstd_1(args = (Codec::Zstd(1)), setup = with)]
#[bench::zstd_3(args = (Codec::Zstd(3)), setup = with)]
#[bench::lzma_fast(args = (Codec::Lzma(Effort::Fast)), setup = with)]
fn encode_pages((asked, codec): (Asked, Codec)) -> Vec<PageChunk> {
    black_box(encode(&asked, codec))
}

fn with(codec: Codec) -> (Asked, Codec) {
    (asked(), codec)
}

#[library_benchmark]
#[bench::zstd_3(setup = chunks)]
fn apply((asked, chunks, mut image): (Asked, Vec<PageChunk>, Vec<u8>)) -> u64 {
    let base = SlicePages(&asked.states.base);
    let holdings = holdings(&asked.states, &base);
    let mut image = SlicePagesMut(&mut image);
    let options = ApplyOptions::default();
    let applier = Applier::new(
        &asked.offer,
        asked.resolution,
        &holdings,
        &mut image,
        &options,
    );
    let mut applier = applier.expect("the same base");
    for chunk in &chunks {
        applier.push(chunk).expect("they were just encoded");
    }
    black_box(
        applier
            .finish()
            .expect("all of them are there")
            .touched()
            .len(),
    )
}

library_benchmark_group!(
    name = hashing,
    benchmarks = [build_tree, differing, encode_tree, decode_tree]
);
library_benchmark_group!(
    name = exchange,
    benchmarks = [make_offer, decode_offer, resolve_offer]
);
library_benchmark_group!(
    name = compressing,
    // Reading, comparing and compressing have threads of their own, which begin here.
    config = LibraryBenchmarkConfig::default().tool(Callgrind::with_args([
        "cache-sim=no",
        "toggle-collect=*thread_start*"
    ])),
    benchmarks = [encode_pages]
);
library_benchmark_group!(name = applying, benchmarks = [apply]);
main!(
    config = LibraryBenchmarkConfig::default().tool(Callgrind::with_args(["cache-sim=no"])),
    library_benchmark_groups = [hashing, exchange, compressing, applying]
);
