//! Bytes in a buffer of fixed size. What does not fit is left out, so that no operation can fail.

/// Up to `N` bytes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bytes<const N: usize> {
    bytes: [u8; N],
    len: usize,
}

impl<const N: usize> Bytes<N> {
    /// Creates an empty buffer.
    pub(crate) const fn new() -> Self {
        Self { bytes: [0; N], len: 0 }
    }

    /// Appends `more`, as far as it fits.
    pub(crate) fn push(&mut self, more: &[u8]) -> &mut Self {
        let free = self.bytes.get_mut(self.len..).unwrap_or_default();
        for (to, from) in free.iter_mut().zip(more) {
            *to = *from;
            self.len = self.len.wrapping_add(1);
        }
        self
    }

    /// Appends a number in decimal digits.
    pub(crate) fn push_decimal(&mut self, number: u64) -> &mut Self {
        let mut digits = [b'0'; 20];
        let mut rest = number;
        let mut used = 0_usize;
        for digit in digits.iter_mut().rev() {
            *digit = digit_of(rest % 10);
            rest /= 10;
            used = used.wrapping_add(1);
            if rest == 0 {
                break;
            }
        }
        self.push(digits.get(20_usize.wrapping_sub(used)..).unwrap_or_default())
    }

    /// Appends a number in hexadecimal digits, at least `width` of them.
    pub(crate) fn push_hex(&mut self, number: u64, width: u32) -> &mut Self {
        let needed = 16_u32.wrapping_sub(number.leading_zeros() / 4);
        for place in (0..needed.max(width).min(16)).rev() {
            self.push(&[digit_of(number.wrapping_shr(place.wrapping_mul(4)) & 15)]);
        }
        self
    }

    /// Drops everything behind the first `len` bytes.
    pub(crate) fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Returns the bytes.
    pub(crate) fn as_slice(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }
}

/// Returns the digit of a number below 16.
fn digit_of(number: u64) -> u8 {
    match number {
        0..=9 => b'0'.wrapping_add(number as u8),
        _ => b'A'.wrapping_add(number.wrapping_sub(10) as u8),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_all_their_digits() {
        let text = |number| Bytes::<32>::new().push_decimal(number).as_slice().to_vec();
        assert_eq!(text(0), b"0");
        assert_eq!(text(1090), b"1090");
        assert_eq!(text(u64::MAX), b"18446744073709551615");
        let hex = |number, width| Bytes::<32>::new().push_hex(number, width).as_slice().to_vec();
        assert_eq!(hex(0, 1), b"0");
        assert_eq!(hex(0x1260, 2), b"1260");
        assert_eq!(hex(0xab, 4), b"00AB");
        assert_eq!(hex(u64::MAX, 1), b"FFFFFFFFFFFFFFFF");
    }

    #[test]
    fn what_does_not_fit_is_left_out() {
        let mut bytes = Bytes::<4>::new();
        bytes.push(b"abc").push(b"def").push(b"g");
        assert_eq!(bytes.as_slice(), b"abcd");
        bytes.truncate(2);
        assert_eq!(bytes.as_slice(), b"ab");
    }
}
