//! Which pages of disk images go when: what a guest waits for, then all else in its order, and never more under way
//! than is soon taken.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use reconciler::{FilePages, PAGE_SIZE, PageIndex, PageSet, ReadPages};

use crate::error::{Error, Result};
use crate::line::Line;
use crate::local::blocking;
use crate::phase::Phase;
use crate::progress::Progress;
use crate::protocol::{Blocks, ToSource, ToTarget};
use crate::report::RestReport;
use crate::store::VmDir;
use crate::vm::VmRecord;

/// Pages that go at a time.
const BATCH: u64 = 64;

/// The fewest and the most batches under way.
const WINDOW: Range<usize> = 2..64;

/// No guest waits for so much at a time.
pub(super) const WANTED_MAX: usize = 1024;

/// Longer than the shortest way there and back, a batch is to take no more than this.
const QUEUED: Duration = Duration::from_millis(150);

/// What is sent of one disk's image.
pub(super) struct Piece {
    image: Arc<FilePages>,
    /// What was not sent.
    todo: BTreeMap<u64, u64>,
    left: u64,
}

impl Piece {
    pub(super) fn open(vm: &VmDir, record: &VmRecord, disk: u8, absent: &PageSet) -> Result<Self> {
        let file = record.disks[usize::from(disk)];
        if vm.store().base_file(file.hash).is_none() {
            return Err(Error::Refused(format!(
                "the image {} of {} is not here: copy it into {}/images from where it is",
                file.hash,
                vm.name(),
                vm.store().root().display()
            )));
        }
        let path = vm.store().base_path(file.hash);
        let image = std::fs::File::open(&path)
            .and_then(FilePages::new)
            .map_err(Error::file("open", &path))?;
        let runs = absent.runs().iter();
        Ok(Self {
            image: Arc::new(image),
            todo: runs.map(|run| (run.start, run.end)).collect(),
            left: absent.len(),
        })
    }

    /// Takes pages of a range that were not sent, up to so many.
    fn take(&mut self, range: &Range<u64>, most: u64) -> Vec<Range<u64>> {
        let mut taken = Vec::new();
        let mut room = most;
        while room > 0 {
            let before = self.todo.range(..=range.start).next_back();
            let first = before.filter(|(_, end)| **end > range.start);
            let first = first.or_else(|| self.todo.range(range.start..range.end).next());
            let Some((&start, &end)) = first else {
                break;
            };
            let from = start.max(range.start);
            let to = end.min(range.end).min(from + room);
            self.todo.remove(&start);
            if start < from {
                self.todo.insert(start, from);
            }
            if to < end {
                self.todo.insert(to, end);
            }
            self.left -= to - from;
            room -= to - from;
            taken.push(from..to);
        }
        taken
    }
}

/// Which pages go when.
pub(super) struct Sending {
    pieces: BTreeMap<u8, Piece>,
    /// What a guest waits for.
    pub(super) wanted: VecDeque<(u8, Range<u64>)>,
    /// All else, in order.
    pub(super) order: VecDeque<(u8, Range<u64>)>,
    level: i32,
    /// When those batches were sent that are not taken yet.
    under_way: VecDeque<Instant>,
    window: Window,
    /// The disks whose images are whole at the target.
    pub(super) here: BTreeSet<u8>,
    pub(super) report: RestReport,
}

impl Sending {
    pub(super) fn new(pieces: BTreeMap<u8, Piece>, rate: f64) -> Self {
        // What a processor can compress while the line takes it.
        let level = match rate {
            ..50e6 => 15,
            50e6..500e6 => 7,
            500e6..3e9 => 3,
            _ => 1,
        };
        Self {
            pieces,
            wanted: VecDeque::new(),
            order: VecDeque::new(),
            level,
            under_way: VecDeque::new(),
            window: Window {
                size: WINDOW.start,
                shortest: Duration::MAX,
            },
            here: BTreeSet::new(),
            report: RestReport::default(),
        }
    }

    fn left(&self) -> u64 {
        self.pieces.values().map(|piece| piece.left).sum()
    }

