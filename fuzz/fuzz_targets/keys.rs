//! Keys, names and addresses as people type them. What is accepted is written back in one
//! form, and read the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use site::identity::{SiteId, SiteKey};
use site::peers::{PeerAddr, PeerName};

fuzz_target!(|text: &str| {
    if let Ok(key) = text.parse::<SiteKey>() {
        assert_eq!(key.to_string().parse(), Ok(key));
    }
    if let Ok(id) = text.parse::<SiteId>() {
        assert_eq!(id.to_string().parse(), Ok(id));
    }
    if let Ok(name) = text.parse::<PeerName>() {
        assert!(!name.as_str().contains(['/', '\0', ' ']) && !name.as_str().starts_with('.'));
    }
    if let Ok(addr) = text.parse::<PeerAddr>() {
        assert!(addr.as_str().contains(':'));
    }
});
