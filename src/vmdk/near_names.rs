//! Names in a folder that are probably meant by a name that does not exist.
//!
//! A file that was copied to another system often has its name in another case, in another normal form of Unicode
//! (macOS decomposes), or with another suffix. Only the user can tell whether it is the same file, so such a name is
//! listed in the error and never opened.

use icu_normalizer::ComposingNormalizerBorrowed;

use crate::store::{ExtentName, Store};

/// Maximum number of names of a folder that are compared.
const MAX_FILES: usize = 1 << 14;

/// Maximum number of names in a message.
const MAX_SHOWN: usize = 3;

/// Returns the names in the folder of `store` that are near to the last part of one of `wanted`, the nearest first: those
/// that differ in case or normal form alone, and then those with another suffix.
pub(super) fn near_names(store: &dyn Store, wanted: &[ExtentName]) -> Vec<String> {
    // The folder may be gone or too large: then there is nothing to tell.
    let Ok(names) = store.names(MAX_FILES) else {
        return Vec::new();
    };
    let wanted: Vec<String> = wanted
        .iter()
        .filter_map(|name| folded(last_part(name.as_bytes())))
        .collect();
    let rank = |name: &ExtentName| {
        let name = folded(name.as_bytes())?;
        let is_same = wanted.contains(&name);
        let has_stem = wanted.iter().any(|wanted| stem(wanted) == stem(&name));
        (is_same || has_stem).then_some(usize::from(!is_same))
    };
    let mut near: Vec<(usize, String)> = names
        .iter()
        .filter_map(|name| Some((rank(name)?, name.to_string())))
        .collect();
    // By rank, then by name, so that the message is the same each time.
    near.sort();
    near.truncate(MAX_SHOWN);
    near.into_iter().map(|(_, name)| name).collect()
}

/// Returns the part of a path after the last separator of any system.
fn last_part(path: &[u8]) -> &[u8] {
    path.rsplit(|b| matches!(b, b'/' | b'\\')).next().unwrap_or(path)
}

/// Returns a name without its case and normal form; `None` if it is not UTF-8.
fn folded(name: &[u8]) -> Option<String> {
    let text = std::str::from_utf8(name).ok()?;
    Some(ComposingNormalizerBorrowed::new_nfc().normalize(text).to_lowercase())
}

fn stem(name: &str) -> &str {
    name.rsplit_once('.').map_or(name, |(stem, _)| stem)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmdk::test_store::TestStore;

    #[test]
    fn names_in_another_case_or_normal_form_come_before_those_with_another_suffix() {
        let store = TestStore::new();
        for name in [
            "DISK-flat.vmdk",
            "disk-flat.bak",
            "caf\u{e9}.vmdk",
            "other.vmdk",
            "disk.vmdk",
        ] {
            std::fs::write(store.path(name), "x").unwrap();
        }
        let near = |wanted: &str| near_names(&store, &[ExtentName::new(wanted).unwrap()]);
        assert_eq!(near("C:\\vm\\disk-flat.vmdk"), ["DISK-flat.vmdk", "disk-flat.bak"]);
        assert_eq!(near("cafe\u{301}.vmdk"), ["caf\u{e9}.vmdk"]);
        assert_eq!(near("nothing.vmdk"), Vec::<String>::new());
    }
}
