use std::sync::Arc;

use reconciler::PAGE_SIZE;
use vm_host::nbd::Export;

use super::*;
use crate::vm::VmRecord;

/// A site, another that gives, and an image of 100 pages, every fifth of which is zero.
fn image(root: &std::path::Path) -> (Store, Peer, Vec<u8>, BaseFile, ImageTree) {
    let store = Store::open(root).unwrap();
    let key = crate::identity::Identity::ephemeral().unwrap().key();
    let peer = Peer::new("a".parse().unwrap(), "127.0.0.1:1".parse().unwrap(), key);
    let mut content = vec![0; 100 * PAGE_SIZE];
    for (page, bytes) in content.chunks_mut(PAGE_SIZE).enumerate() {
        bytes.fill((page % 5) as u8);
    }
    let file = BaseFile {
        hash: FileHash(*blake3::hash(&content).as_bytes()),
        bytes: content.len() as u64,
    };
    let tree = ImageTree::build(&reconciler::SlicePages(&content), &reconciler::no_progress);
    (store, peer, content, file, tree.unwrap())
}

fn part(content: &[u8], pages: Range<usize>) -> &[u8] {
    &content[pages.start * PAGE_SIZE..pages.end * PAGE_SIZE]
}

#[test]
fn an_image_is_none_until_all_of_it_is_there_and_right() {
    let dir = tempfile::tempdir().unwrap();
    let (store, peer, content, file, tree) = image(dir.path());
    Arriving::begin(&store, file, &tree, &peer).unwrap();
    assert_eq!(store.base_file(file.hash), None);
    let arriving = Arriving::open(&store, file.hash).unwrap().unwrap();
    assert_eq!(arriving.absent().len(), 80);
    arriving.put(3, part(&content, 3..40)).unwrap();
    // Neither what is wrong, nor what is at a wrong place, nor what lies beyond the end.
    arriving.put(41, part(&content, 42..43)).unwrap_err();
    arriving
        .put(99, part(&content, 99..100).repeat(2).as_slice())
        .unwrap_err();
    arriving.put(50, &content[..PAGE_SIZE - 1]).unwrap_err();
    arriving.note().unwrap();
    drop(arriving);
    // Whoever comes next goes on with it.
    Arriving::begin(&store, file, &tree, &peer).unwrap();
    let arriving = Arriving::open(&store, file.hash).unwrap().unwrap();
    assert_eq!(arriving.absent().len(), 50);
    let (missing, note) = missing(&store, file.hash).unwrap().unwrap();
    assert_eq!(
        (missing, note.from_name.as_str()),
        (50 * PAGE_SIZE as u64, "a")
    );
    assert!(!arriving.is_whole());
    arriving.verify().unwrap_err();
    arriving.put(0, part(&content, 0..3)).unwrap();
    arriving.put(40, part(&content, 40..100)).unwrap();
    assert!(arriving.is_whole());
    arriving.verify().unwrap();
    assert_eq!(store.base_file(file.hash), None);
    Paths::of(&store, file.hash).settle().unwrap();
    let kept = store.base_file(file.hash).unwrap();
    assert_eq!(std::fs::read(kept).unwrap(), content);
    assert!(Arriving::open(&store, file.hash).unwrap().is_none());
    // One that is here is not asked for.
    Arriving::begin(&store, file, &tree, &peer).unwrap_err();
}

#[test]
fn an_image_that_comes_another_way_is_whole() {
    let dir = tempfile::tempdir().unwrap();
    let (store, peer, content, file, tree) = image(dir.path());
    let mut other = content.clone();
    other[7] = 9;
    let lie = ImageTree::build(&reconciler::SlicePages(&other), &reconciler::no_progress);
    Arriving::begin(&store, file, &lie.unwrap(), &peer).unwrap();
    let copy = dir.path().join("copy");
    std::fs::write(&copy, &content).unwrap();
    assert!(store.adopt_announced(&copy, file).unwrap());
    assert_eq!(
        std::fs::read(store.base_file(file.hash).unwrap()).unwrap(),
        content
    );
    // What was said of it before it was here is not believed.
    assert_eq!(store.base_tree(file).unwrap().root(), tree.root());
}

#[test]
fn whoever_dies_at_the_last_step_leaves_an_image_that_is_opened_again() {
    let dir = tempfile::tempdir().unwrap();
    let (store, peer, content, file, tree) = image(dir.path());
    Arriving::begin(&store, file, &tree, &peer).unwrap();
    let arriving = Arriving::open(&store, file.hash).unwrap().unwrap();
    arriving.put(0, &content).unwrap();
    arriving.verify().unwrap();
    let path = store.base_path(file.hash);
    std::fs::set_permissions(&path, Permissions::from_mode(0o400)).unwrap();
    let again = Arriving::open(&store, file.hash).unwrap().unwrap();
    assert!(again.is_whole());
    again.put(0, &content).unwrap();
    // Half a note of what is there is none: all of it comes once more.
    std::fs::write(Paths::of(&store, file.hash).pages, b"half").unwrap();
    let again = Arriving::open(&store, file.hash).unwrap().unwrap();
    assert_eq!(again.absent().len(), 80);
}

