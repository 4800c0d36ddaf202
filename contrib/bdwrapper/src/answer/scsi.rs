//! What a SCSI command does, without the memory of the program: a CDB in, data or sense data out.
//!
//! The sources are SPC-3 (T10/1416-D) and SBC-2 (T10/1417-D); the disk claims SPC-3.

use crate::bytes::Bytes;
use crate::disk::{Disk, PRODUCT, REVISION, SECTOR, VENDOR};

/// Bytes of the longest CDB that is looked at.
pub(super) const CDB: usize = 16;

/// Data of an answer; the longest is VPD page 0x83.
pub(super) type Data = Bytes<128>;

/// Outcome of a command.
#[derive(Debug, Clone, Copy)]
pub(super) enum Outcome {
    /// Status GOOD, with data for the program.
    Good(Data),
    /// The disk's content must be made durable; then GOOD or [`Sense::WRITE_ERROR`].
    Flush,
    /// Status CHECK CONDITION.
    Check(Sense),
}

/// Sense key, additional sense code and its qualifier.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sense {
    key: u8,
    code: u8,
    qualifier: u8,
}

impl Sense {
    const NONE: Self = Self::new(0, 0, 0);
    const NO_MEDIUM: Self = Self::new(2, 0x3a, 0);
    /// A flush failed.
    pub(super) const WRITE_ERROR: Self = Self::new(3, 0x0c, 0);
    const INVALID_OPCODE: Self = Self::new(5, 0x20, 0);
    const INVALID_FIELD: Self = Self::new(5, 0x24, 0);
    const NO_SAVED_PARAMETERS: Self = Self::new(5, 0x39, 0);

    const fn new(key: u8, code: u8, qualifier: u8) -> Self {
        Self { key, code, qualifier }
    }

    /// Returns the sense data in fixed format (SPC-3, 4.5.3).
    pub(super) fn fixed(self) -> [u8; 18] {
        let Self { key, code, qualifier } = self;
        [0x70, 0, key, 0, 0, 0, 0, 10, 0, 0, 0, 0, code, qualifier, 0, 0, 0, 0]
    }

    /// Returns the sense data in descriptor format, without descriptors (SPC-3, 4.5.2).
    fn descriptor(self) -> [u8; 8] {
        [0x72, self.key, self.code, self.qualifier, 0, 0, 0, 0]
    }
}

/// A CDB; a byte behind its end is zero.
struct Cdb<'a>(&'a [u8; CDB]);

impl Cdb<'_> {
    fn byte(&self, at: usize) -> u8 {
        self.0.get(at).copied().unwrap_or(0)
    }

    /// Returns true if one of the bits `mask` of a byte is set.
    fn has(&self, at: usize, mask: u8) -> bool {
        self.byte(at) & mask != 0
    }

    /// Reads a number, the highest byte first.
    fn number(&self, at: usize, len: usize) -> u64 {
        let bytes = self.0.iter().skip(at).take(len);
        bytes.fold(0, |value, byte| value.wrapping_shl(8) | u64::from(*byte))
    }
}

/// Executes a command.
pub(super) fn execute(disk: &Disk, cdb: &[u8; CDB]) -> Outcome {
    let cdb = Cdb(cdb);
    let result = match cdb.byte(0) {
        0x00 => ready(disk).map(|()| Data::new()),
        0x03 => Ok(request_sense(&cdb)),
        0x12 => inquiry(disk, &cdb),
        0x1a => mode_sense(disk, &cdb, false),
        0x5a => mode_sense(disk, &cdb, true),
        0x25 => read_capacity_10(disk, &cdb),
        0x9e if cdb.byte(1) & 0x1f == 0x10 => read_capacity_16(disk, &cdb),
        0x9e => Err(Sense::INVALID_FIELD),
        0xa0 => report_luns(&cdb),
        0x35 | 0x91 => match synchronize(disk, &cdb) {
            Ok(()) => return Outcome::Flush,
            Err(sense) => Err(sense),
        },
        _ => Err(Sense::INVALID_OPCODE),
    };
    match result {
        Ok(data) => Outcome::Good(data),
        Err(sense) => Outcome::Check(sense),
    }
}

/// Returns an error if the disk has no sectors.
fn ready(disk: &Disk) -> Result<(), Sense> {
    if disk.sectors == 0 {
        Err(Sense::NO_MEDIUM)
    } else {
        Ok(())
    }
}

/// Cuts data to the allocation length.
fn cut(mut data: Data, allocation: u64) -> Data {
    data.truncate(usize::try_from(allocation).unwrap_or(usize::MAX));
    data
}

