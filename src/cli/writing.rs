//! The keys of writing: `create=` with its company, `cow=` and `force=`, and which of them go together.
//!
//! Whether a key fits depends on what the disk is wanted for, so [`Subcommand`] goes along wherever disks are made of words.
//! What needs a look at the files (whether a base has children, whether a name is taken) is left to whoever opens them.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::path::Path;

use super::UsageError;
use super::values;
use crate::block::{MAX_SECTORS, SECTOR};
use crate::config::{AdapterType, CreateConfig, CreateType, DiskConfig, Format, Overlay, PageCache};

/// The value of `cow=` that is no file.
pub(super) const TEMPORARY: &str = "tmp";

/// The kinds of new disks.
const CREATE_TYPES: [(&str, CreateType); 7] = [
    ("monolithic-sparse", CreateType::MonolithicSparse),
    ("monolithic-flat", CreateType::MonolithicFlat),
    ("split-sparse", CreateType::SplitSparse),
    ("split-flat", CreateType::SplitFlat),
    ("vmfs-flat", CreateType::VmfsFlat),
    ("vmfs-thin", CreateType::VmfsThin),
    ("stream-optimized", CreateType::StreamOptimized),
];

/// Adapters as descriptors name them, then as nbdkit does.
const ADAPTERS: [(&str, AdapterType); 7] = [
    ("ide", AdapterType::Ide),
    ("buslogic", AdapterType::BusLogic),
    ("lsilogic", AdapterType::LsiLogic),
    ("legacyESX", AdapterType::LegacyEsx),
    ("pvscsi", AdapterType::PvScsi),
    ("scsi-buslogic", AdapterType::BusLogic),
    ("scsi-lsilogic", AdapterType::LsiLogic),
];

/// Names of hardware versions, as VDDK's users know them.
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

/// What every product reads; what `qemu-img` and `ovftool` write.
const DEFAULT_HARDWARE: u32 = 4;
/// The bounds of a version number: the first product with such a number, and far beyond the newest (22 in 2026).
const HARDWARE_RANGE: std::ops::RangeInclusive<u32> = 3..=99;

/// What disks are wanted for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Subcommand {
    /// To be mounted.
    Mount {
        /// Read-only, all of them.
        read_only: bool,
    },
    /// To be looked at.
    Query,
    /// To be made, and that is all.
    Create,
    /// An overlay is merged into its base.
    Commit,
}

/// `create=` and the keys that say how.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Creation {
    /// `create=`
    pub(super) disk_args_given: Option<bool>,
    /// `create-size=`
    pub(super) size: Option<u64>,
    /// `create-type=`
    pub(super) kind: Option<CreateType>,
    /// `create-adapter-type=`
    pub(super) adapter: Option<AdapterType>,
    /// `create-hwversion=`
    pub(super) hardware_version: Option<u32>,
}

impl Creation {
    /// These words, with `common` where they are silent.
    pub(super) fn over(self, common: Self) -> Self {
        Self {
            disk_args_given: self.disk_args_given.or(common.disk_args_given),
            size: self.size.or(common.size),
            kind: self.kind.or(common.kind),
            adapter: self.adapter.or(common.adapter),
            hardware_version: self.hardware_version.or(common.hardware_version),
        }
    }

    /// Whether the disk is to be made.
    pub(super) fn is_wanted(self, subcommand: Subcommand) -> bool {
        self.disk_args_given.unwrap_or(subcommand == Subcommand::Create)
    }

