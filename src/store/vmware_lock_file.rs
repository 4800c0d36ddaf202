//! The marks that VMware's products leave beside a file that they have open.
//!
//! ```text
//!   disk.vmdk.lck/M12345.lck    Workstation, Player, Fusion: `machine process number X|S …`, as text
//!   .lck-<16 digits>            ESX on NFS: the file's inode, lowest byte first; its host's name from byte 20 on
//! ```
//! They stay after a crash, and from here nobody can tell whether that machine is alive. So a reader is only
//! warned; a writer is refused.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{LazyLock, Mutex, PoisonError};

use super::{Access, printable};
use crate::error::{Error, ErrorKind, Result};

/// The most that is read of a mark. They have 512 bytes.
const MAX_TEXT: u64 = 4096;
/// The most names that are looked at in a folder of marks.
const MAX_MARKS: usize = 64;
/// The most characters of a mark that are shown.
const MAX_SHOWN: usize = 200;
/// Where the host's name starts in a mark of ESX.
const HOST: usize = 20;

/// The marks that were warned of: an image is opened again when it has changed.
static SAID: LazyLock<Mutex<HashSet<PathBuf>>> = LazyLock::new(Mutex::default);

/// Looks for marks beside the file at `path`: warns a reader, of each only once.
///
/// Errors: `Busy` for a writer.
pub(super) fn look(path: &Path, inode: u64, access: Access) -> Result<()> {
    for (mark, who) in [hosted(path), esx(path, inode)].into_iter().flatten() {
        let (path, shown) = (printable(path), printable(&mark));
        if access == Access::Write {
            let context = format!(
                "{path}: VMware uses it, or ended badly: {shown} is there{who}; lock=off writes to it all the same"
            );
            return Err(Error::new(ErrorKind::Busy, context));
        }
        if SAID.lock().unwrap_or_else(PoisonError::into_inner).insert(mark) {
            tracing::warn!("{path}: VMware may be writing to it, or ended badly: {shown} is there{who}");
        }
    }
    Ok(())
}

/// A folder of marks with something in it, and who made them.
fn hosted(path: &Path) -> Option<(PathBuf, String)> {
    let mut folder = path.as_os_str().to_owned();
    folder.push(".lck");
    let folder = PathBuf::from(folder);
    if !fs::symlink_metadata(&folder).ok()?.is_dir() {
        return None;
    }
    let names: Vec<_> = fs::read_dir(&folder)
        .ok()?
        .take(MAX_MARKS)
        .flatten()
        .map(|entry| entry.file_name())
        .collect();
    let first = names
        .iter()
        .find(|name| name.as_encoded_bytes().starts_with(b"M"))
        .or(names.first())?;
    let mark = folder.join(first);
    let text = read(&mark).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let mut words = text.split_whitespace();
    let who = match (words.next(), words.next()) {
        (Some(machine), Some(process)) => format!(", of machine {}, process {}", shown(machine), shown(process)),
        _ => String::new(),
    };
    Some((mark, who))
}

/// The mark of an ESX host, and which one.
fn esx(path: &Path, inode: u64) -> Option<(PathBuf, String)> {
    let mark = path.with_file_name(format!(".lck-{:016x}", inode.swap_bytes()));
    if !fs::symlink_metadata(&mark).ok()?.is_file() {
        return None;
    }
    let bytes = read(&mark).unwrap_or_default();
    let host = bytes
        .get(HOST..)
        .unwrap_or_default()
        .split(|&byte| byte == 0)
        .next()
        .unwrap_or_default();
    let who = if host.is_empty() {
        String::new()
    } else {
        format!(", of host {}", shown(&String::from_utf8_lossy(host)))
    };
    Some((mark, who))
}

/// The start of a mark, if it is a plain file.
fn read(mark: &Path) -> Option<Vec<u8>> {
    // Somebody may put a FIFO there.
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let file = File::options().read(true).custom_flags(flags).open(mark).ok()?;
    let mut text = Vec::new();
    file.metadata()
        .ok()?
        .is_file()
        .then(|| file.take(MAX_TEXT).read_to_end(&mut text))?
        .ok()?;
    Some(text)
}

