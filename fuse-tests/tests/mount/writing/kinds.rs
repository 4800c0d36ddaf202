//! Kinds of images that every write test runs over. A new kind is added to [`KINDS`] and nowhere else.

use std::fs;
use std::path::{Path, PathBuf};

use fuse_tests::harness::{Cmd, Mount, Scratch, need_fuse, need_qemu, qemu_img, raw_with_islands};

/// Size of each disk in bytes; not a multiple of a grain, page or block.
pub(crate) const SIZE: u64 = (12 << 20) + 512 * 77;

/// A kind of image, and the arguments of its mount.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ImageKind {
    /// Name in messages.
    pub(crate) name: &'static str,
    /// Creates an image with the content of the file `original` of the folder; returns the name of its file.
    make: fn(&Scratch) -> &'static str,
    /// Additional arguments of the mount.
    arguments: &'static [&'static str],
}

/// All kinds. The kernel writes `raw` and `flat` on its own where it may (FUSE passthrough); the daemon writes the
/// others, in each mode of the kernel's cache.
pub(crate) const KINDS: [ImageKind; 7] = [
    ImageKind {
        name: "raw",
        make: raw,
        arguments: &[],
    },
    ImageKind {
        name: "raw, no cache",
        make: raw,
        arguments: &["cache=none"],
    },
    ImageKind {
        name: "flat",
        make: flat,
        arguments: &[],
    },
    ImageKind {
        name: "split flat",
        make: split_flat,
        arguments: &[],
    },
    ImageKind {
        name: "sparse",
        make: sparse,
        arguments: &[],
    },
    ImageKind {
        name: "split",
        make: split,
        arguments: &["cache=none"],
    },
    ImageKind {
        name: "delta",
        make: delta,
        arguments: &[],
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
    let arguments = [
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
    Cmd::new("qemu-img").args(arguments).dir(scratch.root()).run().ok();
    "top.vmdk"
}

/// Converts `original` into a VMDK of this subformat.
fn vmdk(scratch: &Scratch, name: &'static str, subformat: &str) -> &'static str {
    let option = format!("subformat={subformat}");
    let arguments = ["convert", "-f", "raw", "-O", "vmdk", "-o", &option, "original", name];
    Cmd::new("qemu-img").args(arguments).dir(scratch.root()).run().ok();
    name
}

/// An image in a folder of its own, and its expected content.
pub(crate) struct Disk {
    pub(crate) scratch: Scratch,
    pub(crate) kind: ImageKind,
    image: &'static str,
    /// Expected content of the disk.
    pub(crate) bytes: Vec<u8>,
}

impl Disk {
    /// Creates an image whose disk has islands of data.
    pub(crate) fn new(kind: ImageKind) -> Self {
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

    /// Returns the path of the file that is mounted.
    pub(crate) fn image(&self) -> PathBuf {
        self.scratch.path(self.image)
    }

    /// Mounts the image as `disk`.
    #[track_caller]
    pub(crate) fn mount(&self) -> Mount {
        self.mount_with(&[])
    }

    /// Mounts the image as `disk`, with additional arguments.
    #[track_caller]
    pub(crate) fn mount_with(&self, arguments: &[&str]) -> Mount {
        let start = self.scratch.mount().file(self.image).arg("name=disk");
        self.kind
            .arguments
            .iter()
            .chain(arguments)
            .fold(start, |start, word| start.arg(word))
            .start()
    }

    /// Panics unless the image is sound and holds [`Self::bytes`], as read by qemu-img and by a read-only mount.
    ///
    /// No process may have the image open for writing.
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

    /// Panics unless the content of `file` is [`Self::bytes`].
    #[track_caller]
    pub(crate) fn holds(&self, file: &Path) {
        let seen = fs::read(file).unwrap();
        assert_eq!(seen.len(), self.bytes.len(), "size of {}", file.display());
        let wrong = seen.iter().zip(&self.bytes).position(|(a, b)| a != b);
        assert_eq!(
            wrong,
            None,
            "{}: {} has a wrong byte at this offset",
            self.kind.name,
            file.display()
        );
    }
}

/// Returns true if the machine can run these tests.
pub(crate) fn ready() -> bool {
    need_fuse() && need_qemu()
}

/// Runs `test` on a disk of each kind; reports all kinds that fail.
pub(crate) fn for_each_kind(test: impl Fn(Disk) + Sync) {
    if ready() {
        fuse_tests::harness::each(&KINDS, |kind| kind.name.to_owned(), |kind| test(Disk::new(*kind)));
    }
}
