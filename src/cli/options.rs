//! Options of a mount that do not depend on its disks: those of `-o`, and those that have a name of their own.
//!
//! The options of a config file and those of the command line are layers that are applied to one [`MountArgs`], in this
//! order. `-o` takes the form that mount(8) and fstab use: a comma-separated list. A comma inside a value is written `\,`
//! and a backslash before one `\\`, as in programs that use libfuse.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

use clap::ValueEnum;

use super::argument::{split_key, unknown_key};
use super::key::ValueKind;
use super::keys;
use super::outcome::UsageError;
use super::pair::{Origin, Pair};
use super::settings::DiskPair;
use super::values::{self, Value};
use crate::config::{LogConfig, MountOptions};
use crate::fuse::mount_flags;

/// Options that are ignored: mount(8) or systemd handles them, or a FUSE mount has their effect anyway.
const IGNORED: &[&str] = &[
    "_netdev", "auto", "defaults", "group", "noauto", "nofail", "owner", "user", "users",
];

/// Highest effective count of `-v`: the trace level.
const MAX_VERBOSITY: u8 = 3;

/// Upper limit of `--threads`. Event loops beyond the number of processors gain nothing.
const MAX_THREADS: u32 = 64;

/// Options of a mount that do not depend on its disks.
#[derive(Debug, Default)]
pub(super) struct MountArgs {
    /// Options of the mount itself.
    pub(super) options: MountOptions,
    /// True if `rw` was given. It is the default, but it conflicts with `ro`.
    read_write: bool,
    /// True if `user=` was spelled `username=`, which mount(8) does not take for itself.
    pub(super) has_username: bool,
    /// Mount point of a config file, as an absolute path.
    pub(super) mount_point: Option<OsString>,
    pub(super) pidfile: Option<PathBuf>,
    pub(super) threads: Option<usize>,
    pub(super) log: LogConfig,
}

/// An option with a name of its own: a long option of the command line, and a key of the table `[mount]`.
#[derive(Debug)]
pub(super) struct MountKey {
    pub(super) name: &'static str,
    pub(super) kind: ValueKind,
    #[cfg_attr(not(test), expect(dead_code, reason = "only the manual shows it"))]
    pub(super) help: &'static str,
    /// Stores the value, or returns the options of `-o` that it stands for. The error is the reason why it is invalid.
    apply: fn(&mut MountArgs, &Value<'_>) -> Result<Vec<OsString>, String>,
}

/// The options with names of their own.
#[rustfmt::skip] // a table
pub(super) static MOUNT_KEYS: [MountKey; 7] = [
    MountKey { name: "mountpoint", kind: ValueKind::Path, help: "Mount point; another one on the command line counts",
        apply: |m, v| { m.mount_point = Some(v.path()?.into()); Ok(Vec::new()) } },
    MountKey { name: "options", kind: ValueKind::Text, help: "Options as for -o",
        apply: |_, v| Ok(split(v)) },
    MountKey { name: "read-only", kind: ValueKind::Bool, help: "Mount read-only",
        apply: |_, v| Ok(if values::boolean(v)? { vec!["ro".into()] } else { Vec::new() }) },
    MountKey { name: "threads", kind: ValueKind::Count, help: "Number of event loops, 1 to 64",
        apply: |m, v| { m.threads = Some(values::number(v, 1, MAX_THREADS)? as usize); Ok(Vec::new()) } },
    MountKey { name: "pidfile", kind: ValueKind::Path, help: "Write the process ID to this file",
        apply: |m, v| { m.pidfile = Some(v.path()?); Ok(Vec::new()) } },
    MountKey { name: "log-file", kind: ValueKind::Path, help: "Append log messages to this file",
        apply: |m, v| { m.log.file = Some(v.path()?); Ok(Vec::new()) } },
    MountKey { name: "log-format", kind: ValueKind::one_of(&["text", "json"]), help: "Format of log messages",
        apply: |m, v| {
            let format = LogFormat::from_str(values::text(v)?, false).ok();
            let format = format.ok_or("must be text or json")?;
            m.log.json = matches!(format, LogFormat::Json);
            Ok(Vec::new())
        } },
];

/// Format of log messages.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(super) enum LogFormat {
    Text,
    Json,
}

