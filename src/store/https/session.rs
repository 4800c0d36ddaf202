//! Login at a server: HTTP Basic once, then the session cookie of the answer.
//!
//! ```text
//!   no cookie ── request with Basic ──► 2xx with vmware_soap_session ──► cookie: all requests send it
//!       ▲                └──► 2xx without it: Basic on every request      │
//!       └───────── 401 or a login page: the session has ended ◄───────────┘
//! ```
//! One request at a time logs in; the others wait for its cookie, so that a mount has one session on the server, whose
//! number is limited. A login that the server refused is not repeated for [`REFUSED_FOR`]: repeated wrong passwords lock
//! accounts. The same holds for a script whose cookie was never accepted, or which fails. The cookie goes back byte for byte,
//! quotes included.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use reqwest::header::{HeaderMap, HeaderValue, SET_COOKIE};

use super::cookie_script;
use super::failure::Failure;
use super::request::{Limits, TICK};
use crate::config::{HttpsServer, Secret};
use crate::error::{Error, ErrorKind, Result};
use crate::mutex::{lock, wait_timeout};

/// Name of the cookie of an ESXi's and a vCenter's session.
const SESSION_COOKIE: &[u8] = b"vmware_soap_session";

/// Time for which a refused login is not repeated.
const REFUSED_FOR: Duration = Duration::from_secs(30);

/// Longest cookie that is kept, in bytes.
const MAX_COOKIE: usize = 4096;

/// Login of one server.
pub(super) struct Session {
    basic: Option<HeaderValue>,
    /// Program that prints the cookie, and the time after which it is run again.
    script: Option<(Secret, Option<Duration>)>,
    user: String,
    state: Mutex<LoginState>,
    /// Notified when a login has ended.
    login_ended: Condvar,
    /// Number of the last cookie that the server has accepted.
    accepted: AtomicU64,
}

#[derive(Default)]
struct LoginState {
    cookie: Option<HeaderValue>,
    /// Time of the script's last run, and number of its runs.
    script_ran: Option<Instant>,
    script_runs: u64,
    /// True if the cookie comes from a login of this process, which then also logs out.
    ours: bool,
    /// Number of the cookie: tells a request whether the cookie that was refused is still the current one.
    generation: u64,
    /// True once a login was answered without a session cookie.
    basic_only: bool,
    /// Last login that failed: its time, and why.
    refused: Option<(Instant, Error)>,
    /// True while a request logs in, from before it is sent until its answer's headers are here.
    logging_in: bool,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session")
            .field("user", &self.user)
            .finish_non_exhaustive()
    }
}

/// Authorization of one request.
pub(super) enum Authorization<'s> {
    /// The server asks for none.
    Anonymous,
    /// The session's cookie, with its number.
    Cookie(HeaderValue, u64),
    /// User and password, at a server without sessions.
    Basic(HeaderValue),
    /// User and password, to begin a session.
    Login {
        basic: HeaderValue,
        /// Other requests wait until it is dropped.
        _guard: LoginGuard<'s>,
    },
}

/// Marks the session as logging in until it is dropped.
pub(super) struct LoginGuard<'s>(&'s Session);

impl Drop for LoginGuard<'_> {
    fn drop(&mut self) {
        self.0.state().logging_in = false;
        self.0.login_ended.notify_all();
    }
}

impl Session {
    /// Creates the login for the credentials of a configuration. Errors: `Usage` if a header cannot hold them.
    pub(super) fn new(server: &HttpsServer) -> Result<Self> {
        let header = |text: String, key: &str| {
            let invalid = |_| {
                Error::new(
                    ErrorKind::Usage,
                    format!("{key}=: has characters that HTTP cannot send"),
                )
            };
            let mut value = HeaderValue::from_bytes(text.as_bytes()).map_err(invalid)?;
            // Keeps it out of the debug output of the HTTP library.
            value.set_sensitive(true);
            Ok(value)
        };
        let user = server.user.clone().unwrap_or_default();
        let basic = match (&server.user, &server.password) {
            (None, None) => None,
            (_, password) => {
                let password = password.as_ref().map_or("", |password| password.reveal());
                let pair = base64(format!("{user}:{password}").as_bytes());
                Some(header(format!("Basic {pair}"), "password")?)
            }
        };
        let cookie = server.cookie.as_ref();
        let cookie = cookie.map(|cookie| header(cookie.reveal().trim().to_owned(), "cookie"));
        let state = LoginState {
            cookie: cookie.transpose()?,
            ..LoginState::default()
        };
        Ok(Self {
            basic,
            script: server.cookie_script.clone(),
            user,
            state: Mutex::new(state),
            login_ended: Condvar::new(),
            accepted: AtomicU64::new(0),
        })
    }

