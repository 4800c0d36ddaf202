//! Files on a web server: the datastores of an ESXi or a vCenter (`/folder`), or any server that sends ranges.
//!
//! ```text
//!   engine ─► HttpsFile ─► cache::AdaptiveBlocks ─► RemoteFile ─► Client ─► socket
//!               │  siblings                          │ one range for neighbouring blocks
//!               ▼                                    ▼
//!             HttpsStore: address.rs, the gate     answer.rs: is it what was asked for?
//!                                                  session.rs: login      trust.rs: certificate
//!                                                  transport.rs: http1.rs, library.rs
//! ```
//! The store is read-only: the service has no partial writes. Files are recognized as changed by their length, ETag and
//! Last-Modified, which every answer is compared with; a changed file gives errors from then on, never mixed content.
//!
//! All files of a disk share the memory of one cache and its threads, so a chain of many links costs no more of both.

use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use reqwest::Url;
use ring::digest::{SHA256, digest};

use crate::cache::disk_tier::{DiskTier, FileKey, TierFile, TieredFetch, address_hash};
use crate::cache::{AdaptiveBlocks, Block, BlockMemory, Fetch, FetchPool};
use crate::config::HttpsConfig;
use crate::error::{Error, ErrorKind, Result};
use crate::store::{Access, ExtentName, Identity, Store, StoredFile};

mod address;
mod answer;
mod browser;
mod client;
mod cookie_script;
mod failure;
mod http1;
mod library;
mod listing;
mod logout;
mod low_water;
mod message;
mod page;
mod request;
mod session;
mod slots;
mod transport;
mod trust;
mod wire;

use address::Address;
pub use address::{percent_decode, split_datastore};
use answer::Version;
pub use browser::{Browser, Datacenter};
use client::{Ask, Client, Want, may_be_wrong_form, of_forms};
pub use listing::ListedName;
pub use trust::certificate_of;

/// Size of a block of the cache in bytes. A request for one costs little more than one for a page, and a table of grains
/// comes with its neighbours.
const BLOCK: u64 = 32 << 10;
/// The same for reads all over the file: a page, which is what most of them want.
const SMALL_BLOCK: u64 = 4 << 10;
/// Blocks that the first request of a file asks for: a descriptor, or a header and the first tables, as a rule.
const FIRST_BLOCKS: u64 = 2;
/// Most blocks of one request: a MiB, and one more for a read that does not start at a block.
const MAX_RUN: u64 = 33;
/// Most blocks of one request of read-ahead: 8 MiB. With a round trip of 20 ms, a line of 1 GB/s is busy for four fifths of
/// the time if the connections have 40 MiB in flight.
const MAX_RUN_AHEAD: u64 = 256;
/// Default memory for blocks of a disk.
const CACHE: u64 = 64 << 20;
/// Default bound of read-ahead: what eight connections have in flight.
const READAHEAD: u64 = 40 << 20;

/// State that the files of one disk share.
#[derive(Debug)]
struct Shared {
    client: Arc<Client>,
    memory: Arc<BlockMemory>,
    pool: Arc<FetchPool>,
    readahead: u64,
    /// Folder that keeps blocks across mounts.
    tier: Option<Arc<DiskTier>>,
}

/// Opens the file of a configured disk. `cache_size` and `readahead` are bytes; `None`: the defaults.
///
/// Errors: why the server cannot be reached or does not serve the file.
pub fn open(config: &HttpsConfig, cache_size: Option<u64>, readahead: Option<u64>) -> Result<Arc<dyn StoredFile>> {
    let address = Address::of(config)?;
    let client = Client::of(config, &address.site.origin)?;
    // A request of a reader finds a connection although the read-ahead uses all that it may.
    let workers = (client.connections() - 1).max(1);
    let pool = FetchPool::new(workers).map_err(|e| Error::io("starting the threads that read ahead", e))?;
    let tier = config.cache_dir.as_ref();
    let tier = tier.map(|(dir, limit)| DiskTier::open(dir, *limit, true)).transpose()?;
    let shared = Arc::new(Shared {
        tier,
        memory: Arc::new(BlockMemory::new(cache_size.unwrap_or(CACHE), BLOCK, 2 * MAX_RUN)?),
        pool: Arc::new(pool),
        readahead: readahead.unwrap_or(READAHEAD),
        client,
    });
    open_at(&shared, address)
}

