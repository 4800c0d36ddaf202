//! What a server says of an export.

use serde::Serialize;

use super::ffi::{Ask, Handle};
use crate::block::{Geometry, MAX_SECTORS, SECTOR};
use crate::error::{Error, Result};

/// Where a server names no maximum, a client may assume this (NBD protocol, "Block size constraints").
const USUAL_MAXIMUM: u64 = 32 << 20;

/// Bytes of one command where there is more to read or write.
const PIECE: u64 = 256 << 10;

/// The largest minimum that a server may name (NBD protocol, the same place).
const LARGEST_MINIMUM: u64 = 64 << 10;

/// Size and abilities of an export.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(super) struct Export {
    /// Bytes.
    pub(super) size: u64,
    /// Bytes of the smallest request; at least 1, a power of two.
    pub(super) minimum: u64,
    /// Bytes of a request that it likes; 0: not said.
    pub(super) preferred: u64,
    /// Bytes of the largest request; a multiple of the granule.
    pub(super) maximum: u64,
    /// Can't be written to.
    pub(super) read_only: bool,
    /// Has a flush command.
    pub(super) flush: bool,
    /// Makes a write durable before it answers, where it is asked to.
    pub(super) fua: bool,
    /// Has a trim command.
    pub(super) trim: bool,
    /// Has a command that writes zeroes.
    pub(super) zero: bool,
    /// It can be asked to be fast or to fail.
    pub(super) fast_zero: bool,
    /// Several connections see one another's writes.
    pub(super) multi_conn: bool,
    /// Tells holes and zeroes.
    pub(super) block_status: bool,
}

impl Export {
    /// Of a handle that has opened its export or asked for it. Errors: numbers that can't be.
    pub(super) fn of(handle: &Handle) -> Result<Self> {
        let [minimum, preferred, maximum] = handle.block_sizes();
        let mut export = Self {
            size: handle.size()?,
            minimum: minimum.max(1),
            preferred,
            maximum: if maximum == 0 { USUAL_MAXIMUM } else { maximum },
            read_only: handle.can(Ask::ReadOnly),
            flush: handle.can(Ask::Flush),
            fua: handle.can(Ask::Fua),
            trim: handle.can(Ask::Trim),
            zero: handle.can(Ask::Zero),
            fast_zero: handle.can(Ask::FastZero),
            multi_conn: handle.can(Ask::MultiConn),
            block_status: handle.can_block_status(),
        };
        export.check()?;
        Ok(export)
    }

    fn check(&mut self) -> Result<()> {
        let bad = |what: String| Err(Error::corrupt(format!("the NBD server names {what}")));
        if self.size.div_ceil(SECTOR) > MAX_SECTORS {
            return bad(format!("a size of {} bytes, more than a file can have", self.size));
        }
        if !self.minimum.is_power_of_two() || self.minimum > LARGEST_MINIMUM {
            let least = self.minimum;
            return bad(format!(
                "a minimum block size of {least} bytes: no power of two up to {LARGEST_MINIMUM}"
            ));
        }
        if self.maximum < self.granule() {
            let (most, least) = (self.maximum, self.granule());
            return bad(format!("a maximum block size of {most} bytes, less than {least}"));
        }
        self.maximum -= self.maximum % self.granule();
        Ok(())
    }

    /// Bytes of the smallest request that we make: whole sectors.
    pub(super) fn granule(&self) -> u64 {
        self.minimum.max(SECTOR)
    }

    /// Bytes of one command where there is more to read or write than that: parts of a long request go to several
    /// connections, and what the server and the kernel copy stays in the processor's cache.
    pub(super) fn piece(&self) -> u64 {
        PIECE
            .max(self.preferred.min(self.maximum))
            .next_multiple_of(self.granule())
            .min(self.maximum)
    }

    /// As a disk. What is missing at the last sector reads as zeroes.
    pub(super) fn geometry(&self) -> Geometry {
        let granule = self.granule() / SECTOR;
        Geometry {
            sectors: self.size.div_ceil(SECTOR),
            granule,
            preferred: granule,
        }
    }

    /// Whether what it was before can be read and written on in it. `first`: on the connection that is asked for block
    /// status. Errors: say what differs.
    pub(super) fn check_same(&self, before: &Self, writable: bool, first: bool) -> Result<()> {
        let changed = |what: String| Err(Error::corrupt(format!("the NBD export has changed: {what}")));
        if self.size != before.size {
            return changed(format!("its size was {} bytes and is {} now", before.size, self.size));
        }
        if self.granule() != before.granule() || self.maximum < before.maximum {
            return changed("its block sizes are others now".to_owned());
        }
        if writable && self.read_only && !before.read_only {
            return changed("it is read-only now".to_owned());
        }
        if first && before.block_status && !self.block_status {
            return changed("it can't tell its holes any more".to_owned());
        }
        let needed = [
            (before.flush, self.flush, "flush"),
            (before.fua, self.fua, "write durably (FUA)"),
            (before.trim, self.trim, "trim"),
            (before.zero, self.zero, "write zeroes"),
            (before.fast_zero, self.fast_zero, "write zeroes fast or not at all"),
            // A flush on one of them is to cover the writes on all.
            (before.multi_conn, self.multi_conn, "be written on several connections"),
        ];
        match needed.iter().find(|(before, now, _)| writable && *before && !now) {
            Some((.., what)) => changed(format!("it can't {what} any more")),
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
            maximum: USUAL_MAXIMUM,
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
    fn numbers_that_cannot_be_are_refused() {
        for (bad, what) in [
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
            let said = Export::check(&mut { bad }).unwrap_err().to_string();
            assert!(said.contains(what), "{said}");
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
    fn another_size_or_less_ability_is_a_change() {
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
        for less in [
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
            assert!(less.check_same(&before, true, true).is_err(), "{less:?}");
            assert!(less.check_same(&before, false, true).is_ok(), "{less:?}");
        }
        let mute = Export {
            block_status: false,
            ..before
        };
        assert!(mute.check_same(&before, false, true).is_err() && mute.check_same(&before, false, false).is_ok());
    }
}
