//! From "I want the guest" to a folder that holds it: cache, lock, checks, build, rename.

use std::fs::{self, DirBuilder, File, Permissions};
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use crate::copy::{copy_image, seal};
use crate::image::Description;
use crate::sources::{KEYRING, Sources};
use crate::{GuestError, GuestImage, mmdebstrap, recipe};

/// What the finished image takes.
const IMAGE_MIB: u64 = 1800;
/// What unpacking takes at its peak: packages, and the system made of them.
const WORK_MIB: u64 = 2300;

/// Where to build.
#[derive(Clone, Debug)]
pub struct BuildOptions {
    /// Copy the guest to this folder, which must be absent, empty or hold a guest (which is replaced). With `None`
    /// the guest is used from the cache.
    pub out: Option<PathBuf>,
    /// The folder of all cached guests; see [`default_cache`].
    pub cache: PathBuf,
}

/// What a build is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Progress<'a> {
    /// It was built before: the rest takes no time.
    Cached,
    /// Another process builds the same guest; we wait for it.
    Waiting,
    /// mmdebstrap began this step, in its own words.
    Step(&'a str),
    /// The finished guest is copied to the folder asked for.
    Copying,
}

/// `$XDG_CACHE_HOME/replay-migrate/guest`, with the usual default below the home folder.
///
/// # Errors
/// [`GuestError::NoCache`] if neither that nor `HOME` is set to an absolute path.
pub fn default_cache() -> Result<PathBuf, GuestError> {
    let absolute = |variable| {
        std::env::var_os(variable)
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
    };
    absolute("XDG_CACHE_HOME")
        .or_else(|| absolute("HOME").map(|home| home.join(".cache")))
        .map(|cache| cache.join("replay-migrate/guest"))
        .ok_or(GuestError::NoCache)
}

