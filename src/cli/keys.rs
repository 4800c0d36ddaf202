//! Table of all keys of disks. Parsing, `--help`, the manual and "did you mean" are derived from it.
//!
//! To add the back end of a key that is not in this build, give its row a function; nothing else changes here.

use super::key::{Choice, Group, Scope, ValueKind};
use super::settings::{Backend, DiskKey, SourceSpec};
use super::values::{self, FileName};
use super::{create_args, https, login, nbd, overlay_args, scheme, server_args, vddk};
use crate::config::{Format, KernelView, NbdAddress, Secret};

/// Returns the key with this name or alias.
pub(super) fn find(name: &str) -> Option<&'static DiskKey> {
    KEYS.iter().find(|key| key.name == name || key.aliases.contains(&name))
}

/// Returns the keys of a group that work in this build, in the order of the table.
pub(super) fn ready(group: Group) -> impl Iterator<Item = &'static DiskKey> {
    KEYS.iter().filter(move |key| key.group == group && key.is_ready())
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

/// All keys of all back ends. Within a group, the help lists them in this order.
#[rustfmt::skip] // a table
pub(super) static KEYS: &[DiskKey] = &[
    DiskKey::ready("name", Group::Every, ValueKind::Text, "file name in the mount (default: the name of the source with .raw)",
        |s, v| { values::file_name(v)?; s.name = Some(v.text.to_owned()); Ok(()) }).scope(Scope::OneDisk),
    DiskKey::ready("readonly", Group::Every, ValueKind::Bool, "open this disk read-only (default: false)",
        |s, v| { s.read_only = values::boolean(v)?; Ok(()) }),
    DiskKey::ready("cache", Group::Every, ValueKind::one_of(&["none", "writethrough", "writeback"]), "mode of the kernel's page cache; writeback means writethrough (default: writethrough)",
        |s, v| { s.cache = values::page_cache(v); Ok(()) }),
    DiskKey::ready("cache-size", Group::Every, ValueKind::Size, "RAM for cached blocks of this disk, if they are compressed or remote (default: 32M, on a web server 64M)",
        |s, v| { s.cache_size = Some(values::size(v)?); Ok(()) }),
    DiskKey::ready("readahead", Group::Every, ValueKind::Size, "upper limit of read-ahead (default: by the distance of the source; on a web server 40M)",
        |s, v| { s.readahead = Some(values::size(v)?); Ok(()) }),
    DiskKey::ready("backend", Group::Every, ValueKind::one_of(&["native", "nbd", "https", "vddk"]),
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
    DiskKey::ready("cow", Group::Every, ValueKind::PathOr(overlay_args::TEMPORARY), "write to this overlay, a VMDK that is created if missing (tmp: a temporary \
        one, discarded at unmount); the disk itself is only read",
        |s, v| { s.overlay = Some(overlay_args::overlay(v)?); Ok(()) }),
    DiskKey::ready("cache-dir", Group::Every, ValueKind::Path, "folder that keeps fetched blocks across mounts: of disks on web servers, and of snapshots that VDDK opens (snapshot= and -r)",
        |s, v| { s.cache_dir = Some(v.path()?); Ok(()) }),
    DiskKey::ready("cache-dir-size", Group::Every, ValueKind::Size, "size limit of that folder; the least recently used files are removed",
        |s, v| { s.cache_dir_size = Some(values::size(v)?); Ok(()) }),
    DiskKey::ready("timeout", Group::Every, ValueKind::Seconds, "deadline after which a request to a server fails, 1 to 1800 (default: 30 for NBD, 60 for HTTPS, \
        2000 for a vCenter)",
        |s, v| { s.server.timeout = Some(server_args::timeout(v)?); Ok(()) }),
    DiskKey::ready("retry", Group::Every, ValueKind::Count, "how often to retry, 0 to 1000000: to connect to an NBD server, or a request to a web server (default: not at the start, then until timeout=)",
        |s, v| { s.server.retry = Some(server_args::retry(v)?); Ok(()) }),

    DiskKey::ready("limit", Group::Every, ValueKind::Count, "how many ranges --map lists for a disk (default: 1000000; 0: all)",
        |s, v| { s.map_limit = Some(values::number(v, 0, u32::MAX)?.into()); Ok(()) }),

    DiskKey::ready("file", Group::Local, ValueKind::Path, "file of a disk (wildcards * ? [ match several); starts another disk",
        |s, v| { s.source = Some(SourceSpec::File(FileName::of(v, scheme::file(v)?))); Ok(()) }).scope(Scope::Starts).also(&[Group::VMware, Group::Vddk]),
    DiskKey::ready("dir", Group::Local, ValueKind::Path, "all disks of a folder: its *.vmdk files except bare extents; starts another disk",
        |s, v| { s.source = Some(SourceSpec::Dir(v.path()?)); Ok(()) }).scope(Scope::Starts),
    DiskKey::ready("format", Group::Local, ValueKind::one_of(&["vmdk", "raw"]), "format of the file (default: by its name)",
        |s, v| { s.image.format = if v.text == "raw" { Format::Raw } else { Format::Vmdk }; Ok(()) }).also(&[Group::VMware]),
    DiskKey::ready("allow-dir", Group::Local, ValueKind::Path, "another folder that file names inside an image may point into",
        |s, v| { s.image.allow_dirs.push(v.path()?); Ok(()) }).repeats(),
    DiskKey::ready("extents", Group::Local, ValueKind::one_of(&["any", "self"]), "files that an image may name; self: none, only single-file images open (default: any)",
        |s, v| { s.image.single_file = v.text == "self"; Ok(()) }),
    DiskKey::ready("degraded", Group::Local, ValueKind::one_of(&["cid", "orphan", "short"]), "accept a parent whose CID differs, a snapshot without its parent, or a \
        flat extent that is too short; what is missing cannot be read",
        |s, v| {
            match v.to_str() {
                Some("orphan") => s.image.degraded.orphan = true,
                Some("short") => s.image.degraded.short = true,
                _ => s.image.degraded.cid = true,
            }
            Ok(())
        }).repeats().also(&[Group::VMware]),
    DiskKey::ready("parent", Group::Local, ValueKind::Path, "parent of the oldest link that is found",
        |s, v| { s.parent = Some(FileName::of(v, v.path()?)); Ok(()) }).scope(Scope::OneDisk).also(&[Group::VMware]),
    DiskKey::ready("member", Group::Local, ValueKind::Text, "the disk to show of a package (OVA) (default: all of them; of a web server the only one)",
        |s, v| { s.image.member = Some(values::text(v)?.to_owned()); Ok(()) }).scope(Scope::OneDisk).also(&[Group::VMware]),
    DiskKey::ready("force", Group::Local, ValueKind::Bool, "write to a disk even if a snapshot is based on it (default: false)",
        |s, v| { s.image.force = values::boolean(v)?; Ok(()) }),
    DiskKey::ready("lock", Group::Local, ValueKind::one_of(&["on", "off"]), "lock the image's files against other writers (default: on)",
        |s, v| { s.image.lock = v.text == "on"; Ok(()) }),
    DiskKey::ready("kernel-view", Group::Local, ValueKind::one_of(&["auto", "off", "required"]), "let the kernel read the image's files without the daemon (default: auto)",
        |s, v| {
            s.image.view.mode = match v.to_str() {
                Some("off") => KernelView::Off,
                Some("required") => KernelView::Required,
                _ => KernelView::Auto,
            };
            Ok(())
        }),
    DiskKey::ready("view-size", Group::Local, ValueKind::Size, "size limit of the kernel view's index (default: 256M)",
        |s, v| { s.image.view.size = values::size(v)?; Ok(()) }),
    DiskKey::ready("view-dir", Group::Local, ValueKind::Path, "folder for the index, on a disk's file system (default: in memory)",
        |s, v| { s.image.view.dir = Some(v.path()?); Ok(()) }),

    DiskKey::ready("server", Group::VMware, ValueKind::Text, "ESXi or vCenter host, for file=\"[datastore] folder/disk.vmdk\"",
        |s, v| { s.server.host = Some(values::host(v)?); Ok(()) }).also(&[Group::Vddk]),
    DiskKey::ready("port", Group::Nbd, ValueKind::Named("PORT"), "port of the server: a number or a service name (default: 10809 for NBD, 443 for HTTPS)",
        |s, v| { s.server.port = Some(server_args::port(v)?); Ok(()) }).also(&[Group::VMware, Group::Vddk]),
    DiskKey::ready("user", Group::VMware, ValueKind::Text, "user name for the login",
        |s, v| { s.login.user = Some(values::text(v)?.to_owned()); Ok(()) }).alias(&["username"]).also(&[Group::Vddk]),
    DiskKey::ready("password", Group::VMware, ValueKind::Text, "password; `-` prompts, `+FILE` and `-FD` read it",
        |s, v| { s.login.password = Some(login::password(v)?); Ok(()) }).secret().also(&[Group::Vddk]),
    DiskKey::ready("cookie", Group::VMware, ValueKind::Text, "session cookie to send in place of a login",
        |s, v| { s.login.cookie = Some(Secret::new(values::text(v)?)); Ok(()) }).secret().also(&[Group::Vddk]),
    DiskKey::ready("thumbprint", Group::VMware, ValueKind::Text, "SHA-1 or SHA-256 of the server's certificate, which is then trusted",
        |s, v| {
            s.https.thumbprint = Some(https::thumbprint(v)?);
            s.vddk.thumbprint = Some(values::text(v)?.to_owned());
            Ok(())
        }).choice(Choice::Trust).also(&[Group::Vddk]),
    DiskKey::ready("datacenter", Group::VMware, ValueKind::Text, "inventory path of the datastore's datacenter on a vCenter",
        |s, v| { s.https.datacenter = Some(values::text(v)?.to_owned()); Ok(()) }),
    DiskKey::ready("cainfo", Group::VMware, ValueKind::Path, "file of trusted certificates, PEM (default: those of the system)",
        |s, v| { s.https.cainfo = Some(v.path()?); Ok(()) }).choice(Choice::Trust),
    DiskKey::ready("insecure", Group::VMware, ValueKind::Bool, "accept any certificate of the server (default: false)",
        |s, v| { s.https.insecure = values::boolean(v)?; Ok(()) }).choice(Choice::Trust),
    DiskKey::ready("cookie-script", Group::VMware, ValueKind::Text, "shell command that prints the cookie to send, with $url and $iteration (its runs so far)",
        |s, v| { s.https.cookie_script = Some(Secret::new(values::text(v)?)); Ok(()) }).secret(),
    DiskKey::ready("cookie-script-renew", Group::VMware, ValueKind::Seconds, "interval at which to run it again (default: when the cookie has expired)",
        |s, v| { s.https.cookie_renew = Some(https::renewal(v)?).filter(|time| !time.is_zero()); Ok(()) }),
    DiskKey::ready("credentials", Group::VMware, ValueKind::Path, "file of lines username=, password= and cookie=, which only its owner can read",
        |s, v| { s.login.credentials = Some(login::credentials(v)?); Ok(()) }).also(&[Group::Vddk]),
    DiskKey::ready("http-version", Group::VMware, ValueKind::one_of(&["1.1", "2"]), "version of HTTP (default: 1.1; 2 where the server has it)",
        |s, v| { s.https.http.http2 = v.text == "2"; Ok(()) }),
    DiskKey::ready("header", Group::VMware, ValueKind::Text, "NAME: VALUE, a header that is added to every request",
        |s, v| { s.https.http.headers.push(https::header(v)?); Ok(()) }).repeats().secret(),
    DiskKey::ready("proxy", Group::VMware, ValueKind::Text, "http:// address of a proxy (default: none, whatever the environment says)",
        |s, v| { s.https.http.proxy = Some(https::proxy(v)?); Ok(()) }).secret(),
    DiskKey::ready("resolve", Group::VMware, ValueKind::Text, "HOST:ADDRESS, an address to use instead of a name lookup",
        |s, v| { s.https.http.resolve.push(https::resolve(v)?); Ok(()) }).repeats(),
    DiskKey::ready("url", Group::VMware, ValueKind::Text, "https:// or http:// address of a disk; starts another disk",
        |s, v| { s.source = Some(SourceSpec::Url(https::url(v)?)); Ok(()) }).scope(Scope::Starts).secret(),

    DiskKey::ready("libdir", Group::Vddk, ValueKind::Path, "folder of VMware's VDDK, which then opens the disk (default with backend=vddk: \
        /usr/lib/vmware-vix-disklib, then the dynamic linker's search)",
        |s, v| { s.vddk.disk.library.libdir = Some(v.path()?); Ok(()) }),
    DiskKey::ready("config", Group::Vddk, ValueKind::Path, "the library's own configuration file (default: a private one with larger buffers)",
        |s, v| { s.vddk.disk.library.config = Some(v.path()?); Ok(()) }),
    DiskKey::ready("vm", Group::Vddk, ValueKind::Text, "moref=ID of the virtual machine; a disk of a server needs server=, user=, password= and vm=",
        |s, v| { s.vddk.vm = Some(values::text(v)?.to_owned()); Ok(()) }).choice(Choice::Owner),
    DiskKey::ready("snapshot", Group::Vddk, ValueKind::Text, "managed object reference of a snapshot of the virtual machine",
        |s, v| { s.vddk.snapshot = Some(values::text(v)?.to_owned()); Ok(()) }),
    DiskKey::ready("transports", Group::Vddk, ValueKind::Text, "transport modes in the order to try them (default: file:nbdssl:nbd)",
        |s, v| { s.vddk.disk.transports = Some(values::text(v)?.to_owned()); Ok(()) }),
    DiskKey::ready("nfchostport", Group::Vddk, ValueKind::Count, "port of the NFC service (default: that of the library, 902)",
        |s, v| { s.vddk.nfc_host_port = Some(values::number(v, 1, u16::MAX.into())?); Ok(()) }),
    DiskKey::ready("single-link", Group::Vddk, ValueKind::Bool, "open only this link of the chain",
        |s, v| { s.vddk.disk.single_link = values::boolean(v)?; Ok(()) }),
    DiskKey::ready("unbuffered", Group::Vddk, ValueKind::Bool, "no caching by the library",
        |s, v| { s.vddk.disk.unbuffered = values::boolean(v)?; Ok(()) }),
    DiskKey::ready("compression", Group::Vddk, ValueKind::one_of(&["none", "zlib", "fastlz", "skipz"]), "compression of the transport",
        |s, v| { s.vddk.disk.compression = vddk::compression(v); Ok(()) }),
    DiskKey::ready("vimapiver", Group::Vddk, ValueKind::Text, "ignored", |_, v| values::text(v).map(drop)),
    DiskKey::ready("datastore", Group::Vddk, ValueKind::Text, "moref=ID of the datastore of a disk without a virtual machine (VDDK 8.0.1 or newer)",
        |s, v| { s.vddk.datastore = Some(vddk::datastore(v)?); Ok(()) }).choice(Choice::Owner),
    DiskKey::ready("prepare-for-access", Group::Vddk, ValueKind::Bool, "forbid migration of the virtual machine meanwhile (needs a vCenter)",
        |s, v| { s.vddk.prepare_for_access = values::boolean(v)?; Ok(()) }),

    DiskKey::ready("create", Group::Create, ValueKind::Bool, "create file= first, as an empty VMDK (default: false)",
        |s, v| { s.creation.create = Some(values::boolean(v)?); Ok(()) }),
    DiskKey::ready("create-size", Group::Create, ValueKind::Size, "size of the created disk, a multiple of 512",
        |s, v| { s.creation.size = Some(create_args::size(v)?); Ok(()) }),
    DiskKey::ready("create-type", Group::Create, ValueKind::Known(&["monolithic-sparse", "monolithic-flat", "split-sparse", "split-flat", "vmfs-flat", "vmfs-thin", "stream-optimized"]),
        "stream-optimized is written once, in order (default: monolithic-sparse)",
        |s, v| { s.creation.kind = Some(create_args::create_type(v)?); Ok(()) }),
    DiskKey::ready("create-adapter-type", Group::Create, ValueKind::Known(&["lsilogic", "buslogic", "ide", "legacyESX", "pvscsi"]),
        "controller that the descriptor names (default: lsilogic)",
        |s, v| { s.creation.adapter = Some(create_args::adapter(v)?); Ok(()) }),
    DiskKey::ready("create-hwversion", Group::Create, ValueKind::Named("VERSION"), "hardware version of the created disk: a number, or a product such \
        as workstation5, esx50 or esx65 (default: 4)",
        |s, v| { s.creation.hardware_version = Some(create_args::hardware_version(v)?); Ok(()) }),

    DiskKey::later("partitions", Group::Views, ValueKind::Bool, "also show each partition as a file"),
    DiskKey::later("descriptor", Group::Views, ValueKind::Bool, "also show a .vmdk that describes the raw file"),

    DiskKey::ready("uri", Group::Nbd, ValueKind::Text, "nbd://, nbds://, nbd+unix://, nbds+unix:// or nbd+vsock:// address; starts another disk",
        |s, v| { s.source = Some(SourceSpec::Nbd(nbd::uri(v)?)); Ok(()) }).scope(Scope::Starts).choice(Choice::Address { has_port: false }),
    DiskKey::ready("hostname", Group::Nbd, ValueKind::Text, "host name of the server",
        |s, v| s.nbd.address("hostname", NbdAddress::Tcp { host: values::host(v)?, port: None })).choice(Choice::Address { has_port: true }),
    DiskKey::ready("socket", Group::Nbd, ValueKind::Path, "Unix socket of the server",
        |s, v| s.nbd.address("socket", NbdAddress::Unix(v.path()?))).choice(Choice::Address { has_port: false }),
    DiskKey::ready("socket-fd", Group::Nbd, ValueKind::Count, "file descriptor of a connected socket, 3 or higher",
        |s, v| s.nbd.address("socket-fd", NbdAddress::Fd(nbd::socket_fd(v)?))).choice(Choice::Address { has_port: false }),
    DiskKey::ready("vsock-cid", Group::Nbd, ValueKind::Count, "VSOCK address (CID) of the server",
        |s, v| s.nbd.address("vsock-cid", NbdAddress::Vsock { cid: nbd::vsock_cid(v)?, port: None })).choice(Choice::Address { has_port: true }).alias(&["vhost-cid"]),
    DiskKey::ready("command", Group::Nbd, ValueKind::Text, "program to start as the server, by socket activation; it ends with the mount",
        |s, v| s.nbd.address("command", NbdAddress::Command(vec![nbd::command(v)?]))).choice(Choice::Address { has_port: false }),
    DiskKey::ready("arg", Group::Nbd, ValueKind::Text, "an argument for command=",
        |s, v| { s.nbd.args.push(nbd::word(v)?); Ok(()) }).repeats(),
    DiskKey::ready("export", Group::Nbd, ValueKind::Text, "name of the export (default: the server's default export)",
        |s, v| { s.nbd.export = Some(nbd::export(v)?); Ok(()) }).also(&[Group::Vddk]),
    DiskKey::ready("dynamic-export", Group::Nbd, ValueKind::Bool, "show every export of the server as a file (default: false)",
        |s, v| { s.nbd.dynamic = values::boolean(v)?; Ok(()) }),
    DiskKey::ready("connections", Group::Nbd, ValueKind::Count, "number of connections, 1 to 16, if the server allows several (default: 4 for NBD, 8 for HTTPS)",
        |s, v| { s.server.connections = Some(server_args::connections(v)?); Ok(()) }).also(&[Group::VMware]),
    DiskKey::ready("shared", Group::Nbd, ValueKind::Bool, "use one connection only (default: false)",
        |s, v| { s.nbd.shared = values::boolean(v)?; Ok(()) }),
    DiskKey::ready("tls", Group::Nbd, ValueKind::one_of(&["off", "on", "require"]), "encrypt never, if the server supports it, or always (default: off; require with nbds:// or another tls key)",
        |s, v| { s.nbd.tls = Some(nbd::tls(v)); Ok(()) }),
    DiskKey::ready("tls-certificates", Group::Nbd, ValueKind::Path, "folder of certificates (default: that of libnbd, or the system's)",
        |s, v| { s.nbd.tls_certificates = Some(v.path()?); Ok(()) }),
    DiskKey::ready("tls-verify", Group::Nbd, ValueKind::Bool, "verify the server's certificate (default: true)",
        |s, v| { s.nbd.tls_verify = Some(values::boolean(v)?); Ok(()) }),
    DiskKey::ready("tls-username", Group::Nbd, ValueKind::Text, "user name of the pre-shared key",
        |s, v| { s.nbd.tls_username = Some(values::text(v)?.to_owned()); Ok(()) }),
    DiskKey::ready("tls-psk", Group::Nbd, ValueKind::Path, "file of pre-shared keys",
        |s, v| { s.nbd.tls_psk = Some(v.path()?); Ok(()) }),
];

#[cfg(test)]
mod tests;
