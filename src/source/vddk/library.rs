//! The loaded library: safe calls of its functions, with their results as [`Failure`]s and their statistics.
//!
//! Only a host process loads it. The functions have thread rules, which the callers keep: see `host/mod.rs`.

#![allow(unsafe_code)] // Calls C functions.

use std::ffi::{CStr, CString, c_char, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr;
use std::time::Instant;

use super::abi::{
    Block, BlockList, CHUNK_SECTORS, CompletionFunction, ConnectParams, Connection, CreateParams, Handle, Info,
    LogFunction, SECTOR, VIX_ASYNC, VIX_OK, VixError,
};
use super::api::Api;
use super::failure::Failure;
use super::library_file::LibraryFile;
use super::spec::{CreateSpec, LibraryDescription};
use super::statistics::Statistics;
use crate::error::{Error, Result};
use crate::foreign_library::ForeignLibrary;

/// Version of the interface that every supported library accepts.
const INTERFACE: (u32, u32) = (6, 5);

/// Longest list of allocated ranges that is credible: one for each chunk of the longest query, which is 2 GiB.
const MAX_BLOCKS: u32 = (2 << 30) / (CHUNK_SECTORS * SECTOR) as u32;

/// Log functions of the host.
#[derive(Debug, Clone, Copy)]
pub(super) struct LogFunctions {
    pub(super) log: LogFunction,
    pub(super) warn: LogFunction,
    pub(super) panic: LogFunction,
}

/// The library. Never unloaded.
#[derive(Debug)]
pub(super) struct Vddk {
    api: Api,
    version: u32,
    path: String,
    functions: Vec<String>,
    statistics: Statistics,
}

/// An open disk. It may be used by several threads, as the rules of the library permit.
#[derive(Debug, Clone, Copy)]
pub(super) struct DiskHandle(Handle);

// SAFETY: the handle is an opaque token of the library, which has threads of its own that use it.
unsafe impl Send for DiskHandle {}
// SAFETY: as above; nothing in this process dereferences it.
unsafe impl Sync for DiskHandle {}

/// Size and sector sizes of an open disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct DiskInfo {
    /// Size in sectors of 512 bytes.
    pub(super) sectors: u64,
    /// Number of links of the chain.
    pub(super) links: i32,
}

/// Returns the index of a function in the table, for its statistics.
const fn index_of(name: &str) -> usize {
    let name = name.as_bytes();
    let mut index = 0;
    loop {
        assert!(index < Api::FUNCTIONS.len(), "the function is not in the table");
        let candidate = Api::FUNCTIONS[index].name.as_bytes();
        let mut at = 0;
        while at < name.len() && at < candidate.len() && name[at] == candidate[at] {
            at += 1;
        }
        if at == name.len() && at == candidate.len() {
            return index;
        }
        index += 1;
    }
}

/// Calls a function of the table, and counts the call.
macro_rules! call {
    ($vddk:expr, $bytes:expr, $function:ident($($argument:expr),*)) => {{
        const INDEX: usize = index_of(stringify!($function));
        let start = Instant::now();
        // SAFETY: the caller of this macro passes what the function requires.
        let result = unsafe { ($vddk.api.$function)($($argument),*) };
        $vddk.statistics.count(INDEX, $bytes, start);
        result
    }};
}

/// Calls a function, and returns a [`Failure`] unless its result is `VIX_OK`.
macro_rules! check {
    ($vddk:expr, $function:ident($($argument:expr),*)) => {
        $vddk.result(stringify!($function), call!($vddk, 0, $function($($argument),*)))
    };
}

impl Vddk {
    /// Loads the first of `files` that can be loaded.
    pub(super) fn load(files: &[LibraryFile], statistics: Statistics) -> Result<Self> {
        if !cfg!(target_arch = "x86_64") {
            return Err(Error::unsupported("VMware's VDDK exists for x86-64 only"));
        }
        let candidates: Vec<_> = files.iter().map(|file| file.path.as_os_str()).collect();
        // SAFETY: the user trusts the library, or the dynamic linker finds it where the administrator put it.
        let library = unsafe { ForeignLibrary::open(&candidates) }.map_err(|e| {
            e.within("VMware's VDDK (give its folder by libdir=; `ldd` on the file shows what is missing)")
        })?;
        // SAFETY: the types are those of the public interface, see `abi.rs`.
        let api = unsafe { Api::load(&library) }?;
        let missing = library.missing(Api::FUNCTIONS);
        let present = Api::FUNCTIONS.iter().filter(|function| !missing.contains(function));
        let version = files
            .iter()
            .find(|file| file.path == library.file())
            .map_or(0, |file| file.version);
        Ok(Self {
            api,
            version,
            path: loaded_path(library.file().as_bytes()),
            functions: present.map(|function| function.name.to_owned()).collect(),
            statistics,
        })
    }

