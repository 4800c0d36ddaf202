//! Properties of an export, as the server reports them, and the checks of these untrusted numbers.
//!
//! [`Export::of`] checks every number, so the rest of the client can rely on it: the size fits a file, the minimum is a
//! power of two, and the maximum is a multiple of the granule and at least one granule. After a reconnect
//! [`Export::check_same`] compares the export with the earlier one.

use serde::Serialize;

use super::ffi::{ExportFlag, Handle};
use crate::block::{Geometry, MAX_SECTORS, SECTOR};
use crate::error::{Error, Result};
use crate::source::sample;

/// Maximum request length in bytes if the server reports none (NBD protocol, "Block size constraints").
const DEFAULT_MAXIMUM: u64 = 32 << 20;

/// Length in bytes of the commands that a longer request is split into, unless the server prefers more.
const PIECE: u64 = 256 << 10;

/// Largest minimum block size in bytes that a server may report (NBD protocol, "Block size constraints").
const MAX_MINIMUM: u64 = 64 << 10;

/// Size, block sizes and flags of an export.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(super) struct Export {
    /// Size in bytes.
    pub(super) size: u64,
    /// Minimum length of a request in bytes: a power of two, at least 1.
    pub(super) minimum: u64,
    /// Preferred length of a request in bytes; 0 if the server reports none.
    pub(super) preferred: u64,
    /// Maximum length of a request in bytes: a multiple of the granule.
    pub(super) maximum: u64,
    /// True if the export can't be written.
    pub(super) read_only: bool,
    /// True if the server has a flush command.
    pub(super) flush: bool,
    /// True if the server can make a write durable before it answers it (FUA).
    pub(super) fua: bool,
    /// True if the server has a trim command.
    pub(super) trim: bool,
    /// True if the server has a command that writes zeroes.
    pub(super) zero: bool,
    /// True if the command that writes zeroes can be asked to fail instead of being slow.
    pub(super) fast_zero: bool,
    /// True if the sockets of several connections see one another's writes, and a flush on one of them covers the
    /// writes on all (NBD_FLAG_CAN_MULTI_CONN).
    pub(super) multi_conn: bool,
    /// True if the server reports holes and zeroes (block status).
    pub(super) block_status: bool,
}

impl Export {
    /// Returns the properties of the export that `handle` has opened or asked for. Errors: a number that the protocol
    /// does not allow or a disk can't have.
    pub(super) fn of(handle: &Handle) -> Result<Self> {
        // 0 where the server reports none.
        let [minimum, preferred, maximum] = handle.block_sizes();
        let mut export = Self {
            size: handle.size()?,
            minimum: minimum.max(1),
            preferred,
            maximum: if maximum == 0 { DEFAULT_MAXIMUM } else { maximum },
            read_only: handle.can(ExportFlag::ReadOnly),
            flush: handle.can(ExportFlag::Flush),
            fua: handle.can(ExportFlag::Fua),
            trim: handle.can(ExportFlag::Trim),
            zero: handle.can(ExportFlag::Zero),
            fast_zero: handle.can(ExportFlag::FastZero),
            multi_conn: handle.can(ExportFlag::MultiConn),
            block_status: handle.can_block_status(),
        };
        export.check()?;
        Ok(export)
    }

    fn check(&mut self) -> Result<()> {
        let invalid = |text: String| Err(Error::corrupt(format!("the NBD server reports {text}")));
        if self.size.div_ceil(SECTOR) > MAX_SECTORS {
            return invalid(format!("a size of {} bytes, more than a file can have", self.size));
        }
        if !self.minimum.is_power_of_two() || self.minimum > MAX_MINIMUM {
            let minimum = self.minimum;
            return invalid(format!(
                "a minimum block size of {minimum} bytes, expected a power of two up to {MAX_MINIMUM}"
            ));
        }
        // Also what keeps the division into pieces from making pieces of nothing.
        if self.maximum < self.granule() {
            let (maximum, granule) = (self.maximum, self.granule());
            return invalid(format!(
                "a maximum block size of {maximum} bytes, expected {granule} or more"
            ));
        }
        // Requests start and end at multiples of the granule, so the largest one is a whole number of granules.
        self.maximum -= self.maximum % self.granule();
        Ok(())
    }

    /// Returns the unit in bytes that requests start and end at: at least a sector.
    pub(super) fn granule(&self) -> u64 {
        self.minimum.max(SECTOR)
    }

    /// Returns the length in bytes of the commands that a longer request is split into. The parts of a long request go
    /// to several sockets, and the data that the server and the kernel copy stays in the processor's cache.
    pub(super) fn piece(&self) -> u64 {
        PIECE
            .max(self.preferred.min(self.maximum))
            .next_multiple_of(self.granule())
            // The maximum is a multiple of the granule too (`check`), so the piece stays one.
            .min(self.maximum)
    }

    /// Returns the length in bytes of a block that is sampled to recognize the export.
    pub(super) fn sample_len(&self) -> u64 {
        sample::BLOCK.max(self.granule()).min(self.maximum)
    }

