//! Calls, bytes and time of each function of VDDK, in memory that the host and its parent share.
//!
//! The parent reads them at any time, also those of a host that crashed. A host that is started again adds to them.

#![allow(unsafe_code)] // Maps the shared memory.

use std::fmt::Write as _;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use super::api::Api;
use super::spec::STATISTICS_LEN;

/// Numbers of one function: calls, bytes, nanoseconds.
const NUMBERS: usize = 3;

// All functions have to fit into the memory in front of the task.
const _: () = assert!(Api::FUNCTIONS.len() * NUMBERS * 8 <= STATISTICS_LEN as usize);

/// Writer of the statistics, in the host.
#[derive(Debug)]
pub(super) struct Statistics(&'static [AtomicU64]);

impl Statistics {
    /// Maps the statistics of the memory file. They stay mapped until the process ends.
    pub(super) fn map(file: &File) -> io::Result<Self> {
        let (len, prot) = (STATISTICS_LEN as usize, libc::PROT_READ | libc::PROT_WRITE);
        // SAFETY: the kernel chooses the address, so no memory of this process is replaced.
        let memory = unsafe { libc::mmap(std::ptr::null_mut(), len, prot, libc::MAP_SHARED, file.as_raw_fd(), 0) };
        if memory == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the mapping is page-aligned, has that length, and is never unmapped. Every access is atomic.
        let numbers = unsafe { std::slice::from_raw_parts(memory.cast::<AtomicU64>(), len / 8) };
        Ok(Self(numbers))
    }

    /// Counts a call of the function with this index in the table.
    pub(super) fn count(&self, function: usize, bytes: u64, start: Instant) {
        let nanoseconds = u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let numbers = self.0.iter().skip(function * NUMBERS);
        for (number, more) in numbers.zip([1, bytes, nanoseconds]) {
            number.fetch_add(more, Ordering::Relaxed);
        }
    }
}

/// Returns the statistics as text: a line `FUNCTION calls N bytes N microseconds N` for each function that was called.
pub(super) fn read(file: &File) -> io::Result<String> {
    let mut bytes = [0; Api::FUNCTIONS.len() * NUMBERS * 8];
    file.read_exact_at(&mut bytes, 0)?;
    let numbers: Vec<u64> = bytes
        .chunks_exact(8)
        .map(|number| u64::from_le_bytes(number.try_into().unwrap_or_default()))
        .collect();
    let mut text = String::new();
    for (function, numbers) in Api::FUNCTIONS.iter().zip(numbers.chunks_exact(NUMBERS)) {
        if let [calls, bytes, nanoseconds] = numbers
            && *calls > 0
        {
            let microseconds = nanoseconds / 1000;
            let _ = writeln!(
                text,
                "{} calls {calls} bytes {bytes} microseconds {microseconds}",
                function.name
            );
        }
    }
    Ok(text)
}
