//! Extent cache: time-limited answers to block status, so that holes and zeroes are not fetched.
//!
//! The export is divided into regions of [`REGION`] bytes, each with at most one cached answer. An answer is used for
//! [`TIME_TO_LIVE`]: other clients may write to the export, so a cached answer is like a read of that time.
//!
//! Changes of this client take effect at once. Invariant: no cached range is zero or a hole where a change of this
//! client has begun since the question was sent. Two rules keep it:
//! - a change removes the regions that it may make wrong, before it is sent;
//! - an answer whose [`CacheStamp`] is not current is not cached: its question was in flight together with a change,
//!   and the server may have answered for the time before or after.
//!
//! One mutex guards everything. No other lock is acquired while it is held.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use libnbd_sys::{LIBNBD_STATE_HOLE, LIBNBD_STATE_ZERO};

use crate::block::Content;
use crate::mutex::lock;

/// Size of a region in bytes, and so of the largest block status request: its length has 32 bits.
pub(super) const REGION: u64 = 2 << 30;

/// Time for which an answer is used.
const TIME_TO_LIVE: Duration = Duration::from_secs(2);

/// Maximum number of runs cached in all regions together.
const MAX_RUNS: usize = 1 << 16;

/// Answer for the part of a region from byte `start` to byte `end` of the export.
#[derive(Debug)]
struct Region {
    learned: Instant,
    start: u64,
    end: u64,
    /// Start and content of each run, ordered, without gaps; the first one starts at `start`. Neighbours differ.
    runs: Vec<(u64, Content)>,
}

/// Time-limited cache of block status; see the module documentation.
#[derive(Debug, Default)]
pub(super) struct ExtentCache(Mutex<CacheContent>);

#[derive(Debug, Default)]
struct CacheContent {
    /// By region number: the offset divided by [`REGION`].
    regions: HashMap<u64, Region>,
    /// Number of runs in all regions.
    runs: usize,
    /// Counts the begins and the ends of changes.
    version: u64,
    /// Number of changes in flight.
    changing: usize,
    /// Regions that are being prefetched, each with the time at which that began.
    prefetching: HashMap<u64, Instant>,
}

/// Version of the cache when a block status request was sent. `None`: a change was in flight, so the answer will not be
/// cached.
pub(super) type CacheStamp = Option<u64>;

impl ExtentCache {
    fn inner(&self) -> MutexGuard<'_, CacheContent> {
        lock(&self.0)
    }

    /// Returns the content at `byte` and the end of the range that has it. Returns `None` if there is no current
    /// answer.
    pub(super) fn at(&self, byte: u64) -> Option<(Content, u64)> {
        let inner = self.inner();
        let region = inner.regions.get(&(byte / REGION))?;
        // An answer may cover a part of its region only: the question may start within it, and the server may answer for
        // less than it was asked.
        if region.learned.elapsed() > TIME_TO_LIVE || byte < region.start || byte >= region.end {
            return None;
        }
        let next = region.runs.partition_point(|(start, _)| *start <= byte);
        let (_, content) = region.runs.get(next.checked_sub(1)?)?;
        Some((*content, region.runs.get(next).map_or(region.end, |(start, _)| *start)))
    }

    /// Returns true if the range is known to read as zeroes.
    pub(super) fn is_zero(&self, mut from: u64, to: u64) -> bool {
        while from < to {
            match self.at(from) {
                Some((content, end)) if content.is_zero() && end > from => from = end,
                _ => return false,
            }
        }
        true
    }

    /// Returns true if the caller should prefetch the region of `byte`: there is no current answer, and no prefetch of
    /// it was started within [`TIME_TO_LIVE`].
    pub(super) fn ask_ahead(&self, byte: u64) -> bool {
        if self.at(byte).is_some() {
            return false;
        }
        let mut inner = self.inner();
        let now = Instant::now();
        // Entries expire by time, not by the answer: a region whose answer could not be cached is not asked for again
        // with each read.
        inner.prefetching.retain(|_, at| now.duration_since(*at) < TIME_TO_LIVE);
        inner.changing == 0 && inner.prefetching.insert(byte / REGION, now).is_none()
    }

    /// Returns the stamp for a block status request. The caller must take it before it sends the request.
    pub(super) fn stamp(&self) -> CacheStamp {
        let inner = self.inner();
        // With a change in flight the server may answer for the time before or after it.
        (inner.changing == 0).then_some(inner.version)
    }

    /// Caches an answer to block status: lengths and flags of the extents from `start` on. Replaces the answer for the
    /// region.
    ///
    /// Does nothing if a change has begun or ended since `stamp` was taken.
    pub(super) fn learn(&self, stamp: CacheStamp, start: u64, extents: &[(u64, u32)]) {
        let mut inner = self.inner();
        // A change began or ended while the question was in flight, or `clear` was called: the answer may be stale.
        if stamp != Some(inner.version) {
            return;
        }
        let index = start / REGION;
        // A server may describe more than it was asked for: the answer is truncated at the end of the region.
        let region_end = (index + 1) * REGION;
        let (mut at, mut runs) = (start, Vec::<(u64, Content)>::new());
        for (len, flags) in extents {
            if at >= region_end {
                break;
            }
            let content = content(*flags);
            if runs.last().is_none_or(|(_, last)| *last != content) {
                runs.push((at, content));
            }
            at = at.saturating_add(*len).min(region_end);
        }
        if at == start {
            return;
        }
        inner.remove(index);
        // At the limit start over: answers live for a short time, so an eviction order would gain little.
        if inner.runs + runs.len() > MAX_RUNS {
            inner.regions.clear();
            inner.runs = 0;
        }
        runs.truncate(MAX_RUNS);
        inner.runs += runs.len();
        inner.regions.insert(
            index,
            Region {
                learned: Instant::now(),
                start,
                end: at,
                runs,
            },
        );
    }

    /// Reports that a change of the range is about to be sent. [`Self::end_change`] must follow exactly once.
    pub(super) fn begin_change(&self, from: u64, to: u64) {
        let mut inner = self.inner();
        inner.version += 1;
        inner.changing += 1;
        inner.remove_changed(from, to);
    }

    /// Reports that a change was answered or has failed.
    pub(super) fn end_change(&self) {
        let mut inner = self.inner();
        inner.version += 1;
        inner.changing = inner.changing.saturating_sub(1);
    }

    /// Removes the regions of a range that was zeroed or discarded: cached data may be a hole now. That is only a
    /// missed optimization, so this follows the change instead of preceding it.
    pub(super) fn zeroed(&self, from: u64, to: u64) {
        self.inner().remove_overlapping(from, to, |_| true);
    }

    /// Removes everything, and makes requests in flight stale: another server may answer from now on.
    pub(super) fn clear(&self) {
        let mut inner = self.inner();
        inner.version += 1;
        inner.regions.clear();
        inner.prefetching.clear();
        inner.runs = 0;
    }
}