/// Builds the demo desktop, or finds it in the cache.
///
/// Takes one to three minutes and the network the first time. `progress` is called from this thread.
///
/// # Errors
/// What is missing (programs, space, network) is found before the build starts where it can be; nothing half built
/// is left behind in the cache.
pub fn build(
    options: &BuildOptions,
    mut progress: impl FnMut(Progress<'_>),
) -> Result<GuestImage, GuestError> {
    if let Some(out) = &options.out {
        check_out(out)?;
    }
    fs::create_dir_all(&options.cache).map_err(GuestError::io("create", &options.cache))?;
    let cache = fs::canonicalize(&options.cache).map_err(GuestError::io("open", &options.cache))?;
    let cached = in_cache(&cache, &Sources::of_this_host(), &mut progress)?;
    match &options.out {
        None => Ok(cached),
        Some(out) => {
            progress(Progress::Copying);
            copy_guest(&cached, out)
        }
    }
}

fn in_cache(
    cache: &Path,
    sources: &Sources,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<GuestImage, GuestError> {
    let hash = recipe::hash(sources);
    let dir = cache.join(&hash);
    let _lock = lock(&cache.join(format!("{hash}.lock")), progress)?;
    if let Ok(image) = GuestImage::load(&dir) {
        progress(Progress::Cached);
        return Ok(image);
    }
    check_host(cache)?;
    // Under the lock, both are left-overs: of a builder that was killed, and of a cache that someone edited.
    let partial = cache.join(format!("{hash}.partial"));
    remove_dir(&partial)?;
    remove_dir(&dir)?;
    DirBuilder::new()
        .mode(0o700)
        .create(&partial)
        .map_err(GuestError::io("create", &partial))?;
    let built = mmdebstrap::run(&partial, sources, progress)
        .and_then(|()| finish(&partial))
        .and_then(|()| publish(&partial, &dir));
    if built.is_err() {
        // The build's error is the one to report.
        let _ = fs::remove_dir_all(&partial);
    }
    built?;
    GuestImage::load(&dir)
}

/// Held until dropped; the file stays, since removing it would let two hold "the" lock.
fn lock(path: &Path, progress: &mut dyn FnMut(Progress<'_>)) -> Result<File, GuestError> {
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .map_err(GuestError::io("create", path))?;
    let mut locked = flock(&file, FlockOperation::NonBlockingLockExclusive);
    if locked == Err(Errno::WOULDBLOCK) {
        progress(Progress::Waiting);
        locked = flock(&file, FlockOperation::LockExclusive);
        while locked == Err(Errno::INTR) {
            locked = flock(&file, FlockOperation::LockExclusive);
        }
    }
    locked.map_err(|error| GuestError::io("lock", path)(error.into()))?;
    Ok(file)
}

/// Everything that would make the build fail half way, and can be known now.
fn check_host(cache: &Path) -> Result<(), GuestError> {
    for (program, package) in [
        ("mmdebstrap", "mmdebstrap"),
        ("mke2fs", "e2fsprogs"),
        ("mount", "mount"),
    ] {
        if !is_in_path(program) {
            return Err(GuestError::Missing {
                missing: program.into(),
                package,
            });
        }
    }
    if !rustix::process::geteuid().is_root() && !is_in_path("newuidmap") {
        return Err(GuestError::Missing {
            missing: "newuidmap".into(),
            package: "uidmap",
        });
    }
    if !Path::new(KEYRING).exists() {
        return Err(GuestError::Missing {
            missing: KEYRING.into(),
            package: "debian-archive-keyring",
        });
    }
    let work = mmdebstrap::work_dir();
    let device = |path: &Path| {
        fs::metadata(path)
            .map(|metadata| metadata.dev())
            .map_err(GuestError::io("open", path))
    };
    let shared_mib = if device(&work)? == device(cache)? {
        IMAGE_MIB
    } else {
        0
    };
    check_space(&work, WORK_MIB + shared_mib, "TMPDIR")?;
    check_space(cache, IMAGE_MIB, "XDG_CACHE_HOME")
}

fn is_in_path(program: &str) -> bool {
    std::env::split_paths(&mmdebstrap::path_with_sbin()).any(|dir| dir.join(program).is_file())
}

fn check_space(path: &Path, needed_mib: u64, variable: &'static str) -> Result<(), GuestError> {
    let stat =
        rustix::fs::statvfs(path).map_err(|error| GuestError::io("examine", path)(error.into()))?;
    let available_mib = (stat.f_bavail * stat.f_frsize) >> 20;
    if available_mib < needed_mib {
        return Err(GuestError::DiskSpace {
            path: path.into(),
            needed_mib,
            available_mib,
            variable,
        });
    }
    Ok(())
}

/// Turns what mmdebstrap left into a guest: checked, durable, described.
fn finish(dir: &Path) -> Result<(), GuestError> {
    let description = Description::of_the_recipe();
    for name in description.file_names() {
        let path = dir.join(name);
        let file = File::open(&path).map_err(GuestError::io("open", &path))?;
        if file
            .metadata()
            .map_err(GuestError::io("examine", &path))?
            .len()
            == 0
        {
            return Err(GuestError::BadResult {
                path,
                problem: "it is empty".into(),
            });
        }
        seal(&file).map_err(GuestError::io("write", &path))?;
    }
    check_file_system(&dir.join(Description::DISK))?;
    description.write(dir)
}

/// The superblock's magic number (ext4 documentation, "Super Block"): something else may have written to the disk's
/// file, which all of mmdebstrap's children have open.
fn check_file_system(disk: &Path) -> Result<(), GuestError> {
    const MAGIC_OFFSET: u64 = 1024 + 0x38;
    let mut magic = [0; 2];
    let mut file = File::open(disk).map_err(GuestError::io("open", disk))?;
    file.seek(SeekFrom::Start(MAGIC_OFFSET))
        .and_then(|_| file.read_exact(&mut magic))
        .map_err(GuestError::io("read", disk))?;
    if u16::from_le_bytes(magic) == 0xEF53 {
        return Ok(());
    }
    Err(GuestError::BadResult {
        path: disk.into(),
        problem: "it holds no ext4 file system".into(),
    })
}

/// Makes the finished folder `from` appear as `to`, durably.
fn publish(from: &Path, to: &Path) -> Result<(), GuestError> {
    fs::set_permissions(from, Permissions::from_mode(0o755))
        .map_err(GuestError::io("open", from))?;
    sync_dir(from)?;
    fs::rename(from, to).map_err(GuestError::io("create", to))?;
    to.parent().map_or(Ok(()), sync_dir)
}

fn sync_dir(dir: &Path) -> Result<(), GuestError> {
    File::open(dir)
        .and_then(|dir| dir.sync_all())
        .map_err(GuestError::io("write", dir))
}

fn remove_dir(dir: &Path) -> Result<(), GuestError> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(GuestError::io("remove", dir)(error))
        }
        _ => Ok(()),
    }
}

/// Refuses to put a guest where something else is.
fn check_out(out: &Path) -> Result<(), GuestError> {
    match fs::read_dir(out) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) if error.kind() == ErrorKind::NotADirectory => {
            Err(GuestError::OutOccupied { path: out.into() })
        }
        Err(error) => Err(GuestError::io("open", out)(error)),
        Ok(mut entries) => {
            if entries.next().is_none() || Description::read(out).is_ok() {
                return Ok(());
            }
            Err(GuestError::OutOccupied { path: out.into() })
        }
    }
}

