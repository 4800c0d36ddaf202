//! OVA packages: a tar archive of an OVF description, its disks and their digests, read without unpacking.
//!
//! The package is untrusted: the texts that are parsed have at most [`MAX_TEXT`] bytes. The bounds of the archive are those
//! of `archive.rs`.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use quick_xml::Reader;
use quick_xml::events::{BytesStart, Event};
use ring::digest;

use super::member::{Members, last_part};
use super::{StoredFile, printable, shell_word};
use crate::error::{Error, ErrorKind, Result};

/// Maximum bytes of a description or of a list of digests.
const MAX_TEXT: u64 = 4 << 20;
/// Maximum number of messages about members that differ.
const MAX_MESSAGES: usize = 100;
/// Bytes read at once for a digest.
const CHUNK: usize = 1 << 20;

/// An open package.
#[derive(Debug)]
pub(crate) struct Package {
    members: Arc<Members>,
    disks: Vec<String>,
}

/// Reads the list of members of a package, and which of them are disks.
///
/// Errors: `Corrupt` for a file that is no such archive or a damaged one, those of reading it.
pub(crate) fn open(file: Arc<dyn StoredFile>) -> Result<Package> {
    let label = file.label().to_owned();
    let members = Members::read(file)?;
    let disks = disks(&members).map_err(|e| e.in_file(&label))?;
    Ok(Package { members, disks })
}

impl Package {
    /// Returns the names of the disks, in the order of the description; those of all VMDKs where there is none.
    pub(crate) fn disks(&self) -> &[String] {
        &self.disks
    }

    /// Returns the whole name of the disk that `name` means: a member's name, or its last part.
    fn named<'a>(&'a self, name: &str) -> Option<&'a String> {
        let exact = self.disks.iter().find(|disk| *disk == name);
        exact.or_else(|| self.disks.iter().find(|disk| last_part(disk) == name))
    }

    /// Opens a disk for reading: the member of that name, or the only disk.
    ///
    /// Errors: `Usage` with the names of the disks if there is no such disk, or several; `Unsupported` for a disk that
    /// is compressed or cut into pieces.
    pub(crate) fn disk(&self, name: Option<&str>) -> Result<Arc<dyn StoredFile>> {
        let label = self.members.container.label();
        let listed = || {
            let names: Vec<_> = self.disks.iter().map(printable).collect();
            match names.as_slice() {
                [] => "it has no VMDK".to_owned(),
                names => format!("its disks are {}", names.join(", ")),
            }
        };
        let usage = |text: String| Error::new(ErrorKind::Usage, format!("{label}: {text}"));
        let disk = match (name, self.disks.as_slice()) {
            (Some(name), _) => self
                .named(name)
                .ok_or_else(|| format!("has no disk {}: {}", printable(name), listed())),
            (None, [only]) => Ok(only),
            (None, _) => Err(format!("is a package: {}; name one with member=", listed())),
        };
        Ok(Arc::new(self.members.open_unpacked(disk.map_err(usage)?)?))
    }

    /// Compares a disk, and the members that are no disks, with the digests of the package's list (`.mf`). Returns a
    /// message for each that differs or that the list names and the package lacks. A package without a list is fine.
    pub(crate) fn verify(&self, disk: Option<&str>) -> Result<Vec<String>> {
        let Some(list) = self.members.list.iter().find(|member| has_suffix(&member.name, "mf")) else {
            return Ok(Vec::new());
        };
        let is_other = |name: &str| disk.is_some_and(|disk| disk != name) && self.disks.iter().any(|d| d == name);
        let text = read_text(&self.members, &list.name)?;
        let (mut wrong, mut seen) = (Vec::new(), HashSet::new());
        for line in text.lines().filter(|line| !line.trim().is_empty()) {
            if wrong.len() == MAX_MESSAGES {
                wrong.push(format!("{}: has more lines that do not fit", printable(&list.name)));
                break;
            }
            match digest_line(line) {
                // A list that names a member often would make the check read it as often.
                Some((_, name, _)) if !seen.insert(name) => {
                    wrong.push(format!("{}: lists {} twice", printable(&list.name), printable(name)));
                }
                None => wrong.push(format!(
                    "{}: cannot read the line {}",
                    printable(&list.name),
                    printable(line)
                )),
                Some((_, name, _)) if is_other(name) => {}
                Some((algorithm, name, expected)) => match self.members.open(name) {
                    Ok(file) if digest_of(&file, algorithm)? == expected => {}
                    Ok(file) => wrong.push(format!("{}: differs from its digest in {}", file.label(), list.name)),
                    Err(e) => wrong.push(e.to_string()),
                },
            }
        }
        Ok(wrong)
    }
}

fn has_suffix(name: &str, suffix: &str) -> bool {
    name.rsplit_once('.')
        .is_some_and(|(_, end)| end.eq_ignore_ascii_case(suffix))
}