    /// Returns the version of the library, from its file name.
    pub(super) fn version(&self) -> u32 {
        self.version
    }

    /// Initializes the library. Must be called once, on the main thread.
    pub(super) fn init(&self, log: LogFunctions, libdir: Option<&CStr>, config: &CStr) -> Result<(), Failure> {
        let (major, minor) = INTERFACE;
        let libdir = libdir.map_or(ptr::null(), CStr::as_ptr);
        let (info, warn, panic) = (Some(log.log), Some(log.warn), Some(log.panic));
        check!(
            self,
            VixDiskLib_InitEx(major, minor, info, warn, panic, libdir, config.as_ptr())
        )
    }

    /// Ends the use of the library.
    pub(super) fn exit(&self) {
        call!(self, 0, VixDiskLib_Exit());
    }

    /// Describes the library, which must be initialized.
    pub(super) fn describe(&self) -> LibraryDescription {
        // SAFETY: the function has no arguments, and returns a string that stays valid, or NULL.
        let transports = self
            .api
            .VixDiskLib_ListTransportModes
            .and_then(|list| unsafe { text(list()) });
        LibraryDescription {
            version: self.version,
            path: self.path.clone(),
            functions: self.functions.clone(),
            transports,
        }
    }

    /// Connects to the server of `params`, or to the local disks if it names none.
    pub(super) fn connect(
        &self,
        params: &Params,
        read_only: bool,
        snapshot: Option<&CStr>,
        transports: &CStr,
    ) -> Result<Connection, Failure> {
        let mut connection = ptr::null_mut();
        let snapshot = snapshot.map_or(ptr::null(), CStr::as_ptr);
        let (params, read_only) = (params.as_ptr(), c_char::from(read_only));
        check!(
            self,
            VixDiskLib_ConnectEx(params, read_only, snapshot, transports.as_ptr(), &mut connection)
        )?;
        Ok(connection)
    }

    /// Disconnects from a server.
    pub(super) fn disconnect(&self, connection: Connection) -> Result<(), Failure> {
        check!(self, VixDiskLib_Disconnect(connection))
    }

    /// Calls the function that forbids migration of the virtual machine, if the library has it.
    pub(super) fn prepare_for_access(&self, params: &Params, identity: &CStr) -> Result<(), Failure> {
        const NAME: &str = "VixDiskLib_PrepareForAccess";
        let Some(prepare) = self.api.VixDiskLib_PrepareForAccess else {
            return Ok(());
        };
        // SAFETY: both pointers are valid during the call.
        self.result(NAME, unsafe { prepare(params.as_ptr(), identity.as_ptr()) })
    }

    /// Calls the function that permits migration again, if the library has it.
    pub(super) fn end_access(&self, params: &Params, identity: &CStr) -> Result<(), Failure> {
        let Some(end) = self.api.VixDiskLib_EndAccess else {
            return Ok(());
        };
        // SAFETY: both pointers are valid during the call.
        self.result("VixDiskLib_EndAccess", unsafe {
            end(params.as_ptr(), identity.as_ptr())
        })
    }

    /// Removes what earlier connections have left at the server, if the library can.
    pub(super) fn clean_up(&self, params: &Params) -> Result<(), Failure> {
        let Some(clean_up) = self.api.VixDiskLib_Cleanup else {
            return Ok(());
        };
        let (mut cleaned, mut remaining) = (0, 0);
        // SAFETY: all pointers are valid during the call.
        self.result("VixDiskLib_Cleanup", unsafe {
            clean_up(params.as_ptr(), &mut cleaned, &mut remaining)
        })
    }