    /// The next pages: of one disk, and none for which others stand in line.
    fn next(&mut self) -> Option<(u8, Vec<Range<u64>>)> {
        while let Some((disk, range)) = self.wanted.pop_front() {
            let Some(piece) = self.pieces.get_mut(&disk) else {
                continue;
            };
            let runs = piece.take(&range, BATCH);
            if !runs.is_empty() {
                self.report.wanted += pages(&runs);
                self.wanted.push_front((disk, range));
                return Some((disk, runs));
            }
        }
        let mut batch: Option<(u8, Vec<Range<u64>>)> = None;
        while let Some((disk, range)) = self.order.front().cloned() {
            if batch.as_ref().is_some_and(|(of, _)| *of != disk) {
                break;
            }
            let (_, runs) = batch.get_or_insert_with(|| (disk, Vec::new()));
            let room = BATCH - pages(runs);
            if room == 0 {
                break;
            }
            let taken = match self.pieces.get_mut(&disk) {
                Some(piece) => piece.take(&range, room),
                None => Vec::new(),
            };
            if pages(&taken) < room {
                self.order.pop_front();
            }
            runs.extend(taken);
        }
        batch.filter(|(_, runs)| !runs.is_empty())
    }

    async fn packed(&self, disk: u8, runs: Vec<Range<u64>>) -> Result<Blocks> {
        let Some(piece) = self.pieces.get(&disk) else {
            return Err(Error::Refused("a disk that is not sent".into()));
        };
        let (image, level) = (piece.image.clone(), self.level);
        blocking(move || packed(&image, level, disk, &runs)).await
    }

    fn hear(&mut self, line: &Line, message: &ToSource, phase: Phase) -> Result<()> {
        match *message {
            ToSource::Took => match self.under_way.pop_front() {
                Some(sent) => self.window.taken(sent.elapsed()),
                None => return Err(line.unexpected(phase, "word of pages that were not sent")),
            },
            ToSource::Want { disk, first, count } if phase == Phase::Rest => {
                let end = first.saturating_add(u64::from(count));
                if self.wanted.len() >= WANTED_MAX {
                    // All of it goes in its turn.
                    self.wanted.pop_front();
                }
                self.wanted.push_back((disk, first..end));
            }
            ToSource::Here { disk } if phase == Phase::Rest => {
                self.here.insert(disk);
            }
            _ => return Err(line.unexpected(phase, "no word of pages of an image")),
        }
        Ok(())
    }
}

fn packed(image: &FilePages, level: i32, disk: u8, runs: &[Range<u64>]) -> Result<Blocks> {
    let mut raw = vec![0; pages(runs) as usize * PAGE_SIZE];
    let mut rest = raw.as_mut_slice();
    for run in runs {
        let length = (run.end - run.start) as usize * PAGE_SIZE;
        let (now, later) = std::mem::take(&mut rest).split_at_mut(length);
        let first = PageIndex(run.start);
        image.read_many(first, now).map_err(|source| {
            Error::reconcile("cannot read a base image")(reconciler::Error::Read {
                image: "the base image",
                page: first,
                source,
            })
        })?;
        rest = later;
    }
    let bytes = zstd::bulk::compress(&raw, level)
        .map_err(|error| Error::Refused(format!("cannot compress pages: {error}")))?;
    let counted = |run: &Range<u64>| (run.start, (run.end - run.start) as u32);
    Ok(Blocks {
        disk,
        runs: runs.iter().map(counted).collect(),
        bytes,
    })
}

fn pages(runs: &[Range<u64>]) -> u64 {
    runs.iter().map(|run| run.end - run.start).sum()
}

/// How many batches may be under way, by how long they take.
struct Window {
    size: usize,
    shortest: Duration,
}

impl Window {
    fn taken(&mut self, after: Duration) {
        self.shortest = self.shortest.min(after);
        if after > self.shortest + QUEUED {
            self.size = (self.size - 1).max(WINDOW.start);
        } else {
            self.size = (self.size + 1).min(WINDOW.end);
        }
    }
}

