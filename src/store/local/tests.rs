//! Tests of the local store: the name gate, locks, new files; those of an open file are in `file`.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::process::Command;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::stat::{Mode, SFlag};
use nix::unistd::mkfifo;
use tempfile::TempDir;

use super::folder::lookup_error;
use super::found::refused_for_writing;
use super::*;

mod file;

/// Folder `image/` with `disk.vmdk`, `a.bin` and `sub/b.bin`, and a folder `other/` next to it with `secret.bin` and
/// `deep/c.bin`. Each file contains its own path.
struct Folders {
    root: TempDir,
}

impl Folders {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        for folder in ["image/sub", "other/deep"] {
            fs::create_dir_all(root.path().join(folder)).unwrap();
        }
        for file in [
            "image/disk.vmdk",
            "image/a.bin",
            "image/sub/b.bin",
            "other/secret.bin",
            "other/deep/c.bin",
        ] {
            fs::write(root.path().join(file), file).unwrap();
        }
        Self { root }
    }

    fn path(&self, path: &str) -> PathBuf {
        self.root.path().join(path)
    }

    fn link(&self, target: impl AsRef<Path>, link: &str) {
        symlink(target, self.path(link)).unwrap();
    }

    fn store(&self, allow: &[PathBuf]) -> LocalStore {
        LocalStore::new(&self.path("image"), policy(allow)).unwrap()
    }
}

fn policy(allow: &[PathBuf]) -> Arc<OpenPolicy> {
    Arc::new(OpenPolicy::new(allow.to_vec(), true))
}

fn open(store: &dyn Store, name: impl AsRef<[u8]>) -> Result<Arc<dyn StoredFile>> {
    store.open(&ExtentName::new(name).unwrap(), Access::Read)
}

fn content(file: &dyn StoredFile) -> String {
    let mut bytes = vec![0; usize::try_from(file.len()).unwrap()];
    file.read_exact_at(0, &mut bytes).unwrap();
    String::from_utf8(bytes).unwrap()
}

fn reads(store: &dyn Store, name: impl AsRef<[u8]>) -> String {
    content(open(store, name).unwrap().as_ref())
}

#[track_caller]
fn refused(store: &dyn Store, name: impl AsRef<[u8]>, kind: ErrorKind, parts: &[&str]) {
    let error = open(store, name).unwrap_err();
    assert_eq!(error.kind(), kind, "{error}");
    for part in parts {
        assert!(error.to_string().contains(part), "`{error}` does not contain `{part}`");
    }
}

#[test]
fn names_inside_the_folder_open() {
    let folders = Folders::new();
    folders.link("a.bin", "image/link.bin");
    folders.link("../a.bin", "image/sub/up.bin");
    folders.link("sub", "image/folder");
    let store = folders.store(&[]);
    for (name, expected) in [
        ("a.bin", "image/a.bin"),
        ("sub/b.bin", "image/sub/b.bin"),
        ("./sub/../a.bin", "image/a.bin"),
        ("link.bin", "image/a.bin"),
        ("sub/up.bin", "image/a.bin"),
        ("folder/b.bin", "image/sub/b.bin"),
    ] {
        assert_eq!(reads(&store, name), expected, "{name}");
    }
    // The name leads out of the folder and back into it.
    assert_eq!(reads(&store, "../image/a.bin"), "image/a.bin");
    assert_eq!(
        reads(&store, store.folder.real.join("a.bin").as_os_str().as_bytes()),
        "image/a.bin"
    );
}

#[test]
fn names_that_lead_out_are_refused() {
    let folders = Folders::new();
    let secret = fs::canonicalize(folders.path("other/secret.bin")).unwrap();
    folders.link(&secret, "image/absolute.bin");
    folders.link("../other/secret.bin", "image/relative.bin");
    folders.link("../other", "image/folder");
    folders.link("relative.bin", "image/twice.bin");
    let store = folders.store(&[]);
    let (target, option) = (
        secret.to_str().unwrap(),
        format!("allow-dir={}", secret.parent().unwrap().display()),
    );
    for name in [
        "../other/secret.bin",
        "absolute.bin",
        "relative.bin",
        "twice.bin",
        "folder/secret.bin",
        target,
    ] {
        refused(&store, name, ErrorKind::Policy, &[name, target, &option]);
    }
    refused(
        &store,
        "/etc/passwd",
        ErrorKind::Policy,
        &["/etc/passwd", "allow-dir=/etc "],
    );
    // No advice to allow a folder where the file is not.
    refused(&store, "/nowhere/x", ErrorKind::NotFound, &["there is no /nowhere/x"]);
    refused(
        &store,
        "../../../../../../../../etc/passwd",
        ErrorKind::Policy,
        &["leads to /etc/passwd"],
    );
}

