use std::fs;
use std::io::Write as _;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::symlink;
use std::path::PathBuf;

use tempfile::TempDir;

use super::super::outcome::Parsed;
use super::super::parse;
use super::super::test_args::{config_of, mount_of};
use super::*;
use crate::config::{
    Action, Config, Format, HttpsAddress, LocalConfig, MountConfig, NbdAddress, Overlay, PageCache, SourceConfig,
    SourceSettings,
};

/// Creates a folder with `vms.toml` and a mount point `mnt`.
fn folder(text: impl AsRef<[u8]>) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("vms.toml"), text).unwrap();
    fs::create_dir(dir.path().join("mnt")).unwrap();
    dir
}

fn run_in(dir: &TempDir, more: &[&str]) -> Result<Config, String> {
    let (file, mnt) = (dir.path().join("vms.toml"), dir.path().join("mnt"));
    let args = [
        OsStr::new("vmdkfuse"),
        OsStr::new("--config"),
        file.as_os_str(),
        mnt.as_os_str(),
    ];
    let args = args.into_iter().chain(more.iter().map(OsStr::new)).map(OsStr::to_owned);
    config_of(parse(args))
}

fn mount(text: &str, more: &[&str]) -> MountConfig {
    mount_of(run_in(&folder(text), more).unwrap())
}

/// Returns the error for the text of a file, without the folder in the file's path.
fn error(text: impl AsRef<[u8]>) -> String {
    let dir = folder(text);
    let error = run_in(&dir, &[]).unwrap_err();
    assert!(!error.contains('\n'), "{error}");
    error.replace(&format!("{}/", dir.path().display()), "")
}

fn local(mount: &MountConfig, disk: usize) -> &LocalConfig {
    mount.disks[disk].source.local().unwrap()
}

#[test]
fn a_file_is_equivalent_to_a_command_line() {
    let dir = folder(
        "cache = \"none\"\ncache-size = \"64M\"\nreadahead = 1_048_576\nreadonly = true\nallow-dir = [\"/a\", \"b\"]\n\
         [[disk]]\nname = \"n a=m,e\"\nfile = \"sub/x.vmdk\"\nformat = \"raw\"\nallow-dir = \"/c\"\ndegraded = \"cid\"\n\
         [[disk]]\nfile = '/abs/y\\z=1, 2.img'\nreadonly = false\nlock = \"off\"\ncache-size = 0x1000\nbackend = 'native'\n",
    );
    let (here, mnt) = (dir.path().display(), dir.path().join("mnt"));
    let mut words: Vec<OsString> = ["vmdkfuse", mnt.to_str().unwrap()].map(OsString::from).to_vec();
    let equivalent = format!(
        "cache=none|cache-size=64M|readahead=1048576|readonly=true|allow-dir=/a|allow-dir={here}/b|\
         file={here}/sub/x.vmdk|name=n a=m,e|format=raw|allow-dir=/c|degraded=cid|\
         file=/abs/y\\z=1, 2.img|readonly=false|lock=off|cache-size=4096|backend=native"
    );
    words.extend(equivalent.split('|').map(OsString::from));
    let Ok(Parsed::Run(expected)) = parse(words) else {
        panic!("the command line is refused")
    };
    let mount = mount_of(run_in(&dir, &[]).unwrap());
    // The mount table shows the file.
    let source = Some(dir.path().join("vms.toml").display().to_string());
    assert_eq!(
        mount,
        MountConfig {
            source,
            ..mount_of(*expected)
        }
    );
    assert_eq!(
        (mount.disks[0].cache, mount.disks[1].cache_size),
        (Some(PageCache::None), Some(4096))
    );
    assert_eq!((local(&mount, 0).format, local(&mount, 1).lock), (Format::Raw, false));
}

