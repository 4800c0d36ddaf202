//! End of a session that this process began: servers limit their number.

use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use reqwest::header::{CONTENT_TYPE, COOKIE, HeaderMap, HeaderValue};
use reqwest::{Method, Url};

use super::request::{Limits, Request};
use super::transport::Transport;

/// Deadline of the logout, which no one depends on.
const LOGOUT: Duration = Duration::from_secs(5);

/// Ends the session of `cookie` at the server `origin`.
pub(super) fn log_out(transport: &Transport, origin: &Url, cookie: &HeaderValue) {
    let closing = AtomicBool::new(false);
    let limits = Limits {
        deadline: Instant::now() + LOGOUT,
        closing: &closing,
    };
    let host = origin.host_str().unwrap_or_default();
    // The name of the session manager: that of a vCenter, then that of an ESXi.
    let mut managers = ["SessionManager", "ha-sessionmgr"].iter();
    match managers.any(|manager| ask(transport, origin, cookie, manager, limits)) {
        true => tracing::debug!("{host}: logged out"),
        false => tracing::info!("{host}: the logout failed: the session ends by itself after some time"),
    }
}

fn ask(transport: &Transport, origin: &Url, cookie: &HeaderValue, manager: &str, limits: Limits<'_>) -> bool {
    let body = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?><soapenv:Envelope \
             xmlns:soapenv=\"http://schemas.xmlsoap.org/soap/envelope/\"><soapenv:Body><Logout xmlns=\"urn:vim25\">\
             <_this type=\"SessionManager\">{manager}</_this></Logout></soapenv:Body></soapenv:Envelope>"
    );
    let mut url = origin.clone();
    url.set_path("/sdk");
    let mut headers = HeaderMap::new();
    headers.insert(COOKIE, cookie.clone());
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/xml; charset=utf-8"));
    headers.insert("SOAPAction", HeaderValue::from_static("urn:vim25"));
    let request = Request {
        method: Method::POST,
        url: &url,
        headers,
        body: body.as_bytes(),
    };
    let answer = transport.send(&request, limits);
    answer.is_ok_and(|answer| answer.status.is_success())
}