    /// Returns the authorization for the next request. Waits for a login that another request does.
    ///
    /// Errors: the server has refused the login a short while ago; the cookie script fails; those of the limits.
    pub(super) fn authorize(&self, url: &str, limits: Limits<'_>) -> Result<Authorization<'_>, Failure> {
        let mut state = self.state();
        loop {
            // The request that logged in may have brought a cookie, or a refusal.
            if let Some(known) = self.known(&state)? {
                return Ok(known);
            }
            match (&self.basic, &self.script) {
                (None, None) => return Ok(Authorization::Anonymous),
                // One login for all connections: an ESXi has few sessions, and locks a user out after some refusals.
                _ if state.logging_in => {}
                (_, Some((script, _))) => {
                    state.logging_in = true;
                    drop(state);
                    return self.run_script(script, url, limits);
                }
                (Some(basic), None) => {
                    state.logging_in = true;
                    return Ok(Authorization::Login {
                        basic: basic.clone(),
                        _guard: LoginGuard(self),
                    });
                }
            }
            // In short waits: this request may be given up, or late, before the other one's login ends.
            limits.check()?;
            state = wait_timeout(&self.login_ended, state, TICK).0;
        }
    }

    fn known(&self, state: &LoginState) -> Result<Option<Authorization<'static>>> {
        let renew = self.script.as_ref().and_then(|(_, renew)| *renew);
        let is_old = state
            .script_ran
            .zip(renew)
            .is_some_and(|(ran, renew)| ran.elapsed() >= renew);
        if let Some(cookie) = state.cookie.as_ref().filter(|_| !is_old) {
            return Ok(Some(Authorization::Cookie(cookie.clone(), state.generation)));
        }
        if let Some((_, why)) = state.refused.as_ref().filter(|(at, _)| at.elapsed() < REFUSED_FOR) {
            return Err(why.clone());
        }
        Ok(self
            .basic
            .clone()
            .filter(|_| state.basic_only)
            .map(Authorization::Basic))
    }

