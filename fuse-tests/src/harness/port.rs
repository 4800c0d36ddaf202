//! TCP ports of this machine for the servers of tests.

use std::net::TcpListener;
use std::sync::atomic::{AtomicU32, Ordering};

/// First port that is returned, and their number. They lie below those that the kernel gives to sockets without one (32768 to
/// 60999): such a socket of another test or process cannot take a port before its server has bound it.
const PORTS: (u32, u32) = (20_000, 12_000);

/// Ports that one test process takes at most, as a rule: the next process starts behind them.
const OF_PROCESS: u32 = 64;

/// Returns a port that no process listens on. Each call returns another one.
pub fn free_port() -> u16 {
    static CALLS: AtomicU32 = AtomicU32::new(0);
    let (first, number) = PORTS;
    loop {
        let call = CALLS.fetch_add(1, Ordering::Relaxed);
        assert!(call < number, "no port is free");
        let port = first + (std::process::id() % number * OF_PROCESS + call) % number;
        let port = u16::try_from(port).expect("a port");
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}
