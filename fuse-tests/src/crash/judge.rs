//! Knows what each sector may hold after a crash at any place of a log, and judges what is left.
//!
//! A sector may hold the last value that was written before the start of a flush that succeeded, or any that was written
//! later, also by a request that failed or had not ended. Requests may overlap in time: one counts as later than
//! another only if it began after the other had ended.

use vmdkfuse::block::{BlockRead, Lba};

use super::store::{Event, Mark};

const SECTOR: usize = 512;

/// Sectors that are read at once.
const STEP: u64 = 128;

/// A sector as `value` is written to it at `lba`; 0 is zeroes. Every 8 bytes of it tell value and place.
pub fn fill(lba: u64, value: u64) -> [u8; SECTOR] {
    let mut sector = [0; SECTOR];
    if value != 0 {
        for (i, word) in sector.chunks_exact_mut(8).enumerate() {
            let bits = value << 40 | (lba & 0xff_ffff) << 16 | (i as u64) << 8 | 0x5a;
            word.copy_from_slice(&bits.to_le_bytes());
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
            format!("value {value} of sector {lba}{}", if whole { "" } else { ", not all of it" })
        }
        _ => format!("foreign bytes {:02x?}…", &sector[..8]),
    }
}

/// What each sector may hold at one place of a log.
#[derive(Debug, Clone)]
pub struct Judge {
    /// All requests so far; numbers 0 and 1 are what was there before, and what a repair makes of that.
    requests: Vec<Request>,
    /// The request of each ticket.
    tickets: std::collections::HashMap<usize, usize>,
    /// For each sector the requests whose value it may hold, in the order in which they began.
    sectors: Vec<Vec<u32>>,
    /// The values of sectors before the first request, and after a repair.
    before: [Vec<u64>; 2],
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
    value: u64,
}

impl Judge {
    /// A disk whose sectors hold the values `before`, or `repaired` once it is opened for writing.
    pub fn new(before: &[u64], repaired: &[u64]) -> Self {
        let likely = repaired.iter().zip(0..).flat_map(|(&value, lba)| fill(lba, value)).collect();
        let original = Request { begin: 0, end: Some(0), ok: true, value: 0 };
        let differ = before.iter().zip(repaired).map(|(a, b)| if a == b { vec![0] } else { vec![0, 1] });
        Self {
            requests: vec![original.clone(), original],
            tickets: Default::default(),
            sectors: differ.collect(),
            before: [before.to_vec(), repaired.to_vec()],
            flushes: Default::default(),
            now: 0,
            likely,
        }
    }

