//! Runs the strategies.

use std::path::{Path, PathBuf};
use std::time::Instant;

use introspection::Physical;
use introspection::kinds::{self, Kind};
use reconciler::{
    ApplyOptions, Codec, EncodeOptions, Governor, Holdings, Image, ImageTree, Known, OfferOptions,
    Overlaid, Overlapped, PAGE_SIZE, PageDelta, Place, PlaceKind, ReadPages, Salt, SlicePages,
    SlicePagesMut, Source, Stats, pages_for, reconcile_in_memory, reconcile_overlapped,
};

use crate::deltas::{self, DeltaRow};
use crate::diverged::Diverged;
use crate::error::{Error, Result};
use crate::kinds::{Asked, Done, Kinds};
use crate::memory::peak;
use crate::pace::{Pace, Took, Yardsticks, processor_time};
use crate::report::{Bytes, Report, Row, Seconds, Strategy, name_of};
use crate::states::{Scratch, State, first_difference, tree_of};
use crate::told::Told;

/// Any will do where nobody makes pages that collide; the same each time, so that figures are.
const SALT: Salt = Salt([7; 32]);
/// Threads of zstd, as a migration has them.
const WORKERS: u32 = 2;

/// What to measure.
#[derive(Clone, Debug)]
pub struct Options {
    /// Which ways; none for all that the capture has the states for.
    pub strategies: Vec<Strategy>,
    /// Which codecs. `full` has only the first, unless it is asked for: LZMA takes minutes for a
    /// whole disk.
    pub codecs: Vec<Codec>,
    /// Which delta codecs, on what a target with the base lacks.
    pub deltas: Vec<PageDelta>,
    /// Over lines of which rates, in bits a second: both ends at once, with the codecs that follow.
    pub rates: Vec<u64>,
    /// How often each is measured over a line; the median counts.
    pub runs: usize,
    /// The state that the target's replay left: a folder in the capture's, or elsewhere.
    pub replayed: PathBuf,
    /// What the source's own left.
    pub twin: PathBuf,
    /// Measure as if the source's free pages had been made zero before.
    pub drop_free: bool,
}

/// Measures a capture; `on_row` hears each result as it comes.
///
/// Takes as much room for temporary files as the source's images do.
///
/// # Errors
/// When the folder is no capture, a state that was asked for is not in it, or what came out is
/// not the source's state.
pub fn reconcile(dir: &Path, options: &Options, on_row: &mut dyn FnMut(&Row)) -> Result<Report> {
    let kinds_of = |ram: &[u8]| {
        let kinds = kinds::classify(Physical::new(ram))?;
        Some(kinds.all().to_vec())
    };
    measure(dir, options, &kinds_of, on_row)
}

