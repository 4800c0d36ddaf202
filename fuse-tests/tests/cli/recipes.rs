//! doc/RECIPES.md: every recipe is run as written.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use fuse_tests::harness::{Cmd, Scratch, need, need_fuse, need_root, program};

/// A recipe: its title and its commands.
#[derive(Debug)]
struct Recipe {
    title: String,
    commands: String,
}

/// Returns the recipes of the document that have a block of `sh`.
fn recipes(text: &str) -> Vec<Recipe> {
    let mut found = Vec::new();
    for section in text.split("\n## ").skip(1) {
        let title = section.lines().next().unwrap().to_owned();
        let blocks: Vec<&str> = section
            .split("\n```sh\n")
            .skip(1)
            .map(|block| block.split("\n```").next().unwrap())
            .collect();
        if !blocks.is_empty() {
            let commands = blocks.join("\n");
            found.push(Recipe { title, commands });
        }
    }
    found
}

/// Makes the images that the document speaks of, and the mount namespace in which the helpers are installed.
const PROLOGUE: &str = r#"
cd "$1"
mkdir -p mnt fs root/etc upper run made
echo fedora >root/etc/hostname
mount --bind run /run
mount -t tmpfs none upper
mkdir upper/u upper/w
mount -t overlay -o lowerdir=/usr/sbin,upperdir=upper/u,workdir=upper/w overlay /usr/sbin
cp "$2" /usr/sbin/vmdkfuse
for helper in mount umount; do ln -sf vmdkfuse /usr/sbin/$helper.vmdkfuse; done
mount -t tmpfs none /mnt
touch fstab
mount --bind fstab /etc/fstab

truncate -s 64M made/disk
echo 'start=2048, type=83' | sfdisk -q made/disk
truncate -s 62M made/partition
mkfs.ext4 -q -d root made/partition
dd if=made/partition of=made/disk bs=1M seek=1 conv=notrunc status=none
# A boot sector that resets the machine, so that `qemu -no-reboot` ends.
printf '\260\376\346\144\364' | dd of=made/disk conv=notrunc status=none
qemu-img convert -f raw -O vmdk made/disk Fedora.vmdk
vmdkfuse mnt file=Fedora.vmdk cow=Fedora-000001.vmdk
printf changed | dd of=mnt/Fedora.raw bs=1M seek=63 conv=notrunc status=none
vmdkfuse --unmount mnt
vmdkfuse --create data.vmdk create-size=8M
qemu-img convert -f raw -O vmdk -o subformat=streamOptimized made/disk machine-disk1.vmdk
tar -cf machine.ova machine-disk1.vmdk
rm machine-disk1.vmdk
trap 'vmdkfuse --unmount mnt fs >/dev/null 2>&1 || :' EXIT
"#;

/// "`doc/RECIPES.md`, each run as written by a test"
#[test]
fn recipes_run_as_written() {
    let tools = [
        "sfdisk",
        "guestfish",
        "qemu-img",
        "qemu-nbd",
        "qemu-system-x86_64",
        "nbdkit",
        "nbdcopy",
        "restic",
        "findmnt",
    ];
    if !need_fuse() || !need_root() || !tools.iter().all(|tool| need(tool)) {
        return;
    }
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../doc/RECIPES.md")).unwrap();
    let recipes = recipes(&text);
    assert!(recipes.len() >= 10, "{recipes:?}");
    for Recipe { title, commands } in recipes {
        let (scratch, started) = (Scratch::new(), Instant::now());
        let script = format!("set -eu\n{PROLOGUE}\nset -x\n{commands}\n");
        let outcome = Cmd::new("unshare")
            .args(["-m", "--propagation", "private", "sh", "-c", &script, "recipe"])
            .arg(scratch.root())
            .arg(program())
            .env("HOME", scratch.root().to_str().unwrap())
            // The environment, not the recipes: a virtual machine here may have no KVM.
            .env("LIBGUESTFS_BACKEND", "direct")
            .env("LIBGUESTFS_BACKEND_SETTINGS", "force_tcg")
            .deadline(Duration::from_secs(200))
            .run();
        eprintln!("{title}: {:?}", started.elapsed());
        assert_eq!(outcome.ended.code, Some(0), "{title}: {outcome}");
    }
}

/// Returns all code of the program, with the line continuations of its texts removed.
fn sources(dir: &Path) -> String {
    let mut all = String::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            all += &sources(&path);
        } else if path.extension().is_some_and(|kind| kind == "rs") {
            let text = fs::read_to_string(&path).unwrap();
            let lines: Vec<&str> = text.split("\\\n").collect();
            all += lines[0];
            lines[1..].iter().for_each(|line| all += line.trim_start());
        }
    }
    all
}

/// doc/TROUBLESHOOTING.md: "Each heading below is a part of a message"
#[test]
fn messages_that_are_explained_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let (text, sources) = (
        fs::read_to_string(root.join("doc/TROUBLESHOOTING.md")).unwrap(),
        sources(&root.join("src")),
    );
    let headings: Vec<&str> = text
        .lines()
        .filter_map(|line| line.strip_prefix("### `")?.strip_suffix('`'))
        .collect();
    assert!(headings.len() > 15, "{headings:?}");
    for heading in headings {
        assert!(sources.contains(heading), "no message has {heading:?}");
    }
}

/// README: a link to a file leads to one.
#[test]
fn links_of_the_documents_lead_to_files() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    for document in [
        "README.md",
        "doc/GUIDE.md",
        "doc/RECIPES.md",
        "doc/TROUBLESHOOTING.md",
        "doc/PERFORMANCE.md",
    ] {
        let path = root.join(document);
        let text = fs::read_to_string(&path).unwrap();
        for target in text
            .split("](")
            .skip(1)
            .map(|rest| rest.split([')', '#']).next().unwrap())
        {
            let found = target.is_empty() || path.parent().unwrap().join(target).exists();
            assert!(found || target.contains("://"), "{document}: {target}");
        }
    }
}
