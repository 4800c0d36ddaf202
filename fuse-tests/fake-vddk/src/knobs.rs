//! Behaviour that a test chooses: lines KEY=VALUE of the file `knobs`.
//!
//! | key | meaning |
//! | --- | --- |
//! | `version=N` | version of the library that it poses as: before 7 the properties of a disk have 56 bytes |
//! | `transport=MODE` | transport of every disk (default: `file` for a local one, `nbdssl` for a remote one) |
//! | `latency=MICROSECONDS` | time that a request takes |
//! | `query-latency=MICROSECONDS` | time that a query of allocated blocks takes |
//! | `ram=BYTES` | every disk is memory of that size |
//! | `order=reverse` | queued requests that are due are answered in the reverse order |
//! | `callback=early` | the callback comes before ReadAsync or WriteAsync returns, with any transport |
//! | `callback=twice`, `callback=error` | the same, and the callback comes again; the same, and the call returns an error |
//! | `volatile=1` | writes reach the file at Flush and Close: those before are lost in a crash |
//! | `fail=FUNCTION:FIRST:COUNT:ERROR` | calls FIRST to FIRST+COUNT-1 of this process fail |
//! | `fail-once=FUNCTION:N:ERROR` | the Nth call fails, in the first process that comes to it |
//! | `crash=FUNCTION:N[:always]`, `hang=FUNCTION:N[:always]` | the Nth call; once for all processes, or in each |
//! | `error-text=BYTES` | length of what is added to the text of each error |
//! | `error-line=TEXT` | a second line of the text of each error |
//! | `server= user= password= cookie= thumbprint= vm=` | what the pretended server expects |

use std::fs::File;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::abi::VixError;

/// The lines of the file.
#[derive(Debug, Default)]
pub(crate) struct Knobs(Vec<(String, String)>);

impl Knobs {
    pub(crate) fn read(folder: Option<&Path>) -> Self {
        let text = folder.and_then(|folder| std::fs::read_to_string(folder.join("knobs")).ok());
        let lines = text.unwrap_or_default();
        let pairs = lines.lines().filter_map(|line| line.split_once('='));
        Self(pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).collect())
    }

    pub(crate) fn text(&self, key: &str) -> Option<&str> {
        self.all(key).next()
    }

    pub(crate) fn number(&self, key: &str) -> Option<u64> {
        self.text(key)?.parse().ok()
    }

    fn all<'a>(&'a self, key: &str) -> impl Iterator<Item = &'a str> + use<'a> {
        let key = key.to_owned();
        self.0
            .iter()
            .filter(move |(name, _)| *name == key)
            .map(|(_, value)| value.as_str())
    }
}

/// Number of calls of each function of this process.
static CALLS: Mutex<Vec<(&'static str, AtomicU64)>> = Mutex::new(Vec::new());

/// Counts a call, and does to it what the knobs say. Returns the error with which it must fail.
pub(crate) fn fault(function: &'static str) -> Option<VixError> {
    let knobs = &crate::library().knobs;
    if ["fail", "fail-once", "crash", "hang"]
        .iter()
        .all(|key| knobs.text(key).is_none())
    {
        return None;
    }
    let number = {
        let mut calls = CALLS.lock().unwrap();
        if !calls.iter().any(|(name, _)| *name == function) {
            calls.push((function, AtomicU64::new(0)));
        }
        let count = calls.iter().find(|(name, _)| *name == function);
        count.map_or(0, |(_, count)| count.fetch_add(1, Ordering::SeqCst) + 1)
    };
    for (key, act) in [("crash", crash as fn()), ("hang", hang as fn())] {
        for value in knobs.all(key) {
            let words: Vec<&str> = value.split(':').collect();
            let applies = words.first() == Some(&function) && words.get(1).and_then(|n| n.parse().ok()) == Some(number);
            if applies && (words.get(2) == Some(&"always") || is_first(key, function)) {
                act();
            }
        }
    }
    let once = knobs.all("fail-once").find_map(|value| {
        let (name, numbers) = value.split_once(':')?;
        let (call, error) = numbers.split_once(':')?;
        let applies = name == function && call.parse() == Ok(number) && is_first("fail-once", function);
        applies.then(|| error.parse().ok())?
    });
    once.or_else(|| failure(knobs, function, number))
}

/// Returns the error with which a call fails in every process.
fn failure(knobs: &Knobs, function: &str, number: u64) -> Option<VixError> {
    knobs.all("fail").find_map(|value| {
        let numbers: Vec<u64> = value.split(':').skip(1).flat_map(str::parse).collect();
        let [first, count, error] = *numbers else { return None };
        let range = first..first + count;
        (value.split(':').next() == Some(function) && range.contains(&number)).then_some(error)
    })
}

/// Returns true if no process has come here before with this key and function.
fn is_first(key: &str, function: &str) -> bool {
    let folder = crate::library().folder.clone().unwrap_or_default();
    File::create_new(folder.join(format!("{key}-{function}.done"))).is_ok()
}

fn crash() {
    // Without a core file. A write to an address that nothing is mapped at, as in a real library: the handler of the Rust
    // runtime returns from a signal that was only sent.
    unsafe {
        libc::prctl(libc::PR_SET_DUMPABLE, 0);
        std::ptr::without_provenance_mut::<u8>(64).write_volatile(0);
    }
}

fn hang() {
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}