/// The same, with the kinds of a RAM's pages as `kinds_of` tells them.
pub(crate) fn measure(
    dir: &Path,
    options: &Options,
    kinds_of: &dyn Fn(&[u8]) -> Option<Vec<Kind>>,
    on_row: &mut dyn FnMut(&Row),
) -> Result<Report> {
    for needed in ["base", "source"] {
        if !dir.join(needed).is_dir() {
            return Err(Error::NoCapture {
                dir: dir.to_owned(),
                missing: needed,
            });
        }
    }
    let (replayed_dir, twin_dir) = (dir.join(&options.replayed), dir.join(&options.twin));
    let has = |strategy: &Strategy| match strategy {
        Strategy::Full | Strategy::Base => true,
        Strategy::Replay => replayed_dir.is_dir(),
        Strategy::Twin => replayed_dir.is_dir() && twin_dir.is_dir(),
    };
    let strategies: Vec<Strategy> = if options.strategies.is_empty() {
        Strategy::ALL.into_iter().filter(has).collect()
    } else {
        options.strategies.clone()
    };
    if let Some(without) = strategies.iter().find(|strategy| !has(strategy)) {
        return Err(Error::NoState {
            state: "replay of its own",
            strategy: without.name(),
        });
    }
    let base = State::open(&dir.join("base"))?;
    let mut source = State::open(&dir.join("source"))?;
    let mut free_dropped = None;
    if options.drop_free {
        let (without, pages) = source.without_free()?;
        (source, free_dropped) = (without, Some(pages));
    }
    let replays = |strategy: &&Strategy| matches!(**strategy, Strategy::Replay | Strategy::Twin);
    let replayed = match strategies.iter().find(replays) {
        Some(_) => Some(State::open(&replayed_dir)?),
        None => None,
    };
    let diverged = replayed
        .as_ref()
        .map(|replayed| Diverged::between(&source, replayed));
    let mut kinds = match kinds_of(&source.ram) {
        // Against nothing everything has changed.
        Some(kinds)
            if !options.codecs.is_empty()
                && strategies.iter().any(|way| *way != Strategy::Full) =>
        {
            Some(Kinds::new(kinds, &source, &base)?)
        }
        _ => None,
    };
    let mut rows = Vec::new();
    let deltas = tell_deltas(&source, &base, &options.deltas)?;
    for strategy in strategies {
        let (base, begins) = match strategy {
            Strategy::Full => (None, None),
            Strategy::Base => (Some(&base), Some(&base)),
            Strategy::Replay | Strategy::Twin => (Some(&base), replayed.as_ref()),
        };
        let realigned = match (strategy, begins) {
            (Strategy::Twin, Some(begins)) => {
                Some(Told::new(&source, base, begins, State::open(&twin_dir)?)?)
            }
            _ => None,
        };
        let run = Run {
            strategy,
            source: &source,
            base,
            begins,
            realigned,
        };
        let codecs = match strategy {
            Strategy::Full if options.strategies.is_empty() => 1,
            _ => options.codecs.len(),
        };
        for codec in options.codecs.iter().take(codecs) {
            run.all(*codec, kinds.as_mut(), &mut |row| {
                on_row(&row);
                rows.push(row);
            })?;
        }
        for rate in &options.rates {
            run.paced(*rate, options.runs.max(1), &mut |row| {
                on_row(&row);
                rows.push(row);
            })?;
        }
    }
    let yardsticks = if options.rates.is_empty() {
        None
    } else {
        Some(Yardsticks::take(&source, &base)?)
    };
    Ok(Report {
        rows,
        yardsticks,
        deltas,
        free_dropped,
        diverged,
        kinds: kinds.map_or_else(Vec::new, Kinds::into_rows),
    })
}

/// Delta codecs on every image, as against a target that has the base.
fn tell_deltas(source: &State, base: &State, which: &[PageDelta]) -> Result<Vec<DeltaRow>> {
    let mut rows = deltas::measure(
        which,
        "device",
        (&SlicePages(&source.device), &source.device_tree),
        (&SlicePages(&base.device), &base.device_tree),
        &[],
    )?;
    let base_ram = (&SlicePages(&base.ram) as &dyn ReadPages, &base.ram_tree);
    for (index, (new, old)) in source.disks.iter().zip(&base.disks).enumerate() {
        rows.extend(deltas::measure(
            which,
            &disk_name(index),
            (&new.image, &new.tree),
            (&old.image, &old.tree),
            &[base_ram],
        )?);
    }
    let disks = source.disks.iter();
    let disks: Vec<deltas::Side<'_>> = disks.map(|disk| (&disk.image as _, &disk.tree)).collect();
    let ram = (&SlicePages(&source.ram) as &dyn ReadPages, &source.ram_tree);
    rows.extend(deltas::measure(which, "ram", ram, base_ram, &disks)?);
    Ok(rows)
}

fn disk_name(index: usize) -> String {
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

/// One strategy.
struct Run<'a> {
    strategy: Strategy,
    source: &'a State,
    /// What both hold.
    base: Option<&'a State>,
    /// What the target builds on.
    begins: Option<&'a State>,
    realigned: Option<Told>,
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
    fn all(
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
    fn paced(&self, rate: u64, runs: usize, on_row: &mut dyn FnMut(Row)) -> Result<()> {
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

#[cfg(test)]
#[path = "measure_tests.rs"]
mod tests;
