use super::*;

#[tokio::test]
async fn what_was_deleted_is_known_to_have_been_here() {
    let dir = tempfile::tempdir().unwrap();
    let store = crate::store::Store::open(dir.path()).unwrap();
    let vm = store.vm(&"desk".parse().unwrap());
    let record = VmRecord {
        disks: Vec::new(),
        ..VmRecord::example()
    };
    let lease = Lease::Held {
        fence: 5,
        transfer: None,
    };
    vm.create(&record, &lease).unwrap();
    assert_eq!(store.deleted_fence(record.id).unwrap(), None);
    delete(&vm).await.unwrap();
    assert!(!vm.dir().exists());
    assert_eq!(store.deleted_fence(record.id).unwrap(), Some(5));
}

fn live(ran: bool) -> Live {
    Live {
        generation: Some(3),
        overlays: vec!["disk0.qcow2".into()],
        ran,
    }
}

pub(crate) fn vm_with_generation(root: &Path, number: u64) -> VmDir {
    use crate::generation::ImageInfo;
    let store = crate::store::Store::open(root).unwrap();
    let vm = store.vm(&"desk".parse().unwrap());
    let generation = vm.generation(number);
    files::make_dir(generation.dir()).unwrap();
    files::make_dir(&vm.live_dir()).unwrap();
    let none = ImageInfo {
        bytes: 0,
        root: reconciler::Root([0; 32]),
    };
    let manifest = Manifest::new(
        crate::vm::Id([1; 16]),
        number,
        None,
        Hardware::new("pc-q35-7.2"),
        String::new(),
        [none, none],
        Vec::new(),
    );
    files::write_json(&generation.dir().join("manifest.json"), &manifest).unwrap();
    vm
}

#[test]
fn a_guest_that_never_ran_starts_from_its_whole_state() {
    let dir = tempfile::tempdir().unwrap();
    let vm = vm_with_generation(dir.path(), 3);
    live(false).store(&vm).unwrap();
    assert!(matches!(
        point_of_start(&vm).unwrap(),
        StartAt::Generation(manifest) if manifest.generation == 3
    ));
    live(true).store(&vm).unwrap();
    assert_eq!(point_of_start(&vm).unwrap(), StartAt::Disks(live(true)));
    files::remove_dir(&vm.live_dir()).unwrap();
    assert!(matches!(
        point_of_start(&vm).unwrap(),
        StartAt::Generation(_)
    ));
}

#[test]
fn disks_without_their_generation_are_all_there_is() {
    let dir = tempfile::tempdir().unwrap();
    let vm = vm_with_generation(dir.path(), 2);
    live(false).store(&vm).unwrap();
    assert_eq!(point_of_start(&vm).unwrap(), StartAt::Disks(live(false)));
}

#[test]
fn overlays_that_a_killed_checkpoint_swapped_are_noted() {
    let tops = [PathBuf::from("/x/live/run/disk0-4.qcow2")];
    let healed = live(false).with_tops(&tops).unwrap();
    assert_eq!(healed.overlays, ["disk0-4.qcow2"]);
    assert!(healed.ran);
    let same = live(false);
    assert_eq!(same.with_tops(&["/y/disk0.qcow2".into()]).unwrap(), same);
}

#[tokio::test]
async fn only_another_sites_vm_leaves_a_stale_run() {
    let dir = tempfile::tempdir().unwrap();
    let vm = vm_with_generation(dir.path(), 3);
    live(true).store(&vm).unwrap();
    let held = Lease::Held {
        fence: 1,
        transfer: None,
    };
    held.store(&vm.lease_path()).unwrap();
    drop_stale_live(&vm).await.unwrap();
    assert!(Live::load(&vm).unwrap().is_some());
    let elsewhere = Lease::Elsewhere {
        fence: 2,
        owner: vm.store().identity().unwrap().key(),
        owner_name: "b".into(),
    };
    elsewhere.store(&vm.lease_path()).unwrap();
    drop_stale_live(&vm).await.unwrap();
    assert!(Live::load(&vm).unwrap().is_none());
}

#[test]
fn a_new_vm_has_nothing_of_what_lay_in_its_place() {
    let dir = tempfile::tempdir().unwrap();
    // It has no description: it did not arrive whole, or was half deleted by an older program.
    let vm = vm_with_generation(dir.path(), 3);
    live(true).store(&vm).unwrap();
    assert_eq!(vm.generations().unwrap().len(), 1);
    let disk = dir.path().join("disk.raw");
    std::fs::write(&disk, vec![7; 1 << 16]).unwrap();
    let new = NewVm {
        disk,
        boot: None,
        hardware: Hardware::new("pc-q35-7.2"),
        ready_marker: None,
        replay_friendly: false,
        booted: None,
    };
    let arriving = vm.lock().unwrap();
    assert!(matches!(create(&vm, &new), Err(Error::Refused(_))));
    drop(arriving);
    create(&vm, &new).unwrap();
    assert_eq!(vm.generations().unwrap(), []);
    assert_eq!(point_of_start(&vm).unwrap(), StartAt::Boot);
}