#[test]
fn every_key_of_mount_is_read_and_paths_are_relative_to_the_file() {
    let dir = folder(
        "[mount]\noptions = \"allow_other,umask=027,fsname=a=b,allow-dir=d\"\nread-only = true\nthreads = 3\n\
         pidfile = \"run/pid\"\nlog-file = \"/log\"\nlog-format = \"json\"\n[[disk]]\nfile = \"a\"\n",
    );
    let config = run_in(&dir, &["-v"]).unwrap();
    assert_eq!(
        (config.log.verbosity, config.log.file.clone(), config.log.json),
        (1, Some("/log".into()), true)
    );
    let mount = mount_of(config);
    let options = &mount.options;
    assert!(options.allow_other && options.read_only && !mount.foreground);
    assert_eq!((options.umask, options.fsname.as_deref()), (Some(0o27), Some("a=b")));
    assert_eq!(
        (mount.threads, &mount.pidfile),
        (Some(3), &Some(dir.path().join("run/pid")))
    );
    assert_eq!(local(&mount, 0).allow_dirs, [dir.path().join("d")]);
    let nothing = self::mount(
        "[mount]\nread-only = false\noptions = \"\"\n[[disk]]\nfile = \"a\"\n",
        &[],
    );
    assert!(!nothing.options.read_only && nothing.threads.is_none());
}

#[test]
fn the_command_line_wins_over_the_file() {
    let text = "cache = \"none\"\nallow-dir = \"/f\"\n[mount]\noptions = \"uid=1,gid=2,allow_root\"\nread-only = true\n\
        threads = 3\npidfile = \"p\"\nlog-file = \"l\"\nlog-format = \"json\"\n[[disk]]\nfile = \"a\"\n\
        [[disk]]\nfile = \"b\"\ncache = \"none\"\n";
    let more = [
        "-o",
        "rw,uid=9,allow_other,cache=writethrough,allow-dir=/c",
        "--threads=5",
        "-P",
        "/p",
        "-f",
    ];
    let config = run_in(
        &folder(text),
        &[&more[..], &["--log-file=/l", "--log-format=text"]].concat(),
    )
    .unwrap();
    assert_eq!((config.log.file.clone(), config.log.json), (Some("/l".into()), false));
    let mount = mount_of(config);
    let options = &mount.options;
    assert_eq!((options.uid, options.gid, options.read_only), (Some(9), Some(2), false));
    assert_eq!((options.allow_other, options.allow_root), (true, false));
    assert_eq!(
        (mount.threads, mount.pidfile.clone(), mount.foreground),
        (Some(5), Some("/p".into()), true)
    );
    // The keys of a disk win over the keys for all disks, even over those of the command line.
    let caches: Vec<_> = mount.disks.iter().map(|disk| disk.cache).collect();
    assert_eq!(caches, [Some(PageCache::WriteThrough), Some(PageCache::None)]);
    assert_eq!(local(&mount, 0).allow_dirs, [PathBuf::from("/f"), "/c".into()]);
    assert!(
        self::mount("[mount]\noptions = \"rw\"\n[[disk]]\nfile = \"a\"\n", &["-r"])
            .options
            .read_only
    );
}

#[test]
fn patterns_and_folders_are_relative_to_the_file() {
    let dir = folder("[[disk]]\nfile = \"vm/*.img\"\n[[disk]]\ndir = \"vm\"\n");
    fs::create_dir(dir.path().join("vm")).unwrap();
    for name in ["b.img", "a.img", "c.vmdk"] {
        fs::write(dir.path().join("vm").join(name), "# Disk DescriptorFile\n").unwrap();
    }
    let names: Vec<_> = mount_of(run_in(&dir, &[]).unwrap())
        .disks
        .into_iter()
        .map(|disk| disk.name)
        .collect();
    assert_eq!(names, ["a.raw", "b.raw", "c.raw"]);
    fs::remove_file(dir.path().join("vm/c.vmdk")).unwrap();
    assert!(run_in(&dir, &[]).unwrap_err().contains("vm: no VMDK"));
}

#[test]
fn the_folder_of_the_file_need_not_be_utf8() {
    let dir = folder("");
    let odd = dir.path().join(OsStr::from_bytes(b"\xff"));
    fs::create_dir(&odd).unwrap();
    fs::write(odd.join("c"), "[[disk]]\nfile = \"ü=x\"\n").unwrap();
    let described = read(odd.join("c").as_os_str()).unwrap();
    let expected = [odd.as_os_str().as_bytes(), "/ü=x".as_bytes()].concat();
    let pair = &described.disks[0].pairs[0];
    assert_eq!(
        (pair.key.name, pair.value().path()),
        ("file", Ok(OsString::from_vec(expected).into()))
    );
}

