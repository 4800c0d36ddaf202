//! Expansion of `file=` patterns and `dir=` folders to files, and default file names in the mount.
//!
//! Wildcards also match names that are not UTF-8. The directory walk of the `glob` crate silently skips those names, so
//! the walk is implemented here; the crate only matches single path components.

use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, ErrorKind, Read};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use glob::{MatchOptions, Pattern};

use super::UsageError;
use crate::config::{NbdAddress, NbdConfig};
use crate::source::nbd_uri;
use crate::store::{Access, OpenPolicy, open_user_path, package};
use crate::vmdk::descriptor::Descriptor;

/// Matches as a shell does: `*` does not match names that start with a dot.
const LIKE_A_SHELL: MatchOptions = MatchOptions {
    case_sensitive: true,
    require_literal_separator: true,
    require_literal_leading_dot: true,
};

/// Start of a block of private-use code points. A byte that is not part of valid UTF-8 maps to this plus its value.
const NO_UTF8: u32 = 0xF700;

/// Bytes of a file that are read to detect a descriptor. Comments and blank lines may precede the first setting of a
/// descriptor, and known writers put only a few lines there.
const PROBE_BYTES: u64 = 4096;

/// Bytes of a descriptor that are read to find its extents: ten thousand of them.
const MAX_DESCRIPTOR: u64 = 1 << 20;

/// Byte range of the embedded descriptor's sector number in a hosted sparse header.
const DESCRIPTOR_OFFSET: std::ops::Range<usize> = 28..36;

/// Returns true if the path of `file=PATH` is a pattern: it has wildcards, and no file of that very name exists.
fn is_pattern(path: &Path) -> bool {
    has_wildcard(path.as_os_str()) && !exists(path)
}

/// Returns the files of `file=PATH`: that file, or every match of a pattern, sorted, without the extents that another match
/// names. A path that is no pattern is returned unchecked, because opening it gives a better error.
///
/// Fails if a pattern matches no file or is malformed.
pub(super) fn expand(path: &Path) -> Result<Vec<PathBuf>, UsageError> {
    if !is_pattern(path) {
        return Ok(vec![path.to_owned()]);
    }
    let mut walk = Walk {
        found: Vec::new(),
        first_error: None,
    };
    let components: Vec<Component<'_>> = path.components().collect();
    walk.descend(PathBuf::new(), &components)
        .map_err(|e| UsageError::new(format!("file={}: {e}", path.display())))?;
    if walk.found.is_empty() {
        let why = walk
            .first_error
            .map_or_else(String::new, |first_error| format!(" ({first_error})"));
        return Err(UsageError::new(format!(
            "file={}: no file matches{why}",
            path.display()
        )));
    }
    let mut found = without_extents(walk.found);
    found.sort();
    Ok(found)
}

/// Returns the disks in a folder, sorted: every `*.vmdk` that is a descriptor or embeds one. Bare extents are skipped, and
/// so are files that a descriptor names as an extent: a guest decides what they hold. A file that cannot be read counts as
/// a disk, so that its open reports why.
///
/// Fails if the folder cannot be read, or if it holds no disk.
pub(super) fn disks_of(dir: &Path) -> Result<Vec<PathBuf>, UsageError> {
    let failed =
        |path: &Path, e: &io::Error| UsageError::new(format!("dir={}: {}: {e}", dir.display(), path.display()));
    let mut disks = Vec::new();
    for entry in fs::read_dir(dir).map_err(|e| UsageError::new(format!("dir={}: {e}", dir.display())))? {
        let path = entry.map_err(|e| failed(dir, &e))?.path();
        let is_vmdk = path.extension().is_some_and(|ext| ext.eq_ignore_ascii_case("vmdk"));
        // A link is not followed: the user did not name it.
        if is_vmdk && !path.is_symlink() && is_disk(&path).unwrap_or(true) {
            disks.push(path);
        }
    }
    let mut disks = without_extents(disks);
    if disks.is_empty() {
        return Err(UsageError::new(format!(
            "dir={}: no VMDK with a descriptor found: give files without one by file=",
            dir.display()
        )));
    }
    disks.sort();
    Ok(disks)
}

