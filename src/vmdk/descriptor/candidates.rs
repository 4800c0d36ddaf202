//! Names at which a file may be found that a descriptor names by a path of another machine or operating system.

use crate::store::ExtentName;

/// Returns the names to try for a parent or an extent, relative to the descriptor's folder: at least one, the most likely
/// first. `spell` makes a name of a part of the path.
///
/// | path | candidates |
/// | --- | --- |
/// | `x.vmdk` | as it is |
/// | `../d/x.vmdk` | as it is, then `x.vmdk` |
/// | `/d/x.vmdk` | as it is, then `x.vmdk`, then `../d/x.vmdk` |
/// | `/vmfs/volumes/ID/d/x.vmdk` (ESX) | `x.vmdk`, then `../d/x.vmdk`, then as it is |
/// | `d\x.vmdk` | `d/x.vmdk`, then as it is, then `x.vmdk` |
/// | `C:\d\x.vmdk`, `\\host\d\x.vmdk` | `x.vmdk`, then `../d/x.vmdk` |
///
/// Often the files were copied into one folder, or into sibling folders that keep their names.
pub(crate) fn candidates(name: &ExtentName, spell: impl Fn(&[u8]) -> Option<ExtentName>) -> Vec<ExtentName> {
    let written = name.as_bytes();
    let slashed = with_slashes(written);
    let is_windows = is_windows_absolute(written);
    let is_esx = written.starts_with(VOLUMES);
    let mut found = Vec::new();
    // Absolute paths of Windows do not exist here, and those of ESX only on its own stores.
    if !is_windows && !is_esx {
        found.extend(
            (slashed != written && !written.starts_with(b"/"))
                .then(|| spell(&slashed))
                .flatten(),
        );
        found.push(name.clone());
    }
    let path = if written.starts_with(b"/") { written } else { &slashed };
    let last = last(path);
    found.extend((last != path).then(|| spell(last)).flatten());
    if !last.is_empty() && (is_windows || written.starts_with(b"/")) {
        found.extend(folder(path).and_then(|folder| spell(&[b"../", folder, b"/", last].concat())));
    }
    // A store on the host itself knows its volumes.
    if is_esx || found.is_empty() {
        found.push(name.clone());
    }
    found
}

/// Returns the names to try in each of `folders`, which the user allowed: the path's last component, then that of the
/// folder before it too.
pub(crate) fn in_folders(name: &ExtentName, folders: &[ExtentName]) -> Vec<ExtentName> {
    let path = with_slashes(name.as_bytes());
    let last = last(&path);
    let below = [
        Some(last.to_vec()),
        folder(&path).map(|folder| [folder, b"/", last].concat()),
    ];
    if last.is_empty() {
        return Vec::new();
    }
    folders
        .iter()
        .flat_map(|folder| {
            below
                .iter()
                .flatten()
                .map(move |rest| [folder.as_bytes(), b"/", rest].concat())
        })
        // Too long a path is no candidate.
        .filter_map(|path| ExtentName::new(path).ok())
        .collect()
}

/// Folder of the volumes of an ESX host.
const VOLUMES: &[u8] = b"/vmfs/volumes/";

fn with_slashes(path: &[u8]) -> Vec<u8> {
    path.iter().map(|&b| if b == b'\\' { b'/' } else { b }).collect()
}

/// Returns true if the path starts at a drive, a share or the root of the current drive.
fn is_windows_absolute(path: &[u8]) -> bool {
    match path {
        [b'\\', ..] => true,
        [drive, b':', b'\\' | b'/', ..] => drive.is_ascii_alphabetic(),
        _ => false,
    }
}

/// Returns the part after the last `/`.
fn last(path: &[u8]) -> &[u8] {
    path.rsplit(|&b| b == b'/').next().unwrap_or(path)
}

/// Returns `FOLDER` of `…/FOLDER/FILE`. `None` if there is none, or if it is a volume of ESX, a drive or a relative step.
fn folder(path: &[u8]) -> Option<&[u8]> {
    let path = path.strip_prefix(VOLUMES).unwrap_or(path);
    let mut parts = path.rsplit(|&b| b == b'/').skip(1);
    let folder = parts.next()?;
    // The first part is empty (the root), a drive, or the ID of the volume.
    parts.next()?;
    (!matches!(folder, b"" | b"." | b"..")).then_some(folder)
}
