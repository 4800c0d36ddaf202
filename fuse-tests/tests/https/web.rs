//! Any server with ranges: nginx with TLS.

use std::fs;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use fuse_tests::harness::{
    Cmd, NOBODY, Scratch, assert_same, assert_same_at_random, cached_bytes, need_qemu, need_root, poll_until, program,
    qemu_img, raw_with_islands, read_range,
};

use crate::server::{SOON, Server, USER, need_nginx, password_file};

const MIB: u64 = 1 << 20;

fn convert(raw: &Path, to: &Path, subformat: &str) {
    let option = format!("subformat={subformat}");
    let words = ["convert", "-O", "vmdk", "-o", &option];
    let paths = [raw.to_str().unwrap(), to.to_str().unwrap()];
    qemu_img(words.iter().copied().chain(paths));
}

#[test]
fn all_kinds_are_read_through_a_login_and_a_trusted_certificate() {
    if !need_nginx() || !need_qemu() {
        return;
    }
    let scratch = Scratch::new();
    let (dir, raw) = (scratch.mkdir("www/private"), scratch.path("disk.raw"));
    raw_with_islands(&raw, 16 * MIB + 512, 11);
    fs::copy(&raw, dir.join("a b.img")).unwrap();
    for kind in ["monolithicSparse", "streamOptimized", "twoGbMaxExtentSparse"] {
        convert(&raw, &dir.join(format!("{kind}.vmdk")), kind);
    }
    let server = Server::nginx(&scratch, &scratch.path("www"), "");
    let names = [
        "a%20b.img",
        "monolithicSparse.vmdk",
        "streamOptimized.vmdk",
        "twoGbMaxExtentSparse.vmdk",
    ];
    let mut mount = scratch
        .mount()
        .arg(format!("user={USER}"))
        .arg(password_file(&scratch))
        .arg(format!("cainfo={}", server.certificate.display()));
    for name in names {
        mount = mount.arg(server.url(&format!("private/{name}")));
    }
    // A package, read in place.
    let ova = dir.join("vm.ova");
    let tar = Cmd::new("tar").arg("-cf").arg(&ova).arg("-C").arg(&dir);
    tar.arg("streamOptimized.vmdk").run().ok();
    mount = mount.arg(server.url("private/vm.ova")).arg("name=ova.raw");
    let mount = mount.start();
    assert_same(&mount.file("ova.raw"), &raw);
    for name in [
        "a b.raw",
        "monolithicSparse.raw",
        "streamOptimized.raw",
        "twoGbMaxExtentSparse.raw",
    ] {
        assert_same(&mount.file(name), &raw);
        assert_same_at_random(&mount.file(name), &raw, 1, 50);
    }
    mount.unmount();
    let info = scratch
        .vmdkfuse()
        .args(["--info", &server.url("private/monolithicSparse.vmdk"), &server.pin()])
        .args([format!("user={USER}"), password_file(&scratch)])
        .run()
        .ok();
    assert!(
        info.stdout.contains("monolithicSparse") && info.stdout.contains("writable  no"),
        "{info}"
    );
    let check = scratch
        .vmdkfuse()
        .args(["--check", &server.url("private/monolithicSparse.vmdk"), &server.pin()])
        .args([format!("user={USER}"), password_file(&scratch)])
        .run();
    assert_eq!(check.ended.code, Some(0), "{check}");
}

#[test]
fn a_sparse_disk_costs_its_data_and_a_second_read_costs_nothing() {
    if !need_nginx() || !need_qemu() {
        return;
    }
    let scratch = Scratch::new();
    let (dir, raw) = (scratch.mkdir("www"), scratch.path("disk.raw"));
    raw_with_islands(&raw, 64 * MIB, 12);
    convert(&raw, &dir.join("s.vmdk"), "monolithicSparse");
    let stored = fs::metadata(dir.join("s.vmdk")).unwrap().len();
    let server = Server::nginx(&scratch, &dir, "");
    let mount = scratch
        .mount()
        .arg(server.url("s.vmdk"))
        .arg(server.pin())
        .arg("cache-size=128M")
        .arg("cache=none")
        .start();
    let disk = mount.file("s.raw");
    assert_same(&disk, &raw);
    let sent = server.sent();
    assert!(sent <= stored + stored / 50, "{sent} bytes for a file of {stored}");
    let requests = server.log().len();
    assert_same(&disk, &raw);
    assert_eq!(server.log().len(), requests, "what is cached is not asked for again");
    mount.unmount();
}