fn copy_guest(image: &GuestImage, out: &Path) -> Result<GuestImage, GuestError> {
    let out = std::path::absolute(out).map_err(GuestError::io("find", out))?;
    let (Some(parent), Some(name)) = (out.parent(), out.file_name()) else {
        return Err(GuestError::OutOccupied { path: out });
    };
    fs::create_dir_all(parent).map_err(GuestError::io("create", parent))?;
    let mut partial_name = std::ffi::OsString::from(".");
    partial_name.push(name);
    partial_name.push(format!(".partial-{}", std::process::id()));
    let partial = parent.join(partial_name);
    remove_dir(&partial)?;
    fs::create_dir(&partial).map_err(GuestError::io("create", &partial))?;
    let description = Description::read(&image.dir)?;
    let copied = description
        .file_names()
        .iter()
        .try_for_each(|name| copy_image(&image.dir.join(name), &partial.join(name)))
        .and_then(|()| description.write(&partial))
        .and_then(|()| remove_dir(&out))
        .and_then(|()| publish(&partial, &out));
    if copied.is_err() {
        // The copy's error is the one to report.
        let _ = fs::remove_dir_all(&partial);
    }
    copied?;
    GuestImage::load(&out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cached_guest(cache: &Path, sources: &Sources) {
        let dir = cache.join(recipe::hash(sources));
        fs::create_dir_all(&dir).unwrap();
        let description = Description::of_the_recipe();
        for name in description.file_names() {
            fs::write(dir.join(name), name).unwrap();
        }
        description.write(&dir).unwrap();
    }

    #[test]
    fn a_cached_guest_is_found_and_copied_out() {
        let dir = tempfile::tempdir().unwrap();
        let cache = dir.path().join("cache");
        cached_guest(&cache, &Sources::of_this_host());
        let out = dir.path().join("a/b");
        let mut seen = Vec::new();
        // Twice: the second replaces the first.
        for _ in 0..2 {
            let options = BuildOptions {
                out: Some(out.clone()),
                cache: cache.clone(),
            };
            let image = build(&options, |progress| seen.push(format!("{progress:?}"))).unwrap();
            assert_eq!(fs::read_to_string(&image.disk).unwrap(), "disk.raw");
            assert_eq!(image.dir, out);
        }
        assert_eq!(seen, ["Cached", "Copying", "Cached", "Copying"]);
        assert_eq!(
            fs::read_dir(out.parent().unwrap()).unwrap().count(),
            1,
            "left-overs beside the guest"
        );
    }

    #[test]
    fn a_folder_with_other_things_is_refused_before_anything_is_built() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("thesis.txt"), "three years").unwrap();
        let cache = dir.path().join("cache");
        for out in [dir.path().to_owned(), dir.path().join("thesis.txt")] {
            let options = BuildOptions {
                out: Some(out),
                cache: cache.clone(),
            };
            let refused = build(&options, |_| panic!("it began"));
            assert!(
                matches!(refused, Err(GuestError::OutOccupied { .. })),
                "{refused:?}"
            );
        }
        assert!(!cache.exists());
    }

    #[test]
    fn a_second_builder_waits_for_the_first() {
        let dir = tempfile::tempdir().unwrap();
        let sources = Sources::from_mirror("http://mirror.example/debian");
        let path = dir.path().join(format!("{}.lock", recipe::hash(&sources)));
        let first = lock(&path, &mut |_| panic!("nobody to wait for")).unwrap();
        let (waiting, told) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            let second = scope.spawn(|| {
                in_cache(dir.path(), &sources, &mut |progress| {
                    if progress == Progress::Waiting {
                        waiting.send(()).unwrap();
                    }
                })
            });
            told.recv().unwrap();
            cached_guest(dir.path(), &sources);
            drop(first);
            second.join().unwrap().unwrap();
        });
    }

    #[test]
    fn space_is_checked_with_the_way_out_in_the_message() {
        let dir = tempfile::tempdir().unwrap();
        let error = check_space(dir.path(), u64::MAX, "TMPDIR")
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("MiB free in") && error.contains("TMPDIR"),
            "{error}"
        );
    }

    #[test]
    fn a_disk_without_a_file_system_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("disk.raw");
        fs::write(&disk, vec![0; 4096]).unwrap();
        assert!(matches!(
            check_file_system(&disk),
            Err(GuestError::BadResult { .. })
        ));
    }
}