/// Opens a file by one request, which brings its length, its version and its first blocks.
fn open_at(shared: &Arc<Shared>, address: Address) -> Result<Arc<dyn StoredFile>> {
    let within = |e: Error| e.within(address.label());
    let mut failed = None;
    shared.client.forms.recall(&address.site);
    if let Some(known) = shared
        .tier
        .as_ref()
        .and_then(|tier| known_version(shared, tier, &address))
    {
        let (form, version) = known;
        shared.client.forms.note(&address.site, form);
        return HttpsFile::new(shared, address, form, Mutex::default(), version, Vec::new())
            .map(|file| Arc::new(file) as _);
    }
    for form in address.site.forms() {
        // A server that does not answer requests for the headers alone shows the version with one byte as well. One that
        // sends no ranges at all may have sent a short file as a whole.
        let kept = shared.tier.as_ref().and_then(|tier| kept_key(tier, &address, form));
        let is_kept = kept.is_some_and(|key| key.len > FIRST_BLOCKS * BLOCK);
        let (moved, closing) = (Mutex::default(), AtomicBool::new(false));
        let ask = Ask {
            address: &address,
            form,
            moved: &moved,
            range: if is_kept { 0..1 } else { 0..FIRST_BLOCKS * BLOCK },
            want: Want::Bytes,
            known: None,
            closing: &closing,
        };
        let mut head = Vec::new();
        match read(&shared.client, &ask, BLOCK, &mut |block| head.push(block)) {
            Ok(version) => {
                if is_kept {
                    head.clear();
                }
                shared.client.forms.note(&address.site, form);
                return HttpsFile::new(shared, address, form, moved, version, head).map(|file| Arc::new(file) as _);
            }
            Err(e) if may_be_wrong_form(&e) => failed = of_forms(failed, e),
            Err(e) => return Err(within(e)),
        }
    }
    Err(within(failed.unwrap_or_else(|| Error::unsupported("has no address"))))
}

/// Returns form and version of a file of which the disk tier has blocks, if the server still has the same version. Costs no
/// byte of the file.
fn known_version(shared: &Shared, tier: &DiskTier, address: &Address) -> Option<(usize, Version)> {
    let mut forms = address.site.forms();
    let (form, key) = forms.find_map(|form| Some((form, kept_key(tier, address, form)?)))?;
    let ask = Ask {
        address,
        form,
        moved: &Mutex::default(),
        range: 0..0,
        want: Want::Version,
        known: None,
        closing: &AtomicBool::new(false),
    };
    // A server that does not answer such requests is asked for a part of the file.
    let version = shared.client.read(&ask, &mut |_| ()).ok()?;
    let is_same = (version.len, &version.etag, &version.modified) == (key.len, &key.etag, &key.modified);
    is_same.then_some((form, version))
}

/// Returns the key that the disk tier has for an address.
fn kept_key(tier: &DiskTier, address: &Address, form: usize) -> Option<FileKey> {
    tier.lookup(&address_hash(address.url(form).as_str()))
}

/// An open file on a server.
#[derive(Debug)]
struct HttpsFile {
    shared: Arc<Shared>,
    remote: Arc<RemoteFile>,
    blocks: AdaptiveBlocks,
    /// Blocks in the disk tier, or why it has none of this file. `None` without a disk tier.
    tier: Option<Result<Arc<TierFile>>>,
    label: String,
    identity: Identity,
}

impl HttpsFile {
    fn new(
        shared: &Arc<Shared>,
        address: Address,
        form: usize,
        moved: Mutex<Option<Url>>,
        version: Version,
        head: Vec<Block>,
    ) -> Result<Self> {
        let remote = Arc::new(RemoteFile {
            client: Arc::clone(&shared.client),
            label: address.label(),
            form,
            moved,
            version,
            address,
            closing: AtomicBool::new(false),
        });
        let tier = shared.tier.as_ref().map(|tier| tier_file(tier, &remote));
        let origin = |block| {
            let remote = Arc::clone(&remote);
            Arc::new(RemoteBlocks { remote, block }) as Arc<dyn Fetch>
        };
        let kept = tier.as_ref().and_then(|tier| tier.as_ref().ok());
        // What is kept is kept in large blocks.
        let (large, small): (Arc<dyn Fetch>, _) = match kept {
            Some(file) => (Arc::new(TieredFetch::new(origin(BLOCK), Arc::clone(file))), None),
            None => (origin(BLOCK), Some(origin(SMALL_BLOCK))),
        };
        let blocks = AdaptiveBlocks::new(large, small, &shared.memory, &shared.pool, shared.readahead);
        for (number, block) in (0..).zip(head) {
            if let Some(file) = kept {
                file.write(number, &block);
            }
            blocks.put(number, block);
        }
        Ok(Self {
            tier,
            label: remote.label.clone(),
            identity: identity_of(&remote),
            shared: Arc::clone(shared),
            remote,
            blocks,
        })
    }
}

