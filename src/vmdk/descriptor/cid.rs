//! Content IDs as programs write them.

use crate::vmdk::descriptor::quotes;

/// Number of a content ID, with the digits that stand for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct CidText<'a> {
    pub(super) number: u32,
    /// Digits without a prefix: hexadecimal digits of the same length can take their place.
    pub(super) digits: &'a [u8],
    /// False for a spelling other than the format's 1 to 8 hexadecimal digits.
    pub(super) plain: bool,
}

/// Parses a content ID: hexadecimal digits, also with a prefix `0x` or leading zeroes; or more than eight decimal digits
/// (Xen Orchestra writes decimal ones). Up to eight digits are hexadecimal: which of both was meant is lost, but child
/// and parent have the same text. `None` for any other text, which stays as it is.
pub(super) fn parse(value: &[u8]) -> Option<CidText<'_>> {
    let (text, _) = quotes::word(value);
    let digits = [&b"0x"[..], b"0X"].iter().find_map(|prefix| text.strip_prefix(*prefix));
    let (digits, prefixed) = digits.map_or((text, false), |digits| (digits, true));
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    let significant = digits
        .iter()
        .position(|&b| b != b'0')
        .map_or(&b"0"[..], |at| &digits[at..]);
    let radix = if significant.len() <= 8 { 16 } else { 10 };
    // Without a sign, which `from_str_radix` would accept: all are digits.
    let number = u32::from_str_radix(std::str::from_utf8(significant).ok()?, radix).ok()?;
    if radix == 10 && prefixed {
        return None;
    }
    Some(CidText {
        number,
        digits,
        plain: !prefixed && digits.len() <= 8 && text.len() == value.len(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_spelling_of_a_cid_is_its_number() {
        let number = |text: &str| parse(text.as_bytes()).map(|cid| (cid.number, cid.plain));
        assert_eq!(number("fffffffe"), Some((0xffff_fffe, true)));
        assert_eq!(number("12AB"), Some((0x12ab, true)));
        assert_eq!(number("0xfffffffe"), Some((0xffff_fffe, false)));
        assert_eq!(number("00000000fffffffe"), Some((0xffff_fffe, false)));
        assert_eq!(number("3204984721"), Some((3_204_984_721, false)));
        assert_eq!(number("4294967295"), Some((u32::MAX, false)));
        assert_eq!(
            number("12345678"),
            Some((0x1234_5678, true)),
            "eight digits are hexadecimal"
        );
        assert_eq!(number("0000000000"), Some((0, false)));
        for opaque in ["", "xyz", "-1", "+1", "4294967296", "0x", "0x123456789", "123456789a"] {
            assert_eq!(number(opaque), None, "{opaque}");
        }
    }
}
