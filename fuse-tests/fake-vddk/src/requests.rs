//! Reads and writes: within the call, or queued to a thread that answers them when they are due.

use std::ffi::c_void;
use std::sync::atomic::Ordering;
use std::sync::{Condvar, Mutex, Once};
use std::thread;
use std::time::{Duration, Instant};

use crate::abi::{CompletionFunction, Handle, VIX_ASYNC, VIX_OK, VixError};
use crate::disk::{ASYNCHRONOUS, Disk, SYNCHRONOUS, Use, disk};
use crate::knobs::fault;
use crate::library;

const FAIL: VixError = 1;

/// A queued request.
struct Request {
    due: Instant,
    disk: &'static Disk,
    write: bool,
    start: u64,
    sectors: u64,
    buffer: *mut u8,
    /// The result, if the knobs make it fail.
    fault: Option<VixError>,
    done: CompletionFunction,
    data: *mut c_void,
}

// SAFETY: the buffer belongs to the request until its callback.
unsafe impl Send for Request {}

static QUEUE: Mutex<Vec<Request>> = Mutex::new(Vec::new());
static QUEUED: Condvar = Condvar::new();
static ENDED: Condvar = Condvar::new();
static THREAD: Once = Once::new();

impl Request {
    unsafe fn perform(self) {
        let result = self.fault.unwrap_or_else(|| {
            if self.write {
                self.disk.write(self.start, self.sectors, self.buffer)
            } else {
                self.disk.read(self.start, self.sectors, self.buffer)
            }
        });
        // Before the callback: the client may close the disk in it.
        self.disk.in_flight.fetch_sub(1, Ordering::SeqCst);
        (self.done)(self.data, result);
    }
}

/// Answers queued requests when they are due.
fn answer() {
    let reverse = library().knobs.text("order") == Some("reverse");
    let mut queue = QUEUE.lock().unwrap();
    loop {
        let now = Instant::now();
        let (due, later): (Vec<_>, Vec<_>) = queue.drain(..).partition(|request| request.due <= now);
        *queue = later;
        if due.is_empty() {
            let wait = queue
                .iter()
                .map(|request| request.due.saturating_duration_since(now))
                .min();
            queue = QUEUED
                .wait_timeout(queue, wait.unwrap_or(Duration::from_secs(3600)))
                .unwrap()
                .0;
            continue;
        }
        drop(queue);
        let mut due = due;
        if reverse {
            due.reverse();
        }
        for request in due {
            unsafe { request.perform() };
        }
        queue = QUEUE.lock().unwrap();
        ENDED.notify_all();
    }
}

/// Waits until no request of a disk is in flight.
fn wait_for(disk: &Disk) {
    let mut queue = QUEUE.lock().unwrap();
    while disk.in_flight.load(Ordering::SeqCst) > 0 && queue.iter().any(|request| std::ptr::eq(request.disk, disk)) {
        queue = ENDED.wait_timeout(queue, Duration::from_millis(10)).unwrap().0;
    }
}

fn latency() -> Duration {
    Duration::from_micros(library().knobs.number("latency").unwrap_or(0))
}

unsafe fn submit(
    (name, write): (&'static str, bool),
    handle: Handle,
    (start, sectors): (u64, u64),
    buffer: *mut u8,
    (done, data): (CompletionFunction, *mut c_void),
) -> VixError {
    let disk: &'static Disk = disk(handle);
    let _in_use = disk.enter(if disk.is_inline() { Use::Shared } else { Use::Exclusive });
    disk.check(ASYNCHRONOUS, start, sectors, buffer);
    let request = Request {
        due: Instant::now() + latency(),
        disk,
        write,
        start,
        sectors,
        buffer,
        fault: fault(name),
        done,
        data,
    };
    disk.in_flight.fetch_add(1, Ordering::SeqCst);
    let callback = library().knobs.text("callback");
    if disk.is_inline() || callback.is_some() {
        if !latency().is_zero() {
            thread::sleep(latency());
        }
        request.perform();
        if callback == Some("twice") {
            done(data, VIX_OK);
        }
        return if callback == Some("error") { FAIL } else { VIX_ASYNC };
    }
    THREAD.call_once(|| drop(thread::spawn(answer)));
    QUEUE.lock().unwrap().push(request);
    QUEUED.notify_one();
    VIX_ASYNC
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn VixDiskLib_ReadAsync(
    handle: Handle,
    start: u64,
    sectors: u64,
    buffer: *mut u8,
    done: CompletionFunction,
    data: *mut c_void,
) -> VixError {
    submit(("ReadAsync", false), handle, (start, sectors), buffer, (done, data))
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn VixDiskLib_WriteAsync(
    handle: Handle,
    start: u64,
    sectors: u64,
    buffer: *const u8,
    done: CompletionFunction,
    data: *mut c_void,
) -> VixError {
    submit(
        ("WriteAsync", true),
        handle,
        (start, sectors),
        buffer.cast_mut(),
        (done, data),
    )
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn VixDiskLib_Read(handle: Handle, start: u64, sectors: u64, buffer: *mut u8) -> VixError {
    let disk = disk(handle);
    disk.check(SYNCHRONOUS, start, sectors, buffer);
    disk.read(start, sectors, buffer)
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn VixDiskLib_Write(
    handle: Handle,
    start: u64,
    sectors: u64,
    buffer: *const u8,
) -> VixError {
    let disk = disk(handle);
    disk.check(SYNCHRONOUS, start, sectors, buffer);
    disk.write(start, sectors, buffer)
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn VixDiskLib_Wait(handle: Handle) -> VixError {
    if let Some(error) = fault("Wait") {
        return error;
    }
    let disk = disk(handle);
    let _in_use = disk.enter(Use::Exclusive);
    wait_for(disk);
    disk.waited();
    VIX_OK
}