#[test]
fn keys_that_create_and_write_are_read() {
    let dir = folder(
        "[[disk]]\nfile = \"a\"\ncow = \"tmp\"\nforce = true\n[[disk]]\nfile = \"b\"\ncow = \"sub/c.vmdk\"\n\
         [[disk]]\nfile = \"d\"\ncreate = true\ncreate-size = 1024\ncreate-hwversion = 13\n\
         [[disk]]\nfile = \"e\"\ncreate = true\ncreate-size = \"1G\"\ncreate-hwversion = \"esx50\"\n",
    );
    let mount = mount_of(run_in(&dir, &["-o", "cache=writeback"]).unwrap());
    assert!(local(&mount, 0).force);
    for disk in &mount.disks {
        assert_eq!((disk.cache, disk.warnings.len()), (Some(PageCache::WriteThrough), 1));
        assert!(disk.warnings[0].starts_with("cache=writeback means writethrough: "));
    }
    let overlays: Vec<_> = mount.disks.iter().map(|disk| disk.overlay.clone()).collect();
    let kept = Overlay::File(dir.path().join("sub/c.vmdk"));
    assert_eq!(overlays, [Some(Overlay::Temporary), Some(kept), None, None]);
    let made = |disk| local(&mount, disk).create.clone().map(|c| (c.size, c.hardware_version));
    assert_eq!(
        (made(1), made(2), made(3)),
        (None, Some((1024, 13)), Some((1 << 30, 8)))
    );
    for (text, message) in [
        ("cow = true\n", "vms.toml:1: cow: must be a path or \"tmp\", in quotes"),
        (
            "create-hwversion = 2\n",
            "vms.toml:1: create-hwversion=2: must be a number from 3 to 99, or one of",
        ),
        (
            "create-hwversion = 1.5\n",
            "vms.toml:1: create-hwversion: must be a whole number, or a name in quotes",
        ),
        (
            "[[disk]]\nfile = \"a\"\ncreate-size = \"1G\"\n",
            "create-size= needs create=true",
        ),
    ] {
        assert!(error(text).contains(message), "{text}: {}", error(text));
    }
}

#[test]
fn errors_of_unknown_names_give_the_line_and_a_suggestion() {
    for (text, message) in [
        (
            "# c\ncashe = \"x\"\n",
            "vms.toml:2: unknown key cashe; did you mean cache?",
        ),
        (
            "\nread-only = true\n",
            "vms.toml:2: read-only belongs in the [mount] table",
        ),
        (
            "banana = \"secret\"\n",
            "vms.toml:1: unknown key banana; vmdkfuse --help lists the keys",
        ),
        (
            "[[disk]]\nfile = \"a\"\nnmae = 'x'\n",
            "vms.toml:3: unknown key nmae; did you mean name?",
        ),
        (
            "[[disk]]\nfile = \"a\"\n[moutn]\nx = 1\n",
            "vms.toml:3: unknown table moutn; did you mean mount?",
        ),
        (
            "[[disks]]\nfile = \"a\"\n",
            "vms.toml:1: unknown table disks; did you mean disk?",
        ),
        (
            "[mount]\nthreds = 1\n",
            "vms.toml:2: unknown key threds; did you mean threads?",
        ),
        (
            "\"a\\nb\" = 1\n",
            "vms.toml:1: unknown key a\\nb; vmdkfuse --help lists the keys",
        ),
    ] {
        assert_eq!(error(text), message, "{text}");
    }
    let misplaced = error("[mount]\ncache = \"none\"\n");
    assert_eq!(
        misplaced,
        "vms.toml:2: cache is a key of disks: it belongs above the first table, or in a [[disk]] table"
    );
    for key in ["name", "file", "dir"] {
        let message = format!("vms.toml:1: {key} is for one disk: it belongs in a [[disk]] table");
        assert_eq!(error(format!("{key} = \"x\"\n")), message);
    }
}

#[test]
fn the_first_error_of_the_file_is_reported() {
    assert!(error("zebra = 1\napple = 2\n").starts_with("vms.toml:1: unknown key zebra;"));
}

#[test]
fn keys_that_are_not_in_this_build_are_reported() {
    for (text, message) in [
        (
            "partitions = \"hunter2\"\n",
            "vms.toml:1: partitions= is not in this build yet",
        ),
        (
            "[[disk]]\npartitions = true\n",
            "vms.toml:2: partitions= is not in this build yet",
        ),
        (
            "[mount]\noptions = \"descriptor=on\"\n",
            "vms.toml:2: descriptor= is not in this build yet",
        ),
    ] {
        assert_eq!(error(text), message, "{text}");
    }
}

