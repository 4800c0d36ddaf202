//! A disk as the answers need it. Every answer is derived from these few values, so the answers agree with each other.
//!
//! The rules are part of the interface: a guest remembers the geometry in its partition table and its boot loader, and
//! finds its disks by serial number. They depend on the size and the listed name alone, and never change:
//! - A sector has 512 bytes, logical and physical. Bytes behind the last whole sector are not part of the disk.
//! - The geometry of the BIOS has 255 heads and 63 sectors; the cylinders are capped at 65535 (16 bits).
//! - The geometry of IDE has 16 heads and 63 sectors; the cylinders are capped at 16383 (ATA-8 ACS, 7.16.7.2).
//! - The serial number is the FNV-1a hash (64 bits) of the listed name, in 16 hexadecimal digits.

use crate::bytes::Bytes;

/// Bytes of a sector.
pub(crate) const SECTOR: u64 = 512;

/// Model of every disk: 8 characters for the vendor of SCSI, at most 16 for its product, at most 40 for the model of IDE.
pub(crate) const VENDOR: &[u8; 8] = b"VMDKFUSE";
/// Product of every disk.
pub(crate) const PRODUCT: &[u8; 16] = b"BDWRAPPER DISK  ";
/// Revision of every disk. It does not follow the version of the library: guests compare it.
pub(crate) const REVISION: &[u8; 4] = b"1.0 ";

/// Which kind of controller a listed name stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Bus {
    /// `/dev/hd…`
    Ide,
    /// `/dev/sd…`
    Scsi,
}

impl Bus {
    /// Returns the bus of a listed name, or `None` if the name stands for no disk.
    pub(crate) fn of(name: &[u8]) -> Option<Self> {
        if name.starts_with(b"/dev/hd") {
            Some(Self::Ide)
        } else if name.starts_with(b"/dev/sd") {
            Some(Self::Scsi)
        } else {
            None
        }
    }
}

/// Cylinders, heads and sectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Geometry {
    pub(crate) cylinders: u16,
    pub(crate) heads: u8,
    pub(crate) sectors: u8,
}

/// One listed disk at the moment of a call.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Disk {
    /// Kind of controller.
    pub(crate) bus: Bus,
    /// Number of the disk among the listed SCSI names: its SCSI target.
    pub(crate) target: u8,
    /// Size in sectors.
    pub(crate) sectors: u64,
    /// True if the disk cannot be written to.
    pub(crate) read_only: bool,
    /// Hash of the listed name.
    pub(crate) hash: u64,
}

impl Disk {
    /// Returns the geometry that a BIOS would show.
    pub(crate) fn bios_geometry(&self) -> Geometry {
        self.geometry(255, u16::MAX)
    }

    /// Returns the geometry of IDE IDENTIFY.
    pub(crate) fn ide_geometry(&self) -> Geometry {
        self.geometry(16, 16383)
    }

    fn geometry(&self, heads: u8, most: u16) -> Geometry {
        const SECTORS: u8 = 63;
        let per_cylinder = u64::from(heads).wrapping_mul(u64::from(SECTORS));
        let cylinders = self.sectors.checked_div(per_cylinder).unwrap_or(0);
        Geometry {
            cylinders: cylinders.min(u64::from(most)) as u16,
            heads,
            sectors: SECTORS,
        }
    }

    /// Returns the serial number, 16 characters.
    pub(crate) fn serial(&self) -> Bytes<16> {
        let mut serial = Bytes::new();
        serial.push_hex(self.hash, 16);
        serial
    }
}

/// Returns the FNV-1a hash of a name (64 bits; <http://www.isthe.com/chongo/tech/comp/fnv/>).
pub(crate) fn hash(name: &[u8]) -> u64 {
    name.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Returns a disk of so many sectors.
    pub(crate) fn disk(bus: Bus, sectors: u64) -> Disk {
        Disk {
            bus,
            target: 3,
            sectors,
            read_only: false,
            hash: hash(b"/dev/sd/test"),
        }
    }

    #[test]
    fn geometry_follows_from_the_size_alone() {
        let of = |sectors| {
            let disk = disk(Bus::Ide, sectors);
            (disk.bios_geometry().cylinders, disk.ide_geometry().cylinders)
        };
        assert_eq!(of(0), (0, 0));
        assert_eq!(of(16 * 63 - 1), (0, 0));
        assert_eq!(of(255 * 63), (1, 15));
        assert_eq!(of(2 << 21), (261, 4161), "2 GiB");
        assert_eq!(of(16 << 21), (2088, 16383), "above 8 GiB");
        assert_eq!(of(5 << 31), (65535, 16383), "above 2 TiB");
        assert_eq!(of(u64::MAX), (65535, 16383));
    }

    #[test]
    fn a_name_selects_the_bus() {
        assert_eq!(Bus::of(b"/dev/hdx"), Some(Bus::Ide));
        assert_eq!(Bus::of(b"/dev/hd/a/b c"), Some(Bus::Ide));
        assert_eq!(Bus::of(b"/dev/sd/test"), Some(Bus::Scsi));
        assert_eq!(Bus::of(b"/dev/loop0"), None);
        assert_eq!(Bus::of(b"dev/sda"), None);
    }

    #[test]
    fn serial_numbers_are_the_same_in_every_version() {
        assert_eq!(hash(b""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(hash(b"foobar"), 0x8594_4171_f739_67e8, "a test vector of FNV-1a");
        assert_eq!(disk(Bus::Scsi, 1).serial().as_slice().len(), 16);
    }
}
