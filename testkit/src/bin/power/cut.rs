//! What a power cut leaves on a disk: all that was flushed, and of what was written since then
//! what chance has it.
//!
//! A disk writes what it was given in an order of its own, sector by sector: between two flushes
//! any part of it can be there. (How a file system is to live with that:
//! <https://docs.kernel.org/block/writeback_cache_control.html>; that programs must, too:
//! Pillai et al., *All File Systems Are Not Created Equal*, OSDI '14.) A sector is there as a
//! whole or not at all, which disks promise.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::Context;

use crate::chance::Chance;
use crate::disk::Event;

/// What a disk writes as a whole.
const SECTOR: usize = 512;

/// How a disk happened to deal with what it was not told to flush.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// Nothing of it is there.
    Nothing,
    /// All of it is there.
    All,
    /// All up to some sector of some write.
    UpTo,
    /// Some writes, each whole.
    Writes,
    /// Some sectors.
    Sectors,
}

impl Fate {
    const ALL: [Self; 5] = [
        Self::Nothing,
        Self::All,
        Self::UpTo,
        Self::Writes,
        Self::Sectors,
    ];

    pub(crate) fn any(chance: &mut Chance) -> Self {
        Self::ALL[chance.below(Self::ALL.len())]
    }
}

/// A disk as it is after everything up to some moment is on it.
#[derive(Debug)]
pub(crate) struct Durable {
    image: File,
    disk: usize,
    /// How many events it has seen.
    seen: usize,
}

impl Durable {
    /// The disk of this number, as it was before anything happened. The image is written to.
    pub(crate) fn new(image: &Path, disk: usize) -> anyhow::Result<Self> {
        let opened = File::options().read(true).write(true).open(image);
        let image = opened.with_context(|| format!("cannot open {}", image.display()))?;
        Ok(Self {
            image,
            disk,
            seen: 0,
        })
    }

    /// Writes an image of the disk as a power cut leaves it after the first `moment` events.
    /// Moments never go back.
    pub(crate) fn cut<R>(
        &mut self,
        events: &[Event<R>],
        moment: usize,
        fate: Fate,
        chance: &mut Chance,
        image: &Path,
    ) -> anyhow::Result<usize> {
        let flushed = events[..moment].iter().rposition(|event| match event {
            Event::Flush { disk } => *disk == self.disk,
            _ => false,
        });
        // Before the first flush nothing is certain but what was there.
        let flushed = flushed.unwrap_or(0).max(self.seen);
        for (at, data) in self.writes(&events[self.seen..flushed]) {
            self.image.write_all_at(data, at).context("cannot write")?;
        }
        self.seen = flushed;
        let copied = copy(&self.image, image)?;
        let pending: Vec<_> = self.writes(&events[flushed..moment]).collect();
        let mut left = 0;
        for (at, part) in chosen(&pending, fate, chance) {
            copied.write_all_at(part, at).context("cannot write")?;
            left += part.len();
        }
        Ok(left)
    }

    fn writes<'a, R>(
        &self,
        events: &'a [Event<R>],
    ) -> impl Iterator<Item = (u64, &'a [u8])> + use<'a, R> {
        let ours = self.disk;
        events.iter().filter_map(move |event| match event {
            Event::Write { disk, at, data } if *disk == ours => Some((*at, &**data)),
            _ => None,
        })
    }
}

