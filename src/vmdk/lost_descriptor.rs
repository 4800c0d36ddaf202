//! Advice for an extent that is named instead of its descriptor: what the file is, and the descriptor to write where the
//! original is lost.

use crate::error::{Error, ErrorKind};
use crate::store::{Access, ExtentName, StoredFile, shell_word};
use crate::vmdk::descriptor::ExtentKind;

/// Returns the sentence that gets the user of an extent's file further. `sectors` is the size of the extent.
pub(crate) fn advice(file: &dyn StoredFile, kind: ExtentKind, sectors: u64) -> String {
    let name = file.own_name();
    let Some(stem) = stem(&name, kind) else {
        return "name the .vmdk file that lists it".to_owned();
    };
    let original = format!("{stem}.vmdk");
    // The format has no escapes, so no descriptor can name such a file; and without a size there is no line to write.
    if name.contains(['"', '\\']) || sectors == 0 {
        return format!("name {original}, which lists it");
    }
    let new = new_name(file, stem);
    // The extent's folder as the user named it.
    let folder = file
        .label()
        .strip_suffix(name.as_str())
        .filter(|folder| folder.ends_with('/'));
    let new = format!("{}{new}", folder.unwrap_or_default());
    let more = match kind {
        ExtentKind::Sparse => ", with a line RW for each piece, in order",
        _ => "",
    };
    let parent = if is_child(stem, kind) {
        " (fill in the CID and the name of its parent)"
    } else {
        ""
    };
    format!(
        "name {original}, which lists it; if that is lost, this writes a new one{more}{parent}: {}",
        command(&name, stem, kind, sectors, &new)
    )
}

/// Returns the name of the descriptor without `.vmdk`, from the usual names of extents.
fn stem(name: &str, kind: ExtentKind) -> Option<&str> {
    let (end, suffixes): (usize, &[&str]) = match kind {
        ExtentKind::Vmfs => (0, &["-flat.vmdk", "-rdm.vmdk", "-rdmp.vmdk"]),
        ExtentKind::VmfsSparse => (0, &["-delta.vmdk", ".vmdk"]),
        ExtentKind::SeSparse => (0, &["-sesparse.vmdk", ".vmdk"]),
        _ => (4, &[".vmdk"]),
    };
    let lower = name.to_ascii_lowercase();
    let suffix = suffixes.iter().find(|suffix| lower.ends_with(*suffix))?;
    // The names are ASCII from here to the end, so the positions in both texts are the same.
    let stem = name.get(..name.len() - suffix.len()).filter(|stem| !stem.is_empty())?;
    let piece = stem.len().checked_sub(end + 1).and_then(|at| stem.split_at_checked(at));
    match piece {
        Some((before, number)) if end > 0 && is_piece(number) && !before.is_empty() => Some(before),
        _ => Some(stem),
    }
}

/// Returns true for `-s001`, `-f012` …: the end of the name of a piece.
fn is_piece(text: &str) -> bool {
    matches!(text.as_bytes(), [b'-', b's' | b'f' | b'S' | b'F', digits @ ..] if digits.iter().all(u8::is_ascii_digit))
}

/// Returns true if the extent belongs to a snapshot: its format is one of deltas, or its name ends like `-000001`.
fn is_child(stem: &str, kind: ExtentKind) -> bool {
    let number = stem.rsplit('-').next().filter(|number| number.len() < stem.len());
    let numbered = number.is_some_and(|number| number.len() == 6 && number.bytes().all(|b| b.is_ascii_digit()));
    numbered || matches!(kind, ExtentKind::VmfsSparse | ExtentKind::SeSparse)
}

/// Returns a name beside the extent that no file has.
fn new_name(file: &dyn StoredFile, stem: &str) -> String {
    let is_free = |name: &str| {
        let found = file
            .siblings()
            .and_then(|store| store.open(&ExtentName::new(name)?, Access::Read));
        found.is_err_and(|e: Error| e.kind() == ErrorKind::NotFound)
    };
    // The original name if it is free, as other descriptors may refer to it; a file of that name is never proposed to
    // be overwritten.
    let names = [format!("{stem}.vmdk"), format!("{stem}-new.vmdk")];
    names
        .iter()
        .find(|name| is_free(name))
        .map_or_else(|| format!("{stem}-descriptor.vmdk"), Clone::clone)
}

/// Returns the command that writes a descriptor `new` for the extent `name`.
fn command(name: &str, stem: &str, kind: ExtentKind, sectors: u64, new: &str) -> String {
    let create_type = match kind {
        ExtentKind::VmfsSparse => "vmfsSparse",
        ExtentKind::SeSparse => "seSparse",
        ExtentKind::Sparse => "twoGbMaxExtentSparse",
        _ => "vmfs",
    };
    let mut lines = vec![
        "# Disk DescriptorFile".to_owned(),
        "version=1".to_owned(),
        "CID=fffffffe".to_owned(),
    ];
    if is_child(stem, kind) {
        lines.push("parentCID=CID-OF-THE-PARENT".to_owned());
        lines.push("parentFileNameHint=\"PARENT.vmdk\"".to_owned());
    } else {
        lines.push("parentCID=ffffffff".to_owned());
    }
    lines.push(format!("createType=\"{create_type}\""));
    lines.push(format!("RW {sectors} {kind} \"{name}\""));
    let lines: Vec<_> = lines
        .iter()
        .map(|line| format!("'{}'", line.replace('\'', r"'\''")))
        .collect();
    format!("printf '%s\\n' {} > {}", lines.join(" "), shell_word(new))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_descriptor_is_named_after_its_extents() {
        assert_eq!(stem("web-flat.vmdk", ExtentKind::Vmfs), Some("web"));
        assert_eq!(stem("Web-Flat.VMDK", ExtentKind::Vmfs), Some("Web"));
        assert_eq!(stem("a b-s012.vmdk", ExtentKind::Sparse), Some("a b"));
        assert_eq!(stem("web.vmdk", ExtentKind::Sparse), Some("web"));
        assert_eq!(
            stem("web-000001-delta.vmdk", ExtentKind::VmfsSparse),
            Some("web-000001")
        );
        assert_eq!(stem("-flat.vmdk", ExtentKind::Vmfs), None);
        assert_eq!(stem("web.img", ExtentKind::Vmfs), None);
        assert!(is_child("web-000001", ExtentKind::Sparse) && !is_child("web", ExtentKind::Sparse));
        assert!(is_child("web", ExtentKind::SeSparse) && !is_child("000001", ExtentKind::Sparse));
    }

    #[test]
    fn the_command_is_quoted_for_a_shell() {
        let command = command("it's-flat.vmdk", "it's", ExtentKind::Vmfs, 8, "it's.vmdk");
        assert!(command.contains(r#"'RW 8 VMFS "it'\''s-flat.vmdk"'"#), "{command}");
        assert!(command.ends_with(r"> 'it'\''s.vmdk'"), "{command}");
    }
}