    /// Runs the script. The caller has marked the session as logging in.
    fn run_script(&self, script: &Secret, url: &str, limits: Limits<'_>) -> Result<Authorization<'_>, Failure> {
        let _guard = LoginGuard(self);
        let runs = self.state().script_runs;
        let cookie = match cookie_script::run(script, url, runs, limits) {
            Ok(cookie) => cookie,
            Err(failure) => {
                // Not for a request that was given up, or had no time.
                let is_refusal = failure.error.kind() == ErrorKind::Os(libc::EACCES);
                self.state().refused = is_refusal.then(|| (Instant::now(), failure.error.clone()));
                return Err(failure);
            }
        };
        let mut state = self.state();
        state.cookie = Some(cookie.clone());
        state.script_ran = Some(Instant::now());
        state.script_runs += 1;
        state.generation += 1;
        let generation = state.generation;
        // The guard locks the state when it is dropped.
        drop(state);
        Ok(Authorization::Cookie(cookie, generation))
    }

    /// Takes the session cookie of an answer to a login. `accepted`: the server did not refuse the login.
    pub(super) fn logged_in(&self, headers: &HeaderMap, accepted: bool) {
        let mut state = self.state();
        if let Some(cookie) = session_cookie(headers) {
            state.cookie = Some(cookie);
            state.ours = true;
            state.generation += 1;
        } else if accepted {
            state.basic_only = true;
        }
        if accepted {
            state.refused = None;
        }
    }

    /// Notes that the server accepts cookie `generation`.
    pub(super) fn accepted(&self, generation: u64) {
        self.accepted.fetch_max(generation, Ordering::Relaxed);
    }

    /// Notes that the server no longer accepts cookie `generation`. Returns true if a login may replace it.
    pub(super) fn expired(&self, generation: u64) -> bool {
        let mut state = self.state();
        let may_log_in = self.basic.is_some() || self.script.is_some();
        if state.generation == generation && may_log_in {
            state.cookie = None;
            // A cookie that has worked before has expired. One that never did would not do the next time either.
            if self.script.is_some() && self.accepted.load(Ordering::Relaxed) < generation {
                let text = "the server does not accept the cookie that cookie-script= prints: check the script";
                state.refused = Some((Instant::now(), Error::new(ErrorKind::Os(libc::EACCES), text)));
            }
        }
        may_log_in
    }

    /// Notes that the server refused user and password, and returns the error.
    pub(super) fn refused(&self) -> Error {
        let error = Error::new(
            ErrorKind::Os(libc::EACCES),
            format!(
                "the server refused the login of user {:?}: check user= and password=",
                self.user
            ),
        );
        self.state().refused = Some((Instant::now(), error.clone()));
        error
    }

    /// Returns the error for a server that asks for a login, when there is nothing to log in with.
    pub(super) fn unauthorized(&self) -> Error {
        let why = if self.state().cookie.is_some() {
            "the server no longer accepts the cookie: give a fresh cookie=, or user= and password="
        } else {
            "the server asks for a login: add user= and password="
        };
        Error::new(ErrorKind::Os(libc::EACCES), why)
    }

    /// Takes the cookie of a session that this process began, to end it.
    pub(super) fn take(&self) -> Option<HeaderValue> {
        let mut state = self.state();
        let ours = state.ours;
        state.cookie.take().filter(|_| ours)
    }

    fn state(&self) -> MutexGuard<'_, LoginState> {
        lock(&self.state)
    }
}

/// Returns `name=value` of the session cookie that an answer sets, byte for byte.
fn session_cookie(headers: &HeaderMap) -> Option<HeaderValue> {
    let mut cookies = headers.get_all(SET_COOKIE).iter();
    cookies.find_map(|set| {
        let pair = set.as_bytes().split(|b| *b == b';').next()?.trim_ascii();
        let name = pair.split(|b| *b == b'=').next()?;
        let is_session = name == SESSION_COOKIE && pair.len() <= MAX_COOKIE && pair.len() > name.len() + 1;
        let mut value = HeaderValue::from_bytes(pair).ok().filter(|_| is_session)?;
        value.set_sensitive(true);
        Some(value)
    })
}

