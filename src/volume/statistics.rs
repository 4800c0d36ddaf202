//! Counts and latencies of the requests of a disk, by kind.
//!
//! Every request updates them, so they are relaxed counters: each stands alone, and a reader may see one request in some
//! of them and not yet in others.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// Kind of a request, for its counters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RequestKind {
    /// A read.
    Read,
    /// A write.
    Write,
    /// A flush, also that at the end of an open.
    Flush,
    /// Zeroing, truncating or allocating.
    Zero,
    /// A search for data or a hole.
    Seek,
}

/// Names of the kinds, in the order of their declaration.
const NAMES: [&str; 5] = ["reads", "writes", "flushes", "zeroings", "searches"];

/// Number of classes of latency. Class n holds latencies below 2^n microseconds; the last one holds all others, from two
/// seconds on.
const CLASSES: usize = 22;

/// Counters of all kinds.
#[derive(Debug, Default)]
pub(super) struct Statistics([Counters; NAMES.len()]);

#[derive(Debug, Default)]
struct Counters {
    begun: AtomicU64,
    ended: AtomicU64,
    failed: AtomicU64,
    bytes: AtomicU64,
    latencies: [AtomicU64; CLASSES],
}

impl Statistics {
    /// Counts the begin of a request. Returns its time, for [`end`](Self::end).
    pub(super) fn begin(&self, kind: RequestKind) -> Instant {
        if let Some(counters) = self.0.get(kind as usize) {
            counters.begun.fetch_add(1, Relaxed);
        }
        Instant::now()
    }

    /// Counts the end of a request that began at `begun`. `bytes` is `None` if it failed.
    pub(super) fn end(&self, kind: RequestKind, begun: Instant, bytes: Option<u64>) {
        let Some(counters) = self.0.get(kind as usize) else {
            return;
        };
        match bytes {
            Some(bytes) => counters.bytes.fetch_add(bytes, Relaxed),
            None => counters.failed.fetch_add(1, Relaxed),
        };
        if let Some(class) = counters.latencies.get(class_of(begun.elapsed())) {
            class.fetch_add(1, Relaxed);
        }
        counters.ended.fetch_add(1, Relaxed);
    }
}

/// Returns the class of a latency.
fn class_of(latency: Duration) -> usize {
    let bits = u128::BITS - latency.as_micros().leading_zeros();
    (bits as usize).min(CLASSES - 1)
}

impl Counters {
    /// Returns the upper bound of the class in which the latency lies that a share of `percent` of the requests does not
    /// exceed.
    fn percentile(&self, percent: u64) -> Duration {
        let counts = self.latencies.each_ref().map(|class| class.load(Relaxed));
        let wanted = (counts.iter().sum::<u64>() * percent).div_ceil(100);
        let mut sum = 0;
        let class = counts.iter().position(|count| {
            sum += count;
            sum >= wanted
        });
        Duration::from_micros(1 << class.unwrap_or(0))
    }
}

/// Lists the kinds that occurred, for the log: "12 reads (49152 bytes, 0 failed, 1 in flight, 50 % within 64µs, …)".
impl fmt::Display for Statistics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "";
        for (name, counters) in NAMES.iter().zip(&self.0) {
            let (begun, ended) = (counters.begun.load(Relaxed), counters.ended.load(Relaxed));
            if begun == 0 {
                continue;
            }
            let (bytes, failed) = (counters.bytes.load(Relaxed), counters.failed.load(Relaxed));
            let (half, most) = (counters.percentile(50), counters.percentile(99));
            write!(
                f,
                "{separator}{ended} {name} ({bytes} bytes, {failed} failed, {} in flight, 50 % within {half:?}, 99 % within \
                 {most:?})",
                begun.saturating_sub(ended)
            )?;
            separator = ", ";
        }
        match separator {
            "" => write!(f, "no requests"),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn latencies_are_classed_by_powers_of_two() {
        for (micros, class) in [
            (0, 0),
            (1, 1),
            (2, 2),
            (3, 2),
            (4, 3),
            (1000, 10),
            (1 << 20, 21),
            (1 << 40, 21),
        ] {
            assert_eq!(class_of(Duration::from_micros(micros)), class, "{micros}");
        }
    }

    #[test]
    fn requests_are_counted_by_kind() {
        let statistics = Statistics::default();
        assert_eq!(statistics.to_string(), "no requests");
        for _ in 0..99 {
            let begun = statistics.begin(RequestKind::Read);
            statistics.end(RequestKind::Read, begun, Some(4096));
        }
        let slow = Instant::now() - Duration::from_millis(100);
        statistics.begin(RequestKind::Write);
        statistics.end(RequestKind::Write, slow, None);
        statistics.begin(RequestKind::Flush);
        let text = statistics.to_string();
        assert!(
            text.starts_with("99 reads (405504 bytes, 0 failed, 0 in flight, 50 % within "),
            "{text}"
        );
        let slow = "1 writes (0 bytes, 1 failed, 0 in flight, 50 % within 131.072ms, 99 % within 131.072ms)";
        assert!(text.contains(slow), "{text}");
        assert!(text.contains("0 flushes (0 bytes, 0 failed, 1 in flight"), "{text}");
    }
}