/// Each error is reported with the command that caused it, so none is left for REQUEST SENSE.
fn request_sense(cdb: &Cdb<'_>) -> Data {
    let mut data = Data::new();
    if cdb.has(1, 1) {
        data.push(&Sense::NONE.descriptor());
    } else {
        data.push(&Sense::NONE.fixed());
    }
    cut(data, cdb.number(4, 1))
}

fn inquiry(disk: &Disk, cdb: &Cdb<'_>) -> Result<Data, Sense> {
    let (vital, page) = (cdb.has(1, 1), cdb.byte(2));
    // The bits above EVPD are obsolete or reserved.
    if cdb.has(1, 0xfe) || (!vital && page != 0) {
        return Err(Sense::INVALID_FIELD);
    }
    let data = if vital {
        vital_product_data(disk, page)?
    } else {
        standard_inquiry()
    };
    Ok(cut(data, cdb.number(3, 2)))
}

/// A disk that is not removable, SPC-3, response data format 2, 31 more bytes.
fn standard_inquiry() -> Data {
    let mut data = Data::new();
    data.push(&[0, 0, 5, 2, 31, 0, 0, 0])
        .push(VENDOR)
        .push(PRODUCT)
        .push(REVISION);
    data
}

fn vital_product_data(disk: &Disk, page: u8) -> Result<Data, Sense> {
    let serial = disk.serial();
    let mut data = Data::new();
    match page {
        0x00 => data.push(&[0, 0, 0, 3, 0x00, 0x80, 0x83]),
        0x80 => data.push(&[0, 0x80, 0, 16]).push(serial.as_slice()),
        0x83 => {
            // Two designators of the LUN: a text (T10 vendor ID: vendor, product, serial number: 8 + 16 + 16 bytes), and
            // a number (NAA 3, locally assigned: 8 bytes). Each has 4 bytes before it.
            let assigned = (disk.hash >> 4) | (3 << 60);
            data.push(&[0, 0x83, 0, 44 + 12]);
            data.push(&[2, 1, 0, 40])
                .push(VENDOR)
                .push(PRODUCT)
                .push(serial.as_slice());
            data.push(&[1, 3, 0, 8]).push(&assigned.to_be_bytes())
        }
        _ => return Err(Sense::INVALID_FIELD),
    };
    Ok(data)
}

fn read_capacity_10(disk: &Disk, cdb: &Cdb<'_>) -> Result<Data, Sense> {
    ready(disk)?;
    // Without PMI the address must be zero (SBC-2, 5.10.1).
    if !cdb.has(8, 1) && cdb.number(2, 4) != 0 {
        return Err(Sense::INVALID_FIELD);
    }
    // 0xffffffff tells the program to use READ CAPACITY (16).
    let last = disk.sectors.saturating_sub(1).min(u64::from(u32::MAX)) as u32;
    let mut data = Data::new();
    data.push(&last.to_be_bytes()).push(&(SECTOR as u32).to_be_bytes());
    Ok(data)
}

fn read_capacity_16(disk: &Disk, cdb: &Cdb<'_>) -> Result<Data, Sense> {
    ready(disk)?;
    if !cdb.has(14, 1) && cdb.number(2, 8) != 0 {
        return Err(Sense::INVALID_FIELD);
    }
    let mut data = Data::new();
    data.push(&disk.sectors.saturating_sub(1).to_be_bytes());
    // No protection, one logical sector for each physical one, aligned.
    data.push(&(SECTOR as u32).to_be_bytes()).push(&[0; 20]);
    Ok(cut(data, cdb.number(10, 4)))
}

/// One LUN, 0. The 17th byte on would be the next LUN.
fn report_luns(cdb: &Cdb<'_>) -> Result<Data, Sense> {
    let allocation = cdb.number(6, 4);
    // SPC-3, 6.21: SELECT REPORT 0 to 2; at least 16 bytes.
    if allocation < 16 || cdb.byte(2) > 2 {
        return Err(Sense::INVALID_FIELD);
    }
    let mut data = Data::new();
    // SELECT REPORT 1 asks for well-known LUNs only, of which there are none.
    if cdb.byte(2) == 1 {
        data.push(&[0; 8]);
    } else {
        data.push(&[0, 0, 0, 8]).push(&[0; 12]);
    }
    Ok(cut(data, allocation))
}

/// Checks the range of SYNCHRONIZE CACHE; the whole disk is flushed, whatever the range.
fn synchronize(disk: &Disk, cdb: &Cdb<'_>) -> Result<(), Sense> {
    /// LOGICAL BLOCK ADDRESS OUT OF RANGE.
    const OUT_OF_RANGE: Sense = Sense::new(5, 0x21, 0);
    ready(disk)?;
    let (start, len) = if cdb.byte(0) == 0x35 {
        (cdb.number(2, 4), cdb.number(7, 2))
    } else {
        (cdb.number(2, 8), cdb.number(10, 4))
    };
    if start.checked_add(len).is_none_or(|end| end > disk.sectors) {
        return Err(OUT_OF_RANGE);
    }
    Ok(())
}

