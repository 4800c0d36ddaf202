//! Oracle: the values that each sector may hold after a crash at any position of a log, and the check of a disk.
//!
//! A sector may hold the last value that was written before the start of a flush that succeeded, or any value that was
//! written later, also by a request that failed or had not returned. Requests may overlap in time: one counts as later
//! than another only if it began after the other had returned.

use std::sync::Arc;

use vmdkfuse::block::{BlockRead, Lba};

use super::store::{DiskEvent, Event};

const SECTOR: usize = 512;

/// Sectors that one read of [`Oracle::verify`] takes.
const STEP: u64 = 128;

/// Returns the content that a write of `value` gives the sector at `lba`; 0 is zeroes. Every 8 bytes encode the
/// value, the sector and their position in it, so that torn and misplaced sectors are detected.
pub fn fill(lba: u64, value: u64) -> [u8; SECTOR] {
    let mut sector = [0; SECTOR];
    if value != 0 {
        let bits = value << 40 | (lba & 0xff_ffff) << 16 | 0x5a;
        sector[..8].copy_from_slice(&bits.to_le_bytes());
        // Doubling takes six copies, which is fast also in a build without optimization. Then the second byte of each
        // word gets the number of the word.
        for copied in [8, 16, 32, 64, 128, 256] {
            sector.copy_within(..copied, copied);
        }
        for i in 0..SECTOR / 8 {
            sector[i * 8 + 1] = i as u8;
        }
    }
    sector
}

/// Describes the value that the first bytes of a sector encode, for messages.
pub fn value_of(sector: &[u8]) -> String {
    let word = |at: usize| u64::from_le_bytes(sector[at..at + 8].try_into().expect("eight bytes"));
    let bits = word(0);
    match bits {
        _ if sector.iter().all(|&byte| byte == 0) => "zeroes".to_owned(),
        _ if bits & 0xffff == 0x5a => {
            let (value, lba) = (bits >> 40, bits >> 16 & 0xff_ffff);
            let whole = sector == fill(lba, value);
            format!(
                "value {value} of sector {lba}{}",
                if whole { "" } else { ", not all of it" }
            )
        }
        _ => format!("foreign bytes {:02x?}…", &sector[..8]),
    }
}

/// The values that each sector may hold at one position of a log.
#[derive(Debug, Clone)]
pub struct Oracle {
    /// All requests so far. Numbers 0 and 1 stand for the content before the run and after its recovery.
    requests: Vec<Request>,
    /// Maps each ticket to the number of its request.
    tickets: std::collections::HashMap<usize, usize>,
    /// The requests whose value each sector may hold, in the order in which they began. Never empty.
    sectors: Vec<Vec<u32>>,
    /// Start times of the flushes in flight, by ticket.
    flushes: std::collections::HashMap<usize, usize>,
    /// Logical time: the number of events so far.
    now: usize,
    /// The most likely content of the disk. `verify` compares whole reads with it and falls back to single sectors only
    /// where they differ.
    likely: Vec<u8>,
}

#[derive(Debug, Clone)]
struct Request {
    begin: usize,
    /// Time of its return, or `None` while it is in flight.
    end: Option<usize>,
    ok: bool,
    values: Values,
}

/// The values that a request gave to sectors.
#[derive(Debug, Clone)]
enum Values {
    /// One value for all sectors of the request.
    One(u64),
    /// A value for each sector of the disk.
    Each(Arc<[u64]>),
}

impl Request {
    /// Returns the value that the request gave to a sector.
    fn value(&self, lba: usize) -> u64 {
        match &self.values {
            Values::One(value) => *value,
            Values::Each(values) => values[lba],
        }
    }

    /// Creates a request that stands for content observed at `now`.
    fn observed(now: usize, values: Arc<[u64]>) -> Self {
        Self {
            begin: now,
            end: Some(now),
            ok: true,
            values: Values::Each(values),
        }
    }
}

impl Oracle {
    /// Creates the oracle of a disk whose sectors hold the values `before`, or `repaired` once it is open for writing.
    pub fn new(before: &[u64], repaired: &[u64]) -> Self {
        let mut likely = Vec::with_capacity(before.len() * SECTOR);
        repaired
            .iter()
            .zip(0..)
            .for_each(|(&value, lba)| likely.extend_from_slice(&fill(lba, value)));
        let differ = before
            .iter()
            .zip(repaired)
            .map(|(a, b)| if a == b { vec![0] } else { vec![0, 1] });
        Self {
            requests: vec![
                Request::observed(0, before.into()),
                Request::observed(0, repaired.into()),
            ],
            tickets: Default::default(),
            sectors: differ.collect(),
            flushes: Default::default(),
            now: 0,
            likely,
        }
    }

