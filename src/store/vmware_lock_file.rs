//! VMware lock files: VMware's products create them next to a file that they have open.
//!
//! ```text
//!   disk.vmdk.lck/M12345.lck    Workstation, Player, Fusion: `machine process number X|S …`, as text
//!   .lck-<16 digits>            ESX on NFS: the file's inode, lowest byte first; the host's name starts at byte 20
//! ```
//! A crash leaves them behind, and this machine cannot find out if the other machine is still alive. So a lock file
//! only causes a warning for a reader, and refuses a writer. Their content is untrusted: it is read with a size limit,
//! only from regular files, and escaped in messages.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{LazyLock, Mutex};

use super::{Access, printable, proc_path};
use crate::error::{Error, ErrorKind, Result};
use crate::mutex::lock;

/// Largest number of bytes read from a lock file. VMware writes 512 bytes.
const MAX_TEXT: u64 = 4096;
/// Largest number of names read from a folder of lock files.
const MAX_LOCK_FILES: usize = 64;
/// Largest number of characters that a message quotes from one field of a lock file.
const MAX_QUOTED: usize = 200;
/// Offset of the host's name in a lock file of ESX, in bytes.
const HOST_OFFSET: usize = 20;

/// Lock files that have been reported. An image is reopened whenever it has changed, and each warning appears once.
static REPORTED: LazyLock<Mutex<HashSet<PathBuf>>> = LazyLock::new(Mutex::default);

/// Checks for lock files next to the file at `path`. Warns a reader, once for each lock file.
///
/// Returns `Busy` for a writer.
pub(super) fn check(path: &Path, inode: u64, access: Access) -> Result<()> {
    // Both forms: the folder of a datastore may have been copied or mounted from either kind of product.
    for (lock_file, owner) in [hosted(path), esx(path, inode)].into_iter().flatten() {
        let (path, label) = (printable(path), printable(&lock_file));
        if access == Access::Write {
            let context = format!(
                "{path}: in use by VMware, or left after a crash: {label} exists{owner}; power the machine off, or remove \
                 {label} if no machine uses the disk"
            );
            return Err(Error::new(ErrorKind::Busy, context));
        }
        if lock(&REPORTED).insert(lock_file) {
            tracing::warn!("{path}: VMware may be writing to it, or left after a crash: {label} exists{owner}");
        }
    }
    Ok(())
}

/// Returns a lock file of Workstation, Player or Fusion, and a description of its owner.
///
/// An empty folder is not a lock.
fn hosted(path: &Path) -> Option<(PathBuf, String)> {
    let mut folder = path.as_os_str().to_owned();
    folder.push(".lck");
    let folder = PathBuf::from(folder);
    // Held open: another user may replace the folder by a link after it was listed.
    let flags = libc::O_DIRECTORY | libc::O_NOFOLLOW;
    let held = File::options().read(true).custom_flags(flags).open(&folder).ok()?;
    let names: Vec<_> = fs::read_dir(proc_path(&held))
        .ok()?
        // One is enough for the answer; the others could be millions in a hostile folder.
        .take(MAX_LOCK_FILES)
        .flatten()
        .map(|entry| entry.file_name())
        .collect();
    // `M*.lck` names the owner. Other names, such as `D*.lck`, still count as a lock.
    let first = names
        .iter()
        .find(|name| name.as_encoded_bytes().starts_with(b"M"))
        .or(names.first())?;
    let text = read_start(&proc_path(&held).join(first)).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let mut words = text.split_whitespace();
    let owner = match (words.next(), words.next()) {
        (Some(machine), Some(process)) => format!(" (machine {}, process {})", quoted(machine), quoted(process)),
        _ => String::new(),
    };
    Some((folder.join(first), owner))
}

/// Returns the lock file of an ESX host, and a description of the host.
fn esx(path: &Path, inode: u64) -> Option<(PathBuf, String)> {
    // The name holds the 8 bytes of the inode in little-endian order, as hexadecimal digits.
    // By inode, which the server of an NFS folder gives to every client alike.
    let lock_file = path.with_file_name(format!(".lck-{:016x}", inode.swap_bytes()));
    if !fs::symlink_metadata(&lock_file).ok()?.is_file() {
        return None;
    }
    let bytes = read_start(&lock_file).unwrap_or_default();
    let host = bytes
        .get(HOST_OFFSET..)
        .unwrap_or_default()
        .split(|&byte| byte == 0)
        .next()
        .unwrap_or_default();
    let owner = if host.is_empty() {
        String::new()
    } else {
        format!(" (host {})", quoted(&String::from_utf8_lossy(host)))
    };
    Some((lock_file, owner))
}