#[test]
fn keys_of_servers_are_read() {
    let tables = [
        "uri = \"nbd://h/x\"\ntimeout = 5\n",
        "uri = \"nbd://h/y\"\ntls-psk = \"keys\"\ntls-username = \"me\"\n",
        "hostname = \"h\"\nport = 10810\nexport = \"a b\"\nretry = 7\nconnections = 2\n",
        "port = \"nbd\"\nhostname = \"h\"\nexport = \"\"\nname = \"n\"\nshared = true\n",
        "socket = \"s\"\ntls = \"require\"\ntls-certificates = \"c\"\ntls-verify = false\nexport = \"e\"\n",
        "socket-fd = 9\nexport = \"f\"\n",
        "vhost-cid = 3\nport = 5\nexport = \"v\"\n",
        "command = \"nbdkit\"\narg = [\"memory\", \"\", \"a=b, c\"]\nexport = \"k\"\n",
        "hostname = \"h\"\ndynamic-export = true\n",
    ];
    let dir = folder(tables.map(|table| format!("[[disk]]\n{table}")).concat());
    let config = run_in(&dir, &[]).unwrap();
    assert_eq!(config.action.handed_over(), [9]);
    let mount = mount_of(config);
    // The equivalent command line.
    let here = dir.path().display();
    let words = [
        "uri=nbd://h/x|timeout=5".to_owned(),
        format!("uri=nbd://h/y|tls-psk={here}/keys|tls-username=me"),
        "hostname=h|port=10810|export=a b|retry=7|connections=2".to_owned(),
        "port=nbd|hostname=h|export=|name=n|shared=true".to_owned(),
        format!("socket={here}/s|tls=require|tls-certificates={here}/c|tls-verify=false|export=e"),
        "socket-fd=9|export=f".to_owned(),
        "vsock-cid=3|port=5|export=v".to_owned(),
        "command=nbdkit|arg=memory|arg=|arg=a=b, c|export=k".to_owned(),
        "hostname=h|dynamic-export=true".to_owned(),
    ];
    assert_eq!(mount.disks.len(), words.len());
    for (disk, equivalent) in mount.disks.iter().zip(words) {
        let mnt = dir.path().join("mnt").into_os_string();
        let words = ["vmdkfuse".into(), mnt]
            .into_iter()
            .chain(equivalent.split('|').map(OsString::from));
        let expected = mount_of(config_of(parse(words)).unwrap());
        assert_eq!(disk, &expected.disks[0], "{equivalent}");
    }
}

#[test]
fn a_server_above_the_tables_applies_to_tables_without_one() {
    let text =
        "hostname = \"h\"\nport = 1\ntimeout = 3\n[[disk]]\nexport = \"a\"\n[[disk]]\nexport = \"b\"\ntimeout = 4\n";
    let disks = mount(text, &[]).disks;
    let server = |disk: usize| match &disks[disk].source {
        SourceConfig::Nbd(server) => (server.address.clone(), server.timeout.map(|t| t.as_secs())),
        other => panic!("{other:?}"),
    };
    let address = NbdAddress::Tcp {
        host: "h".to_owned(),
        port: Some("1".to_owned()),
    };
    assert_eq!((server(0), server(1)), ((address.clone(), Some(3)), (address, Some(4))));
}

