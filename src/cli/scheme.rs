//! URI schemes: those that a source can have, and a way to go on for all others.

use std::ffi::OsStr;
use std::path::PathBuf;

use super::values::Value;

/// Schemes of NBD URIs, which the key `uri=` takes.
pub(super) const NBD: [&str; 6] = [
    "nbd://",
    "nbds://",
    "nbd+unix://",
    "nbds+unix://",
    "nbd+vsock://",
    "nbds+vsock://",
];

/// Schemes of the key `url=`.
pub(super) const WEB: [&str; 2] = ["https://", "http://"];

/// Schemes that are recognised before a `:` alone, where the text could also be a file name with a `:` in it.
const KNOWN: [&str; 24] = [
    "nbd", "nbds", "ssh", "sftp", "scp", "http", "https", "ftp", "ftps", "file", "iscsi", "iser", "rbd", "ceph",
    "gluster", "nfs", "smb", "cifs", "s3", "gs", "rsync", "vpx", "esx", "json",
];

/// Parses the value of `file=`. Errors: it is empty, or it is a URI.
pub(super) fn file(value: &Value<'_>) -> Result<PathBuf, String> {
    let path = value.path()?;
    match of(value) {
        // A file whose name looks like a URI is one.
        Some(scheme) if path.symlink_metadata().is_err() => Err(refusal(scheme)),
        _ => Ok(path),
    }
}

/// Returns why a source of this scheme cannot be opened, and what to do instead. The address is left out: it
/// may contain a password.
pub(super) fn refusal(scheme: &str) -> String {
    let lower = scheme.to_ascii_lowercase();
    let (family, transport) = lower.split_once('+').unwrap_or((&lower, ""));
    let way_on = match family {
        "nbd" | "nbds" if transport.is_empty() || matches!(transport, "unix" | "vsock") => {
            return format!(
                "a {scheme}: address needs two slashes: {family}://HOST:PORT/EXPORT, or \
                 {family}+unix:///EXPORT?socket=PATH"
            );
        }
        "nbd" | "nbds" => {
            "NBD has the transports TCP, Unix socket and VSOCK (nbd://, nbd+unix://, nbd+vsock://): for another one \
             forward its port first, as with ssh -L 10809:localhost:10809 HOST, and give nbd://localhost"
        }
        "ssh" | "sftp" | "scp" => "serve it by nbdkit: command=nbdkit arg=ssh arg=host=HOST arg=path=PATH",
        "http" | "https" => "give it as url=ADDRESS",
        "ftp" | "ftps" => "serve it by nbdkit: command=nbdkit arg=--readonly arg=curl arg=url=ADDRESS",
        "file" => "give the path alone: file=/PATH",
        _ => "serve it by a program that speaks NBD, such as command=qemu-nbd arg=-r arg=ADDRESS",
    };
    format!("the scheme {scheme}: is not supported (a source is a path or an NBD address, nbd://…); {way_on}")
}

/// Returns the scheme of a value that looks like a URI: `SCHEME://…`, or `SCHEME:…` with a scheme that is known.
pub(super) fn of(value: &OsStr) -> Option<&str> {
    let bytes = value.as_encoded_bytes();
    let (scheme, rest) = bytes.split_at(bytes.iter().position(|b| *b == b':')?);
    let scheme = std::str::from_utf8(scheme).ok()?;
    let is_scheme = scheme.starts_with(|c: char| c.is_ascii_alphabetic())
        && scheme
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'+' | b'-' | b'.'));
    let family = scheme.split('+').next().unwrap_or(scheme);
    let is_known = KNOWN.iter().any(|known| known.eq_ignore_ascii_case(family));
    (is_scheme && (is_known || rest.starts_with(b"://"))).then_some(scheme)
}

/// Returns true if a value holds a URI with user information, which may be a password.
pub(super) fn has_login(value: &OsStr) -> bool {
    let text = value.to_string_lossy();
    text.split_once("://").is_some_and(|(_, rest)| rest.contains('@'))
}

/// Returns true if `value` starts with one of `schemes`, in any case.
pub(super) fn is_one_of(schemes: &[&str], value: &OsStr) -> bool {
    let bytes = value.as_encoded_bytes();
    schemes.iter().any(|scheme| {
        bytes
            .get(..scheme.len())
            .is_some_and(|head| head.eq_ignore_ascii_case(scheme.as_bytes()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_with_a_scheme_is_not_a_path() {
        for (value, expected) in [
            ("ssh://host/disk.img", "arg=ssh"),
            ("sftp:host", "arg=ssh"),
            ("nbd:localhost:10809", "nbd://HOST:PORT"),
            ("nbd:unix:/run/s:exportname=x", "nbd+unix:///"),
            ("nbd+ssh://host/x", "ssh -L"),
            ("http:/host/x", "url=ADDRESS"),
            ("FTP://host/x", "arg=curl"),
            ("file:///srv/x.vmdk", "file=/PATH"),
            ("iscsi://host/iqn/0", "qemu-nbd"),
            ("what-ever://x", "the scheme what-ever:"),
            ("rbd:pool/image", "qemu-nbd"),
        ] {
            let message = file(&Value::here(OsStr::new(value))).unwrap_err();
            assert!(message.contains(expected), "{value}: {message}");
            assert!(!message.contains('\n'), "{value}");
        }
    }

    #[test]
    fn a_path_with_a_colon_stays_a_path() {
        for value in [
            "/a:b",
            "a:b.vmdk",
            "./ssh://x",
            "C:/x.vmdk",
            "[ds] a:b/c.vmdk",
            "1nbd://x",
            "a b://c",
            ":x",
        ] {
            assert!(file(&Value::here(OsStr::new(value))).is_ok(), "{value}");
        }
    }
}
