//! One strategy run, image by image, and each result compared with the source.

use std::path::Path;
use std::time::Instant;

use reconciler::{
    ApplyOptions, Codec, EncodeOptions, Governor, Holdings, Image, ImageTree, Known, OfferOptions,
    Overlaid, Overlapped, PAGE_SIZE, Place, PlaceKind, ReadPages, Salt, SlicePages, SlicePagesMut,
    Source, Stats, pages_for, reconcile_in_memory, reconcile_overlapped,
};

use crate::error::{Error, Result};
use crate::kinds::{Asked, Done, Kinds};
use crate::memory::peak;
use crate::pace::{Pace, Took, processor_time};
use crate::report::{Bytes, Row, Seconds, Strategy, name_of};
use crate::states::{Scratch, State, first_difference, tree_of};
use crate::told::Told;

/// Any will do where nobody makes pages that collide; the same each time, so that figures are.
const SALT: Salt = Salt([7; 32]);
/// Threads of zstd, as a migration has them.
const WORKERS: u32 = 2;

/// What an image of a state is called.
pub(crate) fn disk_name(index: usize) -> String {
    match index {
        0 => "disk".to_owned(),
        more => format!("disk{more}"),
    }
}

/// How the pages of an image are compressed and sent.
#[derive(Clone, Copy)]
enum How<'a> {
    /// With one codec, both ends in turn.
    Codec(Codec),
    /// Over a line of so many bits a second.
    Line(u64, &'a Governor),
}

/// One strategy, run on all images of a source.
pub(crate) struct Run<'a> {
    pub(crate) strategy: Strategy,
    pub(crate) source: &'a State,
    /// What both hold.
    pub(crate) base: Option<&'a State>,
    /// What the target builds on.
    pub(crate) begins: Option<&'a State>,
    pub(crate) realigned: Option<Told>,
}

/// One image of both.
struct Task<'a> {
    image: &'a dyn ReadPages,
    tree: &'a ImageTree,
    base: Option<(&'a dyn ReadPages, &'a ImageTree)>,
    current: Option<&'a ImageTree>,
    places: Vec<Place<'a>>,
    /// Images that both hold besides the base.
    shared: Vec<&'a ImageTree>,
    twin: Option<&'a dyn ReadPages>,
    /// What the source's replay made of this image, for saying what the target lacks.
    twins: Vec<&'a ImageTree>,
}

