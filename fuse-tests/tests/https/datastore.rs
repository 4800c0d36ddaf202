//! Datastores of a simulated vCenter and ESXi: chains, login, sessions, locks, secrets.

use std::fs;
use std::path::Path;

use fuse_tests::harness::{
    Cmd, MountCmd, Scratch, assert_same, assert_same_at_random, need, need_qemu, poll_until, qemu_img,
    raw_with_islands, read_range,
};

use crate::server::{PASSWORD, SOON, Server, USER, need_vsim, password_file};

const MIB: u64 = 1 << 20;

/// Creates a flat base and two snapshots over it in `dir`, and the raw content of the newest in `expected`.
pub(crate) fn chain(scratch: &Scratch, dir: &Path, expected: &Path) {
    let raw = scratch.path("base.raw");
    raw_with_islands(&raw, 24 * MIB, 7);
    let path = |name: &str| dir.join(name).to_str().unwrap().to_owned();
    let flat = [
        "convert",
        "-O",
        "vmdk",
        "-o",
        "subformat=monolithicFlat",
        raw.to_str().unwrap(),
    ];
    let base = path("bäse +1.vmdk");
    qemu_img(flat.iter().copied().chain([&*base]));
    let (one, two) = (path("snap 1.vmdk"), path("snap [2].vmdk"));
    let links = [
        (&one, "bäse +1.vmdk", "write -P 0x11 3M 300k"),
        (&two, "snap 1.vmdk", "write -P 0x22 9M 1M"),
    ];
    for (new, below, write) in links {
        let words = ["create", "-q", "-f", "vmdk", "-F", "vmdk", "-b", below, new];
        Cmd::new("qemu-img").args(words).dir(dir).run().ok();
        Cmd::new("qemu-io")
            .args(["-f", "vmdk", "-c", write, new])
            .dir(dir)
            .run()
            .ok();
    }
    qemu_img(["convert", "-f", "vmdk", "-O", "raw", &two, expected.to_str().unwrap()]);
}

/// Returns a mount of a disk in the datastore of `server`, logged in.
fn mount<'s>(scratch: &'s Scratch, server: &Server, path: &str) -> MountCmd<'s> {
    bare_mount(scratch, server, path)
        .arg(format!("user={USER}"))
        .arg(password_file(scratch))
}

fn bare_mount<'s>(scratch: &'s Scratch, server: &Server, path: &str) -> MountCmd<'s> {
    let mount = scratch
        .mount()
        .arg("server=127.0.0.1")
        .arg(format!("port={}", server.port));
    mount
        .arg("datacenter=DC0")
        .arg(server.pin())
        .arg(format!("file=[LocalDS_0] {path}"))
}

#[test]
fn a_remote_chain_of_three_links_equals_the_local_one() {
    if !need_vsim() || !need_qemu() {
        return;
    }
    let scratch = Scratch::new();
    let (store, expected) = (scratch.mkdir("ds/vm a+b [1] ü"), scratch.path("expected.raw"));
    chain(&scratch, &store, &expected);
    let server = Server::vsim(&scratch, &scratch.path("ds"), &[]);
    let mount = mount(&scratch, &server, "vm a+b [1] ü/snap [2].vmdk").start();
    let disk = mount.file("snap [2].raw");
    assert_same(&disk, &expected);
    assert_same_at_random(&disk, &expected, 3, 100);
    assert_eq!(fs::metadata(&disk).unwrap().permissions().mode_bits(), 0o444);
    mount.unmount();
    assert_eq!(server.count(&["auth=true"]), 1, "one login: {:#?}", server.log());
    assert_eq!(server.count(&["LOGOUT ended=true"]), 1, "a logout at the end");
    assert_eq!(server.count(&["status=401"]), 0);
}

/// Permission bits of a file.
trait ModeBits {
    fn mode_bits(&self) -> u32;
}

impl ModeBits for fs::Permissions {
    fn mode_bits(&self) -> u32 {
        std::os::unix::fs::PermissionsExt::mode(self) & 0o777
    }
}