/// Returns the disks that the description lists, in its order; without a description all VMDKs.
fn disks(members: &Arc<Members>) -> Result<Vec<String>> {
    let by_name = || {
        let names = members.list.iter().map(|member| member.name.clone());
        names
            .filter(|name| has_suffix(name.trim_end_matches(".gz"), "vmdk"))
            .collect()
    };
    let Some(description) = members.list.iter().find(|member| has_suffix(&member.name, "ovf")) else {
        return Ok(by_name());
    };
    let text = read_text(members, &description.name)?;
    let files = described_disks(&text).map_err(|e| e.within(format!("member {}", printable(&description.name))))?;
    Ok(if files.is_empty() { by_name() } else { files })
}

/// Returns the files of the disks in a description: those that a `Disk` refers to, in the order of the disks.
///
/// Errors: `Corrupt` for a text that is no XML, `Unsupported` for a disk that is cut into pieces.
fn described_disks(text: &str) -> Result<Vec<String>> {
    let mut reader = Reader::from_str(text);
    let (mut files, mut disks, mut seen) = (HashMap::new(), Vec::new(), HashSet::new());
    loop {
        let event = reader.read_event().map_err(|e| {
            let at = reader.error_position();
            Error::corrupt(format!("byte {at}: is no XML: {e}")).at_byte(at)
        })?;
        let (Event::Start(tag) | Event::Empty(tag)) = event else {
            if matches!(event, Event::Eof) {
                break;
            }
            continue;
        };
        match tag.local_name().as_ref() {
            b"File" => {
                if let (Some(id), Some(href)) = (attribute(&tag, b"id"), attribute(&tag, b"href")) {
                    // A later `File` of the same ID replaces the earlier one. Which one counts makes no difference to
                    // safety: it is a name of a member in either case.
                    files.insert(id, (href, attribute(&tag, b"chunkSize").is_some()));
                }
            }
            // Each file once: its name may be long, and the references many.
            b"Disk" => {
                if let Some(file) = attribute(&tag, b"fileRef").filter(|file| seen.insert(file.clone())) {
                    disks.push(file);
                }
            }
            _ => {}
        }
    }
    let mut found = Vec::new();
    // A disk without a file is empty; one whose file is missing from the list is reported when it is opened.
    for (href, is_cut) in disks.iter().filter_map(|id| files.get(id)) {
        if *is_cut {
            return Err(Error::unsupported(format!(
                "the disk {} is cut into pieces (ovf:chunkSize); join them first: cat {}.* > {}",
                printable(href),
                shell_word(href),
                shell_word(href)
            )));
        }
        found.push(href.clone());
    }
    Ok(found)
}

/// Returns the value of an attribute, whatever its name space.
fn attribute(tag: &BytesStart<'_>, name: &[u8]) -> Option<String> {
    let found = tag
        .attributes()
        .flatten()
        .find(|a| a.key.local_name().as_ref() == name)?;
    Some(found.unescape_value().ok()?.into_owned())
}

/// Reads a text of the package.
fn read_text(members: &Arc<Members>, name: &str) -> Result<String> {
    let file = members.open(name)?;
    if file.len() > MAX_TEXT {
        let text = format!("has {} bytes, expected at most {MAX_TEXT}", file.len());
        return Err(Error::corrupt(text).in_file(file.label()));
    }
    let mut text = vec![0; file.len() as usize];
    file.read_exact_at(0, &mut text)?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// Parses a line `SHA256(NAME)= DIGITS` of a list of digests.
fn digest_line(line: &str) -> Option<(&'static digest::Algorithm, &str, Vec<u8>)> {
    let (algorithm, rest) = line.split_once('(')?;
    let (name, digits) = rest.rsplit_once(")=")?;
    let algorithm = match algorithm.trim().to_ascii_uppercase().as_str() {
        "SHA1" => &digest::SHA1_FOR_LEGACY_USE_ONLY,
        "SHA256" => &digest::SHA256,
        "SHA384" => &digest::SHA384,
        "SHA512" => &digest::SHA512,
        _ => return None,
    };
    let digits = digits.trim().as_bytes();
    let bytes = digits.chunks(2).map(|pair| {
        let text = std::str::from_utf8(pair).ok().filter(|text| text.len() == 2)?;
        u8::from_str_radix(text, 16).ok()
    });
    let bytes: Vec<u8> = bytes.collect::<Option<_>>()?;
    // A digest of another length would equal nothing, and its file would be reported as changed.
    (bytes.len() == algorithm.output_len()).then_some((algorithm, name, bytes))
}

fn digest_of(file: &dyn StoredFile, algorithm: &'static digest::Algorithm) -> Result<Vec<u8>> {
    let mut context = digest::Context::new(algorithm);
    let mut buf = vec![0; CHUNK];
    let mut at = 0;
    while at < file.len() {
        let len = (file.len() - at).min(CHUNK as u64) as usize;
        let part = buf.get_mut(..len).unwrap_or_default();
        file.read_exact_at(at, part)?;
        context.update(part);
        at += len as u64;
    }
    Ok(context.finish().as_ref().to_vec())
}

#[cfg(test)]
mod tests;
