//! Listings of folders: pages of links, of which nothing but the links themselves is read.
//!
//! ```text
//!   page ─► href values ─► resolved against the folder's own address ─► same server, one component below ─► name
//! ```
//! Servers write such pages in many ways: an ESXi names the whole path and a query, nginx and others the bare name. A link
//! counts only where it leads to a file or a folder directly in the folder that was asked for. All others are left out:
//! those to other servers, to folders above, and those that sort the page.
//!
//! Bounds: a page is read up to [`MAX_PAGE`], and may name [`MAX_NAMES`] files.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use reqwest::Url;

use super::address::{percent_decode, query_value, same_origin};
use crate::error::{Error, Result};

/// Longest page in bytes: a folder of a hundred thousand files.
pub(super) const MAX_PAGE: usize = 16 << 20;
/// Most files of one folder.
const MAX_NAMES: usize = 100_000;
/// Longest name in bytes, that of file systems. A longer one would be no file name in a mount.
const MAX_NAME: usize = 255;

/// File or folder in a listing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedName {
    /// Its name, without a slash. Need not be UTF-8, and may hold any character but `/` and NUL.
    pub name: OsString,
    /// True for a folder, as far as the link shows it by a slash at its end.
    pub is_folder: bool,
}

/// Returns the files and folders that a page names, sorted. `folder` is the address of the page.
///
/// Errors: there are too many.
pub(super) fn names(page: &[u8], folder: &Url) -> Result<Vec<ListedName>> {
    // A slash at its end makes a bare name lead into the folder.
    let mut base = folder.clone();
    base.set_path(&format!("{}/", folder.path().trim_end_matches('/')));
    // Decoded, as a server may encode more or less of its own path than the address that was asked for.
    let parts = decoded_parts(base.path());
    let mut found = BTreeMap::new();
    for link in links(page, &base) {
        if let Some((name, is_folder)) = name_below(&link, &parts) {
            *found.entry(name).or_insert(false) |= is_folder;
        }
        if found.len() > MAX_NAMES {
            return Err(Error::corrupt(format!(
                "the listing names more than {MAX_NAMES} files; list a folder below it"
            )));
        }
    }
    let listed = |(name, is_folder)| ListedName { name, is_folder };
    Ok(found.into_iter().map(listed).collect())
}

/// Returns the values that the links of a page have for `key` in their query, sorted: the datacenters or datastores of a
/// server. `folder` is the address of the page.
pub(super) fn query_values(page: &[u8], folder: &Url, key: &str) -> Vec<String> {
    let values = links(page, folder).filter_map(|link| {
        let is_root = link.path().trim_end_matches('/') == folder.path().trim_end_matches('/');
        let value = query_value(&link, key).filter(|value| !value.is_empty() && value.len() <= MAX_NAME);
        value.filter(|_| is_root)
    });
    let found: BTreeSet<String> = values.take(MAX_NAMES).collect();
    found.into_iter().collect()
}

/// Returns the links of a page that lead to the server of `base`.
fn links<'a>(page: &'a [u8], base: &'a Url) -> impl Iterator<Item = Url> + 'a {
    let links = Hrefs { rest: page }.filter_map(|href| base.join(&href).ok());
    links.filter(|link| same_origin(link, base))
}

/// Returns the components of a path, decoded.
fn decoded_parts(path: &str) -> Vec<Vec<u8>> {
    let path = path.strip_prefix('/').unwrap_or(path);
    let path = path.strip_suffix('/').unwrap_or(path);
    let parts = path.split('/').filter(|_| !path.is_empty());
    parts.map(percent_decode).collect()
}

/// Returns the name that a link leads to, if it is directly in the folder of these components, and true for a folder.
fn name_below(link: &Url, folder: &[Vec<u8>]) -> Option<(OsString, bool)> {
    let is_folder = link.path().ends_with('/');
    let mut parts = decoded_parts(link.path());
    let name = parts.pop().filter(|_| parts == folder)?;
    let is_name = !name.is_empty() && name.len() <= MAX_NAME && !name.iter().any(|b| matches!(b, b'/' | 0));
    // Not resolved by the parser of URLs where a server encodes twice.
    let is_up = name == b"." || name == b"..";
    (is_name && !is_up).then(|| (OsString::from_vec(name), is_folder))
}

/// The values of `href` in the `<a>` tags of a page.
struct Hrefs<'a> {
    rest: &'a [u8],
}

