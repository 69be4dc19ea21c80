//! Overlays: below a running QEMU, and against `qemu-img` and `qemu-io`'s view of them.

#![allow(clippy::unwrap_used, clippy::single_range_in_vec_init)]

mod common;

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use common::{Bare, guest_writes, qemu_img};
use proptest::prelude::*;
use vm_host::disk::{self, Format, OverlayReader, OverlayWriter, PAGE_SIZE};
use vm_host::{Error, Merge, Status, Vm};

fn raw_of(image: &Path) -> Vec<u8> {
    let raw = image.with_extension("flat");
    let format = if image.extension().is_some_and(|e| e == "raw") {
        "raw"
    } else {
        "qcow2"
    };
    let (from, to) = (image.to_str().unwrap(), raw.to_str().unwrap());
    qemu_img(&["convert", "-U", "-f", format, "-O", "raw", from, to]);
    std::fs::read(raw).unwrap()
}

fn read_all(reader: &OverlayReader) -> Vec<u8> {
    let mut all = vec![0xee; reader.pages() as usize * PAGE_SIZE];
    reader.read_pages(0, &mut all).unwrap();
    all
}

#[tokio::test]
async fn a_running_vm_gets_overlays() {
    let mut bare = Bare::new("snapshot");
    let second = bare.path("second.qcow2");
    disk::create_empty(&second, 4 << 20).unwrap();
    bare.launch.disks.push(second);
    let vm = Vm::start(&bare.launch).await.unwrap();
    assert_eq!(vm.disks().await.unwrap(), bare.launch.disks);
    guest_writes(&vm, 0, 1, "64k", "128k");

    let overlays = |n: u32| {
        vec![
            bare.path(&format!("a{n}.qcow2")),
            bare.path(&format!("b{n}.qcow2")),
        ]
    };
    vm.snapshot_disks(&overlays(1)).await.unwrap();
    let frozen = std::fs::read(&bare.launch.disks[0]).unwrap();
    guest_writes(&vm, 0, 2, "68k", "4k");
    vm.pause().await.unwrap();
    vm.snapshot_disks(&overlays(2)).await.unwrap();
    vm.resume().await.unwrap();
    guest_writes(&vm, 0, 3, "72k", "6k");
    guest_writes(&vm, 1, 4, "1M", "1k");
    vm.pause().await.unwrap();
    assert_eq!(vm.disks().await.unwrap(), overlays(2));
    assert!(
        frozen == std::fs::read(&bare.launch.disks[0]).unwrap(),
        "the old file changed"
    );

    // Everything is in the files while the VM is paused, also after its state was saved.
    for saved in [false, true] {
        if saved {
            vm.save_device_state().await.unwrap();
            let refused = vm.snapshot_disks(&overlays(3)).await.unwrap_err();
            assert!(matches!(refused, Error::State { .. }), "{refused}");
        }
        let reader = OverlayReader::open(&overlays(2)[0]).unwrap();
        let all = read_all(&reader);
        assert!(all == raw_of(&overlays(2)[0]), "qemu-img sees another disk");
        assert_eq!(all[64 << 10], 1);
        assert_eq!(all[68 << 10], 2);
        assert_eq!(all[72 << 10], 3);
        assert_eq!(all[78 << 10], 1);
        assert_eq!(reader.allocated_above(&overlays(1)[0]).unwrap(), [18..20]);
        assert_eq!(
            reader.allocated_above(&bare.launch.disks[0]).unwrap(),
            [17..20]
        );
        let reader = OverlayReader::open(&overlays(2)[1]).unwrap();
        assert_eq!(
            reader.allocated_above(&bare.launch.disks[1]).unwrap(),
            [256..257]
        );
    }

    // Found again after a crash, it still knows its disks; and a second overlay of the same
    // name is no overlay.
    drop(vm);
    let vm = Vm::attach(&bare.launch.runtime_dir).await.unwrap().unwrap();
    assert_eq!(vm.disks().await.unwrap(), overlays(2));
    assert_eq!(vm.status().await.unwrap(), Status::Saved);
    vm.resume().await.unwrap();
    let taken = vm.snapshot_disks(&overlays(1)).await.unwrap_err();
    assert!(matches!(taken, Error::Refused { .. }), "{taken}");
    assert_eq!(vm.disks().await.unwrap(), overlays(2), "all or nothing");
    vm.snapshot_disks(&overlays(3)).await.unwrap();
    vm.quit().await.unwrap();
    for overlay in overlays(3) {
        qemu_img(&["check", "-q", overlay.to_str().unwrap()]);
    }
}