/// Opens the blocks of a file in the disk tier. A file that cannot be kept is read without.
fn tier_file(tier: &Arc<DiskTier>, remote: &RemoteFile) -> Result<Arc<TierFile>> {
    let version = &remote.version;
    let key = FileKey {
        label: remote.label.clone(),
        address: address_hash(remote.address.url(remote.form).as_str()),
        len: version.len,
        block: BLOCK,
        etag: version.etag.clone(),
        modified: version.modified.clone(),
    };
    tier.file(key).inspect_err(|e| tracing::warn!("{e}"))
}

/// Returns the identity of a file: its URL in place of device and inode, its ETag in place of the ctime.
fn identity_of(remote: &RemoteFile) -> Identity {
    let number = |text: &str, at: usize| {
        let sum = digest(&SHA256, text.as_bytes());
        let bytes = sum.as_ref().get(at..at + 8).and_then(|bytes| bytes.try_into().ok());
        u64::from_le_bytes(bytes.unwrap_or_default())
    };
    let url = remote.address.url(remote.form);
    let version = &remote.version;
    Identity {
        file: (number(url.as_str(), 0), number(url.as_str(), 8)),
        start: 0,
        len: version.len,
        mtime_ns: version.modified_ns(),
        ctime_ns: version.etag.as_deref().map_or(0, |etag| number(etag, 0).into()),
    }
}

impl StoredFile for HttpsFile {
    fn len(&self) -> u64 {
        self.remote.version.len
    }

    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let end = offset.checked_add(buf.len() as u64);
        if end.is_none_or(|end| end > self.len()) {
            let text = format!("has {} bytes, expected {} at {offset}", self.len(), buf.len());
            return Err(Error::corrupt(text).at_byte(offset).in_file(&self.label));
        }
        self.blocks.read(offset, buf)
    }

    fn content_fd(&self) -> Option<BorrowedFd<'_>> {
        self.tier.as_ref()?.as_ref().ok()?.complete()
    }

    fn cached(&self) -> Option<Result<&TierFile>> {
        let tier = self.tier.as_ref()?;
        Some(tier.as_ref().map(|file| &**file).map_err(Error::clone))
    }

    fn identity(&self) -> Result<Identity> {
        Ok(self.identity)
    }

    fn identity_at_open(&self) -> Identity {
        self.identity
    }

    fn detects_modification(&self) -> bool {
        self.remote.version.etag.is_some() || self.remote.version.modified.is_some()
    }

    fn allocated(&self) -> Result<u64> {
        Ok(self.len())
    }

    fn data_at(&self, offset: u64) -> Result<(bool, u64)> {
        Ok((true, self.len().saturating_sub(offset).max(1)))
    }

    fn check_named(&self) -> Result<()> {
        Ok(())
    }

    fn label(&self) -> &str {
        &self.label
    }

    fn own_name(&self) -> String {
        crate::store::printable(self.remote.address.name())
    }

    fn siblings(&self) -> Result<Arc<dyn Store>> {
        Ok(Arc::new(HttpsStore {
            shared: Arc::clone(&self.shared),
            beside: self.remote.address.clone(),
        }))
    }
}

/// A file on a server without its cache.
#[derive(Debug)]
struct RemoteFile {
    client: Arc<Client>,
    address: Address,
    form: usize,
    moved: Mutex<Option<Url>>,
    version: Version,
    label: String,
    /// True once no reader is left.
    closing: AtomicBool,
}

/// A file on a server as the origin of blocks of one size.
#[derive(Debug)]
struct RemoteBlocks {
    remote: Arc<RemoteFile>,
    /// Size of a block in bytes.
    block: u64,
}

impl Fetch for RemoteBlocks {
    fn len(&self) -> u64 {
        self.remote.version.len
    }

    fn block(&self) -> u64 {
        self.block
    }

    fn max_run(&self) -> u64 {
        MAX_RUN
    }

    fn max_run_ahead(&self) -> u64 {
        MAX_RUN_AHEAD
    }

    fn deadline(&self) -> Duration {
        // The thread that fetches ends with an error of its own before.
        self.remote.client.timeout() + Duration::from_secs(10)
    }

