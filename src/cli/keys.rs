//! The one table of keys. Parsing, `--help` and "did you mean" all come from it.
//!
//! A key that works carries the function that stores its value; one that does not yet has none, and answers in
//! [`Key::available`], the one place for it. When its back end lands, its row gets a function and nothing else changes here.

use std::ffi::OsStr;

use super::settings::{Backend, Settings, SourceSpec};
use super::{UsageError, nbd, values, writing};
use crate::config::{Format, KernelView};

mod help;

pub(super) use help::{HELP_WIDTH, help, help_later, wrapped};

/// One key.
#[derive(Debug)]
pub(super) struct Key {
    /// As it is written before the `=`.
    pub(super) name: &'static str,
    /// Other spellings.
    pub(super) aliases: &'static [&'static str],
    /// Its heading in the help.
    pub(super) group: Group,
    /// What its value looks like.
    pub(super) kind: Kind,
    /// One line for the help.
    pub(super) help: &'static str,
    /// May be given more than once for a disk; the values gather.
    pub(super) repeats: bool,
    /// Which disks it holds for.
    pub(super) scope: Scope,
    /// Whether it works in this build, and how.
    pub(super) availability: Availability,
}

/// The headings of the help, in its order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Group {
    /// For whatever source.
    Every,
    /// Images on this machine.
    Local,
    /// ESXi and vCenter.
    VMware,
    /// VMware's library.
    Vddk,
    /// Making new disks.
    Create,
    /// Further files about a disk.
    Views,
    /// NBD servers.
    Nbd,
}

/// What a value looks like.
#[derive(Debug, Clone, Copy)]
pub(super) enum Kind {
    /// True or false.
    Bool,
    /// Bytes.
    Size,
    /// Seconds.
    Seconds,
    /// A number.
    Count,
    /// A file or folder.
    Path,
    /// A file, or this word in its place.
    PathOr(&'static str),
    /// A number, or a name for it; called so in the help.
    Named(&'static str),
    /// Anything else.
    Text,
    /// One of some words.
    OneOf {
        /// Those that work where the key does.
        words: &'static [&'static str],
        /// Those that are not in this build yet.
        later: &'static [&'static str],
    },
}

/// Which disks a key holds for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scope {
    /// It names a source, and so starts another disk.
    Starts,
    /// Only for one disk: before the first disk it is accepted if there is no second one.
    OneDisk,
    /// Before the first disk it is a common key and holds for all.
    Common,
}

/// Stores a value, or says what is wrong with it.
pub(super) type Apply = fn(&mut Settings, &OsStr) -> Result<(), String>;

/// Whether a key works in this build.
#[derive(Debug, Clone, Copy)]
pub(super) enum Availability {
    /// It works.
    Local(Apply),
    /// Its back end or feature is not in this build.
    NotYet,
}

impl Group {
    const ALL: [Self; 7] = [
        Self::Every,
        Self::Local,
        Self::VMware,
        Self::Vddk,
        Self::Create,
        Self::Views,
        Self::Nbd,
    ];

    const fn title(self) -> &'static str {
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

impl Kind {
    /// What stands for the value in the help and in messages.
    fn placeholder(self) -> String {
        match self {
            Self::Bool => "BOOL".into(),
            Self::Size => "SIZE".into(),
            Self::Seconds => "SECONDS".into(),
            Self::Count => "N".into(),
            Self::Path => "PATH".into(),
            Self::PathOr(word) => format!("PATH|{word}"),
            Self::Named(what) => what.into(),
            Self::Text => "TEXT".into(),
            Self::OneOf { words, .. } => words.join("|"),
        }
    }

    /// What a config file must hold, for the message where it holds something else.
    pub(super) fn in_toml(self) -> String {
        match self {
            Self::Bool => "true or false".into(),
            Self::Size => "a text such as \"64M\", or a number of bytes".into(),
            Self::Seconds | Self::Count => "a whole number".into(),
            Self::Path => "a path in quotes".into(),
            Self::PathOr(word) => format!("a path or \"{word}\", in quotes"),
            Self::Named(_) => "a whole number, or a name in quotes".into(),
            Self::Text => "a text in quotes".into(),
            Self::OneOf { words, .. } => words
                .iter()
                .map(|word| format!("\"{word}\""))
                .collect::<Vec<_>>()
                .join(" or "),
        }
    }
}

impl Key {
    /// A key that works now.
    const fn local(name: &'static str, group: Group, kind: Kind, help: &'static str, apply: Apply) -> Self {
        Self {
            availability: Availability::Local(apply),
            ..Self::later(name, group, kind, help)
        }
    }

