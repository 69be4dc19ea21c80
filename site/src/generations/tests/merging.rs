use reconciler::ReadPages;
use vm_host::disk::OverlayWriter;

use super::*;

/// What a generation's disk holds.
fn content(vm: &VmDir, number: u64) -> Vec<u8> {
    let image = disks::DiskImage::open(&vm.generation(number).disk(0)).unwrap();
    let mut content = vec![0; 1 << 16];
    image
        .read_many(reconciler::PageIndex(0), &mut content)
        .unwrap();
    content
}

#[tokio::test]
async fn merged_disks_read_as_before_wherever_it_was_cut_off() {
    let dir = tempfile::tempdir().unwrap();
    let (vm, record) = vm(dir.path());
    files::remove_dir(&vm.live_dir()).unwrap();
    for number in 1..=8 {
        let on = (number > 1).then(|| number - 1);
        generation(&vm, &record, number, on);
        let disk = OverlayWriter::open(&vm.generation(number).disk(0)).unwrap();
        for page in (number..16).step_by(2) {
            disk.write_page(page, &[number as u8; reconciler::PAGE_SIZE])
                .unwrap();
        }
        disk.sync().unwrap();
    }
    let b = trust(&vm, "b");
    let kept = vm.generation(4).load_manifest().unwrap().unwrap();
    seen::met(&vm, &b, &[kept.identity()]).unwrap();
    let states: Vec<_> = [4, 7, 8].map(|number| content(&vm, number)).into();
    let is_as_before = || {
        for (number, state) in [4, 7, 8].into_iter().zip(&states) {
            assert!(content(&vm, number) == *state, "{number}");
        }
    };
    // Pruned without merging: a kill comes after any step.
    for number in [1, 2, 3, 5, 6, 7] {
        vm.generation(number).mark_pruned().unwrap();
    }
    let note = vm.generation(5).load_pruned().unwrap().unwrap();
    for cut in 0..3 {
        if cut > 0 {
            let merged = vm.generation(7).disk(0);
            vm_host::disk::merge_overlays(&merged, &vm.generation(5).disk(0)).unwrap();
        }
        if cut > 1 {
            let (from, to) = (vm.generation(5).disk(0), vm.generation(7).disk(0));
            fs::rename(from, to).unwrap();
        }
        is_as_before();
    }
    let done = prune_all(&vm).await;
    is_as_before();
    assert_eq!(done.unmerged, None);
    let [first] = &done.merged[..] else {
        panic!("{done:?}");
    };
    assert_eq!((first.into, &first.from[..]), (3, &[2, 1][..]));
    let with_disks = |number: &u64| vm.generation(*number).disk(0).exists();
    let left: Vec<u64> = (1..=8).filter(with_disks).collect();
    assert_eq!(left, [3, 4, 7, 8]);
    // The newest of those that were merged may come again, and the others anew.
    let again = make_place(
        &vm,
        Some(8),
        vm.generation(7).load_pruned().unwrap().unwrap(),
    );
    assert_eq!(again.unwrap().generation, 7);
    assert_eq!(make_place(&vm, Some(8), note.clone()).unwrap(), note);
}

#[tokio::test]
async fn what_others_may_have_open_is_not_merged() {
    let dir = tempfile::tempdir().unwrap();
    let (vm, record) = vm(dir.path());
    line(&vm, &record);
    generation(&vm, &record, 4, Some(3));
    for number in 1..=3 {
        fs::remove_file(vm.log_path(number)).unwrap();
    }
    // One has another name elsewhere, and on another one rests the disk of a fork.
    fs::hard_link(vm.generation(1).disk(0), dir.path().join("elsewhere")).unwrap();
    let fork = vm.dir().join(survey::RUN).join("fork");
    fs::create_dir_all(&fork).unwrap();
    disks::overlay_on(&vm, &record, Some(2), 0, &fork.join("disk0.qcow2")).unwrap();
    let before = fs::read(dir.path().join("elsewhere")).unwrap();
    let done = prune_all(&vm).await;
    assert!(
        done.merged.is_empty() && done.unmerged.is_none(),
        "{done:?}"
    );
    assert!(fs::read(dir.path().join("elsewhere")).unwrap() == before);
    assert_readable(&vm, 4);
    fs::remove_dir_all(fork).unwrap();
    let done = prune_all(&vm).await;
    let merged: Vec<_> = done.merged.iter().map(|m| (m.into, &m.from[..])).collect();
    assert_eq!(merged, [(3, &[2][..])], "{done:?}");
    assert_readable(&vm, 4);
}
