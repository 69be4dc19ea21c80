//! Each stage on synthetic guests. `cargo bench -p reconciler` (or with `--profile dev`, which
//! optimises this crate too).

#![allow(clippy::unwrap_used, missing_docs)] // A bench that cannot go on may panic; the macros document nothing.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use reconciler::{
    Applier, ApplyOptions, Codec, Effort, EncodeOptions, Holdings, ImageTree, Known, Offer,
    OfferOptions, PAGE_SIZE, PageIndex, Place, PlaceKind, References, Salt, SlicePages,
    SlicePagesMut, encode_pages, no_progress, resolve,
};

mod synthetic;

use synthetic::{guest, used};

const GUEST_PAGES: usize = 768 << 8;
const SMALL_PAGES: usize = 96 << 8;

fn tree(bytes: &[u8]) -> ImageTree {
    ImageTree::build(&SlicePages(bytes), &no_progress).unwrap()
}

fn hash(c: &mut Criterion) {
    let image = guest(GUEST_PAGES);
    let mut group = c.benchmark_group("hash");
    group
        .sample_size(10)
        .throughput(Throughput::Bytes(image.len() as u64));
    group.bench_function("build tree, 768 MiB", |b| b.iter(|| tree(&image)));
    let built = tree(&image);
    group.throughput(Throughput::Elements(GUEST_PAGES as u64));
    group.bench_function("differing, 768 MiB", |b| {
        let other = tree(&used(&image, 10, 5));
        b.iter(|| built.differing(&other).len());
    });
    group.bench_function("encode tree, 768 MiB", |b| b.iter(|| built.encode().len()));
    let encoded = built.encode();
    group.bench_function("decode tree, 768 MiB", |b| {
        b.iter(|| {
            ImageTree::decode(&encoded, GUEST_PAGES as u64)
                .unwrap()
                .pages()
        });
    });
    group.finish();
}

fn exchange(c: &mut Criterion) {
    let base = guest(GUEST_PAGES);
    let source = used(&base, 5, 77);
    let base_tree = tree(&base);
    let source_tree = tree(&source);
    // 700,000 candidates: the base stands for the disks as well.
    let place = Place {
        kind: PlaceKind::Disk,
        tree: &base_tree,
        reader: &SlicePages(&base),
    };
    let places = [place; 5];
    let holdings = Holdings {
        base: &base_tree,
        base_reader: Some(&SlicePages(&base)),
        current: &base_tree,
        places: &places,
    };
    let options = OfferOptions {
        salt: Salt([9; 32]),
        candidates: holdings.candidates(),
        force_bits: None,
        seek_from: OfferOptions::SEEK_FROM,
    };
    let offer = Offer::new(&source_tree, &base_tree, &options).unwrap();
    let mut group = c.benchmark_group("exchange");
    group.sample_size(10);
    group.throughput(Throughput::Elements(offer.changed().len()));
    group.bench_function("offer", |b| {
        b.iter(|| {
            let offer = Offer::new(&source_tree, &base_tree, &options).unwrap();
            offer.encode().unwrap().len()
        });
    });
    let bytes = offer.encode().unwrap();
    group.bench_function("decode offer", |b| {
        b.iter(|| {
            Offer::decode(&bytes, GUEST_PAGES as u64)
                .unwrap()
                .distinct()
        });
    });
    group.throughput(Throughput::Elements(holdings.candidates()));
    group.bench_function("resolve, 700,000 candidates", |b| {
        b.iter(|| resolve(&offer, &holdings).unwrap().lacking());
    });
    // The source's own replay has all pages where they are, the target's all but one in twenty.
    let known = Known {
        twin: &[&source_tree],
        ..Known::default()
    };
    let knowing = || Offer::knowing(&source_tree, &base_tree, &known, &options).unwrap();
    let offer = knowing();
    let replayed_tree = tree(&used(&source, 20, 78));
    let replayed = Holdings {
        current: &replayed_tree,
        places: &[],
        ..holdings
    };
    group.throughput(Throughput::Elements(offer.changed().len()));
    group.bench_function("offer, with a twin", |b| {
        b.iter(|| knowing().encode().unwrap().len());
    });
    group.bench_function("resolve, nearly as the twin", |b| {
        b.iter(|| resolve(&offer, &replayed).unwrap().lacking());
    });
    group.finish();
}

fn pages(c: &mut Criterion) {
    let base = guest(SMALL_PAGES);
    let source = used(&base, 3, 78);
    let (base_tree, source_tree) = (tree(&base), tree(&source));
    let (base_pages, source_pages) = (SlicePages(&base), SlicePages(&source));
    let holdings = Holdings {
        base: &base_tree,
        base_reader: Some(&base_pages),
        current: &base_tree,
        places: &[],
    };
    let options = OfferOptions {
        salt: Salt([9; 32]),
        candidates: 1 << 20,
        force_bits: None,
        seek_from: OfferOptions::SEEK_FROM,
    };
    let offer = Offer::new(&source_tree, &base_tree, &options).unwrap();
    let resolution = resolve(&offer, &holdings).unwrap();
    let answer = resolution.answer(&offer).unwrap();
    let wanted: Vec<PageIndex> = offer.decode_answer(&answer).unwrap();
    let mut group = c.benchmark_group("pages");
    group
        .sample_size(10)
        .throughput(Throughput::Bytes((wanted.len() * PAGE_SIZE) as u64));
    let references = References::base(Some(&base_pages));
    let codecs = [
        Codec::Zstd(1),
        Codec::Zstd(3),
        Codec::Zstd(9),
        Codec::Lzma(Effort::Fast),
        Codec::Lzma(Effort::Normal),
    ];
    for codec in codecs {
        group.bench_function(format!("encode, {codec:?}"), |b| {
            let how = EncodeOptions { codec, workers: 2 };
            b.iter(|| {
                encode_pages(&source_pages, references, &wanted, how, &mut |_| Ok(()))
                    .unwrap()
                    .bytes()
            });
        });
    }
    let mut chunks = Vec::new();
    let how = EncodeOptions {
        codec: Codec::Zstd(3),
        workers: 2,
    };
    encode_pages(&source_pages, references, &wanted, how, &mut |chunk| {
        chunks.push(chunk);
        Ok(())
    })
    .unwrap();
    group.bench_function("apply", |b| {
        b.iter_batched_ref(
            || base.clone(),
            |image| {
                let mut image = SlicePagesMut(image);
                let options = ApplyOptions::default();
                let mut applier =
                    Applier::new(&offer, resolution.clone(), &holdings, &mut image, &options)
                        .unwrap();
                for chunk in &chunks {
                    applier.push(chunk).unwrap();
                }
                applier.finish().unwrap().touched().len()
            },
            criterion::BatchSize::PerIteration,
        );
    });
    group.finish();
}

criterion_group!(benches, hash, exchange, pages);
criterion_main!(benches);
