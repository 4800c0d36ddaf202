//! Mutexes whose data is consistent whenever a thread can panic, so that poisoning means nothing.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Acquires a mutex, and ignores its poisoning.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
