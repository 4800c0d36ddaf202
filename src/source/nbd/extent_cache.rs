//! What is known of holes and zeroes, for a short while.
//!
//! The export is looked at in regions of [`REGION`] bytes. What a server said of one is believed for [`BELIEVED`]: other
//! clients may write to the export too, so it is like a read of that time. Our own changes drop at once what they
//! touch, and an answer that was under way during a change is not kept.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use libnbd_sys::{LIBNBD_STATE_HOLE, LIBNBD_STATE_ZERO};

use crate::block::Content;

/// Bytes that one question is about at most: the length of a request has 32 bits.
pub(super) const REGION: u64 = 2 << 30;

/// How long an answer is believed.
const BELIEVED: Duration = Duration::from_secs(2);

/// Ranges that are kept for all regions together.
const MAX_RUNS: usize = 1 << 16;

/// What was said of a part of a region, from `start` to `end`.
#[derive(Debug)]
struct Region {
    learnt: Instant,
    start: u64,
    end: u64,
    /// Where each range starts and what it holds; the first one starts at `start`.
    runs: Vec<(u64, Content)>,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct ExtentCache(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    regions: HashMap<u64, Region>,
    runs: usize,
    /// Counts beginnings and ends of changes.
    version: u64,
    /// Changes under way.
    changing: usize,
    /// Regions that are asked for ahead of their use, and when that began.
    asked: HashMap<u64, Instant>,
}

/// The state of the map when a question was sent; `None`: a change was under way.
pub(super) type CacheStamp = Option<u64>;

impl ExtentCache {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is at a byte, and up to which byte, if that is known.
    pub(super) fn at(&self, byte: u64) -> Option<(Content, u64)> {
        let inner = self.inner();
        let region = inner.regions.get(&(byte / REGION))?;
        if region.learnt.elapsed() > BELIEVED || byte < region.start || byte >= region.end {
            return None;
        }
        let next = region.runs.partition_point(|(start, _)| *start <= byte);
        let (_, content) = region.runs.get(next.checked_sub(1)?)?;
        Some((*content, region.runs.get(next).map_or(region.end, |(start, _)| *start)))
    }

    /// Whether the range is known to read as zeroes.
    pub(super) fn is_zero(&self, mut from: u64, to: u64) -> bool {
        while from < to {
            match self.at(from) {
                Some((content, end)) if content.is_zero() && end > from => from = end,
                _ => return false,
            }
        }
        true
    }

    /// Whether to ask now for the region of a byte, which nobody waits for: nothing is known, and nobody asks.
    pub(super) fn ask_ahead(&self, byte: u64) -> bool {
        if self.at(byte).is_some() {
            return false;
        }
        let mut inner = self.inner();
        let now = Instant::now();
        inner.asked.retain(|_, at| now.duration_since(*at) < BELIEVED);
        inner.changing == 0 && inner.asked.insert(byte / REGION, now).is_none()
    }

    /// To be taken when a question is sent.
    pub(super) fn stamp(&self) -> CacheStamp {
        let inner = self.inner();
        (inner.changing == 0).then_some(inner.version)
    }

    /// Takes an answer: lengths and flags from `start` on. What was known of the region is replaced.
    pub(super) fn learn(&self, stamp: CacheStamp, start: u64, extents: &[(u64, u32)]) {
        let mut inner = self.inner();
        if stamp != Some(inner.version) {
            return;
        }
        let index = start / REGION;
        let most = (index + 1) * REGION;
        let (mut at, mut runs) = (start, Vec::<(u64, Content)>::new());
        for (len, flags) in extents {
            if at >= most {
                break;
            }
            let content = content(*flags);
            if runs.last().is_none_or(|(_, last)| *last != content) {
                runs.push((at, content));
            }
            at = at.saturating_add(*len).min(most);
        }
        if at == start {
            return;
        }
        inner.forget(index);
        if inner.runs + runs.len() > MAX_RUNS {
            inner.regions.clear();
            inner.runs = 0;
        }
        runs.truncate(MAX_RUNS);
        inner.runs += runs.len();
        inner.regions.insert(
            index,
            Region {
                learnt: Instant::now(),
                start,
                end: at,
                runs,
            },
        );
    }

    /// A change of a range is about to be sent.
    pub(super) fn change_begins(&self, from: u64, to: u64) {
        let mut inner = self.inner();
        inner.version += 1;
        inner.changing += 1;
        inner.touch(from, to);
    }

    /// It was answered, or given up.
    pub(super) fn change_ends(&self) {
        let mut inner = self.inner();
        inner.version += 1;
        inner.changing = inner.changing.saturating_sub(1);
    }

    /// What was written is zeroes, or nothing: where there was data may be a hole now.
    pub(super) fn emptied(&self, from: u64, to: u64) {
        self.inner().forget_in(from, to, |_| true);
    }

    /// Forgets everything: another server may answer from now on.
    pub(super) fn clear(&self) {
        let mut inner = self.inner();
        inner.version += 1;
        inner.regions.clear();
        inner.asked.clear();
        inner.runs = 0;
    }
}

impl Inner {
    fn forget(&mut self, index: u64) {
        if let Some(region) = self.regions.remove(&index) {
            self.runs -= region.runs.len();
        }
    }

