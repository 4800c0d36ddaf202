//! Table of all keys. Parsing, `--help` and "did you mean" are derived from it.
//!
//! A key that works in this build has a function that stores its value. A key that does not work yet has none, and
//! [`Key::available`] reports that. To add its back end, give its row a function; nothing else changes here.

use super::pair::Value;
use super::settings::{Backend, FileName, Settings, SourceSpec};
use super::{UsageError, create_args, https, nbd, overlay_args, scheme, values, vddk};
use crate::config::{Format, KernelView, NbdAddress, Secret};

mod help;

#[cfg(test)]
pub(super) use help::ready;
pub(super) use help::{help, paragraphs};

/// One row of the table: a key and everything the parser and the help need to know about it.
#[derive(Debug)]
pub(super) struct Key {
    /// Text before the `=`.
    pub(super) name: &'static str,
    /// Other accepted spellings.
    pub(super) aliases: &'static [&'static str],
    /// Section of the help that lists the key.
    pub(super) group: Group,
    /// Groups whose sources accept the key too.
    also: &'static [Group],
    /// Form of the value.
    pub(super) kind: ValueKind,
    /// Explanation in the help.
    pub(super) help: &'static str,
    /// True if the key may be given more than once for a disk. All its values apply.
    pub(super) repeats: bool,
    /// Disks that the key applies to.
    pub(super) scope: Scope,
    /// True if the value must not show in a message.
    pub(super) secret: bool,
    /// Keys that make one choice together with this one.
    pub(super) choice: Option<Choice>,
    /// Function that stores the value, if the key works in this build.
    pub(super) availability: Availability,
}

/// Sections of the help, in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Group {
    /// Keys for every kind of source.
    Every,
    /// Images on this machine.
    Local,
    /// ESXi and vCenter.
    VMware,
    /// VMware's library.
    Vddk,
    /// Creation of disks.
    Create,
    /// Additional files in the mount for each disk.
    Views,
    /// NBD servers.
    Nbd,
}

/// Form of a value.
#[derive(Debug, Clone, Copy)]
pub(super) enum ValueKind {
    /// A boolean ([`values::boolean`]).
    Bool,
    /// A size in bytes ([`values::size`]).
    Size,
    /// A time in whole seconds.
    Seconds,
    /// A whole number.
    Count,
    /// The path of a file or folder.
    Path,
    /// A path, or this word instead of one.
    PathOr(&'static str),
    /// A number, or a name for one. Holds the placeholder for the help.
    Named(&'static str),
    /// Any text that the key checks itself.
    Text,
    /// Usually one of these words. The key itself checks the text, and knows other spellings.
    Known(&'static [&'static str]),
    /// One of a fixed set of words.
    OneOf {
        /// Words that work in this build.
        words: &'static [&'static str],
        /// Words that are not in this build yet.
        later: &'static [&'static str],
    },
}

/// Disks that a key applies to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scope {
    /// The key names a source, and so starts another disk.
    Starts,
    /// The key applies to one disk. Before the first source it is accepted if there is only one disk.
    OneDisk,
    /// The key applies to all disks before the first source, and to one disk after its source.
    Common,
}

/// Keys that make one choice together: one of them for a disk replaces the common values of all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Choice {
    /// The trust in a server.
    Trust,
    /// The owner of a disk that VDDK opens.
    Owner,
    /// The address of an NBD server.
    Address {
        /// True if `port=` is a part of the address.
        has_port: bool,
    },
}

/// Function that stores a value. Its error is the reason why the value is invalid.
pub(super) type Apply = fn(&mut Settings, &Value<'_>) -> Result<(), String>;

/// Availability of a key in this build.
#[derive(Debug, Clone, Copy)]
pub(super) enum Availability {
    /// The key works. The function stores its value.
    Ready(Apply),
    /// The back end or feature of the key is not in this build.
    NotYet,
}

impl Group {
    pub(super) const ALL: [Self; 7] = [
        Self::Every,
        Self::Local,
        Self::VMware,
        Self::Vddk,
        Self::Create,
        Self::Views,
        Self::Nbd,
    ];

    pub(super) const fn title(self) -> &'static str {
        match self {
            Self::Every => "Every source",
            Self::Local => "Local files",
            Self::VMware => "VMware",
            Self::Vddk => "VDDK",
            Self::Create => "Created disks",
            Self::Views => "Views",
            Self::Nbd => "NBD",
        }
    }
}