#[test]
fn allowed_folders_open() {
    let folders = Folders::new();
    folders.link("../other/secret.bin", "image/relative.bin");
    folders.link("../other", "image/folder");
    folders.link("other", "alias");
    let secret = folders.path("other/secret.bin");
    let by_alias = folders.path("alias/secret.bin");
    for allow in [
        folders.path("other"),
        folders.path("alias"),
        folders.root.path().to_path_buf(),
    ] {
        let store = folders.store(&[allow]);
        for name in [
            "../other/secret.bin",
            "relative.bin",
            "folder/secret.bin",
            secret.to_str().unwrap(),
        ] {
            assert_eq!(reads(&store, name), "other/secret.bin", "{name}");
        }
    }
    let store = folders.store(&[PathBuf::from("/nowhere-else-usr"), folders.path("alias")]);
    refused(
        &store,
        by_alias.to_str().unwrap(),
        ErrorKind::NotFound,
        &["allow-dir", "/nowhere-else-usr"],
    );
    let store = folders.store(&[folders.path("alias")]);
    assert_eq!(reads(&store, by_alias.to_str().unwrap()), "other/secret.bin");
    let missing = folders.path("other/missing.bin");
    refused(
        &store,
        missing.to_str().unwrap(),
        ErrorKind::NotFound,
        &["other/missing.bin"],
    );
}

#[test]
fn names_that_lead_out_of_an_allowed_folder_are_refused() {
    let folders = Folders::new();
    folders.link("/etc/passwd", "other/out.bin");
    folders.link("../../image/a.bin", "other/deep/back.bin");
    let store = folders.store(&[folders.path("other")]);
    refused(
        &store,
        "../other/out.bin",
        ErrorKind::Policy,
        &["leads to /etc/passwd", "allow-dir=/etc "],
    );
    refused(&store, "../other/../../x", ErrorKind::NotFound, &["there is no"]);
    assert_eq!(reads(&store, "../other/deep/back.bin"), "image/a.bin");
    // `other-not` shares a prefix with `other`, but it is not below it.
    fs::create_dir(folders.path("other-not")).unwrap();
    fs::write(folders.path("other-not/x"), "x").unwrap();
    refused(&store, "../other-not/x", ErrorKind::Policy, &["other-not"]);
}

#[test]
fn symlink_loops_are_refused() {
    let folders = Folders::new();
    folders.link("round", "image/round");
    folders.link("../other/there", "image/here");
    folders.link("../image/here", "other/there");
    let store = folders.store(&[folders.path("other")]);
    refused(&store, "round", ErrorKind::Policy, &["too many links"]);
    refused(&store, "here", ErrorKind::Policy, &["here"]);
}

#[test]
fn magic_links_of_proc_are_refused() {
    let folders = Folders::new();
    let secret = File::open(folders.path("other/secret.bin")).unwrap();
    let store = LocalStore::new(Path::new("/proc/self/fd"), policy(&[])).unwrap();
    refused(&store, secret.as_raw_fd().to_string(), ErrorKind::Policy, &["/proc"]);
}

#[test]
fn missing_files_are_named() {
    let folders = Folders::new();
    folders.link("nothing", "image/dangling.bin");
    let store = folders.store(&[]);
    let full = |name: &str| store.folder.real.join(name).display().to_string();
    for name in [
        "missing.bin",
        "dangling.bin",
        "a.bin/x",
        "sub/../missing",
        "nbd:localhost:10809",
    ] {
        refused(&store, name, ErrorKind::NotFound, &[&full(name)]);
    }
    assert_eq!(
        LocalStore::new(&folders.path("none"), policy(&[])).unwrap_err().kind(),
        ErrorKind::NotFound
    );
}

