//! Small images of each kind that the engine writes, in memory; each stored sector has a value of its own.

use std::fs;
use std::path::Path;

use super::bytes::Bytes;
use super::oracle::fill;
use crate::make::model::Layer;
use crate::make::write::{Descriptor, Hosted, flat, hosted};

/// Kinds of images, by the table layouts and chains that the engine treats differently.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImageKind {
    /// One sparse extent with primary and redundant tables, all allocated; the last grain is partial.
    Sparse,
    /// As `Sparse`, without redundant tables.
    OneTable,
    /// As `Sparse`, with tables only where there are grains.
    Lazy,
    /// Without redundant tables, and with tables only where there are grains.
    LazyOneTable,
    /// With entries for zeroed grains (version 2 of the header).
    Zeroed,
    /// With grains of 64 KiB, 128 sectors.
    LargeGrains,
    /// Two sparse extents; the boundary is not a multiple of the grain size.
    SplitSparse,
    /// A descriptor and a flat extent.
    Flat,
    /// Two flat extents, the second of which starts after a gap in its file.
    SplitFlat,
    /// A delta with few grains over a nearly full base.
    Delta,
    /// A delta with entries for zeroed grains, over another delta, over a base.
    Chain,
    /// Not closed by its writer: the file ends with bytes that no table entry names.
    Unclean,
}

/// An image at the start of a run.
#[derive(Debug, Clone)]
pub struct Image {
    /// Kind of the image.
    pub kind: ImageKind,
    /// Its files and those of its parents.
    pub files: Vec<(String, Bytes)>,
    /// Name of the file to open.
    pub top: &'static str,
    /// Files of the parents, which the engine must not write.
    pub parents: Vec<&'static str>,
    /// The value of each sector.
    pub values: Vec<u64>,
    /// The value of each sector after a writable open, which may recover the image.
    pub repaired: Vec<u64>,
    /// Grain size in sectors.
    pub grain: u64,
    /// Sectors that one grain table covers.
    pub coverage: u64,
}

/// Entries of a grain table: few, so that small disks have several tables.
const ENTRIES: u32 = 128;

/// First value of the content before a run. Deltas of a chain use multiples of it, so that the links differ.
const FIRST_VALUE: u64 = 0x10_0000;

impl ImageKind {
    /// All kinds.
    pub const ALL: [Self; 12] = [
        Self::Sparse,
        Self::OneTable,
        Self::Lazy,
        Self::LazyOneTable,
        Self::Zeroed,
        Self::LargeGrains,
        Self::SplitSparse,
        Self::Flat,
        Self::SplitFlat,
        Self::Delta,
        Self::Chain,
        Self::Unclean,
    ];

    /// Returns the grain size and the size of the disk, in sectors.
    fn dimensions(self) -> (u64, u64) {
        match self {
            Self::LargeGrains => (128, 12 * 128 + 100),
            Self::Flat | Self::SplitFlat => (8, 300),
            _ => (8, 2 * 8 * u64::from(ENTRIES) + 452),
        }
    }

    /// Creates an image of this kind.
    pub fn image(self) -> Image {
        let dir = tempfile::tempdir().expect("a folder");
        let (grain, sectors) = self.dimensions();
        let values = match self {
            Self::Delta | Self::Chain => self.write_chain(dir.path()),
            _ => self.write_single(dir.path()),
        };
        assert_eq!(values.len() as u64, sectors);
        let parents = match self {
            Self::Delta => vec!["base.vmdk"],
            Self::Chain => vec!["base.vmdk", "middle.vmdk"],
            _ => vec![],
        };
        Image {
            kind: self,
            files: load(dir.path()),
            top: "disk.vmdk",
            parents,
            repaired: values.clone(),
            values,
            grain,
            coverage: grain * u64::from(ENTRIES),
        }
    }

