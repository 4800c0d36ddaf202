//! Every subformat that qemu-img can create, and chains, compared with the raw original.

use std::fs;
use std::path::{Path, PathBuf};

use fuse_tests::harness::{
    Cmd, Scratch, assert_same, assert_same_at_random, need_fuse, need_qemu, qemu_img, raw_with_islands, sha256,
};

/// Size of the original in bytes.
const SIZE: u64 = 64 << 20;

/// Mounts the images in `scratch` together; panics unless each equals the original.
fn compare(scratch: &Scratch, original: &Path, images: &[&str]) {
    let mount = images
        .iter()
        .fold(scratch.mount().arg("-r"), |mount, name| {
            mount.file(format!("{name}.vmdk"))
        })
        .start();
    let expected = sha256(original);
    for (seed, name) in images.iter().enumerate() {
        let raw = mount.file(format!("{name}.raw"));
        assert_same_at_random(&raw, original, seed as u64, 200);
        assert_eq!(sha256(&raw), expected, "{name}");
        let image = scratch.path(format!("{name}.vmdk"));
        let arguments = [
            "compare",
            "-f",
            "raw",
            "-F",
            "vmdk",
            raw.to_str().unwrap(),
            image.to_str().unwrap(),
        ];
        assert!(qemu_img(arguments).stdout.contains("identical"), "{name}");
    }
    mount.unmount();
}

/// Creates the raw original.
fn original(scratch: &Scratch, size: u64) -> PathBuf {
    let raw = scratch.path("original");
    raw_with_islands(&raw, size, 21);
    raw
}

/// Converts the original into one image for each name and options, and compares all of them.
fn convert_and_compare(variants: &[(&str, &str)]) {
    if !need_fuse() || !need_qemu() {
        return;
    }
    let scratch = Scratch::new();
    let raw = original(&scratch, SIZE);
    for (name, options) in variants {
        let out = scratch.path(format!("{name}.vmdk"));
        let arguments = [
            "convert",
            "-f",
            "raw",
            "-O",
            "vmdk",
            "-o",
            options,
            raw.to_str().unwrap(),
            out.to_str().unwrap(),
        ];
        qemu_img(arguments);
    }
    let names: Vec<_> = variants.iter().map(|(name, _)| *name).collect();
    compare(&scratch, &raw, &names);
}

#[test]
fn monolithic_sparse() {
    convert_and_compare(&[
        ("ide", "subformat=monolithicSparse,adapter_type=ide"),
        (
            "lsilogic",
            "subformat=monolithicSparse,adapter_type=lsilogic,hwversion=6",
        ),
        ("zeroed", "subformat=monolithicSparse,zeroed_grain=on"),
    ]);
}

#[test]
fn monolithic_flat() {
    convert_and_compare(&[("flat", "subformat=monolithicFlat,adapter_type=buslogic")]);
}

#[test]
fn split_extents() {
    convert_and_compare(&[
        ("split-sparse", "subformat=twoGbMaxExtentSparse,adapter_type=legacyESX"),
        ("split-flat", "subformat=twoGbMaxExtentFlat"),
    ]);
}

#[test]
fn stream_optimized() {
    convert_and_compare(&[("stream", "subformat=streamOptimized,adapter_type=lsilogic")]);
}

#[test]
fn sizes_that_are_not_multiples_of_a_grain() {
    if !need_fuse() || !need_qemu() {
        return;
    }
    for sectors in [1, 127, 129, 2049] {
        let scratch = Scratch::new();
        let raw = scratch.path("original");
        raw_with_islands(&raw, sectors * 512, sectors);
        let mut names = Vec::new();
        for subformat in ["monolithicSparse", "streamOptimized", "twoGbMaxExtentFlat"] {
            let (out, option) = (
                scratch.path(format!("{subformat}.vmdk")),
                format!("subformat={subformat}"),
            );
            let arguments = [
                "convert",
                "-f",
                "raw",
                "-O",
                "vmdk",
                "-o",
                &option,
                raw.to_str().unwrap(),
                out.to_str().unwrap(),
            ];
            qemu_img(arguments);
            names.push(subformat);
        }
        let mount = names
            .iter()
            .fold(scratch.mount().arg("-r"), |mount, name| {
                mount.file(format!("{name}.vmdk"))
            })
            .start();
        for name in names {
            assert_same(&mount.file(format!("{name}.raw")), &raw);
        }
        mount.unmount();
    }
}

