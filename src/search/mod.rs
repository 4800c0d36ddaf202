//! Search for disks: a pattern gives the files that match it, in local folders or in a datastore.
//!
//! ```text
//!   pattern ─► component by component ─► Tree: names, first bytes ─┬─ local.rs            the file system
//!               └─► without the extents of what was found          └─ source/https/search.rs   listings of a server
//! ```
//! The rules are the same everywhere: an existing name is taken literally although it has wildcards, only the last component
//! finds files, and a file that the descriptor of another match names as an extent is no disk of its own.
//!
//! Wildcards also match names that are not UTF-8. The directory walk of the `glob` crate silently skips those names, so
//! the walk is implemented here; the crate only matches single path components.

use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use glob::{MatchOptions, Pattern};

use crate::vmdk::descriptor::Descriptor;

mod local;

pub(crate) use local::LocalTree;

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
pub(crate) const PROBE_BYTES: u64 = 4096;

/// Bytes of a descriptor that are read to find its extents: ten thousand of them.
const MAX_DESCRIPTOR: u64 = 1 << 20;

/// Folders and files that a pattern is searched for in.
pub(crate) trait Tree {
    /// Returns true if the path exists, even as a broken link. An error other than "missing" counts as existing, so that
    /// opening the file reports the reason.
    fn exists(&self, path: &Path) -> bool;

    /// Returns true if the path is that of a folder.
    fn is_folder(&self, path: &Path) -> bool;

    /// Returns the names in a folder that a search may find, which are none for a folder that cannot be read.
    ///
    /// Errors: why the search as a whole fails.
    fn names_in(&self, folder: &Path) -> Result<Names, String>;

    /// Reads at most `most` bytes from the start of a file.
    fn read_start(&self, path: &Path, most: u64) -> io::Result<Vec<u8>>;

    /// Returns the largest number of files that a pattern may find.
    fn max_matches(&self) -> usize {
        usize::MAX
    }
}

/// Names in a folder.
#[derive(Debug)]
pub(crate) enum Names {
    /// The names, in any order.
    Known(Vec<OsString>),
    /// None, as the folder cannot be read. The reason is reported if the search finds nothing.
    Unreadable(String),
    /// None, as it is no folder.
    NoFolder,
}

/// Returns the files that match a pattern, sorted, without the extents that another match names.
///
/// Errors: no file matches, the pattern is malformed, or the search fails.
pub(crate) fn matches(tree: &dyn Tree, pattern: &Path) -> Result<Vec<PathBuf>, String> {
    let mut walk = Walk {
        tree,
        found: Vec::new(),
        first_error: None,
    };
    let components: Vec<Component<'_>> = pattern.components().collect();
    walk.descend(PathBuf::new(), &components)?;
    if walk.found.is_empty() {
        let why = walk.first_error.map_or_else(String::new, |error| format!(" ({error})"));
        return Err(format!("no file matches{why}"));
    }
    let mut found = without_extents(tree, walk.found);
    found.sort();
    Ok(found)
}

/// Removes the files that the descriptor of another file in the same folder names as an extent.
pub(crate) fn without_extents(tree: &dyn Tree, mut files: Vec<PathBuf>) -> Vec<PathBuf> {
    let extents: HashSet<PathBuf> = files.iter().flat_map(|path| extents_of(tree, path)).collect();
    files.retain(|path| !extents.contains(path));
    files
}

/// Returns the paths of the extents that lie in the folder of a text descriptor. Empty for any other file, and for one that
/// cannot be read or parsed, whose open reports why.
fn extents_of(tree: &dyn Tree, path: &Path) -> Vec<PathBuf> {
    let Some(bytes) = descriptor_of(tree, path) else {
        return Vec::new();
    };
    let extents = Descriptor::parse(&bytes).map_or_else(|_| Vec::new(), |descriptor| descriptor.extents);
    let names = extents.iter().filter_map(|extent| extent.name.as_ref());
    let paths = names.map(|name| path.with_file_name(OsStr::from_bytes(name.as_bytes())));
    paths.filter(|extent| extent != path).collect()
}

/// Reads a file that starts as a text descriptor does. A few bytes tell that, so no more of another file is read.
fn descriptor_of(tree: &dyn Tree, path: &Path) -> Option<Vec<u8>> {
    let head = tree.read_start(path, PROBE_BYTES).ok()?;
    match is_descriptor(&head) {
        true if head.len() as u64 == PROBE_BYTES => tree.read_start(path, MAX_DESCRIPTOR).ok(),
        is_descriptor => is_descriptor.then_some(head),
    }
}

/// Returns true for the start of a text descriptor: its first line is the known comment, or its first setting is
/// `version`.
pub(crate) fn is_descriptor(head: &[u8]) -> bool {
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

/// Returns the default name in a mount for a disk's file: the same name with the extension `.raw`.
pub(crate) fn default_name(path: &Path) -> OsString {
    let Some(name) = path.file_name() else {
        return "disk.raw".into();
    };
    let name = Path::new(name);
    if name.extension().is_some_and(|ext| ext.eq_ignore_ascii_case("raw")) {
        return name.into();
    }
    name.with_extension("raw").into()
}

/// Returns true if text has wildcards.
pub(crate) fn has_wildcard(text: &OsStr) -> bool {
    text.as_bytes().iter().any(|b| matches!(b, b'*' | b'?' | b'['))
}

/// Search through a tree for the components of a pattern.
struct Walk<'t> {
    tree: &'t dyn Tree,
    found: Vec<PathBuf>,
    /// Error of the first folder that could not be read. Reported only if no file was found.
    first_error: Option<String>,
}

impl Walk<'_> {
    /// Collects the files below `base` that match `rest`. A folder matches only as a component before the last.
    fn descend(&mut self, base: PathBuf, rest: &[Component<'_>]) -> Result<(), String> {
        let Some((component, rest)) = rest.split_first() else {
            if self.tree.exists(&base) && !self.tree.is_folder(&base) {
                self.found.push(base);
            }
            let most = self.tree.max_matches();
            return match self.found.len() > most {
                true => Err(format!("more than {most} files match")),
                false => Ok(()),
            };
        };
        // An existing name is taken literally: a parent folder can have a name such as `[vms]`.
        let literal = base.join(component);
        if !has_wildcard(component.as_os_str()) || self.tree.exists(&literal) {
            return self.descend(literal, rest);
        }
        let pattern = Pattern::new(&to_lossless_text(component.as_os_str())).map_err(|e| e.to_string())?;
        let names = match self.tree.names_in(&base)? {
            Names::Known(names) => names,
            Names::Unreadable(error) => {
                self.first_error.get_or_insert(error);
                return Ok(());
            }
            Names::NoFolder => return Ok(()),
        };
        for name in names {
            if pattern.matches_with(&to_lossless_text(&name), LIKE_A_SHELL) {
                self.descend(base.join(&name), rest)?;
            }
        }
        Ok(())
    }
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
