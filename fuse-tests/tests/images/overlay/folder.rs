//! Scratch folder with a raw original and its conversions by qemu-img.

use std::fs;
use std::path::{Path, PathBuf};

use fuse_tests::harness::{Scratch, need, qemu_img, raw_with_islands};

use super::pair::Pair;
use super::text;

/// Images that qemu-img creates: file name and option.
const KINDS: [(&str, &str); 4] = [
    ("sparse.vmdk", "subformat=monolithicSparse"),
    ("flat.vmdk", "subformat=monolithicFlat"),
    ("split.vmdk", "subformat=twoGbMaxExtentSparse"),
    ("stream.vmdk", "subformat=streamOptimized"),
];

/// Returns the name that qemu has for the format of an image.
pub(crate) fn format(path: &Path) -> &'static str {
    if path.extension().is_some_and(|extension| extension == "vmdk") {
        "vmdk"
    } else {
        "raw"
    }
}

/// Scratch folder of one test.
#[derive(Debug)]
pub(crate) struct Folder {
    pub(crate) scratch: Scratch,
    /// The original raw file.
    pub(crate) raw: PathBuf,
    /// Path of the overlay.
    pub(crate) cow: PathBuf,
}

impl Folder {
    /// Creates a folder with an original of `len` bytes, or returns `None` if qemu-img is missing and the test is
    /// skipped.
    #[track_caller]
    pub(crate) fn new(len: u64) -> Option<Self> {
        if !need("qemu-img") {
            return None;
        }
        let scratch = Scratch::new();
        let [raw, cow] = ["a.raw", "cow.vmdk"].map(|name| scratch.path(name));
        raw_with_islands(&raw, len, 3);
        Some(Self { scratch, raw, cow })
    }

    /// Converts the original to a VMDK.
    #[track_caller]
    pub(crate) fn vmdk(&self, name: &str, options: &str) -> PathBuf {
        let path = self.scratch.path(name);
        qemu_img(["convert", "-O", "vmdk", "-o", options, text(&self.raw), text(&path)]);
        path
    }

    /// Converts the original to a monolithic sparse VMDK, qemu's default.
    #[track_caller]
    pub(crate) fn sparse(&self, name: &str) -> PathBuf {
        self.vmdk(name, "subformat=monolithicSparse")
    }

    /// Creates a VMDK of each of [`KINDS`] and a chain of two.
    #[track_caller]
    pub(crate) fn vmdks(&self) -> Vec<PathBuf> {
        let mut images = Vec::from(KINDS.map(|(name, options)| self.vmdk(name, options)));
        let (bottom, top) = (self.sparse("bottom.vmdk"), self.scratch.path("top.vmdk"));
        qemu_img(["create", "-f", "vmdk", "-b", text(&bottom), "-F", "vmdk", text(&top)]);
        images.push(top);
        images
    }

    /// Creates every base that a commit can write to: no stream, but a raw image.
    #[track_caller]
    pub(crate) fn bases(&self) -> Vec<PathBuf> {
        let mut images = self.vmdks();
        images.retain(|base| !base.ends_with("stream.vmdk"));
        let plain = self.scratch.path("plain.img");
        fs::copy(&self.raw, &plain).unwrap();
        images.push(plain);
        images
    }

    /// Creates an overlay over `base`, a conversion of the original, and applies `steps` random operations.
    #[track_caller]
    pub(crate) fn changed(&self, base: &Path, seed: u64, steps: u64) -> Pair {
        Pair::changed(base, &self.cow, &self.raw, seed, steps)
    }
}