/// MODE SENSE (6), or (10) if `long`: a header, a block descriptor, the pages.
fn mode_sense(disk: &Disk, cdb: &Cdb<'_>, long: bool) -> Result<Data, Sense> {
    let (control, page, subpage) = (cdb.byte(2) >> 6, cdb.byte(2) & 0x3f, cdb.byte(3));
    let allocation = if long { cdb.number(7, 2) } else { cdb.number(4, 1) };
    if control == 3 {
        return Err(Sense::NO_SAVED_PARAMETERS);
    }
    // 0xff asks for all subpages, of which each page has only the first.
    if subpage != 0 && subpage != 0xff {
        return Err(Sense::INVALID_FIELD);
    }
    let mut pages = Bytes::<32>::new();
    let is_changeable = control == 1;
    if matches!(page, 0x08 | 0x3f) {
        // Caching: the write cache is on, so that programs flush. Nothing can be changed.
        let flags = if is_changeable { 0 } else { 0x04 };
        pages.push(&[0x08, 18, flags]).push(&[0; 17]);
    }
    if matches!(page, 0x0a | 0x3f) {
        // Control: sense data in fixed format, restricted reordering.
        pages.push(&[0x0a, 10]).push(&[0; 10]);
    }
    if pages.as_slice().is_empty() {
        return Err(Sense::INVALID_FIELD);
    }
    let write_protected = if disk.read_only { 0x80 } else { 0 };
    let block = block_descriptor(disk, cdb, long);
    let more = block.as_slice().len().saturating_add(pages.as_slice().len());
    let mut data = Data::new();
    if long {
        let long_lba = u8::from(block.as_slice().len() == 16);
        data.push(&(more.saturating_add(6) as u16).to_be_bytes());
        data.push(&[0, write_protected, long_lba, 0, 0, block.as_slice().len() as u8]);
    } else {
        data.push(&[
            more.saturating_add(3) as u8,
            0,
            write_protected,
            block.as_slice().len() as u8,
        ]);
    }
    data.push(block.as_slice()).push(pages.as_slice());
    Ok(cut(data, allocation))
}

