//! Writing to images that are damaged, unusual or hostile: nothing that could be read before may be lost by it.

mod children;
mod cost;
mod cut;
mod failures;
mod hosted;
mod layout;
mod parallel;
mod repair;
mod watched;

use vmdkfuse::block::{BlockRead, Lba};
use vmdkfuse::error::Result;
use vmdkfuse::vmdk::VmdkDisk;

/// One sector of a disk.
fn read(disk: &VmdkDisk, at: u64) -> Result<[u8; 512]> {
    let mut sector = [0xee; 512];
    disk.read_at(Lba(at), &mut sector).map(|()| sector)
}
