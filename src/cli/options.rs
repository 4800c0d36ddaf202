//! Options of `-o`, in the form that mount(8) and fstab use: a comma-separated list.
//!
//! A comma inside a value is written `\,` and a backslash before one `\\`, as in programs that use libfuse.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use super::argument::{split_key, unknown_key};
use super::keys::{self, Key, Scope};
use super::{UsageError, values};
use crate::config::MountOptions;
use crate::fuse::mount_flags;

/// Options that are ignored: mount(8) or systemd handles them, or a FUSE mount has their effect anyway.
const IGNORED: &[&str] = &[
    "_netdev", "auto", "defaults", "group", "noauto", "nofail", "owner", "user", "users",
];

/// All `-o` lists of a command line, merged.
#[derive(Debug, Default)]
pub(super) struct Options {
    /// Options of the mount itself.
    mount: MountOptions,
    /// True if `rw` was given. It is the default, but it conflicts with `ro`.
    read_write: bool,
    /// True if `user=` was spelled `username=`, which mount(8) does not take for itself.
    pub(super) has_username: bool,
    /// `KEY=VALUE` options, which apply to all disks.
    pub(super) keys: Vec<(&'static Key, OsString)>,
}

impl Options {
    /// Parses the lists in order. `sloppy` ignores unknown options, as `mount -s` requires.
    ///
    /// Fails if an option is unknown or a value invalid.
    pub(super) fn parse<'a>(lists: impl IntoIterator<Item = &'a OsStr>, sloppy: bool) -> Result<Self, UsageError> {
        Self::of(lists.into_iter().flat_map(split), sloppy)
    }

