//! Tests of an open file: exact reads, its identity, holes, writing and zeroing, also on a block device.

use super::*;

#[test]
fn reads_are_exact_or_an_error_that_names_the_offset() {
    let folders = Folders::new();
    let path = folders.path("image/a.bin");
    fs::write(&path, b"0123456789").unwrap();
    let file = open(&folders.store(&[]), "a.bin").unwrap();
    let mut four = [0; 4];
    file.read_exact_at(6, &mut four).unwrap();
    assert_eq!(&four, b"6789");
    file.read_exact_at(10, &mut []).unwrap();
    let error = file.read_exact_at(7, &mut four).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    let expected = "image/a.bin: read of 4 bytes at byte 7: the file ends at byte 10";
    assert!(error.to_string().ends_with(expected), "{error}");
    for far in [u64::MAX, u64::MAX - 3, i64::MAX as u64 - 3] {
        assert_eq!(
            file.read_exact_at(far, &mut four).unwrap_err().kind(),
            ErrorKind::OutOfRange
        );
    }
}

#[test]
fn identity_distinguishes_files_and_modifications() {
    let folders = Folders::new();
    fs::hard_link(folders.path("image/a.bin"), folders.path("image/same.bin")).unwrap();
    folders.link("a.bin", "image/link.bin");
    let store = folders.store(&[]);
    let identity = |name: &str| open(&store, name).unwrap().identity().unwrap();
    let before = identity("a.bin");
    assert_eq!(before, identity("same.bin"));
    assert_eq!(before, identity("link.bin"));
    assert_ne!(before.file, identity("disk.vmdk").file);
    let opened = open(&store, "a.bin").unwrap();
    OpenOptions::new()
        .write(true)
        .open(folders.path("image/a.bin"))
        .unwrap()
        .set_len(4096)
        .unwrap();
    let after = opened.identity().unwrap();
    assert_eq!((after.file, after.len, opened.len()), (before.file, 4096, 11));
    let past = std::time::SystemTime::UNIX_EPOCH - Duration::from_nanos(1_500_000_000);
    OpenOptions::new()
        .write(true)
        .open(folders.path("image/a.bin"))
        .unwrap()
        .set_modified(past)
        .unwrap();
    assert_eq!(opened.identity().unwrap().mtime_ns, -1_500_000_000);
}

#[test]
fn holes_are_not_allocated() {
    let folders = Folders::new();
    let file = File::create(folders.path("image/a.bin")).unwrap();
    file.set_len(64 << 20).unwrap();
    let opened = open_user_path(&folders.path("image/a.bin"), policy(&[]), Access::Read).unwrap();
    assert_eq!(opened.len(), 64 << 20);
    assert!(opened.allocated().unwrap() < 1 << 20);
    assert_eq!(opened.fd().map(|fd| fd.as_raw_fd() >= 0), Some(true));
}

/// The range beyond the end of a truncated file is not reported as a hole: a program that copies the file would take
/// the lost data for zeroes.
#[test]
fn regression_beyond_the_end_of_a_truncated_file_is_no_hole() {
    let folders = Folders::new();
    let path = folders.path("image/a.bin");
    for access in [Access::Read, Access::Write] {
        fs::write(&path, vec![1; 1 << 20]).unwrap();
        let file = open_user_path(&path, policy(&[]), access).unwrap();
        let other = OpenOptions::new().write(true).open(&path).unwrap();
        other.set_len(1 << 16).unwrap();
        assert_eq!(file.data_at(0).unwrap(), (true, 1 << 16), "{access:?}");
        assert!(
            file.data_at(1 << 16).unwrap().0 && file.data_at(1 << 19).unwrap().0,
            "{access:?}"
        );
        // A hole ends at the end of the file.
        other.set_len(0).unwrap();
        other.set_len(1 << 16).unwrap();
        assert_eq!(file.data_at(4096).unwrap(), (false, (1 << 16) - 4096), "{access:?}");
    }
}

