//! Expansion of local `file=` patterns and `dir=` folders to files, and default file names in the mount. Patterns on a server
//! are expanded when it is reached (`volume::find_disks`).

use std::ffi::OsString;
use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::outcome::UsageError;
use crate::config::{NbdAddress, NbdConfig};
pub(super) use crate::search::default_name;
use crate::search::{self, LocalTree, PROBE_BYTES, Tree, has_wildcard, is_descriptor};
use crate::source::nbd_uri;
use crate::store::{Access, OpenPolicy, open_user_path, package};

/// Byte range of the embedded descriptor's sector number in a hosted sparse header.
const DESCRIPTOR_OFFSET: std::ops::Range<usize> = 28..36;

/// Files that are the disks of a source.
#[derive(Debug, Default)]
pub(super) struct Found {
    pub(super) files: Vec<PathBuf>,
    /// Folder that was searched: the components of the path before the first one with wildcards. `None`: the user named
    /// the file.
    pub(super) folder: Option<PathBuf>,
}

impl Found {
    /// Returns the file that the user named.
    pub(super) fn named(path: &Path) -> Self {
        Self {
            files: vec![path.to_owned()],
            folder: None,
        }
    }
}

/// Returns true if the path of `file=PATH` is a pattern: it has wildcards, and no file of that very name exists.
fn is_pattern(path: &Path) -> bool {
    has_wildcard(path.as_os_str()) && !LocalTree.exists(path)
}

/// Returns the files of `file=PATH`: that file, or every match of a pattern, sorted, without the extents that another match
/// names. A path that is no pattern is returned unchecked, because opening it gives a better error.
///
/// Fails if a pattern matches no file or is malformed.
pub(super) fn expand(path: &Path) -> Result<Found, UsageError> {
    if !is_pattern(path) {
        return Ok(Found::named(path));
    }
    let files = search::matches(&LocalTree, path);
    Ok(Found {
        files: files.map_err(|e| UsageError::new(format!("file={}: {e}", path.display())))?,
        folder: Some(searched_folder(path)),
    })
}

/// Returns the disks in a folder, sorted: every `*.vmdk` that is a descriptor or embeds one. Bare extents are skipped, and
/// so are files that a descriptor names as an extent: a guest decides what they hold. A file that cannot be read counts as
/// a disk, so that its open reports why.
///
/// Fails if the folder cannot be read, or if it holds no disk.
pub(super) fn disks_of(dir: &Path) -> Result<Found, UsageError> {
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
    let mut disks = search::without_extents(&LocalTree, disks);
    if disks.is_empty() {
        return Err(UsageError::new(format!(
            "dir={}: no VMDK with a descriptor found: give files without one by file=",
            dir.display()
        )));
    }
    disks.sort();
    Ok(Found {
        files: disks,
        folder: Some(dir.to_owned()),
    })
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

/// Returns the folder below which a pattern searches.
fn searched_folder(pattern: &Path) -> PathBuf {
    let mut folder = PathBuf::new();
    for component in pattern.components() {
        let literal = folder.join(component);
        if has_wildcard(component.as_os_str()) && !LocalTree.exists(&literal) {
            break;
        }
        folder = literal;
    }
    folder
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
    let head = LocalTree.read_start(path, PROBE_BYTES)?;
    Ok(holds_descriptor(&head) || is_descriptor(&head))
}

/// Returns true for the start of a hosted sparse file with an embedded descriptor.
fn holds_descriptor(head: &[u8]) -> bool {
    head.starts_with(b"KDMV") && head.get(DESCRIPTOR_OFFSET).is_some_and(|sector| sector != [0; 8])
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
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
            expand(&path).unwrap().files
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
        assert_eq!(disks_of(dir.path()).unwrap().files, [dir.path().join("a.vmdk")]);
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
        fs::create_dir(dir.path().join("[vms]/a")).unwrap();
        fs::write(dir.path().join("[vms]/a/x.vmdk"), "").unwrap();
        let searched = |pattern: &str| expand(&dir.path().join(pattern)).unwrap().folder;
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
        let names = disks_of(dir.path()).unwrap().files;
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
        assert_eq!(disks_of(dir.path()).unwrap().files, paths(["a.vmdk", "b.vmdk"]));
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
