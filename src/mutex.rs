//! Locks whose data is consistent whenever a thread can panic, so that poisoning means nothing.

use std::sync::{
    Condvar, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, WaitTimeoutResult,
};
use std::time::Duration;

/// Acquires a mutex, and ignores its poisoning.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Returns the data of a mutex that no other thread can hold.
pub(crate) fn unlocked<T>(mutex: &mut Mutex<T>) -> &mut T {
    mutex.get_mut().unwrap_or_else(PoisonError::into_inner)
}

/// Acquires a lock for reading, and ignores its poisoning.
pub(crate) fn read_lock<T>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

/// Acquires a lock for writing, and ignores its poisoning.
pub(crate) fn write_lock<T>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}

/// Releases a mutex until the condition variable is notified, or for no reason.
pub(crate) fn wait<'m, T>(condvar: &Condvar, guard: MutexGuard<'m, T>) -> MutexGuard<'m, T> {
    condvar.wait(guard).unwrap_or_else(PoisonError::into_inner)
}

/// Releases a mutex until `condition` returns false.
pub(crate) fn wait_while<'m, T>(
    condvar: &Condvar,
    guard: MutexGuard<'m, T>,
    condition: impl FnMut(&mut T) -> bool,
) -> MutexGuard<'m, T> {
    condvar
        .wait_while(guard, condition)
        .unwrap_or_else(PoisonError::into_inner)
}

/// Releases a mutex until the condition variable is notified, or for no reason, at most for `time`.
pub(crate) fn wait_timeout<'m, T>(
    condvar: &Condvar,
    guard: MutexGuard<'m, T>,
    time: Duration,
) -> (MutexGuard<'m, T>, WaitTimeoutResult) {
    condvar
        .wait_timeout(guard, time)
        .unwrap_or_else(PoisonError::into_inner)
}

/// Releases a mutex until `condition` returns false, at most for `time`.
pub(crate) fn wait_timeout_while<'m, T>(
    condvar: &Condvar,
    guard: MutexGuard<'m, T>,
    time: Duration,
    condition: impl FnMut(&mut T) -> bool,
) -> MutexGuard<'m, T> {
    let waited = condvar.wait_timeout_while(guard, time, condition);
    waited.unwrap_or_else(PoisonError::into_inner).0
}
