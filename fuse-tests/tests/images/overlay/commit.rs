//! Complete commits: an overlay is merged into every kind of base.

use std::fs;

use fuse_tests::harness::{qemu_img, raw_with_islands, sha256};
use fuse_tests::make::model::Random;
use fuse_tests::model::alone;
use tempfile::tempdir;
use vmdkfuse::error::ErrorKind;
use vmdkfuse::overlay::commit::Commit;

use super::folder::{Folder, format};
use super::pair::{Pair, go_on};
use super::text;

#[test]
fn a_commit_merges_into_every_kind_of_base() {
    let _alone = alone();
    let Some(folder) = Folder::new((12 << 20) + 512 * 5) else {
        return;
    };
    let expected = folder.scratch.path("expected.raw");
    for (base, seed) in folder.bases().iter().zip(1..) {
        let pair = folder.changed(base, seed, 400);
        let bottom = sha256(&folder.scratch.path("bottom.vmdk"));
        let commit = Commit::open(&pair.disk).unwrap();
        assert!(commit.total() > 0);
        assert!(commit.run(&mut go_on).unwrap());
        drop(commit);
        pair.merged(text(base));
        pair.model.save(&expected);
        qemu_img(["compare", "-f", format(base), "-F", "raw", text(base), text(&expected)]);
        if format(base) == "vmdk" {
            qemu_img(["compare", "-f", "vmdk", "-F", "raw", text(&folder.cow), text(&expected)]);
            if !base.ends_with("flat.vmdk") {
                qemu_img(["check", text(base)]);
            }
        }
        assert_eq!(
            sha256(&folder.scratch.path("bottom.vmdk")),
            bottom,
            "a parent was changed"
        );
        fs::remove_file(&folder.cow).unwrap();
    }
}

#[test]
fn a_commit_to_a_stream_is_refused_and_changes_nothing() {
    let _alone = alone();
    let Some(folder) = Folder::new(2 << 20) else { return };
    let base = folder.vmdk("stream.vmdk", "subformat=streamOptimized");
    let pair = folder.changed(&base, 1, 50);
    let before = (sha256(&base), sha256(&folder.cow));
    let error = Commit::open(&pair.disk).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ReadOnly);
    assert!(error.to_string().contains("can't be merged into its base"), "{error}");
    assert!(error.to_string().contains("streamOptimized"), "{error}");
    assert_eq!((sha256(&base), sha256(&folder.cow)), before);
    pair.same("after the refusal");
}

#[test]
fn a_commit_merges_into_raw_images_of_any_length() {
    let _alone = alone();
    let dir = tempdir().unwrap();
    let [base, cow, keep] = ["base.img", "cow.vmdk", "keep.raw"].map(|name| dir.path().join(name));
    for (len, seed) in [1, 512, 700, 8191, 8704, (1 << 20) + 77].into_iter().zip(1..) {
        raw_with_islands(&keep, len, seed);
        fs::copy(&keep, &base).unwrap();
        let pair = Pair::changed(&base, &cow, &keep, seed, 60);
        pair.merge();
        pair.merged(&format!("{len} bytes"));
        fs::remove_file(&cow).unwrap();
    }
}

#[test]
fn an_overlay_takes_writes_after_a_commit() {
    let _alone = alone();
    let Some(folder) = Folder::new(4 << 20) else { return };
    let mut pair = folder.changed(&folder.sparse("base.vmdk"), 1, 50);
    for round in 0..4 {
        pair.merge();
        pair.merged(&format!("round {round}"));
        pair.change(&mut Random::new(round), 50);
    }
}
