//! Tests of the rights by which files are opened: hidden files, mounts, the rights of the image's owner, and files with several names.

use std::os::unix::fs::{PermissionsExt, chown, symlink};

use tempfile::TempDir;

use super::*;

/// User that no user data base knows.
const STRANGER: u32 = 54321;

/// Folder that everybody may search, with an image that a stranger owns if this process is root.
struct Shared {
    root: TempDir,
}

impl Shared {
    fn new() -> Self {
        let shared = Self {
            root: tempfile::tempdir().unwrap(),
        };
        fs::set_permissions(shared.root.path(), fs::Permissions::from_mode(0o755)).unwrap();
        shared.write("disk.vmdk", STRANGER, 0o644);
        shared
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    /// Creates a file with its own name as content. Only root can give it an owner.
    fn write(&self, name: &str, owner: u32, mode: u32) {
        fs::write(self.path(name), name).unwrap();
        fs::set_permissions(self.path(name), fs::Permissions::from_mode(mode)).unwrap();
        if nix::unistd::geteuid().is_root() {
            chown(self.path(name), Some(owner), Some(owner)).unwrap();
        }
    }

    fn open(&self, policy: OpenPolicy, access: Access) -> Arc<dyn StoredFile> {
        open_user_path(&self.path("disk.vmdk"), Arc::new(policy), access).unwrap()
    }

    /// Opens a name that the image contains.
    fn named(&self, name: &str, allow: &[&str], access: Access) -> Result<Arc<dyn StoredFile>> {
        let allow = allow.iter().map(|dir| self.path(dir)).collect();
        let image = self.open(OpenPolicy::new(allow, true), Access::Read);
        image.siblings()?.open(&ExtentName::new(name).unwrap(), access)
    }

    #[track_caller]
    fn refused(&self, name: &str, parts: &[&str]) {
        let error = self.named(name, &[], Access::Read).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Policy, "{name}: {error}");
        for part in parts {
            assert!(error.to_string().contains(part), "{name}: {error} without {part}");
        }
    }
}

fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

#[test]
fn names_in_images_open_no_hidden_files() {
    let shared = Shared::new();
    fs::create_dir_all(shared.path(".ssh/deep")).unwrap();
    for name in [".ssh/id", ".ssh/deep/id", ".netrc", "plain"] {
        shared.write(name, STRANGER, 0o644);
    }
    symlink(".ssh/id", shared.path("link")).unwrap();
    for name in [".ssh/id", "./.ssh/deep/id", "plain/../.ssh/id", ".netrc", "link"] {
        if name != "plain/../.ssh/id" {
            shared.refused(name, &["hidden", "allow-dir="]);
        }
        assert!(
            shared.named(name, &["."], Access::Read).is_ok() || name.contains("plain"),
            "{name}"
        );
    }
    shared.named("plain", &[], Access::Read).unwrap();
    // A hidden image may have hidden extents beside it, but not in a hidden folder.
    shared.write(".disk.vmdk", STRANGER, 0o644);
    let policy = Arc::new(OpenPolicy::new(Vec::new(), true));
    let image = open_user_path(&shared.path(".disk.vmdk"), policy, Access::Read).unwrap();
    let store = image.siblings().unwrap();
    store.open(&ExtentName::new(".netrc").unwrap(), Access::Read).unwrap();
    store
        .open(&ExtentName::new(".ssh/id").unwrap(), Access::Read)
        .unwrap_err();
}

#[test]
fn names_in_images_do_not_cross_mounts() {
    if !is_root() {
        return;
    }
    // A mount in a namespace of this thread: it ends with the thread.
    std::thread::spawn(|| {
        use nix::mount::{MsFlags, mount};
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
        mount(
            None::<&str>,
            "/",
            None::<&str>,
            MsFlags::MS_REC | MsFlags::MS_PRIVATE,
            None::<&str>,
        )
        .unwrap();
        let shared = Shared::new();
        fs::create_dir(shared.path("sub")).unwrap();
        mount(
            Some("tmpfs"),
            &shared.path("sub"),
            Some("tmpfs"),
            MsFlags::empty(),
            None::<&str>,
        )
        .unwrap();
        shared.write("sub/x", STRANGER, 0o644);
        shared.refused("sub/x", &["another file system", "allow-dir="]);
        for allowed in ["sub", "."] {
            shared.named("sub/x", &[allowed], Access::Read).unwrap();
        }
        nix::mount::umount(&shared.path("sub")).unwrap();
    })
    .join()
    .unwrap();
}

