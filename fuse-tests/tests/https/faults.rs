//! Answers that no real server gives: cut, short, wrong, hostile. No wrong byte is ever returned.

use std::fs;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use fuse_tests::harness::{Scratch, need_fuse, poll_until};

use crate::server::{Ask, Fake, SOON, head_of, send_right};

const LEN: usize = 4 << 20;

fn content() -> Arc<Vec<u8>> {
    Arc::new((0..LEN).map(|n| (n / 7 % 251) as u8).collect())
}

/// Sends `bytes`; the connection then ends.
fn send(stream: &mut std::net::TcpStream, bytes: &[u8]) {
    let _ = stream.write_all(bytes);
}

/// A way to answer wrongly.
type Wrong = fn(&Ask, &[u8], &mut std::net::TcpStream);

/// Answers that may be followed by a right one.
const PASSING: &[(&str, Wrong)] = &[
    ("closed at once", |_, _, _| {}),
    ("cut in the head", |_, _, s| {
        send(s, b"HTTP/1.1 206 Partial Content\r\nContent-Ra");
    }),
    ("cut in the body", |ask, content, s| {
        let (first, last) = ask.range.unwrap();
        send(s, head_of(first, last, LEN).as_bytes());
        send(s, &content[first..first + (last - first) / 2]);
    }),
    ("another range", |ask, content, s| {
        let (first, last) = ask.range.unwrap();
        send(s, head_of(first - 512, last - 512, LEN).as_bytes());
        send(s, &content[first - 512..=last - 512]);
    }),
    ("a shorter range", |ask, content, s| {
        let (first, last) = ask.range.unwrap();
        send(s, head_of(first, last - 1, LEN).as_bytes());
        send(s, &content[first..last]);
    }),
    ("no Content-Range", |ask, content, s| {
        let (first, last) = ask.range.unwrap();
        let head = format!(
            "HTTP/1.1 206 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
            last - first + 1
        );
        send(s, head.as_bytes());
        send(s, &content[first..=last]);
    }),
    ("several ranges", |_, _, s| {
        send(
            s,
            b"HTTP/1.1 206 OK\r\nContent-Type: multipart/byteranges; boundary=x\r\nContent-Length: 1\r\nConnection: close\r\n\r\nx",
        );
    }),
    ("an endless body", |ask, _, s| {
        let (first, last) = ask.range.unwrap();
        let head = format!(
            "HTTP/1.1 206 OK\r\nContent-Range: bytes {first}-{last}/{LEN}\r\nTransfer-Encoding: chunked\r\n\r\n"
        );
        send(s, head.as_bytes());
        let chunk = [b"10000\r\n".as_slice(), &[7; 0x10000], b"\r\n"].concat();
        while s.write_all(&chunk).is_ok() {}
    }),
    ("busy", |_, _, s| {
        send(
            s,
            b"HTTP/1.1 503 Busy\r\nRetry-After: 0\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
        );
    }),
    ("too many requests", |_, _, s| {
        send(
            s,
            b"HTTP/1.1 429 Slow\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
        );
    }),
    ("an internal error", |_, _, s| {
        send(
            s,
            b"HTTP/1.1 500 Oh\r\nContent-Length: 3\r\nConnection: close\r\n\r\nooh",
        );
    }),
];

/// Answers that end the reading at once.
const LASTING: &[(&str, Wrong, &str)] = &[
    (
        "the whole file",
        |_, content, s| {
            let head =
                format!("HTTP/1.1 200 OK\r\nContent-Length: {LEN}\r\nETag: \"one\"\r\nConnection: close\r\n\r\n");
            send(s, head.as_bytes());
            send(s, content);
        },
        "does not send ranges",
    ),
    (
        "another file",
        |ask, content, s| {
            let (first, last) = ask.range.unwrap();
            send(s, head_of(first, last, LEN).replace("\"one\"", "\"two\"").as_bytes());
            send(s, &content[first..=last]);
        },
        "was changed on the server",
    ),
    (
        "another length",
        |ask, content, s| {
            let (first, last) = ask.range.unwrap();
            send(s, head_of(first, last, LEN + 1).as_bytes());
            send(s, &content[first..=last]);
        },
        "was changed on the server",
    ),
    (
        "a shorter file",
        |_, _, s| {
            send(
                s,
                b"HTTP/1.1 416 No\r\nContent-Range: bytes */100\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
            );
        },
        "become shorter",
    ),
    (
        "a page",
        |_, _, s| {
            send(
                s,
                b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 1\r\nConnection: close\r\n\r\n<",
            );
        },
        "a web page",
    ),
    (
        "a redirect to itself",
        |ask, _, s| {
            let head = format!(
                "HTTP/1.1 302 There\r\nLocation: {}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
                ask.path
            );
            send(s, head.as_bytes());
        },
        "redirects",
    ),
    (
        "an encoded body",
        |ask, content, s| {
            let (first, last) = ask.range.unwrap();
            let head = head_of(first, last, LEN).replace("ETag", "Content-Encoding: gzip\r\nETag");
            send(s, head.as_bytes());
            send(s, &content[first..=last]);
        },
        "encoded",
    ),
];

