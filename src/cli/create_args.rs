//! Keys that create a VMDK: `create=` and the `create-*=` keys.
//!
//! The functions at the end parse one value each. [`CreateArgs::config`] checks the keys of a disk against each other and
//! against the [`Subcommand`]. Their conflicts with other keys are checked in `overlay_args.rs`.

use std::ffi::OsStr;

use super::outcome::UsageError;
use super::subcommand::Subcommand;
use super::values;
use crate::block::{MAX_SECTORS, SECTOR};
use crate::config::{AdapterType, CreateConfig, CreateType};

/// Words of `create-type=`.
const CREATE_TYPES: [(&str, CreateType); 7] = [
    ("monolithic-sparse", CreateType::MonolithicSparse),
    ("monolithic-flat", CreateType::MonolithicFlat),
    ("split-sparse", CreateType::SplitSparse),
    ("split-flat", CreateType::SplitFlat),
    ("vmfs-flat", CreateType::VmfsFlat),
    ("vmfs-thin", CreateType::VmfsThin),
    ("stream-optimized", CreateType::StreamOptimized),
];

/// Words of `create-adapter-type=`: the names in descriptors, then those of nbdkit.
const ADAPTERS: [(&str, AdapterType); 7] = [
    ("ide", AdapterType::Ide),
    ("buslogic", AdapterType::BusLogic),
    ("lsilogic", AdapterType::LsiLogic),
    ("legacyESX", AdapterType::LegacyEsx),
    ("pvscsi", AdapterType::PvScsi),
    ("scsi-buslogic", AdapterType::BusLogic),
    ("scsi-lsilogic", AdapterType::LsiLogic),
];

/// Product names for hardware versions, as in VDDK.
const HARDWARE: [(&str, u32); 10] = [
    ("workstation4", 3),
    ("workstation5", 4),
    ("workstation6", 6),
    ("esx30", 4),
    ("esx4x", 7),
    ("esx50", 8),
    ("esx51", 9),
    ("esx55", 10),
    ("esx60", 11),
    ("esx65", 13),
];

/// Default hardware version. Every product reads it; `qemu-img` and `ovftool` write it.
const DEFAULT_HARDWARE: u32 = 4;

/// Valid hardware versions: from the first product with a version to far above the newest one (22 in 2026).
const HARDWARE_RANGE: std::ops::RangeInclusive<u32> = 3..=99;

/// `create=` and the `create-*=` keys.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct CreateArgs {
    /// `create=`
    pub(super) create: Option<bool>,
    /// `create-size=`
    pub(super) size: Option<u64>,
    /// `create-type=`
    pub(super) kind: Option<CreateType>,
    /// `create-adapter-type=`
    pub(super) adapter: Option<AdapterType>,
    /// `create-hwversion=`
    pub(super) hardware_version: Option<u32>,
}

impl CreateArgs {
    /// Returns true if the disk is created: by `create=`, or by default with `--create`.
    pub(super) fn is_enabled(self, subcommand: Subcommand) -> bool {
        self.create.unwrap_or(subcommand == Subcommand::Create)
    }

    /// Returns the configuration of the disk to create, or `None` if the disk is not created.
    ///
    /// Fails if `create-*=` keys are given for a disk that is not created, or if `create-size=` is missing.
    pub(super) fn config(self, subcommand: Subcommand) -> Result<Option<CreateConfig>, UsageError> {
        if !self.is_enabled(subcommand) {
            if subcommand == Subcommand::Create {
                return Err(UsageError::new("--create creates disks, but create=false forbids it"));
            }
            // A forgotten `create=true` would otherwise leave `create-size=` without effect, and the file "not found".
            return match self.first_detail() {
                Some(key) => Err(UsageError::of(key, " needs create=true")),
                None => Ok(None),
            };
        }
        if matches!(subcommand, Subcommand::Query | Subcommand::Commit) {
            return Err(UsageError::of("create", "true needs a mount or --create"));
        }
        // There is no default: too small a disk cannot grow, and too large a one may not fit.
        let size = self
            .size
            .ok_or_else(|| UsageError::new("a new disk needs its size: add create-size=SIZE"))?;
        Ok(Some(CreateConfig {
            size,
            kind: self.kind.unwrap_or_default(),
            adapter: self.adapter.unwrap_or_default(),
            hardware_version: self.hardware_version.unwrap_or(DEFAULT_HARDWARE),
        }))
    }

    /// Returns the first given key other than `create=`.
    fn first_detail(self) -> Option<&'static str> {
        let given = [
            ("create-size", self.size.is_some()),
            ("create-type", self.kind.is_some()),
            ("create-adapter-type", self.adapter.is_some()),
            ("create-hwversion", self.hardware_version.is_some()),
        ];
        given.into_iter().find(|(_, given)| *given).map(|(key, _)| key)
    }
}

