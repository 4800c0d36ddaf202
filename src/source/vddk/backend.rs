//! Disks of VMware's library as sources.

use std::path::PathBuf;
use std::sync::Arc;

use super::abi::CHUNK_SECTORS;
use super::process::{self, TIMEOUT};
use crate::block::{BlockRead, SECTOR};
use crate::cache::CacheOptions;
use crate::cache::disk_tier::{DiskTier, FileKey, KeptFile, address_hash};
use crate::config::{SourceSettings, VddkConfig, VddkOwner};
use crate::error::Result;
use crate::source::nbd::{FETCHES, ServedDisk, longest_answer};
use crate::source::{Backend, CacheSizes, Source, SourceIdentity};

/// Default size of the cache for a disk on a server, and its read-ahead, in bytes.
const CACHE: u64 = 64 << 20;
const READAHEAD: u64 = 16 << 20;

impl Backend for VddkConfig {
    fn open(&self, _asked: CacheSizes) -> Result<Box<dyn Source>> {
        let mut source = source_of(self, false)?;
        source.kept = kept(self, &source);
        Ok(Box::new(source))
    }

    fn open_for_writing(&self, _asked: CacheSizes) -> Result<(Box<dyn Source>, Option<String>)> {
        Ok((Box::new(source_of(self, true)?), None))
    }

    /// Creates the disk: the library does so when it opens it.
    fn create(&self) -> Result<()> {
        process::connect(self, true).map(drop)
    }
}

/// Returns the source of a disk. One on a server has a cache, a local one where the user asks for it.
fn source_of(config: &VddkConfig, writable: bool) -> Result<ServedDisk> {
    let disk = process::connect(config, writable)?;
    let cache = CacheOptions {
        size: CACHE,
        readahead: READAHEAD,
        workers: FETCHES,
        block: CHUNK_SECTORS.next_multiple_of(disk.geometry().granule),
        max_run: 1,
        deadline: longest_answer(config.timeout.unwrap_or(TIMEOUT)),
        // A disk that is open for writing is locked; one that is only read is a snapshot, or belongs to a machine that is
        // powered off.
        drop_at_open: false,
    };
    let label = config.label();
    Ok(ServedDisk {
        disk: Arc::new(disk),
        format: "vddk",
        locality: config.locality(),
        identity: SourceIdentity {
            address: PathBuf::from(&label),
            label,
            cid: None,
        },
        cache,
        is_cached_by_default: config.remote.is_some(),
        kept: None,
    })
}

/// Opens the file in the disk tier that keeps the blocks of a snapshot's disk.
///
/// Its key is everything that says which disk it is. A snapshot never changes, and its number is given to no other one, so
/// it stands for the version. A server that was installed anew may give the numbers again, but shows another certificate.
fn kept(config: &VddkConfig, source: &ServedDisk) -> Option<Result<KeptFile>> {
    let (dir, limit) = config.cache_dir.as_ref()?;
    let remote = config.remote.as_ref()?;
    let snapshot = remote.snapshot.as_ref()?;
    let owner = match &remote.owner {
        VddkOwner::Vm(id) | VddkOwner::Datastore(id) => id,
    };
    let file = config.label();
    let label = format!("{}: {file} of {snapshot}", remote.server);
    // No part contains a zero byte, so no two disks have the same text.
    let parts = [&remote.server, owner, snapshot, &file].map(String::as_str);
    let thumbprint = remote.thumbprint.as_deref().unwrap_or_default().to_ascii_lowercase();
    let address = format!("vddk\0{}\0{:?}\0{thumbprint}", parts.join("\0"), remote.port);
    let key = FileKey {
        label,
        address: address_hash(&address),
        len: source.disk.geometry().bytes(),
        block: source.cache.block * SECTOR,
        etag: Some(snapshot.clone()),
        modified: None,
    };
    let kept = DiskTier::open(dir, *limit, true).and_then(|tier| {
        Ok(KeptFile {
            file: tier.file(key)?,
            tier,
        })
    });
    Some(kept.inspect_err(|e| tracing::warn!("{e}")))
}