/// Returns the option with this name.
pub(super) fn mount_key(name: &str) -> Option<&'static MountKey> {
    MOUNT_KEYS.iter().find(|key| key.name == name)
}

impl Pair<MountKey> {
    /// Points an error about the value to the place where it was given, and names the option.
    fn blame(&self, reason: &str) -> UsageError {
        let (name, value) = (self.key.name, values::display(&self.value));
        let option = match self.origin {
            Origin::File { .. } => format!("{name}={value}: {reason}"),
            Origin::Argument => format!("--{name} {value}: {reason}"),
        };
        self.origin.blame(UsageError::new(option))
    }
}

impl MountArgs {
    /// Applies a layer over the earlier ones. Returns the pairs of `-o` that apply to all disks.
    ///
    /// Fails if an option is unknown, if a value is invalid, or if options of the layer contradict each other.
    pub(super) fn layer(&mut self, pairs: &[Pair<MountKey>]) -> Result<Vec<DiskPair>, UsageError> {
        let mut list = Vec::new();
        for pair in pairs {
            let options = (pair.key.apply)(self, &pair.value()).map_err(|reason| pair.blame(&reason))?;
            list.extend(options.into_iter().map(|option| (option, pair.origin.clone())));
        }
        self.options(list, false)
    }

    /// Applies the lists of mount(8), in which double quotes around a value protect commas. `sloppy` ignores unknown
    /// options, as `mount -s` requires. Otherwise as [`Self::layer`].
    pub(super) fn lists_of_mount<'a>(
        &mut self,
        lists: impl IntoIterator<Item = &'a OsString>,
        sloppy: bool,
    ) -> Result<Vec<DiskPair>, UsageError> {
        let list: Vec<OsString> = lists.into_iter().flat_map(|list| split_quoted(list)).collect();
        if list.iter().any(|option| option == "remount") {
            return Err(UsageError::new(
                "remount: the options of a mount cannot be changed while it is mounted: unmount it, and mount it again",
            ));
        }
        let list = list.into_iter().map(|option| (option, Origin::Argument)).collect();
        self.options(list, sloppy)
    }

    /// Stores the count of `-v`.
    pub(super) fn verbosity(&mut self, count: u8) {
        self.log.verbosity = count.min(MAX_VERBOSITY);
    }

    fn options(&mut self, list: Vec<(OsString, Origin)>, sloppy: bool) -> Result<Vec<DiskPair>, UsageError> {
        // `ro` and `rw` are one choice, and so are `allow_other` and `allow_root`: one of them replaces those of the
        // layers below.
        let has = |words: [&str; 2]| list.iter().any(|(option, _)| words.iter().any(|word| option == word));
        if has(["ro", "rw"]) {
            (self.options.read_only, self.read_write) = (false, false);
        }
        if has(["allow_other", "allow_root"]) {
            (self.options.allow_other, self.options.allow_root) = (false, false);
        }
        let mut pairs: Vec<DiskPair> = Vec::new();
        for (option, origin) in list {
            let known = self.option(&option, &origin, &mut pairs).map_err(|e| origin.blame(e))?;
            if !known && !sloppy {
                let secret = pairs.iter().find(|pair| pair.key.secret);
                let e = secret.map_or_else(|| unknown(&option), |pair| unknown_after(pair.key.name));
                return Err(origin.blame(e));
            }
            self.check().map_err(|e| origin.blame(e))?;
        }
        Ok(pairs)
    }

    /// Fails if options contradict each other.
    fn check(&self) -> Result<(), UsageError> {
        if self.options.read_only && self.read_write {
            return Err(UsageError::new(
                "the mount cannot be both read-only (-r, -o ro) and read-write (-o rw)",
            ));
        }
        if self.options.allow_other && self.options.allow_root {
            return Err(UsageError::new(
                "-o allow_other and -o allow_root cannot be used together",
            ));
        }
        Ok(())
    }

    /// Applies one option, or adds it to `pairs` if it is a key of disks. Returns false if it is unknown.
    fn option(&mut self, option: &OsStr, origin: &Origin, pairs: &mut Vec<DiskPair>) -> Result<bool, UsageError> {
        if let Some((name, value)) = split_key(option) {
            if self.key_value(name, value)? {
                return Ok(true);
            }
            let Some(key) = keys::find(name) else {
                return Ok(false);
            };
            self.has_username |= name == "username";
            let (value, origin) = (value.to_owned(), origin.clone());
            pairs.push(Pair { key, value, origin });
            return Ok(true);
        }
        match option.to_str() {
            Some("ro") => self.options.read_only = true,
            Some("rw") => self.read_write = true,
            Some("allow_other") => self.options.allow_other = true,
            Some("allow_root") => self.options.allow_root = true,
            Some("default_permissions") => self.options.default_permissions = true,
            Some("auto_unmount") => self.options.auto_unmount = true,
            Some("nonempty") => self.options.nonempty = true,
            Some(name) if mount_flags::known(name).is_some() => self.options.flags.extend(mount_flags::known(name)),
            // `x-` options belong to other programs and may have any text.
            _ => return Ok(option.as_bytes().starts_with(b"x-") || IGNORED.iter().any(|ignored| option == *ignored)),
        }
        Ok(true)
    }

    /// Applies one `NAME=VALUE` option of the mount itself. Returns false if it is none.
    fn key_value(&mut self, name: &str, value: &OsStr) -> Result<bool, UsageError> {
        let wrong = |reason: String| UsageError::new(format!("-o {name}={}: {reason}", values::display(value)));
        match name {
            "uid" => self.options.uid = Some(values::id(value).map_err(wrong)?),
            "gid" => self.options.gid = Some(values::id(value).map_err(wrong)?),
            "umask" => self.options.umask = Some(values::umask(value).map_err(wrong)?),
            "fsname" => self.options.fsname = Some(values::text(value).map_err(wrong)?.to_owned()),
            // For umount(8).
            "uhelper" => {}
            _ if name.starts_with("x-") => {}
            _ if mount_flags::is_context(name) => {
                let value = values::text(value).map_err(wrong)?;
                self.options.contexts.push(format!("{name}={value}"));
            }
            _ => return Ok(false),
        }
        Ok(true)
    }
}

