//! Quotes and blanks of a descriptor: VMware's, and those that editors and web pages put in their place.
//!
//! Only `"` is valid. Texts that went through a word processor or a web page have typographic quotes and no-break
//! spaces; they are read alike, as no other meaning is possible at these places.

/// Text at the start of a value or of a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Quoted<'a> {
    /// Text between quotes, the text after the closing one, and true if the quotes are not `"`.
    Closed { inner: &'a [u8], rest: &'a [u8], odd: bool },
    /// The closing quote is missing.
    Unclosed,
    /// The text starts with no quote.
    Bare,
}

/// Double quotes: typographic ones in UTF-8, and `"`.
const DOUBLE: [&[u8]; 7] = [
    b"\"",
    "\u{201c}".as_bytes(),
    "\u{201d}".as_bytes(),
    "\u{201e}".as_bytes(),
    "\u{201f}".as_bytes(),
    "\u{ab}".as_bytes(),
    "\u{bb}".as_bytes(),
];
/// Single quotes: typographic ones in UTF-8, and `'`.
const SINGLE: [&[u8]; 5] = [
    b"'",
    "\u{2018}".as_bytes(),
    "\u{2019}".as_bytes(),
    "\u{201a}".as_bytes(),
    "\u{201b}".as_bytes(),
];
/// Typographic quotes of windows-1252, double and single.
const WINDOWS: [&[&[u8]]; 2] = [&[b"\x93", b"\x94", b"\x84"], &[b"\x91", b"\x92", b"\x82"]];

/// Splits `text` after the value in quotes that it starts with.
pub(super) fn quoted(text: &[u8]) -> Quoted<'_> {
    if let Some(body) = text.strip_prefix(b"\"") {
        // `"` is searched for alone first: a typographic quote may be a part of a name.
        return match body.iter().position(|&b| b == b'"') {
            Some(end) => closed(body, end, 1, false),
            None => find(body, &DOUBLE).map_or(Quoted::Unclosed, |(end, len)| closed(body, end, len, true)),
        };
    }
    if let Some(body) = text.strip_prefix(b"'") {
        // An apostrophe inside of a name is followed by a letter.
        let end = (0..body.len()).find(|&at| body[at] == b'\'' && ends_word(&body[at + 1..]));
        return end.map_or(Quoted::Unclosed, |end| closed(body, end, 1, true));
    }
    for set in [&DOUBLE[..], &SINGLE] {
        if let Some(body) = set.iter().find_map(|quote| text.strip_prefix(*quote)) {
            return find(body, set).map_or(Quoted::Unclosed, |(end, len)| closed(body, end, len, true));
        }
    }
    for set in WINDOWS {
        // The same bytes start characters of East Asian encodings, so only ASCII between two of them is certain.
        if let Some(body) = set.iter().find_map(|quote| text.strip_prefix(*quote))
            && let Some((end, len)) = find(body, set)
            && body[..end].is_ascii()
        {
            return closed(body, end, len, true);
        }
    }
    Quoted::Bare
}

/// Returns the length of the blank at the start of `text`, 0 if there is none.
pub(super) fn blank_len(text: &[u8]) -> usize {
    match text {
        [b, ..] if b.is_ascii_whitespace() || *b == 0x0b => 1,
        // U+00A0, and U+FEFF, U+2000 to U+200B, U+202F and U+3000.
        [0xc2, 0xa0, ..] => 2,
        [0xef, 0xbb, 0xbf, ..] | [0xe2, 0x80, 0x80..=0x8b | 0xaf, ..] | [0xe3, 0x80, 0x80, ..] => 3,
        _ => 0,
    }
}

/// Returns `text` without the blanks at its start.
pub(super) fn trim_start(mut text: &[u8]) -> &[u8] {
    while let len @ 1.. = blank_len(text) {
        text = &text[len..];
    }
    text
}

/// Returns `text` without the blanks at both ends.
pub(super) fn trim(text: &[u8]) -> &[u8] {
    let mut text = trim_start(text).trim_ascii_end();
    while let Some(len) = [2, 3].into_iter().find(|&len| {
        let tail = text.len().checked_sub(len).and_then(|at| text.get(at..));
        tail.is_some_and(|tail| blank_len(tail) == len)
    }) {
        text = text[..text.len() - len].trim_ascii_end();
    }
    text
}

/// Splits `text` after its first word. The word is empty at the end of the text.
pub(super) fn word(text: &[u8]) -> (&[u8], &[u8]) {
    let text = trim_start(text);
    let end = (0..text.len()).find(|&at| blank_len(&text[at..]) > 0);
    text.split_at(end.unwrap_or(text.len()))
}

fn closed(body: &[u8], end: usize, len: usize, odd: bool) -> Quoted<'_> {
    Quoted::Closed {
        inner: &body[..end],
        rest: &body[end + len..],
        odd,
    }
}

/// Returns the position and the length of the first of `quotes` in `body`.
fn find(body: &[u8], quotes: &[&[u8]]) -> Option<(usize, usize)> {
    (0..body.len()).find_map(|at| {
        let quote = quotes.iter().find(|quote| body[at..].starts_with(quote))?;
        Some((at, quote.len()))
    })
}

/// Returns true if `rest` is empty or starts with a blank.
fn ends_word(rest: &[u8]) -> bool {
    rest.is_empty() || blank_len(rest) > 0
}