#[test]
fn the_undecoded_name_is_tried_second() {
    let folders = Folders::new();
    let raw = std::ffi::OsStr::from_bytes(b"caf\xe9.bin");
    let name = ExtentName::new("café.bin").unwrap().or_raw(raw.as_bytes()).unwrap();
    let store = folders.store(&[]);
    let error = store.open(&name, Access::Read).unwrap_err();
    assert!(
        error.kind() == ErrorKind::NotFound && error.to_string().contains("café.bin"),
        "{error}"
    );
    fs::write(folders.path("image").join(raw), "raw").unwrap();
    assert_eq!(content(store.open(&name, Access::Read).unwrap().as_ref()), "raw");
    fs::write(folders.path("image/café.bin"), "decoded").unwrap();
    assert_eq!(content(store.open(&name, Access::Read).unwrap().as_ref()), "decoded");
}

#[test]
fn other_file_types_are_refused_without_blocking() {
    let (done, wait) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        refuse_other_file_types();
        done.send(())
    });
    // An open that blocks on the FIFO never returns, and a failed assertion drops `done`. Both fail here.
    wait.recv_timeout(Duration::from_secs(60)).unwrap();
}

fn refuse_other_file_types() {
    let folders = Folders::new();
    mkfifo(&folders.path("image/fifo"), Mode::S_IRWXU).unwrap();
    folders.link("fifo", "image/to-fifo");
    let _socket = std::os::unix::net::UnixListener::bind(folders.path("image/socket")).unwrap();
    for allow in [vec![], vec![PathBuf::from("/dev"), folders.path("image")]] {
        let store = folders.store(&allow);
        refused(&store, "fifo", ErrorKind::Policy, &["FIFO"]);
        refused(&store, "to-fifo", ErrorKind::Policy, &["FIFO"]);
        refused(&store, "socket", ErrorKind::Policy, &["socket"]);
        refused(&store, "sub", ErrorKind::Policy, &["directory"]);
        refused(&store, ".", ErrorKind::Policy, &["directory"]);
        let expected = if allow.is_empty() {
            "allow-dir=/dev"
        } else {
            "character device"
        };
        refused(&store, "/dev/null", ErrorKind::Policy, &[expected]);
    }
    for (path, expected) in [
        ("image/fifo", "FIFO"),
        ("image/to-fifo", "FIFO"),
        ("image", "directory"),
    ] {
        let error = open_user_path(&folders.path(path), policy(&[]), Access::Read).unwrap_err();
        assert!(
            error.kind() == ErrorKind::Usage && error.to_string().contains(expected),
            "{error}"
        );
    }
    let error = open_user_path(Path::new("/dev/null"), policy(&[]), Access::Read).unwrap_err();
    assert!(
        error.kind() == ErrorKind::Usage && error.to_string().contains("character device"),
        "{error}"
    );
}

/// Loop device, detached on drop.
struct Loop(PathBuf);

impl Loop {
    /// Attaches a read-only loop device to `file`. Returns `None` if this process is not allowed to.
    fn read_only(file: &Path) -> Option<Self> {
        Self::attach(
            Command::new("losetup")
                .args(["--find", "--show", "--read-only"])
                .arg(file),
        )
    }

    /// Attaches a writable loop device to `file`. Returns `None` if this process is not allowed to.
    fn writable(file: &Path) -> Option<Self> {
        Self::attach(Command::new("losetup").args(["--find", "--show"]).arg(file))
    }

