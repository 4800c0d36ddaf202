//! A base with children is not opened for writing, however it is named and wherever the children are.

use std::fs;

use fuse_tests::model::{alone, writable};
use tempfile::tempdir;
use vmdkfuse::error::ErrorKind;

use super::hosted::{BASE, Hosted, descriptor, flat_base};

#[test]
fn regression_a_base_is_protected_when_it_is_opened_by_a_symlink() {
    let _alone = alone();
    let dir = tempdir().unwrap();
    let folder = dir.path().join("vm");
    fs::create_dir(&folder).unwrap();
    let base = folder.join("base.vmdk");
    flat_base(&folder, "fffffffe", 2048);
    let hosted = Hosted {
        capacity: 2048,
        redundant: None,
        unclean: false,
        ..Hosted::default()
    };
    let text = descriptor(
        "fffffffe",
        Some("fffffffe"),
        "monolithicSparse",
        "RW 2048 SPARSE \"c.vmdk\"",
    );
    hosted.make(&folder.join("base-000001.vmdk"), &text, 128);
    assert_eq!(writable(&base).map(drop).unwrap_err().kind(), ErrorKind::Policy);
    // Through the link the base has another folder, in which it has no children.
    let link = dir.path().join("disk.vmdk");
    std::os::unix::fs::symlink(&base, &link).unwrap();
    let error = writable(&link)
        .map(drop)
        .expect_err("the base of a snapshot was opened for writing");
    assert_eq!(error.kind(), ErrorKind::Policy);
}

#[test]
fn regression_a_child_is_found_in_a_folder_of_many_files() {
    let _alone = alone();
    let dir = tempdir().unwrap();
    for i in 0..5000 {
        fs::write(dir.path().join(format!("f{i}.vmdk")), b"").unwrap();
    }
    let base = dir.path().join("base.vmdk");
    flat_base(dir.path(), BASE, 2048);
    let last = fs::read_dir(dir.path()).unwrap().flatten().map(|e| e.path());
    let last = last
        .filter(|p| !p.ends_with("base.vmdk") && !p.ends_with("base-flat.vmdk"))
        .last()
        .unwrap();
    let hosted = Hosted {
        capacity: 2048,
        redundant: None,
        unclean: false,
        ..Hosted::default()
    };
    hosted.make_child(&last, 128);
    let error = writable(&base)
        .map(drop)
        .expect_err("the base of a snapshot was opened for writing");
    assert_eq!(error.kind(), ErrorKind::Policy);
}