/// Server that answers right for the start of the file, and and of its end, and otherwise `wrong` for as long as `how_often` says.
fn faulty(wrong: Wrong, how_often: Arc<AtomicUsize>) -> Fake {
    let content = content();
    Fake::start(move |ask, stream| {
        let far = ask.range.is_some_and(|(first, _)| (1 << 20..3 << 20).contains(&first));
        let again = |left: usize| left.checked_sub(1);
        if far
            && how_often
                .fetch_update(Ordering::SeqCst, Ordering::SeqCst, again)
                .is_ok()
        {
            return wrong(ask, &content, stream);
        }
        send_right(ask, &content, stream);
    })
}

fn read_far(disk: &PathBuf) -> std::io::Result<Vec<u8>> {
    let mut file = fs::File::open(disk)?;
    file.seek(SeekFrom::Start(2 << 20))?;
    let mut bytes = vec![0; 300_000];
    file.read_exact(&mut bytes).map(|()| bytes)
}

#[test]
fn passing_faults_are_retried_and_the_bytes_are_right() {
    if !need_fuse() {
        return;
    }
    let (scratch, content) = (Scratch::new(), content());
    for (what, wrong) in PASSING {
        let server = faulty(*wrong, Arc::new(AtomicUsize::new(2)));
        let mount = scratch.mount().arg(server.url("d.img")).arg("cache=none").start();
        let read = read_far(&mount.file("d.raw"));
        let read = read.unwrap_or_else(|e| panic!("{what}: {e}"));
        assert!(read == content[2 << 20..(2 << 20) + 300_000], "{what}: wrong bytes");
        mount.unmount();
    }
}

/// Right answers whose bodies end in other ways than after a Content-Length.
const FRAMINGS: &[(&str, Wrong)] = &[
    ("in chunks", |ask, content, s| {
        let (first, last) = ask.range.unwrap();
        let head = format!(
            "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 206 OK\r\nContent-Range: bytes {first}-{last}/{LEN}\r\n\
             Transfer-Encoding: chunked\r\n\r\n"
        );
        send(s, head.as_bytes());
        for chunk in content[first..=last].chunks(10_007) {
            send(s, format!("{:X};x=y\r\n", chunk.len()).as_bytes());
            send(s, chunk);
            send(s, b"\r\n");
        }
        send(s, b"0\r\nExpires: never\r\n\r\n");
    }),
    ("with the connection", |ask, content, s| {
        let (first, last) = ask.range.unwrap();
        let head = format!("HTTP/1.0 206 OK\nContent-Range: bytes {first}-{last}/{LEN}\n\n");
        send(s, head.as_bytes());
        send(s, &content[first..=last]);
    }),
];

#[test]
fn bodies_of_every_framing_are_read() {
    if !need_fuse() {
        return;
    }
    let (scratch, content) = (Scratch::new(), content());
    for (what, answer) in FRAMINGS {
        let how_often = Arc::new(AtomicUsize::new(usize::MAX));
        let server = faulty(*answer, Arc::clone(&how_often));
        let mount = scratch.mount().arg(server.url("d.img")).arg("cache=none").start();
        let read = read_far(&mount.file("d.raw")).unwrap_or_else(|e| panic!("{what}: {e}"));
        assert!(read == content[2 << 20..(2 << 20) + 300_000], "{what}: wrong bytes");
        assert!(how_often.load(Ordering::SeqCst) < usize::MAX, "{what}: was not used");
        mount.unmount();
    }
}