#[tokio::test]
async fn a_running_vm_gets_more_overlays_than_a_name_of_qemus_holds() {
    // QEMU tells a chain that no header alone tells as a description of all of it, in 4,096 bytes.
    let bare = Bare::new("chain");
    let vm = Vm::start(&bare.launch).await.unwrap();
    let mut top = bare.launch.disks[0].clone();
    for number in 0..40 {
        // What stands still gets another name, which the overlay's header has and QEMU has not.
        let kept = bare.path(&format!("a-name-that-the-headers-have-{number}.qcow2"));
        std::fs::hard_link(&top, &kept).unwrap();
        let overlay = bare.path(&format!("a-name-that-qemu-has-{number}.qcow2"));
        disk::create_overlay(
            &overlay,
            Path::new(kept.file_name().unwrap()),
            Format::Qcow2,
        )
        .unwrap();
        vm.snapshot_disks(std::slice::from_ref(&overlay))
            .await
            .unwrap();
        assert_eq!(
            vm.disks().await.unwrap(),
            std::slice::from_ref(&overlay),
            "{number}"
        );
        std::fs::remove_file(&top).unwrap();
        top = overlay;
    }
    vm.quit().await.unwrap();
}

/// The overlay of this number, in a folder of its own, as generations have theirs.
fn overlay(bare: &Bare, number: u8) -> PathBuf {
    let overlay = bare.path(&number.to_string()).join("overlay.qcow2");
    let below = match number {
        1 => "../disk.qcow2".to_owned(),
        number => format!("../{}/overlay.qcow2", number - 1),
    };
    std::fs::create_dir(overlay.parent().unwrap()).unwrap();
    disk::create_overlay(&overlay, Path::new(&below), Format::Qcow2).unwrap();
    overlay
}

/// A chain of overlays with something in each, the topmost last: on every second page of 64 what the overlay's
/// number says, so that each hides some of what is behind it.
fn chain(bare: &Bare, length: u8) -> Vec<PathBuf> {
    let mut chain = vec![bare.launch.disks[0].clone()];
    for number in 1..=length {
        let overlay = overlay(bare, number);
        let writer = OverlayWriter::open(&overlay).unwrap();
        for page in (u64::from(number)..64).step_by(2) {
            // Zeroes hide what is behind them, too.
            let byte = if page % 16 == 1 { 0 } else { number };
            writer.write_page(page, &[byte; PAGE_SIZE]).unwrap();
        }
        writer.sync().unwrap();
        chain.push(overlay);
    }
    chain
}

#[test]
fn overlays_are_merged() {
    let bare = Bare::new("merge");
    let chain = chain(&bare, 5);
    let states: Vec<_> = chain.iter().map(|file| raw_of(file)).collect();
    disk::merge_overlays(&chain[4], &chain[2]).unwrap();
    // Cut off here, all that counts is as it was.
    assert!(raw_of(&chain[5]) == states[5] && raw_of(&chain[4]) == states[4]);
    assert!(raw_of(&chain[2]) == states[4]);
    std::fs::rename(&chain[2], &chain[4]).unwrap();
    std::fs::remove_file(&chain[3]).unwrap();
    assert!(raw_of(&chain[5]) == states[5] && raw_of(&chain[4]) == states[4]);
    let reader = OverlayReader::open(&chain[5]).unwrap();
    assert_eq!(reader.files().count(), 4);
    qemu_img(&["check", "-q", chain[4].to_str().unwrap()]);
}

