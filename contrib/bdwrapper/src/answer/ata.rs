//! Ioctls of IDE: IDENTIFY DEVICE, as ATA-8 ACS (T13/1699-D) 7.16 lays it out.

use libc::c_void;

use crate::disk::{Disk, PRODUCT, REVISION, VENDOR};
use crate::raw::{self, Errno};
use crate::uapi;

/// Opcode of IDENTIFY DEVICE.
const IDENTIFY: u8 = 0xec;
/// Status register after a command that succeeded: device ready, seek complete.
const READY: u8 = 0x50;
/// Most sectors that a command without LBA48 can address (28 bits).
const LBA28: u64 = (1 << 28) - 1;
/// Bytes of IDENTIFY.
const IDENTITY: usize = 512;

/// Answers an ioctl of IDE.
pub(super) fn ioctl(disk: &Disk, number: u32, argument: *mut c_void) -> Result<(), Errno> {
    if number == uapi::HDIO_GET_IDENTITY {
        return raw::copy_bytes_out(argument, &identity(disk));
    }
    let mut registers = [0; 4];
    raw::copy_bytes_in(&mut registers, argument)?;
    let [command, _, _, sectors] = registers;
    if command != IDENTIFY || sectors == 0 {
        return Err(libc::EIO);
    }
    // The kernel fills the whole buffer; behind the data it is zero.
    let mut at = argument.cast::<u8>().wrapping_add(registers.len());
    for sector in 0..sectors {
        let data = if sector == 0 { identity(disk) } else { [0; IDENTITY] };
        raw::copy_bytes_out(at.cast(), &data)?;
        at = at.wrapping_add(IDENTITY);
    }
    raw::copy_bytes_out(argument, &[READY, 0, 0, sectors])
}

/// Returns the 512 bytes of IDENTIFY.
pub(super) fn identity(disk: &Disk) -> [u8; IDENTITY] {
    let geometry = disk.ide_geometry();
    let (cylinders, heads, sectors) = (
        geometry.cylinders,
        u16::from(geometry.heads),
        u16::from(geometry.sectors),
    );
    let in_geometry = u32::from(cylinders)
        .wrapping_mul(u32::from(heads))
        .wrapping_mul(u32::from(sectors));
    let lba28 = disk.sectors.min(LBA28) as u32;
    let mut words = Words([0; IDENTITY]);
    // Not removable.
    words.set(0, 0x0040);
    words.set(1, cylinders).set(3, heads).set(6, sectors);
    words.text(10, 10, disk.serial().as_slice());
    words.text(23, 4, REVISION);
    let model = [&VENDOR[..], b" ", PRODUCT];
    words.text_of_parts(27, 20, model.into_iter().flatten().copied());
    // READ MULTIPLE up to 16 sectors, and set to 16.
    words.set(47, 0x8010).set(59, 0x0110);
    // LBA, DMA, IORDY.
    words.set(49, 0x0f00).set(50, 0x4000);
    // Words 54 to 58, 64 to 70 and 88 are valid.
    words.set(53, 0x0007);
    words.set(54, cylinders).set(55, heads).set(56, sectors);
    words.wide(57, 2, u64::from(in_geometry)).wide(60, 2, u64::from(lba28));
    // Multiword DMA 0 to 2, PIO 3 and 4, cycles of 120 ns.
    words.set(63, 0x0007).set(64, 0x0003);
    words.set(65, 120).set(66, 120).set(67, 120).set(68, 120);
    // ATA-4 to ATA-7.
    words.set(80, 0x00f0);
    // Supported, then enabled: write cache; LBA48, FLUSH CACHE and FLUSH CACHE EXT.
    words.set(82, 0x0020).set(83, 0x7400).set(84, 0x4000);
    words.set(85, 0x0020).set(86, 0x3400).set(87, 0x4000);
    // Ultra DMA 0 to 5, and 5 selected; a cable of 80 wires.
    words.set(88, 0x203f).set(93, 0x6001);
    words.wide(100, 4, disk.sectors);
    // One logical sector for each physical one.
    words.set(106, 0x4000);
    words.with_checksum()
}