#[test]
fn lasting_faults_are_errors_with_a_reason_and_the_mount_recovers() {
    if !need_fuse() {
        return;
    }
    let (scratch, content) = (Scratch::new(), content());
    for (what, wrong, reason) in LASTING {
        let how_often = Arc::new(AtomicUsize::new(usize::MAX));
        let server = faulty(*wrong, Arc::clone(&how_often));
        let log = scratch.path(format!("log of {what}"));
        let mount = scratch
            .mount()
            .arg(server.url("d.img"))
            .args_for_faults()
            .arg(format!("--log-file={}", log.display()))
            .start();
        let error = read_far(&mount.file("d.raw")).expect_err(what);
        assert_eq!(error.raw_os_error(), Some(libc::EIO), "{what}");
        // The log gets the reason after the reader got its answer.
        let logged = || fs::read_to_string(&log).unwrap_or_default();
        assert!(poll_until(SOON, || logged().contains(reason)), "{what}: {}", logged());
        how_often.store(0, Ordering::SeqCst);
        let read = read_far(&mount.file("d.raw")).unwrap_or_else(|e| panic!("after {what}: {e}"));
        assert!(read == content[2 << 20..(2 << 20) + 300_000], "{what}: wrong bytes");
        mount.unmount();
    }
}

/// Keys that make faults show soon.
trait FaultArgs {
    fn args_for_faults(self) -> Self;
}

impl FaultArgs for fuse_tests::harness::MountCmd<'_> {
    fn args_for_faults(self) -> Self {
        self.arg("cache=none").arg("timeout=6").arg("readahead=0")
    }
}

#[test]
fn a_server_that_stalls_costs_the_deadline_and_unmounting_does_not_wait_for_it() {
    if !need_fuse() {
        return;
    }
    let (scratch, content) = (Scratch::new(), content());
    let stalls = Arc::new(AtomicUsize::new(usize::MAX));
    let wrong: Wrong = |ask, content, stream| {
        let (first, last) = ask.range.unwrap();
        send(stream, head_of(first, last, LEN).as_bytes());
        send(stream, &content[first..first + 10]);
        // Until the client gives up.
        let _ = stream.read(&mut [0; 1]);
    };
    let server = faulty(wrong, Arc::clone(&stalls));
    let mount = scratch.mount().arg(server.url("d.img")).args_for_faults().start();
    let disk = mount.file("d.raw");
    assert_eq!(read_far(&disk).unwrap_err().raw_os_error(), Some(libc::EIO));
    stalls.store(0, Ordering::SeqCst);
    let works = poll_until(SOON, || {
        read_far(&disk).is_ok_and(|read| read == content[2 << 20..(2 << 20) + 300_000])
    });
    assert!(works);
    mount.unmount();
}

#[test]
fn a_server_that_trickles_costs_the_deadline() {
    if !need_fuse() {
        return;
    }
    let scratch = Scratch::new();
    let left = Arc::new(AtomicUsize::new(0));
    let seen = Arc::clone(&left);
    let content = content();
    let server = Fake::start(move |ask, stream| {
        let (first, last) = ask.range.unwrap();
        if !(1 << 20..3 << 20).contains(&first) {
            return send_right(ask, &content, stream);
        }
        send(stream, head_of(first, last, LEN).as_bytes());
        // More often than a silent socket is noticed, and for longer than the test waits.
        for byte in &content[first..first + 500] {
            if stream.write_all(&[*byte]).is_err() {
                seen.fetch_add(1, Ordering::SeqCst);
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(200));
        }
    });
    let mount = scratch.mount().arg(server.url("d.img")).args_for_faults().start();
    let disk = mount.file("d.raw");
    let reader = std::thread::spawn(move || read_far(&disk).unwrap_err().raw_os_error());
    let gives_up = poll_until(SOON, || left.load(Ordering::SeqCst) > 0);
    assert!(gives_up, "the request outlives its deadline");
    assert_eq!(reader.join().unwrap(), Some(libc::EIO));
    mount.unmount();
}