/// A split disk of several extents of 2 GiB, with data across each border.
#[test]
fn a_split_disk_of_several_extents() {
    if !need_fuse() || !need_qemu() {
        return;
    }
    let scratch = Scratch::new();
    let border = 2u64 << 30;
    let write = |seed: u8, at: u64| format!("write -P {seed:#x} {at} 192k");
    let writes = [
        write(1, 0),
        write(2, border - (64 << 10)),
        write(3, 2 * border - (128 << 10)),
        write(4, 2 * border + 65536),
    ];
    for subformat in ["twoGbMaxExtentSparse", "twoGbMaxExtentFlat"] {
        let name = scratch.path(format!("{subformat}.vmdk"));
        let option = format!("subformat={subformat}");
        qemu_img(["create", "-f", "vmdk", "-o", &option, name.to_str().unwrap(), "5G"]);
        let commands = writes.iter().flat_map(|command| ["-c", command]);
        Cmd::new("qemu-io")
            .args(["-f", "vmdk"])
            .args(commands)
            .arg(&name)
            .run()
            .ok();
        let mount = scratch.mount().arg("-r").file(&name).start();
        let raw = mount.file(format!("{subformat}.raw"));
        assert_eq!(fs::metadata(&raw).unwrap().len(), 5 << 30);
        for (seed, at) in [
            (1, 0),
            (2, border - (64 << 10)),
            (3, 2 * border - (128 << 10)),
            (4, 2 * border + 65536),
        ] {
            let seen = fuse_tests::harness::read_range(&raw, at, 192 << 10);
            assert!(seen.iter().all(|byte| *byte == seed), "{subformat}: the write at {at}");
        }
        assert!(
            fuse_tests::harness::read_range(&raw, border + (200 << 10), 65536)
                .iter()
                .all(|byte| *byte == 0)
        );
        mount.unmount();
    }
}

#[test]
fn a_chain_of_three_deltas() {
    if !need_fuse() || !need_qemu() {
        return;
    }
    for base in ["monolithicSparse", "monolithicFlat", "streamOptimized"] {
        let scratch = Scratch::new();
        let raw = original(&scratch, SIZE / 4);
        let run = |tool: &str, arguments: &[&str]| Cmd::new(tool).args(arguments).dir(scratch.root()).run().ok();
        let option = format!("subformat={base}");
        run(
            "qemu-img",
            &[
                "convert",
                "-f",
                "raw",
                "-O",
                "vmdk",
                "-o",
                &option,
                "original",
                "link0.vmdk",
            ],
        );
        for link in 1..=3u32 {
            let (parent, child) = (format!("link{}.vmdk", link - 1), format!("link{link}.vmdk"));
            run(
                "qemu-img",
                &["create", "-f", "vmdk", "-F", "vmdk", "-b", &parent, &child],
            );
            // Unaligned, across grains, over data of the parent, and explicit zeroes.
            let commands = [
                format!("write -P {:#x} {} 200k", 0x10 * link, 512 * (100 + 37 * link)),
                format!("write -P {:#x} {}k 512", 0x10 * link + 1, 4096 + 64 * link),
                format!("write -z {}k 128k", 1024 * link),
            ];
            let arguments: Vec<_> = commands.iter().flat_map(|command| ["-c", command.as_str()]).collect();
            run("qemu-io", &[&["-f", "vmdk"], &arguments[..], &[&child]].concat());
            run("qemu-io", &[&["-f", "raw"], &arguments[..], &["original"]].concat());
            compare(&scratch, &raw, &[&format!("link{link}")]);
        }
    }
}