    /// Returns the options of its sparse extents.
    fn hosted(self) -> Hosted {
        let usual = Hosted {
            ngte: ENTRIES,
            ..Hosted::default()
        };
        let one_table = |options: Hosted| Hosted {
            redundant: false,
            flags: options.flags & !2,
            ..options
        };
        match self {
            Self::OneTable => one_table(usual),
            Self::Lazy | Self::SplitSparse | Self::Delta => Hosted { lazy: true, ..usual },
            Self::LazyOneTable => one_table(Hosted { lazy: true, ..usual }),
            Self::Zeroed | Self::Chain => Hosted {
                ngte: ENTRIES,
                ..Hosted::zeroed()
            },
            Self::Unclean => Hosted { unclean: true, ..usual },
            _ => usual,
        }
    }

    /// Writes an image without a parent into `dir` and returns the values of its sectors.
    fn write_single(self, dir: &Path) -> Vec<u64> {
        let (grain, sectors) = self.dimensions();
        let flat_files = matches!(self, Self::Flat | Self::SplitFlat);
        let values: Vec<_> = (0..sectors)
            .map(|lba| {
                // No grain in the range of the second table, so that a lazy image lacks that table.
                let stored = flat_files || (lba / grain) % 3 == 0 && lba / grain / u64::from(ENTRIES) != 1;
                if stored { FIRST_VALUE + lba } else { 0 }
            })
            .collect();
        let write = |name: &str, layer: &Layer, text: Option<&str>| {
            hosted(&dir.join(name), layer, text.map(str::as_bytes), &self.hosted()).expect("a sparse file");
        };
        match self {
            Self::Flat | Self::SplitFlat => {
                let boundary = if self == Self::Flat { sectors } else { 173 };
                let gap = if self == Self::Flat { 0 } else { 7 };
                let (first, second) = (raw(&values, 0..boundary), raw(&values, boundary..sectors));
                flat(&dir.join("disk-f001.vmdk"), &Layer::from_raw("f1", 1, &first), 0).expect("a flat file");
                let mut lines = vec![format!("RW {boundary} FLAT \"disk-f001.vmdk\" 0")];
                if boundary < sectors {
                    flat(&dir.join("disk-f002.vmdk"), &Layer::from_raw("f2", 1, &second), gap).expect("a flat file");
                    lines.push(format!("RW {} FLAT \"disk-f002.vmdk\" {gap}", sectors - boundary));
                }
                let create_type = if boundary < sectors {
                    "twoGbMaxExtentFlat"
                } else {
                    "monolithicFlat"
                };
                fs::write(dir.join("disk.vmdk"), Descriptor::new(create_type, lines).text()).expect("a descriptor");
            }
            Self::SplitSparse => {
                let boundary = 1300;
                for (name, range) in [("disk-s001.vmdk", 0..boundary), ("disk-s002.vmdk", boundary..sectors)] {
                    write(name, &Layer::from_raw(name, grain, &raw(&values, range)), None);
                }
                let lines = [
                    format!("RW {boundary} SPARSE \"disk-s001.vmdk\""),
                    format!("RW {} SPARSE \"disk-s002.vmdk\"", sectors - boundary),
                ];
                let text = Descriptor::new("twoGbMaxExtentSparse", lines).text();
                fs::write(dir.join("disk.vmdk"), text).expect("a descriptor");
            }
            _ => {
                let lines = [format!("RW {sectors} SPARSE \"disk.vmdk\"")];
                let text = Descriptor::new("monolithicSparse", lines).text();
                write(
                    "disk.vmdk",
                    &Layer::from_raw("disk", grain, &raw(&values, 0..sectors)),
                    Some(&text),
                );
                if self == Self::Unclean {
                    add_tail(&dir.join("disk.vmdk"));
                }
            }
        }
        values
    }