#[test]
fn hashes_that_belong_to_another_content_are_found_out() {
    let dir = tempfile::tempdir().unwrap();
    let (store, peer, mut content, file, _) = image(dir.path());
    content[7] = 9;
    let tree = ImageTree::build(&reconciler::SlicePages(&content), &reconciler::no_progress);
    Arriving::begin(&store, file, &tree.unwrap(), &peer).unwrap();
    let arriving = Arriving::open(&store, file.hash).unwrap().unwrap();
    arriving.put(0, &content).unwrap();
    assert!(arriving.is_whole());
    arriving.verify().unwrap_err();
    assert_eq!(store.base_file(file.hash), None);
    assert!(note_of(&store, file.hash).unwrap().unwrap().wrong);
    arriving.verify().unwrap_err();
}

#[test]
fn an_image_of_another_length_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (store, peer, _, file, tree) = image(dir.path());
    for bytes in [0, file.bytes - 1, file.bytes + PAGE_SIZE as u64] {
        let file = BaseFile { bytes, ..file };
        Arriving::begin(&store, file, &tree, &peer).unwrap_err();
    }
    assert_eq!(note_of(&store, file.hash).unwrap(), None);
}

#[tokio::test]
async fn a_read_waits_for_its_pages_and_says_which_they_are() {
    let dir = tempfile::tempdir().unwrap();
    let (store, peer, content, file, tree) = image(dir.path());
    Arriving::begin(&store, file, &tree, &peer).unwrap();
    let arriving = Arc::new(Arriving::open(&store, file.hash).unwrap().unwrap());
    // What is zero is there.
    assert_eq!(arriving.read(0, 512).await.unwrap(), vec![0; 512]);
    let reads = [(7 * 4096 + 512, 1024), (8 * 4096, 8192)].map(|(offset, length)| {
        let arriving = arriving.clone();
        tokio::spawn(async move { arriving.read(offset, length).await.unwrap() })
    });
    let mut asked = arriving.asked();
    asked.wait_for(|reads| *reads == 2).await.unwrap();
    let mut waiting: Vec<_> = arriving
        .waiting(0)
        .into_iter()
        .map(|(_, range)| range)
        .collect();
    waiting.sort_by_key(|range| range.start);
    assert_eq!(waiting, [7..7 + READ_AHEAD, 8..8 + READ_AHEAD]);
    arriving.put(8, part(&content, 8..10)).unwrap();
    arriving.put(7, part(&content, 7..8)).unwrap();
    let [first, second] = reads;
    assert_eq!(first.await.unwrap(), vec![2; 1024]);
    assert_eq!(second.await.unwrap(), part(&content, 8..10));
    assert!(arriving.waiting(0).is_empty());
}

#[tokio::test]
async fn hashes_that_another_site_says_take_nothing_from_a_vm_that_runs_on_it() {
    let dir = tempfile::tempdir().unwrap();
    let (store, peer, mut content, file, tree) = image(dir.path());
    let arrivals = Arrivals::default();
    content[7] = 9;
    let other = ImageTree::build(&reconciler::SlicePages(&content), &reconciler::no_progress);
    let other = other.unwrap();
    // Nobody needs what was announced first.
    arrivals.begin(&store, file, &other, &peer).unwrap();
    let first = arrivals.get(&store, file.hash).unwrap().unwrap();
    assert!(first.is_in_place());
    arrivals.begin(&store, file, &tree, &peer).unwrap();
    assert!(!first.is_in_place());
    let image = arrivals.get(&store, file.hash).unwrap().unwrap();
    content[7] = 0;
    image.put(1, part(&content, 1..5)).unwrap();
    let vm = store.vm(&"desk".parse().unwrap());
    let record = VmRecord {
        disks: vec![file],
        ..VmRecord::example()
    };
    let lease = crate::lease::Lease::Held {
        fence: 1,
        transfer: None,
    };
    vm.create(&record, &lease).unwrap();
    let refused = arrivals.begin(&store, file, &other, &peer).unwrap_err();
    assert!(
        refused.chain().contains("desk runs on"),
        "{}",
        refused.chain()
    );
    assert!(image.is_in_place() && image.absent().len() == 76);
    require_whole(&vm, &record).unwrap_err();
    // The same once more is the same.
    arrivals.begin(&store, file, &tree, &peer).unwrap();
    assert!(Arc::ptr_eq(
        &image,
        &arrivals.get(&store, file.hash).unwrap().unwrap()
    ));
}