#[test]
fn root_opens_the_names_of_an_image_with_its_owners_rights() {
    if !is_root() {
        return;
    }
    let shared = Shared::new();
    shared.write("of-root", 0, 0o600);
    shared.write("readable", 0, 0o644);
    shared.write("own", STRANGER, 0o600);
    fs::create_dir(shared.path("closed")).unwrap();
    fs::set_permissions(shared.path("closed"), fs::Permissions::from_mode(0o700)).unwrap();
    shared.write("closed/of-root", 0, 0o644);
    shared.write("closed/own", STRANGER, 0o600);
    for name in ["of-root", "closed/of-root"] {
        shared.refused(name, &["belongs to user 54321", "chown"]);
        // An allowed folder widens the places, not the rights.
        assert!(shared.named(name, &["."], Access::Read).is_err());
    }
    for name in ["readable", "own", "closed/own"] {
        shared.named(name, &[], Access::Read).unwrap();
    }
    shared.named("own", &[], Access::Write).unwrap();
    let error = shared.named("readable", &[], Access::Write).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ReadOnly, "{error}");
    // The rights are those of the image that the user named, also for the files that its extents name.
    let extent = shared.named("readable", &[], Access::Read).unwrap();
    let name = ExtentName::new("of-root").unwrap();
    extent.siblings().unwrap().open(&name, Access::Read).unwrap_err();
    // An image of root opens all that root may open.
    chown(shared.path("disk.vmdk"), Some(0), Some(0)).unwrap();
    shared.named("of-root", &[], Access::Write).unwrap();
}

#[test]
fn a_file_with_several_names_is_opened_once() {
    let shared = Shared::new();
    shared.write("x", STRANGER, 0o644);
    fs::hard_link(shared.path("x"), shared.path("hard")).unwrap();
    symlink("x", shared.path("soft")).unwrap();
    let image = shared.open(OpenPolicy::new(Vec::new(), true), Access::Write);
    let store = image.siblings().unwrap();
    let open = |name: &str, access| store.open(&ExtentName::new(name).unwrap(), access).unwrap();
    let first = open("x", Access::Write);
    for name in ["x", "./x", ".//x", "hard", "soft"] {
        for access in [Access::Write, Access::Read, Access::Peek] {
            // Otherwise the lock of the first one refuses it.
            assert!(Arc::ptr_eq(&first, &open(name, access)), "{name}");
        }
    }
    assert!(Arc::ptr_eq(&image, &open("disk.vmdk", Access::Read)));
}

#[test]
fn a_peek_takes_no_lock_and_waits_for_none() {
    let shared = Shared::new();
    shared.write("x", STRANGER, 0o644);
    let policy = || Arc::new(OpenPolicy::new(Vec::new(), true));
    let writer = open_user_path(&shared.path("x"), policy(), Access::Write).unwrap();
    let peek = shared.named("x", &[], Access::Peek).unwrap();
    drop(writer);
    drop(open_user_path(&shared.path("x"), policy(), Access::Write).unwrap());
    drop(peek);
}

#[test]
fn a_single_file_image_names_no_other_file() {
    let shared = Shared::new();
    shared.write("x", STRANGER, 0o644);
    let image = shared.open(OpenPolicy::new(Vec::new(), true).single_file(true), Access::Read);
    let error = image
        .siblings()
        .unwrap()
        .open(&ExtentName::new("x").unwrap(), Access::Read);
    let error = error.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Policy);
    assert!(error.to_string().contains("extents=self"), "{error}");
}

#[test]
fn a_link_that_replaces_a_found_file_is_not_followed() {
    let shared = Shared::new();
    fs::create_dir(shared.path("sub")).unwrap();
    shared.write("sub/x.img", STRANGER, 0o644);
    symlink("sub", shared.path("linked")).unwrap();
    symlink("x.img", shared.path("sub/link.img")).unwrap();
    let found = |name: &str| {
        let policy = Arc::new(OpenPolicy::new(Vec::new(), true));
        open_found_path(shared.root.path(), &shared.path(name), policy, Access::Read)
    };
    found("sub/x.img").unwrap();
    found("disk.vmdk").unwrap();
    for name in ["linked/x.img", "sub/link.img"] {
        let error = found(name).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Policy, "{error}");
        assert!(error.to_string().contains("link"), "{error}");
    }
}

#[test]
fn root_opens_found_files_with_the_rights_of_their_folders_owner() {
    if !is_root() {
        return;
    }
    let shared = Shared::new();
    fs::create_dir(shared.path("upload")).unwrap();
    chown(shared.path("upload"), Some(STRANGER), Some(STRANGER)).unwrap();
    shared.write("upload/own.img", STRANGER, 0o600);
    // As a hard link to a file of root would be.
    shared.write("upload/secret.img", 0, 0o600);
    let found = |name: &str| {
        let policy = Arc::new(OpenPolicy::new(Vec::new(), true));
        open_found_path(shared.root.path(), &shared.path(name), policy, Access::Read)
    };
    found("upload/own.img").unwrap();
    let error = found("upload/secret.img").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Os(libc::EACCES), "{error}");
}
