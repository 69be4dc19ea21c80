//! Delta codecs of one page: whatever decodes encodes again to the same page.
#![no_main]

use libfuzzer_sys::fuzz_target;
use reconciler::{PAGE_SIZE, Page, PageDelta};

fuzz_target!(|bytes: &[u8]| {
    // The first byte chooses the codec and what the older page is filled with.
    let Some((&choice, bytes)) = bytes.split_first() else {
        return;
    };
    let delta = PageDelta::ALL[usize::from(choice) % PageDelta::ALL.len()];
    let old: Page = [choice / 4; PAGE_SIZE];
    let mut page = old;
    if delta.decode(bytes, &mut page).is_err() {
        return;
    }
    if let Some(again) = delta.encode(&old, &page) {
        let mut same = old;
        delta.decode(&again, &mut same).expect("what was encoded");
        assert!(same == page);
    }
});