    fn attach(losetup: &mut Command) -> Option<Self> {
        let output = losetup.output().ok()?;
        let device = String::from_utf8(output.stdout).ok()?;
        output.status.success().then(|| Self(PathBuf::from(device.trim())))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}

#[test]
fn block_devices_open_if_allowed() {
    let folders = Folders::new();
    fs::write(folders.path("backing"), vec![7; 8192]).unwrap();
    let Some(device) = Loop::read_only(&folders.path("backing")) else {
        eprintln!("SKIPPED block_devices_open_if_allowed: no loop device can be created here");
        return;
    };
    let name = device.0.as_os_str().as_bytes();
    refused(&folders.store(&[]), name, ErrorKind::Policy, &["allow-dir=/dev"]);
    folders.link(&device.0, "image/link");
    refused(&folders.store(&[]), "link", ErrorKind::Policy, &["allow-dir=/dev"]);
    let in_dev = LocalStore::new(Path::new("/dev"), policy(&[])).unwrap();
    let node = device.0.file_name().unwrap().as_bytes();
    refused(&in_dev, node, ErrorKind::Policy, &["block device", "allow-dir=/dev"]);

    let allow = [PathBuf::from("/dev")];
    let allowed_dev = LocalStore::new(Path::new("/dev"), policy(&allow)).unwrap();
    let files = [
        open(&folders.store(&allow), name).unwrap(),
        open(&folders.store(&allow), "link").unwrap(),
        open(&allowed_dev, node).unwrap(),
        open_user_path(&device.0, policy(&[]), Access::Read).unwrap(),
    ];
    for file in &files {
        let mut bytes = [0; 512];
        file.read_exact_at(7680, &mut bytes).unwrap();
        assert_eq!((file.len(), file.allocated().unwrap(), bytes), (8192, 8192, [7; 512]));
        assert_eq!(file.identity().unwrap(), files[0].identity().unwrap());
    }

    // Another device node with the same device number has the same identity.
    let second_node = folders.path("again");
    nix::sys::stat::mknod(
        &second_node,
        SFlag::S_IFBLK,
        Mode::S_IRWXU,
        fs::metadata(&device.0).unwrap().rdev(),
    )
    .unwrap();
    match open_user_path(&second_node, policy(&[]), Access::Read) {
        Ok(file) => assert_eq!(file.identity().unwrap().file, files[0].identity().unwrap().file),
        Err(e) => eprintln!("SKIPPED a second node of the device: it cannot be opened there: {e}"),
    }
}

#[test]
fn a_user_path_may_be_a_symlink() {
    let folders = Folders::new();
    folders.link("image/disk.vmdk", "mine.vmdk");
    let file = open_user_path(&folders.path("mine.vmdk"), policy(&[]), Access::Read).unwrap();
    assert_eq!(content(file.as_ref()), "image/disk.vmdk");
    assert!(file.label().ends_with("/mine.vmdk"), "{}", file.label());
    // The siblings are those of the link's target.
    let siblings = file.siblings().unwrap();
    assert_eq!(reads(siblings.as_ref(), "a.bin"), "image/a.bin");
    refused(siblings.as_ref(), "../mine.vmdk", ErrorKind::Policy, &["allow-dir="]);
    let error = open_user_path(&folders.path("none.vmdk"), policy(&[]), Access::Read).unwrap_err();
    assert!(
        error.kind() == ErrorKind::NotFound && error.to_string().contains("none.vmdk"),
        "{error}"
    );
}

#[test]
fn siblings_are_in_the_folder_of_the_file_and_keep_the_allowed_folders() {
    let folders = Folders::new();
    let file = open_user_path(
        &folders.path("image/disk.vmdk"),
        policy(&[folders.path("other")]),
        Access::Read,
    )
    .unwrap();
    let siblings = file.siblings().unwrap();
    let deep = open(siblings.as_ref(), "../other/deep/c.bin")
        .unwrap()
        .siblings()
        .unwrap();
    assert_eq!(reads(deep.as_ref(), "c.bin"), "other/deep/c.bin");
    assert_eq!(reads(deep.as_ref(), "../secret.bin"), "other/secret.bin");
    refused(deep.as_ref(), "../../image/a.bin", ErrorKind::Policy, &["allow-dir="]);
    let sub = open(siblings.as_ref(), "sub/b.bin").unwrap().siblings().unwrap();
    refused(sub.as_ref(), "../a.bin", ErrorKind::Policy, &["allow-dir="]);
}

#[test]
fn a_file_without_a_folder_has_no_siblings() {
    let folders = Folders::new();
    let path = folders.path("image/disk.vmdk");
    let siblings = |file: &dyn StoredFile| file.siblings().unwrap_err().kind();
    let deleted = open_user_path(&path, policy(&[]), Access::Read).unwrap();
    fs::remove_file(&path).unwrap();
    assert_eq!(siblings(deleted.as_ref()), ErrorKind::NotFound);
    // Another file took its name.
    let replaced = open_user_path(&folders.path("other/secret.bin"), policy(&[]), Access::Read).unwrap();
    fs::rename(folders.path("image/a.bin"), folders.path("other/secret.bin")).unwrap();
    assert_eq!(siblings(replaced.as_ref()), ErrorKind::NotFound);
    // The folder was exchanged for a link to another one.
    let moved = open_user_path(&folders.path("image/sub/b.bin"), policy(&[]), Access::Read).unwrap();
    fs::rename(folders.path("image/sub"), folders.path("gone")).unwrap();
    folders.link(folders.path("gone"), "image/sub");
    assert!(moved.siblings().is_err());
    // The kernel reports the path `/memfd:… (deleted)`, and `/` must not become the folder.
    let memory = nix::sys::memfd::memfd_create("x", nix::sys::memfd::MFdFlags::empty()).unwrap();
    let file = open_user_path(&proc_path(&memory), policy(&[]), Access::Read).unwrap();
    assert_eq!(siblings(file.as_ref()), ErrorKind::NotFound);
}

#[test]
fn labels_contain_no_control_characters() {
    let folders = Folders::new();
    fs::write(folders.path("image/x\x1b[31m"), "").unwrap();
    let label = open(&folders.store(&[]), "x\x1b[31m").unwrap().label().to_owned();
    assert!(label.ends_with("image/x\\u{1b}[31m"), "{label}");
}

#[test]
fn the_error_of_an_old_kernel_names_the_required_version() {
    let error = lookup_error("disk.vmdk".to_owned(), Errno::ENOSYS);
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.to_string().contains("Linux 5.6"), "{error}");
}