    /// Creates a disk.
    pub(super) fn create(&self, connection: Connection, path: &CStr, disk: CreateSpec) -> Result<(), Failure> {
        let params = CreateParams {
            disk_type: disk.disk_type,
            adapter_type: disk.adapter_type,
            hw_version: disk.hw_version,
            capacity: disk.sectors,
            logical_sector_size: 0,
            physical_sector_size: 0,
        };
        let none = ptr::null_mut();
        check!(self, VixDiskLib_Create(connection, path.as_ptr(), &params, none, none))
    }

    /// Opens a disk. Must be called on the thread that closes it.
    pub(super) fn open(&self, connection: Connection, path: &CStr, flags: u32) -> Result<DiskHandle, Failure> {
        let mut handle = ptr::null_mut();
        check!(self, VixDiskLib_Open(connection, path.as_ptr(), flags, &mut handle))?;
        Ok(DiskHandle(handle))
    }

    /// Closes a disk, on the thread that opened it.
    pub(super) fn close(&self, handle: DiskHandle) -> Result<(), Failure> {
        check!(self, VixDiskLib_Close(handle.0))
    }

    /// Returns the transport mode of an open disk.
    pub(super) fn transport(&self, handle: DiskHandle) -> String {
        let mode = call!(self, 0, VixDiskLib_GetTransportMode(handle.0));
        // SAFETY: the function returns a string that stays valid, or NULL.
        unsafe { text(mode) }.unwrap_or_default()
    }

    /// Returns the properties of an open disk.
    pub(super) fn info(&self, handle: DiskHandle) -> Result<DiskInfo, Failure> {
        let mut info: *mut Info = ptr::null_mut();
        check!(self, VixDiskLib_GetInfo(handle.0, &mut info))?;
        if info.is_null() {
            return Ok(DiskInfo { sectors: 0, links: 0 });
        }
        // SAFETY: the library returned a structure of at least 56 bytes; these fields lie within the first 40.
        let found = unsafe {
            DiskInfo {
                sectors: (*info).capacity,
                links: (*info).links,
            }
        };
        call!(self, 0, VixDiskLib_FreeInfo(info));
        Ok(found)
    }

    /// Waits for all asynchronous requests of a disk.
    pub(super) fn wait(&self, handle: DiskHandle) -> Result<(), Failure> {
        check!(self, VixDiskLib_Wait(handle.0))
    }

    /// Makes the completed writes to a disk durable.
    pub(super) fn flush(&self, handle: DiskHandle) -> Result<(), Failure> {
        check!(self, VixDiskLib_Flush(handle.0))
    }

    /// Starts a read of `sectors` sectors. `done` is called with `data` exactly once, perhaps before this returns, unless
    /// this returns a failure.
    ///
    /// # Safety
    /// `buffer` has `sectors` sectors, and stays valid until `done` is called. `done` may be called on any thread.
    pub(super) unsafe fn read(
        &self,
        handle: DiskHandle,
        (start, sectors): (u64, u64),
        buffer: *mut u8,
        done: CompletionFunction,
        data: *mut c_void,
    ) -> Result<(), Failure> {
        let bytes = sectors * SECTOR;
        let result = call!(
            self,
            bytes,
            VixDiskLib_ReadAsync(handle.0, start, sectors, buffer, done, data)
        );
        self.queued("VixDiskLib_ReadAsync", result)
    }

    /// Starts a write, like [`Self::read`].
    ///
    /// # Safety
    /// As for [`Self::read`].
    pub(super) unsafe fn write(
        &self,
        handle: DiskHandle,
        (start, sectors): (u64, u64),
        buffer: *const u8,
        done: CompletionFunction,
        data: *mut c_void,
    ) -> Result<(), Failure> {
        let bytes = sectors * SECTOR;
        let result = call!(
            self,
            bytes,
            VixDiskLib_WriteAsync(handle.0, start, sectors, buffer, done, data)
        );
        self.queued("VixDiskLib_WriteAsync", result)
    }

    /// Returns true if the library can report allocated ranges.
    pub(super) fn can_query(&self) -> bool {
        self.api.VixDiskLib_QueryAllocatedBlocks.is_some() && self.api.VixDiskLib_FreeBlockList.is_some()
    }

