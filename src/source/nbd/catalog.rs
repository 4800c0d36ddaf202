//! The exports that a server lists now: asked again whenever their names are needed, and bounded in time and memory.
//!
//! ```text
//!   exports() ─ listed within LIFETIME? ─ yes ─► those names
//!                 └ no ─► a thread lists them (one at a time) ─ in time ─► the new names
//!                                                             └ else ───► the last names; the next attempt after a pause
//!   find(name) ─► NBD_OPT_INFO ─► properties of one export
//! ```
//! A server that hangs or has no connection to spare delays a caller by [`MAX_WAIT`], and then none until the pause is
//! over: the names and disks that are known stay in use.
//!
//! The mutex is never held while the server is asked.

use std::collections::HashSet;
use std::ffi::{CString, OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use super::connect::Connector;
use super::disk::{NbdDisk, timeout};
use super::export::Export;
use super::export_source::source_of;
use super::ffi::c_text;
use super::own_server::never;
use crate::config::{NbdConfig, SourceConfig};
use crate::error::{ErrorKind, Result};
use crate::mutex::{lock, wait_timeout_while};
use crate::source::OpenExport;

/// For how long a list is used without asking again: as long as the kernel uses a name.
const LIFETIME: Duration = Duration::from_secs(1);

/// Longest time for which a caller waits for a newer list than the one that is known.
const MAX_WAIT: Duration = Duration::from_secs(2);

/// First and longest pause after a failure. The pause doubles with each failure.
const PAUSE: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(30));

/// The exports of one server.
#[derive(Debug)]
pub struct ExportCatalog {
    connector: Connector,
    config: NbdConfig,
    state: Mutex<CatalogState>,
    /// Notified when an attempt to list has ended.
    listed: Condvar,
}

#[derive(Debug)]
struct CatalogState {
    names: Arc<[OsString]>,
    /// Time of that list.
    at: Instant,
    /// A thread is asking the server.
    is_listing: bool,
    /// Failures since the last answer.
    failures: u32,
    /// The log has an error of the list since the last answer.
    warned: bool,
    /// Until then the server is not asked for what is known already.
    paused_until: Option<Instant>,
}

/// Properties of an export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundExport(Export);

impl ExportCatalog {
    /// Connects to the server of `config` and lists its exports.
    ///
    /// Errors: the server cannot be reached, or refuses to list.
    pub fn connect(config: &NbdConfig) -> Result<Self> {
        let connector = Connector::new(config)?;
        let (names, dropped) = connector.list(Instant::now() + timeout(config))?;
        if dropped > 0 {
            tracing::warn!("{}", connector.left_out(dropped, names.len()));
        }
        Ok(Self {
            connector,
            config: config.clone(),
            state: Mutex::new(CatalogState {
                names: distinct(names),
                at: Instant::now(),
                is_listing: false,
                failures: 0,
                warned: false,
                paused_until: None,
            }),
            listed: Condvar::new(),
        })
    }

    /// Returns the names of the exports, each once: those that the server lists now, or the last ones if it does not
    /// answer in time.
    pub fn exports(self: &Arc<Self>) -> Arc<[OsString]> {
        let deadline = Instant::now() + MAX_WAIT;
        let mut state = self.lock();
        if state.at.elapsed() < LIFETIME || state.is_paused() {
            return Arc::clone(&state.names);
        }
        // A list that was asked for before this call may be older than an export that the caller knows to be there. It is
        // waited for all the same: it is younger than what is known, and the next lookup asks again.
        if !state.is_listing {
            state.is_listing = true;
            let catalog = Arc::clone(self);
            let thread = std::thread::Builder::new().name("nbd-list".to_owned());
            if let Err(e) = thread.spawn(move || catalog.list_again()) {
                tracing::warn!(
                    "{}: start the thread that lists the exports: {e}",
                    self.connector.label()
                );
                state.is_listing = false;
            }
        }
        let left = deadline.saturating_duration_since(Instant::now());
        let mut state = wait_timeout_while(&self.listed, state, left, |state| state.is_listing);
        // It goes on, and its answer counts when it comes. Callers that wait for the same list count as one failure.
        if state.is_listing && !state.is_paused() {
            state.failed();
        }
        Arc::clone(&state.names)
    }