#[test]
fn an_esxi_needs_no_datacenter_and_a_whole_address_is_understood() {
    if !need_vsim() {
        return;
    }
    let scratch = Scratch::new();
    let dir = scratch.mkdir("ds/vm");
    let content: Vec<u8> = (0..MIB).map(|n| (n / 512) as u8).collect();
    fs::write(dir.join("x-flat.vmdk"), &content).unwrap();
    let server = Server::vsim(&scratch, &scratch.path("ds"), &["-esx"]);
    let mount = scratch
        .mount()
        .args(server.login(&scratch))
        .arg("file=[LocalDS_0] vm/x-flat.vmdk")
        .start();
    // The data of a VMDK in a datastore is raw.
    assert_eq!(read_range(&mount.file("x-flat.raw"), 0, MIB as usize), content);
    mount.unmount();
    // As an article has it: user and password in the address, of which nothing may show afterwards.
    let secret = PASSWORD.replace('%', "%25").replace('@', "%40");
    let url = format!(
        "https://{USER}:{secret}@127.0.0.1:{}/folder/vm/x-flat.vmdk?dcPath=ha%2ddatacenter&dsName=LocalDS_0",
        server.port
    );
    let log = scratch.path("log");
    let mount = scratch
        .mount()
        .arg(format!("url={url}"))
        .arg(server.pin())
        .arg("-vvv")
        .arg(format!("--log-file={}", log.display()))
        .start();
    assert_eq!(mount.names(), ["x-flat.raw"]);
    assert_eq!(read_range(&mount.file("x-flat.raw"), 4096, 4096), content[4096..8192]);
    let cmdline = fs::read(format!("/proc/{}/cmdline", mount.pid())).unwrap();
    let shown = [
        fs::read_to_string(&log).unwrap(),
        String::from_utf8_lossy(&cmdline).into_owned(),
        fs::read_to_string("/proc/self/mountinfo").unwrap(),
        fs::read_to_string(format!("/proc/{}/environ", mount.pid())).unwrap(),
    ];
    mount.unmount();
    let basic = "cm9vdDpzZSVjcitldEAx";
    for text in shown.iter().chain([&fs::read_to_string(&log).unwrap()]) {
        for secret in [PASSWORD, &secret, basic, "vmware_soap_session=\""] {
            assert!(!text.contains(secret), "{secret} shows in {text}");
        }
    }
    assert!(shown[0].contains("in an address"), "no warning: {}", shown[0]);
}

#[test]
fn names_are_decoded_once_or_twice_as_the_server_does() {
    if !need_vsim() {
        return;
    }
    for decoding in [&["-double"][..], &[]] {
        let scratch = Scratch::new();
        let dir = scratch.mkdir("ds/vm %41 + [1]");
        let content: Vec<u8> = (0..MIB).map(|n| (n / 512) as u8).collect();
        fs::write(dir.join("x %2541-flat.vmdk"), &content).unwrap();
        let words = [&["-name", "My DS %41+(1)"], decoding].concat();
        let server = Server::vsim(&scratch, &scratch.path("ds"), &words);
        let mount = scratch
            .mount()
            .args(server.login(&scratch))
            .arg("datacenter=DC0")
            .arg("file=[My DS %41+(1)] vm %41 + [1]/x %2541-flat.vmdk")
            .start();
        assert_eq!(
            read_range(&mount.file("x %2541-flat.raw"), 0, MIB as usize),
            content,
            "{decoding:?}"
        );
        mount.unmount();
        let wrong = server.log().iter().filter(|line| !line.contains("status=206")).count();
        assert!(wrong <= 2, "the form that worked is remembered: {:#?}", server.log());
    }
}