impl ValueKind {
    /// Returns the placeholder for the value in the help and in messages.
    pub(super) fn placeholder(self) -> String {
        match self {
            Self::Bool => "BOOL".into(),
            Self::Size => "SIZE".into(),
            Self::Seconds => "SECONDS".into(),
            Self::Count => "N".into(),
            Self::Path => "PATH".into(),
            Self::PathOr(word) => format!("PATH|{word}"),
            Self::Named(what) => what.into(),
            Self::Text => "TEXT".into(),
            Self::Known(_) => "TYPE".into(),
            Self::OneOf { words, .. } => words.join("|"),
        }
    }

    /// Returns a description of the TOML value that a config file must have, for error messages.
    pub(super) fn in_toml(self) -> String {
        match self {
            Self::Bool => "true or false".into(),
            Self::Size => "a text such as \"64M\", or a number of bytes".into(),
            Self::Seconds | Self::Count => "a whole number".into(),
            Self::Path => "a path in quotes".into(),
            Self::PathOr(word) => format!("a path or \"{word}\", in quotes"),
            Self::Named(_) => "a whole number, or a name in quotes".into(),
            Self::Text | Self::Known(_) => "a text in quotes".into(),
            Self::OneOf { words, .. } => words
                .iter()
                .map(|word| format!("\"{word}\""))
                .collect::<Vec<_>>()
                .join(" or "),
        }
    }
}

impl Key {
    /// Creates a row for a key that works in this build.
    const fn ready(name: &'static str, group: Group, kind: ValueKind, help: &'static str, apply: Apply) -> Self {
        Self {
            availability: Availability::Ready(apply),
            ..Self::later(name, group, kind, help)
        }
    }

    /// Creates a row for a key that is not in this build yet.
    const fn later(name: &'static str, group: Group, kind: ValueKind, help: &'static str) -> Self {
        let availability = Availability::NotYet;
        Self {
            name,
            aliases: &[],
            group,
            also: &[],
            kind,
            help,
            repeats: false,
            scope: Scope::Common,
            secret: false,
            choice: None,
            availability,
        }
    }

    const fn secret(mut self) -> Self {
        self.secret = true;
        self
    }

    const fn alias(mut self, aliases: &'static [&'static str]) -> Self {
        self.aliases = aliases;
        self
    }

    const fn also(mut self, groups: &'static [Group]) -> Self {
        self.also = groups;
        self
    }

    const fn choice(mut self, choice: Choice) -> Self {
        self.choice = Some(choice);
        self
    }

    const fn repeats(mut self) -> Self {
        self.repeats = true;
        self
    }

    const fn scope(mut self, scope: Scope) -> Self {
        self.scope = scope;
        self
    }

    /// Stores `value` in `settings`.
    ///
    /// Fails if the value is invalid, or if the key or the word is not in this build yet.
    pub(super) fn apply(&self, settings: &mut Settings, value: &Value<'_>) -> Result<(), UsageError> {
        let apply = self.available()?;
        if let ValueKind::OneOf { words, later } = self.kind {
            match value.to_str() {
                Some(word) if words.contains(&word) => {}
                Some(word) if later.contains(&word) => {
                    return Err(UsageError::not_yet(format_args!("{}={word}", self.name)));
                }
                _ => return Err(self.wrong(value, &format!("must be {}", words.join(" or ")))),
            }
        }
        apply(settings, value).map_err(|reason| self.wrong(value, &reason))
    }

    /// Returns the function that stores a value. Fails if the key is not in this build yet.
    pub(super) fn available(&self) -> Result<Apply, UsageError> {
        match self.availability {
            Availability::Ready(apply) => Ok(apply),
            Availability::NotYet => Err(UsageError::not_yet(format_args!("{}=", self.name))),
        }
    }

    /// Creates the error for an invalid value, which it prints unless it is secret or an address that holds a login.
    fn wrong(&self, value: &Value<'_>, reason: &str) -> UsageError {
        match self.secret || scheme::has_login(value) {
            true => UsageError::of(self.name, format_args!(": {reason}")),
            false => UsageError::of(self.name, format_args!("{}: {reason}", values::display(value))),
        }
    }

    /// Returns true if sources of `group` accept the key.
    pub(super) fn fits(&self, group: Group) -> bool {
        self.group == group || self.group == Group::Every || self.also.contains(&group)
    }

    /// Returns the explanation for the help and the manual. It starts with the usual words of the value, if there are some.
    pub(super) fn explanation(&self) -> String {
        let repeats = if self.repeats { " (repeatable)" } else { "" };
        match self.kind {
            ValueKind::Known(words) => format!("{}; {}{repeats}", words.join(", "), self.help),
            _ => format!("{}{repeats}", self.help),
        }
    }

    fn is_ready(&self) -> bool {
        matches!(self.availability, Availability::Ready(_))
    }
}