/// IDENTIFY as words of 16 bits, the low byte first.
struct Words([u8; IDENTITY]);

impl Words {
    fn set(&mut self, word: usize, value: u16) -> &mut Self {
        let place = self.0.chunks_exact_mut(2).nth(word);
        if let Some(place) = place {
            place.copy_from_slice(&value.to_le_bytes());
        }
        self
    }

    /// Stores a number in several words, the lowest first.
    fn wide(&mut self, word: usize, words: usize, value: u64) -> &mut Self {
        let parts = value.to_le_bytes();
        for (place, part) in self
            .0
            .chunks_exact_mut(2)
            .skip(word)
            .take(words)
            .zip(parts.chunks_exact(2))
        {
            place.copy_from_slice(part);
        }
        self
    }

    fn text(&mut self, word: usize, words: usize, text: &[u8]) {
        self.text_of_parts(word, words, text.iter().copied());
    }

    /// Stores text, padded with blanks. Of two characters in a word, the first is the high byte.
    fn text_of_parts(&mut self, word: usize, words: usize, text: impl Iterator<Item = u8>) {
        let mut text = text.chain(core::iter::repeat(b' '));
        for place in self.0.chunks_exact_mut(2).skip(word).take(words) {
            let (first, second) = (text.next().unwrap_or(b' '), text.next().unwrap_or(b' '));
            place.copy_from_slice(&[second, first]);
        }
    }

    /// Sets word 255: a signature, and a byte that makes the sum of all bytes zero.
    fn with_checksum(mut self) -> [u8; IDENTITY] {
        self.set(255, 0x00a5);
        let sum = self.0.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
        if let Some(last) = self.0.last_mut() {
            *last = sum.wrapping_neg();
        }
        self.0
    }
}

#[cfg(test)]
mod tests {
    use std::string::String;
    use std::vec::Vec;

    use super::*;
    use crate::disk::Bus;
    use crate::disk::tests::disk;

    fn word(identity: &[u8], word: usize) -> u16 {
        u16::from_le_bytes([identity[2 * word], identity[2 * word + 1]])
    }

    fn wide(identity: &[u8], first: usize, words: usize) -> u64 {
        (0..words)
            .rev()
            .fold(0, |value, i| value << 16 | u64::from(word(identity, first + i)))
    }

    fn text(identity: &[u8], first: usize, words: usize) -> String {
        let bytes: Vec<u8> = (first..first + words)
            .flat_map(|i| word(identity, i).to_be_bytes())
            .collect();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn identify_agrees_with_itself_at_every_size() {
        for sectors in [
            0,
            1,
            1008,
            1 << 20,
            16 << 21,
            LBA28 - 1,
            LBA28,
            LBA28 + 1,
            5 << 31,
            (1 << 48) - 1,
        ] {
            let identity = identity(&disk(Bus::Ide, sectors));
            let cylinders = (sectors / 1008).min(16383);
            assert_eq!(wide(&identity, 60, 2), sectors.min(LBA28));
            assert_eq!(wide(&identity, 100, 4), sectors);
            assert_eq!([1, 3, 6].map(|i| u64::from(word(&identity, i))), [cylinders, 16, 63]);
            assert_eq!([54, 55, 56].map(|i| u64::from(word(&identity, i))), [cylinders, 16, 63]);
            assert_eq!(wide(&identity, 57, 2), cylinders * 1008);
            assert_eq!(identity.iter().fold(0, |sum: u8, byte| sum.wrapping_add(*byte)), 0);
            assert_eq!(identity[510], 0xa5);
        }
    }

    #[test]
    fn texts_are_swapped_and_padded() {
        let disk = disk(Bus::Ide, 1);
        let identity = identity(&disk);
        let serial = String::from_utf8(disk.serial().as_slice().to_vec()).unwrap();
        assert_eq!(text(&identity, 10, 10), serial + "    ");
        assert_eq!(text(&identity, 23, 4), "1.0     ");
        assert_eq!(text(&identity, 27, 20), "VMDKFUSE BDWRAPPER DISK                 ");
    }
}