    /// Drops regions of which something changes that was no data before.
    fn touch(&mut self, from: u64, to: u64) {
        let begins = |region: &Region| from.max(region.start);
        self.forget_in(from, to, |region| !region.is_data(begins(region), to.min(region.end)));
    }

    /// Drops regions that the range meets, of those for which it is `wanted`.
    fn forget_in(&mut self, from: u64, to: u64, wanted: impl Fn(&Region) -> bool) {
        let met = from / REGION..=to.saturating_sub(1) / REGION;
        let gone: Vec<u64> = if met.end().saturating_sub(*met.start()) < self.regions.len() as u64 {
            met.filter(|i| self.regions.get(i).is_some_and(&wanted)).collect()
        } else {
            self.regions
                .iter()
                .filter(|(i, r)| met.contains(i) && wanted(r))
                .map(|(i, _)| *i)
                .collect()
        };
        gone.into_iter().for_each(|index| self.forget(index));
    }
}

impl Region {
    /// Whether all of a range within it is data.
    fn is_data(&self, from: u64, to: u64) -> bool {
        let first = self.runs.partition_point(|(start, _)| *start <= from).saturating_sub(1);
        let runs = self.runs.get(first..).unwrap_or_default();
        runs.iter()
            .take_while(|(start, _)| *start < to)
            .all(|(_, content)| *content == Content::Data)
    }
}

/// A range that is no zeroes for sure may hold anything, whether it takes room or not.
pub(super) fn content(flags: u32) -> Content {
    match (flags & LIBNBD_STATE_ZERO != 0, flags & LIBNBD_STATE_HOLE != 0) {
        (true, true) => Content::Hole,
        (true, false) => Content::Zero,
        (false, _) => Content::Data,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOLE: u32 = LIBNBD_STATE_HOLE | LIBNBD_STATE_ZERO;

    #[test]
    fn answers_are_found_and_neighbours_joined() {
        let map = ExtentCache::default();
        map.learn(
            map.stamp(),
            1000,
            &[(1000, 0), (500, 0), (4000, HOLE), (100, LIBNBD_STATE_ZERO)],
        );
        assert_eq!(map.at(999), None);
        assert_eq!(map.at(1000), Some((Content::Data, 2500)));
        assert_eq!(map.at(2499), Some((Content::Data, 2500)));
        assert_eq!(map.at(2500), Some((Content::Hole, 6500)));
        assert_eq!(map.at(6599), Some((Content::Zero, 6600)));
        assert_eq!(map.at(6600), None);
        assert!(map.is_zero(2500, 6600) && !map.is_zero(2499, 6600) && !map.is_zero(2500, 6601));
    }

    #[test]
    fn a_change_drops_what_it_touches_unless_that_was_data() {
        let map = ExtentCache::default();
        map.learn(map.stamp(), 0, &[(1000, 0), (1000, HOLE)]);
        map.change_begins(0, 1000);
        map.change_ends();
        assert_eq!(map.at(0), Some((Content::Data, 1000)));
        map.change_begins(999, 1001);
        map.change_ends();
        assert_eq!(map.at(0), None);
    }

    #[test]
    fn data_that_was_made_zeroes_is_asked_for_again() {
        let map = ExtentCache::default();
        for region in [0, REGION, 5 * REGION] {
            map.learn(map.stamp(), region, &[(1000, 0)]);
        }
        map.emptied(500, REGION + 1);
        assert_eq!((map.at(0), map.at(REGION)), (None, None));
        assert_eq!(map.at(5 * REGION), Some((Content::Data, 5 * REGION + 1000)));
        map.emptied(0, u64::MAX);
        assert_eq!(map.at(5 * REGION), None);
        assert_eq!(map.inner().runs, 0);
    }

    #[test]
    fn an_answer_that_crossed_a_change_is_not_kept() {
        let map = ExtentCache::default();
        let before = map.stamp();
        map.change_begins(5000, 6000);
        let during = map.stamp();
        map.change_ends();
        for stamp in [before, during] {
            map.learn(stamp, 0, &[(10_000, HOLE)]);
            assert_eq!(map.at(0), None);
        }
        map.learn(map.stamp(), 0, &[(10_000, HOLE)]);
        assert!(map.is_zero(0, 10_000));
    }

    #[test]
    fn regions_are_apart_and_bounded() {
        let map = ExtentCache::default();
        map.learn(map.stamp(), REGION - 100, &[(200, HOLE)]);
        assert_eq!(map.at(REGION - 1), Some((Content::Hole, REGION)));
        assert_eq!(map.at(REGION), None);
        let many: Vec<(u64, u32)> = (0..MAX_RUNS as u32)
            .map(|i| (512, if i % 2 == 0 { 0 } else { HOLE }))
            .collect();
        map.learn(map.stamp(), 0, &many);
        map.learn(map.stamp(), REGION, &many);
        assert!(map.inner().runs <= MAX_RUNS);
        assert!(map.at(REGION).is_some());
    }

    #[test]
    fn a_region_is_asked_for_ahead_once() {
        let map = ExtentCache::default();
        assert!(map.ask_ahead(5));
        assert!(!map.ask_ahead(REGION - 1));
        assert!(map.ask_ahead(REGION));
        map.change_begins(0, 1);
        assert!(!map.ask_ahead(2 * REGION));
    }
}