/// Reads the start of a lock file. Returns `None` if it is not a regular file.
fn read_start(lock_file: &Path) -> Option<Vec<u8>> {
    // Other users may be able to write to the folder: a symbolic link must not be followed, and the open of a FIFO must
    // not block.
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let file = File::options().read(true).custom_flags(flags).open(lock_file).ok()?;
    let mut text = Vec::new();
    file.metadata()
        .ok()?
        .is_file()
        .then(|| file.take(MAX_TEXT).read_to_end(&mut text))?
        .ok()?;
    Some(text)
}

/// Truncates and escapes a field of a lock file for a message.
fn quoted(word: &str) -> String {
    printable(word.chars().take(MAX_QUOTED).collect::<String>())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use nix::sys::stat::Mode;
    use nix::unistd::mkfifo;

    use super::*;

    #[test]
    fn a_folder_of_lock_files_is_found_with_its_owner() {
        let dir = tempfile::tempdir().unwrap();
        let (disk, folder) = (dir.path().join("x.vmdk"), dir.path().join("x.vmdk.lck"));
        assert_eq!(hosted(&disk), None);
        fs::create_dir(&folder).unwrap();
        assert_eq!(hosted(&disk), None, "an empty folder is not a lock");
        fs::write(folder.join("D1.lck"), "").unwrap();
        assert_eq!(hosted(&disk), Some((folder.join("D1.lck"), String::new())));
        let lock_file = folder.join("M12345.lck");
        fs::write(&lock_file, "anna\x1b[31m 4711-99(vmware-vmx) 1 X\0lc=1").unwrap();
        let owner = " (machine anna\\u{1b}[31m, process 4711-99(vmware-vmx))".to_owned();
        assert_eq!(hosted(&disk), Some((lock_file, owner)));
    }

    #[test]
    fn only_the_start_of_regular_lock_files_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("x.vmdk.lck");
        fs::create_dir(&folder).unwrap();
        let lock_file = folder.join("M1.lck");
        mkfifo(&lock_file, Mode::S_IRWXU).unwrap();
        assert_eq!(
            hosted(&dir.path().join("x.vmdk")),
            Some((lock_file.clone(), String::new()))
        );
        fs::remove_file(&lock_file).unwrap();
        symlink("/etc/passwd", &lock_file).unwrap();
        assert_eq!(read_start(&lock_file), None);
        fs::remove_file(&lock_file).unwrap();
        fs::write(&lock_file, vec![b'x'; 9000]).unwrap();
        assert_eq!(read_start(&lock_file).unwrap().len(), 4096);
        symlink(&folder, dir.path().join("y.vmdk.lck")).unwrap();
        assert_eq!(hosted(&dir.path().join("y.vmdk")), None);
    }

    #[test]
    fn the_lock_file_of_an_esx_host_is_found_by_the_inode() {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("x.vmdk");
        // The example in VMware's knowledge base.
        let (inode, lock_file) = (0x1_0009_03e0, dir.path().join(".lck-e003090001000000"));
        assert_eq!(esx(&disk, inode), None);
        fs::write(
            &lock_file,
            [&[0; 16][..], &[1, 0, 0, 0], b"esx.example.com\0\0\0"].concat(),
        )
        .unwrap();
        assert_eq!(
            esx(&disk, inode),
            Some((lock_file.clone(), " (host esx.example.com)".to_owned()))
        );
        assert_eq!(esx(&disk, inode + 1), None);
        fs::write(&lock_file, "").unwrap();
        assert_eq!(esx(&disk, inode), Some((lock_file, String::new())));
    }

    #[test]
    fn a_lock_file_refuses_a_writer_and_only_warns_a_reader() {
        let dir = tempfile::tempdir().unwrap();
        let (disk, folder) = (dir.path().join("x.vmdk"), dir.path().join("x.vmdk.lck"));
        check(&disk, 7, Access::Write).unwrap();
        let esx = dir.path().join(".lck-0700000000000000");
        for (lock_file, text, owner) in [
            (
                folder.join("M1.lck"),
                &b"anna 4711-99(vmware-vmx) 1 X\0"[..],
                "(machine anna, process 4711-99",
            ),
            (esx, b"                    esx.example.com\0", "(host esx.example.com)"),
        ] {
            fs::create_dir_all(lock_file.parent().unwrap()).unwrap();
            fs::write(&lock_file, text).unwrap();
            let error = check(&disk, 7, Access::Write).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Busy);
            for fragment in [
                disk.to_str().unwrap(),
                lock_file.to_str().unwrap(),
                owner,
                "power the machine off",
            ] {
                assert!(
                    error.to_string().contains(fragment),
                    "`{error}` does not contain `{fragment}`"
                );
            }
            check(&disk, 7, Access::Read).unwrap();
            fs::remove_file(&lock_file).unwrap();
            check(&disk, 7, Access::Write).unwrap();
        }
    }
}