    /// Returns true while the server is not asked again for what is known of it.
    pub(crate) fn is_paused(&self) -> bool {
        self.lock().is_paused()
    }

    /// Asks the server for the properties of an export; `None` if it has none of that name. `known`: they are known from
    /// before, so that the answer is not worth a long wait.
    pub fn find(&self, export: &OsStr, known: bool) -> Result<Option<FoundExport>> {
        let limit = timeout(&self.config);
        let deadline = Instant::now() + if known { limit.min(MAX_WAIT) } else { limit };
        match self.ask(export, deadline) {
            Ok(found) => Ok(Some(FoundExport(found))),
            Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::Os(libc::ENOENT)) => Ok(None),
            Err(e) => {
                self.lock().failed();
                Err(e)
            }
        }
    }

    /// Opens an export, which connects when it is first used.
    pub fn open(&self, export: &OsStr, found: &FoundExport, writable: bool) -> Result<OpenExport> {
        let disk = NbdDisk::connect_lazily(self.connector.for_export(export), found.0, &self.config, writable)?;
        let config = NbdConfig {
            export: Some(export.to_owned()),
            dynamic: false,
            ..self.config.clone()
        };
        Ok(OpenExport {
            source: source_of(&config, disk),
            config: SourceConfig::Nbd(config),
        })
    }

    fn ask(&self, export: &OsStr, deadline: Instant) -> Result<Export> {
        let name = c_text(export.as_bytes())?;
        // A connection of its own, which ends before the data phase: those of an open disk belong to its session.
        let mut handle = self.connector.negotiate(true, deadline, &never)?;
        let found = self.connector.info(&mut handle, &name, deadline);
        // A server may have entered the data phase already, as old ones know no question about an export. Both ways end the
        // connection politely, so that it leaves no error in the server's log.
        if handle.is_up() {
            handle.disconnect();
        } else {
            handle.opt_abort();
        }
        found
    }

    /// Lists the exports, and ends the wait for it.
    fn list_again(&self) {
        let listed = self.connector.list(Instant::now() + timeout(&self.config));
        let mut state = self.lock();
        state.is_listing = false;
        match listed {
            Ok((names, _)) => {
                state.names = distinct(names);
                state.at = Instant::now();
                state.failures = 0;
                state.warned = false;
                state.paused_until = None;
            }
            Err(e) => {
                if !std::mem::replace(&mut state.warned, true) {
                    tracing::warn!("{e}; the exports that were listed before stay");
                }
                state.failed();
            }
        }
        drop(state);
        self.listed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, CatalogState> {
        lock(&self.state)
    }
}

impl CatalogState {
    fn is_paused(&self) -> bool {
        self.paused_until.is_some_and(|until| Instant::now() < until)
    }

    fn failed(&mut self) {
        let pause = PAUSE.0.saturating_mul(1 << self.failures.min(8)).min(PAUSE.1);
        self.failures = self.failures.saturating_add(1);
        self.paused_until = Some(Instant::now() + pause);
    }
}

/// Returns the names, each once: a server may list one twice, and two disks of one export would not see each other's
/// cached pages.
fn distinct(names: Vec<(CString, CString)>) -> Arc<[OsString]> {
    let mut seen = HashSet::new();
    let names = names.into_iter().map(|(name, _)| OsString::from_vec(name.into_bytes()));
    names.filter(|name| seen.insert(name.clone())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> CatalogState {
        CatalogState {
            names: Arc::new([]),
            at: Instant::now(),
            is_listing: false,
            failures: 0,
            warned: false,
            paused_until: None,
        }
    }

    #[test]
    fn pauses_grow_up_to_a_limit() {
        let mut state = state();
        assert!(!state.is_paused());
        for _ in 0..100 {
            state.failed();
            assert!(state.is_paused());
            assert!(state.paused_until.unwrap() <= Instant::now() + PAUSE.1);
        }
    }

    #[test]
    fn an_export_that_is_listed_twice_is_one() {
        let name = |text: &str| (CString::new(text).unwrap(), CString::default());
        let names = distinct(vec![name("b"), name("a"), name("b"), name("")]);
        assert_eq!(*names, ["b", "a", ""].map(OsString::from));
    }
}