    /// Writes a chain of two or three links into `dir` and returns the values that its sectors read as.
    fn write_chain(self, dir: &Path) -> Vec<u64> {
        let (grain, sectors) = self.dimensions();
        let names: &[&str] = match self {
            Self::Delta => &["base.vmdk", "disk.vmdk"],
            _ => &["base.vmdk", "middle.vmdk", "disk.vmdk"],
        };
        let mut seen = vec![0; sectors as usize];
        for (depth, name) in (0u64..).zip(names) {
            // The base lacks only a few grains; the deltas have some grains in all tables but the second.
            let number = |lba: u64| lba / grain;
            let stored = |lba: u64| match depth {
                0 => number(lba) % 7 != 0,
                _ => number(lba) % 5 == depth && number(lba) / u64::from(ENTRIES) != 1,
            };
            let values: Vec<_> = (0..sectors)
                .map(|lba| {
                    if stored(lba) {
                        FIRST_VALUE * (depth + 1) + lba
                    } else {
                        0
                    }
                })
                .collect();
            let mut layer = Layer::from_raw(name, grain, &raw(&values, 0..sectors));
            for (lba, value) in values.iter().enumerate().filter(|(_, value)| **value != 0) {
                seen[lba] = *value;
            }
            let hides = |n: &u64| n % 11 == 3 && number(n * grain) % 5 != depth;
            if self == Self::Chain && depth > 0 {
                let zeroed: Vec<_> = (0..sectors / grain).filter(hides).collect();
                for lba in zeroed.iter().flat_map(|n| n * grain..(n + 1) * grain) {
                    seen[lba as usize] = 0;
                }
                layer = layer.zero(zeroed);
            }
            let cid = |depth: u64| 0x1000_0000 + depth as u32;
            let text = Descriptor::new("monolithicSparse", [format!("RW {sectors} SPARSE \"{name}\"")]).cid(cid(depth));
            let text = match depth {
                0 => text,
                _ => text.child(cid(depth), cid(depth - 1), names[depth as usize - 1]),
            };
            hosted(&dir.join(name), &layer, Some(text.text().as_bytes()), &self.hosted()).expect("a sparse file");
        }
        seen
    }
}

impl Image {
    /// Returns true if its sparse extents have primary and redundant tables.
    pub fn has_both_tables(&self) -> bool {
        !matches!(
            self.kind,
            ImageKind::OneTable | ImageKind::LazyOneTable | ImageKind::Flat | ImageKind::SplitFlat
        )
    }
}

/// Returns the bytes of a range of sectors that hold `values`.
fn raw(values: &[u64], range: std::ops::Range<u64>) -> Vec<u8> {
    range.flat_map(|lba| fill(lba, values[lba as usize])).collect()
}

/// Appends garbage after the last grain, as a killed writer leaves it. It ends in the middle of a sector.
fn add_tail(path: &Path) {
    let mut bytes = fs::read(path).expect("the image");
    bytes.extend([0xee; 3 * 4096 + 100]);
    fs::write(path, bytes).expect("the image");
}

/// Reads all files of a folder, sorted by name.
fn load(dir: &Path) -> Vec<(String, Bytes)> {
    let mut files: Vec<_> = fs::read_dir(dir)
        .expect("the folder")
        .map(|entry| {
            let entry = entry.expect("a name");
            let bytes = fs::read(entry.path()).expect("a file");
            (
                entry.file_name().into_string().expect("text"),
                Bytes::from(bytes.as_slice()),
            )
        })
        .collect();
    files.sort_by(|a, b| a.0.cmp(&b.0));
    files
}

#[cfg(test)]
mod tests {
    use vmdkfuse::store::Access;
    use vmdkfuse::vmdk::{OpenOptions, VmdkDisk};

    use super::super::{Oracle, SimStore};
    use super::*;

    #[test]
    fn every_kind_is_sound_and_holds_its_values() {
        for kind in ImageKind::ALL {
            let image = kind.image();
            let file = SimStore::new(&image.files).file(image.top, Access::Read).unwrap();
            let disk = VmdkDisk::open(file, OpenOptions::default()).unwrap();
            Oracle::new(&image.values, &image.repaired)
                .verify(&disk)
                .unwrap_or_else(|e| panic!("{kind:?}: {e}"));
            let report = disk.check();
            assert_eq!(report.errors, [""; 0], "{kind:?}");
            assert_eq!(report.leaks > 0, kind == ImageKind::Unclean, "{kind:?}: {report:?}");
        }
    }
}
