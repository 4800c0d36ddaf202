//! Storage of the bytes of one file of the folder.

use std::fs::File;
use std::io::{self, IoSlice};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rustix::fs::{SeekFrom, seek};
use rustix::io::pwritev;

/// Bytes that are read and written at offsets; in tests a simulation that loses what was not synced.
pub(super) trait Storage: Send + Sync {
    fn read(&self, buf: &mut [u8], at: u64) -> io::Result<()>;
    fn write(&self, buf: &[u8], at: u64) -> io::Result<()>;
    fn sync(&self) -> io::Result<()>;

    /// Returns the offset of the next bytes from `at` on that may be other than zeroes.
    fn next_data(&self, at: u64) -> u64 {
        at
    }

    /// Writes neighbouring parts, the first one at `at`.
    fn write_parts(&self, parts: &[&[u8]], mut at: u64) -> io::Result<()> {
        for part in parts {
            self.write(part, at)?;
            at += part.len() as u64;
        }
        Ok(())
    }
}

impl Storage for Arc<File> {
    fn read(&self, buf: &mut [u8], at: u64) -> io::Result<()> {
        self.read_exact_at(buf, at)
    }

    fn write(&self, buf: &[u8], at: u64) -> io::Result<()> {
        self.write_all_at(buf, at)
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }

    fn next_data(&self, at: u64) -> u64 {
        match seek(&**self, SeekFrom::Data(at)) {
            Ok(found) => found,
            // No data up to the end.
            Err(rustix::io::Errno::NXIO) => u64::MAX,
            Err(_) => at,
        }
    }

    /// Writes with one system call: a file system finds room for a large write in far less time than for its parts.
    fn write_parts(&self, parts: &[&[u8]], mut at: u64) -> io::Result<()> {
        let mut slices: Vec<_> = parts.iter().map(|part| IoSlice::new(part)).collect();
        let mut left = slices.as_mut_slice();
        while left.iter().any(|part| !part.is_empty()) {
            match pwritev(&**self, left, at) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => {
                    IoSlice::advance_slices(&mut left, written);
                    at += written as u64;
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }
}
