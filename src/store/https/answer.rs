//! Checks of the server's answers: nothing that a server sends is used unless it is what was asked for.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use reqwest::StatusCode;
use reqwest::header::{
    CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, ETAG, HeaderMap, HeaderName, TRANSFER_ENCODING,
};
use reqwest::header::{LAST_MODIFIED, RETRY_AFTER};

use crate::store::printable;

/// Longest header value that is used, in bytes: an ETag or a date is far shorter.
const MAX_VALUE: usize = 1024;

/// Longest file, in bytes: more than any disk. Positions behind it would overflow where blocks are numbered.
const MAX_LEN: u64 = 1 << 52;

/// Values by which a file's content is recognized.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Version {
    /// Length in bytes.
    pub(super) len: u64,
    pub(super) etag: Option<String>,
    pub(super) modified: Option<String>,
}

impl Version {
    /// Returns the version that an answer has, if its headers name one.
    pub(super) fn of(len: u64, headers: &HeaderMap) -> Self {
        Self {
            len,
            etag: text(headers, ETAG),
            modified: text(headers, LAST_MODIFIED),
        }
    }

    /// Returns the difference to a later answer's version, in words. A value that one of both lacks is not compared:
    /// servers behind a balancer may send different headers.
    pub(super) fn difference(&self, now: &Self) -> Option<String> {
        let differs = |name: &str, old: &Option<String>, new: &Option<String>| match (old, new) {
            (Some(old), Some(new)) if old != new => {
                let (old, new) = (printable(old), printable(new));
                Some(format!("its {name} was {old} when it was opened, and is {new}"))
            }
            _ => None,
        };
        if self.len != now.len {
            return Some(format!(
                "it had {} bytes when it was opened, and has {}",
                self.len, now.len
            ));
        }
        differs("ETag", &self.etag, &now.etag).or_else(|| differs("Last-Modified", &self.modified, &now.modified))
    }

    /// Returns the validator for If-Range, which only a strong ETag is.
    pub(super) fn if_range(&self) -> Option<&str> {
        self.etag.as_deref().filter(|etag| etag.starts_with('"'))
    }

    /// Returns the time of the last change in nanoseconds since 1970, or 0 if it is not known.
    pub(super) fn modified_ns(&self) -> i128 {
        let time = self
            .modified
            .as_deref()
            .and_then(|text| httpdate::parse_http_date(text).ok());
        let since = time.and_then(|time| time.duration_since(UNIX_EPOCH).ok());
        since.map_or(0, |since| i128::try_from(since.as_nanos()).unwrap_or(0))
    }
}

/// Returns the version that the answer to a request for the headers of a file has. `None`: the length is missing.
pub(super) fn version_of(headers: &HeaderMap) -> Option<Version> {
    let len = body_len(headers).filter(|len| *len <= MAX_LEN)?;
    Some(Version::of(len, headers))
}

/// Part of a file that an answer holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Part {
    /// Number of bytes in the body, from the start that was asked for.
    pub(super) len: u64,
    pub(super) version: Version,
}

/// Reason why an answer cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Misfit {
    /// The file is another one than when it was opened.
    Changed(String),
    /// The server does not send ranges.
    NoRanges(String),
    /// A page for people in place of the file: a login page, or the listing of a folder.
    Page,
    /// The file is longer than any disk.
    TooLong(u64),
    /// The answer contradicts the request.
    Wrong(String),
}

/// Returns whether the headers give the length of the body, so that [`check`] has compared it.
pub(super) fn announces_length(headers: &HeaderMap) -> bool {
    body_len(headers).is_some() && !headers.contains_key(TRANSFER_ENCODING)
}

fn body_len(headers: &HeaderMap) -> Option<u64> {
    text(headers, CONTENT_LENGTH)?.parse().ok()
}