#[test]
fn a_script_logs_in_and_is_run_again_when_its_cookie_has_expired() {
    if !need_vsim() || !need("curl") {
        return;
    }
    let scratch = Scratch::new();
    let dir = scratch.mkdir("ds/vm");
    let content: Vec<u8> = (0..8 * MIB).map(|n| (n / 512) as u8).collect();
    fs::write(dir.join("x-flat.vmdk"), &content).unwrap();
    let server = Server::vsim(&scratch, &scratch.path("ds"), &["-session", "2s"]);
    let (runs, password) = (scratch.path("runs"), scratch.path("password of the script"));
    fs::write(&password, format!("user = \"{USER}:{PASSWORD}\"\n")).unwrap();
    let script = format!(
        "echo \"$iteration $url\" >> {}; curl -sk -K '{}' -r 0-0 -D - -o /dev/null \"$url\" | \
         sed -n 's/^[Ss]et-[Cc]ookie: \\([^;]*\\);.*/\\1/p'",
        runs.display(),
        password.display()
    );
    let mount = bare_mount(&scratch, &server, "vm/x-flat.vmdk")
        .arg(format!("cookie-script={script}"))
        .arg("cache-size=1M")
        .arg("cache=none")
        .start();
    let disk = mount.file("x-flat.raw");
    // Reads until the session has ended at least once.
    let ended = poll_until(SOON, || {
        assert_eq!(read_range(&disk, 0, content.len()), content);
        fs::read_to_string(&runs).unwrap().lines().count() > 1
    });
    assert!(ended);
    mount.unmount();
    let runs = fs::read_to_string(&runs).unwrap();
    let url = format!(
        "https://127.0.0.1:{}/folder/vm/x-flat.vmdk?dcPath=DC0&dsName=LocalDS_0",
        server.port
    );
    for (number, line) in runs.lines().enumerate() {
        assert_eq!(line, format!("{number} {url}"));
    }
    assert_eq!(server.count(&["auth=true"]), runs.lines().count(), "only curl logs in");
    assert_eq!(server.count(&["LOGOUT"]), 0);
    let failing = bare_mount(&scratch, &server, "vm/x-flat.vmdk").arg("cookie-script=exit 7");
    failing.refused(1).error_names(&["cookie-script=", "exit status: 7"]);
}

#[test]
fn remote_disks_are_described_checked_and_mapped() {
    if !need_vsim() || !need_qemu() {
        return;
    }
    let scratch = Scratch::new();
    let (store, raw) = (scratch.mkdir("ds/vm"), scratch.path("x.raw"));
    raw_with_islands(&raw, 24 * MIB, 8);
    let local = store.join("snap [2].vmdk");
    let words = ["convert", "-O", "vmdk", raw.to_str().unwrap(), local.to_str().unwrap()];
    qemu_img(words);
    let server = Server::vsim(&scratch, &scratch.path("ds"), &[]);
    let mut remote = server.login(&scratch);
    remote.extend(["datacenter=DC0", "file=[LocalDS_0] vm/snap [2].vmdk"].map(str::to_owned));
    let json = |action: &str, words: &[String]| {
        let out = scratch
            .vmdkfuse()
            .args([action, "--json"])
            .args(words)
            .run()
            .ok()
            .stdout;
        serde_json::from_str::<serde_json::Value>(&out).unwrap()
    };
    let file = [format!("file={}", local.display())];
    let (there, here) = (json("--map", &remote), json("--map", &file));
    assert!(
        there[0]["map"].as_array().is_some_and(|ranges| ranges.len() > 1),
        "{there}"
    );
    assert_eq!(there, here);
    let (there, here) = (json("--check", &remote), json("--check", &file));
    assert_eq!(there[0]["status"], "clean");
    assert_eq!(there, here);
    let (there, here) = (json("--info", &remote), json("--info", &file));
    assert_eq!(there[0]["size"], here[0]["size"]);
    assert_eq!(there[0]["writable"], false);
    assert!(
        there[0]["file"]
            .as_str()
            .unwrap()
            .contains("[LocalDS_0] vm/snap [2].vmdk")
    );
}