#[test]
fn the_kernel_keeps_the_pages_of_a_web_disk_from_one_open_to_the_next() {
    if !need_nginx() {
        return;
    }
    let scratch = Scratch::new();
    let dir = scratch.mkdir("www");
    raw_with_islands(&dir.join("d.img"), 4 * MIB, 15);
    let cow = format!("cow={}", scratch.path("o.vmdk").display());
    // With validators of the server, and without them: then a change of the file would go unnoticed.
    for (extra, kept) in [("", 4 * MIB), ("etag off; add_header Last-Modified \"\";", 0)] {
        let server = Server::nginx(&scratch, &dir, extra);
        for overlay in [None, Some(&cow)] {
            let command = scratch.mount().arg(server.url("d.img")).arg(server.pin());
            let mount = command.args(overlay).start();
            let disk = mount.file("d.raw");
            assert_same(&disk, &dir.join("d.img"));
            assert_eq!(cached_bytes(&disk), kept, "{extra} {overlay:?}");
            mount.unmount();
        }
        fs::remove_file(scratch.path("o.vmdk")).unwrap();
    }
}

/// A window of the kernel as large as that of the daemon would take the connections from the daemon's long requests.
#[test]
fn the_kernel_reads_ahead_little_whatever_the_daemon_does() {
    if !need_nginx() || !need_root() {
        return;
    }
    let scratch = Scratch::new();
    raw_with_islands(&scratch.mkdir("www").join("d.img"), 4 * MIB, 5);
    let server = Server::nginx(&scratch, &scratch.path("www"), "");
    for (keys, kib) in [
        (&[][..], "2048"),
        (&["readahead=64M", "cache-size=128M"], "2048"),
        (&["readahead=0"], "0"),
    ] {
        let mount = scratch
            .mount()
            .args(keys)
            .arg(format!("cainfo={}", server.certificate.display()))
            .arg(server.url("d.img"))
            .start();
        let device = fs::metadata(mount.point()).unwrap().dev();
        let (major, minor) = (libc::major(device), libc::minor(device));
        let window = fs::read_to_string(format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb")).unwrap();
        assert_eq!(window.trim(), kib, "{keys:?}");
        mount.unmount();
    }
}

#[test]
fn writes_go_to_an_overlay_and_the_server_is_only_read() {
    if !need_nginx() {
        return;
    }
    let scratch = Scratch::new();
    let dir = scratch.mkdir("www");
    raw_with_islands(&dir.join("d.img"), 4 * MIB, 13);
    let original = fs::read(dir.join("d.img")).unwrap();
    let server = Server::nginx(&scratch, &dir, "");
    let cow = format!("cow={}", scratch.path("o.vmdk").display());
    let with = || scratch.mount().arg(server.url("d.img")).arg(server.pin()).arg(&cow);
    let mut expected = original.clone();
    expected[5000..9000].fill(0x5a);
    for _ in 0..2 {
        let mount = with().start();
        let disk = mount.file("d.raw");
        let file = fs::OpenOptions::new().write(true).open(&disk).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &expected[5000..9000], 5000).unwrap();
        file.sync_all().unwrap();
        drop(file);
        assert_eq!(fs::read(&disk).unwrap(), expected);
        mount.unmount();
    }
    assert_eq!(fs::read(dir.join("d.img")).unwrap(), original);
    assert_eq!(server.count(&["GET"]), server.log().len());
}

#[test]
fn a_file_that_changes_on_the_server_gives_an_error_and_never_mixed_content() {
    if !need_nginx() {
        return;
    }
    let scratch = Scratch::new();
    let dir = scratch.mkdir("www");
    fs::write(dir.join("d.img"), vec![1; 8 << 20]).unwrap();
    let server = Server::nginx(&scratch, &dir, "");
    let log = scratch.path("log");
    let mount = scratch
        .mount()
        .arg(server.url("d.img"))
        .arg(server.pin())
        .arg("readahead=0")
        .arg("cache=none")
        .arg(format!("--log-file={}", log.display()))
        .start();
    let disk = mount.file("d.raw");
    assert_eq!(read_range(&disk, 0, 4096), vec![1; 4096]);
    fs::write(dir.join("new"), vec![2; 8 << 20]).unwrap();
    // The server's ETag is made of the time in seconds and the length.
    let later = std::time::SystemTime::now() + std::time::Duration::from_secs(5);
    let file = fs::File::options().write(true).open(dir.join("new")).unwrap();
    file.set_modified(later).unwrap();
    fs::rename(dir.join("new"), dir.join("d.img")).unwrap();
    let mut file = fs::File::open(&disk).unwrap();
    std::io::Seek::seek(&mut file, std::io::SeekFrom::Start(4 << 20)).unwrap();
    let error = file.read(&mut [0; 4096]).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
    let logged = || fs::read_to_string(&log).unwrap_or_default();
    let reason = || logged().contains("was changed on the server");
    assert!(poll_until(SOON, reason), "{}", logged());
    // The blocks in memory still hold the content at the open.
    assert_eq!(read_range(&disk, 0, 4096), vec![1; 4096]);
    drop(file);
    mount.unmount();
}