/// Returns the names of the disks in a package.
///
/// Fails if it cannot be read, is damaged or has no disk.
pub(super) fn disks_of_package(path: &Path) -> Result<Vec<String>, UsageError> {
    let policy = Arc::new(OpenPolicy::new(Vec::new(), false));
    let package = open_user_path(path, policy, Access::Peek).and_then(package::open);
    let disks = package.map_err(|e| UsageError::new(e.to_string()))?.disks().to_vec();
    if disks.is_empty() {
        return Err(UsageError::new(format!("{}: has no VMDK", path.display())));
    }
    Ok(disks)
}

/// Returns the folder below which a pattern searches: its components before the first one with wildcards. `None` if
/// the path is no pattern.
pub(super) fn searched_folder(path: &Path) -> Option<PathBuf> {
    if !is_pattern(path) {
        return None;
    }
    let mut folder = PathBuf::new();
    for component in path.components() {
        let literal = folder.join(component);
        if has_wildcard(component.as_os_str()) && !exists(&literal) {
            break;
        }
        folder = literal;
    }
    Some(folder)
}

/// Removes the files that the descriptor of another file in the same folder names as an extent.
fn without_extents(mut files: Vec<PathBuf>) -> Vec<PathBuf> {
    let extents: HashSet<PathBuf> = files.iter().flat_map(|path| extents_of(path)).collect();
    files.retain(|path| !extents.contains(path));
    files
}

/// Returns the paths of the extents that lie in the folder of a text descriptor. Empty for any other file, and for one that
/// cannot be read or parsed, whose open reports why.
fn extents_of(path: &Path) -> Vec<PathBuf> {
    let Ok(bytes) = read_start(path, MAX_DESCRIPTOR) else {
        return Vec::new();
    };
    let head = bytes.get(..PROBE_BYTES as usize).unwrap_or(&bytes);
    let descriptor = is_descriptor(head).then(|| Descriptor::parse(&bytes));
    let extents = descriptor.and_then(Result::ok).map_or_else(Vec::new, |d| d.extents);
    let names = extents.iter().filter_map(|extent| extent.name.as_ref());
    let paths = names.map(|name| path.with_file_name(OsStr::from_bytes(name.as_bytes())));
    paths.filter(|extent| extent != path).collect()
}