/// Returns the block descriptor (SBC-2, 6.3.2): the size of the disk in sectors, capped, and that of a sector.
fn block_descriptor(disk: &Disk, cdb: &Cdb<'_>, long: bool) -> Bytes<16> {
    let mut block = Bytes::new();
    if cdb.has(1, 0x08) {
        // DBD: no block descriptor.
    } else if long && cdb.has(1, 0x10) {
        block
            .push(&disk.sectors.to_be_bytes())
            .push(&[0; 4])
            .push(&(SECTOR as u32).to_be_bytes());
    } else {
        let sectors = disk.sectors.min(u64::from(u32::MAX)) as u32;
        block.push(&sectors.to_be_bytes()).push(&(SECTOR as u32).to_be_bytes());
    }
    block
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use super::*;
    use crate::disk::Bus;
    use crate::disk::tests::disk;

    const SECTORS: u64 = 5 << 31;

    fn run(disk: &Disk, cdb: &[u8]) -> Result<Vec<u8>, [u8; 3]> {
        let mut padded = [0; CDB];
        padded[..cdb.len()].copy_from_slice(cdb);
        match execute(disk, &padded) {
            Outcome::Good(data) => Ok(data.as_slice().to_vec()),
            Outcome::Flush => Ok(b"flush".to_vec()),
            Outcome::Check(Sense { key, code, qualifier }) => Err([key, code, qualifier]),
        }
    }

    fn scsi(cdb: &[u8]) -> Result<Vec<u8>, [u8; 3]> {
        run(&disk(Bus::Scsi, SECTORS), cdb)
    }

    #[test]
    fn inquiry_names_the_disk() {
        let data = scsi(&[0x12, 0, 0, 0, 255]).unwrap();
        assert_eq!(&data[8..], b"VMDKFUSEBDWRAPPER DISK  1.0 ");
        assert_eq!(usize::from(data[4]), data.len() - 5);
        assert_eq!(scsi(&[0x12, 0, 0, 0, 5]).unwrap(), data[..5]);
        assert_eq!(scsi(&[0x12, 1, 0, 0, 255]).unwrap(), [0, 0, 0, 3, 0, 0x80, 0x83]);
        let serial = scsi(&[0x12, 1, 0x80, 0, 255]).unwrap();
        let designators = scsi(&[0x12, 1, 0x83, 1, 0]).unwrap();
        assert_eq!(serial.len(), 20);
        assert_eq!(usize::from(designators[3]), designators.len() - 4);
        assert_eq!(designators[32..48], serial[4..]);
        assert_eq!(designators[52] >> 4, 3);
        assert_eq!(scsi(&[0x12, 1, 0xb0, 0, 255]), Err([5, 0x24, 0]));
        assert_eq!(scsi(&[0x12, 0, 0x80, 0, 255]), Err([5, 0x24, 0]));
    }

    #[test]
    fn capacity_is_right_above_two_tebibytes() {
        assert_eq!(scsi(&[0x25]).unwrap(), [255, 255, 255, 255, 0, 0, 2, 0]);
        let long = [&[0x9e, 0x10][..], &[0; 8], &[0, 0, 0, 32]].concat();
        let data = scsi(&long).unwrap();
        assert_eq!(data.len(), 32);
        assert_eq!(data[..8], (SECTORS - 1).to_be_bytes());
        let small = disk(Bus::Scsi, 2048);
        assert_eq!(run(&small, &[0x25]).unwrap(), [0, 0, 7, 255, 0, 0, 2, 0]);
        assert_eq!(run(&small, &[0x25, 0, 1]), Err([5, 0x24, 0]));
        assert_eq!(scsi(&[0x9e, 0x12]), Err([5, 0x24, 0]));
    }

    #[test]
    fn mode_pages_have_the_length_that_they_claim() {
        for (dbd, page) in [(0, 0x3f), (8, 0x3f), (0, 0x08), (0, 0x0a), (8, 0x4a), (0, 0xbf)] {
            let short = scsi(&[0x1a, dbd, page, 0, 255]).unwrap();
            let long = scsi(&[0x5a, dbd, page, 0, 0, 0, 0, 1, 0]).unwrap();
            assert_eq!(usize::from(short[0]), short.len() - 1);
            assert_eq!(usize::from(long[1]), long.len() - 2);
            assert_eq!(short[4..], long[8..]);
            assert_eq!(short[3], if dbd == 0 { 8 } else { 0 });
        }
        let long_lba = scsi(&[0x5a, 0x10, 0x3f, 0, 0, 0, 0, 1, 0]).unwrap();
        assert_eq!(long_lba[8..16], SECTORS.to_be_bytes());
        assert_eq!(scsi(&[0x1a, 0, 0xff, 0, 255]), Err([5, 0x39, 0]), "saved values");
        assert_eq!(scsi(&[0x1a, 0, 0x1c, 0, 255]), Err([5, 0x24, 0]));
        let mut read_only = disk(Bus::Scsi, SECTORS);
        assert_eq!(run(&read_only, &[0x1a, 0, 0x3f, 0, 255]).unwrap()[2], 0);
        read_only.read_only = true;
        assert_eq!(run(&read_only, &[0x1a, 0, 0x3f, 0, 255]).unwrap()[2], 0x80);
    }

    #[test]
    fn a_flush_covers_only_sectors_of_the_disk() {
        let small = disk(Bus::Scsi, 2048);
        assert_eq!(run(&small, &[0x35]).unwrap(), b"flush");
        assert_eq!(run(&small, &[0x91]).unwrap(), b"flush");
        assert_eq!(run(&small, &[0x35, 0, 0, 0, 8, 0, 0, 0, 1]), Err([5, 0x21, 0]));
        assert_eq!(
            run(&small, &[0x91, 0, 255, 255, 255, 255, 255, 255, 255, 255, 1]),
            Err([5, 0x21, 0])
        );
    }

    #[test]
    fn other_commands_are_refused() {
        assert_eq!(scsi(&[0x28]), Err([5, 0x20, 0]), "READ (10)");
        assert_eq!(scsi(&[0x85]), Err([5, 0x20, 0]), "ATA PASS-THROUGH");
        let empty = disk(Bus::Scsi, 0);
        assert_eq!(run(&empty, &[0x00]), Err([2, 0x3a, 0]));
        assert_eq!(run(&empty, &[0x25]), Err([2, 0x3a, 0]));
        assert_eq!(scsi(&[0x00]).unwrap(), []);
        assert_eq!(scsi(&[0x03, 0, 0, 0, 255]).unwrap().len(), 18);
        assert_eq!(scsi(&[0x03, 1, 0, 0, 255]).unwrap()[0], 0x72);
        assert_eq!(
            scsi(&[0xa0, 0, 0, 0, 0, 0, 0, 0, 0, 16]).unwrap(),
            [0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
        );
        assert_eq!(scsi(&[0xa0, 0, 0, 0, 0, 0, 0, 0, 0, 8]), Err([5, 0x24, 0]));
    }
}
