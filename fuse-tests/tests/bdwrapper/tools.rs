//! Real tools on listed disks: a loop device, and a raw file of a mount.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;

use fuse_tests::harness::{Cmd, LoopDevice, Outcome, Scratch, need, need_qemu, qemu_img};

use crate::fixture::{Listed, in_namespace, ready, sparse, wrapped};

const IDE: &str = "/dev/hdx";
const SCSI: &str = "/dev/sd/test";

/// Size of the disks, and its number of sectors.
const BYTES: u64 = 64 << 20;
const SECTORS: u64 = BYTES / 512;

fn listed(name: &'static str, target: &Path) -> [Listed; 1] {
    [Listed {
        name,
        target: target.to_owned(),
    }]
}

/// Runs a tool on the listed disk, which must succeed.
#[track_caller]
fn tool(scratch: &Scratch, disk: &[Listed; 1], command: &str) -> Outcome {
    wrapped(scratch, disk, 0)
        .args(["sh", "-c", command, "sh", disk[0].name])
        .run()
        .ok()
}

/// Runs a tool on the listed disk, and checks that it prints each of `words`.
#[track_caller]
fn prints(scratch: &Scratch, disk: &[Listed; 1], command: &str, words: &[&str]) {
    let outcome = tool(scratch, disk, command);
    for word in words {
        assert!(outcome.stdout.contains(word), "{word:?} is missing: {outcome}");
    }
}

/// Creates `disk.vmdk`, a sparse disk of `BYTES`.
#[track_caller]
fn create_vmdk(scratch: &Scratch) {
    let image = scratch.path("disk.vmdk");
    qemu_img(["create", "-f", "vmdk", image.to_str().unwrap(), "64M"]);
}

fn need_tools() -> bool {
    ready()
        && need_qemu()
        && ["hdparm", "sg_inq", "smartctl", "sfdisk", "blockdev"]
            .into_iter()
            .all(need)
}

