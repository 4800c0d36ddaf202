//! Privileges of a host: those that the library needs to reach its disk, and no others.
//!
//! ```text
//!   disk of a server                 read any file: the library's folder may be another user's
//!   local disk                       that, and write any file: what root's daemon could do itself
//!   transports hotadd and san        that, and the device ioctls of the library
//! ```
//! The library is a large program that parses what a server sends. A process of root without these capabilities cannot mount,
//! trace, change its user, load modules or configure the network, and with `no_new_privs` no program that it executes gets them
//! back. It still owns root's files: the library must write its lock, its log and its temporary files.
//!
//! Capabilities belong to a thread. They are dropped before the library is loaded and before any other thread starts.

use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set, remove_capability_from_bounding_set,
    set_capabilities,
};

use crate::error::{Error, Result};
use crate::source::vddk::spec::DiskSpec;

/// Capabilities for files on a server, and for a description of the library.
const READ: CapabilitySet = CapabilitySet::DAC_READ_SEARCH;

/// Capabilities for local files: of any owner, as the daemon has them.
const FILES: CapabilitySet = READ.union(CapabilitySet::DAC_OVERRIDE).union(CapabilitySet::FOWNER);

/// Capabilities for disks that are devices of this machine: SCSI commands, and the rescan that finds them.
const DEVICES: CapabilitySet = FILES
    .union(CapabilitySet::SYS_RAWIO)
    .union(CapabilitySet::SYS_ADMIN)
    .union(CapabilitySet::MKNOD);

/// Transport modes that need [`DEVICES`].
const DEVICE_TRANSPORTS: [&str; 2] = ["hotadd", "san"];

/// Drops what the library does not need for `disk`. Must be called before any other thread starts.
pub(super) fn drop_for(disk: Option<&DiskSpec>) -> Result<()> {
    let context = |e: rustix::io::Errno| Error::io("dropping privileges", e.into());
    // No program that the library may start gains a privilege which this process has not.
    nix::sys::prctl::set_no_new_privs().map_err(|e| Error::io("no_new_privs", e.into()))?;
    let present = capabilities(None).map_err(context)?;
    let kept = needed(disk).intersection(present.permitted);
    // Only with this capability, and of no consequence without it: a process without it has none to lose, and gets none.
    if present.effective.contains(CapabilitySet::SETPCAP) {
        // All 64, also those that are younger than this program.
        let all = (0..u64::BITS).map(|bit| CapabilitySet::from_bits_retain(1 << bit));
        for capability in all.filter(|capability| !kept.contains(*capability)) {
            match remove_capability_from_bounding_set(capability) {
                // The kernel does not know the capability.
                Ok(()) | Err(rustix::io::Errno::INVAL) => {}
                Err(e) => return Err(context(e)),
            }
        }
    }
    clear_ambient_capability_set().map_err(context)?;
    let sets = CapabilitySets {
        effective: kept.intersection(present.effective),
        permitted: kept,
        inheritable: CapabilitySet::empty(),
    };
    set_capabilities(None, sets).map_err(context)
}

/// Returns the capabilities that the library needs.
fn needed(disk: Option<&DiskSpec>) -> CapabilitySet {
    let Some(disk) = disk else { return READ };
    let is_device = |mode: &str| DEVICE_TRANSPORTS.contains(&mode);
    match &disk.remote {
        _ if disk.transports.split(':').any(is_device) => DEVICES,
        Some(_) => READ,
        None => FILES,
    }
}
