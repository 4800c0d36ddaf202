//! Servers whose handshake has no end: bounded in memory and in time, and reported in one sentence.

use std::io::{Read, Result, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use fuse_tests::harness::{Cmd, Outcome, program};

/// Limit of the address space: far above what the program needs, and far below what a server could send meanwhile.
const MEMORY: u64 = 1 << 30;

const OPTION_LIST: u32 = 3;
const OPTION_INFO: u32 = 6;
const OPTION_GO: u32 = 7;
const OPTION_STRUCTURED: u32 = 8;
const OPTION_LIST_CONTEXTS: u32 = 9;
const OPTION_SET_CONTEXT: u32 = 10;

const REPLY_ACK: u32 = 1;
const REPLY_SERVER: u32 = 2;
const REPLY_INFO: u32 = 3;
const REPLY_CONTEXT: u32 = 4;
const REPLY_UNSUPPORTED: u32 = 0x8000_0001;

/// Returns one reply to an option.
fn reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let mut reply = 0x0003_e889_0455_65a9u64.to_be_bytes().to_vec();
    for number in [option, kind, data.len() as u32] {
        reply.extend(number.to_be_bytes());
    }
    reply.extend(data);
    reply
}

/// Reply that a server sends without end, instead of the answer to `option`.
#[derive(Clone)]
struct Endless {
    option: u32,
    kind: u32,
    data: Vec<u8>,
}

impl Endless {
    /// Answers one client. Ends with an error when the client closes the connection.
    fn serve(&self, mut stream: TcpStream) -> Result<()> {
        stream.write_all(b"NBDMAGICIHAVEOPT\x00\x03")?;
        stream.read_exact(&mut [0; 4])?;
        loop {
            let mut head = [0; 16];
            stream.read_exact(&mut head)?;
            let number = |at: usize| u32::from_be_bytes(head[at..at + 4].try_into().unwrap());
            let option = number(8);
            stream.read_exact(&mut vec![0; number(12) as usize])?;
            if option == self.option {
                let replies = reply(option, self.kind, &self.data).repeat(1 + 40_000 / (self.data.len() + 20));
                loop {
                    stream.write_all(&replies)?;
                }
            }
            match option {
                OPTION_LIST => stream.write_all(&reply(option, REPLY_SERVER, b"\0\0\0\x01a"))?,
                OPTION_INFO | OPTION_GO => {
                    let export = [&[0, 0][..], &(1u64 << 20).to_be_bytes(), &[0, 1]].concat();
                    stream.write_all(&reply(option, REPLY_INFO, &export))?;
                }
                OPTION_STRUCTURED | OPTION_LIST_CONTEXTS | OPTION_SET_CONTEXT => {}
                _ => {
                    stream.write_all(&reply(option, REPLY_UNSUPPORTED, &[]))?;
                    continue;
                }
            }
            stream.write_all(&reply(option, REPLY_ACK, &[]))?;
        }
    }

    /// Runs the program against such a server.
    fn run(&self, words: &[&str]) -> Outcome {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let endless = self.clone();
        // The thread ends with the test process.
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let endless = endless.clone();
                thread::spawn(move || endless.serve(stream));
            }
        });
        Cmd::new(program())
            .args(words)
            .arg(format!("nbd://127.0.0.1:{port}"))
            .arg("timeout=50")
            .memory(MEMORY)
            .deadline(Duration::from_secs(120))
            .run()
    }
}

fn endless(option: u32, kind: u32, data: Vec<u8>) -> Endless {
    Endless { option, kind, data }
}

#[test]
fn replies_without_end_are_an_error_before_they_take_memory_or_time() {
    let context = |name: usize| [&[0, 0, 0, 1][..], &vec![b'c'; name]].concat();
    let export = |name: usize| [&(name as u32).to_be_bytes()[..], &vec![b'e'; name]].concat();
    let description = [&[0, 2][..], &[b'd'; 4000]].concat();
    for (server, words) in [
        (endless(OPTION_SET_CONTEXT, REPLY_CONTEXT, context(2000)), "--info"),
        (endless(OPTION_SET_CONTEXT, REPLY_CONTEXT, context(1)), "--map"),
        (endless(OPTION_INFO, REPLY_INFO, description.clone()), "--info"),
        (endless(OPTION_GO, REPLY_INFO, description), "--map"),
        (endless(OPTION_LIST, REPLY_SERVER, export(4000)), "--list"),
        (endless(OPTION_LIST, REPLY_SERVER, export(1)), "--list"),
    ] {
        server.run(&[words]).one_error(1, &["127.0.0.1", "has no end"]);
    }
}

#[test]
fn a_list_of_contexts_without_end_leaves_the_export_without_contexts() {
    let context = [&[0, 0, 0, 1][..], &[b'c'; 2000]].concat();
    let server = endless(OPTION_LIST_CONTEXTS, REPLY_CONTEXT, context);
    let output = server.run(&["--info"]).ok();
    assert!(!output.stdout.contains("cccc"), "{}", output.stdout);
}

#[test]
fn payloads_without_end_are_cut_off() {
    // Skipped by libnbd, since it is too long: one transition for 16 MiB.
    let server = endless(OPTION_GO, REPLY_INFO, vec![0xff; 16 << 20]);
    server.run(&["--map", "--json"]).expect_code(1);
}