/// Somebody else's word in a message.
fn shown(word: &str) -> String {
    printable(word.chars().take(MAX_SHOWN).collect::<String>())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use nix::sys::stat::Mode;
    use nix::unistd::mkfifo;

    use super::*;

    #[test]
    fn a_folder_of_marks_is_seen_with_its_owner() {
        let dir = tempfile::tempdir().unwrap();
        let (disk, folder) = (dir.path().join("x.vmdk"), dir.path().join("x.vmdk.lck"));
        assert_eq!(hosted(&disk), None);
        fs::create_dir(&folder).unwrap();
        assert_eq!(hosted(&disk), None, "an empty folder is no lock");
        fs::write(folder.join("D1.lck"), "").unwrap();
        assert_eq!(hosted(&disk), Some((folder.join("D1.lck"), String::new())));
        let mark = folder.join("M12345.lck");
        fs::write(&mark, "anna\x1b[31m 4711-99(vmware-vmx) 1 X\0lc=1").unwrap();
        let who = ", of machine anna\\u{1b}[31m, process 4711-99(vmware-vmx)".to_owned();
        assert_eq!(hosted(&disk), Some((mark, who)));
    }

    #[test]
    fn marks_are_read_with_care() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("x.vmdk.lck");
        fs::create_dir(&folder).unwrap();
        let mark = folder.join("M1.lck");
        mkfifo(&mark, Mode::S_IRWXU).unwrap();
        assert_eq!(hosted(&dir.path().join("x.vmdk")), Some((mark.clone(), String::new())));
        fs::remove_file(&mark).unwrap();
        symlink("/etc/passwd", &mark).unwrap();
        assert_eq!(read(&mark), None);
        fs::remove_file(&mark).unwrap();
        fs::write(&mark, vec![b'x'; 9000]).unwrap();
        assert_eq!(read(&mark).unwrap().len(), 4096);
        symlink(&folder, dir.path().join("y.vmdk.lck")).unwrap();
        assert_eq!(hosted(&dir.path().join("y.vmdk")), None);
    }

    #[test]
    fn the_mark_of_an_esx_host_is_seen_by_the_inode() {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("x.vmdk");
        // the example of the maker's knowledge base
        let (inode, mark) = (0x1_0009_03e0, dir.path().join(".lck-e003090001000000"));
        assert_eq!(esx(&disk, inode), None);
        fs::write(&mark, [&[0; 16][..], &[1, 0, 0, 0], b"esx.example.com\0\0\0"].concat()).unwrap();
        assert_eq!(
            esx(&disk, inode),
            Some((mark.clone(), ", of host esx.example.com".to_owned()))
        );
        assert_eq!(esx(&disk, inode + 1), None);
        fs::write(&mark, "").unwrap();
        assert_eq!(esx(&disk, inode), Some((mark, String::new())));
    }

    #[test]
    fn a_mark_keeps_a_writer_out_and_only_warns_a_reader() {
        let dir = tempfile::tempdir().unwrap();
        let (disk, folder) = (dir.path().join("x.vmdk"), dir.path().join("x.vmdk.lck"));
        look(&disk, 7, Access::Write).unwrap();
        let esx = dir.path().join(".lck-0700000000000000");
        for (mark, text, who) in [
            (
                folder.join("M1.lck"),
                &b"anna 4711-99(vmware-vmx) 1 X\0"[..],
                "of machine anna, process 4711-99",
            ),
            (esx, b"                    esx.example.com\0", "of host esx.example.com"),
        ] {
            fs::create_dir_all(mark.parent().unwrap()).unwrap();
            fs::write(&mark, text).unwrap();
            let error = look(&disk, 7, Access::Write).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Busy);
            for says in [
                disk.to_str().unwrap(),
                mark.to_str().unwrap(),
                who,
                "lock=off writes to it all the same",
            ] {
                assert!(error.to_string().contains(says), "`{error}` does not say `{says}`");
            }
            look(&disk, 7, Access::Read).unwrap();
            fs::remove_file(&mark).unwrap();
            look(&disk, 7, Access::Write).unwrap();
        }
    }
}