    /// A key whose time is still to come.
    const fn later(name: &'static str, group: Group, kind: Kind, help: &'static str) -> Self {
        let availability = Availability::NotYet;
        Self {
            name,
            aliases: &[],
            group,
            kind,
            help,
            repeats: false,
            scope: Scope::Common,
            availability,
        }
    }

    const fn alias(mut self, aliases: &'static [&'static str]) -> Self {
        self.aliases = aliases;
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
    /// Errors: a value that does not fit, or a key or word that is not in this build yet.
    pub(super) fn apply(&self, settings: &mut Settings, value: &OsStr) -> Result<(), UsageError> {
        let apply = self.available()?;
        if let Kind::OneOf { words, later } = self.kind {
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

    /// What stores a value. Errors: a key that is not in this build yet.
    pub(super) fn available(&self) -> Result<Apply, UsageError> {
        match self.availability {
            Availability::Local(apply) => Ok(apply),
            Availability::NotYet => Err(UsageError::not_yet(format_args!("{}=", self.name))),
        }
    }

    /// Only for keys that work: their values are no secrets.
    fn wrong(&self, value: &OsStr, reason: &str) -> UsageError {
        UsageError::new(format!("{}={}: {reason}", self.name, values::shown(value)))
    }

    fn is_local(&self) -> bool {
        matches!(self.availability, Availability::Local(_))
    }
}

/// The key of that name or alias.
pub(super) fn find(name: &str) -> Option<&'static Key> {
    KEYS.iter().find(|key| key.name == name || key.aliases.contains(&name))
}

/// The known spelling that is nearest to `name`, if one is near.
pub(super) fn nearest(name: &str) -> Option<&'static str> {
    nearest_of(name, spellings())
}

/// All names of keys, and their aliases.
pub(super) fn spellings() -> impl Iterator<Item = &'static str> {
    KEYS.iter()
        .flat_map(|key| std::iter::once(&key.name).chain(key.aliases))
        .copied()
}

/// The word that is nearest to `name`, if one is near: one slip, or one in three letters.
pub(super) fn nearest_of(name: &str, words: impl Iterator<Item = &'static str>) -> Option<&'static str> {
    let near = words.map(|known| (strsim::damerau_levenshtein(name, known), known));
    // Of equally near ones the first: `min_by_key` keeps it.
    let (distance, known) = near.min_by_key(|(distance, _)| *distance)?;
    let shorter = name.chars().count().min(known.len());
    // A name of two letters is near to every other one, so it must share half.
    (distance <= (shorter / 3).max(1) && distance < shorter).then_some(known)
}

/// A kind of words that all work where their key does.
const fn one_of(words: &'static [&'static str]) -> Kind {
    Kind::OneOf { words, later: &[] }
}

