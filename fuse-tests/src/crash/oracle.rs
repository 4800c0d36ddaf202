//! Knows what each sector may hold after a crash at any place of a log, and judges what is left.
//!
//! A sector may hold the last value that was written before the start of a flush that succeeded, or any that was written
//! later, also by a request that failed or had not ended. Requests may overlap in time: one counts as later than
//! another only if it began after the other had ended.

use std::sync::Arc;

use vmdkfuse::block::{BlockRead, Lba};

use super::store::{Event, Mark};

const SECTOR: usize = 512;

/// Sectors that are read at once.
const STEP: u64 = 128;

/// A sector as `value` is written to it at `lba`; 0 is zeroes. Every 8 bytes of it tell value and place.
pub fn fill(lba: u64, value: u64) -> [u8; SECTOR] {
    let mut sector = [0; SECTOR];
    if value != 0 {
        let bits = value << 40 | (lba & 0xff_ffff) << 16 | 0x5a;
        sector[..8].copy_from_slice(&bits.to_le_bytes());
        // doubled, which is fast where nothing is optimized; the second byte of each word counts it
        for have in [8, 16, 32, 64, 128, 256] {
            sector.copy_within(..have, have);
        }
        for i in 0..SECTOR / 8 {
            sector[i * 8 + 1] = i as u8;
        }
    }
    sector
}

/// The value that the first bytes of a sector tell, for messages.
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

/// What each sector may hold at one place of a log.
#[derive(Debug, Clone)]
pub struct Oracle {
    /// All requests so far; numbers 0 and 1 are what was there before, and what a repair makes of that.
    requests: Vec<Request>,
    /// The request of each ticket.
    tickets: std::collections::HashMap<usize, usize>,
    /// For each sector the requests whose value it may hold, in the order in which they began.
    sectors: Vec<Vec<u32>>,
    /// When flushes that have not ended began, by ticket.
    flushes: std::collections::HashMap<usize, usize>,
    /// Events so far.
    now: usize,
    /// What is expected most likely, as bytes.
    likely: Vec<u8>,
}

#[derive(Debug, Clone)]
struct Request {
    begin: usize,
    /// When it returned.
    end: Option<usize>,
    ok: bool,
    values: Values,
}

/// What a request has made of sectors.
#[derive(Debug, Clone)]
enum Values {
    /// One value for all.
    One(u64),
    /// One for each sector of the disk.
    Each(Arc<[u64]>),
}

impl Request {
    /// Its value of a sector.
    fn value(&self, lba: usize) -> u64 {
        match &self.values {
            Values::One(value) => *value,
            Values::Each(values) => values[lba],
        }
    }

    /// What was there from `now` on.
    fn found(now: usize, values: Arc<[u64]>) -> Self {
        Self {
            begin: now,
            end: Some(now),
            ok: true,
            values: Values::Each(values),
        }
    }
}

impl Oracle {
    /// A disk whose sectors hold the values `before`, or `repaired` once it is opened for writing.
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
            requests: vec![Request::found(0, before.into()), Request::found(0, repaired.into())],
            tickets: Default::default(),
            sectors: differ.collect(),
            flushes: Default::default(),
            now: 0,
            likely,
        }
    }

    /// Goes on by one event.
    pub fn step(&mut self, event: &Event) {
        self.now += 1;
        let mark = match event {
            Event::Disk(mark) => mark,
            Event::Killed => {
                // what was not flushed need not be there any more, so that no later flush covers it
                self.requests.iter_mut().for_each(|request| request.ok = false);
                return;
            }
            Event::Shown(values) => {
                let number = self.requests.len() as u32;
                self.requests.push(Request::found(self.now, Arc::clone(values)));
                self.sectors
                    .iter_mut()
                    .filter(|may| may.len() > 1)
                    .for_each(|may| may.push(number));
                return;
            }
            _ => return,
        };
        match *mark {
            Mark::Begin {
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
            Mark::End { ticket, ok } => {
                let request = &mut self.requests[self.tickets[&ticket]];
                (request.end, request.ok) = (Some(self.now), ok);
            }
            Mark::FlushBegin { ticket } => {
                self.flushes.insert(ticket, self.now);
            }
            Mark::FlushEnd { ticket, ok } => {
                let began = self.flushes.remove(&ticket).expect("a flush that began");
                if ok {
                    self.flushed(began);
                }
            }
        }
    }

    /// What was written before `began` is durable: what it replaced can't come back.
    fn flushed(&mut self, began: usize) {
        for (lba, may) in self.sectors.iter_mut().enumerate() {
            if may.len() < 2 {
                continue;
            }
            let of = |number: &u32| &self.requests[*number as usize];
            let durable = may
                .iter()
                .map(of)
                .filter(|request| request.ok && request.end.is_some_and(|end| end < began));
            let Some(newest) = durable.map(|request| request.begin).max() else {
                continue;
            };
            may.retain(|number| of(number).end.is_none_or(|end| end >= newest));
            if let Some(&number) = may.first() {
                let value = self.requests[number as usize].value(lba);
                self.likely[lba * SECTOR..(lba + 1) * SECTOR].copy_from_slice(&fill(lba as u64, value));
            }
        }
    }

    /// Reads the whole disk; a sector that holds what it must not.
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

    /// Checks one sector.
    pub fn check(&self, lba: u64, sector: &[u8]) -> Result<(), String> {
        let may = &self.sectors[lba as usize];
        let value = |&number: &u32| self.requests[number as usize].value(lba as usize);
        if may.iter().any(|number| sector == fill(lba, value(number))) {
            return Ok(());
        }
        let may: Vec<_> = may.iter().map(|number| value(number).to_string()).collect();
        Err(format!(
            "sector {lba} holds {}, and may hold value {}",
            value_of(sector),
            may.join(" or ")
        ))
    }
}

