//! Eviction, and what counts as a use.

use super::*;

#[test]
fn the_least_recently_used_file_is_evicted_and_one_in_use_never() {
    let (_dir, path) = folder();
    let other = |n: u64| FileKey {
        address: address_hash(&n.to_string()),
        label: n.to_string(),
        ..key()
    };
    let unlimited = DiskTier::open(&path, None, true).unwrap();
    for n in 0..4 {
        let file = unlimited.file(other(n)).unwrap();
        fill(&file);
        close(file);
        let map = fs::File::options()
            .write(true)
            .open(path.join(format!("{}.map", other(n).stem())))
            .unwrap();
        map.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(1000 + n))
            .unwrap();
    }
    let labels = |tier: &Arc<DiskTier>| {
        tier.held()
            .unwrap()
            .into_iter()
            .map(|held| held.key.label)
            .collect::<Vec<_>>()
    };
    assert_eq!(labels(&unlimited), ["0", "1", "2", "3"]);
    let each = unlimited.held().unwrap()[0].allocated;
    let tier = DiskTier::open(&path, Some(each * 5 / 2), true).unwrap();
    // Opened: in use, and used last.
    let used = unlimited.file(other(0)).unwrap();
    assert!(tier.folder.evict(LOCK_WAIT).unwrap().within_limit);
    assert_eq!(labels(&tier), ["3", "0"]);
    let none = DiskTier::open(&path, Some(1), true).unwrap();
    assert!(
        !none.folder.evict(LOCK_WAIT).unwrap().within_limit,
        "a file in use stays"
    );
    assert_eq!(labels(&tier), ["0"]);
    close(used);
    assert!(none.folder.evict(LOCK_WAIT).unwrap().within_limit);
    assert!(labels(&tier).is_empty());
}

#[test]
fn halves_of_pairs_and_damaged_maps_are_evicted_and_nothing_else() {
    let (_dir, path) = folder();
    let other = |n: u64| FileKey {
        address: address_hash(&n.to_string()),
        ..key()
    };
    let tier = DiskTier::open(&path, None, true).unwrap();
    for n in 0..5 {
        let file = tier.file(other(n)).unwrap();
        fill(&file);
        close(file);
    }
    let name = |n, ending| path.join(format!("{}.{ending}", other(n).stem()));
    fs::remove_file(name(0, "map")).unwrap();
    fs::remove_file(name(1, "data")).unwrap();
    fs::write(name(2, "map"), "a foreign file").unwrap();
    fs::write(name(0, "new"), "of a killed process").unwrap();
    let in_use = tier.file(other(3)).unwrap();
    fs::write(name(3, "map"), "damaged while it is in use").unwrap();
    fs::write(path.join("notes.data"), "of the user").unwrap();
    let evicted = tier.evict().unwrap();
    assert_eq!((evicted.leftovers, evicted.files), (3, Vec::new()));
    let mut left: Vec<_> = fs::read_dir(&path)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    left.sort();
    let mut expected = vec![
        name(3, "data"),
        name(3, "map"),
        name(4, "data"),
        name(4, "map"),
        path.join("lock"),
        path.join("notes.data"),
    ];
    expected.sort();
    assert_eq!(left, expected);
    close(in_use);
}

#[test]
fn a_look_at_a_file_is_no_use_of_it() {
    let (_dir, path) = folder();
    let (tier, data) = completed(&path);
    let map = fs::File::options()
        .write(true)
        .open(data.with_extension("map"))
        .unwrap();
    map.set_modified(SystemTime::UNIX_EPOCH).unwrap();
    let held = tier.held().unwrap().remove(0);
    assert_eq!(tier.reopen(&held).unwrap().verify(), (BLOCKS, 0));
    assert_eq!(tier.held().unwrap()[0].used, SystemTime::UNIX_EPOCH);
}

#[test]
fn regression_an_eviction_names_versions_of_one_file_apart() {
    let (_dir, path) = folder();
    let version = |tag: &str| FileKey {
        address: address_hash(tag),
        etag: Some(tag.to_owned()),
        ..key()
    };
    let unlimited = DiskTier::open(&path, None, true).unwrap();
    for (tag, used) in [("old", 1000), ("new", 2000)] {
        let file = unlimited.file(version(tag)).unwrap();
        fill(&file);
        close(file);
        let map = path.join(format!("{}.map", version(tag).stem()));
        let map = fs::File::options().write(true).open(map).unwrap();
        map.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(used))
            .unwrap();
    }
    let each = unlimited.held().unwrap()[0].allocated;
    let tier = DiskTier::open(&path, Some(each * 3 / 2), true).unwrap();
    assert_eq!(tier.evict().unwrap().files, [version("old")]);
}

#[test]
fn the_limit_is_kept_while_one_file_grows() {
    let (_dir, path) = folder();
    let limit = BLOCKS / 2 * BLOCK;
    let tier = DiskTier::open(&path, Some(limit), true).unwrap();
    close(tier.file(key()).unwrap());
    let files = tier.open_files(&key(), true).unwrap().unwrap();
    // Without a thread for it, the writer flushes.
    let file = TierFile::new(key(), files, 1, None);
    (0..BLOCKS).for_each(|number| keep_run(&file, number..number + 1));
    let why = file.refusal().expect("nothing is refused").to_string();
    assert!(why.contains("cache-dir-size"), "{why}");
    let kept = file.missing_from(0).map(|missing| missing.start);
    assert!(
        kept.is_some_and(|kept| kept <= limit + limit / 4),
        "{kept:?} bytes of {limit}"
    );
}

#[test]
fn a_folder_with_a_name_of_a_cached_file_is_named_and_stays() {
    let (_dir, path) = folder();
    let tier = DiskTier::open(&path, None, true).unwrap();
    let name = format!("{}.data", key().stem());
    fs::create_dir(path.join(&name)).unwrap();
    let expected = format!(
        "cache-dir={}: {name} is not a file of this program; remove it",
        path.display()
    );
    assert_eq!(tier.file(key()).unwrap_err().to_string(), expected);
    let evicted = tier.evict().unwrap();
    assert!(evicted.leftovers == 0 && evicted.failure.unwrap().to_string().contains(&name));
    assert!(path.join(&name).is_dir());
    fs::remove_file(path.join("lock")).unwrap();
    fs::create_dir(path.join("lock")).unwrap();
    let error = tier.file(key()).unwrap_err().to_string();
    assert!(
        error.ends_with("lock is not a file of this program; remove it"),
        "{error}"
    );
}

/// A `--check` of its entries would never end.
#[test]
fn a_forged_map_with_too_many_blocks_is_a_leftover() {
    let (_dir, path) = folder();
    let tier = DiskTier::open(&path, None, true).unwrap();
    let forged = FileKey {
        len: i64::MAX as u64,
        block: 512,
        ..key()
    };
    let name = |ending| path.join(format!("{}.{ending}", key().stem()));
    fs::write(name("map"), encode_header(&forged).unwrap()).unwrap();
    fs::write(name("data"), "").unwrap();
    assert!(tier.held().unwrap().is_empty());
    assert_eq!(tier.evict().unwrap().leftovers, 1);
}