#[test]
fn connections_that_the_server_closes_and_limits_do_not_disturb_reading() {
    if !need_nginx() {
        return;
    }
    let scratch = Scratch::new();
    let dir = scratch.mkdir("www");
    raw_with_islands(&dir.join("d.img"), 24 * MIB, 14);
    let server = Server::nginx(&scratch, &dir, "keepalive_requests 3; keepalive_timeout 1;");
    let mount = scratch
        .mount()
        .arg(server.url("d.img"))
        .arg(server.pin())
        .arg("connections=3")
        .start();
    assert_same(&mount.file("d.raw"), &dir.join("d.img"));
    assert_same_at_random(&mount.file("d.raw"), &dir.join("d.img"), 2, 100);
    mount.unmount();
    let folder = scratch.mount().arg(server.url("")).arg(server.pin()).refused(1);
    folder.error_names(&["403"]);
}

#[test]
fn http_2_is_used_where_it_is_asked_for_and_the_server_has_it() {
    if !need_nginx() {
        return;
    }
    let scratch = Scratch::new();
    let dir = scratch.mkdir("www");
    raw_with_islands(&dir.join("d.img"), 24 * MIB, 15);
    for (lines, version, expected) in [
        ("http2_recv_timeout 30s;", "2", "HTTP/2.0"),
        ("", "2", "HTTP/1.1"),
        ("http2_recv_timeout 30s;", "1.1", "HTTP/1.1"),
    ] {
        let server = Server::nginx_with(&scratch, &dir, lines, lines.starts_with("http2"));
        let mount = scratch
            .mount()
            .arg(server.url("d.img"))
            .arg(server.pin())
            .arg(format!("http-version={version}"))
            .start();
        assert_same(&mount.file("d.raw"), &dir.join("d.img"));
        assert_same_at_random(&mount.file("d.raw"), &dir.join("d.img"), 2, 100);
        mount.unmount();
        let (all, such) = (server.count(&["GET"]), server.count(&["GET", expected]));
        assert!(all > 0 && all == such, "{:?}", server.log());
        std::fs::remove_file(scratch.path("nginx.log")).unwrap();
    }
}

#[test]
fn a_name_can_be_given_another_address_and_requests_further_headers() {
    if !need_nginx() {
        return;
    }
    let scratch = Scratch::new();
    let dir = scratch.mkdir("www");
    fs::write(dir.join("d.img"), vec![3; 65536]).unwrap();
    let guard = "if ($http_x_token != \"a b\") { return 404; }";
    let server = Server::nginx(&scratch, &dir, guard);
    let url = format!("https://no-such-host.example:{}/d.img", server.port);
    let mount = scratch
        .mount()
        .arg(&url)
        .arg(server.pin())
        .arg("resolve=no-such-host.example:127.0.0.1")
        .arg("header=X-Token: a b")
        .start();
    assert_eq!(fs::read(mount.file("d.raw")).unwrap(), vec![3; 65536]);
    let cmdline = fs::read(format!("/proc/{}/cmdline", mount.pid())).unwrap();
    assert!(!String::from_utf8_lossy(&cmdline).contains("X-Token: a b"));
    mount.unmount();
    let missing = scratch.mount().arg(server.url("d.img")).arg(server.pin()).refused(1);
    missing.one_error(1, &["no such file on the server"]);
    let seen = scratch
        .vmdkfuse()
        .args(["--fingerprint", "server=127.0.0.1", &format!("port={}", server.port)])
        .run()
        .ok();
    let digits = |text: &str| text.replace(':', "").to_lowercase();
    assert!(
        digits(&seen.stdout).contains(&format!("sha1={}\n", digits(&server.thumbprint))),
        "{seen}"
    );
    scratch
        .vmdkfuse()
        .args(["--fingerprint", "/a"])
        .run()
        .one_error(2, &["server=HOST"]);
    let refused = scratch
        .vmdkfuse()
        .args(["--fingerprint", "server=127.0.0.1", "port=1"])
        .run();
    refused.one_error(1, &["127.0.0.1:1", "refused"]);
}

/// Program that ends with the test.
struct Child(std::process::Child);

impl Drop for Child {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// "removed from the command line that `ps` shows": also where the process of an ordinary user is not dumpable.
#[test]
fn a_password_disappears_from_the_command_line_of_an_ordinary_user() {
    if !need_root() {
        return;
    }
    // Takes connections and never answers.
    let server = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("url=https://anna:SECRET@{}/x.vmdk", server.local_addr().unwrap());
    let child = Command::new(program())
        .args(["--info", &url])
        .uid(NOBODY.uid)
        .gid(NOBODY.gid)
        .current_dir("/")
        .stderr(Stdio::null())
        .spawn();
    let child = Child(child.unwrap());
    let line = || fs::read(format!("/proc/{}/cmdline", child.0.id())).unwrap_or_default();
    let hidden = || {
        let line = String::from_utf8_lossy(&line()).into_owned();
        line.contains("anna:******@") && !line.contains("SECRET")
    };
    assert!(
        poll_until(Duration::from_secs(60), hidden),
        "{:?}",
        String::from_utf8_lossy(&line())
    );
}
