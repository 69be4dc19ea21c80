//! A capture's files, and how they are read.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use vm_host::RamMap;

use crate::rows::{Row, Way};

/// The unit in which images are compared.
pub(crate) const PAGE: usize = 4096;
/// How much of a file is copied, read or compared at once.
const CHUNK: usize = 1 << 20;

/// A folder that `replay-migrate capture` made.
#[derive(Clone, Debug)]
pub(crate) struct Capture {
    /// By which its rows are known: the folder's name.
    pub(crate) name: String,
    dir: PathBuf,
    /// In the order in which a migration sends them.
    pub(crate) images: Vec<Image>,
}

/// One of a state's files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Image {
    /// `device`, `disk` (`disk1` and so on for more), `ram`.
    pub(crate) name: String,
    /// In the folder of each state.
    pub(crate) file: String,
}

impl Image {
    fn new(name: &str, extension: &str) -> Self {
        Self {
            name: name.to_owned(),
            file: format!("{name}.{extension}"),
        }
    }
}

impl Capture {
    /// Finds its images.
    pub(crate) fn open(dir: &Path) -> anyhow::Result<Self> {
        let cannot = || format!("cannot open the capture {}", dir.display());
        let dir = dir.canonicalize().with_context(cannot)?;
        let name = dir.file_name().unwrap_or(dir.as_os_str());
        let name = name.to_string_lossy().into_owned();
        let disks = (0..)
            .map(|index| match index {
                0 => Image::new("disk", "img"),
                _ => Image::new(&format!("disk{index}"), "img"),
            })
            .take_while(|disk| dir.join("source").join(&disk.file).exists());
        let mut images = vec![Image::new("device", "bin")];
        images.extend(disks);
        images.push(Image::new("ram", "img"));
        let capture = Self { name, dir, images };
        for state in ["base", "source"] {
            for image in &capture.images {
                let path = capture.path(state, image);
                let there = path.metadata().with_context(cannot)?;
                ensure!(there.len() > 0, "{} is empty", path.display());
            }
        }
        Ok(capture)
    }

    /// The folder.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// The file of an image of a state.
    pub(crate) fn path(&self, state: &str, image: &Image) -> PathBuf {
        self.dir.join(state).join(&image.file)
    }

    /// Whether there is such a state.
    pub(crate) fn has(&self, state: &str) -> bool {
        self.dir.join(state).is_dir()
    }

    /// The images that are disks.
    pub(crate) fn disks(&self) -> impl Iterator<Item = &Image> {
        self.images
            .iter()
            .filter(|image| image.name.starts_with("disk"))
    }

    /// An image of a state, mapped. Captures do not change.
    pub(crate) fn map(&self, state: &str, image: &Image) -> anyhow::Result<RamMap> {
        Ok(RamMap::open(&self.path(state, image))?)
    }

    /// A row of this capture that was measured, and whose result was compared with the source's.
    pub(crate) fn row(&self, way: Way, images: &str, bytes: u64, seconds: f64) -> Row {
        Row {
            capture: self.name.clone(),
            way,
            images: images.to_owned(),
            bytes: Some(bytes),
            hashes: None,
            seconds: Some(seconds),
            checked: true,
            note: String::new(),
        }
    }
}

/// A page of an image, filled up with zeroes where the image ends; `None` beyond.
pub(crate) fn page_of(image: &[u8], index: usize) -> Option<[u8; PAGE]> {
    let from = index.checked_mul(PAGE)?;
    let rest = image.get(from..).filter(|rest| !rest.is_empty())?;
    let length = rest.len().min(PAGE);
    let mut page = [0; PAGE];
    page[..length].copy_from_slice(&rest[..length]);
    Some(page)
}

/// The indices of the pages of `source` that are not so in `base`, at the same place.
pub(crate) fn changed<'a>(base: &'a [u8], source: &'a [u8]) -> impl Iterator<Item = usize> + 'a {
    let chunk = |of: &'a [u8], index: usize| {
        let from = (index * PAGE).min(of.len());
        &of[from..(from + PAGE).min(of.len())]
    };
    (0..source.len().div_ceil(PAGE))
        .filter(move |index| chunk(base, *index) != chunk(source, *index))
}

/// Copies a part of a file into a new one, leaving holes where there are only zeroes: images are
/// mostly holes.
pub(crate) fn copy_part(from: &[u8], to: &Path) -> anyhow::Result<()> {
    let write = || format!("cannot write {}", to.display());
    let file = File::create(to).with_context(write)?;
    file.set_len(from.len() as u64).with_context(write)?;
    let zeroes = vec![0; CHUNK];
    for (index, chunk) in from.chunks(CHUNK).enumerate() {
        if *chunk != zeroes[..chunk.len()] {
            file.write_all_at(chunk, (index * CHUNK) as u64)
                .with_context(write)?;
        }
    }
    Ok(())
}

