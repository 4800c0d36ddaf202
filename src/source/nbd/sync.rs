//! The synchronization primitives of the lock-free parts. The model checker of the tests replaces this module by its own.

pub(super) use crate::mutex::lock;
pub(super) use std::sync::Mutex;
pub(super) use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