    /// Returns the geometry of the disk: the size rounded up to whole sectors. The rest of the last sector reads as
    /// zeroes.
    pub(super) fn geometry(&self) -> Geometry {
        let granule = self.granule() / SECTOR;
        Geometry {
            sectors: self.size.div_ceil(SECTOR),
            granule,
            preferred: granule,
        }
    }

    /// Checks that reads and writes of the export `before` can continue on this one, after a reconnect or on a further
    /// socket. Errors: what differs.
    ///
    /// `first`: this is the socket that is asked for block status.
    pub(super) fn check_same(&self, before: &Self, writable: bool, first: bool) -> Result<()> {
        let changed = |text: String| Err(Error::corrupt(format!("the NBD export has changed: {text}")));
        if self.size != before.size {
            return changed(format!("its size was {} bytes and is {} now", before.size, self.size));
        }
        // Commands in the replay log and in the queues were split for the old block sizes.
        if self.granule() != before.granule() || self.maximum < before.maximum {
            return changed(format!(
                "its minimum and maximum block sizes were {} and {} bytes and are {} and {} now",
                before.granule(),
                before.maximum,
                self.granule(),
                self.maximum
            ));
        }
        if writable && self.read_only && !before.read_only {
            return changed("it is read-only now".to_owned());
        }
        if first && before.block_status && !self.block_status {
            return changed("it no longer offers block status".to_owned());
        }
        let needed = [
            (before.flush, self.flush, "flush"),
            (before.fua, self.fua, "write durably (FUA)"),
            (before.trim, self.trim, "trim"),
            (before.zero, self.zero, "write zeroes"),
            (before.fast_zero, self.fast_zero, "write zeroes fast or not at all"),
            // The session relies on a flush on one socket covering the writes on all of them.
            (before.multi_conn, self.multi_conn, "be written on several connections"),
        ];
        match needed.iter().find(|(before, now, _)| writable && *before && !now) {
            Some((.., ability)) => changed(format!("it no longer can {ability}")),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn export(size: u64) -> Export {
        Export {
            size,
            minimum: 1,
            preferred: 4096,
            maximum: DEFAULT_MAXIMUM,
            read_only: false,
            flush: true,
            fua: true,
            trim: true,
            zero: true,
            fast_zero: true,
            multi_conn: true,
            block_status: true,
        }
    }

    #[test]
    fn the_granule_is_the_minimum_and_at_least_a_sector() {
        for (minimum, granule) in [(1, 1), (512, 1), (4096, 8), (65536, 128)] {
            let export = Export {
                minimum,
                ..export(1 << 20)
            };
            let of = Geometry {
                sectors: 2048,
                granule,
                preferred: granule,
            };
            assert_eq!(export.geometry(), of);
        }
        assert_eq!(export(1000).geometry().sectors, 2, "the last sector is whole");
    }

    #[test]
    fn invalid_numbers_are_refused() {
        for (invalid, expected) in [
            (
                Export {
                    minimum: 131_072,
                    ..export(0)
                },
                "minimum block size of 131072",
            ),
            (
                Export {
                    minimum: 513,
                    ..export(0)
                },
                "minimum block size of 513",
            ),
            (
                Export {
                    maximum: 511,
                    ..export(0)
                },
                "maximum block size of 511",
            ),
            (export(u64::MAX), "a size of"),
        ] {
            let message = Export::check(&mut { invalid }).unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
        }
        let mut odd = Export {
            minimum: 4096,
            maximum: 10_000,
            ..export(0)
        };
        odd.check().unwrap();
        assert_eq!(odd.maximum, 8192);
    }

    #[test]
    fn another_size_or_a_lost_ability_is_a_change() {
        let before = export(4096);
        assert!(before.check_same(&before, true, true).is_ok());
        assert!(
            Export { size: 8192, ..before }
                .check_same(&before, false, true)
                .is_err()
        );
        assert!(
            Export {
                read_only: true,
                ..before
            }
            .check_same(&before, false, true)
            .is_ok()
        );
        assert!(
            Export {
                read_only: true,
                ..before
            }
            .check_same(&before, true, true)
            .is_err()
        );
        assert!(
            Export {
                minimum: 4096,
                ..before
            }
            .check_same(&before, false, true)
            .is_err()
        );
        assert!(
            Export { flush: false, ..before }
                .check_same(&before, true, true)
                .is_err()
        );
        assert!(Export { fua: false, ..before }.check_same(&before, true, true).is_err());
        assert!(Export { fua: false, ..before }.check_same(&before, false, true).is_ok());
        for lost in [
            Export { trim: false, ..before },
            Export { zero: false, ..before },
            Export {
                fast_zero: false,
                ..before
            },
            Export {
                multi_conn: false,
                ..before
            },
        ] {
            assert!(lost.check_same(&before, true, true).is_err(), "{lost:?}");
            assert!(lost.check_same(&before, false, true).is_ok(), "{lost:?}");
        }
        let no_status = Export {
            block_status: false,
            ..before
        };
        assert!(no_status.check_same(&before, false, true).is_err());
        assert!(no_status.check_same(&before, false, false).is_ok());
    }
}