#[tokio::test]
async fn a_running_vm_has_overlays_merged() {
    let mut bare = Bare::new("merging");
    let mut files = chain(&bare, 3);
    bare.launch.disks[0] = files[3].clone();
    let vm = Vm::start(&bare.launch).await.unwrap();
    // Some it has opened by their headers, some were put on top while it ran.
    for number in 4..=6 {
        guest_writes(&vm, 0, number, &format!("{}k", 4 * number), "40k");
        let overlay = overlay(&bare, number);
        vm.snapshot_disks(std::slice::from_ref(&overlay))
            .await
            .unwrap();
        files.push(overlay);
    }
    let before = raw_of(&files[6]);
    files.reverse();
    let run = async |files: &[PathBuf], (top, base, backing): (usize, usize, &str)| {
        let name = "disk0-of-a-test";
        let merge = Merge {
            name,
            disk: 0,
            files,
            top,
            base,
            backing,
        };
        vm.merge_overlays(&merge).await
    };
    for wrong in [(0, 3, ""), (3, 3, ""), (2, 9, "")] {
        run(&files, wrong).await.unwrap_err();
    }
    run(&files[1..], (1, 3, "")).await.unwrap_err();
    // All but the topmost and the two lowest, 5 to 2.
    run(&files, (1, 4, "../5/overlay.qcow2")).await.unwrap();
    // Cut off here, nothing changed; QEMU has it locked until it is told to forget.
    assert!(read_all(&OverlayReader::open(&files[0]).unwrap()) == before);
    assert_eq!(vm.merges().await.unwrap(), ["disk0-of-a-test"]);
    std::fs::rename(&files[4], &files[1]).unwrap();
    // QEMU's name for what was merged led through all of these folders.
    for gone in files.drain(2..5) {
        std::fs::remove_dir_all(gone.parent().unwrap()).unwrap();
    }
    vm.forget_merge("disk0-of-a-test").await.unwrap();
    assert_eq!(vm.merges().await.unwrap(), Vec::<String>::new());
    assert!(raw_of(&files[0]) == before);
    // The guest goes on, and it can be done again, though QEMU's name for what was merged is gone.
    guest_writes(&vm, 0, 9, "100k", "8k");
    files.insert(0, overlay(&bare, 7));
    vm.snapshot_disks(&files[..1]).await.unwrap();
    guest_writes(&vm, 0, 10, "104k", "8k");
    let after = raw_of(&files[0]);
    assert!(after[100 << 10] == 9 && after[104 << 10] == 10);
    run(&files, (1, 2, "../6/overlay.qcow2")).await.unwrap();
    std::fs::rename(&files[2], &files[1]).unwrap();
    // Nothing of it is only in QEMU's memory, and no name was left behind.
    vm.kill().await.unwrap();
    assert!(raw_of(&files[0]) == after);
    assert!(!bare.path("2").exists() && !bare.path("3").exists());
    let reader = OverlayReader::open(&files[0]).unwrap();
    assert_eq!(reader.files().count(), 4);
    qemu_img(&["check", "-q", files[1].to_str().unwrap()]);
}

#[test]
fn bases_are_imported() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    // Not a whole number of pages, and with a hole.
    let mut bytes = vec![0; (3 << 20) + 512];
    bytes[5000..6000].fill(7);
    bytes[3 << 20..].fill(8);
    std::fs::write(at("source.raw"), &bytes).unwrap();
    qemu_img(&[
        "convert",
        "-f",
        "raw",
        "-O",
        "qcow2",
        "-c",
        at("source.raw").to_str().unwrap(),
        at("source.qcow2").to_str().unwrap(),
    ]);
    for (source, format) in [("source.raw", Some("raw")), ("source.qcow2", None)] {
        disk::import_base(&at(source), format, &at("base.raw")).unwrap();
        let base = std::fs::read(at("base.raw")).unwrap();
        assert_eq!(base.len(), (3 << 20) + PAGE_SIZE);
        assert!(base[..bytes.len()] == bytes && base[bytes.len()..].iter().all(|&b| b == 0));
        assert!(
            std::fs::metadata(at("base.raw")).unwrap().blocks() * 512 < 1 << 20,
            "not sparse"
        );
    }
    let error = disk::import_base(&at("missing"), None, &at("base.raw"))
        .unwrap_err()
        .to_string();
    assert!(error.contains("missing"), "{error}");
    let error = disk::import_base(&at("source.raw"), Some("vmdk"), &at("x.raw")).unwrap_err();
    assert!(
        error.to_string().contains("source.raw") && !at("x.raw.new").exists(),
        "{error}"
    );
    assert_eq!(
        disk::virtual_size(&at("source.qcow2"), Format::Qcow2).unwrap(),
        bytes.len() as u64
    );
}

