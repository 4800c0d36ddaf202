//! Commits that cannot end are refused before they start, and a base that one has left half merged says so.

use std::fs;
use std::path::Path;

use fuse_tests::harness::{Cmd, Outcome, Scratch, need_fuse, need_root, sha256};
use fuse_tests::model::alone;
use vmdkfuse::block::{Lba, SECTOR};
use vmdkfuse::error::Error;
use vmdkfuse::overlay::commit::{Commit, Next, Step};
use vmdkfuse::volume;

use super::pair::{close, disk};
use super::text;

/// Writes one sector of each number in `sectors` to the overlay `cow`, which is created, over `base`.
fn overlay(base: &Path, cow: &Path, sectors: &[u64]) {
    let pair = volume::open(&disk(base, cow)).unwrap();
    for sector in sectors {
        let writer = pair.disk().writer().unwrap();
        writer.write_at(Lba(*sector), &[9; SECTOR as usize]).unwrap();
    }
    close(pair);
}

fn commit(scratch: &Scratch, base: &Path, cow: &Path) -> Outcome {
    scratch
        .vmdkfuse()
        .arg("--commit")
        .key("cow", cow)
        .key("file", base)
        .run()
}

#[test]
fn a_commit_into_an_extent_that_is_never_written_is_refused_before_anything_changes() {
    let _alone = alone();
    let scratch = Scratch::new();
    scratch.write("flat.img", vec![7; 1 << 20]);
    for (extent, word) in [("RW 2048 ZERO", "ZERO"), ("RDONLY 2048 FLAT \"flat.img\" 0", "RDONLY")] {
        scratch.write("own.img", vec![3; 1 << 20]);
        let text = format!(
            "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\ncreateType=\"custom\"\n\
             RW 2048 FLAT \"own.img\" 0\n{extent}\n"
        );
        let (base, cow) = (scratch.write("base.vmdk", text), scratch.path("cow.vmdk"));
        overlay(&base, &cow, &[10, 2048 + 10]);
        let before = [&base, &scratch.path("own.img"), &cow].map(|path| sha256(path));
        let refused = commit(&scratch, &base, &cow);
        refused.one_error(1, &["nothing was merged", word, "can't be written to"]);
        assert_eq!([&base, &scratch.path("own.img"), &cow].map(|path| sha256(path)), before);
        fs::remove_file(&cow).unwrap();
        // A changed range that the base can take is still merged.
        overlay(&base, &cow, &[10]);
        commit(&scratch, &base, &cow).ok();
        assert_eq!(fs::read(scratch.path("own.img")).unwrap()[10 * 512..11 * 512], [9; 512]);
        fs::remove_file(&cow).unwrap();
    }
}

#[test]
fn a_commit_without_room_is_refused_before_anything_changes_and_says_how_much_it_needs() {
    let _alone = alone();
    if !need_root() {
        return;
    }
    let scratch = Scratch::new();
    let small = scratch.mkdir("small");
    Cmd::new("mount")
        .args(["-t", "tmpfs", "-o", "size=4m", "none"])
        .arg(&small)
        .run()
        .ok();
    for name in ["base.vmdk", "thin.vmdk", "base.img"] {
        let (base, cow) = (small.join(name), scratch.path("cow.vmdk"));
        let kind = if name == "thin.vmdk" {
            "vmfs-thin"
        } else {
            "monolithic-sparse"
        };
        if name.ends_with("img") {
            fs::File::create(&base).unwrap().set_len(64 << 20).unwrap();
        } else {
            let words = ["create-size=64M", &format!("create-type={kind}")].map(str::to_owned);
            scratch.vmdkfuse().arg("--create").arg(&base).args(words).run().ok();
        }
        // A sector in each of 128 grains of 64 KiB, 16 of the base's pages each: 8 MiB in a sparse base.
        let sectors: Vec<u64> = (0..1024).map(|i| i * 128).collect();
        overlay(&base, &cow, &sectors);
        let before = sha256(&base);
        let refused = commit(&scratch, &base, &cow);
        refused.one_error(1, &["nothing was merged", "bytes more", "bytes free", "No space left"]);
        assert_eq!(sha256(&base), before, "{name}");
        Cmd::new("mount")
            .args(["-o", "remount,size=200m"])
            .arg(&small)
            .run()
            .ok();
        commit(&scratch, &base, &cow).ok();
        for file in fs::read_dir(&small).unwrap() {
            fs::remove_file(file.unwrap().path()).unwrap();
        }
        fs::remove_file(&cow).unwrap();
        Cmd::new("mount").args(["-o", "remount,size=4m"]).arg(&small).run().ok();
    }
}

#[test]
fn a_base_that_is_half_merged_says_so_wherever_the_overlay_lies() {
    let _alone = alone();
    if !need_fuse() {
        return;
    }
    let scratch = Scratch::new();
    let cow = scratch.mkdir("elsewhere").join("cow.vmdk");
    scratch
        .vmdkfuse()
        .args(["--create", "base.vmdk", "create-size=4M"])
        .run()
        .ok();
    scratch.write("base.img", vec![0; 4 << 20]);
    for name in ["base.vmdk", "base.img"] {
        let base = scratch.path(name);
        overlay(&base, &cow, &[0, 4096]);
        let begun = Commit::open(&disk(&base, &cow)).unwrap();
        let interrupted = begun.run(&mut |step| match step {
            Step::Copied(_) => Err(Error::corrupt("interrupted")),
            _ => Ok(Next::GoOn),
        });
        interrupted.unwrap_err();
        drop(begun);
        let words = [name, "not finished", "mixture", text(&cow)];
        for action in ["--info", "--map"] {
            let said = scratch.vmdkfuse().arg(action).key("file", &base).run().ok();
            said.error_names(&words);
        }
        for flags in [&["-r"] as &[&str], &[]] {
            let mnt = scratch.mkdir("m");
            let said = scratch.vmdkfuse().args(flags).arg(&mnt).key("file", &base).run().ok();
            scratch.vmdkfuse().arg("--unmount").arg(&mnt).run().ok();
            said.error_names(&words);
        }
        commit(&scratch, &base, &cow).ok();
        let silent = scratch.vmdkfuse().arg("--info").key("file", &base).run().ok();
        assert_eq!(silent.stderr, "", "the commit was completed");
        fs::remove_file(&cow).unwrap();
    }
}

#[test]
fn a_commit_counts_the_bytes_that_it_merges() {
    let _alone = alone();
    let scratch = Scratch::new();
    let (base, cow) = (scratch.write("base.img", vec![0; 4 << 20]), scratch.path("cow.vmdk"));
    let pair = volume::open(&disk(&base, &cow)).unwrap();
    pair.write(0, &vec![5; 192 << 10]).unwrap();
    close(pair);
    let done = commit(&scratch, &base, &cow).ok();
    assert!(done.stdout.contains(&format!(" {} bytes", 192 << 10)), "{done}");
}