#[test]
fn errors_of_conflicting_server_keys_name_the_line() {
    let file = "[[disk]]\nfile = \"a\"\n";
    for (line, table, message) in [
        (
            4,
            "hostname = \"h\"\nsocket = \"s\"\n",
            "hostname= and socket= are both addresses of the NBD server: give one of them",
        ),
        (
            4,
            "uri = \"nbd://h\"\ncommand = \"x\"\n",
            "uri= and command= are both addresses of the NBD server: give one of them",
        ),
        (4, "arg = [\"x\"]\nhostname = \"h\"\n", "arg= needs command="),
        (5, "socket = \"s\"\nport = 1\n", "port= needs hostname= or vsock-cid="),
        (
            5,
            "file = \"a\"\nhostname = \"h\"\n",
            "hostname= is for NBD servers, but the disk is a local file",
        ),
        (
            5,
            "socket = \"s\"\nformat = \"raw\"\n",
            "format= is for local files, but the disk is on an NBD server",
        ),
        (
            5,
            "vsock-cid = 1\nport = \"nbd\"\n",
            "port=nbd: a VSOCK port is a number of 32 bits",
        ),
        (
            5,
            "vsock-cid = 1\nvhost-cid = 2\n",
            "vsock-cid= is given twice for the same disk",
        ),
        (
            4,
            "socket-fd = 5\nconnections = 2\n",
            "socket-fd= means one connection, but connections= is larger",
        ),
    ] {
        assert_eq!(
            error(file.to_owned() + "[[disk]]\n" + table),
            format!("vms.toml:{line}: {message}"),
            "{table}"
        );
    }
    for (table, message) in [
        (
            "hostnam = \"h\"\n",
            "vms.toml:2: unknown key hostnam; did you mean hostname?",
        ),
        (
            "command = \"x\"\narg = \"a\"\nport = true\n",
            "vms.toml:4: port: must be a whole number, or a name in quotes",
        ),
        (
            "command = \"x\"\narg = [1]\n",
            "vms.toml:3: arg: must be a text in quotes, or a list of them",
        ),
        ("socket-fd = \"5\"\n", "vms.toml:2: socket-fd: must be a whole number"),
        (
            "socket-fd = 1\n",
            "vms.toml:2: socket-fd=1: must be a number from 3 to 2147483647",
        ),
        (
            "tls = \"maybe\"\n",
            "vms.toml:2: tls=maybe: must be off or on or require",
        ),
    ] {
        assert_eq!(error("[[disk]]\n".to_owned() + table), message, "{table}");
    }
}

#[test]
fn values_must_have_the_type_of_their_key() {
    for (text, message) in [
        ("readonly = \"yes\"\n", "readonly: must be true or false"),
        ("readonly = 1\n", "readonly: must be true or false"),
        (
            "cache = true\n",
            "cache: must be \"none\" or \"writethrough\" or \"writeback\"",
        ),
        (
            "cache-size = 1.5\n",
            "cache-size: must be a text such as \"64M\", or a number of bytes",
        ),
        (
            "cache-size = [1]\n",
            "cache-size: must be a text such as \"64M\", or a number of bytes",
        ),
        (
            "cache-size = \"12Q\"\n",
            "cache-size=12Q: must be a size: only K, M, G or T may follow the digits, as in 64M",
        ),
        (
            "cache-size = -1\n",
            "cache-size=-1: must be a size: digits with K, M, G or T, as in 64M",
        ),
        (
            "cache = \"often\"\n",
            "cache=often: must be none or writethrough or writeback",
        ),
        (
            "allow-dir = [\"/a\", 7]\n",
            "allow-dir: must be a path in quotes, or a list of them",
        ),
        ("allow-dir = [\"\"]\n", "allow-dir=: a path is missing"),
        ("disk = [{ file = 1979-05-27 }]\n", "file: must be a path in quotes"),
        ("disk = [{ file = [\"a\"] }]\n", "file: must be a path in quotes"),
        (
            "disk = [{ file = \"a\", name = \"b/c\" }]\n",
            "name=b/c: a file name cannot contain `/` or a NUL byte",
        ),
        ("disk = { file = \"a\" }\n", "disk: must be written as [[disk]] tables"),
        ("disk = [1]\n", "disk: must be written as [[disk]] tables"),
        ("[[mount]]\n", "mount: must be written as one [mount] table"),
        ("mount.options = [\"ro\"]\n", "options: must be a text in quotes"),
        ("mount.threads = \"3\"\n", "threads: must be a whole number"),
        ("mount.log-file = false\n", "log-file: must be a path in quotes"),
        ("mount.log-file = \"\"\n", "log-file=: a path is missing"),
        (
            "mount.options = \"uid=me\"\n",
            "-o uid=me: must be a number from 0 to 4294967294",
        ),
        (
            "mount.options = \"cache=often\"\n",
            "cache=often: must be none or writethrough or writeback",
        ),
        (
            "mount.options = \"file=a\"\n",
            "-o file= names a disk: use a [[disk]] table",
        ),
    ] {
        assert_eq!(error(text), format!("vms.toml:1: {message}"), "{text}");
    }
    for (text, part) in [
        ("mount.threads = 65\n", "threads=65: must be a number from 1 to 64"),
        ("mount.threads = -1\n", "threads=-1: must be a number from 1 to 64"),
        ("mount.log-format = \"xml\"\n", "xml"),
        ("mount.options = \"nope\"\n", "unknown mount option nope"),
        ("mount.options = \"ro,rw\"\n", "both read-only"),
        ("mount = { options = \"rw\", read-only = true }\n", "both read-only"),
    ] {
        let error = error(text);
        assert!(error.starts_with("vms.toml:1: ") && error.contains(part), "{error}");
    }
}