    /// Returns the allocated ranges within `sectors` sectors from `start`, both multiples of a chunk. Without a credible list
    /// the whole range counts as allocated.
    pub(super) fn query(
        &self,
        handle: DiskHandle,
        start: u64,
        sectors: u64,
        chunk: u64,
    ) -> Result<Vec<Block>, Failure> {
        const NAME: &str = "VixDiskLib_QueryAllocatedBlocks";
        const INDEX: usize = index_of(NAME);
        let functions = (
            self.api.VixDiskLib_QueryAllocatedBlocks,
            self.api.VixDiskLib_FreeBlockList,
        );
        let whole = || {
            vec![Block {
                offset: start,
                length: sectors,
            }]
        };
        let (Some(query), Some(free)) = functions else {
            return Ok(whole());
        };
        let mut list: *mut BlockList = ptr::null_mut();
        let from = Instant::now();
        // SAFETY: the handle is open, and the function stores a pointer to a list.
        let result = unsafe { query(handle.0, start, sectors, chunk, &mut list) };
        self.statistics.count(INDEX, sectors * SECTOR, from);
        self.result(NAME, result)?;
        // SAFETY: the library returned NULL, or a list with as many blocks as its head says.
        let blocks = unsafe { copied_blocks(list) };
        if !list.is_null() {
            // SAFETY: the list is the library's, and was copied.
            unsafe { free(list) };
        }
        Ok(blocks.unwrap_or_else(whole))
    }

    /// Creates a failure from the result that a callback received.
    pub(super) fn failure(&self, function: &'static str, error: VixError) -> Failure {
        // SAFETY: the function accepts any number, and returns a string that must be freed, or NULL.
        let text = unsafe {
            let raw = (self.api.VixDiskLib_GetErrorText)(error, ptr::null());
            let copy = text(raw);
            if !raw.is_null() {
                (self.api.VixDiskLib_FreeErrorText)(raw);
            }
            copy
        };
        Failure {
            function,
            error,
            text: text.unwrap_or_else(|| "unknown error".to_owned()),
        }
    }

    fn result(&self, function: &'static str, error: VixError) -> Result<(), Failure> {
        match error {
            VIX_OK => Ok(()),
            error => Err(self.failure(function, error)),
        }
    }

    /// Returns the result of a request. `VIX_OK` in place of `VIX_ASYNC` counts as queued: the callback decides.
    fn queued(&self, function: &'static str, error: VixError) -> Result<(), Failure> {
        match error {
            VIX_OK | VIX_ASYNC => Ok(()),
            error => Err(self.failure(function, error)),
        }
    }
}

/// Allocator of a [`Params`] structure.
#[derive(Debug, Clone, Copy)]
enum ParamsOwner {
    /// This program: a `Box`.
    Us,
    /// The library, with the function that frees it, if it has one.
    Library(Option<unsafe extern "C" fn(*mut ConnectParams)>),
}

/// Address and login of a server, with the strings that it points to, secrets among them.
pub(super) struct Params {
    raw: *mut ConnectParams,
    owner: ParamsOwner,
    /// Strings that the structure points to.
    strings: Vec<CString>,
}

impl Params {
    /// Creates empty parameters: those of a local disk.
    ///
    /// A library that cannot allocate the structure gets one of ours, which it must not free.
    pub(super) fn new(vddk: &Vddk) -> Self {
        let allocate = vddk.api.VixDiskLib_AllocateConnectParams;
        // SAFETY: the function has no arguments.
        let raw = allocate.map_or(ptr::null_mut(), |allocate| unsafe { allocate() });
        if raw.is_null() {
            // SAFETY: all bits zero is a valid value: integers and NULL pointers.
            let zeroed: Box<ConnectParams> = Box::new(unsafe { std::mem::zeroed() });
            return Self {
                raw: Box::into_raw(zeroed),
                owner: ParamsOwner::Us,
                strings: Vec::new(),
            };
        }
        Self {
            raw,
            owner: ParamsOwner::Library(vddk.api.VixDiskLib_FreeConnectParams),
            strings: Vec::new(),
        }
    }