/// Creates the error for an unknown option. Its value is left out because it may be a secret.
fn unknown(option: &OsStr) -> UsageError {
    if let Some((name, _)) = split_key(option) {
        return unknown_key(name);
    }
    let text = option.to_string_lossy();
    let name = text.split('=').next().unwrap_or_default();
    match keys::find(name) {
        Some(_) => UsageError::new(format!("-o {name}: a value is missing, as in {name}=...")),
        None => UsageError::new(format!("unknown mount option {name}")),
    }
}

/// Creates the error for an unknown option behind a secret, of which it may be a part.
fn unknown_after(secret: &str) -> UsageError {
    UsageError::new(format!(
        "unknown mount option after {secret}= (not shown: it may be a part of the value, where a comma is written \\,)"
    ))
}

/// Splits a list at its unescaped commas and drops empty parts.
fn split(list: &OsStr) -> Vec<OsString> {
    let mut options = vec![Vec::new()];
    let mut bytes = list.as_bytes().iter().copied().peekable();
    while let Some(byte) = bytes.next() {
        match (byte, options.last_mut()) {
            (b',', _) => options.push(Vec::new()),
            (b'\\', Some(last)) => last.push(bytes.next_if(|next| matches!(next, b',' | b'\\')).unwrap_or(byte)),
            (_, Some(last)) => last.push(byte),
            (_, None) => {}
        }
    }
    options
        .into_iter()
        .filter(|option| !option.is_empty())
        .map(OsString::from_vec)
        .collect()
}

/// Splits a list of mount(8). A value in double quotes ends at the quote before the next comma or the end of the list; the
/// quotes are removed, and nothing else in it is changed.
fn split_quoted(list: &OsStr) -> Vec<OsString> {
    let (mut options, mut rest) = (Vec::new(), list.as_bytes());
    // Position in `rest` up to which there is no quoted value.
    let mut from = 0;
    while let Some(at) = find(&rest[from..], b"=\"").map(|at| from + at) {
        let name = rest[..at]
            .iter()
            .rposition(|byte| *byte == b',')
            .map_or(0, |comma| comma + 1);
        let value = &rest[at + 2..];
        let closing = |end: &usize| value[*end] == b'"' && matches!(value.get(end + 1), None | Some(b','));
        // A quote within a name's value, or without its other half, is a character like any other.
        let (false, Some(end)) = (rest[name..at].contains(&b'='), (0..value.len()).find(closing)) else {
            from = at + 2;
            continue;
        };
        options.extend(split(OsStr::from_bytes(&rest[..name])));
        options.push(OsString::from_vec([&rest[name..=at], &value[..end]].concat()));
        (rest, from) = (value.get(end + 2..).unwrap_or_default(), 0);
    }
    options.extend(split(OsStr::from_bytes(rest)));
    options
}

