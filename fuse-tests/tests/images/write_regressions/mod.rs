//! Writes to images that are damaged, unusual or hostile must not lose data that could be read before.

mod children;
mod cost;
mod failures;
mod faulty_file;
mod hosted;
mod layout;
mod parallel;
mod repair;
mod truncated;

use vmdkfuse::block::{BlockRead, Lba};
use vmdkfuse::error::Result;
use vmdkfuse::vmdk::VmdkDisk;

/// Reads one sector of a disk.
fn read(disk: &VmdkDisk, at: u64) -> Result<[u8; 512]> {
    let mut sector = [0xee; 512];
    disk.read_at(Lba(at), &mut sector).map(|()| sector)
}