/// Checks the headers of a successful answer to a request for bytes from `start` on, at most `len`. `known` is the
/// version of the file at its open; `None` for the open itself, when the file may be shorter than the range.
pub(super) fn check(
    status: StatusCode,
    headers: &HeaderMap,
    start: u64,
    len: u64,
    known: Option<&Version>,
) -> Result<Part, Misfit> {
    // Some servers compress whatever the request says. Its bytes are not those of the range.
    if let Some(encoding) = text(headers, CONTENT_ENCODING).filter(|e| !e.eq_ignore_ascii_case("identity")) {
        let encoding = printable(encoding);
        return Err(Misfit::Wrong(format!(
            "the body is encoded ({encoding}), which was not asked for"
        )));
    }
    let kind = text(headers, CONTENT_TYPE).unwrap_or_default().to_ascii_lowercase();
    let body = body_len(headers);
    let part = match status {
        StatusCode::PARTIAL_CONTENT if kind.starts_with("multipart/") => {
            return Err(Misfit::Wrong("one range was asked for, and several came".to_owned()));
        }
        StatusCode::PARTIAL_CONTENT => ranged(headers, start, len, known)?,
        // Before anything is compared: a login page has the status of success, and the file's name.
        StatusCode::OK if kind.starts_with("text/html") => return Err(Misfit::Page),
        StatusCode::OK => whole(headers, body, start, len, known)?,
        other => return Err(Misfit::Wrong(format!("unexpected status {other}"))),
    };
    // Before offsets are computed with it, which could overflow near the largest number.
    if part.version.len > MAX_LEN {
        return Err(Misfit::TooLong(part.version.len));
    }
    if body.is_some_and(|body| body != part.len) {
        return Err(Misfit::Wrong(format!(
            "expected a body of {} bytes, but Content-Length is {}",
            part.len,
            body.unwrap_or_default()
        )));
    }
    match known.and_then(|known| known.difference(&part.version)) {
        Some(difference) => Err(Misfit::Changed(difference)),
        None => Ok(part),
    }
}

/// Checks a 206.
fn ranged(headers: &HeaderMap, start: u64, len: u64, known: Option<&Version>) -> Result<Part, Misfit> {
    let value = text(headers, CONTENT_RANGE).unwrap_or_default();
    let Some((first, last, total)) = parse_range(&value) else {
        let value = printable(value);
        return Err(Misfit::Wrong(format!("206 with the Content-Range \"{value}\"")));
    };
    let total = match (total, known) {
        (Some(total), _) => total,
        // `*` for the total is allowed; the length cannot be compared then, and the other validators still are.
        (None, Some(known)) => known.len,
        (None, None) => {
            return Err(Misfit::Wrong(
                "Content-Range does not tell the length of the file".to_owned(),
            ));
        }
    };
    // Before the range is compared: a file that has become shorter has another range, and is to be named as changed.
    let version = Version::of(total, headers);
    if let Some(difference) = known.and_then(|known| known.difference(&version)) {
        return Err(Misfit::Changed(difference));
    }
    // A range may reach over the end of a file whose length was not known when it was asked for. Nothing else may differ:
    // an answer with other bytes, though well formed, would be cached under the wrong offset.
    let end = start.saturating_add(len).min(total);
    if first != start || last.checked_add(1) != Some(end) {
        return Err(Misfit::Wrong(format!(
            "bytes {start}-{} of {total} were asked for, but Content-Range is {first}-{last}",
            end.saturating_sub(1)
        )));
    }
    let len = end - start;
    Ok(Part { len, version })
}

/// Checks a 200, which is the whole file: of use only if that is what was asked for.
fn whole(
    headers: &HeaderMap,
    body: Option<u64>,
    start: u64,
    len: u64,
    known: Option<&Version>,
) -> Result<Part, Misfit> {
    let Some(total) = body else {
        return Err(Misfit::NoRanges(
            "the answer to a range is the whole file, of unknown length".to_owned(),
        ));
    };
    let version = Version::of(total, headers);
    // With If-Range, a server answers so for a file that has changed.
    if let Some(difference) = known.and_then(|known| known.difference(&version)) {
        return Err(Misfit::Changed(difference));
    }
    // A server may answer so to a range that is the whole file.
    let all = known.map_or(total <= len, |known| known.len == len);
    if start == 0 && all {
        return Ok(Part { len: total, version });
    }
    Err(Misfit::NoRanges(format!(
        "the answer to a range is the whole file of {total} bytes (status 200)"
    )))
}

