//! Connections to the pretended server, or to local files.

use std::ffi::c_char;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::abi::{ConnectParams, Connection, CreateParams, VIX_OK, VixError, cred_type, spec_type};
use crate::connection::{ConnectionState, FAIL};
use crate::disk::open_disks;
use crate::knobs::fault;
use crate::{called, library, text, violation};

const ALREADY_EXISTS: VixError = 12;
const INVALID_AUTHENTICATION: VixError = 3047;
const VM_NOT_FOUND: VixError = 4000;
const CANNOT_CONNECT: VixError = 18000;

static CONNECTIONS: AtomicUsize = AtomicUsize::new(0);
static PREPARED: AtomicUsize = AtomicUsize::new(0);

/// Connection parameters that a client passed.
#[derive(Debug)]
struct Given {
    server: Option<String>,
    vm: Option<String>,
    thumbprint: Option<String>,
    cred_type: u32,
    creds: [Option<String>; 3],
    ports: (u32, u32),
    spec_type: u32,
    spec: [Option<String>; 2],
}

unsafe fn given(params: *const ConnectParams) -> Given {
    if params.is_null() {
        violation("the connection parameters are NULL");
    }
    let params = &*params;
    let used = match params.cred_type {
        cred_type::UID => 2,
        cred_type::SESSION_ID => 3,
        _ => 0,
    };
    let mut creds = [const { None }; 3];
    for (text_of, raw) in creds.iter_mut().zip(params.creds).take(used) {
        *text_of = text(raw);
    }
    let datastore = params.spec_type == spec_type::DATASTORE;
    let spec = |at: usize| if datastore { text(params.spec[at]) } else { None };
    Given {
        server: text(params.server_name),
        vm: text(params.vmx_spec),
        thumbprint: text(params.thumb_print),
        cred_type: params.cred_type,
        creds,
        ports: (params.port, params.nfc_host_port),
        spec_type: params.spec_type,
        spec: [spec(0), spec(1)],
    }
}

impl Given {
    fn log(&self, function: &str, more: &str) {
        let creds: Vec<&str> = self.creds.iter().flatten().map(String::as_str).collect();
        let or_null = |text: &Option<String>| text.clone().unwrap_or_else(|| "NULL".into());
        called(&format!(
            "{function} server={} vm={} thumbprint={} cred={}:{} port={} nfc={} spec={}:{}:{}{more}",
            or_null(&self.server),
            or_null(&self.vm),
            or_null(&self.thumbprint),
            self.cred_type,
            creds.join(":"),
            self.ports.0,
            self.ports.1,
            self.spec_type,
            or_null(&self.spec[0]),
            or_null(&self.spec[1]),
        ));
    }

    /// Returns true for a remote connection, whose required fields it checks: the real library crashes without them.
    fn is_remote(&self) -> bool {
        let any = self.server.is_some() || self.vm.is_some() || self.creds.iter().any(Option::is_some);
        if !any && self.spec_type == spec_type::VMX {
            return false;
        }
        let (user, secret) = match self.cred_type {
            cred_type::SESSION_ID => (&self.creds[1], &self.creds[2]),
            _ => (&self.creds[0], &self.creds[1]),
        };
        let owner = match self.spec_type {
            spec_type::DATASTORE => self.spec.iter().all(Option::is_some) && self.vm.is_none(),
            _ => self.vm.is_some(),
        };
        if self.server.is_none() || user.is_none() || secret.is_none() || !owner {
            violation("a field of a remote connection is NULL");
        }
        true
    }

