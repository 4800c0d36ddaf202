//! The kinds of images that every test of writing runs over: a new one is added to [`KINDS`] and nowhere else.

use std::fs;
use std::path::{Path, PathBuf};

use fuse_tests::harness::{Cmd, Mount, Scratch, need_fuse, need_qemu, qemu_img, raw_with_islands};

/// Bytes of each disk: no whole number of grains, pages or blocks.
pub(crate) const SIZE: u64 = (12 << 20) + 512 * 77;

/// A kind of image, and how it is mounted.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Kind {
    pub(crate) name: &'static str,
    /// Makes an image that holds what the file `original` of the folder does; its name.
    make: fn(&Scratch) -> &'static str,
    /// Words of the mount besides.
    words: &'static [&'static str],
}

/// All of them. `raw` and `flat` are written by the kernel itself where it may (FUSE passthrough), the others by us,
/// in each mode of the kernel's cache.
pub(crate) const KINDS: [Kind; 9] = [
    Kind {
        name: "raw",
        make: raw,
        words: &[],
    },
    Kind {
        name: "raw, no cache",
        make: raw,
        words: &["cache=none"],
    },
    Kind {
        name: "raw, late",
        make: raw,
        words: &["cache=writeback"],
    },
    Kind {
        name: "flat",
        make: flat,
        words: &[],
    },
    Kind {
        name: "split flat",
        make: split_flat,
        words: &[],
    },
    Kind {
        name: "sparse",
        make: sparse,
        words: &[],
    },
    Kind {
        name: "sparse, late",
        make: sparse,
        words: &["cache=writeback"],
    },
    Kind {
        name: "split",
        make: split,
        words: &["cache=none"],
    },
    Kind {
        name: "delta",
        make: delta,
        words: &[],
    },
];

fn raw(scratch: &Scratch) -> &'static str {
    fs::copy(scratch.path("original"), scratch.path("disk.img")).unwrap();
    "disk.img"
}

fn flat(scratch: &Scratch) -> &'static str {
    vmdk(scratch, "flat.vmdk", "monolithicFlat")
}

fn split_flat(scratch: &Scratch) -> &'static str {
    vmdk(scratch, "splitflat.vmdk", "twoGbMaxExtentFlat")
}

fn sparse(scratch: &Scratch) -> &'static str {
    vmdk(scratch, "sparse.vmdk", "monolithicSparse")
}

fn split(scratch: &Scratch) -> &'static str {
    vmdk(scratch, "split.vmdk", "twoGbMaxExtentSparse")
}

fn delta(scratch: &Scratch) -> &'static str {
    vmdk(scratch, "base.vmdk", "monolithicSparse");
    let words = [
        "create",
        "-q",
        "-f",
        "vmdk",
        "-b",
        "base.vmdk",
        "-F",
        "vmdk",
        "top.vmdk",
    ];
    Cmd::new("qemu-img").args(words).dir(scratch.root()).run().ok();
    "top.vmdk"
}

fn vmdk(scratch: &Scratch, name: &'static str, subformat: &str) -> &'static str {
    let option = format!("subformat={subformat}");
    let words = ["convert", "-f", "raw", "-O", "vmdk", "-o", &option, "original", name];
    Cmd::new("qemu-img").args(words).dir(scratch.root()).run().ok();
    name
}

/// An image in a folder of its own.
pub(crate) struct Disk {
    pub(crate) scratch: Scratch,
    pub(crate) kind: Kind,
    image: &'static str,
    /// What it holds.
    pub(crate) bytes: Vec<u8>,
}

impl Disk {
    /// Makes one with islands of data in it.
    pub(crate) fn new(kind: Kind) -> Self {
        let scratch = Scratch::new();
        raw_with_islands(&scratch.path("original"), SIZE, 5);
        let bytes = fs::read(scratch.path("original")).unwrap();
        let image = (kind.make)(&scratch);
        Self {
            scratch,
            kind,
            image,
            bytes,
        }
    }

    /// The file that is named to mount it.
    pub(crate) fn image(&self) -> PathBuf {
        self.scratch.path(self.image)
    }

    /// Mounts it as `disk`.
    #[track_caller]
    pub(crate) fn mount(&self) -> Mount {
        self.mount_with(&[])
    }

    /// The same with words besides.
    #[track_caller]
    pub(crate) fn mount_with(&self, words: &[&str]) -> Mount {
        let start = self.scratch.mount().file(self.image).arg("name=disk");
        self.kind
            .words
            .iter()
            .chain(words)
            .fold(start, |start, word| start.arg(word))
            .start()
    }

    /// Panics unless the image, which nobody has open, is sound and holds [`Self::bytes`], as qemu and as we read it.
    #[track_caller]
    pub(crate) fn check(&self) {
        let (image, seen) = (self.image(), self.scratch.path("seen"));
        let format = if self.image.ends_with(".vmdk") { "vmdk" } else { "raw" };
        if format == "vmdk" {
            self.scratch.vmdkfuse().arg("--check").key("file", &image).run().ok();
        }
        qemu_img([
            "convert",
            "-f",
            format,
            "-O",
            "raw",
            image.to_str().unwrap(),
            seen.to_str().unwrap(),
        ]);
        self.holds(&seen);
        fs::remove_file(&seen).unwrap();
        let mount = self.mount_with(&["readonly=true"]);
        self.holds(&mount.file("disk"));
        mount.unmount();
    }

    /// Panics unless a file holds [`Self::bytes`].
    #[track_caller]
    pub(crate) fn holds(&self, file: &Path) {
        let seen = fs::read(file).unwrap();
        assert_eq!(seen.len(), self.bytes.len(), "bytes of {}", file.display());
        let wrong = seen.iter().zip(&self.bytes).position(|(a, b)| a != b);
        assert_eq!(wrong, None, "{}: {} has a wrong byte", self.kind.name, file.display());
    }
}

/// Whether disks can be made and mounted here.
pub(crate) fn ready() -> bool {
    need_fuse() && need_qemu()
}

/// Does `test` for a disk of each kind.
pub(crate) fn for_each_kind(test: impl Fn(Disk) + Sync) {
    if ready() {
        fuse_tests::harness::each(&KINDS, |kind| kind.name.to_owned(), |kind| test(Disk::new(*kind)));
    }
}
