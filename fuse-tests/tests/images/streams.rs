//! New streamOptimized images (`create-type=stream-optimized`): written in order, by the library and through a mount.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use fuse_tests::harness::{Cmd, Mount, Scratch, assert_same, data_ranges, need, need_fuse, qemu_img, raw_with_islands};
use fuse_tests::model::{alone, readable};
use vmdkfuse::block::{BlockWrite, Lba};
use vmdkfuse::config::{AdapterType, CreateType};
use vmdkfuse::store::ExtentName;
use vmdkfuse::vmdk::{self, NewDisk};

use crate::create::{assert_same_bytes, store};

/// Writes a raw file to a stream as a copy program does: in order, without holes.
fn write_stream(stream: &dyn BlockWrite, raw: &Path, step: u64) {
    let file = File::open(raw).unwrap();
    let len = file.metadata().unwrap().len();
    let mut bytes = Vec::new();
    for range in data_ranges(raw) {
        // The file system reports holes in pages; the stream takes whole sectors.
        let mut at = range.start / 512 * 512;
        let end = range.end.next_multiple_of(512).min(len);
        while at < end {
            bytes.resize(step.min(end - at) as usize, 0);
            file.read_exact_at(&mut bytes, at).unwrap();
            stream.write_at(Lba(at / 512), &bytes).unwrap();
            at += bytes.len() as u64;
        }
    }
}

#[test]
fn a_stream_reads_the_same_in_qemu_and_in_this_engine() {
    let _alone = alone();
    if !need("qemu-img") {
        return;
    }
    for (number, (size, step)) in [(90 << 20, 1 << 20), ((33 << 20) + 512, 4096), (100 << 10, 512)]
        .into_iter()
        .enumerate()
    {
        let scratch = Scratch::new();
        let raw = scratch.path("raw");
        raw_with_islands(&raw, size, number as u64);
        let disk = NewDisk {
            sectors: size / 512,
            kind: CreateType::StreamOptimized,
            adapter: AdapterType::LsiLogic,
            hardware_version: 4,
        };
        let stream = vmdk::create_stream(&store(&scratch), &ExtentName::new("x.vmdk").unwrap(), &disk).unwrap();
        write_stream(&stream, &raw, step);
        assert_same_bytes(&stream, &File::open(&raw).unwrap(), "read back");
        let path = scratch.path("x.vmdk");
        let unfinished = scratch.vmdkfuse().args(["--info", "lock=off"]).arg(&path).run();
        unfinished.one_error(1, &["x.vmdk", "did not finish"]);
        stream.close().unwrap();
        let written = stream.file().identity().unwrap().len;
        drop(stream);
        scratch.vmdkfuse().arg("--check").arg(&path).run().ok();
        qemu_img(["check", "-q", path.to_str().unwrap()]);
        let back = scratch.path("back");
        qemu_img([
            "convert",
            "-f",
            "vmdk",
            "-O",
            "raw",
            path.to_str().unwrap(),
            back.to_str().unwrap(),
        ]);
        assert_same(&back, &raw);
        let disk = readable(&path);
        assert_same_bytes(&disk, &File::open(&raw).unwrap(), "this engine");
        // The size must be close to that of qemu's file: at most 2 % and 256 KiB larger.
        let theirs = scratch.path("theirs.vmdk");
        let option = "subformat=streamOptimized";
        let args = [
            "convert",
            "-f",
            "raw",
            "-O",
            "vmdk",
            "-o",
            option,
            raw.to_str().unwrap(),
            theirs.to_str().unwrap(),
        ];
        qemu_img(args);
        let theirs = fs::metadata(theirs).unwrap().len();
        assert!(
            written < theirs + theirs / 50 + (256 << 10),
            "{written} bytes, qemu's has {theirs}"
        );
    }
}

/// Mounts a new stream for a disk of `size` bytes.
fn mount_stream(scratch: &Scratch, size: u64, more: &[&str]) -> Mount {
    let args = [
        "file=x.vmdk",
        "create=true",
        "create-type=stream-optimized",
        &format!("create-size={size}"),
    ];
    args.iter()
        .chain(more)
        .fold(scratch.mount(), |mount, word| mount.arg(word))
        .start()
}

/// Panics unless the stream passes the checks and qemu reads the content of `raw` from it.
#[track_caller]
fn assert_stream_is(scratch: &Scratch, raw: &Path) {
    let (path, back) = (scratch.path("x.vmdk"), scratch.path("back"));
    scratch.vmdkfuse().arg("--check").arg(&path).run().ok();
    qemu_img(["check", "-q", path.to_str().unwrap()]);
    qemu_img([
        "convert",
        "-f",
        "vmdk",
        "-O",
        "raw",
        path.to_str().unwrap(),
        back.to_str().unwrap(),
    ]);
    assert_same(&back, raw);
}