/// Encodes bytes in Base64, with padding.
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::new();
    for chunk in bytes.chunks(3) {
        let byte = |i: usize| u32::from(chunk.get(i).copied().unwrap_or(0));
        let bits = byte(0) << 16 | byte(1) << 8 | byte(2);
        for i in 0..4 {
            let digit = DIGITS[(bits >> (18 - 6 * i) & 63) as usize];
            out.push(if i <= chunk.len() { char::from(digit) } else { '=' });
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use super::*;
    use crate::config::Secret;

    fn login() -> Session {
        let server = HttpsServer {
            user: Some("root".to_owned()),
            password: Some(Secret::new("secret")),
            ..HttpsServer::default()
        };
        Session::new(&server).unwrap()
    }

    fn authorize(session: &Session) -> Result<Authorization<'_>, Failure> {
        let closing = AtomicBool::new(false);
        let limits = Limits {
            deadline: Instant::now() + Duration::from_secs(60),
            closing: &closing,
        };
        session.authorize("https://h/disk", limits)
    }

    #[test]
    fn base64_has_padding() {
        for (text, encoded) in [
            ("", ""),
            ("a", "YQ=="),
            ("ab", "YWI="),
            ("abc", "YWJj"),
            ("root:secret", "cm9vdDpzZWNyZXQ="),
        ] {
            assert_eq!(base64(text.as_bytes()), encoded);
        }
    }

    #[test]
    fn the_cookie_of_a_login_goes_back_byte_for_byte() {
        let session = login();
        assert!(matches!(authorize(&session).unwrap(), Authorization::Login { .. }));
        let mut headers = HeaderMap::new();
        headers.append(SET_COOKIE, HeaderValue::from_static("other=1"));
        headers.append(
            SET_COOKIE,
            HeaderValue::from_static("vmware_soap_session=\"52-a b=\"; Path=/; HttpOnly; Secure;"),
        );
        session.logged_in(&headers, true);
        let Authorization::Cookie(cookie, generation) = authorize(&session).unwrap() else {
            panic!("no cookie")
        };
        assert_eq!(cookie, "vmware_soap_session=\"52-a b=\"");
        // Only the current cookie expires; a late answer to an older one changes nothing.
        assert!(session.expired(generation - 1));
        assert!(matches!(authorize(&session).unwrap(), Authorization::Cookie(..)));
        assert!(session.expired(generation));
        assert!(matches!(authorize(&session).unwrap(), Authorization::Login { .. }));
    }

    #[test]
    fn a_refused_login_is_not_repeated_at_once() {
        let session = login();
        drop(authorize(&session).unwrap());
        let error = session.refused().to_string();
        assert!(error.contains("\"root\"") && !error.contains("secret:"), "{error}");
        assert!(authorize(&session).is_err());
    }

    #[test]
    fn a_server_without_sessions_gets_the_password_with_each_request() {
        let session = login();
        session.logged_in(&HeaderMap::new(), true);
        assert!(matches!(authorize(&session).unwrap(), Authorization::Basic(_)));
    }

    #[test]
    fn a_script_prints_the_cookie_and_runs_again_when_it_has_expired() {
        let server = HttpsServer {
            cookie_script: Some((
                Secret::new("echo \"n=$iteration; u=$url\"; sleep 100 >/dev/null &"),
                None,
            )),
            ..HttpsServer::default()
        };
        let session = Session::new(&server).unwrap();
        for run in 0..2 {
            let Authorization::Cookie(cookie, generation) = authorize(&session).unwrap() else {
                panic!("no cookie")
            };
            assert_eq!(cookie, format!("n={run}; u=https://h/disk"));
            assert!(matches!(authorize(&session).unwrap(), Authorization::Cookie(_, same) if same == generation));
            session.accepted(generation);
            assert!(session.expired(generation));
        }
        assert_eq!(session.take(), None);
    }

    #[test]
    fn a_script_that_fails_or_prints_nothing_is_an_error_without_its_text() {
        for script in ["exit 3; secret", ": secret", "printf 'a\\001b'"] {
            let server = HttpsServer {
                cookie_script: Some((Secret::new(script), Some(Duration::ZERO))),
                ..HttpsServer::default()
            };
            let session = Session::new(&server).unwrap();
            let error = authorize(&session).err().unwrap().error.to_string();
            assert!(error.contains("cookie-script=") && !error.contains("secret"), "{error}");
        }
    }

    #[test]
    fn a_script_that_was_refused_or_failed_is_not_run_again_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let runs = dir.path().join("runs");
        for (last, expected) in [("echo c=1", "does not accept the cookie"), ("exit 7", "exit status: 7")] {
            let script = format!("echo run >> '{}'; {last}", runs.display());
            let server = HttpsServer {
                cookie_script: Some((Secret::new(script), None)),
                ..HttpsServer::default()
            };
            let session = Session::new(&server).unwrap();
            if let Ok(Authorization::Cookie(_, generation)) = authorize(&session) {
                assert!(session.expired(generation));
            }
            for _ in 0..3 {
                let error = authorize(&session).err().unwrap().error.to_string();
                assert!(error.contains(expected), "{error}");
            }
            assert_eq!(std::fs::read_to_string(&runs).unwrap(), "run\n");
            std::fs::remove_file(&runs).unwrap();
        }
    }

    #[test]
    fn a_cookie_that_the_user_gave_is_used_and_never_logged_out() {
        let server = HttpsServer {
            cookie: Some(Secret::new("vmware_soap_session=\"x\"")),
            ..HttpsServer::default()
        };
        let session = Session::new(&server).unwrap();
        assert!(matches!(authorize(&session).unwrap(), Authorization::Cookie(..)));
        assert!(!session.expired(0));
        assert_eq!(session.take(), None);
    }
}