    /// Changes the structure. The pointers that `set` stores must come from the function that it gets.
    pub(super) fn set(
        &mut self,
        set: impl FnOnce(&mut ConnectParams, &mut dyn FnMut(&str) -> Result<*mut c_char>) -> Result<()>,
    ) -> Result<()> {
        let strings = &mut self.strings;
        let mut keep = |text: &str| {
            let text = c_string(text)?;
            // The heap block of a CString does not move when the vector grows.
            strings.push(text);
            Ok(strings.last().map_or(ptr::null_mut(), |text| text.as_ptr().cast_mut()))
        };
        // SAFETY: the structure is valid, and nothing else refers to it.
        set(unsafe { &mut *self.raw }, &mut keep)
    }

    fn as_ptr(&self) -> *const ConnectParams {
        self.raw
    }
}

impl Drop for Params {
    fn drop(&mut self) {
        // SAFETY: the structure is valid. The strings are ours: the library must not free them.
        unsafe {
            *self.raw = std::mem::zeroed();
        }
        match self.owner {
            // SAFETY: the structure came from a Box.
            ParamsOwner::Us => drop(unsafe { Box::from_raw(self.raw) }),
            // SAFETY: the library allocated the structure.
            ParamsOwner::Library(Some(free)) => unsafe { free(self.raw) },
            // Leaked: once for each process.
            ParamsOwner::Library(None) => {}
        }
    }
}

/// Converts a parameter for the library.
pub(super) fn c_string(bytes: impl Into<Vec<u8>>) -> Result<CString> {
    CString::new(bytes).map_err(|_nul| Error::unsupported("a parameter of VDDK has a NUL byte"))
}

/// Copies a list of allocated ranges. Returns `None` if there is none, or it is too long to be true: what a part of it
/// does not name must not become a hole.
///
/// # Safety
/// The pointer is NULL or points to a list with as many blocks behind its head as that says.
unsafe fn copied_blocks(list: *const BlockList) -> Option<Vec<Block>> {
    if list.is_null() {
        return None;
    }
    // SAFETY: as the caller guarantees. No reference: a list without blocks is shorter than the structure.
    let count = unsafe { ptr::addr_of!((*list).count).read() };
    if count > MAX_BLOCKS {
        return None;
    }
    // SAFETY: the blocks follow the head, so the pointer is derived from that of the whole list.
    let first = unsafe { ptr::addr_of!((*list).blocks) }.cast::<Block>();
    // SAFETY: each index is below the number of blocks.
    Some((0..count as usize).map(|at| unsafe { first.add(at).read() }).collect())
}

/// Copies a C string.
///
/// # Safety
/// The pointer is NULL or points to a string.
unsafe fn text(raw: *const c_char) -> Option<String> {
    // SAFETY: as the caller guarantees.
    (!raw.is_null()).then(|| unsafe { CStr::from_ptr(raw) }.to_string_lossy().into_owned())
}

/// Returns the path of the loaded file, without symbolic links: its name may say more about the version.
fn loaded_path(name: &[u8]) -> String {
    let named = Path::new(std::ffi::OsStr::from_bytes(name));
    if let Ok(path) = named.canonicalize() {
        return path.display().to_string();
    }
    // The dynamic linker found it by name: the map of this process has its path.
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let line = maps.lines().find(|line| line.contains("libvixDiskLib.so"));
    let path = line.and_then(|line| line.find('/').map(|at| line[at..].to_owned()));
    path.unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_of_blocks_is_copied_whole_or_not_at_all() {
        // As the library stores them: the head, then the blocks.
        let list = |count: u32| [u64::from(count), 128, 256, 512, 128];
        // SAFETY: no count of up to `MAX_BLOCKS` exceeds the blocks.
        let copied = |words: &[u64]| unsafe { copied_blocks(words.as_ptr().cast()) };
        let blocks = copied(&list(2)).unwrap();
        let found: Vec<_> = blocks.iter().map(|block| (block.offset, block.length)).collect();
        assert_eq!(found, [(128, 256), (512, 128)]);
        assert!(copied(&list(0)).unwrap().is_empty(), "nothing is allocated");
        assert!(copied(&list(MAX_BLOCKS + 1)).is_none(), "too long");
        // SAFETY: NULL is permitted.
        assert!(unsafe { copied_blocks(ptr::null()) }.is_none());
        assert_eq!(MAX_BLOCKS, 32 << 10, "chunks of 64 KiB in 2 GiB");
    }
}