    /// Advances by one event.
    pub fn step(&mut self, event: &Event) {
        self.now += 1;
        let event = match event {
            Event::Disk(event) => event,
            Event::Killed => {
                // Writes that were not flushed may be lost with the process, so no later flush covers them.
                self.requests.iter_mut().for_each(|request| request.ok = false);
                return;
            }
            Event::Observed(values) => {
                let number = self.requests.len() as u32;
                self.requests.push(Request::observed(self.now, Arc::clone(values)));
                self.sectors
                    .iter_mut()
                    .filter(|allowed| allowed.len() > 1)
                    .for_each(|allowed| allowed.push(number));
                return;
            }
            _ => return,
        };
        match *event {
            DiskEvent::Begin {
                ticket,
                first,
                sectors,
                value,
            } => {
                self.tickets.insert(ticket, self.requests.len());
                for sector in first..first + sectors {
                    self.sectors[sector as usize].push(self.requests.len() as u32);
                }
                self.requests.push(Request {
                    begin: self.now,
                    end: None,
                    ok: false,
                    values: Values::One(value),
                });
            }
            DiskEvent::End { ticket, ok } => {
                let request = &mut self.requests[self.tickets[&ticket]];
                (request.end, request.ok) = (Some(self.now), ok);
            }
            DiskEvent::FlushBegin { ticket } => {
                self.flushes.insert(ticket, self.now);
            }
            DiskEvent::FlushEnd { ticket, ok } => {
                let began = self.flushes.remove(&ticket).expect("a flush that began");
                if ok {
                    self.flushed(began);
                }
            }
        }
    }

    /// Applies a successful flush that began at `began`: earlier writes are durable, so the values that they replaced
    /// cannot come back.
    fn flushed(&mut self, began: usize) {
        for (lba, allowed) in self.sectors.iter_mut().enumerate() {
            if allowed.len() < 2 {
                continue;
            }
            let of = |number: &u32| &self.requests[*number as usize];
            let durable = allowed
                .iter()
                .map(of)
                .filter(|request| request.ok && request.end.is_some_and(|end| end < began));
            let Some(newest) = durable.map(|request| request.begin).max() else {
                continue;
            };
            // A request that overlaps the newest durable one in time is unordered with it: its value stays allowed.
            allowed.retain(|number| of(number).end.is_none_or(|end| end >= newest));
            if let Some(&number) = allowed.first() {
                let value = self.requests[number as usize].value(lba);
                self.likely[lba * SECTOR..(lba + 1) * SECTOR].copy_from_slice(&fill(lba as u64, value));
            }
        }
    }

    /// Reads the whole disk and returns an error that describes the first sector with a value that it must not hold.
    pub fn verify(&self, disk: &dyn BlockRead) -> Result<(), String> {
        let sectors = self.sectors.len() as u64;
        if disk.geometry().sectors != sectors {
            return Err(format!(
                "the disk has {} sectors, expected {sectors}",
                disk.geometry().sectors
            ));
        }
        let mut buf = vec![0; STEP as usize * SECTOR];
        for first in (0..sectors).step_by(STEP as usize) {
            let count = STEP.min(sectors - first);
            let part = &mut buf[..count as usize * SECTOR];
            disk.read_at(Lba(first), part)
                .map_err(|e| format!("reading {count} sectors at {first}: {e}"))?;
            let start = first as usize * SECTOR;
            if part == &self.likely[start..start + part.len()] {
                continue;
            }
            for (sector, lba) in part.chunks_exact(SECTOR).zip(first..) {
                self.check(lba, sector)?;
            }
        }
        Ok(())
    }

    /// Checks the content of one sector.
    pub fn check(&self, lba: u64, sector: &[u8]) -> Result<(), String> {
        let allowed = &self.sectors[lba as usize];
        let value = |&number: &u32| self.requests[number as usize].value(lba as usize);
        if allowed.iter().any(|number| sector == fill(lba, value(number))) {
            return Ok(());
        }
        let allowed: Vec<_> = allowed.iter().map(|number| value(number).to_string()).collect();
        Err(format!(
            "sector {lba} holds {}, and may hold value {}",
            value_of(sector),
            allowed.join(" or ")
        ))
    }
}

