//! Bodies for people: the listing of a folder, and the text of an error.
//!
//! Bounds: a listing is read up to [`MAX_PAGE`], a text up to [`MAX_ERROR_TEXT`].

use reqwest::header::CONTENT_TYPE;

use super::answer::{self, Version};
use super::failure::Failure;
use super::listing::MAX_PAGE;
use super::request::{Limits, Piece};
use super::transport::Answer;
use crate::error::ErrorKind;
use crate::store::printable;

/// Bytes of the text of an error answer that are read.
const MAX_ERROR_TEXT: usize = 4096;

/// Passes the page of a folder to `sink`, as a whole.
pub(super) fn page(mut answer: Answer, limits: Limits<'_>, sink: Piece<'_>) -> Result<Version, Failure> {
    let kind = answer::text(&answer.headers, CONTENT_TYPE).unwrap_or_default();
    if !kind.to_ascii_lowercase().starts_with("text/html") {
        return Err(Failure::fatal(
            ErrorKind::Unsupported,
            "is a file and not a folder: --info describes a file",
        ));
    }
    let mut page = Vec::new();
    while answer.read(limits, &mut |bytes| page.extend_from_slice(bytes))? {
        if page.len() > MAX_PAGE {
            let text = format!("the listing is longer than {} MiB", MAX_PAGE >> 20);
            return Err(Failure::fatal(ErrorKind::Corrupt, text));
        }
    }
    sink(&page);
    Ok(Version::of(page.len() as u64, &answer.headers))
}

/// Returns the first line of the text of an error answer, after a colon; empty if there is none.
pub(super) fn error_text(mut answer: Answer, limits: Limits<'_>) -> String {
    let mut text = Vec::new();
    while let Ok(true) = answer.read(limits, &mut |bytes| text.extend_from_slice(bytes)) {
        if text.len() > MAX_ERROR_TEXT {
            break;
        }
    }
    let text = String::from_utf8_lossy(&text);
    let line = text.lines().next().unwrap_or_default().trim();
    // A page in HTML says nothing in its first line.
    if line.is_empty() || line.starts_with('<') {
        return String::new();
    }
    format!(": {}", printable(line.chars().take(200).collect::<String>()))
}