/// The values that a disk of `sectors` holds now.
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

    /// Values that sector 0 may hold.
    fn may(oracle: &Oracle) -> Vec<u64> {
        (0..10)
            .filter(|&value| oracle.check(0, &fill(0, value)).is_ok())
            .collect()
    }

    fn write(oracle: &mut Oracle, value: u64, ok: bool) {
        let ticket = value as usize;
        oracle.step(&Event::Disk(Mark::Begin {
            ticket,
            first: 0,
            sectors: 1,
            value,
        }));
        oracle.step(&Event::Disk(Mark::End { ticket, ok }));
    }

    fn flush(oracle: &mut Oracle, ok: bool) {
        oracle.step(&Event::Disk(Mark::FlushBegin { ticket: 100 }));
        oracle.step(&Event::Disk(Mark::FlushEnd { ticket: 100, ok }));
    }

    #[test]
    fn old_or_new_until_a_flush() {
        let mut oracle = Oracle::new(&[1], &[1]);
        write(&mut oracle, 2, true);
        write(&mut oracle, 3, true);
        assert_eq!(may(&oracle), [1, 2, 3]);
        flush(&mut oracle, false);
        assert_eq!(may(&oracle), [1, 2, 3]);
        flush(&mut oracle, true);
        assert_eq!(may(&oracle), [3]);
        write(&mut oracle, 4, false);
        write(&mut oracle, 0, true);
        assert_eq!(may(&oracle), [0, 3, 4]);
        flush(&mut oracle, true);
        assert_eq!(may(&oracle), [0]);
        write(&mut oracle, 5, false);
        flush(&mut oracle, true);
        assert_eq!(may(&oracle), [0, 5], "what failed may have been done");
    }

    #[test]
    fn what_was_written_during_a_flush_may_or_may_not_be_durable() {
        let mut oracle = Oracle::new(&[1], &[1]);
        oracle.step(&Event::Disk(Mark::Begin {
            ticket: 1,
            first: 0,
            sectors: 1,
            value: 2,
        }));
        oracle.step(&Event::Disk(Mark::FlushBegin { ticket: 100 }));
        oracle.step(&Event::Disk(Mark::End { ticket: 1, ok: true }));
        oracle.step(&Event::Disk(Mark::FlushEnd { ticket: 100, ok: true }));
        assert_eq!(may(&oracle), [1, 2]);
        flush(&mut oracle, true);
        assert_eq!(may(&oracle), [2]);
    }

    #[test]
    fn what_was_lost_with_its_process_is_not_covered_by_a_later_flush() {
        let mut oracle = Oracle::new(&[1], &[1]);
        write(&mut oracle, 2, true);
        oracle.step(&Event::Killed);
        flush(&mut oracle, true);
        assert_eq!(may(&oracle), [1, 2]);
        oracle.step(&Event::Shown([1].into()));
        flush(&mut oracle, true);
        assert_eq!(may(&oracle), [1], "but what was seen since is");
    }

    #[test]
    fn sectors_tell_their_value_and_place() {
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