/// Parses `bytes FIRST-LAST/TOTAL`, where the total may be `*`.
fn parse_range(value: &str) -> Option<(u64, u64, Option<u64>)> {
    let (unit, rest) = value.trim().split_once(' ')?;
    let (range, total) = rest.trim().split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let number = |text: &str| {
        let text = text.trim();
        // The parser of the language accepts a plus sign, the header does not.
        text.parse::<u64>()
            .ok()
            .filter(|_| text.bytes().all(|b| b.is_ascii_digit()))
    };
    let (first, last) = (number(first)?, number(last)?);
    let total = match total.trim() {
        "*" => None,
        total => Some(number(total)?),
    };
    let fits = first <= last && last < u64::MAX && total.is_none_or(|total| last < total);
    (unit.eq_ignore_ascii_case("bytes") && fits).then_some((first, last, total))
}

/// Returns true for the answer to a range of an empty file: 416 with `bytes */0`.
pub(super) fn is_empty_file(headers: &HeaderMap) -> bool {
    text(headers, CONTENT_RANGE).is_some_and(|value| value.replace(' ', "").eq_ignore_ascii_case("bytes*/0"))
}

/// Returns the pause that a server asks for, in seconds or as a date.
pub(super) fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = text(headers, RETRY_AFTER)?;
    match text.trim().parse::<u64>() {
        Ok(seconds) => Some(Duration::from_secs(seconds)),
        Err(_) => {
            let at = httpdate::parse_http_date(text.trim()).ok()?;
            Some(at.duration_since(SystemTime::now()).unwrap_or_default())
        }
    }
}

/// Returns the value of a header if it is text of a reasonable length.
pub(super) fn text(headers: &HeaderMap, name: HeaderName) -> Option<String> {
    let value = headers.get(name)?.to_str().ok()?;
    (value.len() <= MAX_VALUE).then(|| value.to_owned())
}

#[cfg(test)]
mod tests {
    use reqwest::header::HeaderValue;

    use super::*;

    fn headers(pairs: &[(HeaderName, &str)]) -> HeaderMap {
        let pairs = pairs
            .iter()
            .map(|(name, value)| (name.clone(), HeaderValue::from_str(value).unwrap()));
        pairs.collect()
    }

    fn ranged(value: &str, start: u64, len: u64, known: Option<&Version>) -> Result<u64, Misfit> {
        let headers = headers(&[(CONTENT_RANGE, value)]);
        check(StatusCode::PARTIAL_CONTENT, &headers, start, len, known).map(|part| part.len)
    }

    fn version(len: u64) -> Version {
        Version {
            len,
            etag: Some("\"a\"".to_owned()),
            modified: None,
        }
    }

    #[test]
    fn a_range_must_be_the_one_that_was_asked_for() {
        let known = version(100);
        assert_eq!(ranged("bytes 10-19/100", 10, 10, Some(&known)), Ok(10));
        assert_eq!(ranged("bytes 10-19/*", 10, 10, Some(&known)), Ok(10));
        assert_eq!(ranged("bytes 0-99/100", 0, 4096, None), Ok(100));
        for wrong in [
            "bytes 11-20/100",
            "bytes 10-18/100",
            "bytes 10-20/100",
            "bytes 0-9/100",
            "",
            "bytes",
            "10-19/100",
            "bytes 19-10/100",
            "bytes 10-19/15",
            "bytes -10-19/100",
            "bytes +10-19/100",
            "bytes 10-19",
            "items 10-19/100",
            "bytes 10-99999999999999999999/100",
            "bytes 10-18446744073709551615/*",
        ] {
            let answer = ranged(wrong, 10, 10, Some(&known));
            assert!(matches!(answer, Err(Misfit::Wrong(_))), "{wrong}: {answer:?}");
        }
        assert!(matches!(
            ranged("bytes 10-19/99", 10, 10, Some(&known)),
            Err(Misfit::Changed(_))
        ));
        assert!(matches!(ranged("bytes 0-9/*", 0, 10, None), Err(Misfit::Wrong(_))));
    }

