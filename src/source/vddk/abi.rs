//! C interface of VDDK: types, constants and the one table of functions.
//!
//! The stand-in library of the tests includes this file, so that both sides are compiled from the same types and every
//! function of the table exists in the stand-in. It depends on nothing but the standard library for that reason.
//!
//! The offsets of the structures are those of x86-64, the only architecture that VDDK exists for.

use std::ffi::{c_char, c_int, c_long, c_void};

/// Result of a function. The low 16 bits are the number of the error.
pub(crate) type VixError = u64;

/// Connection of `VixDiskLib_ConnectEx`.
pub(crate) type Connection = *mut c_void;

/// Open disk of `VixDiskLib_Open`.
pub(crate) type Handle = *mut c_void;

/// Receiver of log messages. The second argument is a `va_list`, which x86-64 passes as a pointer.
pub(crate) type LogFunction = unsafe extern "C" fn(format: *const c_char, arguments: *mut c_void);

/// Receiver of the result of an asynchronous request.
pub(crate) type CompletionFunction = unsafe extern "C" fn(data: *mut c_void, result: VixError);

/// Success.
pub(crate) const VIX_OK: VixError = 0;

/// Result of a request that was queued: its callback has the result.
pub(crate) const VIX_ASYNC: VixError = 25000;

/// Bytes of a sector.
pub(crate) const SECTOR: u64 = 512;

/// Sectors of a chunk, the unit of `VixDiskLib_QueryAllocatedBlocks`.
pub(crate) const CHUNK_SECTORS: u64 = 128;

/// Flags of `VixDiskLib_Open`.
pub(crate) mod open_flag {
    /// Bypass the page cache.
    pub(crate) const UNBUFFERED: u32 = 1;
    /// Open one link of a chain, without its parents.
    pub(crate) const SINGLE_LINK: u32 = 2;
    /// Open for reading.
    pub(crate) const READ_ONLY: u32 = 4;
    /// Compress the transport with zlib.
    pub(crate) const ZLIB: u32 = 16;
    /// Compress the transport with FastLZ.
    pub(crate) const FASTLZ: u32 = 32;
    /// Compress the transport with SkipZ.
    pub(crate) const SKIPZ: u32 = 64;
}

/// Values of [`ConnectParams::cred_type`].
pub(crate) mod cred_type {
    /// User name and password.
    pub(crate) const UID: u32 = 1;
    /// Session cookie, user name and key.
    pub(crate) const SESSION_ID: u32 = 2;
}

/// Values of [`ConnectParams::spec_type`].
pub(crate) mod spec_type {
    /// The disk of a virtual machine.
    pub(crate) const VMX: u32 = 0;
    /// A disk in a datastore.
    pub(crate) const DATASTORE: u32 = 2;
}

/// Address and login of a server, 128 bytes.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct ConnectParams {
    pub(crate) vmx_spec: *mut c_char,
    pub(crate) server_name: *mut c_char,
    pub(crate) thumb_print: *mut c_char,
    pub(crate) reserved: c_long,
    /// One of [`cred_type`].
    pub(crate) cred_type: u32,
    /// UID: user, password. SESSION_ID: cookie, user, key.
    pub(crate) creds: [*mut c_char; 3],
    pub(crate) port: u32,
    pub(crate) nfc_host_port: u32,
    pub(crate) reserved_pointer: *mut c_char,
    pub(crate) reserved_chars: [c_char; 8],
    pub(crate) reserved_state: *mut c_void,
    /// DATASTORE: managed object reference of the datastore, folder of the disk.
    pub(crate) spec: [*mut c_char; 3],
    /// One of [`spec_type`].
    pub(crate) spec_type: u32,
}

/// Cylinders, heads and sectors.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct DiskGeometry {
    pub(crate) cylinders: u32,
    pub(crate) heads: u32,
    pub(crate) sectors: u32,
}

/// Properties of an open disk: 64 bytes, or the first 56 of them before version 7.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct Info {
    pub(crate) bios_geometry: DiskGeometry,
    pub(crate) physical_geometry: DiskGeometry,
    /// Size in sectors.
    pub(crate) capacity: u64,
    pub(crate) adapter_type: u32,
    pub(crate) links: c_int,
    pub(crate) parent_hint: *mut c_char,
    pub(crate) uuid: *mut c_char,
    /// Only since version 7.
    pub(crate) logical_sector_size: u32,
    /// Only since version 7.
    pub(crate) physical_sector_size: u32,
}

/// Properties of a disk to create, 32 bytes.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct CreateParams {
    pub(crate) disk_type: u32,
    pub(crate) adapter_type: u32,
    pub(crate) hw_version: u16,
    /// Size in sectors.
    pub(crate) capacity: u64,
    pub(crate) logical_sector_size: u32,
    pub(crate) physical_sector_size: u32,
}

/// One allocated range of a disk, in sectors.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct Block {
    pub(crate) offset: u64,
    pub(crate) length: u64,
}

/// Start of a list of allocated ranges: [`Block`]s follow it.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct BlockList {
    pub(crate) count: u32,
    // No length: the library allocates as many as `count` says, and a field of one would read past a list of none.
    pub(crate) blocks: [Block; 0],
}