/// Whether a reader gives just these bytes.
pub(crate) fn gives(mut reader: impl Read, expected: &[u8]) -> io::Result<bool> {
    let mut buffer = vec![0; CHUNK];
    let mut left = expected;
    loop {
        let length = match reader.read(&mut buffer) {
            Ok(0) => return Ok(left.is_empty()),
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        match left.split_at_checked(length) {
            Some((now, rest)) if now == &buffer[..length] => left = rest,
            _ => return Ok(false),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::fs;

    use super::*;

    /// A capture of small images: base, and a source where some pages changed.
    pub(crate) fn small(dir: &Path) -> Capture {
        let noise = |seed: u64, pages: usize| -> Vec<u8> {
            let mut state = seed;
            let step = || {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                (state >> 56) as u8
            };
            std::iter::repeat_with(step).take(pages * PAGE).collect()
        };
        let mut ram = noise(1, 64);
        let mut disk = noise(2, 32);
        disk.resize(256 * PAGE, 0);
        let mut device = noise(3, 2);
        device.truncate(5000);
        for (state, times) in [("base", 0), ("source", 1)] {
            let folder = dir.join(state);
            fs::create_dir_all(&folder).unwrap();
            if times == 1 {
                // New, from the disk, from elsewhere in RAM, and emptied.
                ram[PAGE..3 * PAGE].copy_from_slice(&noise(4, 2));
                ram[5 * PAGE..6 * PAGE].copy_from_slice(&disk[3 * PAGE..4 * PAGE]);
                ram.copy_within(60 * PAGE..61 * PAGE, 6 * PAGE);
                ram[7 * PAGE..8 * PAGE].fill(0);
                disk[100 * PAGE..101 * PAGE].copy_from_slice(&noise(5, 1));
                device[4500] ^= 1;
                device.push(9);
            }
            fs::write(folder.join("ram.img"), &ram).unwrap();
            fs::write(folder.join("disk.img"), &disk).unwrap();
            fs::write(folder.join("device.bin"), &device).unwrap();
        }
        Capture::open(dir).unwrap()
    }

    #[test]
    fn images_are_found() {
        let dir = tempfile::tempdir().unwrap();
        let capture = small(dir.path());
        let names: Vec<_> = capture.images.iter().map(|image| &image.name).collect();
        assert_eq!(names, ["device", "disk", "ram"]);
        assert!(capture.has("base") && !capture.has("twin"));
        fs::remove_file(dir.path().join("base/ram.img")).unwrap();
        let missing = format!("{:#}", Capture::open(dir.path()).unwrap_err());
        assert!(missing.contains("cannot open the capture"), "{missing}");
    }

    #[test]
    fn changed_pages_are_told() {
        let dir = tempfile::tempdir().unwrap();
        let capture = small(dir.path());
        let of = |name: &str| -> Vec<usize> {
            let image = capture.images.iter().find(|i| i.name == name).unwrap();
            let base = capture.map("base", image).unwrap();
            changed(&base, &capture.map("source", image).unwrap()).collect()
        };
        assert_eq!(of("ram"), [1, 2, 5, 6, 7]);
        assert_eq!(of("disk"), [100]);
        assert_eq!(of("device"), [1]);
        assert_eq!(changed(&[1; 9000], &[1; 8192]).count(), 0);
        assert_eq!(changed(&[1; 8192], &[1; 9000]).collect::<Vec<_>>(), [2]);
        assert_eq!(changed(&[1; 100], &[1; 50]).collect::<Vec<_>>(), [0]);
    }

    #[test]
    fn the_last_page_is_filled_up() {
        let page = page_of(&[7; 5000], 1).unwrap();
        assert_eq!(&page[..904], &[7; 904]);
        assert_eq!(&page[904..], &[0; PAGE - 904]);
        assert_eq!(page_of(&[7; 5000], 2), None);
        assert_eq!(page_of(&[7; 4096], 1), None);
    }

    #[test]
    fn copies_are_equal_and_sparse() {
        use std::os::unix::fs::MetadataExt as _;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("copy");
        let mut bytes = vec![0; 16 << 20];
        bytes[(9 << 20) + 5] = 1;
        bytes.push(0);
        copy_part(&bytes, &path).unwrap();
        assert!(gives(File::open(&path).unwrap(), &bytes).unwrap());
        assert!(path.metadata().unwrap().blocks() * 512 <= 2 << 20);
    }

    #[test]
    fn other_bytes_are_noticed() {
        assert!(gives(&b"abc"[..], b"abc").unwrap());
        for other in [&b"abd"[..], b"ab", b"abcd", b""] {
            assert!(!gives(other, b"abc").unwrap(), "{other:?}");
        }
    }
}