/// Checks the error of an open for writing, by name and by user path.
#[track_caller]
fn not_writable(folders: &Folders, name: &str, kind: ErrorKind, parts: &[&str]) {
    let store = folders.store(&[]);
    let by_name = store.open(&ExtentName::new(name).unwrap(), Access::Write).unwrap_err();
    let by_user = open_user_path(&folders.path("image").join(name), policy(&[]), Access::Write).unwrap_err();
    for error in [by_name, by_user] {
        assert_eq!(error.kind(), kind, "{error}");
        for part in parts {
            assert!(error.to_string().contains(part), "`{error}` does not contain `{part}`");
        }
    }
}

fn open_to_write(folders: &Folders, name: &str) -> Arc<dyn StoredFile> {
    folders
        .store(&[])
        .open(&ExtentName::new(name).unwrap(), Access::Write)
        .unwrap()
}

#[test]
fn a_writer_excludes_readers_and_other_writers() {
    let folders = Folders::new();
    let reader = open(&folders.store(&[]), "a.bin").unwrap();
    let second = open(&folders.store(&[]), "a.bin").unwrap();
    assert!(reader.writer().is_none(), "opened for reading");
    not_writable(&folders, "a.bin", ErrorKind::Busy, &["a.bin", "allows no other writer"]);
    drop((reader, second));
    let writer = open_to_write(&folders, "a.bin");
    assert!(writer.writer().is_some());
    not_writable(&folders, "a.bin", ErrorKind::Busy, &["a.bin", "allows no other writer"]);
    refused(
        &folders.store(&[]),
        "a.bin",
        ErrorKind::Busy,
        &["a.bin", "in use for writing"],
    );
    // The lock covers one file, not its siblings.
    drop(open_to_write(&folders, "disk.vmdk"));
    let off = Arc::new(OpenPolicy::new(Vec::new(), false));
    drop(open_user_path(&folders.path("image/a.bin"), Arc::clone(&off), Access::Write).unwrap());
    drop(open_user_path(&folders.path("image/a.bin"), off, Access::Read).unwrap());
    drop(writer);
    drop(open_to_write(&folders, "a.bin"));
}

