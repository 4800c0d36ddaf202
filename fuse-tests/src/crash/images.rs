//! Small disks of each kind that is written to, in memory, every stored sector with a value of its own.

use std::fs;
use std::path::Path;

use super::bytes::Bytes;
use super::oracle::fill;
use crate::make::model::Layer;
use crate::make::write::{Descriptor, Hosted, flat, hosted};

/// The kinds of disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// One sparse file with both tables, all of them there; the last grain is a partial one.
    Sparse,
    /// With one table only.
    OneTable,
    /// With both, but only where there are grains.
    Lazy,
    /// One table, and only where there are grains.
    LazyOneTable,
    /// With entries for zeroed grains (version 2).
    Zeroed,
    /// Grains of 64 KiB.
    LargeGrains,
    /// Two sparse files, the border inside of what would be a grain.
    SplitSparse,
    /// A descriptor and a flat file.
    Flat,
    /// Two flat files, one of which starts behind a gap.
    SplitFlat,
    /// A snapshot with few grains over a full parent.
    Delta,
    /// A snapshot with entries for zeroed grains, over a snapshot, over a parent.
    Chain,
    /// It was not closed: there is a tail that nothing names.
    Unclean,
}

/// A disk before a run.
#[derive(Debug, Clone)]
pub struct Image {
    /// Its kind.
    pub kind: Kind,
    /// Its files, and those of its parents.
    pub files: Vec<(String, Bytes)>,
    /// The file to open.
    pub top: &'static str,
    /// Files that nothing may be written to.
    pub parents: Vec<&'static str>,
    /// What each sector holds.
    pub values: Vec<u64>,
    /// The same after it was opened for writing, which may repair it.
    pub repaired: Vec<u64>,
    /// Sectors of a grain.
    pub grain: u64,
    /// Sectors that one table covers.
    pub coverage: u64,
}

/// Entries of a table: few, so that small disks have several tables.
const ENTRIES: u32 = 128;

/// Values of what is there before start here; those of parents further up.
const FIRST_VALUE: u64 = 0x10_0000;

impl Kind {
    /// All of them.
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

    /// Sectors of a grain, and of the disk.
    fn shape(self) -> (u64, u64) {
        match self {
            Self::LargeGrains => (128, 12 * 128 + 100),
            Self::Flat | Self::SplitFlat => (8, 300),
            _ => (8, 2 * 8 * u64::from(ENTRIES) + 452),
        }
    }

    /// Makes a disk of the kind.
    pub fn image(self) -> Image {
        let dir = tempfile::tempdir().expect("a folder");
        let (grain, sectors) = self.shape();
        let values = match self {
            Self::Delta | Self::Chain => self.chain(dir.path()),
            _ => self.alone(dir.path()),
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

    /// The options of its sparse files.
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

    /// A disk without parent.
    fn alone(self, dir: &Path) -> Vec<u64> {
        let (grain, sectors) = self.shape();
        let flat_files = matches!(self, Self::Flat | Self::SplitFlat);
        let values: Vec<_> = (0..sectors)
            .map(|lba| {
                // nothing in the second table, so that a lazy image lacks it
                let stored = flat_files || (lba / grain) % 3 == 0 && lba / grain / u64::from(ENTRIES) != 1;
                if stored { FIRST_VALUE + lba } else { 0 }
            })
            .collect();
        let write = |name: &str, layer: &Layer, text: Option<&str>| {
            hosted(&dir.join(name), layer, text.map(str::as_bytes), &self.hosted()).expect("a sparse file");
        };
        match self {
            Self::Flat | Self::SplitFlat => {
                let cut = if self == Self::Flat { sectors } else { 173 };
                let gap = if self == Self::Flat { 0 } else { 7 };
                let (first, second) = (raw(&values, 0..cut), raw(&values, cut..sectors));
                flat(&dir.join("disk-f001.vmdk"), &Layer::from_raw("f1", 1, &first), 0).expect("a flat file");
                let mut lines = vec![format!("RW {cut} FLAT \"disk-f001.vmdk\" 0")];
                if cut < sectors {
                    flat(&dir.join("disk-f002.vmdk"), &Layer::from_raw("f2", 1, &second), gap).expect("a flat file");
                    lines.push(format!("RW {} FLAT \"disk-f002.vmdk\" {gap}", sectors - cut));
                }
                let kind = if cut < sectors {
                    "twoGbMaxExtentFlat"
                } else {
                    "monolithicFlat"
                };
                fs::write(dir.join("disk.vmdk"), Descriptor::new(kind, lines).text()).expect("a descriptor");
            }
            Self::SplitSparse => {
                let cut = 1300;
                for (name, range) in [("disk-s001.vmdk", 0..cut), ("disk-s002.vmdk", cut..sectors)] {
                    write(name, &Layer::from_raw(name, grain, &raw(&values, range)), None);
                }
                let lines = [
                    format!("RW {cut} SPARSE \"disk-s001.vmdk\""),
                    format!("RW {} SPARSE \"disk-s002.vmdk\"", sectors - cut),
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

    /// A snapshot, or one over another.
    fn chain(self, dir: &Path) -> Vec<u64> {
        let (grain, sectors) = self.shape();
        let names: &[&str] = match self {
            Self::Delta => &["base.vmdk", "disk.vmdk"],
            _ => &["base.vmdk", "middle.vmdk", "disk.vmdk"],
        };
        let mut seen = vec![0; sectors as usize];
        for (depth, name) in (0u64..).zip(names) {
            // the lowest is full but for a few grains, the others have some in all tables but the second
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
    /// Whether it has sparse files with two tables each.
    pub fn has_both_tables(&self) -> bool {
        !matches!(
            self.kind,
            Kind::OneTable | Kind::LazyOneTable | Kind::Flat | Kind::SplitFlat
        )
    }
}

/// The bytes of some sectors that hold `values`.
fn raw(values: &[u64], range: std::ops::Range<u64>) -> Vec<u8> {
    range.flat_map(|lba| fill(lba, values[lba as usize])).collect()
}

/// Garbage behind the last grain, as a writer leaves it that was killed: it ends in the middle of a sector.
fn add_tail(path: &Path) {
    let mut bytes = fs::read(path).expect("the image");
    bytes.extend([0xee; 3 * 4096 + 100]);
    fs::write(path, bytes).expect("the image");
}

/// The files of a folder.
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
    use vmdkfuse::vmdk::{OpenOptions, VmdkDisk, check};

    use super::super::{Oracle, SimStore};
    use super::*;

    #[test]
    fn every_kind_is_sound_and_holds_what_it_says() {
        for kind in Kind::ALL {
            let image = kind.image();
            let file = SimStore::new(&image.files).file(image.top, Access::Read).unwrap();
            let disk = VmdkDisk::open(file, OpenOptions::default()).unwrap();
            Oracle::new(&image.values, &image.repaired)
                .verify(&disk)
                .unwrap_or_else(|e| panic!("{kind:?}: {e}"));
            let report = check(&disk);
            assert_eq!(report.errors, [""; 0], "{kind:?}");
            assert_eq!(report.leaks > 0, kind == Kind::Unclean, "{kind:?}: {report:?}");
        }
    }
}
