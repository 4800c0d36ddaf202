//! Storage of the bytes of one file of the folder.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

/// Bytes that are read and written at offsets; in tests a simulation that loses what was not synced.
pub(super) trait Storage: Send + Sync {
    fn read(&self, buf: &mut [u8], at: u64) -> io::Result<()>;
    fn write(&self, buf: &[u8], at: u64) -> io::Result<()>;
    fn sync(&self) -> io::Result<()>;
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
}