// Offsets in bytes of the public notes about the interface. A C program of the tests checks the same ones.
const _: () = {
    use std::mem::{offset_of, size_of};
    assert!(offset_of!(ConnectParams, thumb_print) == 16 && offset_of!(ConnectParams, cred_type) == 32);
    assert!(offset_of!(ConnectParams, creds) == 40 && offset_of!(ConnectParams, port) == 64);
    assert!(offset_of!(ConnectParams, nfc_host_port) == 68 && offset_of!(ConnectParams, spec) == 96);
    assert!(offset_of!(ConnectParams, spec_type) == 120 && size_of::<ConnectParams>() == 128);
    assert!(offset_of!(Info, capacity) == 24 && offset_of!(Info, adapter_type) == 32);
    assert!(offset_of!(Info, parent_hint) == 40 && offset_of!(Info, uuid) == 48);
    assert!(offset_of!(Info, logical_sector_size) == 56 && size_of::<Info>() == 64);
    assert!(offset_of!(CreateParams, hw_version) == 8 && offset_of!(CreateParams, capacity) == 16);
    assert!(offset_of!(CreateParams, physical_sector_size) == 28 && size_of::<CreateParams>() == 32);
    assert!(offset_of!(BlockList, blocks) == 8);
};

/// Passes the table of functions to the macro `$with`, after the tokens in braces.
///
/// Required are the functions that are called for every disk, all present since VDDK 6.7.
macro_rules! vddk_functions {
    ($with:ident { $($before:tt)* }) => {
        $with! {
            $($before)*
            required {
                fn VixDiskLib_InitEx(
                    major: u32,
                    minor: u32,
                    log: Option<LogFunction>,
                    warn: Option<LogFunction>,
                    panic: Option<LogFunction>,
                    libdir: *const c_char,
                    config: *const c_char,
                ) -> VixError;
                fn VixDiskLib_Exit();
                // The text belongs to the library's own allocator, so it is freed by the function below and never by
                // this program.
                fn VixDiskLib_GetErrorText(error: VixError, locale: *const c_char) -> *mut c_char;
                fn VixDiskLib_FreeErrorText(text: *mut c_char);
                fn VixDiskLib_ConnectEx(
                    params: *const ConnectParams,
                    read_only: c_char,
                    snapshot: *const c_char,
                    transports: *const c_char,
                    connection: *mut Connection,
                ) -> VixError;
                fn VixDiskLib_Disconnect(connection: Connection) -> VixError;
                fn VixDiskLib_Open(
                    connection: Connection,
                    path: *const c_char,
                    flags: u32,
                    handle: *mut Handle,
                ) -> VixError;
                fn VixDiskLib_Close(handle: Handle) -> VixError;
                fn VixDiskLib_GetTransportMode(handle: Handle) -> *const c_char;
                fn VixDiskLib_GetInfo(handle: Handle, info: *mut *mut Info) -> VixError;
                fn VixDiskLib_FreeInfo(info: *mut Info);
                fn VixDiskLib_ReadAsync(
                    handle: Handle,
                    start: u64,
                    sectors: u64,
                    buffer: *mut u8,
                    done: CompletionFunction,
                    data: *mut c_void,
                ) -> VixError;
                fn VixDiskLib_WriteAsync(
                    handle: Handle,
                    start: u64,
                    sectors: u64,
                    buffer: *const u8,
                    done: CompletionFunction,
                    data: *mut c_void,
                ) -> VixError;
                fn VixDiskLib_Wait(handle: Handle) -> VixError;
                fn VixDiskLib_Flush(handle: Handle) -> VixError;
                fn VixDiskLib_Create(
                    connection: Connection,
                    path: *const c_char,
                    params: *const CreateParams,
                    progress: *mut c_void,
                    data: *mut c_void,
                ) -> VixError;
            }
            optional {
                // Where it is missing, the structure is allocated here and freed here (`Params::new`).
                fn VixDiskLib_AllocateConnectParams() -> *mut ConnectParams;
                fn VixDiskLib_FreeConnectParams(params: *mut ConnectParams);
                fn VixDiskLib_QueryAllocatedBlocks(
                    handle: Handle,
                    start: u64,
                    sectors: u64,
                    chunk: u64,
                    list: *mut *mut BlockList,
                ) -> VixError;
                fn VixDiskLib_FreeBlockList(list: *mut BlockList) -> VixError;
                fn VixDiskLib_ListTransportModes() -> *const c_char;
                fn VixDiskLib_PrepareForAccess(params: *const ConnectParams, identity: *const c_char) -> VixError;
                fn VixDiskLib_EndAccess(params: *const ConnectParams, identity: *const c_char) -> VixError;
                fn VixDiskLib_Cleanup(params: *const ConnectParams, cleaned: *mut u32, remaining: *mut u32) -> VixError;
                // Listed for `--dump` only: synchronous requests may not be mixed with asynchronous ones on one handle.
                fn VixDiskLib_Read(handle: Handle, start: u64, sectors: u64, buffer: *mut u8) -> VixError;
                fn VixDiskLib_Write(handle: Handle, start: u64, sectors: u64, buffer: *const u8) -> VixError;
                fn VixDiskLib_GetMetadataKeys(handle: Handle, keys: *mut c_char, size: usize, needed: *mut usize) -> VixError;
                fn VixDiskLib_ReadMetadata(
                    handle: Handle,
                    key: *const c_char,
                    value: *mut c_char,
                    size: usize,
                    needed: *mut usize,
                ) -> VixError;
            }
        }
    };
}

pub(crate) use vddk_functions;
