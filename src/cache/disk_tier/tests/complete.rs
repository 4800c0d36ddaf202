//! Conditions of a complete file.

use super::*;

#[test]
fn damage_that_was_found_ends_the_completion() {
    let (_dir, path) = folder();
    let (tier, data) = completed(&path);
    flip(&data, 5 * BLOCK + 17);
    flip(&data, 9 * BLOCK + 17);
    // A disk that loses bits leaves the times as they are.
    let record = completion::completion_of(&File::open(&data).unwrap()).unwrap();
    let map = fs::File::options()
        .write(true)
        .open(data.with_extension("map"))
        .unwrap();
    map.write_all_at(&record, format::COMPLETION).unwrap();
    let file = tier.file(key()).unwrap();
    assert!(file.complete().is_some() && file.read(5).is_none());
    close(file);
    let file = tier.file(key()).unwrap();
    assert!(file.complete().is_none(), "block 5 would be read without its checksum");
    file.write(5, &content(5));
    close(file);
    let file = tier.file(key()).unwrap();
    assert!(file.complete().is_none(), "block 9 was never looked at");
    assert_eq!((file.read(5), file.read(9)), (Some(content(5)), None));
    fill(&file);
    close(file);
    assert!(tier.file(key()).unwrap().complete().is_some());
}

#[test]
fn a_copied_file_is_complete_again_only_if_it_is_sound() {
    let touch = |data: &Path| {
        let file = fs::File::options().write(true).open(data).unwrap();
        file.set_modified(SystemTime::UNIX_EPOCH).unwrap();
    };
    for (damaged, copied) in [
        (false, &touch as &dyn Fn(&Path)),
        (true, &|data: &Path| flip(data, 7 * BLOCK)),
    ] {
        let (_dir, path) = folder();
        let (tier, data) = completed(&path);
        copied(&data);
        // Opened and closed, without a read: the thread of the tier, or the end of the file, has verified it.
        close(tier.file(key()).unwrap());
        let file = tier.file(key()).unwrap();
        assert_eq!(file.complete().is_none(), damaged);
        assert_eq!(file.has(7), !damaged);
    }
}

#[test]
fn a_file_with_damage_from_before_its_completion_is_not_complete() {
    let (_dir, path) = folder();
    let tier = DiskTier::open(&path, None, true).unwrap();
    let file = tier.file(key()).unwrap();
    (0..BLOCKS - 1).for_each(|number| file.write(number, &content(number)));
    close(file);
    flip(&path.join(format!("{}.data", key().stem())), 5 * BLOCK + 17);
    let file = tier.file(key()).unwrap();
    file.write(BLOCKS - 1, &content(BLOCKS - 1));
    let why = file.finish().unwrap_err().to_string();
    assert!(why.contains("1 of 40 blocks"), "{why}");
    assert!(file.complete().is_none(), "block 5 would be read without its checksum");
    file.write(5, &content(5));
    file.finish().unwrap();
    assert!(file.complete().is_some());
}

#[test]
fn regression_damage_between_write_and_completion_is_found() {
    let (_dir, path) = folder();
    let tier = DiskTier::open(&path, None, true).unwrap();
    let file = tier.file(key()).unwrap();
    (0..BLOCKS - 1).for_each(|number| file.write(number, &content(number)));
    flip(&path.join(format!("{}.data", key().stem())), 5 * BLOCK + 17);
    file.write(BLOCKS - 1, &content(BLOCKS - 1));
    let why = file.finish().unwrap_err().to_string();
    assert!(why.contains("1 of 40 blocks"), "{why}");
    assert!(
        file.complete().is_none() && !file.has(5),
        "block 5 would be read without its checksum"
    );
}

/// A thread that verifies compares the data with the entry that it has read before.
#[test]
fn regression_a_block_that_was_written_anew_is_not_forgotten_by_its_old_entry() {
    let (_dir, path) = folder();
    let (tier, _) = completed(&path);
    let file = tier.file(key()).unwrap();
    file.forget_damaged(5, 1);
    assert!(file.has(5) && file.complete().is_some());
}

#[test]
fn the_blocks_of_a_killed_process_are_part_of_a_complete_file() {
    let (_dir, path) = folder();
    let killed = DiskTier::open(&path, None, true).unwrap();
    let file = killed.file(key()).unwrap();
    (0..20).for_each(|number| file.write(number, &content(number)));
    // Neither flushed nor ended. Its thread would flush in some seconds.
    killed.flusher.close();
    std::mem::forget((killed, file));
    let tier = DiskTier::open(&path, None, true).unwrap();
    let file = tier.file(key()).unwrap();
    (20..BLOCKS).for_each(|number| file.write(number, &content(number)));
    file.finish().unwrap();
    assert!(file.complete().is_some());
}

#[test]
fn a_block_that_is_there_is_not_written_again() {
    let (_dir, path) = folder();
    let (tier, data) = completed(&path);
    let before = fs::metadata(&data).unwrap();
    let file = tier.file(key()).unwrap();
    fill(&file);
    let after = fs::metadata(&data).unwrap();
    assert_eq!(
        (after.mtime(), after.mtime_nsec()),
        (before.mtime(), before.mtime_nsec())
    );
    assert!(file.complete().is_some());
}
