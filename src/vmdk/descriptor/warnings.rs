//! Warnings about a descriptor, and its text in messages.

use crate::store::printable;

/// Maximum number of warnings that are kept.
const WARNINGS_MAX: usize = 8;

/// Defects of a descriptor that decide no byte here and that other programs may refuse.
#[derive(Debug, Default)]
pub(super) struct Warnings {
    texts: Vec<String>,
    more: usize,
}

impl Warnings {
    pub(super) fn add(&mut self, text: String) {
        if self.texts.len() < WARNINGS_MAX {
            self.texts.push(text);
        } else {
            self.more += 1;
        }
    }

    /// Returns the warnings; the last one counts those that were not kept.
    pub(super) fn finish(mut self) -> Vec<String> {
        if self.more > 0 {
            self.texts.push(format!("{} more lines like these", self.more));
        }
        self.texts
    }
}

/// Returns a part of the text for a message: printable, and truncated after 60 characters.
pub(super) fn shown(bytes: &[u8]) -> String {
    const MAX_CHARS: usize = 60;
    let text = printable(std::ffi::OsString::from(String::from_utf8_lossy(bytes).into_owned()));
    match text.char_indices().nth(MAX_CHARS) {
        Some((cut, _)) => format!("{}…", &text[..cut]),
        None => text,
    }
}