/// Sends until there is nothing more to send and all was taken; with `until`, until those disks are whole there.
pub(super) async fn send(
    line: &mut Line,
    sending: &mut Sending,
    until: Option<&BTreeSet<u8>>,
    phase: Phase,
    progress: &dyn Progress,
) -> Result<()> {
    let all = sending.left();
    loop {
        let next = if sending.under_way.len() < sending.window.size {
            sending.next()
        } else {
            None
        };
        if let Some((disk, runs)) = next {
            let count = pages(&runs);
            let blocks = sending.packed(disk, runs).await?;
            sending.report.pages += count;
            sending.report.bytes += blocks.bytes.len() as u64;
            line.send(ToTarget::Blocks(blocks)).await?;
            line.flush().await?;
            sending.under_way.push_back(Instant::now());
            let done = (all - sending.left()) * PAGE_SIZE as u64;
            progress.advance(phase, done, Some(all * PAGE_SIZE as u64));
            if sending.under_way.len() < sending.window.size {
                // What was said meanwhile is heard before the next.
                if let Some(message) = said(line, phase).await {
                    sending.hear(line, &message?, phase)?;
                }
                continue;
            }
        } else if sending.under_way.is_empty()
            && until.is_none_or(|until| sending.here.is_superset(until))
        {
            return Ok(());
        }
        let message = line.recv(phase).await?;
        sending.hear(line, &message, phase)?;
    }
}

/// What the target has said by now.
async fn said(line: &mut Line, phase: Phase) -> Option<Result<ToSource>> {
    tokio::select! {
        biased;
        message = line.recv(phase) => Some(message),
        () = std::future::ready(()) => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::prop;
    use proptest::{prop_assert, prop_assert_eq, proptest};

    use super::*;

    fn piece(runs: &[Range<u64>]) -> Piece {
        Piece {
            image: Arc::new(FilePages::new(tempfile::tempfile().unwrap()).unwrap()),
            todo: runs.iter().map(|run| (run.start, run.end)).collect(),
            left: pages(runs),
        }
    }

    fn sending(order: &[Range<u64>]) -> Sending {
        let mut sending = Sending::new([(0, piece(order))].into(), 10e6);
        sending.order = order.iter().map(|run| (0, run.clone())).collect();
        sending
    }

    #[test]
    fn what_is_waited_for_goes_first_and_nothing_twice() {
        let mut sending = sending(&[0..100, 200..1000]);
        let (_, first) = sending.next().unwrap();
        assert_eq!(first.first(), Some(&(0..64)));
        sending.wanted.push_back((0, 90..220));
        // A disk that is not sent, and what has gone by now.
        sending.wanted.push_back((3, 0..10));
        sending.wanted.push_back((0, 0..10));
        assert_eq!(sending.next(), Some((0, vec![90..100, 200..220])));
        assert_eq!(sending.report.wanted, 30);
        assert_eq!(sending.next(), Some((0, vec![64..90, 220..258])));
    }

    #[test]
    fn little_is_under_way_on_a_line_that_is_slow_and_much_on_one_that_is_not() {
        let mut window = Window {
            size: WINDOW.start,
            shortest: Duration::MAX,
        };
        let mut taken = |millis, times| {
            for _ in 0..times {
                window.taken(Duration::from_millis(millis));
            }
            window.size
        };
        assert_eq!(taken(50, 100), WINDOW.end);
        assert_eq!(taken(500, 100), WINDOW.start);
        assert_eq!(taken(190, 3), WINDOW.start + 3);
    }

    proptest! {
        #[test]
        fn all_goes_once(
            lengths in prop::collection::vec((1_u64..200, 0_u64..200), 1..20),
            wanted in prop::collection::vec((0_u64..4000, 1_u64..100), 0..20),
        ) {
            let mut order = Vec::new();
            let mut at = 0;
            for (length, gap) in lengths {
                order.push(at..at + length);
                at += length + gap;
            }
            let mut sending = sending(&order);
            let mut wanted = wanted.into_iter();
            let mut gone = BTreeSet::new();
            while let Some((disk, runs)) = sending.next() {
                prop_assert_eq!(disk, 0);
                prop_assert!(pages(&runs) <= BATCH);
                for page in runs.into_iter().flatten() {
                    prop_assert!(gone.insert(page));
                }
                sending.wanted.extend(wanted.next().map(|(first, count)| (0, first..first + count)));
            }
            prop_assert_eq!(sending.left(), 0);
            prop_assert_eq!(gone, order.into_iter().flatten().collect::<BTreeSet<_>>());
        }
    }
}