    /// Goes on by one event.
    pub fn step(&mut self, event: &Event) {
        self.now += 1;
        let Event::Disk(mark) = event else { return };
        match *mark {
            Mark::Begin { ticket, first, sectors, value } => {
                self.tickets.insert(ticket, self.requests.len());
                for sector in first..first + sectors {
                    self.sectors[sector as usize].push(self.requests.len() as u32);
                }
                self.requests.push(Request { begin: self.now, end: None, ok: false, value });
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
            let durable = may.iter().map(of).filter(|request| request.ok && request.end.is_some_and(|end| end < began));
            let Some(newest) = durable.map(|request| request.begin).max() else { continue };
            may.retain(|number| of(number).end.is_none_or(|end| end >= newest));
            if let Some(&number) = may.first() {
                let value = match self.before.get(number as usize) {
                    Some(before) => before[lba],
                    None => self.requests[number as usize].value,
                };
                self.likely[lba * SECTOR..(lba + 1) * SECTOR].copy_from_slice(&fill(lba as u64, value));
            }
        }
    }

    /// Reads the whole disk; a sector that holds what it must not.
    pub fn verify(&self, disk: &dyn BlockRead) -> Result<(), String> {
        let sectors = self.sectors.len() as u64;
        if disk.geometry().sectors != sectors {
            return Err(format!("the disk has {} sectors, expected {sectors}", disk.geometry().sectors));
        }
        let mut buf = vec![0; STEP as usize * SECTOR];
        for first in (0..sectors).step_by(STEP as usize) {
            let count = STEP.min(sectors - first);
            let part = &mut buf[..count as usize * SECTOR];
            disk.read_at(Lba(first), part).map_err(|e| format!("reading {count} sectors at {first}: {e}"))?;
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
        let value = |&number: &u32| match self.before.get(number as usize) {
            Some(before) => before[lba as usize],
            None => self.requests[number as usize].value,
        };
        if may.iter().any(|number| sector == fill(lba, value(number))) {
            return Ok(());
        }
        let may: Vec<_> = may.iter().map(|number| value(number).to_string()).collect();
        Err(format!("sector {lba} holds {}, and may hold value {}", value_of(sector), may.join(" or ")))
    }

    /// The values that a disk holds now, to go on from them.
    pub fn values(&self, disk: &dyn BlockRead) -> Result<Vec<u64>, String> {
        self.verify(disk)?;
        let mut sector = [0; SECTOR];
        let all = (0..self.sectors.len() as u64).map(|lba| {
            disk.read_at(Lba(lba), &mut sector).map_err(|e| e.to_string())?;
            let word: [u8; 8] = sector[..8].try_into().expect("eight bytes");
            Ok(u64::from_le_bytes(word) >> 40)
        });
        all.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values that sector 0 may hold.
    fn may(judge: &Judge) -> Vec<u64> {
        (0..10).filter(|&value| judge.check(0, &fill(0, value)).is_ok()).collect()
    }

    fn write(judge: &mut Judge, value: u64, ok: bool) {
        let ticket = value as usize;
        judge.step(&Event::Disk(Mark::Begin { ticket, first: 0, sectors: 1, value }));
        judge.step(&Event::Disk(Mark::End { ticket, ok }));
    }

    fn flush(judge: &mut Judge, ok: bool) {
        judge.step(&Event::Disk(Mark::FlushBegin { ticket: 100 }));
        judge.step(&Event::Disk(Mark::FlushEnd { ticket: 100, ok }));
    }

    #[test]
    fn old_or_new_until_a_flush() {
        let mut judge = Judge::new(&[1], &[1]);
        write(&mut judge, 2, true);
        write(&mut judge, 3, true);
        assert_eq!(may(&judge), [1, 2, 3]);
        flush(&mut judge, false);
        assert_eq!(may(&judge), [1, 2, 3]);
        flush(&mut judge, true);
        assert_eq!(may(&judge), [3]);
        write(&mut judge, 4, false);
        write(&mut judge, 0, true);
        assert_eq!(may(&judge), [0, 3, 4]);
        flush(&mut judge, true);
        assert_eq!(may(&judge), [0]);
        write(&mut judge, 5, false);
        flush(&mut judge, true);
        assert_eq!(may(&judge), [0, 5], "what failed may have been done");
    }

    #[test]
    fn what_was_written_during_a_flush_may_or_may_not_be_durable() {
        let mut judge = Judge::new(&[1], &[1]);
        judge.step(&Event::Disk(Mark::Begin { ticket: 1, first: 0, sectors: 1, value: 2 }));
        judge.step(&Event::Disk(Mark::FlushBegin { ticket: 100 }));
        judge.step(&Event::Disk(Mark::End { ticket: 1, ok: true }));
        judge.step(&Event::Disk(Mark::FlushEnd { ticket: 100, ok: true }));
        assert_eq!(may(&judge), [1, 2]);
        flush(&mut judge, true);
        assert_eq!(may(&judge), [2]);
    }

    #[test]
    fn sectors_tell_their_value_and_place() {
        let judge = Judge::new(&[1, 2], &[1, 2]);
        assert!(judge.check(1, &fill(1, 2)).is_ok());
        let mut torn = fill(1, 2);
        torn[256..].fill(0);
        for (sector, says) in [
            (fill(0, 2), "value 2 of sector 0"),
            (fill(1, 0), "zeroes"),
            (torn, "value 2 of sector 1, not all of it"),
            ([7; 512], "foreign"),
        ] {
            let error = judge.check(1, &sector).unwrap_err();
            assert!(error.contains(says) && error.contains("may hold value 2"), "{error}");
        }
    }
}
