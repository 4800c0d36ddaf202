//! Open disks: their content, their properties, and the rules about their life.

use std::collections::BTreeMap;
use std::ffi::{CString, c_char};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering};
use std::sync::{Mutex, RwLock};
use std::time::Duration;

use crate::abi::{
    Block, BlockList, CHUNK_SECTORS, Connection, DiskGeometry, Handle, Info, VIX_OK, VixError, open_flag,
};
use crate::connection::{ConnectionState, FILE_NOT_FOUND};
use crate::knobs::fault;
use crate::{called, library, text, thread_id, violation};

const SECTOR: usize = 512;
const INVALID_ARG: VixError = 3;
const FILE_ERROR: VixError = 7;

static OPEN: AtomicUsize = AtomicUsize::new(0);

/// Kind of requests that a handle was used with.
pub(crate) const UNUSED: i32 = 0;
pub(crate) const SYNCHRONOUS: i32 = 1;
pub(crate) const ASYNCHRONOUS: i32 = 2;

/// An open disk.
pub(crate) struct Disk {
    content: Content,
    pub(crate) sectors: u64,
    pub(crate) read_only: bool,
    transport: CString,
    /// Chunks that were allocated when the disk was opened: later answers do not know of writes.
    allocated: Vec<bool>,
    /// Thread of Open, which must be that of Close.
    opener: i32,
    /// Thread of the queries, 0 before the first.
    questioner: AtomicI32,
    pub(crate) kind: AtomicI32,
    pub(crate) in_flight: AtomicUsize,
    /// True after Wait, until the next request or flush.
    waited_to_close: AtomicBool,
    waited_to_flush: AtomicBool,
    /// Calls that use the handle now: their number, or -1 for an exclusive one.
    in_use: AtomicI32,
}

/// Way in which a call uses a handle.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Use {
    Shared,
    Exclusive,
}

/// End of the use of a handle, on drop.
pub(crate) struct InUse<'d>(&'d Disk, Use);

impl Drop for InUse<'_> {
    fn drop(&mut self) {
        let InUse(disk, kind) = self;
        match kind {
            Use::Shared => disk.in_use.fetch_sub(1, Ordering::SeqCst),
            Use::Exclusive => disk.in_use.swap(0, Ordering::SeqCst),
        };
    }
}

enum Content {
    File {
        file: File,
        /// Sectors that a flush has not written yet, with `volatile=1`.
        volatile: Option<Mutex<BTreeMap<u64, [u8; SECTOR]>>>,
    },
    Memory(RwLock<Vec<u8>>),
}

pub(crate) fn open_disks() -> usize {
    OPEN.load(Ordering::SeqCst)
}

pub(crate) unsafe fn disk<'d>(handle: Handle) -> &'d Disk {
    if handle.is_null() {
        violation("the handle is NULL");
    }
    &*handle.cast::<Disk>()
}

impl Disk {
    /// Returns true if requests are done within the call.
    pub(crate) fn is_inline(&self) -> bool {
        matches!(self.transport.as_bytes(), b"file" | b"hotadd" | b"san")
    }