    fn fetch(&self, blocks: Range<u64>, each: &mut (dyn FnMut(Block) + Send)) -> Result<()> {
        let (start, end) = (
            blocks.start * self.block,
            (blocks.end * self.block).min(self.remote.version.len),
        );
        let ask = Ask {
            address: &self.remote.address,
            form: self.remote.form,
            moved: &self.remote.moved,
            range: start..end,
            want: Want::Bytes,
            known: Some(&self.remote.version),
            closing: &self.remote.closing,
        };
        let read = read(&self.remote.client, &ask, self.block, each);
        read.map(|_| ()).map_err(|e| {
            // The file was opened: whatever is wrong now is an I/O error of the disk.
            let text = format!("{} bytes at {start}: {e}", end - start);
            Error::new(ErrorKind::Os(libc::EIO), text)
                .at_byte(start)
                .in_file(&self.remote.label)
        })
    }

    fn close(&self) {
        self.remote.closing.store(true, Ordering::Relaxed);
    }
}

/// Reads a range, and passes its blocks of `size` bytes to `each`. Returns the version of the file.
///
/// Errors: as [`Client::read`]. The blocks that were complete before are passed all the same.
fn read(client: &Client, ask: &Ask<'_>, size: u64, each: &mut dyn FnMut(Block)) -> Result<Version> {
    let mut assembler = Assembler {
        size: size as usize,
        left: ask.range.end - ask.range.start,
        block: Vec::new(),
        each,
    };
    let version = client.read(ask, &mut |bytes| assembler.push(bytes))?;
    // The first request may be longer than the file.
    assembler.end();
    Ok(version)
}

/// Cuts a stream of bytes into blocks.
struct Assembler<'a> {
    /// Size of a block.
    size: usize,
    /// Bytes that are still to come, those in `block` not counted.
    left: u64,
    block: Vec<u8>,
    each: &'a mut dyn FnMut(Block),
}

impl Assembler<'_> {
    fn push(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            if self.block.capacity() == 0 {
                self.block.reserve_exact(self.size.min(self.left as usize));
            }
            let (now, later) = bytes.split_at(bytes.len().min(self.size - self.block.len()));
            self.block.extend_from_slice(now);
            self.left = self.left.saturating_sub(now.len() as u64);
            bytes = later;
            if self.block.len() == self.size || self.left == 0 {
                self.end();
            }
        }
    }

    /// Passes on the block as it is.
    fn end(&mut self) {
        if !self.block.is_empty() {
            (self.each)(Block::new(std::mem::take(&mut self.block)));
        }
    }
}

/// Folder of a file on a server, in which the names inside the file are looked up.
#[derive(Debug)]
struct HttpsStore {
    shared: Arc<Shared>,
    beside: Address,
}

impl HttpsStore {
    fn read_only(&self) -> Error {
        let label = self.beside.label();
        Error::new(
            ErrorKind::ReadOnly,
            format!("{label}: files on a web server are only read; cow=FILE takes the writes"),
        )
    }
}

impl Store for HttpsStore {
    fn open(&self, name: &ExtentName, access: Access) -> Result<Arc<dyn StoredFile>> {
        if access == Access::Write {
            return Err(self.read_only());
        }
        let opened = open_at(&self.shared, self.beside.named(name)?);
        match (opened, name.raw_path()) {
            // Named by a program that did not know the encoding.
            (Err(e), Some(raw)) if e.kind() == ErrorKind::NotFound => {
                let raw = ExtentName::new(raw.as_os_str().as_encoded_bytes())?;
                open_at(&self.shared, self.beside.named(&raw)?).or(Err(e))
            }
            (opened, _) => opened,
        }
    }

    fn create(&self, _name: &ExtentName) -> Result<Arc<dyn StoredFile>> {
        Err(self.read_only())
    }

    fn remove(&self, _name: &ExtentName, _identity: &Identity) -> Result<()> {
        Err(self.read_only())
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }

    fn names(&self, _most: usize) -> Result<Vec<ExtentName>> {
        // The disk is never written, so no snapshot of it needs protection.
        Ok(Vec::new())
    }
}

/// Returns true if the name of a disk on a server promises raw content: the data of a VMDK in a datastore, which articles
/// name in place of the descriptor.
pub(crate) fn is_raw_by_name(config: &HttpsConfig, name: &str) -> bool {
    Address::of(config).is_ok_and(|address| address.site.is_datastore())
        && name.to_ascii_lowercase().ends_with("-flat.vmdk")
}

/// Returns the decoded name of a disk's file.
///
/// Errors: `Usage` if its address is not valid.
pub fn file_name(config: &HttpsConfig) -> Result<String> {
    Address::of(config).map(|address| address.name())
}
