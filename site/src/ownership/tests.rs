//! The single steps.

use super::*;
use crate::files::tests::{assert_no_room, assert_read_error, leave_no_room_for, make_unreadable};
use crate::protocol::{Hello, Purpose};
use crate::store::Store;
use crate::vm::VmRecord;

fn stale_copy(root: &std::path::Path) -> (VmDir, Hello) {
    let store = Store::open(root).unwrap();
    let vm = store.vm(&"desk".parse().unwrap());
    let record = VmRecord::example();
    vm.create(&record, &elsewhere(&vm, 7)).unwrap();
    let hello = Hello {
        fence: 7,
        ..Hello::example(Purpose::Settle(Id([3; 16])))
    };
    (vm, hello)
}

#[test]
fn what_was_answered_as_not_taken_is_never_taken() {
    let dir = tempfile::tempdir().unwrap();
    let (vm, hello) = stale_copy(dir.path());
    assert!(!was_taken(&vm, hello.vm.id, hello.transfer, hello.fence).unwrap());
    assert!(take(&vm, hello.transfer, 8, Chain::default()).is_err());
    assert!(matches!(
        vm.lease().unwrap(),
        Lease::Elsewhere { fence: 7, .. }
    ));
    // Another attempt is another matter.
    take(&vm, Id([4; 16]), 8, Chain::default()).unwrap();
}

#[test]
fn what_was_taken_is_answered_so_also_after_it_was_handed_on() {
    let dir = tempfile::tempdir().unwrap();
    let (vm, hello) = stale_copy(dir.path());
    take(&vm, hello.transfer, 8, Chain::default()).unwrap();
    assert!(was_taken(&vm, hello.vm.id, hello.transfer, hello.fence).unwrap());
    elsewhere(&vm, 9).store(&vm.lease_path()).unwrap();
    assert!(was_taken(&vm, hello.vm.id, hello.transfer, hello.fence).unwrap());
    vm.note_deleted().unwrap();
    files::remove_dir(vm.dir()).unwrap();
    assert!(was_taken(&vm, hello.vm.id, hello.transfer, hello.fence).unwrap());
}

#[test]
fn a_hand_over_is_decided_one_way_only() {
    let dir = tempfile::tempdir().unwrap();
    let (vm, hello) = stale_copy(dir.path());
    for round in 10..40 {
        let transfer = Id([round; 16]);
        elsewhere(&vm, 7).store(&vm.lease_path()).unwrap();
        let (took, said) = std::thread::scope(|scope| {
            let taking = scope.spawn(|| take(&vm, transfer, 8, Chain::default()).is_ok());
            let asking =
                scope.spawn(|| was_taken(&vm, hello.vm.id, transfer, hello.fence).unwrap());
            (taking.join().unwrap(), asking.join().unwrap())
        });
        assert_eq!(took, said);
    }
}

fn elsewhere(vm: &VmDir, fence: u64) -> Lease {
    Lease::Elsewhere {
        fence,
        owner: vm.store().identity().unwrap().key(),
        owner_name: "a".into(),
    }
}

#[test]
fn a_target_without_room_takes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (vm, hello) = stale_copy(dir.path());
    leave_no_room_for(&vm.lease_path());
    let failed = take(&vm, hello.transfer, 8, Chain::default()).unwrap_err();
    assert_no_room(&failed, &vm.lease_path());
    assert_eq!(vm.lease().unwrap(), elsewhere(&vm, 7));
    // That it never will is no answer before it is noted.
    let void = vm.store().void_dir().join(hello.transfer.to_string());
    files::make_dir(&vm.store().void_dir()).unwrap();
    leave_no_room_for(&void);
    let ask = || was_taken(&vm, hello.vm.id, hello.transfer, hello.fence);
    let failed = ask().unwrap_err();
    assert!(matches!(failed, Error::File { path, .. } if path == void));
    take(&vm, hello.transfer, 8, Chain::default()).unwrap();
    assert!(ask().unwrap());
}

#[tokio::test]
async fn a_source_without_room_gives_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (vm, hello) = stale_copy(dir.path());
    let held = Lease::Held {
        fence: 7,
        transfer: None,
    };
    held.store(&vm.lease_path()).unwrap();
    let other = Store::open(dir.path().join("other")).unwrap();
    let offer = Offer {
        fence: 7,
        transfer: hello.transfer,
        to: other.identity().unwrap().key(),
        to_name: "b".into(),
        was_running: true,
    };
    leave_no_room_for(&vm.lease_path());
    // It would be another error.
    let asked = async |_: Link| Err(Error::Refused("the target was asked".into()));
    let failed = give(&vm, offer.clone(), asked).await.unwrap_err();
    assert_no_room(&failed, &vm.lease_path());
    assert_eq!(vm.lease().unwrap(), held);
    // What the target answered can't be noted: it stays to be asked.
    let asked = async |_: Link| {
        leave_no_room_for(&vm.lease_path());
        Ok(())
    };
    give(&vm, offer.clone(), asked).await.unwrap_err();
    assert_eq!(offered(&vm).unwrap().as_ref(), Some(&offer));
    for taken in [true, false] {
        leave_no_room_for(&vm.lease_path());
        decide(&vm, offer.clone(), taken).unwrap_err();
        assert_eq!(offered(&vm).unwrap().as_ref(), Some(&offer));
    }
    assert_eq!(decide(&vm, offer, true).unwrap(), Settled::Away);
}

#[test]
fn what_can_not_be_read_is_no_answer() {
    let dir = tempfile::tempdir().unwrap();
    let (vm, hello) = stale_copy(dir.path());
    take(&vm, hello.transfer, 8, Chain::default()).unwrap();
    let (lease, away) = (vm.lease_path(), vm.dir().join("away"));
    std::fs::rename(&lease, &away).unwrap();
    make_unreadable(&lease);
    let ask = || was_taken(&vm, hello.vm.id, hello.transfer, hello.fence);
    assert_read_error(&ask().unwrap_err(), &lease);
    assert!(!is_void(&vm, hello.transfer));
    std::fs::remove_file(&lease).unwrap();
    std::fs::rename(&away, &lease).unwrap();
    assert!(ask().unwrap());
}