    /// What is to be made, if anything.
    ///
    /// Errors: words about a disk that is not to be made, or none about its size.
    pub(super) fn config(self, subcommand: Subcommand) -> Result<Option<CreateConfig>, UsageError> {
        if !self.is_wanted(subcommand) {
            if subcommand == Subcommand::Create {
                return Err(UsageError::new("--create makes disks, but create=false says otherwise"));
            }
            return match self.first_detail() {
                Some(key) => Err(UsageError::new(format!(
                    "{key}= says how to make a disk: it goes with create=true"
                ))),
                None => Ok(None),
            };
        }
        if matches!(subcommand, Subcommand::Query | Subcommand::Commit) {
            return Err(UsageError::new("create=true goes with a mount or with --create"));
        }
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

    /// The first key that was given besides `create=` itself.
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

/// The value of `cow=`. A file that is called `tmp` is written `./tmp`.
pub(super) fn overlay(value: &OsStr) -> Result<Overlay, String> {
    if value == TEMPORARY {
        Ok(Overlay::Temporary)
    } else {
        values::path(value).map(Overlay::File)
    }
}

/// The value of `create-size=`.
pub(super) fn size(value: &OsStr) -> Result<u64, String> {
    let bytes = values::size(value)?;
    if bytes == 0 || !bytes.is_multiple_of(SECTOR) {
        return Err(format!(
            "a disk has whole sectors: a multiple of {SECTOR} bytes, and at least one"
        ));
    }
    if bytes / SECTOR > MAX_SECTORS {
        return Err(format!("a disk has at most {MAX_SECTORS} sectors of {SECTOR} bytes"));
    }
    Ok(bytes)
}

/// The value of `create-type=`.
pub(super) fn create_type(value: &OsStr) -> Result<CreateType, String> {
    word(value, &CREATE_TYPES)
}

/// The value of `create-adapter-type=`.
pub(super) fn adapter(value: &OsStr) -> Result<AdapterType, String> {
    word(value, &ADAPTERS)
}

/// The value of `create-hwversion=`: a number, or the name of a product.
pub(super) fn hardware_version(value: &OsStr) -> Result<u32, String> {
    let text = values::text(value)?;
    if let Some((_, version)) = HARDWARE.iter().find(|(name, _)| *name == text) {
        return Ok(*version);
    }
    let digits = text.bytes().all(|b| b.is_ascii_digit());
    let number = text
        .parse()
        .ok()
        .filter(|number| digits && HARDWARE_RANGE.contains(number));
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

/// Checks that what was said of one disk goes together.
pub(super) fn check_disk(disk: &DiskConfig, subcommand: Subcommand) -> Result<(), UsageError> {
    let local = disk.source.local();
    let error = |reason: &str| Err(UsageError::new(format!("{}: {reason}", disk.source.label())));
    let read_only = disk.read_only || subcommand == Subcommand::Mount { read_only: true };
    if let Some((local, create)) = local.and_then(|local| Some((local, local.create.as_ref()?))) {
        if disk.overlay.is_some() {
            return error("cow= puts an overlay over a disk that exists, but create=true makes a new one");
        }
        if local.format == Format::Raw {
            return error("create=true makes a VMDK, but format=raw says otherwise");
        }
        if read_only {
            return error("create=true makes an empty disk to be written to, so it cannot be read-only");
        }
        if create.kind == CreateType::StreamOptimized && disk.cache == Some(PageCache::WriteBack) {
            return error(
                "a stream-optimized disk is written in order, but cache=writeback writes in any: use cache=writethrough",
            );
        }
    }
    match (&disk.overlay, subcommand) {
        (Some(Overlay::File(cow)), _) if local.is_some_and(|local| *cow == local.path) => {
            error("cow= names the disk itself")
        }
        (Some(Overlay::Temporary), Subcommand::Query) => {
            error("cow=tmp is a new overlay with nothing in it: name the overlay's file with cow=FILE")
        }
        (Some(Overlay::Temporary), Subcommand::Commit) => {
            error("--commit merges an overlay that was kept, and cow=tmp never is: name its file with cow=FILE")
        }
        (None, Subcommand::Commit) => error("--commit needs the overlay: add cow=FILE"),
        (Some(_), Subcommand::Commit) if read_only => {
            error("--commit writes to the base, but readonly=true says otherwise")
        }
        _ => Ok(()),
    }
}

/// Checks that no file is to be written for two disks, and none that another disk reads.
pub(super) fn check_files(disks: &[DiskConfig]) -> Result<(), UsageError> {
    let mut written: HashMap<&Path, &DiskConfig> = HashMap::new();
    for disk in disks {
        let local = disk.source.local();
        let (key, file) = match (&disk.overlay, local) {
            (Some(Overlay::File(cow)), _) => ("cow", cow.as_path()),
            (_, Some(local)) if local.create.is_some() => ("file", local.path.as_path()),
            _ => continue,
        };
        if written.insert(file, disk).is_some() {
            let why = if key == "cow" {
                "an overlay belongs to one disk"
            } else {
                "it can be made only once"
            };
            return Err(UsageError::new(format!(
                "{key}={} is given for two disks: {why}",
                file.display()
            )));
        }
    }
    for disk in disks {
        let Some(local) = disk.source.local() else { continue };
        let other = written
            .get(local.path.as_path())
            .filter(|other| !std::ptr::eq(**other, disk));
        if let Some(other) = other {
            return Err(UsageError::new(format!(
                "{} is both a disk of its own and written for {}",
                local.path.display(),
                other.source.label()
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;

    use super::super::parse;
    use super::super::test_args::config_of;
    use super::*;
    use crate::config::Action;

    fn action(args: &[&str]) -> Result<Action, String> {
        config_of(parse(["vmdkfuse"].iter().chain(args).map(OsString::from))).map(|config| config.action)
    }

    fn disks(args: &[&str]) -> Vec<DiskConfig> {
        action(args).unwrap().disks().to_vec()
    }

    fn create(disk: &DiskConfig) -> Option<&CreateConfig> {
        let local = disk.source.local().unwrap();
        local.create.as_ref()
    }

    #[test]
    fn a_new_disk_with_all_that_can_be_said_of_it() {
        let said = [
            "create-type=split-flat",
            "create-adapter-type=ide",
            "create-hwversion=esx65",
        ];
        let args = [&["--create", "file=/a*.vmdk", "create-size=3G"][..], &said].concat();
        let expected = CreateConfig {
            size: 3 << 30,
            kind: CreateType::SplitFlat,
            adapter: AdapterType::Ide,
            hardware_version: 13,
        };
        let made = disks(&args);
        assert_eq!(create(&made[0]), Some(&expected));
        let local = made[0].source.local().unwrap();
        assert_eq!(local.path, Path::new("/a*.vmdk"), "a new name is no pattern");
        let mounted = disks(&[&["src"], &args[1..], &["create=yes"]].concat());
        assert_eq!(create(&mounted[0]), Some(&expected));
    }

    #[test]
    fn a_new_disk_of_which_little_is_said() {
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
    fn overlays_of_mounts_and_of_actions_that_look() {
        let here = std::env::current_dir().unwrap();
        let overlay = |args: &[&str]| disks(args)[0].overlay.clone();
        assert_eq!(overlay(&["src", "/a", "cow=tmp"]), Some(Overlay::Temporary));
        assert_eq!(overlay(&["src", "/a", "-o", "cow=tmp"]), Some(Overlay::Temporary));
        assert_eq!(
            overlay(&["src", "/a", "cow=./tmp"]),
            Some(Overlay::File(here.join("tmp")))
        );
        for looks in ["--info", "--map", "--check"] {
            assert_eq!(
                overlay(&[looks, "/a", "cow=c.vmdk"]),
                Some(Overlay::File(here.join("c.vmdk")))
            );
        }
        let all = disks(&["src", "cow=tmp", "/a", "/b", "cow=/c"]);
        assert_eq!(all[0].overlay, Some(Overlay::Temporary));
        assert_eq!(all[1].overlay, Some(Overlay::File("/c".into())));
    }

    #[test]
    fn a_commit_is_one_disk_with_an_overlay_that_was_kept() {
        let Ok(Action::Commit(disk)) = action(&["--commit", "cow=/c.vmdk", "file=/a.vmdk", "force=on"]) else {
            panic!("no commit")
        };
        assert_eq!(disk.overlay, Some(Overlay::File("/c.vmdk".into())));
        let local = disk.source.local().unwrap();
        assert!(local.force && local.path == Path::new("/a.vmdk"));
    }

    #[test]
    fn what_does_not_go_together_is_said_in_a_sentence() {
        let (size, cow) = ("create-size=1M", "cow=/c.vmdk");
        let cases: &[(&[&str], &str)] = &[
            (
                &["src", "/a", size],
                "create-size= says how to make a disk: it goes with create=true",
            ),
            (
                &["src", "/a", "create-type=split-flat"],
                "create-type= says how to make a disk",
            ),
            (
                &["src", "/a", "create=no", "create-hwversion=4"],
                "create-hwversion= says how to make a disk",
            ),
            (
                &["--info", "/a", "create-adapter-type=ide"],
                "create-adapter-type= says how to make a disk",
            ),
            (
                &["src", "/a", "create=yes"],
                "/a: a new disk needs its size: add create-size=SIZE",
            ),
            (&["--create", "/a"], "/a: a new disk needs its size"),
            (
                &["--create", "/a", size, "create=no"],
                "--create makes disks, but create=false says otherwise",
            ),
            (&["--create", size], "no disk is given"),
            (&["--create", "dir=/a", size], "a new disk is named with file=PATH"),
            (&["--create", "--json", "/a", size], "--json goes with"),
            (&["--create", "-r", "/a", size], "cannot be used with"),
            (&["--create", "--commit", "/a", size], "cannot be used with"),
            (
                &["--create", "/a", size, cow],
                "/a: cow= puts an overlay over a disk that exists",
            ),
            (
                &["src", "/a", "create=1", size, "cow=tmp"],
                "/a: cow= puts an overlay over a disk that exists",
            ),
            (
                &["src", "/a", "create=1", size, "format=raw"],
                "makes a VMDK, but format=raw says otherwise",
            ),
            (&["src", "/a", "create=1", size, "readonly=1"], "cannot be read-only"),
            (&["-r", "src", "/a", "create=1", size], "cannot be read-only"),
            (
                &["--create", size, "/a", "/a"],
                "file=/a is given for two disks: it can be made only once",
            ),
            (
                &["--info", "/a", "create=1", size],
                "create=true goes with a mount or with --create",
            ),
            (
                &["--commit", "/a", cow, "create=1", size],
                "create=true goes with a mount or with --create",
            ),
            (
                &[
                    "src",
                    "/a",
                    "create=1",
                    size,
                    "create-type=stream-optimized",
                    "cache=writeback",
                ],
                "a stream-optimized disk is written in order",
            ),
            (&["--commit", "/a"], "/a: --commit needs the overlay: add cow=FILE"),
            (
                &["--commit", "/a", "cow=tmp"],
                "/a: --commit merges an overlay that was kept",
            ),
            (&["--commit", "/a", cow, "readonly=1"], "--commit writes to the base"),
            (
                &["--commit", "/a", cow, "/b", "cow=/d"],
                "--commit takes one disk, but there are 2",
            ),
            (&["--commit", cow], "no disk is given"),
            (
                &["--check", "/a", "cow=tmp"],
                "cow=tmp is a new overlay with nothing in it",
            ),
            (&["src", "/a", "cow=/a"], "/a: cow= names the disk itself"),
            (
                &["src", "cow=/c", "/a", "/b"],
                "cow=/c is given for two disks: an overlay belongs to one disk",
            ),
            (
                &["src", "/a", "cow=/b", "/b"],
                "/b is both a disk of its own and written for /a",
            ),
        ];
        for (args, message) in cases {
            let error = action(args).unwrap_err();
            assert!(error.contains(message) && !error.contains('\n'), "{args:?}: {error}");
        }
    }

    #[test]
    fn words_that_are_none_name_those_that_are() {
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