#[test]
fn a_disk_has_one_source() {
    let both = error("[[disk]]\nfile = \"a\"\ndir = \"b\"\n");
    assert_eq!(both, "vms.toml:3: a disk has one source, but this one has file and dir");
    let none = error("[[disk]]\nfile = \"a\"\n[[disk]]\nname = \"x\"\n");
    let sources = "add file, dir or uri, or an NBD server's hostname, socket, socket-fd, vsock-cid or command";
    assert_eq!(none, format!("vms.toml:3: [[disk]]: no disk is given: {sources}"));
    for text in ["", "cache = \"none\"\n", "disk = []\n"] {
        let message = "vms.toml: no disk is given: add a [[disk]] table with file, dir or uri, or an NBD server's keys";
        assert_eq!(error(text), message);
    }
}

#[test]
fn a_key_for_all_disks_that_is_given_twice_is_refused() {
    let twice = error("cache = \"none\"\n[mount]\noptions = \"cache=none\"\n[[disk]]\nfile = \"a\"\n");
    assert_eq!(twice, "vms.toml:3: cache= is given twice for the same disk");
    let repeats = "allow-dir = \"/a\"\n[mount]\noptions = \"allow-dir=/b\"\n[[disk]]\nfile = \"a\"\n";
    assert_eq!(local(&mount(repeats, &[]), 0).allow_dirs.len(), 2);
    assert!(
        error("cache = \"none\"\ncache = \"none\"\n").starts_with("vms.toml:2: "),
        "TOML itself forbids duplicate keys"
    );
}

#[test]
fn errors_of_invalid_toml_give_the_line_but_no_text() {
    let broken = error("cache = \"none\"\npassword = hunter2\n");
    assert!(
        broken.starts_with("vms.toml:2: ") && !broken.contains("hunter2"),
        "{broken}"
    );
    assert_eq!(error(b"# a\n# \xff\n"), "vms.toml:2: this is not UTF-8");
    assert!(error("a = ".to_owned() + &"[".repeat(10_000)).starts_with("vms.toml:1: "));
}

