//! `cow=` and `--commit`, and the conflicts of all keys that create or write files.
//!
//! The valid combinations depend on the [`Subcommand`]: a mount may have a temporary overlay, but a query or a commit
//! needs the file of an overlay. Conflicts that only the files show (a base with children, a file that already exists)
//! are found when the files are opened.

use std::collections::HashMap;
use std::path::Path;

use super::outcome::UsageError;
use super::subcommand::Subcommand;
use super::values::Value;
use crate::config::{DiskConfig, Format, Overlay};

/// Value of `cow=` that stands for a temporary overlay instead of a file.
pub(super) const TEMPORARY: &str = "tmp";

/// Parses the value of `cow=`. A file with the name `tmp` must be given as `./tmp`.
pub(super) fn overlay(value: &Value<'_>) -> Result<Overlay, String> {
    if value.text == TEMPORARY {
        Ok(Overlay::Temporary)
    } else {
        value.path().map(Overlay::File)
    }
}

/// Checks that the keys of one disk do not conflict with each other or with the subcommand.
pub(super) fn check_disk(disk: &DiskConfig, subcommand: Subcommand) -> Result<(), UsageError> {
    let local = disk.source.local();
    let error = |reason: &str| Err(UsageError::new(format!("{}: {reason}", disk.source.label())));
    let read_only = disk.read_only || subcommand == Subcommand::Mount { read_only: true };
    if let Some(local) = local.filter(|local| local.create.is_some()) {
        if disk.overlay.is_some() {
            return error("cow= puts an overlay over an existing disk, but create=true creates a new one");
        }
        if local.format == Format::Raw {
            return error("create=true creates a VMDK, but format=raw asks for a raw image");
        }
        if read_only {
            return error("create=true creates an empty disk, so it cannot be read-only");
        }
    }
    match (&disk.overlay, subcommand) {
        (Some(Overlay::File(cow)), _) if local.is_some_and(|local| *cow == local.path) => {
            error("cow= names the disk itself")
        }
        (Some(Overlay::Temporary), Subcommand::Query) => {
            error("cow=tmp is a new, empty overlay: give the file of an overlay with cow=FILE")
        }
        (Some(Overlay::Temporary), Subcommand::Commit) => {
            error("--commit needs the file of an overlay, but cow=tmp keeps none: give it with cow=FILE")
        }
        (None, Subcommand::Commit) => error("--commit needs the overlay: add cow=FILE"),
        (Some(_), Subcommand::Commit) if read_only => {
            error("--commit writes to the base, but readonly=true forbids it")
        }
        _ => Ok(()),
    }
}

/// Checks that no file is written by two disks, and that no file that a disk writes is the source of another disk.
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
                "it can be created only once"
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
                "{} is a disk itself, and is also written for {}",
                local.path.display(),
                other.source.label()
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::test_args::{action, disks};
    use super::*;
    use crate::config::Action;

    #[test]
    fn overlays_of_mounts_and_of_queries() {
        let here = std::env::current_dir().unwrap();
        let overlay = |args: &[&str]| disks(args)[0].overlay.clone();
        assert_eq!(overlay(&["src", "/a", "cow=tmp"]), Some(Overlay::Temporary));
        assert_eq!(overlay(&["src", "/a", "-o", "cow=tmp"]), Some(Overlay::Temporary));
        assert_eq!(
            overlay(&["src", "/a", "cow=./tmp"]),
            Some(Overlay::File(here.join("tmp")))
        );
        for query in ["--info", "--map", "--check"] {
            assert_eq!(
                overlay(&[query, "/a", "cow=c.vmdk"]),
                Some(Overlay::File(here.join("c.vmdk")))
            );
        }
        let all = disks(&["src", "cow=tmp", "/a", "/b", "cow=/c"]);
        assert_eq!(all[0].overlay, Some(Overlay::Temporary));
        assert_eq!(all[1].overlay, Some(Overlay::File("/c".into())));
    }

    #[test]
    fn a_commit_takes_one_disk_with_an_overlay_file() {
        let Ok(Action::Commit(disk)) = action(&["--commit", "cow=/c.vmdk", "file=/a.vmdk", "force=on"]) else {
            panic!("not a commit")
        };
        assert_eq!(disk.overlay, Some(Overlay::File("/c.vmdk".into())));
        let local = disk.source.local().unwrap();
        assert!(local.force && local.path == Path::new("/a.vmdk"));
    }

    #[test]
    fn conflicting_keys_are_explained_in_one_line() {
        let (size, cow) = ("create-size=1M", "cow=/c.vmdk");
        let cases: &[(&[&str], &str)] = &[
            (&["src", "/a", size], "create-size= needs create=true"),
            (
                &["src", "/a", "create-type=split-flat"],
                "create-type= needs create=true",
            ),
            (
                &["src", "/a", "create=no", "create-hwversion=4"],
                "create-hwversion= needs create=true",
            ),
            (
                &["--info", "/a", "create-adapter-type=ide"],
                "create-adapter-type= needs create=true",
            ),
            (
                &["src", "/a", "create=yes"],
                "/a: a new disk needs its size: add create-size=SIZE",
            ),
            (&["--create", "/a"], "/a: a new disk needs its size"),
            (
                &["--create", "/a", size, "create=no"],
                "--create creates disks, but create=false forbids it",
            ),
            (&["--create", size], "no disk is given"),
            (&["--create", "dir=/a", size], "a created disk needs file=PATH"),
            (&["--create", "--json", "/a", size], "--json needs"),
            (&["--create", "-r", "/a", size], "cannot be used with"),
            (&["--create", "--commit", "/a", size], "cannot be used with"),
            (
                &["--create", "/a", size, cow],
                "/a: cow= puts an overlay over an existing disk",
            ),
            (
                &["src", "/a", "create=1", size, "cow=tmp"],
                "/a: cow= puts an overlay over an existing disk",
            ),
            (
                &["src", "/a", "create=1", size, "format=raw"],
                "creates a VMDK, but format=raw asks for a raw image",
            ),
            (&["src", "/a", "create=1", size, "readonly=1"], "cannot be read-only"),
            (&["-r", "src", "/a", "create=1", size], "cannot be read-only"),
            (
                &["--create", size, "/a", "/a"],
                "file=/a is given for two disks: it can be created only once",
            ),
            (
                &["--info", "/a", "create=1", size],
                "create=true needs a mount or --create",
            ),
            (
                &["--commit", "/a", cow, "create=1", size],
                "create=true needs a mount or --create",
            ),
            (&["--commit", "/a"], "/a: --commit needs the overlay: add cow=FILE"),
            (
                &["--commit", "/a", "cow=tmp"],
                "/a: --commit needs the file of an overlay",
            ),
            (&["--commit", "/a", cow, "readonly=1"], "--commit writes to the base"),
            (
                &["--commit", "/a", cow, "/b", "cow=/d"],
                "--commit takes one disk, but there are 2",
            ),
            (&["--commit", cow], "no disk is given"),
            (&["--check", "/a", "cow=tmp"], "cow=tmp is a new, empty overlay"),
            (&["src", "/a", "cow=/a"], "/a: cow= names the disk itself"),
            (
                &["src", "cow=/c", "/a", "/b"],
                "cow=/c is given for two disks: an overlay belongs to one disk",
            ),
            (
                &["src", "/a", "cow=/b", "/b"],
                "/b is a disk itself, and is also written for /a",
            ),
        ];
        for (args, message) in cases {
            let error = action(args).unwrap_err();
            assert!(error.contains(message) && !error.contains('\n'), "{args:?}: {error}");
        }
    }
}
