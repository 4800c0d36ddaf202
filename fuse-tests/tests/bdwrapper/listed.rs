//! A listed file is a block device, however a program got its descriptor.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;

use fuse_tests::harness::{Scratch, preload_library};

use crate::fixture::{Listed, compile, in_namespace, ready, sparse, wrapped};

/// Size of the listed file.
const BYTES: u64 = 3 << 20;

#[test]
fn a_listed_file_is_a_block_device_in_every_function() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let program = compile(&scratch, "listed", &[]);
    let (file, other) = (
        sparse(&scratch, "disk.raw", BYTES),
        sparse(&scratch, "other.raw", 5 << 20),
    );
    fs::set_permissions(&file, fs::Permissions::from_mode(0o640)).unwrap();
    let name = "/dev/sd/test";
    let disk = Listed {
        name,
        target: file.clone(),
    };
    let outcome = wrapped(&scratch, &[disk], 0)
        .arg(program)
        .arg(name)
        .arg(&file)
        .arg(BYTES.to_string())
        .arg(&other)
        .run()
        .ok();
    assert_eq!(outcome.stderr, "", "{outcome}");
    assert_eq!(fs::metadata(&file).unwrap().len(), BYTES);
    assert_eq!(fs::metadata(&other).unwrap().len(), 5 << 20);
}

/// "threads that open, duplicate, vfork and close at random, against a model"
#[test]
fn threads_and_vfork_children_know_every_descriptor() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let program = compile(&scratch, "threads", &[]);
    let disk = Listed {
        name: "/dev/hdx",
        target: sparse(&scratch, "disk.raw", BYTES),
    };
    let unlisted = scratch.write("unlisted", "");
    let outcome = wrapped(&scratch, &[disk], 0)
        .arg(program)
        .args(["/dev/hdx", &BYTES.to_string()])
        .arg(unlisted)
        .arg("4000")
        .run()
        .ok();
    assert_eq!(outcome.stderr, "", "{outcome}");
}

/// "under AT_SECURE only names without `..` whose every component and target belongs to root count"
#[test]
fn a_set_user_id_program_follows_only_names_of_root() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    scratch.open_to_all();
    // The linker looks for the library by its soname in a folder of root: /dev/lib of the namespace.
    let program = compile(
        &scratch,
        "secure",
        &[
            "-Wl,--no-as-needed",
            preload_library().to_str().unwrap(),
            "-Wl,-rpath,/dev/lib",
        ],
    );
    let mut disks = vec![];
    for (name, file) in [
        ("/dev/sd/root", "root.raw"),
        ("/dev/sd/user", "user.raw"),
        ("/dev/sd/link", "user/../third.raw"),
        ("/dev/sd/../hdz", "other.raw"),
    ] {
        scratch.mkdir("user");
        let target = scratch.path(file);
        fs::write(&target, [0; 512]).unwrap();
        disks.push(Listed { name, target });
    }
    for foreign in ["user", "user.raw"] {
        chown(scratch.path(foreign), Some(12345), None).unwrap();
    }
    assert_eq!(
        run_secure(&scratch, &program, &disks, "0755"),
        "secure 0 disk disk disk disk"
    );
    assert_eq!(
        run_secure(&scratch, &program, &disks, "4755"),
        "secure 1 disk file file file"
    );
}

/// Runs the program with this mode as a user; returns its answers.
#[track_caller]
fn run_secure(scratch: &Scratch, program: &Path, disks: &[Listed], mode: &str) -> String {
    let names: Vec<&str> = disks.iter().map(|disk| disk.name).collect();
    let script = r#"
        set -e
        mkdir /dev/lib
        install -m 644 "$1" /dev/lib/libvmware-bdwrapper.so.0
        install -m "$2" "$3" /dev/program
        shift 3
        exec setpriv --reuid 65534 --regid 65534 --clear-groups /dev/program "$@"
    "#;
    let outcome = in_namespace(scratch, disks)
        .arg(format!("VMWARE_BDWRAPPER_DEVICES={}", names.join(":")))
        .args(["sh", "-c", script, "sh"])
        .arg(preload_library())
        .arg(mode)
        .arg(program)
        .args(&names)
        .run()
        .ok();
    let words = outcome.stdout.lines().map(|line| match line.split_once(' ') {
        Some(("secure", _)) => line,
        Some((_, answer)) => answer,
        None => panic!("{outcome}"),
    });
    words.collect::<Vec<_>>().join(" ")
}