#[test]
fn a_vmware_lock_file_refuses_writers_unless_locks_are_off() {
    let folders = Folders::new();
    fs::create_dir(folders.path("image/a.bin.lck")).unwrap();
    drop(open_to_write(&folders, "a.bin"));
    fs::write(folders.path("image/a.bin.lck/M1.lck"), "anna 4711 1 X").unwrap();
    not_writable(
        &folders,
        "a.bin",
        ErrorKind::Busy,
        &["a.bin.lck/M1.lck", "machine anna", "power the machine off"],
    );
    drop(open(&folders.store(&[]), "a.bin").unwrap());
    let off = Arc::new(OpenPolicy::new(Vec::new(), false));
    drop(open_user_path(&folders.path("image/a.bin"), off, Access::Write).unwrap());
    // A new file is refused too, because another host may be creating it.
    fs::create_dir(folders.path("image/new.lck")).unwrap();
    fs::write(folders.path("image/new.lck/M1.lck"), "anna 4711 1 X").unwrap();
    let error = folders.store(&[]).create(&ExtentName::new("new").unwrap()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
    assert!(!folders.path("image/new").exists(), "the refused file was not removed");
}

#[test]
fn opening_a_read_only_file_for_writing_is_refused() {
    // Root may write to every file, so the test changes the file system UID, which the kernel keeps for each thread.
    std::thread::spawn(|| {
        use std::os::unix::fs::PermissionsExt;
        let folders = Folders::new();
        let allow = |path: PathBuf, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        allow(folders.root.path().to_path_buf(), 0o755);
        allow(folders.path("image/a.bin"), 0o444);
        let before = nix::unistd::setfsuid(nix::unistd::Uid::from_raw(65534));
        drop(open(&folders.store(&[]), "a.bin").unwrap());
        not_writable(&folders, "a.bin", ErrorKind::ReadOnly, &["a.bin: open for writing"]);
        nix::unistd::setfsuid(before);
    })
    .join()
    .unwrap();
    for errno in [libc::EACCES, libc::EPERM, libc::EROFS] {
        let error = refused_for_writing("x", io::Error::from_raw_os_error(errno));
        assert_eq!(error.kind(), ErrorKind::ReadOnly, "{error}");
    }
    let error = refused_for_writing("x", io::Error::from_raw_os_error(libc::EIO));
    assert_eq!(error.kind(), ErrorKind::Os(libc::EIO), "{error}");
}

#[test]
fn new_files_are_created_only_in_the_folder_and_replace_nothing() {
    let folders = Folders::new();
    folders.link("nowhere", "image/dangling");
    let store = folders.store(&[folders.path("other")]);
    let create = |name: &str| store.create(&ExtentName::new(name).unwrap());
    for name in [
        "sub/new",
        "../other/new",
        "../new",
        "/tmp/vmdkfuse-new",
        "./new",
        "new/",
        ".",
        "..",
    ] {
        let error = create(name).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Policy, "{name}: {error}");
    }
    for name in ["a.bin", "sub", "dangling"] {
        let error = create(name).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Os(libc::EEXIST), "{name}: {error}");
    }
    assert_eq!(fs::read(folders.path("image/a.bin")).unwrap(), b"image/a.bin");
    assert!(!folders.path("image/nowhere").exists() && !folders.path("image/new").exists());
    let new = create("new").unwrap();
    assert_eq!((new.len(), new.writer().unwrap().current_len().unwrap()), (0, 0));
    assert!(new.label().ends_with("image/new"), "{}", new.label());
    refused(&store, "new", ErrorKind::Busy, &["in use for writing"]);
    new.writer().unwrap().write_all_at(0, b"content").unwrap();
    assert_eq!(reads(new.siblings().unwrap().as_ref(), "a.bin"), "image/a.bin");
    drop(new);
    assert_eq!(reads(&store, "new"), "content");
}

#[test]
fn names_lists_the_files_of_the_opened_folder() {
    let folders = Folders::new();
    fs::write(folders.path("image").join(std::ffi::OsStr::from_bytes(b"caf\xe9")), "").unwrap();
    let store = folders.store(&[]);
    let mut names: Vec<_> = store
        .names(100)
        .unwrap()
        .iter()
        .map(|name| name.as_bytes().to_vec())
        .collect();
    names.sort();
    assert_eq!(names, [&b"a.bin"[..], b"caf\xe9", b"disk.vmdk"]);
    assert_eq!(store.names(2).unwrap().len(), 2);
    assert_eq!(store.names(0).unwrap().len(), 0);
    // The store keeps the opened folder, also after a rename.
    fs::rename(folders.path("image"), folders.path("moved")).unwrap();
    assert_eq!(store.names(100).unwrap().len(), 3);
}