/// Returns the key with this name or alias.
pub(super) fn find(name: &str) -> Option<&'static Key> {
    KEYS.iter().find(|key| key.name == name || key.aliases.contains(&name))
}

/// Returns the name or alias that is most similar to `name`, if one is similar enough.
pub(super) fn nearest(name: &str) -> Option<&'static str> {
    nearest_of(name, spellings())
}

/// Returns the names and aliases of all keys.
pub(super) fn spellings() -> impl Iterator<Item = &'static str> {
    KEYS.iter()
        .flat_map(|key| std::iter::once(&key.name).chain(key.aliases))
        .copied()
}

/// Returns the word with the smallest edit distance to `name`: at most one edit, or one in three letters.
pub(super) fn nearest_of(name: &str, words: impl Iterator<Item = &'static str>) -> Option<&'static str> {
    let distances = words.map(|known| (strsim::damerau_levenshtein(name, known), known));
    // Among equal distances `min_by_key` returns the first.
    let (distance, known) = distances.min_by_key(|(distance, _)| *distance)?;
    let shorter = name.chars().count().min(known.len());
    // With one edit, a name of two letters is close to many others, so the distance must also be below the length.
    (distance <= (shorter / 3).max(1) && distance < shorter).then_some(known)
}

/// Returns a [`ValueKind::OneOf`] whose words all work in this build.
const fn one_of(words: &'static [&'static str]) -> ValueKind {
    ValueKind::OneOf { words, later: &[] }
}