    /// Notes that a call uses the handle, until the result is dropped.
    pub(crate) fn enter(&self, kind: Use) -> InUse<'_> {
        let next = |users: i32| match kind {
            Use::Shared => (users >= 0).then_some(users + 1),
            Use::Exclusive => (users == 0).then_some(-1),
        };
        if self
            .in_use
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, next)
            .is_err()
        {
            violation("several calls use one handle at a time");
        }
        InUse(self, kind)
    }

    /// Checks a request against the rules, and notes it.
    pub(crate) fn check(&self, kind: i32, start: u64, sectors: u64, buffer: *const u8) {
        let before = self.kind.swap(kind, Ordering::SeqCst);
        if before != UNUSED && before != kind {
            violation("synchronous and asynchronous requests are mixed");
        }
        if buffer.is_null() || sectors == 0 || start.checked_add(sectors).is_none_or(|end| end > self.sectors) {
            violation("a request has no buffer, no sectors, or is not on the disk");
        }
        if sectors * 512 > 2 << 20 {
            violation("a request exceeds 2 MiB");
        }
        self.waited_to_close.store(false, Ordering::SeqCst);
    }

    /// Notes that the client has waited for its requests.
    pub(crate) fn waited(&self) {
        self.waited_to_close.store(true, Ordering::SeqCst);
        self.waited_to_flush.store(true, Ordering::SeqCst);
    }

    pub(crate) unsafe fn read(&self, start: u64, sectors: u64, buffer: *mut u8) -> VixError {
        let buffer = std::slice::from_raw_parts_mut(buffer, sectors as usize * SECTOR);
        let offset = start as usize * SECTOR;
        match &self.content {
            Content::Memory(memory) => {
                buffer.copy_from_slice(&memory.read().unwrap()[offset..offset + buffer.len()]);
                VIX_OK
            }
            Content::File { file, volatile } => {
                if file.read_exact_at(buffer, offset as u64).is_err() {
                    return FILE_ERROR;
                }
                if let Some(volatile) = volatile {
                    for (sector, bytes) in volatile.lock().unwrap().range(start..start + sectors) {
                        let at = (sector - start) as usize * SECTOR;
                        buffer[at..at + SECTOR].copy_from_slice(bytes);
                    }
                }
                VIX_OK
            }
        }
    }

    pub(crate) unsafe fn write(&self, start: u64, sectors: u64, buffer: *const u8) -> VixError {
        if self.read_only {
            return 11;
        }
        let buffer = std::slice::from_raw_parts(buffer, sectors as usize * SECTOR);
        let offset = start as usize * SECTOR;
        match &self.content {
            Content::Memory(memory) => memory.write().unwrap()[offset..offset + buffer.len()].copy_from_slice(buffer),
            Content::File {
                volatile: Some(volatile),
                ..
            } => {
                let mut volatile = volatile.lock().unwrap();
                for (sector, bytes) in (start..).zip(buffer.chunks_exact(SECTOR)) {
                    volatile.insert(sector, bytes.try_into().unwrap());
                }
            }
            Content::File { file, .. } => {
                if file.write_all_at(buffer, offset as u64).is_err() {
                    return FILE_ERROR;
                }
            }
        }
        VIX_OK
    }

    fn write_back(&self) -> VixError {
        let Content::File { file, volatile } = &self.content else {
            return VIX_OK;
        };
        if let Some(volatile) = volatile {
            for (sector, bytes) in std::mem::take(&mut *volatile.lock().unwrap()) {
                if file.write_all_at(&bytes, sector * SECTOR as u64).is_err() {
                    return FILE_ERROR;
                }
            }
        }
        file.sync_data().map_or(FILE_ERROR, |()| VIX_OK)
    }
}

