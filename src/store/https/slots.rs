//! Number of requests in flight to a server.

use std::sync::{Mutex, PoisonError};

use tokio::sync::{Semaphore, SemaphorePermit};

/// Answers after which a limit that the server lowered is raised by one.
const RAISE_AFTER: usize = 64;

/// Requests in flight: as many as there are connections, fewer where the server says that it has too many.
#[derive(Debug)]
pub(super) struct Slots {
    free: Semaphore,
    /// Number of connections.
    pub(super) most: usize,
    /// Present limit, and answers since it was lowered.
    limit: Mutex<(usize, usize)>,
}

impl Slots {
    pub(super) fn new(most: usize) -> Self {
        let (free, limit) = (Semaphore::new(most), Mutex::new((most, 0)));
        Self { free, most, limit }
    }

    pub(super) async fn acquire(&self) -> SemaphorePermit<'_> {
        loop {
            // The semaphore is never closed.
            if let Ok(slot) = self.free.acquire().await {
                return slot;
            }
        }
    }

    /// Lowers the limit by the slot of a request that was one too many.
    pub(super) fn lower(&self, slot: SemaphorePermit<'_>) {
        let mut limit = self.limit.lock().unwrap_or_else(PoisonError::into_inner);
        limit.1 = 0;
        if limit.0 > 1 {
            limit.0 -= 1;
            slot.forget();
        }
    }

    pub(super) fn succeeded(&self) {
        let mut limit = self.limit.lock().unwrap_or_else(PoisonError::into_inner);
        limit.1 += 1;
        if limit.0 < self.most && limit.1 >= RAISE_AFTER {
            *limit = (limit.0 + 1, 0);
            self.free.add_permits(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_that_the_server_lowered_rises_again_and_never_falls_below_one() {
        let slots = Slots::new(2);
        for _ in 0..3 {
            if let Ok(slot) = slots.free.try_acquire() {
                slots.lower(slot);
            }
        }
        assert_eq!(slots.free.available_permits(), 1);
        (0..2 * RAISE_AFTER).for_each(|_| slots.succeeded());
        assert_eq!(slots.free.available_permits(), 2);
    }
}
