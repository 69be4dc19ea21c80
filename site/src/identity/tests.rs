use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;

use proptest::prelude::*;

use super::*;

#[test]
fn the_key_lasts_and_is_private() {
    let site = tempfile::tempdir().unwrap();
    let keys = site.path().join("keys");
    let first = Identity::load_or_create(&keys).unwrap();
    let again = Identity::load_or_create(&keys).unwrap();
    assert_eq!(first.key(), again.key());
    assert_eq!(first.key().id(), again.id());
    assert_eq!(fs::metadata(&keys).unwrap().mode() & 0o7777, 0o700);
    assert_eq!(
        fs::metadata(keys.join(KEY_FILE)).unwrap().mode() & 0o7777,
        0o600
    );
    assert_eq!(
        fs::read_dir(&keys).unwrap().count(),
        1,
        "no temporary file is left"
    );
    let other = Identity::load_or_create(&site.path().join("other")).unwrap();
    assert_ne!(first.key(), other.key());
    assert_ne!(first.id(), other.id());
}

#[test]
fn a_new_key_takes_the_place_of_the_old_one() {
    let site = tempfile::tempdir().unwrap();
    let keys = site.path().join("keys");
    let old = Identity::load_or_create(&keys).unwrap();
    let before = fs::read(keys.join(KEY_FILE)).unwrap();
    let successor = Identity::successor(&keys).unwrap();
    assert_eq!(Identity::load_or_create(&keys).unwrap().key(), old.key());
    let announced = successor.key();
    let new = successor.install().unwrap();
    assert_eq!(new.key(), announced);
    assert_ne!(old.key(), new.key());
    assert_eq!(Identity::load_or_create(&keys).unwrap().key(), new.key());
    let files: Vec<_> = fs::read_dir(&keys).unwrap().map(Result::unwrap).collect();
    assert_eq!(files.len(), 1, "the old key is kept nowhere");
    let after = fs::read(files[0].path()).unwrap();
    assert_ne!(before, after);
    assert_eq!(files[0].metadata().unwrap().mode() & 0o7777, 0o600);
}

#[test]
fn processes_that_start_at_once_agree() {
    let site = tempfile::tempdir().unwrap();
    let keys: Vec<SiteKey> = std::thread::scope(|scope| {
        let start = || Identity::load_or_create(site.path()).unwrap().key();
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(start)).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    });
    assert!(keys.iter().all(|key| *key == keys[0]));
}

#[test]
fn an_exposed_or_foreign_key_is_refused() {
    let site = tempfile::tempdir().unwrap();
    Identity::load_or_create(site.path()).unwrap();
    let file = site.path().join(KEY_FILE);
    fs::set_permissions(&file, Permissions::from_mode(0o640)).unwrap();
    let error = Identity::load_or_create(site.path()).unwrap_err();
    assert!(error.to_string().contains("chmod 600"), "{error}");
    fs::set_permissions(&file, Permissions::from_mode(0o600)).unwrap();

    fs::set_permissions(site.path(), Permissions::from_mode(0o770)).unwrap();
    let error = Identity::load_or_create(site.path()).unwrap_err();
    assert!(error.to_string().contains("chmod 700"), "{error}");
    fs::set_permissions(site.path(), Permissions::from_mode(0o700)).unwrap();

    fs::write(&file, "-----BEGIN PRIVATE KEY-----\nsecret\n").unwrap();
    let error = Identity::load_or_create(site.path()).unwrap_err();
    assert!(matches!(error, IdentityError::Unusable { .. }));
    assert!(!format!("{error:?}").contains("secret"));
}

#[test]
fn debug_shows_no_secret() {
    let identity = Identity::ephemeral().unwrap();
    let shown = format!("{identity:?}");
    assert!(shown.contains(&identity.key().to_string()));
    assert!(shown.len() < 120, "{shown}");
}

#[test]
fn the_printed_key_is_fixed() {
    let key = SiteKey::of_spki(b"an example");
    // Worked out apart from this code; what people have written down must stay valid.
    assert_eq!(
        key.to_string(),
        "ECR0GWF-M9GB8WZ-4MKQHCE-M761GP9-QE7ZAC0-1FHD2CW-HMX75MV-E73SNWB"
    );
    assert_eq!(key.id().to_string(), "ECR0-GWFM-9GB8-WZ4M");
}

#[test]
fn a_cut_key_is_told_from_a_mistyped_one() {
    let text = SiteKey::of_spki(b"an example").to_string();
    assert_eq!(
        text[..20].parse::<SiteKey>(),
        Err(ParseKeyError::Length {
            expected: 56,
            got: 18
        })
    );
    assert_eq!("u".parse::<SiteKey>(), Err(ParseKeyError::Character('u')));
}

proptest! {
    #[test]
    fn keys_survive_being_written_down(hash: [u8; 32], lower: bool, spaces: bool) {
        let key = SiteKey(hash);
        let mut text = key.to_string();
        if lower { text = text.to_lowercase().replace('0', "o").replace('1', "l"); }
        if spaces { text = format!(" {} \n", text.replace('-', " ")); }
        prop_assert_eq!(text.parse::<SiteKey>().unwrap(), key);
        prop_assert_eq!(key.id().to_string().parse::<SiteId>().unwrap(), key.id());
        let json = serde_json::to_string(&key).unwrap();
        prop_assert_eq!(serde_json::from_str::<SiteKey>(&json).unwrap(), key);
        let bytes = postcard::to_stdvec(&key).unwrap();
        prop_assert_eq!(bytes.len(), 32);
        prop_assert_eq!(postcard::from_bytes::<SiteKey>(&bytes).unwrap(), key);
    }

    #[test]
    fn one_wrong_character_is_noticed(hash: [u8; 32], at in 0usize..56, by in 1u8..32) {
        let text = SiteKey(hash).to_string().replace('-', "");
        let mut digits = text.into_bytes();
        let alphabet = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";
        let old = alphabet.iter().position(|c| *c == digits[at]).unwrap();
        digits[at] = alphabet[(old + by as usize) % 32];
        let typed = String::from_utf8(digits).unwrap();
        prop_assert_eq!(typed.parse::<SiteKey>(), Err(ParseKeyError::Mistyped));
    }

    #[test]
    fn any_text_is_answered(text: String) {
        let _ = text.parse::<SiteKey>();
        let _ = text.parse::<SiteId>();
    }
}

#[test]
fn a_signature_is_of_one_key_and_one_message() {
    let (site, other) = (
        Identity::ephemeral().unwrap(),
        Identity::ephemeral().unwrap(),
    );
    assert_eq!(site.public().key(), site.key(), "both are of the same key");
    let signature = site.sign(b"a hand-over");
    assert!(site.public().verify(b"a hand-over", &signature));
    assert!(!site.public().verify(b"another", &signature));
    assert!(!other.public().verify(b"a hand-over", &signature));
    let new = NewKey::sign(&site, other.key());
    assert!(new.holds());
    let forged = NewKey {
        by: other.public(),
        ..new
    };
    assert!(!forged.holds());
    let text = serde_json::to_string(&new).unwrap();
    assert_eq!(serde_json::from_str::<NewKey>(&text).unwrap(), new);
    let bytes = postcard::to_allocvec(&new).unwrap();
    assert_eq!(postcard::from_bytes::<NewKey>(&bytes).unwrap(), new);
}
