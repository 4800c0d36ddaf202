//! Changes that no flush has made durable yet: how many bytes of them there may be, and which of them a flush covers.

/// Size in bytes above which the session starts a background flush.
pub(super) const SOFT_LIMIT: usize = 24 << 20;

/// Size in bytes above which further changes wait for a flush.
pub(super) const HARD_LIMIT: usize = 128 << 20;

/// State of the replay log when a flush was sent: determines what its answer proves.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct FlushToken {
    /// The flush covers entries with a lower number.
    pub(super) number: u64,
    /// [`ReplayLog::removals`] at that time.
    pub(super) removals: u64,
    /// [`ReplayLog::failures`] at that time.
    pub(super) failures: u64,
}