    /// Compares with what the pretended server expects.
    fn check(&self) -> Result<(), VixError> {
        let knobs = &library().knobs;
        let differs = |key: &str, value: &Option<String>| {
            knobs
                .text(key)
                .is_some_and(|expected| value.as_deref() != Some(expected))
        };
        let session = self.cred_type == cred_type::SESSION_ID;
        let shift = usize::from(session);
        if differs("server", &self.server) {
            return Err(CANNOT_CONNECT);
        }
        if differs("user", &self.creds[shift])
            || differs("password", &self.creds[shift + 1])
            || (session && differs("cookie", &self.creds[0]))
        {
            return Err(INVALID_AUTHENTICATION);
        }
        if self.spec_type == spec_type::VMX && differs("vm", &self.vm) {
            return Err(VM_NOT_FOUND);
        }
        Ok(())
    }
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn VixDiskLib_AllocateConnectParams() -> *mut ConnectParams {
    libc::calloc(1, size_of::<ConnectParams>()).cast()
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn VixDiskLib_FreeConnectParams(params: *mut ConnectParams) {
    libc::free(params.cast());
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn VixDiskLib_PrepareForAccess(
    params: *const ConnectParams,
    identity: *const c_char,
) -> VixError {
    given(params).log(
        "PrepareForAccess",
        &format!(" identity={}", text(identity).unwrap_or_default()),
    );
    if CONNECTIONS.load(Ordering::SeqCst) > 0 {
        violation("PrepareForAccess was called after ConnectEx");
    }
    PREPARED.fetch_add(1, Ordering::SeqCst);
    fault("PrepareForAccess").unwrap_or(VIX_OK)
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn VixDiskLib_EndAccess(
    params: *const ConnectParams,
    identity: *const c_char,
) -> VixError {
    given(params).log(
        "EndAccess",
        &format!(" identity={}", text(identity).unwrap_or_default()),
    );
    if CONNECTIONS.load(Ordering::SeqCst) > 0 {
        violation("EndAccess was called before Disconnect");
    }
    if PREPARED.fetch_sub(1, Ordering::SeqCst) == 0 {
        violation("EndAccess was called without PrepareForAccess");
    }
    VIX_OK
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn VixDiskLib_Cleanup(
    params: *const ConnectParams,
    cleaned: *mut u32,
    remaining: *mut u32,
) -> VixError {
    given(params).log("Cleanup", "");
    *cleaned = 0;
    *remaining = 0;
    VIX_OK
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn VixDiskLib_ConnectEx(
    params: *const ConnectParams,
    read_only: c_char,
    snapshot: *const c_char,
    transports: *const c_char,
    connection: *mut Connection,
) -> VixError {
    let given = given(params);
    let (snapshot, transports) = (text(snapshot), text(transports));
    given.log(
        "ConnectEx",
        &format!(
            " read_only={read_only} snapshot={} transports={}",
            snapshot.unwrap_or_else(|| "NULL".into()),
            transports.unwrap_or_else(|| "NULL".into())
        ),
    );
    let remote = given.is_remote();
    if let Some(error) = fault("ConnectEx") {
        return error;
    }
    if let Err(error) = if remote { given.check() } else { Ok(()) } {
        return error;
    }
    let expected = library().knobs.text("thumbprint");
    let state = ConnectionState {
        remote,
        untrusted: remote && expected.is_some_and(|expected| given.thumbprint.as_deref() != Some(expected)),
        read_only: read_only != 0,
    };
    *connection = Box::into_raw(Box::new(state)).cast();
    CONNECTIONS.fetch_add(1, Ordering::SeqCst);
    VIX_OK
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn VixDiskLib_Disconnect(connection: Connection) -> VixError {
    called("Disconnect");
    if open_disks() > 0 {
        violation("Disconnect was called before Close");
    }
    drop(Box::from_raw(connection.cast::<ConnectionState>()));
    CONNECTIONS.fetch_sub(1, Ordering::SeqCst);
    VIX_OK
}

/// Checks that everything was ended before Exit.
pub(crate) fn check_none_left() {
    if open_disks() > 0 || CONNECTIONS.load(Ordering::SeqCst) > 0 || PREPARED.load(Ordering::SeqCst) > 0 {
        violation("Exit was called before Close, Disconnect or EndAccess");
    }
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn VixDiskLib_Create(
    connection: Connection,
    path: *const c_char,
    params: *const CreateParams,
    _progress: *mut libc::c_void,
    _data: *mut libc::c_void,
) -> VixError {
    let (path, params) = (text(path).unwrap_or_default(), *params);
    called(&format!(
        "Create path={path} type={} adapter={} hwversion={} sectors={}",
        params.disk_type, params.adapter_type, params.hw_version, params.capacity
    ));
    if let Some(error) = fault("Create") {
        return error;
    }
    let file = match (*connection.cast::<ConnectionState>()).path_of(&path) {
        Ok(file) => file,
        Err(error) => return error,
    };
    match std::fs::File::create_new(file) {
        Ok(file) => file.set_len(params.capacity * 512).map_or(FAIL, |()| VIX_OK),
        Err(_) => ALREADY_EXISTS,
    }
}