#[test]
fn hostile_servers_are_refused_at_the_start() {
    if !need_fuse() {
        return;
    }
    let scratch = Scratch::new();
    let endless: Wrong = |_, _, stream| {
        send(stream, b"HTTP/1.1 206 OK\r\n");
        while stream
            .write_all(b"X: yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy\r\n")
            .is_ok()
        {}
    };
    let downgrade: Wrong = |_, _, stream| {
        send(
            stream,
            b"HTTP/1.1 302 There\r\nLocation: file:///etc/passwd\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
        );
    };
    let huge: Wrong = |_, _, stream| {
        send(
            stream,
            b"HTTP/1.1 206 OK\r\nContent-Range: bytes 0-18446744073709551614/18446744073709551615\r\n\
              Content-Length: 18446744073709551615\r\nConnection: close\r\n\r\n",
        );
    };
    let endless_file: Wrong = |ask, _, stream| {
        let (first, last) = ask.range.unwrap();
        let head = head_of(first, last, 1).replace("/1\r\n", "/18446744073709551000\r\n");
        send(stream, head.as_bytes());
        send(stream, &vec![0; last - first + 1]);
    };
    for (what, wrong, reason) in [
        ("file", endless_file, "more than any disk"),
        ("headers", endless, ""),
        ("scheme", downgrade, "refused"),
        ("length", huge, ""),
    ] {
        let server = Fake::start(move |ask, stream| wrong(ask, &[], stream));
        let refused = scratch
            .mount()
            .arg(server.url("d.img"))
            .arg("timeout=10")
            .memory(1 << 30)
            .refused(1);
        assert!(refused.stderr.contains(reason), "{what}: {refused}");
    }
}

#[test]
fn credentials_are_not_sent_to_the_host_of_a_redirect() {
    if !need_fuse() {
        return;
    }
    let scratch = Scratch::new();
    let content = content();
    let leaked = Arc::new(AtomicUsize::new(0));
    let (seen, other_content) = (Arc::clone(&leaked), Arc::clone(&content));
    let other = Fake::start(move |ask, stream| {
        let head = ask.head.to_ascii_lowercase();
        if head.contains("authorization:") || head.contains("cookie:") {
            seen.fetch_add(1, Ordering::SeqCst);
        }
        send_right(ask, &other_content, stream);
    });
    let target = other.url("elsewhere.img");
    let server = Fake::start(move |ask, stream| {
        assert!(ask.number < 100, "the target of a redirect is remembered");
        let has_login = ask.head.to_ascii_lowercase().contains("authorization:");
        let head = match has_login {
            true => {
                format!("HTTP/1.1 302 There\r\nLocation: {target}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            }
            false => "HTTP/1.1 401 No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".to_owned(),
        };
        send(stream, head.as_bytes());
    });
    let mount = scratch
        .mount()
        .arg(server.url("d.img"))
        .arg("user=u")
        .arg("password=p")
        .start();
    assert!(fs::read(mount.file("d.raw")).unwrap() == *content);
    mount.unmount();
    assert_eq!(leaked.load(Ordering::SeqCst), 0);
}

#[test]
fn a_proxy_is_used_only_where_it_is_asked_for() {
    if !need_fuse() {
        return;
    }
    let (scratch, content) = (Scratch::new(), content());
    let served = Arc::clone(&content);
    let proxy = Fake::start(
        move |ask, stream| match ask.path == "http://no-such-host.example/d.img" {
            true => send_right(ask, &served, stream),
            false => send(
                stream,
                b"HTTP/1.1 404 No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
            ),
        },
    );
    let address = format!("http://127.0.0.1:{}", proxy.port);
    let mount = scratch
        .mount()
        .arg("http://no-such-host.example/d.img")
        .arg(format!("proxy={address}"))
        .start();
    assert!(fs::read(mount.file("d.raw")).unwrap() == *content);
    mount.unmount();
    let direct = Fake::start(move |ask, stream| send_right(ask, &content, stream));
    let mount = scratch
        .mount()
        .arg(direct.url("d.img"))
        .env("http_proxy", "http://127.0.0.1:1")
        .env("ALL_PROXY", "http://127.0.0.1:1")
        .start();
    mount.unmount();
}