/// What of these writes is there, in the order in which they came.
fn chosen<'a>(
    pending: &[(u64, &'a [u8])],
    fate: Fate,
    chance: &mut Chance,
) -> Vec<(u64, &'a [u8])> {
    let sectors = |&(at, data): &(u64, &'a [u8])| {
        let numbered = data.chunks(SECTOR).enumerate();
        let parts = numbered.map(move |(index, part)| (at + (index * SECTOR) as u64, part));
        parts.collect::<Vec<_>>()
    };
    match fate {
        Fate::Nothing => Vec::new(),
        Fate::All => pending.to_vec(),
        Fate::UpTo => {
            let all: Vec<_> = pending.iter().flat_map(sectors).collect();
            let end = chance.below(all.len() + 1);
            all[..end].to_vec()
        }
        Fate::Writes => {
            let some = pending.iter().filter(|_| chance.coin());
            some.copied().collect()
        }
        Fate::Sectors => {
            let all = pending.iter().flat_map(sectors);
            all.filter(|_| chance.coin()).collect()
        }
    }
}

/// Copies a file with its holes.
pub(crate) fn copy(from: &File, to: &Path) -> anyhow::Result<File> {
    use rustix::fs::{SeekFrom, seek};
    const PIECE: u64 = 1 << 20;
    let what = || format!("cannot make {}", to.display());
    let copied = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(to)
        .with_context(what)?;
    let length = from.metadata().with_context(what)?.len();
    copied.set_len(length).with_context(what)?;
    let mut at = 0;
    let mut bytes = vec![0; PIECE as usize];
    while at < length {
        let Ok(begin) = seek(from, SeekFrom::Data(at)) else {
            // Nothing but a hole is left.
            break;
        };
        let end = seek(from, SeekFrom::Hole(begin)).map_err(std::io::Error::from)?;
        at = begin;
        while at < end {
            let piece = &mut bytes[..PIECE.min(end - at) as usize];
            from.read_exact_at(piece, at).with_context(what)?;
            copied.write_all_at(piece, at).with_context(what)?;
            at += piece.len() as u64;
        }
    }
    Ok(copied)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(at: u64, byte: u8, sectors: usize) -> Event<()> {
        Event::Write {
            disk: 0,
            at,
            data: vec![byte; sectors * SECTOR].into(),
        }
    }

    fn image(dir: &Path) -> std::path::PathBuf {
        let path = dir.join("image");
        std::fs::write(&path, vec![0; 16 * SECTOR]).unwrap();
        path
    }

    fn sectors(path: &Path) -> Vec<u8> {
        let bytes = std::fs::read(path).unwrap();
        let sectors = bytes.chunks(SECTOR).map(|sector| {
            assert!(
                sector.iter().all(|byte| *byte == sector[0]),
                "a torn sector"
            );
            sector[0]
        });
        sectors.collect()
    }

    #[test]
    fn what_was_flushed_is_there_and_only_that_is_certain() {
        let dir = tempfile::tempdir().unwrap();
        let events = [
            write(0, 1, 2),
            Event::Flush { disk: 1 },
            write(1024, 2, 2),
            Event::Flush { disk: 0 },
            write(0, 3, 4),
            Event::Remark(()),
        ];
        let mut seen = std::collections::BTreeSet::new();
        for seed in 0..200 {
            let mut chance = Chance::new(seed);
            let cut = dir.path().join("cut");
            let mut durable = Durable::new(&image(dir.path()), 0).unwrap();
            let fate = Fate::any(&mut chance);
            durable.cut(&events, 2, fate, &mut chance, &cut).unwrap();
            // Another disk's flush is none.
            assert!(sectors(&cut)[..2].iter().all(|byte| [0, 1].contains(byte)));
            let fate = Fate::any(&mut chance);
            durable.cut(&events, 6, fate, &mut chance, &cut).unwrap();
            let found = sectors(&cut);
            assert!(
                found[..2].iter().all(|byte| [1, 3].contains(byte)),
                "{found:?}"
            );
            assert!(
                found[2..4].iter().all(|byte| [2, 3].contains(byte)),
                "{found:?}"
            );
            assert!(found[4..].iter().all(|byte| *byte == 0));
            match fate {
                Fate::Nothing => assert_eq!(found[..4], [1, 1, 2, 2]),
                Fate::All => assert_eq!(found[..4], [3; 4]),
                Fate::Writes => {
                    assert!([[1, 1, 2, 2], [3; 4]].contains(&found[..4].try_into().unwrap()));
                }
                Fate::UpTo | Fate::Sectors => {
                    seen.insert(found[..4].to_vec());
                }
            }
        }
        assert!(seen.len() > 10, "{seen:?}");
    }
}