/// Reads the values of a disk of `sectors` sectors. Fails if a sector is torn or does not hold a value of [`fill`].
pub(super) fn values(disk: &dyn BlockRead, sectors: usize) -> Result<Arc<[u64]>, String> {
    let mut all = vec![0; sectors * SECTOR];
    disk.read_at(Lba(0), &mut all)
        .map_err(|e| format!("reading all: {e}"))?;
    let value = |(lba, sector): (usize, &[u8])| {
        let word: [u8; 8] = sector[..8].try_into().expect("eight bytes");
        let value = u64::from_le_bytes(word) >> 40;
        let whole = sector == fill(lba as u64, value);
        if whole {
            Ok(value)
        } else {
            Err(format!("sector {lba} holds {}", value_of(sector)))
        }
    };
    all.chunks_exact(SECTOR).enumerate().map(value).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the values that sector 0 may hold.
    fn allowed_values(oracle: &Oracle) -> Vec<u64> {
        (0..10)
            .filter(|&value| oracle.check(0, &fill(0, value)).is_ok())
            .collect()
    }

    fn write(oracle: &mut Oracle, value: u64, ok: bool) {
        let ticket = value as usize;
        oracle.step(&Event::Disk(DiskEvent::Begin {
            ticket,
            first: 0,
            sectors: 1,
            value,
        }));
        oracle.step(&Event::Disk(DiskEvent::End { ticket, ok }));
    }

    fn flush(oracle: &mut Oracle, ok: bool) {
        oracle.step(&Event::Disk(DiskEvent::FlushBegin { ticket: 100 }));
        oracle.step(&Event::Disk(DiskEvent::FlushEnd { ticket: 100, ok }));
    }

    #[test]
    fn a_sector_is_old_or_new_until_a_flush() {
        let mut oracle = Oracle::new(&[1], &[1]);
        write(&mut oracle, 2, true);
        write(&mut oracle, 3, true);
        assert_eq!(allowed_values(&oracle), [1, 2, 3]);
        flush(&mut oracle, false);
        assert_eq!(allowed_values(&oracle), [1, 2, 3]);
        flush(&mut oracle, true);
        assert_eq!(allowed_values(&oracle), [3]);
        write(&mut oracle, 4, false);
        write(&mut oracle, 0, true);
        assert_eq!(allowed_values(&oracle), [0, 3, 4]);
        flush(&mut oracle, true);
        assert_eq!(allowed_values(&oracle), [0]);
        write(&mut oracle, 5, false);
        flush(&mut oracle, true);
        assert_eq!(allowed_values(&oracle), [0, 5], "a failed write may have been applied");
    }

    #[test]
    fn a_write_during_a_flush_may_or_may_not_be_durable() {
        let mut oracle = Oracle::new(&[1], &[1]);
        oracle.step(&Event::Disk(DiskEvent::Begin {
            ticket: 1,
            first: 0,
            sectors: 1,
            value: 2,
        }));
        oracle.step(&Event::Disk(DiskEvent::FlushBegin { ticket: 100 }));
        oracle.step(&Event::Disk(DiskEvent::End { ticket: 1, ok: true }));
        oracle.step(&Event::Disk(DiskEvent::FlushEnd { ticket: 100, ok: true }));
        assert_eq!(allowed_values(&oracle), [1, 2]);
        flush(&mut oracle, true);
        assert_eq!(allowed_values(&oracle), [2]);
    }

    #[test]
    fn a_later_flush_does_not_cover_writes_of_a_killed_process() {
        let mut oracle = Oracle::new(&[1], &[1]);
        write(&mut oracle, 2, true);
        oracle.step(&Event::Killed);
        flush(&mut oracle, true);
        assert_eq!(allowed_values(&oracle), [1, 2]);
        oracle.step(&Event::Observed([1].into()));
        flush(&mut oracle, true);
        assert_eq!(allowed_values(&oracle), [1], "but it covers what was observed since");
    }

    #[test]
    fn sectors_encode_their_value_and_position() {
        let oracle = Oracle::new(&[1, 2], &[1, 2]);
        assert!(oracle.check(1, &fill(1, 2)).is_ok());
        let mut torn = fill(1, 2);
        torn[256..].fill(0);
        for (sector, says) in [
            (fill(0, 2), "value 2 of sector 0"),
            (fill(1, 0), "zeroes"),
            (torn, "value 2 of sector 1, not all of it"),
            ([7; 512], "foreign"),
        ] {
            let error = oracle.check(1, &sector).unwrap_err();
            assert!(error.contains(says) && error.contains("may hold value 2"), "{error}");
        }
    }
}