#[test]
fn writes_are_read_back_and_extend_the_file() {
    let folders = Folders::new();
    let file = open_to_write(&folders, "a.bin");
    let write = file.writer().unwrap();
    write.write_all_at(2, b"XX").unwrap();
    assert_eq!(content(file.as_ref()), "imXXe/a.bin");
    // A write beyond the end leaves a gap of zeroes.
    write.write_all_at(5000, b"end").unwrap();
    assert_eq!(
        (write.current_len().unwrap(), file.len()),
        (5003, 11),
        "`len` keeps the length at open"
    );
    let mut gap = vec![1; 4992];
    file.read_exact_at(11, &mut gap[..4989]).unwrap();
    assert_eq!(gap.iter().position(|&byte| byte != 0), Some(4989));
    write.set_len(7).unwrap();
    assert_eq!(
        (
            write.current_len().unwrap(),
            fs::read(folders.path("image/a.bin")).unwrap()
        ),
        (7, b"imXXe/a".to_vec())
    );
    // Extending the file again does not restore the truncated bytes.
    write.set_len(9000).unwrap();
    let mut tail = vec![1; 8993];
    file.read_exact_at(7, &mut tail).unwrap();
    assert!(tail.iter().all(|&byte| byte == 0));
    write.sync().unwrap();
    for (offset, len) in [(u64::MAX, 1), (1, u64::MAX), (i64::MAX as u64, 2)] {
        assert!(
            write.zero(offset, len, true).is_err() && write.zero(offset, len, false).is_err(),
            "{offset} {len}"
        );
    }
    assert!(write.write_all_at(i64::MAX as u64, b"xx").is_err());
    assert!(write.set_len(u64::MAX).is_err());
    assert_eq!(write.current_len().unwrap(), 9000);
}

#[test]
fn zeroing_frees_space_only_with_unmap() {
    const LEN: usize = 1 << 20;
    let folders = Folders::new();
    let path = folders.path("image/a.bin");
    for unmap in [false, true] {
        fs::write(&path, vec![0xa5; LEN]).unwrap();
        let file = open_to_write(&folders, "a.bin");
        let write = file.writer().unwrap();
        write.sync().unwrap();
        let before = file.allocated().unwrap();
        write.zero(0, 0, unmap).unwrap();
        // The range starts and ends in the middle of blocks.
        write.zero(1000, 700_000, unmap).unwrap();
        write.zero(LEN as u64 - 10, 10, unmap).unwrap();
        write.sync().unwrap();
        let mut expected = vec![0xa5; LEN];
        expected[1000..701_000].fill(0);
        expected[LEN - 10..].fill(0);
        assert!(fs::read(&path).unwrap() == expected, "unmap: {unmap}");
        assert_eq!(write.current_len().unwrap(), LEN as u64);
        let after = file.allocated().unwrap();
        assert!(
            if unmap {
                after < before - 600_000
            } else {
                after >= before
            },
            "{before} → {after}, unmap: {unmap}"
        );
        // Data for the test of the fallback below.
        file.writer().unwrap().write_all_at(0, &vec![0xa5; LEN]).unwrap();
    }
    // The fallback for file systems that can neither zero a range nor punch a hole writes zeroes.
    let file = LocalStore::new(&folders.path("image"), policy(&[])).unwrap();
    let file = file.open_path(Path::new("a.bin"), Access::Write).unwrap();
    file.write_zeroes(1000, 700_000).unwrap();
    let mut expected = vec![0xa5; LEN];
    expected[1000..701_000].fill(0);
    assert!(fs::read(&path).unwrap() == expected);
}

#[test]
fn a_device_is_written_in_place_and_cannot_grow() {
    let folders = Folders::new();
    fs::write(folders.path("backing"), vec![7; 8192]).unwrap();
    let Some(device) = Loop::writable(&folders.path("backing")) else {
        eprintln!("SKIPPED a_device_is_written_in_place_and_cannot_grow: no loop device can be created here");
        return;
    };
    let file = open_user_path(&device.0, policy(&[]), Access::Write).unwrap();
    let write = file.writer().unwrap();
    write.write_all_at(512, &[1; 512]).unwrap();
    write.zero(4096, 1024, false).unwrap();
    write.zero(5120, 512, true).unwrap();
    write.set_len(8192).unwrap();
    write.set_len(100).unwrap();
    write.sync().unwrap();
    assert_eq!(write.current_len().unwrap(), 8192);
    let mut expected = vec![7; 8192];
    expected[512..1024].fill(1);
    expected[4096..5632].fill(0);
    assert!(fs::read(folders.path("backing")).unwrap() == expected);
    let error = write.write_all_at(7680, &[2; 1024]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Os(libc::ENOSPC), "{error}");
    assert!(write.set_len(9000).is_err());
}