    #[test]
    fn a_file_that_is_longer_than_any_disk_is_refused_at_its_open() {
        for len in [MAX_LEN + 1, u64::MAX - 4096, u64::MAX] {
            let answer = ranged(&format!("bytes 0-4095/{len}"), 0, 4096, None);
            assert_eq!(answer, Err(Misfit::TooLong(len)));
            assert_eq!(version_of(&headers(&[(CONTENT_LENGTH, &len.to_string())])), None);
        }
        assert_eq!(ranged(&format!("bytes 0-4095/{MAX_LEN}"), 0, 4096, None), Ok(4096));
    }

    #[test]
    fn a_whole_file_is_used_only_where_the_whole_file_was_asked_for() {
        let ok = |len: &str, start, asked, known: Option<&Version>| {
            check(StatusCode::OK, &headers(&[(CONTENT_LENGTH, len)]), start, asked, known).map(|part| part.len)
        };
        assert_eq!(ok("100", 0, 4096, None), Ok(100));
        assert_eq!(ok("100", 0, 100, Some(&version(100))), Ok(100));
        assert!(matches!(ok("5000", 0, 4096, None), Err(Misfit::NoRanges(_))));
        assert!(matches!(
            ok("100", 0, 50, Some(&version(100))),
            Err(Misfit::NoRanges(_))
        ));
        assert!(matches!(
            ok("100", 50, 50, Some(&version(100))),
            Err(Misfit::NoRanges(_))
        ));
        assert!(matches!(
            ok("101", 50, 50, Some(&version(100))),
            Err(Misfit::Changed(_))
        ));
    }

    #[test]
    fn changed_files_pages_encodings_and_several_ranges_are_told_apart() {
        let with = |status, pairs: &[(HeaderName, &str)]| check(status, &headers(pairs), 0, 10, Some(&version(100)));
        let range = (CONTENT_RANGE, "bytes 0-9/100");
        let partial = StatusCode::PARTIAL_CONTENT;
        assert!(matches!(
            with(partial, &[range.clone(), (ETAG, "\"b\"")]),
            Err(Misfit::Changed(_))
        ));
        assert!(with(partial, &[range.clone(), (ETAG, "\"a\"")]).is_ok());
        let page = (CONTENT_TYPE, "text/html; charset=utf-8");
        assert_eq!(with(StatusCode::OK, &[page]), Err(Misfit::Page));
        for wrong in [
            (CONTENT_TYPE, "multipart/byteranges; boundary=x"),
            (CONTENT_ENCODING, "gzip"),
            (CONTENT_LENGTH, "9"),
        ] {
            assert!(matches!(with(partial, &[range.clone(), wrong]), Err(Misfit::Wrong(_))));
        }
    }

    #[test]
    fn pauses_are_seconds_or_a_date() {
        assert_eq!(
            retry_after(&headers(&[(RETRY_AFTER, "3")])),
            Some(Duration::from_secs(3))
        );
        let past = headers(&[(RETRY_AFTER, "Wed, 21 Oct 2015 07:28:00 GMT")]);
        assert_eq!(retry_after(&past), Some(Duration::ZERO));
        assert_eq!(retry_after(&headers(&[(RETRY_AFTER, "soon")])), None);
    }

    #[test]
    fn only_a_strong_etag_goes_into_if_range() {
        let with = |etag: &str| Version {
            etag: Some(etag.to_owned()),
            ..version(1)
        };
        assert_eq!(with("\"x\"").if_range(), Some("\"x\""));
        assert_eq!(with("W/\"x\"").if_range(), None);
    }
}