impl Iterator for Hrefs<'_> {
    type Item = String;

    fn next(&mut self) -> Option<String> {
        loop {
            let at = self.rest.iter().position(|b| *b == b'<')?;
            self.rest = self.rest.get(at + 1..)?;
            if let Some(comment) = self.rest.strip_prefix(b"!--") {
                let end = comment.windows(3).position(|end| end == b"-->")?;
                self.rest = comment.get(end..)?;
            } else if let [b'a' | b'A', next, ..] = self.rest
                && next.is_ascii_whitespace()
            {
                let href = self.attributes();
                if href.is_some() {
                    return href;
                }
            }
        }
    }
}

impl<'a> Hrefs<'a> {
    /// Reads the attributes of a tag up to its end. Returns the value of `href`, if it is text.
    fn attributes(&mut self) -> Option<String> {
        self.take_while(|b| !b.is_ascii_whitespace() && b != b'>');
        let mut href = None;
        loop {
            self.take_while(|b| b.is_ascii_whitespace() || b == b'/');
            let name = self.take_while(|b| !b.is_ascii_whitespace() && !matches!(b, b'=' | b'>' | b'/'));
            self.take_while(|b| b.is_ascii_whitespace());
            let value = match self.rest.split_first() {
                Some((b'=', rest)) => {
                    self.rest = rest;
                    self.value()
                }
                Some((b'>', _)) | None => return href,
                // An attribute without a value.
                Some(_) if !name.is_empty() => continue,
                Some((_, rest)) => {
                    self.rest = rest;
                    continue;
                }
            };
            if name.eq_ignore_ascii_case(b"href") && href.is_none() {
                href = std::str::from_utf8(value).ok().map(unescape);
            }
        }
    }

    /// Reads the value of an attribute, with or without quotes.
    fn value(&mut self) -> &'a [u8] {
        self.take_while(|b| b.is_ascii_whitespace());
        match self.rest.split_first() {
            Some((quote @ (b'"' | b'\''), rest)) => {
                self.rest = rest;
                let value = self.take_while(|b| b != *quote);
                self.rest = self.rest.get(1..).unwrap_or_default();
                value
            }
            _ => self.take_while(|b| !b.is_ascii_whitespace() && b != b'>'),
        }
    }

    fn take_while(&mut self, belongs: impl Fn(u8) -> bool) -> &'a [u8] {
        let end = self.rest.iter().position(|b| !belongs(*b)).unwrap_or(self.rest.len());
        let (taken, rest) = self.rest.split_at(end);
        self.rest = rest;
        taken
    }
}

