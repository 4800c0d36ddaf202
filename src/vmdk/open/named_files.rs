//! Files that a link names: those of its extents, and its parent.
//!
//! A name may stand for several paths, which are tried in order. The errors say what was tried, and how to get further.

use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::store::{Access, ExtentName, Store, StoredFile};
use crate::vmdk::chain::Link;
use crate::vmdk::descriptor::{Descriptor, ExtentKind, ExtentLine, candidates, in_folders};
use crate::vmdk::near_names::near_names;
use crate::vmdk::neighbours;
use crate::vmdk::open_options::Degraded;

/// Opens the parent that `child` names: by the first of its possible names that exists, or by its UUID.
///
/// Errors: `Policy` if a name exists but was refused, `NotFound` with all names that were tried.
pub(super) fn named_parent(child: &Link, degraded: Degraded) -> Result<Arc<dyn StoredFile>> {
    let Some(parent) = &child.descriptor.parent else {
        let uuid = neighbours::parent_uuid(child).unwrap_or_default();
        return neighbours::find_by_uuid(child, &uuid, degraded);
    };
    let hint = &parent.hint;
    let store = child.file.siblings()?;
    let names = [hint.candidates(), in_folders(hint.name(), &store.allowed())].concat();
    open_first(&*store, &names, Access::Read).map_err(|e| match e.kind() {
        ErrorKind::NotFound => {
            // The advice is left out where the user has taken it already.
            let advice = if degraded.orphan {
                String::new()
            } else {
                near_text(&*store, &names, &child.file.own_name(), "parent=FILE names it")
                    + "; degraded=orphan shows what the snapshot itself holds"
            };
            Error::new(e.kind(), format!("is missing: {e}{advice}"))
        }
        _ => e,
    })
}

/// Opens the file of an extent, by the first of its possible names that exists.
pub(super) fn open_extent(store: &dyn Store, name: &ExtentName, access: Access) -> Result<Arc<dyn StoredFile>> {
    let spell = |part: &[u8]| ExtentName::new(part).ok();
    let names = [candidates(name, spell), in_folders(name, &store.allowed())].concat();
    open_first(store, &names, access)
}

/// Opens the first of `names` that exists and may be opened.
///
/// Errors: `Policy` if one exists but was refused, `NotFound` with all names that were tried.
fn open_first(store: &dyn Store, names: &[ExtentName], access: Access) -> Result<Arc<dyn StoredFile>> {
    let mut missing = Vec::new();
    let mut refused = None;
    for name in names {
        match store.open(name, access) {
            Ok(file) => return Ok(file),
            Err(e) if e.kind() == ErrorKind::NotFound => missing.push(e.to_string()),
            // A later candidate may be allowed: often it is the file name alone, in the descriptor's folder.
            Err(e) if e.kind() == ErrorKind::Policy => refused = refused.or(Some(e)),
            // Any other error ends the search: the file may well exist, and a later name could be that of another one.
            Err(e) => return Err(e),
        }
    }
    Err(refused.unwrap_or_else(|| Error::new(ErrorKind::NotFound, missing.join("; "))))
}

/// Adds to the error for an extent that cannot be opened what the name means, and how to get further.
pub(super) fn missing_extent(
    e: Error,
    line: &ExtentLine,
    descriptor: &Descriptor,
    store: &dyn Store,
    own: &str,
) -> Error {
    let name = line.name.as_ref().map(ExtentName::as_bytes).unwrap_or_default();
    let shown = line.name.as_ref().map(ToString::to_string).unwrap_or_default();
    let foreign = |what: &str| {
        Error::unsupported(format!(
            "`{shown}` is {what}, which is not here: put a copy of its data beside the descriptor, and the copy's name \
             in line {}",
            line.line
        ))
    };
    let is_refused = matches!(e.kind(), ErrorKind::NotFound | ErrorKind::Policy);
    let starts = |start: &[u8]| {
        name.get(..start.len())
            .is_some_and(|head| head.eq_ignore_ascii_case(start))
    };
    let macos = [&b"/dev/disk"[..], b"/dev/rdisk"]
        .iter()
        .find_map(|start| name.strip_prefix(*start));
    match e.kind() {
        _ if !is_refused => e,
        _ if [&br"\\.\"[..], br"\\?\", b"//./", b"//?/"]
            .iter()
            .any(|start| starts(start)) =>
        {
            foreign("a Windows device")
        }
        _ if macos.is_some_and(|rest| rest.first().is_some_and(u8::is_ascii_digit)) => foreign("a macOS device"),
        _ if [&b"vsan://"[..], b"vvol://"].iter().any(|start| starts(start)) => {
            foreign("an object of a vSAN or VVol datastore and no file")
        }
        _ if matches!(line.kind, ExtentKind::VmfsRdm | ExtentKind::VmfsRaw) => Error::unsupported(format!(
            "the extent is an RDM pointer, it maps a device of an ESX host ({e}); read the LUN itself"
        )),
        ErrorKind::NotFound => {
            let parent = descriptor.parent.as_ref().map_or_else(String::new, |parent| {
                format!("; the state before the snapshot is in {}", parent.hint.name())
            });
            let otherwise =
                format!("copy {shown} beside the descriptor, or name the folder that holds it with allow-dir=");
            let near = near_text(store, line.name.as_slice(), own, &otherwise);
            Error::new(e.kind(), format!("{e}{near}{parent}"))
        }
        _ => e,
    }
}

/// Returns the end of the error for names of which none exists: the near ones in the folder, and what to do with them.
/// The file `own` is none of them.
fn near_text(store: &dyn Store, names: &[ExtentName], own: &str, otherwise: &str) -> String {
    let near: Vec<String> = near_names(store, names)
        .into_iter()
        .filter(|name| name != own)
        .collect();
    match near.as_slice() {
        [] => format!("; {otherwise}"),
        near => format!(
            "; found {} there: rename it if it is the file, or {otherwise}",
            near.join(", ")
        ),
    }
}
