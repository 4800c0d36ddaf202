//! A folder with a raw original and what qemu-img makes of it.

use std::fs;
use std::path::{Path, PathBuf};

use fuse_tests::harness::{Scratch, need, qemu_img, raw_with_islands};

use super::pair::Pair;
use super::text;

/// The kinds that qemu makes, and how.
const KINDS: [(&str, &str); 4] = [
    ("sparse.vmdk", "subformat=monolithicSparse"),
    ("flat.vmdk", "subformat=monolithicFlat"),
    ("split.vmdk", "subformat=twoGbMaxExtentSparse"),
    ("stream.vmdk", "subformat=streamOptimized"),
];

/// The format of an image, as qemu calls it.
pub(crate) fn format(path: &Path) -> &'static str {
    if path.extension().is_some_and(|extension| extension == "vmdk") {
        "vmdk"
    } else {
        "raw"
    }
}

/// A folder of one test.
#[derive(Debug)]
pub(crate) struct Folder {
    pub(crate) scratch: Scratch,
    /// The original.
    pub(crate) raw: PathBuf,
    /// Where an overlay goes.
    pub(crate) cow: PathBuf,
}

impl Folder {
    /// With an original of `len` bytes; `None`: qemu-img is not there, and the test is skipped.
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

    /// Makes a VMDK of the original.
    #[track_caller]
    pub(crate) fn vmdk(&self, name: &str, options: &str) -> PathBuf {
        let path = self.scratch.path(name);
        qemu_img(["convert", "-O", "vmdk", "-o", options, text(&self.raw), text(&path)]);
        path
    }

    /// Makes the VMDK that qemu makes unless told otherwise.
    #[track_caller]
    pub(crate) fn sparse(&self, name: &str) -> PathBuf {
        self.vmdk(name, "subformat=monolithicSparse")
    }

    /// Makes each of [`KINDS`], and a chain of two.
    #[track_caller]
    pub(crate) fn vmdks(&self) -> Vec<PathBuf> {
        let mut made = Vec::from(KINDS.map(|(name, options)| self.vmdk(name, options)));
        let (bottom, top) = (self.sparse("bottom.vmdk"), self.scratch.path("top.vmdk"));
        qemu_img(["create", "-f", "vmdk", "-b", text(&bottom), "-F", "vmdk", text(&top)]);
        made.push(top);
        made
    }

    /// What a commit can write to.
    #[track_caller]
    pub(crate) fn bases(&self) -> Vec<PathBuf> {
        let mut made = self.vmdks();
        made.retain(|base| !base.ends_with("stream.vmdk"));
        let plain = self.scratch.path("plain.img");
        fs::copy(&self.raw, &plain).unwrap();
        made.push(plain);
        made
    }

    /// A disk that was made of the original, after `steps` of changes in an overlay.
    #[track_caller]
    pub(crate) fn changed(&self, base: &Path, seed: u64, steps: u64) -> Pair {
        Pair::changed(base, &self.cow, &self.raw, seed, steps)
    }
}