impl CacheContent {
    /// Removes one region.
    fn remove(&mut self, index: u64) {
        if let Some(region) = self.regions.remove(&index) {
            self.runs -= region.runs.len();
        }
    }

    /// Removes the regions in which the range is not all data: a write makes holes and zeroes wrong. Data stays data,
    /// so overwriting it keeps the answer.
    fn remove_changed(&mut self, from: u64, to: u64) {
        let first_byte = |region: &Region| from.max(region.start);
        self.remove_overlapping(from, to, |region| {
            !region.is_data(first_byte(region), to.min(region.end))
        });
    }

    /// Removes the regions that overlap the range and for which `condition` returns true.
    fn remove_overlapping(&mut self, from: u64, to: u64, condition: impl Fn(&Region) -> bool) {
        let indexes = from / REGION..=to.saturating_sub(1) / REGION;
        // Iterates over the smaller set: the regions of the range, of which a long discard has many, or those cached.
        let removed: Vec<u64> = if indexes.end().saturating_sub(*indexes.start()) < self.regions.len() as u64 {
            indexes
                .filter(|i| self.regions.get(i).is_some_and(&condition))
                .collect()
        } else {
            self.regions
                .iter()
                .filter(|(i, r)| indexes.contains(i) && condition(r))
                .map(|(i, _)| *i)
                .collect()
        };
        removed.into_iter().for_each(|index| self.remove(index));
    }
}

impl Region {
    /// Returns true if the range, which must be within this region's answer, is all data.
    fn is_data(&self, from: u64, to: u64) -> bool {
        let first = self.runs.partition_point(|(start, _)| *start <= from).saturating_sub(1);
        let runs = self.runs.get(first..).unwrap_or_default();
        runs.iter()
            .take_while(|(start, _)| *start < to)
            .all(|(_, content)| *content == Content::Data)
    }
}

/// Returns the content for the flags of an extent. A hole that does not read as zeroes may hold anything, so it counts
/// as data.
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
    fn answers_are_found_and_equal_neighbours_are_joined() {
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
    fn a_change_removes_regions_that_it_overlaps_outside_of_data() {
        let map = ExtentCache::default();
        map.learn(map.stamp(), 0, &[(1000, 0), (1000, HOLE)]);
        map.begin_change(0, 1000);
        map.end_change();
        assert_eq!(map.at(0), Some((Content::Data, 1000)));
        map.begin_change(999, 1001);
        map.end_change();
        assert_eq!(map.at(0), None);
    }

    #[test]
    fn zeroed_data_is_removed() {
        let map = ExtentCache::default();
        for region in [0, REGION, 5 * REGION] {
            map.learn(map.stamp(), region, &[(1000, 0)]);
        }
        map.zeroed(500, REGION + 1);
        assert_eq!((map.at(0), map.at(REGION)), (None, None));
        assert_eq!(map.at(5 * REGION), Some((Content::Data, 5 * REGION + 1000)));
        map.zeroed(0, u64::MAX);
        assert_eq!(map.at(5 * REGION), None);
        assert_eq!(map.inner().runs, 0);
    }

    #[test]
    fn an_answer_in_flight_with_a_change_is_not_cached() {
        let map = ExtentCache::default();
        let before = map.stamp();
        map.begin_change(5000, 6000);
        let during = map.stamp();
        map.end_change();
        for stamp in [before, during] {
            map.learn(stamp, 0, &[(10_000, HOLE)]);
            assert_eq!(map.at(0), None);
        }
        map.learn(map.stamp(), 0, &[(10_000, HOLE)]);
        assert!(map.is_zero(0, 10_000));
    }

    #[test]
    fn regions_are_separate_and_their_runs_are_limited() {
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
    fn a_region_is_prefetched_once() {
        let map = ExtentCache::default();
        assert!(map.ask_ahead(5));
        assert!(!map.ask_ahead(REGION - 1));
        assert!(map.ask_ahead(REGION));
        map.begin_change(0, 1);
        assert!(!map.ask_ahead(2 * REGION));
    }
}