#[test]
fn chains_that_cannot_be_trusted_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    std::fs::write(at("base.raw"), vec![0; 1 << 20]).unwrap();
    disk::create_overlay(&at("a"), Path::new("base.raw"), Format::Raw).unwrap();
    assert!(disk::create_overlay(&at("a"), Path::new("base.raw"), Format::Raw).is_err());
    assert!(disk::create_overlay(&at("b"), Path::new("nowhere"), Format::Raw).is_err());
    disk::create_overlay(&at("b"), Path::new("a"), Format::Qcow2).unwrap();
    // A loop.
    let (a, b) = (at("a"), at("b"));
    let (a, b) = (a.to_str().unwrap(), b.to_str().unwrap());
    qemu_img(&["rebase", "-u", "-f", "qcow2", "-b", "b", "-F", "qcow2", a]);
    let error = OverlayReader::open(&at("b")).unwrap_err().to_string();
    assert!(error.contains("without an end"), "{error}");
    // A format nobody wrote down, and one that isn't one.
    qemu_img(&[
        "rebase", "-u", "-f", "qcow2", "-b", "base.raw", "-F", "vmdk", a,
    ]);
    let error = OverlayReader::open(&at("b")).unwrap_err().to_string();
    assert!(
        error.contains("vmdk") && error.contains("qemu-img rebase"),
        "{error}"
    );
    assert!(OverlayReader::open(&at("base.raw")).is_err());
    // A file that isn't in the chain.
    qemu_img(&[
        "rebase", "-u", "-f", "qcow2", "-b", "base.raw", "-F", "raw", b,
    ]);
    let reader = OverlayReader::open(&at("b")).unwrap();
    assert!(reader.allocated_above(&at("a")).is_err());
    assert!(reader.allocated_above(&at("base.raw")).unwrap().is_empty());
    let mut page = [1; PAGE_SIZE];
    assert!(reader.read_page(256, &mut page).is_err());
    reader.read_page(255, &mut page).unwrap();
    assert_eq!(page, [0; PAGE_SIZE]);
}

/// Pages of a disk of a bit more than 16, whose last isn't whole.
const DISK: usize = 16 * PAGE_SIZE + 1024;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    /// Any writes into any number of overlays read back as in an array, here and in qemu-img.
    #[test]
    fn a_chain_is_an_array(
        layers in prop::collection::vec(prop::collection::vec((0u64..17, any::<u8>()), 0..8), 1..5),
        small_clusters: bool,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let at = |n: usize| dir.path().join(format!("layer{n}"));
        let base: Vec<u8> = (0..DISK).map(|i| (i / 512) as u8).collect();
        std::fs::write(dir.path().join("base.raw"), &base).unwrap();
        let mut model = base;
        let mut written = std::collections::BTreeSet::new();
        for (number, writes) in layers.iter().enumerate() {
            let (backing, format) = match number {
                0 => ("base.raw".to_owned(), Format::Raw),
                n => (format!("layer{}", n - 1), Format::Qcow2),
            };
            if small_clusters {
                disk::create_overlay(&at(number), Path::new(&backing), format).unwrap();
            } else {
                // As other tools make them: a write copies its neighbours.
                let format = if number == 0 { "raw" } else { "qcow2" };
                qemu_img(&["create", "-q", "-f", "qcow2", "-b", &backing, "-F", format, at(number).to_str().unwrap()]);
            }
            let writer = OverlayWriter::open(&at(number)).unwrap();
            for &(page, value) in writes {
                writer.write_page(page, &[value; PAGE_SIZE]).unwrap();
                let start = page as usize * PAGE_SIZE;
                let end = DISK.min(start + PAGE_SIZE);
                model[start..end].fill(value);
                if number > 0 {
                    written.insert(page);
                }
            }
            prop_assert!(writer.write_page(17, &[1; PAGE_SIZE]).is_err());
            writer.sync().unwrap();
            drop(writer);
        }
        let top = at(layers.len() - 1);
        let reader = OverlayReader::open(&top).unwrap();
        let all = read_all(&reader);
        prop_assert!(all[..DISK] == model[..]);
        prop_assert!(all[DISK..].iter().all(|&b| b == 0));
        prop_assert!(raw_of(&top) == model);
        qemu_img(&["check", "-q", top.to_str().unwrap()]);
        let mut page = [0; PAGE_SIZE];
        reader.read_page(16, &mut page).unwrap();
        prop_assert!(page[..] == all[16 * PAGE_SIZE..]);
        // Everything written above the lowest overlay is listed; with small clusters, no more.
        let listed: std::collections::BTreeSet<u64> =
            reader.allocated_above(&at(0)).unwrap().into_iter().flatten().collect();
        prop_assert!(listed.is_superset(&written));
        if small_clusters {
            prop_assert_eq!(listed, written);
        }
    }
}