#[test]
fn only_a_regular_file_of_bounded_size_is_read() {
    let dir = folder("");
    let file = dir.path().join("vms.toml");
    let disk = "[[disk]]\nfile = \"a\"\n#";
    fs::write(&file, disk.to_owned() + &"x".repeat((1 << 20) - disk.len())).unwrap();
    assert!(run_in(&dir, &[]).is_ok());
    fs::write(&file, disk.to_owned() + &"x".repeat((1 << 20) + 1 - disk.len())).unwrap();
    assert!(run_in(&dir, &[]).unwrap_err().contains("vms.toml: larger than 1 MiB"));
    fs::remove_file(&file).unwrap();
    assert!(run_in(&dir, &[]).unwrap_err().contains("vms.toml: No such file"));
    symlink("mnt", &file).unwrap();
    assert!(run_in(&dir, &[]).unwrap_err().contains("vms.toml: not a regular file"));
    fs::remove_file(&file).unwrap();
    nix::unistd::mkfifo(&file, nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert!(run_in(&dir, &[]).unwrap_err().contains("vms.toml: not a regular file"));
}

#[test]
fn the_file_may_name_the_mount_point_to_mount_and_to_unmount() {
    let dir = folder("[mount]\nmountpoint = \"mnt\"\n[[disk]]\nfile = \"a\"\n");
    let (file, mnt) = (dir.path().join("vms.toml"), dir.path().join("mnt"));
    let of = |more: &[&str]| {
        let words = ["vmdkfuse", "--config", file.to_str().unwrap()]
            .into_iter()
            .chain(more.iter().copied());
        config_of(parse(words.map(OsString::from)))
    };
    assert_eq!(mount_of(of(&[]).unwrap()).target.path, mnt);
    // One on the command line counts.
    assert_eq!(mount_of(of(&["/tmp"]).unwrap()).target.path, Path::new("/tmp"));
    let Action::Unmount(unmount) = of(&["--unmount"]).unwrap().action else {
        panic!("no unmount")
    };
    assert_eq!(unmount.points, [mnt]);
    for wrong in ["mountpoint = 1", "mountpoint = \"\"", "mount-point = \"x\""] {
        let dir = folder(format!("[mount]\n{wrong}\n[[disk]]\nfile = \"a\"\n"));
        let error = run_in(&dir, &[]).unwrap_err();
        assert!(
            error.contains("vms.toml:2: ") && error.contains("mountpoint"),
            "{error}"
        );
    }
}

#[test]
fn words_that_the_help_lists_are_texts() {
    let dir =
        folder("[[disk]]\nfile = \"a.vmdk\"\ncreate = true\ncreate-size = \"1M\"\ncreate-type = \"split-sparse\"\n");
    run_in(&dir, &[]).unwrap();
}

#[test]
fn config_allows_only_a_mount_point() {
    let dir = folder("[[disk]]\nfile = \"a\"\n");
    for (more, part) in [
        (&["/x"][..], "no arguments except the mount point"),
        (&["file=/x"], "no arguments except the mount point"),
        (&["cache=none"], "-o KEY=VALUE"),
        (&["-o", "file=/x"], "-o file= names a disk"),
        (&["--info"], "--info"),
        (&["--map"], "--map"),
        (&["--check"], "--check"),
        (&["--create"], "--create"),
        (&["--commit"], "--commit"),
        (&["--dump"], "--dump"),
        (&["--json"], "--json needs"),
        (&["--config", "b"], "--config"),
        (&["-o", "ro,rw"], "both read-only"),
    ] {
        let error = run_in(&dir, more).unwrap_err();
        assert!(error.contains(part), "{more:?}: {error}");
    }
    let file = dir.path().join("vms.toml");
    let alone = ["vmdkfuse", "--config", file.to_str().unwrap()].map(OsString::from);
    for more in [None, Some("--unmount")] {
        let error = parse(alone.clone().into_iter().chain(more.map(OsString::from)))
            .unwrap_err()
            .to_string();
        assert!(error.contains("no mount point") && error.contains("[mount]"), "{error}");
    }
    let empty = parse(["vmdkfuse", "--config", "", "/mnt"].map(OsString::from))
        .unwrap_err()
        .to_string();
    assert_eq!(empty, "--config : a path is missing");
    assert!(run_in(&dir, &["-o", "name=n"]).is_ok());
}

#[test]
fn names_in_a_datastore_are_no_paths_of_the_folder() {
    let text = "server = \"h\"\n[[disk]]\nfile = \"[ds] a/x.vmdk\"\nparent = \"[ds] a/p.vmdk\"\n";
    let SourceConfig::Https(https) = &mount(text, &[]).disks[0].source else {
        panic!("not on a server")
    };
    assert_eq!(https.label(), "[ds] a/x.vmdk");
    assert!(matches!(&https.parent, Some(HttpsAddress::Datastore { path, .. }) if path == "a/p.vmdk"));
}

#[test]
fn paths_inside_values_start_at_the_folder() {
    let dir = folder(
        "[[disk]]\nurl = \"https://h/x.vmdk\"\nuser = \"u\"\npassword = \"+secret\"\n\
         [[disk]]\nuri = \"nbd+unix:///?socket=s\"\n",
    );
    fs::write(dir.path().join("secret"), "p\n").unwrap();
    let mount = mount_of(run_in(&dir, &[]).unwrap());
    let SourceConfig::Nbd(nbd) = &mount.disks[1].source else {
        panic!("no server")
    };
    let uri = format!("nbd+unix:///?socket={}/s", dir.path().display());
    assert_eq!(nbd.address, NbdAddress::Uri(uri));
}

#[test]
fn a_secret_is_read_once_to_mount_and_never_to_unmount() {
    let (reader, mut writer) = std::io::pipe().unwrap();
    writer.write_all(b"p\n").unwrap();
    drop(writer);
    let number = std::os::fd::AsRawFd::as_raw_fd(&reader);
    let dir = folder(format!(
        "user = \"u\"\npassword = \"-{number}\"\n[mount]\nmountpoint = \"mnt\"\n[[disk]]\nurl = \"https://h/x.vmdk\"\n\
         [[disk]]\nurl = \"https://h/y.vmdk\"\n"
    ));
    let file = dir.path().join("vms.toml");
    let unmount = ["vmdkfuse", "--unmount", "--config", file.to_str().unwrap()];
    config_of(parse(unmount.map(OsString::from))).unwrap();
    assert_eq!(mount_of(run_in(&dir, &[]).unwrap()).disks.len(), 2);
}