impl Run<'_> {
    /// All images, in the order in which a migration sends them.
    pub(crate) fn all(
        &self,
        codec: Codec,
        kinds: Option<&mut Kinds>,
        on_row: &mut dyn FnMut(Row),
    ) -> Result<()> {
        let how = How::Codec(codec);
        on_row(self.device(how)?);
        for index in 0..self.source.disks.len() {
            on_row(self.disk(how, index)?);
        }
        on_row(self.ram(how, kinds)?);
        Ok(())
    }

    /// The same over a line, so many times; the median of each image.
    pub(crate) fn paced(&self, rate: u64, runs: usize, on_row: &mut dyn FnMut(Row)) -> Result<()> {
        let mut images: Vec<Vec<Row>> = Vec::new();
        for _ in 0..runs {
            // What is learned from one image is good for the next, as in a migration.
            let governor = Governor::for_line(rate, WORKERS);
            let how = How::Line(rate, &governor);
            let mut rows = vec![self.device(how)?];
            for index in 0..self.source.disks.len() {
                rows.push(self.disk(how, index)?);
            }
            rows.push(self.ram(how, None)?);
            images.resize(rows.len(), Vec::new());
            images
                .iter_mut()
                .zip(rows)
                .for_each(|(image, row)| image.push(row));
        }
        let total = |row: &Row| row.pace.as_ref().map_or(0.0, |pace| pace.total);
        for mut rows in images {
            rows.sort_by(|a, b| total(a).total_cmp(&total(b)));
            let mut median = rows.swap_remove(rows.len() / 2);
            if let Some(pace) = &mut median.pace {
                pace.runs = runs;
            }
            on_row(median);
        }
        Ok(())
    }

    fn device(&self, how: How<'_>) -> Result<Row> {
        let image = SlicePages(&self.source.device);
        let base = self
            .base
            .map(|base| (SlicePages(&base.device), &base.device_tree));
        let told = self.realigned.as_ref().map(|told| &told.device);
        let mut built = match (told, self.begins) {
            (Some(told), _) => told.begins.clone(),
            (None, Some(begins)) => begins.device.clone(),
            (None, None) => Vec::new(),
        };
        built.resize(self.source.device.len(), 0);
        let twin = told.map(|told| (SlicePages(&told.twin), &told.twin_tree));
        let task = Task {
            image: &image,
            tree: &self.source.device_tree,
            base: base.as_ref().map(|(image, tree)| (image as _, *tree)),
            current: told
                .map(|told| &told.tree)
                .or(self.begins.map(|begins| &begins.device_tree)),
            places: Vec::new(),
            shared: Vec::new(),
            twin: twin.as_ref().map(|(image, _)| image as _),
            twins: twin.iter().map(|(_, tree)| *tree).collect(),
        };
        let mut row = self.run(
            "device".to_owned(),
            how,
            task,
            &mut SlicePagesMut(&mut built),
            None,
        )?;
        if let Some(told) = told {
            row.add_layout(told.bytes, &told.seconds);
        }
        Ok(row)
    }

    fn disk(&self, how: How<'_>, index: usize) -> Result<Row> {
        let disk = &self.source.disks[index];
        let bytes = self.source.disk_bytes(index)?;
        let base = self.base.filter(|base| index < base.disks.len());
        let begins = self.begins.filter(|begins| index < begins.disks.len());
        let scratch = match begins {
            Some(begins) => begins.copy_disk(index, bytes)?,
            None => Scratch::zero(bytes)?,
        };
        let ram = self
            .begins
            .map(|begins| (SlicePages(&begins.ram), &begins.ram_tree));
        let told = self.realigned.as_ref();
        let told = told.and_then(|told| told.twin.disks.get(index));
        let places = ram.iter().map(|(reader, tree)| Place {
            kind: PlaceKind::OtherImage,
            tree,
            reader,
        });
        let task = Task {
            image: &disk.image,
            tree: &disk.tree,
            base: base.map(|base| (&base.disks[index].image as _, &base.disks[index].tree)),
            current: begins.map(|begins| &begins.disks[index].tree),
            places: places.collect(),
            shared: match self.base {
                Some(base) if self.strategy == Strategy::Base => vec![&base.ram_tree],
                _ => Vec::new(),
            },
            twin: told.map(|disk| &disk.image as _),
            twins: told.iter().map(|disk| &disk.tree).collect(),
        };
        self.run(disk_name(index), how, task, &mut scratch.pages()?, None)
    }

    fn ram(&self, how: How<'_>, kinds: Option<&mut Kinds>) -> Result<Row> {
        let image = SlicePages(&self.source.ram);
        let base = self
            .base
            .map(|base| (SlicePages(&base.ram), &base.ram_tree));
        let scratch = match self.begins {
            Some(begins) => begins.copy_ram()?,
            None => Scratch::zero_ram(self.source.ram.len() as u64)?,
        };
        let mut built = scratch.map()?;
        let told = self.realigned.as_ref();
        for (index, page) in told.iter().flat_map(|told| &told.pages) {
            let start = index.0 as usize * PAGE_SIZE;
            if let Some(there) = built.get_mut(start..start + PAGE_SIZE) {
                there.copy_from_slice(&**page);
            }
        }
        let displaced = told.map(|told| (SlicePages(&told.displaced), &told.displaced_tree));
        let mut places: Vec<Place<'_>> = displaced
            .iter()
            .map(|(reader, tree)| Place {
                kind: PlaceKind::Replayed,
                tree,
                reader,
            })
            .collect();
        // The target's disks are the source's by now.
        places.extend(self.source.disks.iter().map(|disk| Place {
            kind: PlaceKind::Disk,
            tree: &disk.tree,
            reader: &disk.image,
        }));
        let twin = told.map(|told| Overlaid::new(&told.twin.ram, &told.twin_pages));
        let task = Task {
            image: &image,
            tree: &self.source.ram_tree,
            base: base.as_ref().map(|(image, tree)| (image as _, *tree)),
            current: told
                .map(|told| &told.tree)
                .or(self.begins.map(|begins| &begins.ram_tree)),
            places,
            shared: self.source.disks.iter().map(|disk| &disk.tree).collect(),
            twin: twin.as_ref().map(|twin| twin as _),
            twins: told.map_or_else(Vec::new, |told| vec![&told.twin_tree, &told.twin.ram_tree]),
        };
        let mut row = self.run(
            "ram".to_owned(),
            how,
            task,
            &mut SlicePagesMut(&mut built),
            kinds.filter(|_| self.strategy != Strategy::Full),
        )?;
        if let Some(told) = told {
            row.add_layout(told.layout_bytes, &told.seconds);
        }
        Ok(row)
    }

    fn run(
        &self,
        name: String,
        how: How<'_>,
        task: Task<'_>,
        built: &mut dyn Image,
        kinds: Option<&mut Kinds>,
    ) -> Result<Row> {
        let nothing = ImageTree::zero(task.tree.pages()).map_err(Error::Hash)?;
        let Task {
            image,
            tree,
            base,
            current,
            mut places,
            mut shared,
            twin,
            twins,
        } = task;
        let (base_reader, base) = (
            base.map(|base| base.0),
            base.map_or(&nothing, |base| base.1),
        );
        if let Some(reader) = base_reader {
            let kind = PlaceKind::Base;
            let place = Place {
                kind,
                tree: base,
                reader,
            };
            places.insert(0, place);
            shared.push(base);
        }
        let holdings = Holdings {
            base,
            base_reader,
            current: current.unwrap_or(&nothing),
            places: &places,
        };
        let source = Source {
            image,
            tree,
            base,
            base_reader,
            twin,
            known: Known {
                shared: &shared,
                twin: &twins,
                nothing_else: matches!(self.strategy, Strategy::Full | Strategy::Base),
            },
        };
        let options = reconciler::Options {
            offer: OfferOptions {
                salt: SALT,
                candidates: self.candidates(),
                force_bits: None,
                seek_from: OfferOptions::SEEK_FROM,
            },
            encode: EncodeOptions {
                codec: match how {
                    How::Codec(codec) => codec,
                    How::Line(_, governor) => governor.codec(),
                },
                workers: WORKERS,
            },
            apply: ApplyOptions::default(),
        };
        let mut asked = Asked::default();
        let (begun, before) = (Instant::now(), processor_time());
        let mut took = Took::default();
        let (done, peak_memory) = peak(|| match how {
            How::Codec(_) => Ok(reconcile_in_memory(
                source,
                &holdings,
                built,
                &options,
                &mut |message| {
                    asked.hear(&message);
                },
            )),
            How::Line(bits_per_second, governor) => {
                let tree = tree_of(image)?;
                took.scan = begun.elapsed().as_secs_f64();
                let how = Overlapped {
                    governor,
                    bits_per_second,
                };
                let source = Source {
                    tree: &tree,
                    ..source
                };
                Ok(reconcile_overlapped(
                    source, &holdings, built, &options, &how,
                ))
            }
        });
        took.total = begun.elapsed().as_secs_f64();
        took.processor = processor_time() - before;
        let (_, stats) = done?.map_err(|source| Error::Reconcile {
            strategy: self.strategy.name(),
            image: name.clone(),
            source,
        })?;
        let pace = match how {
            How::Codec(_) => None,
            How::Line(rate, governor) => {
                let trees = (tree, base);
                Some(Pace::of(governor, rate, trees, &stats, took))
            }
        };
        let compared = first_difference(image, built.reader());
        let compared = compared.map_err(Error::file("compare", Path::new(&name)))?;
        if let Some(page) = compared {
            return Err(Error::Differs {
                strategy: self.strategy.name(),
                image: name,
                page,
            });
        }
        if let Some(kinds) = kinds {
            kinds.add(&Done {
                strategy: self.strategy,
                options: options.encode,
                source,
                current: holdings.current,
                asked,
                stats: &stats,
            })?;
        }
        Ok(Row {
            strategy: self.strategy,
            codec: name_of(options.encode.codec),
            image: name,
            bytes: Bytes::of(&stats),
            seconds: seconds(&stats),
            pages: stats.pages,
            peak_memory,
            pace,
        })
    }

    /// As a source reckons that knows of its target what generation it holds.
    fn candidates(&self) -> u64 {
        self.base.map_or(0, |base| {
            let disks: u64 = base
                .disks
                .iter()
                .map(|disk| disk.tree.content_pages())
                .sum();
            2 * (disks + base.ram_tree.pages() + pages_for(base.device.len() as u64))
        })
    }
}

fn seconds(stats: &Stats) -> Seconds {
    let times = &stats.times;
    Seconds {
        offer: times.offer.as_secs_f64(),
        resolve: times.resolve.as_secs_f64(),
        encode: times.encode.as_secs_f64(),
        decode: times.decode.as_secs_f64(),
        verify: times.verify.as_secs_f64(),
        ..Seconds::default()
    }
}
