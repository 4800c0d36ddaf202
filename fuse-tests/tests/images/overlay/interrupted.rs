//! Interrupted commits: the disk keeps its content, the base is protected, and the next commit completes the merge.

use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::Duration;

use fuse_tests::harness::{Scratch, poll_until, program};
use fuse_tests::make::model::Random;
use fuse_tests::model::{alone, read, writable};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::tempdir;
use vmdkfuse::block::Lba;
use vmdkfuse::config::DiskConfig;
use vmdkfuse::error::{Error, ErrorKind, Result};
use vmdkfuse::overlay::commit::{Commit, Next, Step};
use vmdkfuse::volume::{self};

use super::folder::{Folder, format};
use super::pair::{close, disk, go_on, reading};
use super::text;

/// Point at which a commit is interrupted: a name, a predicate, and n; the n-th matching step is the point.
type Interruption = (&'static str, fn(Step) -> bool, usize);

const INTERRUPTIONS: [Interruption; 9] = [
    ("marked", |s| s == Step::Marked, 1),
    ("told", |s| s == Step::Told, 1),
    ("begun", |s| s == Step::Begun, 1),
    ("first range", |s| matches!(s, Step::Copied(_)), 1),
    ("second range", |s| matches!(s, Step::Copied(_)), 2),
    ("tenth range", |s| matches!(s, Step::Copied(_)), 10),
    ("hundredth range", |s| matches!(s, Step::Copied(_)), 100),
    ("last range", |s| matches!(s, Step::Copied(_)), usize::MAX),
    ("closed", |s| s == Step::Closed, 1),
];

/// Runs a commit up to the interruption. With `crash` the callback fails there, and the files stay as they are;
/// otherwise it asks the commit to stop.
fn interrupt(disk: &DiskConfig, (_, at, nth): Interruption, crash: bool) -> Result<bool> {
    let commit = Commit::open(disk)?;
    let total = commit.total();
    let (mut seen, mut stop) = (0, false);
    commit.run(&mut |step| {
        seen += usize::from(at(step));
        let last = nth == usize::MAX && step == Step::Copied(total);
        stop |= at(step) && seen == nth || last;
        match (stop, crash) {
            (true, true) => Err(Error::corrupt("interrupted")),
            (true, false) => Ok(Next::Stop),
            (false, _) => Ok(Next::GoOn),
        }
    })
}

#[test]
fn a_commit_interrupted_at_any_step_is_completed_by_the_next() {
    let _alone = alone();
    let Some(folder) = Folder::new((3 << 20) + 512 * 5) else {
        return;
    };
    for base in &folder.bases() {
        let keep = tempdir().unwrap();
        copy_all(folder.scratch.root(), keep.path());
        for (point, seed) in INTERRUPTIONS.into_iter().zip(1..) {
            for crash in [true, false] {
                copy_all(keep.path(), folder.scratch.root());
                interrupt_and_complete(&folder, base, point, seed, crash);
                fs::remove_file(&folder.cow).unwrap();
            }
        }
    }
}

/// Interrupts a commit, writes to the pair, interrupts a second commit, and completes a third.
fn interrupt_and_complete(folder: &Folder, base: &Path, point: Interruption, seed: u64, crash: bool) {
    let what = format!("{}, {}, crash {crash}", base.display(), point.0);
    let mut pair = folder.changed(base, seed, 300);
    let done = interrupt(&pair.disk, point, crash);
    let has_cid = format(base) == "vmdk";
    match (crash, point.0) {
        (_, "told" | "begun") if !has_cid => assert!(done.unwrap(), "{what}"),
        (true, _) => assert_eq!(done.unwrap_err().to_string(), "interrupted", "{what}"),
        (false, "closed") => assert!(done.unwrap(), "{what}"),
        (false, _) => assert!(!done.unwrap(), "{what}"),
    }
    pair.same(&what);
    // The pair stays writable, and the next commit may be interrupted too.
    pair.change(&mut Random::new(seed + 100), 40);
    let _ = interrupt(&pair.disk, INTERRUPTIONS[seed as usize % INTERRUPTIONS.len()], true);
    pair.same(&format!("{what}, twice"));
    pair.merge();
    pair.merged(&what);
}

/// Copies the files of one folder over those of another folder.
fn copy_all(from: &Path, to: &Path) {
    for entry in fs::read_dir(from).unwrap().flatten() {
        fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

/// Returns the offset and the value of a descriptor key in a file.
fn setting(path: &Path, key: &str) -> (u64, String) {
    let bytes = fs::read(path).unwrap();
    let key = format!("\n{key}");
    let at = bytes.windows(key.len()).position(|w| w == key.as_bytes()).unwrap() + key.len();
    let end = bytes[at..].iter().position(|b| *b == b'\n').unwrap();
    (at as u64, String::from_utf8(bytes[at..at + end].to_vec()).unwrap())
}

#[test]
fn a_torn_cid_is_accepted_while_a_commit_is_unfinished() {
    let _alone = alone();
    let Some(folder) = Folder::new(2 << 20) else { return };
    let base = folder.sparse("base.vmdk");
    let pair = folder.changed(&base, 1, 60);
    interrupt(&pair.disk, INTERRUPTIONS[1], true).unwrap_err();
    let ((at, old), (_, new)) = (setting(&base, "CID="), setting(&folder.cow, "parentCID="));
    // qemu omits leading zeroes.
    let new = format!("{:0width$x}", u32::from_str_radix(&new, 16).unwrap(), width = old.len());
    assert_ne!(old, new);
    let write = |cid: &str| {
        File::options()
            .write(true)
            .open(&base)
            .unwrap()
            .write_all_at(cid.as_bytes(), at)
            .unwrap();
    };
    for digits in 0..=old.len() {
        write(&format!("{}{}", &new[..digits], &old[digits..]));
        pair.same(&format!("{digits} digits"));
    }
    let other = if old.starts_with('0') || new.starts_with('0') {
        "1"
    } else {
        "0"
    };
    let other = if old.starts_with(other) || new.starts_with(other) {
        "2"
    } else {
        other
    };
    write(&format!("{other}{}", &old[1..]));
    assert_eq!(volume::open(&pair.disk).unwrap_err().kind(), ErrorKind::Corrupt);
    write(&format!("{}{}", &new[..4], &old[4..]));
    pair.merge();
    pair.merged("a mixture");
}

#[test]
fn a_base_whose_commit_is_unfinished_is_protected_under_both_cids() {
    let _alone = alone();
    let Some(folder) = Folder::new(2 << 20) else { return };
    for point in INTERRUPTIONS.iter().take(4) {
        let base = folder.sparse("base.vmdk");
        let pair = folder.changed(&base, 1, 60);
        interrupt(&pair.disk, *point, true).unwrap_err();
        let error = writable(&base).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Policy, "{}: {error}", point.0);
        fs::remove_file(&folder.cow).unwrap();
    }
}

/// Starts `vmdkfuse --commit`.
fn start_commit(base: &Path, cow: &Path, stderr: Stdio) -> Child {
    let [file, overlay] = [("file=", base), ("cow=", cow)].map(|(key, path)| {
        let mut word = OsString::from(key);
        word.push(path);
        word
    });
    let mut command = Command::new(program());
    command.args(["--commit".into(), overlay, file]);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(stderr)
        .spawn()
        .unwrap()
}

/// Runs a commit and kills it after `time`. Returns true if it had already succeeded.
fn commit_for(base: &Path, cow: &Path, time: Option<Duration>) -> bool {
    let mut child = start_commit(base, cow, Stdio::null());
    if let Some(time) = time {
        thread::sleep(time);
        child.kill().unwrap();
    }
    let mut status = None;
    if !poll_until(Duration::from_secs(60), || {
        status = child.try_wait().unwrap();
        status.is_some()
    }) {
        child.kill().unwrap();
        child.wait().unwrap();
        panic!("the commit has not ended after 60 s");
    }
    status.unwrap().success()
}

#[test]
fn a_commit_that_is_killed_at_any_moment_is_completed_by_the_next() {
    let _alone = alone();
    let Some(folder) = Folder::new(24 << 20) else { return };
    let mut random = Random::new(11);
    let mut killed = 0;
    for base in &folder.bases() {
        let mut pair = folder.changed(base, 5, 100);
        let image = pair.open();
        let data: Vec<u8> = (0..8 << 20).map(|i: u32| (i >> 9) as u8 | 1).collect();
        image.disk().writer().unwrap().write_at(Lba(11), &data).unwrap();
        pair.model.write(11, &data);
        close(image);
        // Upper limit of the random time before the kill, in µs. It adapts to the time that a commit takes.
        let mut limit = 40_000;
        for _ in 0..12 {
            let ended = commit_for(base, &folder.cow, Some(Duration::from_micros(random.below(limit))));
            killed += u32::from(!ended);
            limit = if ended { limit * 2 / 3 } else { limit * 4 / 3 };
            pair.same(&format!("{} after a kill", base.display()));
        }
        assert!(commit_for(base, &folder.cow, None));
        pair.merged(text(base));
        fs::remove_file(&folder.cow).unwrap();
    }
    assert!(killed >= 4, "only {killed} commits were killed before their end");
}

/// Returns true if the process blocks SIGTERM.
fn blocks_sigterm(pid: u32) -> bool {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let mask = text
        .lines()
        .find_map(|line| line.strip_prefix("SigBlk:"))
        .unwrap_or("0")
        .trim()
        .to_owned();
    u64::from_str_radix(&mask, 16).unwrap_or(0) & (1 << (libc::SIGTERM - 1)) != 0
}

/// Starts a commit and ends it by SIGTERM once it blocks the signal: from then on it polls for it between ranges instead of
/// being killed by it.
fn terminate_commit(base: &Path, cow: &Path) -> Output {
    let child = start_commit(base, cow, Stdio::piped());
    let blocked = poll_until(Duration::from_secs(60), || blocks_sigterm(child.id()));
    // Fails if it has ended meanwhile; it is not waited for yet, so no other process has its number.
    let _ = kill(Pid::from_raw(i32::try_from(child.id()).unwrap()), Signal::SIGTERM);
    let output = child.wait_with_output().unwrap();
    assert!(blocked, "the signal was never blocked");
    output
}

#[test]
fn a_commit_stops_between_two_ranges_on_sigterm() {
    let _alone = alone();
    let scratch = Scratch::new();
    let [base, cow] = ["base.img", "cow.vmdk"].map(|name| scratch.path(name));
    File::create(&base).unwrap().set_len(256 << 20).unwrap();
    let disk = disk(&base, &cow);
    let data: Vec<u8> = (0..1 << 20).map(|i: u32| (i >> 9) as u8 | 1).collect();
    // On a busy machine the commit may be complete before the signal is sent: then it shows nothing.
    let in_the_middle = (0..20).find_map(|_| {
        let _ = fs::remove_file(&cow);
        let image = volume::open(&disk).unwrap();
        for mib in 0..256 {
            image.disk().writer().unwrap().write_at(Lba(mib << 11), &data).unwrap();
        }
        close(image);
        Some(terminate_commit(&base, &cow)).filter(|output| !output.status.success())
    });
    let output = in_the_middle.expect("each commit was complete before the signal");
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    for part in [
        "SIGTERM",
        "of 268435456 bytes",
        "is not merged whole",
        "--commit again completes it",
    ] {
        assert!(stderr.contains(part), "`{stderr}` does not contain {part}");
    }
    let image = volume::open(&reading(&disk)).unwrap();
    for mib in [0, 100, 255] {
        assert!(read(image.disk().as_ref(), mib << 11, 2048) == data);
    }
    drop(image);
    assert!(Commit::open(&disk).unwrap().run(&mut go_on).unwrap());
    let bytes = fs::read(&base).unwrap();
    assert!(bytes.chunks_exact(1 << 20).all(|mib| mib == data));
}