/// Checks what tools say about a disk of `BYTES`.
#[track_caller]
fn check_tools(scratch: &Scratch, target: &Path) {
    let ide = listed(IDE, target);
    let lba = format!("LBA48  user addressable sectors:      {SECTORS}");
    let identify = ["VMDKFUSE BDWRAPPER DISK", &lba, "Checksum: correct", "FLUSH_CACHE_EXT"];
    prints(scratch, &ide, r#"hdparm -I "$1""#, &identify);
    let geometry = format!("geometry      = 8/255/63, sectors = {SECTORS}, start = 0");
    prints(scratch, &ide, r#"hdparm -g "$1""#, &[&geometry]);
    for disk in [ide, listed(SCSI, target)] {
        let report = format!("rw   256   512  4096               0        {BYTES}   {}", disk[0].name);
        prints(scratch, &disk, r#"blockdev --report "$1""#, &[&report]);
        let sizes = format!("{BYTES}\n{SECTORS}\n512\n512\n0\n");
        let blockdev = r#"blockdev --getsize64 --getsz --getss --getpbsz --getalignoff --flushbufs --rereadpt "$1""#;
        prints(scratch, &disk, blockdev, &[&sizes]);
        let info = format!("virtual size: 64 MiB ({BYTES} bytes)");
        prints(scratch, &disk, r#"qemu-img info "$1""#, &[&info, "host_device"]);
        prints(scratch, &disk, r#"fdisk -l "$1""#, &[&format!("{SECTORS} sectors")]);
    }
    let scsi = listed(SCSI, target);
    let inquiry = ["VMDKFUSE", "BDWRAPPER DISK", "[SPC-3]", "2548D97CF7AE8392"];
    prints(scratch, &scsi, r#"sg_inq "$1""#, &inquiry);
    let capacity = format!("Last LBA={}", SECTORS - 1);
    prints(scratch, &scsi, r#"sg_readcap "$1""#, &[&capacity]);
    prints(scratch, &scsi, r#"sg_readcap --16 "$1""#, &[&capacity, "exponent=0"]);
    let designator = ["BDWRAPPER DISK  2548D97CF7AE8392", "0x32548d97cf7ae839"];
    prints(scratch, &scsi, r#"sg_vpd --all "$1""#, &designator);
    prints(scratch, &scsi, r#"sg_modes --all "$1""#, &["WP=0", "Caching"]);
    prints(
        scratch,
        &scsi,
        r#"sg_luns "$1" && sg_turs "$1" && sg_sync "$1""#,
        &["1 lun entry"],
    );
    let smart = ["VMDKFUSE", "67,108,864 bytes", "2548D97CF7AE8392"];
    prints(scratch, &scsi, r#"smartctl -d scsi -i "$1""#, &smart);
}

#[test]
fn tools_accept_a_loop_device() {
    if !need_tools() {
        return;
    }
    let scratch = Scratch::new();
    let device = LoopDevice::attach(&sparse(&scratch, "disk.raw", BYTES));
    check_tools(&scratch, device.path());
}

#[test]
fn tools_accept_a_file_of_a_mount() {
    if !need_tools() {
        return;
    }
    let scratch = Scratch::new();
    create_vmdk(&scratch);
    let mount = scratch.mount().file("disk.vmdk").start();
    check_tools(&scratch, &mount.file("disk.raw"));
    mount.unmount();
}

/// "partitioned and formatted under it, verified after the unmount"
#[test]
fn a_disk_is_partitioned_and_formatted_through_the_library() {
    if !need_tools() || !need("mkfs.ext4") {
        return;
    }
    let scratch = Scratch::new();
    create_vmdk(&scratch);
    let tree = scratch.mkdir("tree");
    scratch.write("tree/greeting", "hello\n");
    let mount = scratch.mount().file("disk.vmdk").start();
    let disk = listed(SCSI, &mount.file("disk.raw"));
    let table = r#"printf 'label: gpt\nstart=2048,size=40M\n' | sfdisk "$1""#;
    prints(
        &scratch,
        &disk,
        table,
        &["OK", "The partition table has been altered", "Syncing disks"],
    );
    prints(&scratch, &disk, r#"fdisk -l "$1""#, &["40M Linux filesystem"]);
    let format = format!(r#"mkfs.ext4 -q -E offset=1048576 -d {} "$1" 40960k"#, tree.display());
    tool(&scratch, &disk, &format);
    mount.unmount();

    let mount = scratch.mount().arg("-r").file("disk.vmdk").start();
    let raw = mount.file("disk.raw");
    let table = Cmd::new("sfdisk").arg("--verify").arg(&raw).run().ok();
    assert!(table.stdout.contains("No errors detected"), "{table}");
    let inside = format!("{}?offset=1048576", raw.display());
    Cmd::new("e2fsck").args(["-fn", &inside]).run().ok();
    let greeting = Cmd::new("debugfs").args(["-R", "cat /greeting", &inside]).run().ok();
    assert_eq!(greeting.stdout, "hello\n");
    mount.unmount();
}

/// "`dd of=/dev/sd/test` keeps every byte behind what it wrote"
#[test]
fn dd_keeps_what_it_does_not_write() {
    if !need_tools() {
        return;
    }
    let scratch = Scratch::new();
    let old: Vec<u8> = (0..1 << 20_u32).map(|i| (i / 512) as u8 | 1).collect();
    scratch.write("image.raw", &old);
    scratch.write("new", [0xee; 5000]);
    for convert in ["none", "notrunc", "fsync"] {
        scratch.write("image.raw", &old);
        let mount = scratch.mount().file("image.raw").start();
        let disk = listed(SCSI, &mount.file("image.raw"));
        let convert = if convert == "none" {
            String::new()
        } else {
            format!("conv={convert}")
        };
        let dd = format!(
            r#"dd status=none if={} of="$1" bs=4096 {convert}"#,
            scratch.path("new").display()
        );
        tool(&scratch, &disk, &dd);
        // A shell's redirection, and a language's file object.
        tool(&scratch, &disk, r#"bash -c 'printf shell >"$1"' bash "$1""#);
        tool(
            &scratch,
            &disk,
            r#"python3 -c 'import sys; open(sys.argv[1], "wb").write(b"py")' "$1""#,
        );
        mount.unmount();
        let new = fs::read(scratch.path("image.raw")).unwrap();
        assert_eq!(new.len(), old.len(), "{convert}");
        assert!(new.starts_with(b"pyell\xee") && new[4999] == 0xee, "{convert}");
        assert!(new[5000..] == old[5000..], "{convert}");
    }
}

#[test]
fn a_write_through_the_library_reaches_a_device() {
    if !need_tools() {
        return;
    }
    let scratch = Scratch::new();
    let file = sparse(&scratch, "disk.raw", BYTES);
    let device = LoopDevice::attach(&file);
    let disk = listed(IDE, device.path());
    tool(&scratch, &disk, r#"printf 'label: dos\n,10M,L\n' | sfdisk "$1""#);
    tool(
        &scratch,
        &disk,
        r#"printf hello | dd status=none of="$1" bs=512 seek=2048 oflag=seek_bytes conv=fsync"#,
    );
    drop(device);
    let mut bytes = [0; 5];
    fs::File::open(&file).unwrap().read_exact_at(&mut bytes, 2048).unwrap();
    assert_eq!(&bytes, b"hello");
    let table = Cmd::new("sfdisk").arg("--dump").arg(&file).run().ok();
    assert!(table.stdout.contains("size=       20480, type=83"), "{table}");
}

/// "No variable, no effect"; "-1 nothing, 0 errors, 1 the default, 10 what it found at start, 100 changes of descriptors,
/// 1000 each captured ioctl; on stderr"
#[test]
fn the_log_follows_its_level() {
    if !need_tools() {
        return;
    }
    let scratch = Scratch::new();
    let mut disks = listed(SCSI, &sparse(&scratch, "disk.raw", BYTES)).to_vec();
    disks.push(Listed {
        name: "/dev/hd/missing",
        target: scratch.path("nothing"),
    });
    let log = |level| {
        let outcome = wrapped(&scratch, &disks, level)
            .args(["blockdev", "--getsize64", SCSI])
            .run()
            .ok();
        assert_eq!(outcome.stdout, format!("{BYTES}\n"));
        outcome.stderr
    };
    let missing = "vmware-bdwrapper: /dev/hd/missing: cannot be looked up: error 2; ";
    let words = [
        (1, missing),
        (
            10,
            "vmware-bdwrapper: /dev/sd/test: SCSI disk, file, shown as block device 122:951186\n",
        ),
        (100, "vmware-bdwrapper: /dev/sd/test: descriptor 3 opened\n"),
        (
            1000,
            "vmware-bdwrapper: /dev/sd/test: ioctl 0x80081272 on descriptor 3: answered\n",
        ),
    ];
    for level in [-1, 0, 1, 10, 100, 1000] {
        let text = log(level);
        assert!(text.is_empty() || level >= 0, "{text}");
        for (least, word) in words {
            assert_eq!(text.contains(word), level >= least, "level {level}, {word:?}: {text}");
        }
    }
    let library = format!("LD_PRELOAD={}", fuse_tests::harness::preload_library().display());
    let outcome = in_namespace(&scratch, &disks)
        .arg(library)
        .args(["blockdev", "--getsize64", SCSI])
        .run();
    assert_ne!(
        outcome.ended.code,
        Some(0),
        "without the list a file is no disk: {outcome}"
    );
    assert!(!outcome.stderr.contains("bdwrapper"), "{outcome}");
}

/// "bash, python3 and git unharmed under it"
#[test]
fn programs_that_use_no_disk_are_unharmed() {
    if !ready() || !need("git") || !need("python3") {
        return;
    }
    const SCRIPT: &str = r#"
        set -e
        cd "$1"
        mkdir repository && cd repository
        git init --quiet . && git config user.name a && git config user.email a@example.com
        for i in $(seq 20); do echo "line $i" >>file; git add file; git commit --quiet -m "$i"; done
        git gc --quiet && git fsck --strict && git log --oneline | wc -l
        echo short >file; wc -c <file; : >file; wc -c <file
        python3 - <<'PYTHON'
import os, subprocess, tempfile, threading
with tempfile.NamedTemporaryFile() as file:
    file.write(b"0123456789"); file.flush(); file.truncate(4)
    print(os.stat(file.name).st_size, os.fstat(file.fileno()).st_mode & 0o170000)
    open(file.name, "w").close()
    print(os.path.getsize(file.name))
answers = []
def run(i): answers.append(subprocess.run(["echo", str(i)], capture_output=True, text=True).stdout)
threads = [threading.Thread(target=run, args=(i,)) for i in range(20)]
[t.start() for t in threads]; [t.join() for t in threads]
print(sorted(answers, key=int)[-1])
PYTHON
        cat <(echo from a pipe) | tr a-z A-Z
    "#;
    let scratch = Scratch::new();
    let disk = listed(SCSI, &sparse(&scratch, "disk.raw", BYTES));
    let run = |command: Cmd| {
        let folder = scratch.mkdir("work");
        let outcome = command.args(["bash", "-c", SCRIPT, "bash"]).arg(&folder).run().ok();
        fs::remove_dir_all(folder).unwrap();
        (outcome.stdout, outcome.stderr)
    };
    let expected = run(in_namespace(&scratch, &disk));
    assert_eq!(run(wrapped(&scratch, &disk, 1000)).0, expected.0);
    assert_eq!(run(wrapped(&scratch, &disk, 1)), expected);
}