/// Returns the position of `needle` in `bytes`.
fn find(bytes: &[u8], needle: &[u8]) -> Option<usize> {
    bytes.windows(needle.len()).position(|window| window == needle)
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    /// Returns the options and the keys of disks of a list on a command line.
    fn parse(list: &str) -> Result<(MountOptions, Vec<DiskPair>), String> {
        layered(&[list])
    }

    /// Applies each list as a layer. Returns the pairs of the last one.
    fn layered(lists: &[&str]) -> Result<(MountOptions, Vec<DiskPair>), String> {
        let (mut args, mut pairs) = (MountArgs::default(), Vec::new());
        for list in lists {
            let list = split(OsStr::new(list))
                .into_iter()
                .map(|option| (option, Origin::Argument));
            pairs = args.options(list.collect(), false).map_err(|e| e.to_string())?;
        }
        Ok((args.options, pairs))
    }

    fn mount(list: &str) -> Result<MountOptions, String> {
        parse(list).map(|(options, _)| options)
    }

    fn values(pairs: &[DiskPair]) -> Vec<(&str, &str)> {
        pairs
            .iter()
            .map(|pair| (pair.key.name, pair.value.to_str().unwrap()))
            .collect()
    }

    #[test]
    fn every_option_is_parsed() {
        let expected = MountOptions {
            read_only: true,
            allow_other: true,
            allow_root: false,
            default_permissions: true,
            auto_unmount: true,
            uid: Some(1000),
            gid: Some(100),
            umask: Some(0o027),
            fsname: Some("a=b c".into()),
            nonempty: true,
            flags: vec!["noexec", "sync"],
            contexts: vec!["context=system_u:object_r:tmp_t:s0".into()],
        };
        let list = "ro,allow_other,default_permissions,auto_unmount,uid=1000,gid=100,umask=027,fsname=a=b c,nonempty,\
                    noexec,sync,context=system_u:object_r:tmp_t:s0";
        assert_eq!(mount(list), Ok(expected));
        assert!(mount("allow_root").unwrap().allow_root);
        assert_eq!(mount("rw"), Ok(MountOptions::default()));
        assert_eq!(mount(""), Ok(MountOptions::default()));
    }

    #[test]
    fn options_of_mount_itself_are_ignored() {
        let list = "x-systemd.automount,x-systemd.requires=/a b,x-,_netdev,noauto,nofail,user,users,owner,group,defaults,\
            auto,,";
        let (options, pairs) = parse(list).unwrap();
        assert!(pairs.is_empty());
        assert_eq!(options, MountOptions::default());
    }

    #[test]
    fn flags_of_the_mount_are_kept_in_their_order() {
        let list = "dev,nodev,suid,nosuid,exec,noexec,sync,async,atime,noatime,relatime,dirsync,lazytime";
        assert_eq!(mount(list).unwrap().flags.join(","), list);
    }

    #[test]
    fn unknown_options_are_refused() {
        for (list, message) in [
            ("nope", "unknown mount option nope"),
            ("ro,Nope=1", "unknown mount option Nope"),
            ("ro=1", "unknown key ro=;"),
            ("xattr", "unknown mount option xattr"),
            ("readonly", "-o readonly: a value is missing"),
            ("cashe=none", "did you mean cache=?"),
        ] {
            let error = parse(list).unwrap_err();
            assert!(error.contains(message), "{list}: {error}");
        }
        assert!(!parse("pass_word=secret").unwrap_err().contains("secret"));
    }

    #[test]
    fn a_part_of_a_secret_behind_a_comma_is_not_shown() {
        let error = parse("password=hun,ro,ter2").unwrap_err();
        assert!(
            error.contains("after password=") && error.contains("\\,") && !error.contains("ter2"),
            "{error}"
        );
        let (_, pairs) = parse("password=hun\\,ter2").unwrap();
        assert_eq!(values(&pairs), [("password", "hun,ter2")]);
        assert!(!format!("{pairs:?}").contains("ter2"), "{pairs:?}");
    }

    #[test]
    fn sloppy_ignores_unknown_options_but_not_invalid_values() {
        let mut args = MountArgs::default();
        args.lists_of_mount([&OsString::from("nope,what=ever,ro")], true)
            .unwrap();
        assert!(args.options.read_only);
        assert!(args.lists_of_mount([&OsString::from("uid=me")], true).is_err());
    }

    #[test]
    fn invalid_values_are_refused() {
        for list in ["uid=root", "gid=-1", "umask=9", "umask=1777", "uid=", "fsname="] {
            let error = parse(list).unwrap_err();
            assert!(error.starts_with(&format!("-o {list}: ")), "{error}");
        }
    }

    #[test]
    fn contradictions_are_refused() {
        assert!(mount("ro,rw").unwrap_err().contains("both read-only"));
        assert!(mount("allow_other,allow_root").unwrap_err().contains("together"));
        assert!(mount("ro,ro").unwrap().read_only);
    }

    #[test]
    fn keys_are_collected_and_unescaped() {
        let (_, pairs) = parse("ro,cache=none,file=/a\\,b\\\\c\\d").unwrap();
        assert_eq!(values(&pairs), [("cache", "none"), ("file", "/a,b\\c\\d")]);
    }

    proptest! {
        #[test]
        fn splitting_reverses_escaping_and_joining(options in vec(vec(any::<u8>(), 1..8), 0..6)) {
            let mut list = Vec::new();
            for option in &options {
                for byte in option {
                    if matches!(byte, b',' | b'\\') {
                        list.push(b'\\');
                    }
                    list.push(*byte);
                }
                list.push(b',');
            }
            let split: Vec<_> = split(OsStr::from_bytes(&list)).into_iter().map(OsString::into_vec).collect();
            prop_assert_eq!(split, options);
        }
    }

    #[test]
    fn quotes_around_a_value_protect_its_commas() {
        for (list, expected) in [
            (r#"ro,name="a,b c",uid=1"#, &["ro", "name=a,b c", "uid=1"][..]),
            (r#"name="a""#, &["name=a"]),
            (r#"name="","#, &["name="]),
            (r#"name="a"b,c",ro"#, &[r#"name=a"b,c"#, "ro"]),
            (r#"name="a,ro"#, &[r#"name="a"#, "ro"]),
            (r#"name=x="a,b",ro"#, &[r#"name=x="a"#, r#"b""#, "ro"]),
            (
                r#"a=1,name="x\,y",b=2\,3,c="4,5""#,
                &["a=1", r"name=x\,y", "b=2,3", "c=4,5"],
            ),
        ] {
            assert_eq!(split_quoted(OsStr::new(list)), expected, "{list}");
        }
    }

    #[test]
    fn later_layers_win_and_keep_the_rest() {
        let over = |above: &str, below: &str| layered(&[below, above]).unwrap().0;
        let options = over(
            "uid=1,default_permissions,noexec",
            "uid=2,gid=3,umask=027,fsname=f,auto_unmount,sync",
        );
        assert_eq!(
            (options.uid, options.gid, options.umask),
            (Some(1), Some(3), Some(0o27))
        );
        assert_eq!(
            (options.fsname.as_deref(), options.flags.join(",")),
            (Some("f"), "sync,noexec".into())
        );
        assert!(options.default_permissions && options.auto_unmount);
        assert!(!over("rw", "ro").read_only && over("ro", "rw").read_only && over("", "ro").read_only);
        let allowed = |options: MountOptions| (options.allow_other, options.allow_root);
        assert_eq!(allowed(over("allow_root", "allow_other")), (false, true));
        assert_eq!(allowed(over("allow_other", "allow_root")), (true, false));
        assert_eq!(allowed(over("uid=1", "allow_root")), (false, true));
    }

    #[test]
    fn values_that_are_paths_need_not_be_utf8() {
        let mut args = MountArgs::default();
        let list = |bytes: &[u8]| vec![(OsStr::from_bytes(bytes).to_owned(), Origin::Argument)];
        let pairs = args.options(list(b"file=/\xff"), false).unwrap();
        assert_eq!(pairs[0].value, OsStr::from_bytes(b"/\xff"));
        assert!(args.options(list(b"x-\xff"), false).is_ok() && args.options(list(b"fsname=\xff"), false).is_err());
    }
}