    /// Parses the lists of mount(8), in which double quotes around a value protect commas. `remount` is refused.
    pub(super) fn of_mount<'a>(lists: impl IntoIterator<Item = &'a OsStr>, sloppy: bool) -> Result<Self, UsageError> {
        let options: Vec<OsString> = lists.into_iter().flat_map(split_quoted).collect();
        if options.iter().any(|option| option == "remount") {
            return Err(UsageError::new(
                "remount: the options of a mount cannot be changed while it is mounted: unmount it, and mount it again",
            ));
        }
        Self::of(options, sloppy)
    }

    fn of(list: impl IntoIterator<Item = OsString>, sloppy: bool) -> Result<Self, UsageError> {
        let mut options = Self::default();
        for option in list {
            if !options.parse_option(&option)? && !sloppy {
                return Err(unknown(&option));
            }
        }
        Ok(options)
    }

    /// Returns these options, and makes the mount read-only if `yes` (`-r`). Never undoes `-o ro`.
    #[must_use]
    pub(super) fn read_only(mut self, yes: bool) -> Self {
        self.mount.read_only |= yes;
        self
    }

    /// Returns these options, with those of `below` for options that are not set here. The values of repeatable keys
    /// are concatenated, those of `below` first.
    #[must_use]
    pub(super) fn over(self, below: Self) -> Self {
        let (mine, other) = (self.mount, below.mount);
        // `ro` and `rw`, and `allow_other` and `allow_root`, are decided as pairs: taking each from a different side
        // would create a contradiction that is on neither side.
        let access = if mine.read_only || self.read_write {
            (mine.read_only, self.read_write)
        } else {
            (other.read_only, below.read_write)
        };
        let allows = if mine.allow_other || mine.allow_root {
            &mine
        } else {
            &other
        };
        let allowed = (allows.allow_other, allows.allow_root);
        let mount = MountOptions {
            read_only: access.0,
            allow_other: allowed.0,
            allow_root: allowed.1,
            default_permissions: mine.default_permissions || other.default_permissions,
            auto_unmount: mine.auto_unmount || other.auto_unmount,
            uid: mine.uid.or(other.uid),
            gid: mine.gid.or(other.gid),
            umask: mine.umask.or(other.umask),
            fsname: mine.fsname.or(other.fsname),
            nonempty: mine.nonempty || other.nonempty,
            // The later of two flags that contradict each other counts.
            flags: [other.flags, mine.flags].concat(),
            contexts: [other.contexts, mine.contexts].concat(),
        };
        let is_unset = |key: &Key| key.repeats || self.keys.iter().all(|(mine, _)| mine.name != key.name);
        let mut keys: Vec<_> = below.keys.into_iter().filter(|(key, _)| is_unset(key)).collect();
        keys.extend(self.keys);
        Self {
            mount,
            read_write: access.1,
            has_username: self.has_username || below.has_username,
            keys,
        }
    }

    /// Returns the first key that names a disk, if any.
    pub(super) fn source(&self) -> Option<&'static Key> {
        self.keys
            .iter()
            .map(|(key, _)| *key)
            .find(|key| key.scope == Scope::Starts)
    }

    /// Returns the options of the mount. Fails if they contradict each other.
    pub(super) fn mount(&self) -> Result<MountOptions, UsageError> {
        let mount = self.mount.clone();
        if mount.read_only && self.read_write {
            return Err(UsageError::new(
                "the mount cannot be both read-only (-r, -o ro) and read-write (-o rw)",
            ));
        }
        if mount.allow_other && mount.allow_root {
            return Err(UsageError::new(
                "-o allow_other and -o allow_root cannot be used together",
            ));
        }
        Ok(mount)
    }

    /// Parses one option. Returns false if it is unknown.
    fn parse_option(&mut self, option: &OsStr) -> Result<bool, UsageError> {
        if let Some((name, value)) = split_key(option) {
            return self.parse_key_value(name, value);
        }
        match option.to_str() {
            Some("ro") => self.mount.read_only = true,
            Some("rw") => self.read_write = true,
            Some("allow_other") => self.mount.allow_other = true,
            Some("allow_root") => self.mount.allow_root = true,
            Some("default_permissions") => self.mount.default_permissions = true,
            Some("auto_unmount") => self.mount.auto_unmount = true,
            Some("nonempty") => self.mount.nonempty = true,
            Some(name) if mount_flags::known(name).is_some() => self.mount.flags.extend(mount_flags::known(name)),
            // `x-` options belong to other programs and may have any text.
            _ => return Ok(option.as_bytes().starts_with(b"x-") || IGNORED.iter().any(|ignored| option == *ignored)),
        }
        Ok(true)
    }

    /// Parses one `NAME=VALUE` option. Returns false if its name is unknown.
    fn parse_key_value(&mut self, name: &str, value: &OsStr) -> Result<bool, UsageError> {
        let wrong = |reason: String| UsageError::new(format!("-o {name}={}: {reason}", values::display(value)));
        match name {
            "uid" => self.mount.uid = Some(values::id(value).map_err(wrong)?),
            "gid" => self.mount.gid = Some(values::id(value).map_err(wrong)?),
            "umask" => self.mount.umask = Some(values::umask(value).map_err(wrong)?),
            "fsname" => self.mount.fsname = Some(values::text(value).map_err(wrong)?.to_owned()),
            // For umount(8).
            "uhelper" => {}
            _ if name.starts_with("x-") => {}
            _ if mount_flags::is_context(name) => {
                let value = values::text(value).map_err(wrong)?;
                self.mount.contexts.push(format!("{name}={value}"));
            }
            _ => match keys::find(name) {
                Some(key) => {
                    self.has_username |= name == "username";
                    self.keys.push((key, value.to_owned()));
                }
                None => return Ok(false),
            },
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

    fn parse(list: &str) -> Result<Options, String> {
        Options::parse([OsStr::new(list)], false).map_err(|e| e.to_string())
    }

    fn mount(list: &str) -> Result<MountOptions, String> {
        parse(list)?.mount().map_err(|e| e.to_string())
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
        let options = parse(list).unwrap();
        assert!(options.keys.is_empty());
        assert_eq!(options.mount(), Ok(MountOptions::default()));
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
    fn sloppy_ignores_unknown_options_but_not_invalid_values() {
        let sloppy = |list: &str| Options::parse([OsStr::new(list)], true);
        assert!(sloppy("nope,what=ever,ro").unwrap().mount().unwrap().read_only);
        assert!(sloppy("uid=me").is_err());
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
        assert!(parse("rw").unwrap().read_only(true).mount().is_err());
        assert!(parse("ro").unwrap().read_only(true).mount().unwrap().read_only);
        assert!(parse("").unwrap().read_only(true).mount().unwrap().read_only);
    }

    #[test]
    fn keys_are_collected_and_unescaped() {
        let options = parse("ro,cache=none,file=/a\\,b\\\\c\\d").unwrap();
        let keys: Vec<_> = options
            .keys
            .iter()
            .map(|(key, value)| (key.name, value.to_str().unwrap()))
            .collect();
        assert_eq!(keys, [("cache", "none"), ("file", "/a,b\\c\\d")]);
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
    fn several_lists_are_merged() {
        let options = Options::parse([OsStr::new("ro,cache=none"), OsStr::new("uid=1")], false).unwrap();
        let mount = options.mount().unwrap();
        assert_eq!((mount.read_only, mount.uid, options.keys.len()), (true, Some(1), 1));
    }

    #[test]
    fn merged_options_win_and_keep_the_rest() {
        let over = |above: &str, below: &str| parse(above).unwrap().over(parse(below).unwrap());
        let options = over(
            "uid=1,default_permissions",
            "uid=2,gid=3,umask=027,fsname=f,auto_unmount",
        )
        .mount()
        .unwrap();
        assert_eq!(
            (options.uid, options.gid, options.umask),
            (Some(1), Some(3), Some(0o27))
        );
        assert_eq!(options.fsname.as_deref(), Some("f"));
        assert!(options.default_permissions && options.auto_unmount);
        assert!(!over("rw", "ro").mount().unwrap().read_only);
        assert!(over("ro", "rw").mount().unwrap().read_only);
        assert!(over("", "ro").mount().unwrap().read_only);
        let allowed = |options: Options| options.mount().map(|mount| (mount.allow_other, mount.allow_root));
        assert_eq!(allowed(over("allow_root", "allow_other")), Ok((false, true)));
        assert_eq!(allowed(over("allow_other", "allow_root")), Ok((true, false)));
        assert_eq!(allowed(over("uid=1", "allow_root")), Ok((false, true)));
    }

    #[test]
    fn merged_keys_win_and_repeatable_ones_are_concatenated() {
        let options = parse("cache=none,allow-dir=/b").unwrap();
        let options = options.over(parse("cache=writethrough,cache-size=1M,allow-dir=/a").unwrap());
        let keys: Vec<_> = options
            .keys
            .iter()
            .map(|(key, value)| (key.name, value.to_str().unwrap()))
            .collect();
        assert_eq!(
            keys,
            [
                ("cache-size", "1M"),
                ("allow-dir", "/a"),
                ("cache", "none"),
                ("allow-dir", "/b")
            ]
        );
        assert!(options.source().is_none());
        assert_eq!(
            parse("ro,cache=none,dir=/x").unwrap().source().map(|key| key.name),
            Some("dir")
        );
    }

    #[test]
    fn values_that_are_paths_need_not_be_utf8() {
        let options = Options::parse([OsStr::from_bytes(b"file=/\xff,x-\xff")], false).unwrap();
        assert_eq!(options.keys[0].1, OsStr::from_bytes(b"/\xff"));
        assert!(Options::parse([OsStr::from_bytes(b"fsname=\xff")], false).is_err());
    }
}