/// Reads at most `most` bytes from the start of a regular file.
fn read_start(path: &Path, most: u64) -> io::Result<Vec<u8>> {
    // O_NONBLOCK: if another process put a FIFO in its place, the open must not block.
    let flags = libc::O_NONBLOCK | libc::O_NOFOLLOW;
    let file = File::options().read(true).custom_flags(flags).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut bytes = Vec::new();
    file.take(most).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Returns the default file name of a local disk in the mount: the source's name with the extension `.raw`.
pub(super) fn default_name(path: &Path) -> OsString {
    let Some(name) = path.file_name() else {
        return "disk.raw".into();
    };
    let name = Path::new(name);
    if name.extension().is_some_and(|ext| ext.eq_ignore_ascii_case("raw")) {
        return name.into();
    }
    name.with_extension("raw").into()
}

/// Returns the default file name of an NBD disk in the mount: the export's name, with invalid characters escaped.
pub(super) fn export_name(nbd: &NbdConfig) -> OsString {
    let name = match (&nbd.export, &nbd.address) {
        (Some(name), _) => name.clone(),
        (None, NbdAddress::Uri(uri)) => uri_export(uri),
        (None, _) => OsString::new(),
    };
    crate::source::export_file_name(&name)
}

/// Returns the percent-decoded export name of an NBD URI: its path without the first slash. In URIs of Unix sockets the
/// path is the export name too; the socket is a parameter.
fn uri_export(uri: &str) -> OsString {
    let rest = uri.split_once("://").map_or("", |(_, rest)| rest);
    let rest = rest.split(['?', '#']).next().unwrap_or_default();
    let path = rest.split_once('/').map_or("", |(_, path)| path);
    OsString::from_vec(nbd_uri::percent_decode(path))
}

/// Search through the file system for the components of a pattern.
struct Walk {
    found: Vec<PathBuf>,
    /// Error of the first folder that could not be read. Reported only if no file was found.
    first_error: Option<String>,
}

impl Walk {
    /// Collects the files below `base` that match `rest`. A folder matches only as a component before the last.
    fn descend(&mut self, base: PathBuf, rest: &[Component<'_>]) -> Result<(), glob::PatternError> {
        let Some((component, rest)) = rest.split_first() else {
            if exists(&base) && !base.is_dir() {
                self.found.push(base);
            }
            return Ok(());
        };
        // An existing name is taken literally: a parent folder can have a name such as `[vms]`.
        let literal = base.join(component);
        if !has_wildcard(component.as_os_str()) || exists(&literal) {
            return self.descend(literal, rest);
        }
        let pattern = Pattern::new(&to_lossless_text(component.as_os_str()))?;
        for name in self.names_in(&base) {
            let path = base.join(&name);
            // The user did not name what a pattern finds: a link in a folder that others write to may lead anywhere.
            if pattern.matches_with(&to_lossless_text(&name), LIKE_A_SHELL) && !path.is_symlink() {
                self.descend(path, rest)?;
            }
        }
        Ok(())
    }

    /// Returns the names in `dir`. A folder that cannot be read gives none.
    fn names_in(&mut self, dir: &Path) -> Vec<OsString> {
        let names = fs::read_dir(dir).and_then(|entries| entries.map(|entry| Ok(entry?.file_name())).collect());
        names.unwrap_or_else(|e: io::Error| {
            // A pattern such as `*/x` also tries to list plain files, which is not an error worth reporting.
            if e.kind() != ErrorKind::NotADirectory {
                self.first_error
                    .get_or_insert_with(|| format!("{}: {e}", dir.display()));
            }
            Vec::new()
        })
    }
}

fn has_wildcard(text: &OsStr) -> bool {
    text.as_bytes().iter().any(|b| matches!(b, b'*' | b'?' | b'['))
}

/// Returns true if the path exists, even as a broken link. An error other than "missing" counts as existing, so that
/// opening the file reports the reason.
fn exists(path: &Path) -> bool {
    let absent = [libc::ENOENT, libc::ENOTDIR, libc::ENAMETOOLONG].map(Some);
    path.symlink_metadata()
        .map_or_else(|e| !absent.contains(&e.raw_os_error()), |_| true)
}

/// Maps a name to text without losing bytes, so that different names stay different. Patterns and names use the same
/// mapping.
fn to_lossless_text(name: &OsStr) -> String {
    let mut text = String::new();
    for chunk in name.as_bytes().utf8_chunks() {
        text.push_str(chunk.valid());
        text.extend(
            chunk
                .invalid()
                .iter()
                .filter_map(|byte| char::from_u32(NO_UTF8 + u32::from(*byte))),
        );
    }
    text
}

/// Returns true if a file is or embeds a descriptor. Returns false for everything except regular files.
fn is_disk(path: &Path) -> io::Result<bool> {
    match fs::metadata(path) {
        Ok(meta) if meta.is_file() => {}
        // A folder, device, FIFO or socket.
        Ok(_) => return Ok(false),
        // A broken link, or a file that another process removed after the folder was listed.
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(false),
        Err(e) => return Err(e),
    }
    let head = read_start(path, PROBE_BYTES)?;
    Ok(holds_descriptor(&head) || is_descriptor(&head))
}

/// Returns true for the start of a hosted sparse file with an embedded descriptor.
fn holds_descriptor(head: &[u8]) -> bool {
    head.starts_with(b"KDMV") && head.get(DESCRIPTOR_OFFSET).is_some_and(|sector| sector != [0; 8])
}

/// Returns true for the start of a text descriptor: its first line is the known comment, or its first setting is
/// `version`.
fn is_descriptor(head: &[u8]) -> bool {
    let head = head.strip_prefix(b"\xef\xbb\xbf").unwrap_or(head); // a byte-order mark
    let lines = head.split(|b| *b == b'\n').map(<[u8]>::trim_ascii);
    let mut lines = lines.filter(|line| !line.is_empty());
    let Some(first) = lines.next() else {
        return false;
    };
    if let Some(comment) = first.strip_prefix(b"#")
        && comment.trim_ascii().eq_ignore_ascii_case(b"disk descriptorfile")
    {
        return true;
    }
    let setting = std::iter::once(first).chain(lines).find(|line| !line.starts_with(b"#"));
    let key = setting.and_then(|line| line.split(|b| *b == b'=').next().filter(|key| key.len() < line.len()));
    key.is_some_and(|key| key.trim_ascii().eq_ignore_ascii_case(b"version"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use tempfile::TempDir;

    use super::*;

    fn folder(names: &[&[u8]]) -> TempDir {
        let dir = tempfile::tempdir().unwrap();
        for name in names {
            fs::write(dir.path().join(OsStr::from_bytes(name)), "").unwrap();
        }
        dir
    }

    fn expanded(dir: &TempDir, pattern: &[u8]) -> Vec<Vec<u8>> {
        let path = dir.path().join(OsStr::from_bytes(pattern));
        let found = if is_pattern(&path) {
            expand(&path).unwrap()
        } else {
            vec![path]
        };
        found
            .iter()
            .map(|path| path.strip_prefix(dir).unwrap().as_os_str().as_bytes().to_vec())
            .collect()
    }

    #[test]
    fn regression_links_that_a_search_finds_are_not_followed() {
        let dir = folder(&[b"a.img"]);
        let text = "# Disk DescriptorFile\nversion=1\n";
        fs::write(dir.path().join("a.vmdk"), text).unwrap();
        fs::create_dir(dir.path().join("private")).unwrap();
        fs::write(dir.path().join("private/b.img"), "").unwrap();
        symlink("a.vmdk", dir.path().join("link.vmdk")).unwrap();
        symlink("a.img", dir.path().join("link.img")).unwrap();
        symlink("private", dir.path().join("linked")).unwrap();
        assert_eq!(expanded(&dir, b"*.img"), [b"a.img".to_vec()]);
        assert_eq!(disks_of(dir.path()).unwrap(), [dir.path().join("a.vmdk")]);
        assert!(expand(&dir.path().join("link*/b.img")).is_err());
        // A link that the user names is followed.
        assert!(!is_pattern(&dir.path().join("link.img")));
    }

    #[test]
    fn wildcards_are_expanded_and_sorted() {
        let dir = folder(&[b"b.vmdk", b"a.vmdk", b"c.img", b".hidden.vmdk", b"d1", b"d2"]);
        assert_eq!(expanded(&dir, b"*.vmdk"), [b"a.vmdk", b"b.vmdk"]);
        assert_eq!(expanded(&dir, b"?.vmdk"), [b"a.vmdk", b"b.vmdk"]);
        assert_eq!(expanded(&dir, b"d[2-9]"), [b"d2"]);
        assert_eq!(expanded(&dir, b"[!ab].*"), [b"c.img"]);
        assert_eq!(expanded(&dir, b".h*"), [b".hidden.vmdk"]);
    }

    #[test]
    fn wildcards_match_folders_but_only_files_are_found() {
        let dir = folder(&[b"plain"]);
        for vm in ["vm1", "vm2", "vm3.vmdk"] {
            fs::create_dir(dir.path().join(vm)).unwrap();
        }
        fs::write(dir.path().join("vm1/x.vmdk"), "").unwrap();
        fs::write(dir.path().join("vm2/x.vmdk"), "").unwrap();
        assert_eq!(expanded(&dir, b"*/x.vmdk"), [b"vm1/x.vmdk", b"vm2/x.vmdk"]);
        assert_eq!(expanded(&dir, b"vm?/*"), [b"vm1/x.vmdk", b"vm2/x.vmdk"]);
        assert!(expand(&dir.path().join("*.vmdk")).is_err(), "a folder is not a disk");
    }

    #[test]
    fn the_searched_folder_has_no_wildcards() {
        let dir = folder(&[b"a[1].vmdk"]);
        fs::create_dir(dir.path().join("[vms]")).unwrap();
        let searched = |pattern: &str| searched_folder(&dir.path().join(pattern));
        assert_eq!(searched("*.vmdk"), Some(dir.path().to_owned()));
        assert_eq!(searched("[vms]/*/x.vmdk"), Some(dir.path().join("[vms]")));
        assert_eq!(searched("a[1].vmdk"), None);
        assert_eq!(searched("a.vmdk"), None);
    }

    #[test]
    fn an_existing_path_is_not_a_pattern() {
        let dir = folder(&[b"a[1].vmdk", b"a1.vmdk", b"*"]);
        assert_eq!(expanded(&dir, b"a[1].vmdk"), [b"a[1].vmdk"]);
        assert_eq!(expanded(&dir, b"*"), [b"*"]);
        assert_eq!(expanded(&dir, b"a[12].vmdk"), [b"a1.vmdk"]);
    }

    #[test]
    fn an_existing_folder_is_not_a_pattern() {
        let dir = folder(&[]);
        for name in ["[vms]", "v"] {
            fs::create_dir(dir.path().join(name)).unwrap();
            fs::write(dir.path().join(name).join("a.vmdk"), "").unwrap();
        }
        assert_eq!(expanded(&dir, b"[vms]/*.vmdk"), [b"[vms]/a.vmdk"]);
        assert_eq!(expanded(&dir, b"[v]/*.vmdk"), [b"v/a.vmdk"]);
    }

    #[test]
    fn a_path_without_wildcards_is_returned_unchecked() {
        let dir = folder(&[]);
        assert_eq!(expanded(&dir, b"missing.vmdk"), [b"missing.vmdk"]);
    }

    #[test]
    fn no_match_is_an_error_that_names_the_pattern() {
        let dir = folder(&[b"a.img"]);
        let error = expand(&dir.path().join("*.vmdk")).unwrap_err().to_string();
        assert_eq!(error, format!("file={}/*.vmdk: no file matches", dir.path().display()));
        let error = expand(&dir.path().join("none/*.vmdk")).unwrap_err().to_string();
        assert!(
            error.contains("no file matches (") && error.contains("No such file"),
            "{error}"
        );
        let error = expand(&dir.path().join("a[")).unwrap_err().to_string();
        assert!(error.contains("a[: ") && error.contains("attern"), "{error}");
    }

    #[test]
    fn names_that_are_not_utf8_match() {
        let dir = folder(&[b"\xff.vmdk", b"\xfe.vmdk", "é.vmdk".as_bytes()]);
        assert_eq!(
            expanded(&dir, b"?.vmdk"),
            ["é.vmdk".as_bytes(), b"\xfe.vmdk", b"\xff.vmdk"]
        );
        assert_eq!(expanded(&dir, b"\xff.*"), [b"\xff.vmdk"]);
    }

    #[test]
    fn a_folder_gives_its_disks_but_not_its_extents() {
        let dir = folder(&[b"empty.vmdk"]);
        let put = |name: &str, content: &[u8]| fs::write(dir.path().join(name), content).unwrap();
        let sparse = |descriptor_sector: u64| {
            let mut header = vec![0u8; 512];
            header[..4].copy_from_slice(b"KDMV");
            header[28..36].copy_from_slice(&descriptor_sector.to_le_bytes());
            header
        };
        put("b-text.vmdk", b"# Disk DescriptorFile\nversion=1\n");
        put("a-embedded.vmdk", &sparse(1));
        put("UPPER.VMDK", b"\xef\xbb\xbf#Disk DescriptorFile\r\nCID=1\r\n");
        put(
            "stream.vmdk",
            b"# Description file created by VMDK stream converter\r\n\r\nVersion = 1 \r\n",
        );
        put("x-s001.vmdk", &sparse(0));
        put("x-delta.vmdk", b"COWD\x01\0\0\0");
        put("x-sesparse.vmdk", b"\xbe\xba\xfe\xca\0\0\0\0");
        put("x-flat.vmdk", &[0u8; 8192]);
        put("x-text-flat.vmdk", b"some data\nversion=1\n");
        put("x-version.vmdk", b"version\n");
        put("short.vmdk", b"KDMV");
        put("notes.txt", b"# Disk DescriptorFile\n");
        fs::create_dir(dir.path().join("folder.vmdk")).unwrap();
        symlink("nowhere", dir.path().join("broken.vmdk")).unwrap();
        nix::unistd::mkfifo(&dir.path().join("fifo.vmdk"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        let names = disks_of(dir.path()).unwrap();
        let names: Vec<_> = names.iter().map(|path| path.file_name().unwrap()).collect();
        assert_eq!(names, ["UPPER.VMDK", "a-embedded.vmdk", "b-text.vmdk", "stream.vmdk"]);
    }

    #[test]
    fn extents_that_a_descriptor_names_are_no_disks_whatever_they_hold() {
        let dir = folder(&[b"alone.vmdk"]);
        let text = |extents: &str| {
            format!("# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType=\"custom\"\n{extents}")
        };
        let put = |name: &str, content: &str| fs::write(dir.path().join(name), content).unwrap();
        put(
            "a.vmdk",
            &text("RW 8 FLAT \"a-flat.vmdk\" 0\nRW 8 FLAT \"sub/b.vmdk\" 0\nRW 8 ZERO\n"),
        );
        // The guest has written a descriptor to its disk.
        put("a-flat.vmdk", &text("RW 8 FLAT \"secret\" 0\n"));
        put("b.vmdk", &text("RW 8 FLAT \"b.vmdk\" 0\n"));
        assert_eq!(expanded(&dir, b"*.vmdk"), [&b"a.vmdk"[..], b"alone.vmdk", b"b.vmdk"]);
        let paths = |names: [&str; 2]| names.map(|name| dir.path().join(name));
        assert_eq!(disks_of(dir.path()).unwrap(), paths(["a.vmdk", "b.vmdk"]));
    }

    #[test]
    fn a_folder_that_is_missing_or_has_no_disks_is_an_error() {
        let dir = folder(&[b"x-flat.vmdk"]);
        let error = disks_of(dir.path()).unwrap_err().to_string();
        assert!(error.contains("no VMDK"), "{error}");
        let error = disks_of(&dir.path().join("none")).unwrap_err().to_string();
        assert!(error.contains("/none: No such file"), "{error}");
    }

    #[test]
    fn default_names_end_in_raw() {
        for (source, name) in [
            ("/a/Fedora.vmdk", "Fedora.raw"),
            ("/a/x.img", "x.raw"),
            ("/a/x", "x.raw"),
            ("/a/x.raw", "x.raw"),
            ("/a/x.RAW", "x.RAW"),
            ("/a/b.c.vmdk", "b.c.raw"),
            ("/a/.vmdk", ".vmdk.raw"),
            ("/dev/sda", "sda.raw"),
            ("/a b/c d.vmdk", "c d.raw"),
            ("/", "disk.raw"),
        ] {
            assert_eq!(default_name(Path::new(source)), name, "{source}");
        }
        assert_eq!(
            default_name(Path::new(OsStr::from_bytes(b"/\xff.vmdk"))),
            OsStr::from_bytes(b"\xff.raw")
        );
    }
}