#[test]
fn a_stream_is_written_through_a_mount_and_closed_with_it() {
    let _alone = alone();
    if !need("qemu-img") || !need_fuse() {
        return;
    }
    let size = (70 << 20) + 512;
    let original = Scratch::new();
    let raw = original.path("raw");
    raw_with_islands(&raw, size, 5);
    let from = format!("if={}", raw.display());
    let ways: [(&[&str], &[&str]); 6] = [
        (&["cp", "RAW", "MNT"], &[]),
        (&["dd", "IF", "OF", "bs=777", "conv=notrunc", "count=40000"], &[]),
        (&["dd", "IF", "OF", "bs=1M", "conv=notrunc,fsync", "oflag=direct"], &[]),
        (&["dd", "IF", "OF", "bs=64K", "conv=notrunc"], &["cache=none"]),
        // One write of many requests, which the kernel would send in parallel.
        (
            &[
                "dd",
                "IF",
                "OF",
                "bs=35M",
                "conv=notrunc",
                "iflag=fullblock",
                "oflag=direct",
            ],
            &[],
        ),
        (
            &["qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", "RAW", "MNT"],
            &[],
        ),
    ];
    for (way, more) in ways {
        let scratch = Scratch::new();
        let mount = mount_stream(&scratch, size, more);
        let file = mount.file("x.raw");
        let to = format!("of={}", file.display());
        let args = way.iter().map(|word| match *word {
            "RAW" => raw.as_os_str(),
            "MNT" => file.as_os_str(),
            "IF" => from.as_ref(),
            "OF" => to.as_ref(),
            other => other.as_ref(),
        });
        let args: Vec<_> = args.collect();
        Cmd::new(args[0]).args(&args[1..]).run().ok();
        let expected = if way.contains(&"count=40000") {
            // A part of the disk, in blocks not aligned to sectors.
            let part = original.path("part");
            fs::copy(&raw, &part).unwrap();
            let file = File::options().write(true).open(&part).unwrap();
            file.set_len(777 * 40_000).unwrap();
            file.set_len(size).unwrap();
            part
        } else {
            raw.clone()
        };
        assert_same(&file, &expected);
        mount.unmount();
        assert_stream_is(&scratch, &expected);
    }
}

#[test]
fn a_write_out_of_order_to_a_stream_fails_and_changes_nothing() {
    let _alone = alone();
    if !need("qemu-img") || !need_fuse() {
        return;
    }
    let scratch = Scratch::new();
    let raw = scratch.path("raw");
    raw_with_islands(&raw, 20 << 20, 9);
    let mount = mount_stream(&scratch, 20 << 20, &["cache=writeback"]);
    let path = mount.file("x.raw");
    Cmd::new("cp").arg(&raw).arg(&path).run().ok();
    let file = File::options().write(true).open(&path).unwrap();
    let error = file
        .write_all_at(&[1; 4096], 0)
        .and_then(|()| file.sync_all())
        .unwrap_err();
    assert_eq!(error.raw_os_error(), Some(nix::libc::EIO), "{error}");
    drop(file);
    assert_same(&path, &raw);
    mount.unmount();
    assert_stream_is(&scratch, &raw);
}

/// "`fsync`, `close` … complete it, and what is written afterwards continues it": also if the daemon is killed then.
#[test]
fn a_stream_is_complete_after_each_fsync_and_each_close() {
    let _alone = alone();
    if !need("qemu-img") || !need_fuse() {
        return;
    }
    let scratch = Scratch::new();
    let raw = scratch.path("raw");
    raw_with_islands(&raw, 20 << 20, 9);
    let source = fs::read(&raw).unwrap();
    let mut mount = mount_stream(&scratch, 20 << 20, &[]);
    let path = mount.file("x.raw");
    let whole_up_to = |len: usize| {
        let (copy, expected) = (scratch.path("copy.vmdk"), scratch.path("expected"));
        fs::copy(scratch.path("x.vmdk"), &copy).unwrap();
        let mut bytes = source[..len].to_vec();
        bytes.resize(source.len(), 0);
        fs::write(&expected, bytes).unwrap();
        scratch.vmdkfuse().arg("--check").arg(&copy).run().ok();
        let (expected, copy) = (expected.to_str().unwrap(), copy.to_str().unwrap());
        qemu_img(["compare", "-f", "raw", "-F", "vmdk", expected, copy]);
    };
    let mut file = File::options().write(true).open(&path).unwrap();
    for (n, end) in (1..=5).map(|n| (n, n * (4 << 20))) {
        file.write_all_at(&source[end - (4 << 20)..end], end as u64 - (4 << 20))
            .unwrap();
        if n % 2 == 0 {
            file.sync_data().unwrap();
        } else {
            drop(file);
            whole_up_to(end);
            file = File::options().write(true).open(&path).unwrap();
        }
        whole_up_to(end);
    }
    mount.signal(nix::sys::signal::Signal::SIGKILL);
    mount.wait_end();
    drop((file, mount));
    assert_stream_is(&scratch, &raw);
}

#[test]
fn a_stream_of_a_killed_writer_is_refused() {
    let _alone = alone();
    if !need_fuse() {
        return;
    }
    let scratch = Scratch::new();
    let mut mount = mount_stream(&scratch, 20 << 20, &[]);
    let file = File::options().write(true).open(mount.file("x.raw")).unwrap();
    file.write_all_at(&[7; 10 << 20], 0).unwrap();
    mount.signal(nix::sys::signal::Signal::SIGKILL);
    mount.wait_end();
    drop((file, mount));
    scratch
        .vmdkfuse()
        .args(["--info", "x.vmdk"])
        .run()
        .one_error(1, &["x.vmdk", "did not finish"]);
}