#[test]
fn a_session_that_ends_in_the_middle_of_reading_is_replaced() {
    if !need_vsim() {
        return;
    }
    let scratch = Scratch::new();
    let dir = scratch.mkdir("ds/vm");
    raw_with_islands(&dir.join("x-flat.vmdk"), 64 * MIB, 5);
    let server = Server::vsim(&scratch, &scratch.path("ds"), &["-session", "100ms"]);
    let mount = mount(&scratch, &server, "vm/x-flat.vmdk").arg("cache-size=1M").start();
    let disk = mount.file("x-flat.raw");
    let mut rounds = 0;
    let replaced = poll_until(SOON, || {
        rounds += 1;
        assert_same_at_random(&disk, &dir.join("x-flat.vmdk"), rounds, 20);
        server.count(&["auth=true", "status=206"]) >= 3
    });
    assert!(replaced, "{:#?}", server.log().last());
    mount.unmount();
}

#[test]
fn a_locked_file_a_wrong_password_and_another_certificate_are_named() {
    if !need_vsim() {
        return;
    }
    let scratch = Scratch::new();
    let dir = scratch.mkdir("ds/vm");
    fs::write(dir.join("locked.vmdk"), "# Disk DescriptorFile\n").unwrap();
    let server = Server::vsim(&scratch, &scratch.path("ds"), &[]);
    let locked = mount(&scratch, &server, "vm/locked.vmdk").refused(1);
    locked.one_error(1, &["[LocalDS_0] vm/locked.vmdk", "is locked by a running VM"]);
    let missing = mount(&scratch, &server, "vm/none.vmdk").refused(1);
    missing.one_error(1, &["[LocalDS_0] vm/none.vmdk", "no such file"]);
    let before = server.log().len();
    let wrong = bare_mount(&scratch, &server, "vm/x.vmdk")
        .arg(format!("user={USER}"))
        .arg("password=wrong-one")
        .refused(1);
    assert!(wrong.stderr.contains("refused the login of user \"root\""), "{wrong}");
    assert!(!wrong.stderr.contains("wrong-one"), "{wrong}");
    assert_eq!(server.log().len(), before + 1, "a wrong password is sent once");
    let anonymous = bare_mount(&scratch, &server, "vm/x.vmdk").refused(1);
    anonymous.one_error(1, &["add user= and password="]);
    let before = server.log().len();
    let other = "00:".repeat(19) + "00";
    let pinned = scratch
        .mount()
        .arg(server.url("folder/vm/x.vmdk?dsName=LocalDS_0&dcPath=DC0"))
        .arg(format!("user={USER}"))
        .arg(password_file(&scratch))
        .arg(format!("thumbprint={other}"))
        .refused(1);
    let pinned = pinned.one_error(1, &["another thumbprint", &other]);
    let seen = pinned.stderr.replace(':', "").to_lowercase();
    assert!(
        seen.contains(&server.thumbprint.replace(':', "").to_lowercase()),
        "{pinned}"
    );
    assert_eq!(
        server.log().len(),
        before,
        "nothing is sent to a server that is not the right one"
    );
    let untrusted = scratch.mount().arg(server.url("folder/x.vmdk")).refused(1);
    untrusted.one_error(1, &["not trusted", "add thumbprint="]);
}

#[test]
fn a_limit_of_requests_slows_reading_down_without_an_error() {
    if !need_vsim() {
        return;
    }
    let scratch = Scratch::new();
    let dir = scratch.mkdir("ds/vm");
    raw_with_islands(&dir.join("x-flat.vmdk"), 24 * MIB, 6);
    let server = Server::vsim(&scratch, &scratch.path("ds"), &["-max", "2"]);
    let mount = mount(&scratch, &server, "vm/x-flat.vmdk").start();
    assert_same(&mount.file("x-flat.raw"), &dir.join("x-flat.vmdk"));
    mount.unmount();
    assert_eq!(server.count(&["auth=true"]), 1, "a limit is no reason to log in again");
}