/// Returns the allocation of a file, by chunk.
fn allocation(file: &File, sectors: u64) -> Vec<bool> {
    let chunk = CHUNK_SECTORS as i64 * SECTOR as i64;
    let chunks = sectors.div_ceil(CHUNK_SECTORS) as usize;
    let mut allocated = vec![false; chunks];
    let mut at = 0;
    loop {
        let data = unsafe { libc::lseek(file.as_raw_fd(), at, libc::SEEK_DATA) };
        if data < 0 {
            return allocated;
        }
        let hole = unsafe { libc::lseek(file.as_raw_fd(), data, libc::SEEK_HOLE) };
        for index in data / chunk..(hole + chunk - 1) / chunk {
            if let Some(allocated) = allocated.get_mut(index as usize) {
                *allocated = true;
            }
        }
        at = hole;
    }
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn VixDiskLib_Open(
    connection: Connection,
    path: *const c_char,
    flags: u32,
    handle: *mut Handle,
) -> VixError {
    let connection = &*connection.cast::<ConnectionState>();
    let path = text(path).unwrap_or_default();
    called(&format!("Open path={path} flags={flags}"));
    if let Some(error) = fault("Open") {
        return error;
    }
    let knobs = &library().knobs;
    let file = match connection.path_of(&path) {
        Ok(file) => file,
        Err(error) => return error,
    };
    let read_only = flags & open_flag::READ_ONLY != 0;
    if read_only != connection.read_only {
        violation("Open and ConnectEx disagree about read-only");
    }
    let (content, bytes, allocated) = match knobs.number("ram") {
        Some(bytes) => (Content::Memory(RwLock::new(vec![0; bytes as usize])), bytes, Vec::new()),
        None => {
            let Ok(file) = File::options().read(true).write(!read_only).open(file) else {
                return FILE_NOT_FOUND;
            };
            let bytes = file.metadata().map_or(0, |meta| meta.len());
            let allocated = allocation(&file, bytes / 512);
            let volatile = knobs.text("volatile").map(|_| Mutex::default());
            (Content::File { file, volatile }, bytes, allocated)
        }
    };
    let default = if connection.remote { "nbdssl" } else { "file" };
    let disk = Disk {
        content,
        sectors: bytes / 512,
        read_only,
        transport: CString::new(knobs.text("transport").unwrap_or(default)).unwrap(),
        allocated,
        opener: thread_id(),
        questioner: AtomicI32::new(0),
        kind: AtomicI32::new(UNUSED),
        in_flight: AtomicUsize::new(0),
        waited_to_close: AtomicBool::new(true),
        waited_to_flush: AtomicBool::new(false),
        in_use: AtomicI32::new(0),
    };
    *handle = Box::into_raw(Box::new(disk)).cast();
    OPEN.fetch_add(1, Ordering::SeqCst);
    VIX_OK
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn VixDiskLib_Close(handle: Handle) -> VixError {
    called("Close");
    let disk = disk(handle);
    if disk.opener != thread_id() {
        violation("Close was called on another thread than Open");
    }
    if !disk.waited_to_close.load(Ordering::SeqCst) || disk.in_flight.load(Ordering::SeqCst) > 0 {
        violation("Close was called before Wait");
    }
    drop(disk.enter(Use::Exclusive));
    fault("Close");
    disk.write_back();
    drop(Box::from_raw(handle.cast::<Disk>()));
    OPEN.fetch_sub(1, Ordering::SeqCst);
    VIX_OK
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn VixDiskLib_GetTransportMode(handle: Handle) -> *const c_char {
    disk(handle).transport.as_ptr()
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn VixDiskLib_GetInfo(handle: Handle, info: *mut *mut Info) -> VixError {
    if let Some(error) = fault("GetInfo") {
        return error;
    }
    let old = library().knobs.number("version").is_some_and(|version| version < 7);
    // Before version 7 there are no sector sizes: a client that reads them reads beyond the end.
    let size = if old { 56 } else { size_of::<Info>() };
    let filled = Info {
        bios_geometry: DiskGeometry::default(),
        physical_geometry: DiskGeometry {
            cylinders: 1,
            heads: 16,
            sectors: 63,
        },
        capacity: disk(handle).sectors,
        adapter_type: 3,
        links: 1,
        parent_hint: ptr::null_mut(),
        uuid: ptr::null_mut(),
        logical_sector_size: 512,
        physical_sector_size: 4096,
    };
    let memory = libc::malloc(size).cast::<u8>();
    ptr::copy_nonoverlapping(ptr::addr_of!(filled).cast::<u8>(), memory, size);
    *info = memory.cast();
    VIX_OK
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn VixDiskLib_FreeInfo(info: *mut Info) {
    libc::free(info.cast());
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn VixDiskLib_Flush(handle: Handle) -> VixError {
    called("Flush");
    if let Some(error) = fault("Flush") {
        return error;
    }
    let disk = disk(handle);
    let _in_use = disk.enter(Use::Exclusive);
    if !disk.waited_to_flush.swap(false, Ordering::SeqCst) {
        violation("Flush was called before Wait");
    }
    disk.write_back()
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn VixDiskLib_QueryAllocatedBlocks(
    handle: Handle,
    start: u64,
    sectors: u64,
    chunk: u64,
    list: *mut *mut BlockList,
) -> VixError {
    called(&format!(
        "QueryAllocatedBlocks start={start} sectors={sectors} chunk={chunk}"
    ));
    if let Some(error) = fault("QueryAllocatedBlocks") {
        return error;
    }
    let disk = disk(handle);
    let _in_use = disk.enter(Use::Exclusive);
    std::thread::sleep(Duration::from_micros(
        library().knobs.number("query-latency").unwrap_or(0),
    ));
    let thread = thread_id();
    let before = disk.questioner.swap(thread, Ordering::SeqCst);
    if before != 0 && before != thread {
        violation("queries come from several threads");
    }
    let aligned = chunk == CHUNK_SECTORS && start.is_multiple_of(chunk) && sectors.is_multiple_of(chunk) && sectors > 0;
    if !aligned || start + sectors > disk.sectors || sectors / CHUNK_SECTORS > 512 << 10 {
        return INVALID_ARG;
    }
    let chunks = start / chunk..(start + sectors) / chunk;
    let mut blocks: Vec<Block> = Vec::new();
    for index in chunks {
        if !disk.allocated.get(index as usize).copied().unwrap_or(true) {
            continue;
        }
        let offset = index * chunk;
        match blocks.last_mut() {
            Some(last) if last.offset + last.length == offset => last.length += chunk,
            _ => blocks.push(Block { offset, length: chunk }),
        }
    }
    let memory = libc::malloc(8 + blocks.len() * size_of::<Block>()).cast::<u8>();
    memory.cast::<u32>().write(blocks.len() as u32);
    ptr::copy_nonoverlapping(
        blocks.as_ptr().cast::<u8>(),
        memory.add(8),
        blocks.len() * size_of::<Block>(),
    );
    *list = memory.cast();
    VIX_OK
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn VixDiskLib_FreeBlockList(list: *mut BlockList) -> VixError {
    libc::free(list.cast());
    VIX_OK
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn VixDiskLib_GetMetadataKeys(
    _handle: Handle,
    _keys: *mut c_char,
    _size: usize,
    needed: *mut usize,
) -> VixError {
    *needed = 1;
    INVALID_ARG
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn VixDiskLib_ReadMetadata(
    _handle: Handle,
    _key: *const c_char,
    _value: *mut c_char,
    _size: usize,
    _needed: *mut usize,
) -> VixError {
    INVALID_ARG
}