/// All keys of all back ends. Within a group, the help lists them in this order.
#[rustfmt::skip] // a table
pub(super) static KEYS: &[Key] = &[
    Key::ready("name", Group::Every, ValueKind::Text, "file name in the mount (default: the name of the source with .raw)",
        |s, v| { values::file_name(v)?; s.name = Some(v.text.to_owned()); Ok(()) }).scope(Scope::OneDisk),
    Key::ready("readonly", Group::Every, ValueKind::Bool, "open this disk read-only (default: false)",
        |s, v| { s.read_only = values::boolean(v)?; Ok(()) }),
    Key::ready("cache", Group::Every, one_of(&["none", "writethrough", "writeback"]), "mode of the kernel's page cache; writeback means writethrough (default: writethrough)",
        |s, v| { s.cache = values::page_cache(v); Ok(()) }),
    Key::ready("cache-size", Group::Every, ValueKind::Size, "RAM for cached blocks of this disk, if they are compressed or remote (default: 32M, on a web server 64M)",
        |s, v| { s.cache_size = Some(values::size(v)?); Ok(()) }),
    Key::ready("readahead", Group::Every, ValueKind::Size, "upper limit of read-ahead (default: by the distance of the source; on a web server 24M)",
        |s, v| { s.readahead = Some(values::size(v)?); Ok(()) }),
    Key::ready("backend", Group::Every, one_of(&["native", "nbd", "https", "vddk"]),
        "back end to use (default: by the source)",
        |s, v| {
            s.backend = Some(match v.to_str() {
                Some("nbd") => Backend::Nbd,
                Some("https") => Backend::Https,
                Some("vddk") => Backend::Vddk,
                _ => Backend::Native,
            });
            Ok(())
        }),
    Key::ready("cow", Group::Every, ValueKind::PathOr(overlay_args::TEMPORARY), "write to this overlay, a VMDK that is created if missing (tmp: a temporary \
        one, discarded at unmount); the disk itself is only read",
        |s, v| { s.overlay = Some(overlay_args::overlay(v)?); Ok(()) }),
    Key::ready("cache-dir", Group::Every, ValueKind::Path, "folder that keeps fetched blocks of disks on web servers across mounts",
        |s, v| { s.cache_dir = Some(v.path()?); Ok(()) }),
    Key::ready("cache-dir-size", Group::Every, ValueKind::Size, "size limit of that folder; the least recently used files are removed",
        |s, v| { s.cache_dir_size = Some(values::size(v)?); Ok(()) }),
    Key::ready("timeout", Group::Every, ValueKind::Seconds, "deadline after which a request to a server fails, 1 to 1800 (default: 30 for NBD, 60 for HTTPS, \
        2000 for a vCenter)",
        |s, v| { s.server.timeout = Some(nbd::timeout(v)?); Ok(()) }),
    Key::ready("retry", Group::Every, ValueKind::Count, "how often to retry, 0 to 1000000: to connect to an NBD server, or a request to a web server (default: not at the start, then until timeout=)",
        |s, v| { s.server.retry = Some(nbd::retry(v)?); Ok(()) }),

    Key::ready("limit", Group::Every, ValueKind::Count, "how many ranges --map lists for a disk (default: 1000000; 0: all)",
        |s, v| { s.map_limit = Some(values::number(v, 0, u32::MAX)?.into()); Ok(()) }),

    Key::ready("file", Group::Local, ValueKind::Path, "file of a disk (wildcards * ? [ match several); starts another disk",
        |s, v| { s.source = Some(SourceSpec::File(FileName::of(v, scheme::file(v)?))); Ok(()) }).scope(Scope::Starts).also(&[Group::VMware, Group::Vddk]),
    Key::ready("dir", Group::Local, ValueKind::Path, "all disks of a folder: its *.vmdk files except bare extents; starts another disk",
        |s, v| { s.source = Some(SourceSpec::Dir(v.path()?)); Ok(()) }).scope(Scope::Starts),
    Key::ready("format", Group::Local, one_of(&["vmdk", "raw"]), "format of the file (default: by its name)",
        |s, v| { s.image.format = if v.text == "raw" { Format::Raw } else { Format::Vmdk }; Ok(()) }).also(&[Group::VMware]),
    Key::ready("allow-dir", Group::Local, ValueKind::Path, "another folder that file names inside an image may point into",
        |s, v| { s.image.allow_dirs.push(v.path()?); Ok(()) }).repeats(),
    Key::ready("extents", Group::Local, one_of(&["any", "self"]), "files that an image may name; self: none, only single-file images open (default: any)",
        |s, v| { s.image.single_file = v.text == "self"; Ok(()) }),
    Key::ready("degraded", Group::Local, one_of(&["cid", "orphan", "short"]), "accept a parent whose CID differs, a snapshot without its parent, or a \
        flat extent that is too short; what is missing cannot be read",
        |s, v| {
            match v.to_str() {
                Some("orphan") => s.image.degraded.orphan = true,
                Some("short") => s.image.degraded.short = true,
                _ => s.image.degraded.cid = true,
            }
            Ok(())
        }).repeats().also(&[Group::VMware]),
    Key::ready("parent", Group::Local, ValueKind::Path, "parent of the oldest link that is found",
        |s, v| { s.parent = Some(FileName::of(v, v.path()?)); Ok(()) }).scope(Scope::OneDisk).also(&[Group::VMware]),
    Key::ready("member", Group::Local, ValueKind::Text, "the disk to show of a package (OVA) (default: all of them; of a web server the only one)",
        |s, v| { s.image.member = Some(values::text(v)?.to_owned()); Ok(()) }).scope(Scope::OneDisk).also(&[Group::VMware]),
    Key::ready("force", Group::Local, ValueKind::Bool, "write to a disk even if a snapshot is based on it (default: false)",
        |s, v| { s.image.force = values::boolean(v)?; Ok(()) }),
    Key::ready("lock", Group::Local, one_of(&["on", "off"]), "lock the image's files against other writers (default: on)",
        |s, v| { s.image.lock = v.text == "on"; Ok(()) }),
    Key::ready("kernel-view", Group::Local, one_of(&["auto", "off", "required"]), "let the kernel read the image's files without the daemon (default: auto)",
        |s, v| {
            s.image.view.mode = match v.to_str() {
                Some("off") => KernelView::Off,
                Some("required") => KernelView::Required,
                _ => KernelView::Auto,
            };
            Ok(())
        }),
    Key::ready("view-size", Group::Local, ValueKind::Size, "size limit of the kernel view's index (default: 256M)",
        |s, v| { s.image.view.size = values::size(v)?; Ok(()) }),
    Key::ready("view-dir", Group::Local, ValueKind::Path, "folder for the index, on a disk's file system (default: in memory)",
        |s, v| { s.image.view.dir = Some(v.path()?); Ok(()) }),

    Key::ready("server", Group::VMware, ValueKind::Text, "ESXi or vCenter host, for file=\"[datastore] folder/disk.vmdk\"",
        |s, v| { s.https.server = Some(values::host(v)?); Ok(()) }).also(&[Group::Vddk]),
    Key::ready("port", Group::Nbd, ValueKind::Named("PORT"), "port of the server: a number or a service name (default: 10809 for NBD, 443 for HTTPS)",
        |s, v| { s.server.port = Some(nbd::port(v)?); Ok(()) }).also(&[Group::VMware, Group::Vddk]),
    Key::ready("user", Group::VMware, ValueKind::Text, "user name for the login",
        |s, v| { s.https.http.user = Some(values::text(v)?.to_owned()); Ok(()) }).alias(&["username"]).also(&[Group::Vddk]),
    Key::ready("password", Group::VMware, ValueKind::Text, "password; `-` prompts, `+FILE` and `-FD` read it",
        |s, v| { s.https.password = Some(https::password(v)?); Ok(()) }).secret().also(&[Group::Vddk]),
    Key::ready("cookie", Group::VMware, ValueKind::Text, "session cookie to send in place of a login",
        |s, v| { s.https.http.cookie = Some(Secret::new(values::text(v)?)); Ok(()) }).secret().also(&[Group::Vddk]),
    Key::ready("thumbprint", Group::VMware, ValueKind::Text, "SHA-1 or SHA-256 of the server's certificate, which is then trusted",
        |s, v| {
            s.https.thumbprint = Some(https::thumbprint(v)?);
            s.vddk.thumbprint = Some(values::text(v)?.to_owned());
            Ok(())
        }).choice(Choice::Trust).also(&[Group::Vddk]),
    Key::ready("datacenter", Group::VMware, ValueKind::Text, "inventory path of the datastore's datacenter on a vCenter",
        |s, v| { s.https.datacenter = Some(values::text(v)?.to_owned()); Ok(()) }),
    Key::ready("cainfo", Group::VMware, ValueKind::Path, "file of trusted certificates, PEM (default: those of the system)",
        |s, v| { s.https.cainfo = Some(v.path()?); Ok(()) }).choice(Choice::Trust),
    Key::ready("insecure", Group::VMware, ValueKind::Bool, "accept any certificate of the server (default: false)",
        |s, v| { s.https.insecure = values::boolean(v)?; Ok(()) }).choice(Choice::Trust),
    Key::ready("cookie-script", Group::VMware, ValueKind::Text, "shell command that prints the cookie to send, with $url and $iteration (its runs so far)",
        |s, v| { s.https.cookie_script = Some(Secret::new(values::text(v)?)); Ok(()) }).secret(),
    Key::ready("cookie-script-renew", Group::VMware, ValueKind::Seconds, "interval at which to run it again (default: when the cookie has expired)",
        |s, v| { s.https.cookie_renew = Some(https::renewal(v)?).filter(|time| !time.is_zero()); Ok(()) }),
    Key::ready("credentials", Group::VMware, ValueKind::Path, "file of lines username=, password= and cookie=, which only its owner can read",
        |s, v| { s.https.credentials = Some(https::credentials(v)?); Ok(()) }).also(&[Group::Vddk]),
    Key::ready("http-version", Group::VMware, one_of(&["1.1", "2"]), "version of HTTP (default: 1.1; 2 where the server has it)",
        |s, v| { s.https.http.http2 = v.text == "2"; Ok(()) }),
    Key::ready("header", Group::VMware, ValueKind::Text, "NAME: VALUE, a header that is added to every request",
        |s, v| { s.https.http.headers.push(https::header(v)?); Ok(()) }).repeats().secret(),
    Key::ready("proxy", Group::VMware, ValueKind::Text, "http:// address of a proxy (default: none, whatever the environment says)",
        |s, v| { s.https.http.proxy = Some(https::proxy(v)?); Ok(()) }).secret(),
    Key::ready("resolve", Group::VMware, ValueKind::Text, "HOST:ADDRESS, an address to use instead of a name lookup",
        |s, v| { s.https.http.resolve.push(https::resolve(v)?); Ok(()) }).repeats(),
    Key::ready("url", Group::VMware, ValueKind::Text, "https:// or http:// address of a disk; starts another disk",
        |s, v| { s.source = Some(SourceSpec::Url(https::url(v)?)); Ok(()) }).scope(Scope::Starts).secret(),

    Key::ready("libdir", Group::Vddk, ValueKind::Path, "folder of VMware's VDDK, which then opens the disk (default with backend=vddk: \
        /usr/lib/vmware-vix-disklib, then the dynamic linker's search)",
        |s, v| { s.vddk.disk.library.libdir = Some(v.path()?); Ok(()) }),
    Key::ready("config", Group::Vddk, ValueKind::Path, "the library's own configuration file (default: a private one with larger buffers)",
        |s, v| { s.vddk.disk.library.config = Some(v.path()?); Ok(()) }),
    Key::ready("vm", Group::Vddk, ValueKind::Text, "moref=ID of the virtual machine; a disk of a server needs server=, user=, password= and vm=",
        |s, v| { s.vddk.vm = Some(values::text(v)?.to_owned()); Ok(()) }).choice(Choice::Owner),
    Key::ready("snapshot", Group::Vddk, ValueKind::Text, "managed object reference of a snapshot of the virtual machine",
        |s, v| { s.vddk.snapshot = Some(values::text(v)?.to_owned()); Ok(()) }),
    Key::ready("transports", Group::Vddk, ValueKind::Text, "transport modes in the order to try them (default: file:nbdssl:nbd)",
        |s, v| { s.vddk.disk.transports = Some(values::text(v)?.to_owned()); Ok(()) }),
    Key::ready("nfchostport", Group::Vddk, ValueKind::Count, "port of the NFC service (default: that of the library, 902)",
        |s, v| { s.vddk.nfc_host_port = Some(values::number(v, 1, u16::MAX.into())?); Ok(()) }),
    Key::ready("single-link", Group::Vddk, ValueKind::Bool, "open only this link of the chain",
        |s, v| { s.vddk.disk.single_link = values::boolean(v)?; Ok(()) }),
    Key::ready("unbuffered", Group::Vddk, ValueKind::Bool, "no caching by the library",
        |s, v| { s.vddk.disk.unbuffered = values::boolean(v)?; Ok(()) }),
    Key::ready("compression", Group::Vddk, one_of(&["none", "zlib", "fastlz", "skipz"]), "compression of the transport",
        |s, v| { s.vddk.disk.compression = vddk::compression(v); Ok(()) }),
    Key::ready("vimapiver", Group::Vddk, ValueKind::Text, "ignored", |_, v| values::text(v).map(drop)),
    Key::ready("datastore", Group::Vddk, ValueKind::Text, "moref=ID of the datastore of a disk without a virtual machine (VDDK 8.0.1 or newer)",
        |s, v| { s.vddk.datastore = Some(vddk::datastore(v)?); Ok(()) }).choice(Choice::Owner),
    Key::ready("prepare-for-access", Group::Vddk, ValueKind::Bool, "forbid migration of the virtual machine meanwhile (needs a vCenter)",
        |s, v| { s.vddk.prepare_for_access = values::boolean(v)?; Ok(()) }),

    Key::ready("create", Group::Create, ValueKind::Bool, "create file= first, as an empty VMDK (default: false)",
        |s, v| { s.creation.create = Some(values::boolean(v)?); Ok(()) }),
    Key::ready("create-size", Group::Create, ValueKind::Size, "size of the created disk, a multiple of 512",
        |s, v| { s.creation.size = Some(create_args::size(v)?); Ok(()) }),
    Key::ready("create-type", Group::Create, ValueKind::Known(&["monolithic-sparse", "monolithic-flat", "split-sparse", "split-flat", "vmfs-flat", "vmfs-thin", "stream-optimized"]),
        "stream-optimized is written once, in order (default: monolithic-sparse)",
        |s, v| { s.creation.kind = Some(create_args::create_type(v)?); Ok(()) }),
    Key::ready("create-adapter-type", Group::Create, ValueKind::Known(&["lsilogic", "buslogic", "ide", "legacyESX", "pvscsi"]),
        "controller that the descriptor names (default: lsilogic)",
        |s, v| { s.creation.adapter = Some(create_args::adapter(v)?); Ok(()) }),
    Key::ready("create-hwversion", Group::Create, ValueKind::Named("VERSION"), "hardware version of the created disk: a number, or a product such \
        as workstation5, esx50 or esx65 (default: 4)",
        |s, v| { s.creation.hardware_version = Some(create_args::hardware_version(v)?); Ok(()) }),

    Key::later("partitions", Group::Views, ValueKind::Bool, "also show each partition as a file"),
    Key::later("descriptor", Group::Views, ValueKind::Bool, "also show a .vmdk that describes the raw file"),

    Key::ready("uri", Group::Nbd, ValueKind::Text, "nbd://, nbds://, nbd+unix://, nbds+unix:// or nbd+vsock:// address; starts another disk",
        |s, v| { s.source = Some(SourceSpec::Nbd(nbd::uri(v)?)); Ok(()) }).scope(Scope::Starts).choice(Choice::Address { has_port: false }),
    Key::ready("hostname", Group::Nbd, ValueKind::Text, "host name of the server",
        |s, v| s.nbd.address("hostname", NbdAddress::Tcp { host: values::host(v)?, port: None })).choice(Choice::Address { has_port: true }),
    Key::ready("socket", Group::Nbd, ValueKind::Path, "Unix socket of the server",
        |s, v| s.nbd.address("socket", NbdAddress::Unix(v.path()?))).choice(Choice::Address { has_port: false }),
    Key::ready("socket-fd", Group::Nbd, ValueKind::Count, "file descriptor of a connected socket, 3 or higher",
        |s, v| s.nbd.address("socket-fd", NbdAddress::Fd(nbd::socket_fd(v)?))).choice(Choice::Address { has_port: false }),
    Key::ready("vsock-cid", Group::Nbd, ValueKind::Count, "VSOCK address (CID) of the server",
        |s, v| s.nbd.address("vsock-cid", NbdAddress::Vsock { cid: nbd::vsock_cid(v)?, port: None })).choice(Choice::Address { has_port: true }).alias(&["vhost-cid"]),
    Key::ready("command", Group::Nbd, ValueKind::Text, "program to start as the server, by socket activation; it ends with the mount",
        |s, v| s.nbd.address("command", NbdAddress::Command(vec![nbd::command(v)?]))).choice(Choice::Address { has_port: false }),
    Key::ready("arg", Group::Nbd, ValueKind::Text, "an argument for command=",
        |s, v| { s.nbd.args.push(nbd::word(v)?); Ok(()) }).repeats(),
    Key::ready("export", Group::Nbd, ValueKind::Text, "name of the export (default: the server's default export)",
        |s, v| { s.nbd.export = Some(nbd::export(v)?); Ok(()) }).also(&[Group::Vddk]),
    Key::ready("dynamic-export", Group::Nbd, ValueKind::Bool, "show every export of the server as a file (default: false)",
        |s, v| { s.nbd.dynamic = values::boolean(v)?; Ok(()) }),
    Key::ready("connections", Group::Nbd, ValueKind::Count, "number of connections, 1 to 16, if the server allows several (default: 4 for NBD, 8 for HTTPS)",
        |s, v| { s.server.connections = Some(nbd::connections(v)?); Ok(()) }).also(&[Group::VMware]),
    Key::ready("shared", Group::Nbd, ValueKind::Bool, "use one connection only (default: false)",
        |s, v| { s.nbd.shared = values::boolean(v)?; Ok(()) }),
    Key::ready("tls", Group::Nbd, one_of(&["off", "on", "require"]), "encrypt never, if the server supports it, or always (default: off; require with nbds:// or another tls key)",
        |s, v| { s.nbd.tls = Some(nbd::tls(v)); Ok(()) }),
    Key::ready("tls-certificates", Group::Nbd, ValueKind::Path, "folder of certificates (default: that of libnbd, or the system's)",
        |s, v| { s.nbd.tls_certificates = Some(v.path()?); Ok(()) }),
    Key::ready("tls-verify", Group::Nbd, ValueKind::Bool, "verify the server's certificate (default: true)",
        |s, v| { s.nbd.tls_verify = Some(values::boolean(v)?); Ok(()) }),
    Key::ready("tls-username", Group::Nbd, ValueKind::Text, "user name of the pre-shared key",
        |s, v| { s.nbd.tls_username = Some(values::text(v)?.to_owned()); Ok(()) }),
    Key::ready("tls-psk", Group::Nbd, ValueKind::Path, "file of pre-shared keys",
        |s, v| { s.nbd.tls_psk = Some(v.path()?); Ok(()) }),
];

#[cfg(test)]
mod tests;