/// Replaces the character references of HTML that stand in links.
fn unescape(text: &str) -> String {
    const NAMED: [(&str, char); 5] = [("amp", '&'), ("lt", '<'), ("gt", '>'), ("quot", '"'), ("apos", '\'')];
    /// Longest reference: that of the last code point.
    const MAX_REFERENCE: usize = 10;
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('&') {
        let (before, reference) = rest.split_at(at);
        out.push_str(before);
        let end = reference.bytes().take(MAX_REFERENCE).position(|b| b == b';');
        let name = end.and_then(|end| reference.get(1..end)).unwrap_or_default();
        let numbered = name.strip_prefix('#').and_then(|number| {
            let number = match number.strip_prefix(['x', 'X']) {
                Some(digits) => u32::from_str_radix(digits, 16),
                None => number.parse(),
            };
            char::from_u32(number.ok()?)
        });
        let named = NAMED.iter().find(|(known, _)| *known == name).map(|(_, c)| *c);
        match (numbered.or(named), end) {
            (Some(c), Some(end)) => {
                out.push(c);
                rest = reference.get(end + 1..).unwrap_or_default();
            }
            _ => {
                out.push('&');
                rest = reference.get(1..).unwrap_or_default();
            }
        }
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const FOLDER: &str = "https://esx/folder/vm%201?dcPath=ha-datacenter&dsName=ds";

    fn listed(page: &str) -> Vec<String> {
        let show = |listed: &ListedName| {
            let slash = if listed.is_folder { "/" } else { "" };
            format!("{}{slash}", listed.name.to_string_lossy())
        };
        let names = names(page.as_bytes(), &Url::parse(FOLDER).unwrap());
        names.unwrap().iter().map(show).collect()
    }

    #[test]
    fn the_forms_of_an_esxi_of_nginx_and_of_a_simulator_are_understood() {
        let esxi = "<table><tr><td><a href=\"/folder?dcPath=ha%2ddatacenter&amp;dsName=ds\">Parent Directory</a></td></tr>\
            <tr><td><a href=\"/folder/vm%201/a%20b%5b1%5d.vmdk?dcPath=ha%2ddatacenter&amp;dsName=ds\">x</a></td></tr>\
            <tr><td><a href=\"/folder/vm%201/sub/?dcPath=ha%2ddatacenter&amp;dsName=ds\">sub/</a></td></tr>";
        assert_eq!(listed(esxi), ["a b[1].vmdk", "sub/"]);
        let nginx =
            "<h1>Index of /</h1><a href=\"../\">../</a>\n<a href=\"b.vmdk\">b.vmdk</a> 1-Jan\n<A\nHREF=c%26d>c</A>";
        assert_eq!(listed(nginx), ["b.vmdk", "c&d"]);
        let other = "<a href=\"/folder/v%6D%201/%5Bz%5D\">";
        assert_eq!(listed(other), ["[z]"]);
        let simulator = "<pre>\n<a href='e.vmdk'>e</a>\n<a title=x href = \"f/\">f/</a><a name=g>g</a>\n</pre>";
        assert_eq!(listed(simulator), ["e.vmdk", "f/"]);
        let apache = "<a href=\"?C=N;O=D\">Name</a><a href=\"/folder/\">Parent</a><a href=\"a&#46;img\">a</a>\
            <a href=\"h&amp;i\">h</a><a href=\"&none;\">k</a>";
        assert_eq!(listed(apache), ["&none;", "a.img", "h&i"]);
    }

    #[test]
    fn links_that_lead_anywhere_else_are_left_out() {
        for href in [
            "https://evil/folder/vm%201/x.vmdk",
            "//evil/folder/vm%201/x.vmdk",
            "http://esx/folder/vm%201/x.vmdk",
            "https://esx:444/folder/vm%201/x.vmdk",
            "../x.vmdk",
            "..%2fx.vmdk",
            "%2e%2e/x.vmdk",
            "%252e%252e/x.vmdk",
            "..",
            "%2e%2e",
            ".%2E",
            "%2F",
            "a%00b",
            "/folder/vm%201//x",
            "/folder/vm%201%2Fx",
            "a/b.vmdk",
            "..\\x.vmdk",
            "/folder/other/x.vmdk",
            "/etc/passwd",
            "javascript:x",
            "file:///etc/passwd",
            "",
            "#x",
            "./",
        ] {
            assert_eq!(listed(&format!("<a href=\"{href}\">x</a>")), [""; 0], "{href}");
        }
        let long = "n".repeat(MAX_NAME + 1);
        assert_eq!(listed(&format!("<a href=\"{long}\">")), [""; 0]);
        assert_eq!(listed("<!-- <a href=\"x\"> --><a href=\"y\">"), ["y"]);
    }

    #[test]
    fn broken_pages_end_without_a_panic() {
        let page = "<a href=\"a&#x10FFFF;b\" x><a =\"\"/href='c'><!-- <a\n<a href=<a><a href";
        for end in 0..=page.len() {
            listed(&page[..end]);
        }
        let random = (0..4096u32).map(|n| b"<a hrf=\"'>&#;x!-/ "[(n.wrapping_mul(2_654_435_761) >> 13) as usize % 18]);
        let page: Vec<u8> = random.collect();
        assert!(names(&page, &Url::parse(FOLDER).unwrap()).is_ok());
    }

    #[test]
    fn a_listing_without_bound_is_refused() {
        let page: String = (0..=MAX_NAMES).map(|n| format!("<a href={n}>")).collect();
        let error = names(page.as_bytes(), &Url::parse(FOLDER).unwrap()).unwrap_err();
        assert!(error.to_string().contains("more than 100000 files"), "{error}");
    }

    #[test]
    fn datacenters_and_datastores_are_values_of_queries() {
        let page = "<a href=\"/folder?dcPath=ha%252ddatacenter\">x</a><a href=\"/folder/?dcPath=F%2FA&amp;dsName=d%20s\">\
            <a href=\"https://evil/folder?dcPath=x\"><a href=\"/other?dcPath=y\"><a href=\"/folder?dcPath=\">";
        let root = Url::parse("https://esx/folder").unwrap();
        assert_eq!(query_values(page.as_bytes(), &root, "dcPath"), ["F/A", "ha-datacenter"]);
        assert_eq!(query_values(page.as_bytes(), &root, "dsName"), ["d s"]);
    }
}