/// Every key of every back end. An order within a group is the order of the help.
#[rustfmt::skip] // a table
pub(super) static KEYS: &[Key] = &[
    Key::local("name", Group::Every, Kind::Text, "file name in the mount (default: the source's, with .raw)",
        |s, v| { values::file_name(v)?; s.name = Some(v.to_owned()); Ok(()) }).scope(Scope::OneDisk),
    Key::local("readonly", Group::Every, Kind::Bool, "this disk read-only",
        |s, v| { s.read_only = Some(values::boolean(v)?); Ok(()) }),
    Key::local("cache", Group::Every, one_of(&["none", "writethrough", "writeback"]), "what the kernel's page cache does",
        |s, v| { s.cache = values::page_cache(v); Ok(()) }),
    Key::local("cache-size", Group::Every, Kind::Size, "RAM for blocks of this disk",
        |s, v| { s.cache_size = Some(values::size(v)?); Ok(()) }),
    Key::local("readahead", Group::Every, Kind::Size, "upper bound of read-ahead",
        |s, v| { s.readahead = Some(values::size(v)?); Ok(()) }),
    Key::local("backend", Group::Every, Kind::OneOf { words: &["native", "nbd"], later: &["vddk", "https"] },
        "force the way to the disk",
        |s, v| { s.backend = Some(if v == "nbd" { Backend::Nbd } else { Backend::Native }); Ok(()) }),
    Key::local("cow", Group::Every, Kind::PathOr(writing::TEMPORARY), "writes go to this overlay, a VMDK that is made where there is none (tmp: \
        thrown away at the end); the disk itself is only read",
        |s, v| { s.overlay = Some(writing::overlay(v)?); Ok(()) }),
    Key::later("cache-dir", Group::Every, Kind::Path, "keep fetched blocks there across mounts"),
    Key::local("timeout", Group::Every, Kind::Seconds, "deadline after which a request of an NBD server fails (default: 30)",
        |s, v| { s.nbd.timeout = Some(nbd::timeout(v)?); Ok(()) }),
    Key::local("retry", Group::Every, Kind::Count, "how often to try again to connect to an NBD server",
        |s, v| { s.nbd.retry = Some(nbd::retry(v)?); Ok(()) }),

    Key::local("file", Group::Local, Kind::Path, "a disk (wildcards * ? [ make several); starts another disk",
        |s, v| { s.source = Some(SourceSpec::File(values::path(v)?)); Ok(()) }).scope(Scope::Starts),
    Key::local("dir", Group::Local, Kind::Path, "all disks of a folder: its *.vmdk that are no bare extents",
        |s, v| { s.source = Some(SourceSpec::Dir(values::path(v)?)); Ok(()) }).scope(Scope::Starts),
    Key::local("format", Group::Local, one_of(&["vmdk", "raw"]), "how to read it (default: by its content)",
        |s, v| { s.format = Some(if v == "raw" { Format::Raw } else { Format::Vmdk }); Ok(()) }),
    Key::local("allow-dir", Group::Local, Kind::Path, "names in an image may point in there too",
        |s, v| { s.allow_dirs.push(values::path(v)?); Ok(()) }).repeats(),
    Key::local("degraded", Group::Local, one_of(&["cid"]), "accept a parent whose CID differs",
        |s, _| { s.accept_cid_mismatch = Some(true); Ok(()) }),
    Key::local("force", Group::Local, Kind::Bool, "write to a disk although a snapshot is based on it",
        |s, v| { s.force = Some(values::boolean(v)?); Ok(()) }),
    Key::local("lock", Group::Local, one_of(&["on", "off"]), "keep writers out of the image's files (default: on)",
        |s, v| { s.lock = Some(v == "on"); Ok(()) }),
    Key::local("kernel-view", Group::Local, one_of(&["auto", "off", "required"]), "let the kernel read the files itself",
        |s, v| {
            s.view = Some(match v.to_str() {
                Some("off") => KernelView::Off,
                Some("required") => KernelView::Required,
                _ => KernelView::Auto,
            });
            Ok(())
        }),
    Key::local("view-size", Group::Local, Kind::Size, "memory for what tells it where the data lie (default: 256M)",
        |s, v| { s.view_size = Some(values::size(v)?); Ok(()) }),
    Key::local("view-dir", Group::Local, Kind::Path, "folder for it, on a disk's file system (default: in memory)",
        |s, v| { s.view_dir = Some(values::path(v)?); Ok(()) }),

    Key::later("server", Group::VMware, Kind::Text, "ESXi or vCenter host"),
    Key::local("port", Group::Nbd, Kind::Named("PORT"), "its port: a number, or a service (default: 10809)",
        |s, v| { s.nbd.port = Some(nbd::port(v)?); Ok(()) }),
    Key::later("user", Group::VMware, Kind::Text, "who logs in"),
    Key::later("password", Group::VMware, Kind::Text, "`-` asks, `+FILE` and `-FD` read it"),
    Key::later("cookie", Group::VMware, Kind::Text, "session cookie"),
    Key::later("thumbprint", Group::VMware, Kind::Text, "fingerprint of the server's certificate"),
    Key::later("datacenter", Group::VMware, Kind::Text, "datacenter of the datastore"),
    Key::later("cainfo", Group::VMware, Kind::Path, "certificates to trust"),
    Key::later("insecure", Group::VMware, Kind::Bool, "do not verify the server"),
    Key::later("cookie-script", Group::VMware, Kind::Path, "program that prints a cookie"),
    Key::later("cookie-script-renew", Group::VMware, Kind::Seconds, "how often to run it"),
    Key::later("url", Group::VMware, Kind::Text, "a disk by HTTPS; starts another disk").scope(Scope::Starts),

    Key::later("libdir", Group::Vddk, Kind::Path, "folder of VMware's library"),
    Key::later("config", Group::Vddk, Kind::Path, "the library's own configuration"),
    Key::later("vm", Group::Vddk, Kind::Text, "the virtual machine (moref=ID)"),
    Key::later("snapshot", Group::Vddk, Kind::Text, "its snapshot"),
    Key::later("transports", Group::Vddk, Kind::Text, "ways to the disk, in order"),
    Key::later("nfchostport", Group::Vddk, Kind::Count, "port of the NFC service"),
    Key::later("single-link", Group::Vddk, Kind::Bool, "only this link of the chain"),
    Key::later("unbuffered", Group::Vddk, Kind::Bool, "no caching by the library"),
    Key::later("compression", Group::Vddk, one_of(&["none", "zlib", "fastlz", "skipz"]), "of the transport"),
    Key::later("vimapiver", Group::Vddk, Kind::Text, "ignored"),

    Key::local("create", Group::Create, Kind::Bool, "make file= first: a VMDK with nothing in it",
        |s, v| { s.creation.disk_args_given = Some(values::boolean(v)?); Ok(()) }),
    Key::local("create-size", Group::Create, Kind::Size, "its size, whole sectors of 512 bytes",
        |s, v| { s.creation.size = Some(writing::size(v)?); Ok(()) }),
    Key::local("create-type", Group::Create, Kind::Text, "monolithic-sparse (the default), monolithic-flat, split-sparse, split-flat, \
        vmfs-flat, vmfs-thin, stream-optimized (written once, from start to end)",
        |s, v| { s.creation.kind = Some(writing::create_type(v)?); Ok(()) }),
    Key::local("create-adapter-type", Group::Create, Kind::Text, "lsilogic (the default), buslogic, ide, legacyESX, pvscsi",
        |s, v| { s.creation.adapter = Some(writing::adapter(v)?); Ok(()) }),
    Key::local("create-hwversion", Group::Create, Kind::Named("VERSION"), "its hardware version: a number (default: 4), or a product: workstation5, \
        esx50, esx65 and the like",
        |s, v| { s.creation.hardware_version = Some(writing::hardware_version(v)?); Ok(()) }),

    Key::later("partitions", Group::Views, Kind::Bool, "one file for each partition as well"),
    Key::later("descriptor", Group::Views, Kind::Bool, "a .vmdk that describes the raw file"),

    Key::local("uri", Group::Nbd, Kind::Text, "nbd://, nbds://, nbd+unix://, nbds+unix:// or nbd+vsock://; starts another disk",
        |s, v| { s.source = Some(SourceSpec::Nbd(nbd::uri(v)?)); Ok(()) }).scope(Scope::Starts),
    Key::local("hostname", Group::Nbd, Kind::Text, "its host",
        |s, v| { s.nbd.hostname = Some(nbd::hostname(v)?); Ok(()) }),
    Key::local("socket", Group::Nbd, Kind::Path, "its Unix socket",
        |s, v| { s.nbd.socket = Some(values::path(v)?); Ok(()) }),
    Key::local("socket-fd", Group::Nbd, Kind::Count, "a connected socket that is handed over",
        |s, v| { s.nbd.socket_fd = Some(nbd::socket_fd(v)?); Ok(()) }),
    Key::local("vsock-cid", Group::Nbd, Kind::Count, "its VSOCK address",
        |s, v| { s.nbd.vsock_cid = Some(nbd::vsock_cid(v)?); Ok(()) }).alias(&["vhost-cid"]),
    Key::local("command", Group::Nbd, Kind::Text, "program to run as the server, by socket activation; it ends with the mount",
        |s, v| { s.nbd.command = Some(nbd::word(v)?); Ok(()) }),
    Key::local("arg", Group::Nbd, Kind::Text, "an argument for it",
        |s, v| { s.nbd.args.push(nbd::word(v)?); Ok(()) }).repeats(),
    Key::local("export", Group::Nbd, Kind::Text, "name of the export",
        |s, v| { s.nbd.export = Some(nbd::export(v)?); Ok(()) }),
    Key::local("dynamic-export", Group::Nbd, Kind::Bool, "every export of the server is a file",
        |s, v| { s.nbd.dynamic = Some(values::boolean(v)?); Ok(()) }),
    Key::local("connections", Group::Nbd, Kind::Count, "connections to it, where it takes several (default: 4)",
        |s, v| { s.nbd.connections = Some(nbd::connections(v)?); Ok(()) }),
    Key::local("shared", Group::Nbd, Kind::Bool, "one connection for all",
        |s, v| { s.nbd.shared = Some(values::boolean(v)?); Ok(()) }),
    Key::local("tls", Group::Nbd, one_of(&["off", "on", "require"]), "encrypt: never, where it can, always",
        |s, v| { s.nbd.tls = Some(nbd::tls(v)); Ok(()) }),
    Key::local("tls-certificates", Group::Nbd, Kind::Path, "folder of certificates",
        |s, v| { s.nbd.tls_certificates = Some(values::path(v)?); Ok(()) }),
    Key::local("tls-verify", Group::Nbd, Kind::Bool, "verify the server (default: true)",
        |s, v| { s.nbd.tls_verify = Some(values::boolean(v)?); Ok(()) }),
    Key::local("tls-username", Group::Nbd, Kind::Text, "user of the key",
        |s, v| { s.nbd.tls_username = Some(values::text(v)?.to_owned()); Ok(()) }),
    Key::local("tls-psk", Group::Nbd, Kind::Path, "file of pre-shared keys",
        |s, v| { s.nbd.tls_psk = Some(values::path(v)?); Ok(()) }),
];

#[cfg(test)]
mod tests;
