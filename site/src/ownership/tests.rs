//! The single steps.

use super::*;
use crate::peers::Peer;
use crate::protocol::{Hello, Purpose};
use crate::store::Store;
use crate::target::check_known;
use crate::vm::{BaseFile, FileHash, VmRecord};

fn stale_copy(root: &std::path::Path) -> (VmDir, Hello) {
    let store = Store::open(root).unwrap();
    let vm = store.vm(&"desk".parse().unwrap());
    let record = VmRecord {
        id: Id([1; 16]),
        name: vm.name().clone(),
        hardware: vm_host::Hardware::new("pc-q35-7.2"),
        disks: vec![BaseFile {
            hash: FileHash([2; 32]),
            bytes: 4096,
        }],
        boot: None,
        ready_marker: None,
        replay_friendly: false,
    };
    vm.create(&record, &elsewhere(&vm, 7)).unwrap();
    let transfer = Id([3; 16]);
    let hello = Hello {
        purpose: Purpose::Settle(transfer),
        vm: record,
        transfer,
        fence: 7,
        generations: Vec::new(),
        next: 1,
        qemu: String::new(),
        follows: false,
    };
    (vm, hello)
}

#[test]
fn what_was_answered_as_not_taken_is_never_taken() {
    let dir = tempfile::tempdir().unwrap();
    let (vm, hello) = stale_copy(dir.path());
    assert!(!was_taken(&vm, hello.vm.id, hello.transfer, hello.fence).unwrap());
    assert!(take(&vm, hello.transfer, 8).is_err());
    assert!(matches!(
        vm.lease().unwrap(),
        Lease::Elsewhere { fence: 7, .. }
    ));
    // Another attempt is another matter.
    take(&vm, Id([4; 16]), 8).unwrap();
}

#[test]
fn what_was_taken_is_answered_so_also_after_it_was_handed_on() {
    let dir = tempfile::tempdir().unwrap();
    let (vm, hello) = stale_copy(dir.path());
    take(&vm, hello.transfer, 8).unwrap();
    assert!(was_taken(&vm, hello.vm.id, hello.transfer, hello.fence).unwrap());
    elsewhere(&vm, 9).store(&vm.lease_path()).unwrap();
    assert!(was_taken(&vm, hello.vm.id, hello.transfer, hello.fence).unwrap());
    vm.note_deleted().unwrap();
    files::remove_dir(vm.dir()).unwrap();
    assert!(was_taken(&vm, hello.vm.id, hello.transfer, hello.fence).unwrap());
}

#[test]
fn nobody_else_offers_a_vm_with_its_owners_number() {
    let dir = tempfile::tempdir().unwrap();
    let (vm, mut hello) = stale_copy(dir.path());
    let Lease::Elsewhere { owner, .. } = vm.lease().unwrap() else {
        panic!("a stale copy");
    };
    let elsewhere = Store::open(dir.path().join("another")).unwrap();
    let other = elsewhere.identity().unwrap().key();
    let peer = |key| {
        let addr = "127.0.0.1:1".parse().unwrap();
        Peer::new("a".parse().unwrap(), addr, key)
    };
    check_known(&vm, &hello, &peer(owner)).unwrap();
    assert!(check_known(&vm, &hello, &peer(other)).is_err());
    // The owner itself, with a new key that somebody here said is its.
    let mut rekeyed = peer(other);
    rekeyed.former.push(owner);
    check_known(&vm, &hello, &rekeyed).unwrap();
    // The owner may have handed it on since, which takes a number more.
    hello.fence = 8;
    check_known(&vm, &hello, &peer(other)).unwrap();
    hello.fence = 6;
    assert!(check_known(&vm, &hello, &peer(owner)).is_err());
}

#[test]
fn a_hand_over_is_decided_one_way_only() {
    let dir = tempfile::tempdir().unwrap();
    let (vm, hello) = stale_copy(dir.path());
    for round in 10..40 {
        let transfer = Id([round; 16]);
        elsewhere(&vm, 7).store(&vm.lease_path()).unwrap();
        let (took, said) = std::thread::scope(|scope| {
            let taking = scope.spawn(|| take(&vm, transfer, 8).is_ok());
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