/// Parses the value of `create-size=`, in bytes.
pub(super) fn size(value: &OsStr) -> Result<u64, String> {
    let bytes = values::size(value)?;
    // Not rounded: a copy of a disk only fits a size that is exactly the one that was asked for.
    if bytes == 0 || !bytes.is_multiple_of(SECTOR) {
        return Err(format!(
            "the size of a disk must be a multiple of {SECTOR} bytes, and at least {SECTOR}"
        ));
    }
    if bytes / SECTOR > MAX_SECTORS {
        return Err(format!(
            "a disk can have at most {MAX_SECTORS} sectors of {SECTOR} bytes"
        ));
    }
    Ok(bytes)
}

/// Parses the value of `create-type=`.
pub(super) fn create_type(value: &OsStr) -> Result<CreateType, String> {
    word(value, &CREATE_TYPES)
}

/// Parses the value of `create-adapter-type=`.
pub(super) fn adapter(value: &OsStr) -> Result<AdapterType, String> {
    word(value, &ADAPTERS)
}

/// Parses the value of `create-hwversion=`: a number or the name of a product.
pub(super) fn hardware_version(value: &OsStr) -> Result<u32, String> {
    let text = values::text(value)?;
    if let Some((_, version)) = HARDWARE.iter().find(|(name, _)| *name == text) {
        return Ok(*version);
    }
    let number = values::decimal(text).filter(|number| HARDWARE_RANGE.contains(number));
    let (first, last) = (HARDWARE_RANGE.start(), HARDWARE_RANGE.end());
    number.ok_or_else(|| {
        format!(
            "must be a number from {first} to {last}, or one of {}",
            names(&HARDWARE)
        )
    })
}

fn word<T: Copy>(value: &OsStr, words: &[(&str, T)]) -> Result<T, String> {
    let found = words.iter().find(|(name, _)| value == *name).map(|(_, meant)| *meant);
    found.ok_or_else(|| format!("must be one of {}", names(words)))
}

fn names<T>(words: &[(&str, T)]) -> String {
    words.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::test_args::{action, disks};
    use super::*;
    use crate::config::DiskConfig;

    fn create(disk: &DiskConfig) -> Option<&CreateConfig> {
        let local = disk.source.local().unwrap();
        local.create.as_ref()
    }

    #[test]
    fn a_created_disk_with_all_its_keys() {
        let keys = [
            "create-type=split-flat",
            "create-adapter-type=ide",
            "create-hwversion=esx65",
        ];
        let args = [&["--create", "file=/a*.vmdk", "create-size=3G"][..], &keys].concat();
        let expected = CreateConfig {
            size: 3 << 30,
            kind: CreateType::SplitFlat,
            adapter: AdapterType::Ide,
            hardware_version: 13,
        };
        let created = disks(&args);
        assert_eq!(create(&created[0]), Some(&expected));
        let local = created[0].source.local().unwrap();
        assert_eq!(
            local.path,
            Path::new("/a*.vmdk"),
            "the name of a created disk is not a pattern"
        );
        let mounted = disks(&[&["src"], &args[1..], &["create=yes"]].concat());
        assert_eq!(create(&mounted[0]), Some(&expected));
    }

    #[test]
    fn a_created_disk_with_default_keys() {
        let expected = CreateConfig {
            size: 512,
            kind: CreateType::MonolithicSparse,
            adapter: AdapterType::LsiLogic,
            hardware_version: 4,
        };
        assert_eq!(
            create(&disks(&["--create", "/a.vmdk", "create-size=512"])[0]),
            Some(&expected)
        );
        let common = disks(&["--create", "create-size=512", "/a.vmdk", "/b.vmdk", "create-size=1M"]);
        assert_eq!(
            common.iter().map(|disk| create(disk).unwrap().size).collect::<Vec<_>>(),
            [512, 1 << 20]
        );
        assert_eq!(create(&disks(&["src", "/a.vmdk", "create=no"])[0]), None);
    }

    #[test]
    fn errors_of_unknown_words_list_the_known_ones() {
        for (word, part) in [
            (
                "create-type=flat",
                "create-type=flat: must be one of monolithic-sparse, ",
            ),
            ("create-adapter-type=scsi", "lsilogic, legacyESX"),
            (
                "create-hwversion=100",
                "a number from 3 to 99, or one of workstation4, ",
            ),
            ("create-size=1000", "a multiple of 512 bytes"),
            ("crate-size=1M", "did you mean create-size=?"),
        ] {
            let error = action(&["--create", "/a", word]).unwrap_err();
            assert!(error.contains(part), "{word}: {error}");
        }
    }
}
