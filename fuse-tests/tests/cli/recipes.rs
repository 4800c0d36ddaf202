//! doc/RECIPES.md: every recipe is run as written.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use fuse_tests::harness::{Cmd, GUEST_DEADLINE, Scratch, need, need_fuse, need_root, program};

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

/// Makes the images that the document speaks of. Follows install.sh.
const PROLOGUE: &str = r#"
mkdir -p mnt fs root/etc made
echo fedora >root/etc/hostname
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
        let install = include_str!("install.sh");
        let script = format!("{install}\n{PROLOGUE}\nset -x\n{commands}\n");
        let outcome = Cmd::in_namespace()
            .args(["sh", "-c", &script, "recipe"])
            .arg(scratch.root())
            .arg(program())
            .env("HOME", scratch.root().to_str().unwrap())
            // The environment, not the recipes: a virtual machine here may have no KVM.
            .env("LIBGUESTFS_BACKEND", "direct")
            .env("LIBGUESTFS_BACKEND_SETTINGS", "force_tcg")
            .deadline(GUEST_DEADLINE)
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

/// Returns the paths of all documents.
fn documents() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let names = [root.join("doc"), root].map(|dir| fs::read_dir(dir).unwrap().flatten());
    let paths = names.into_iter().flatten().map(|entry| entry.path());
    paths
        .filter(|path| path.extension().is_some_and(|kind| kind == "md"))
        .collect()
}

/// Returns the name by which a link leads to a heading.
fn anchor(heading: &str) -> String {
    let kept = heading
        .trim()
        .chars()
        .filter(|c| c.is_alphanumeric() || "-_ ".contains(*c));
    kept.collect::<String>().to_lowercase().replace(' ', "-")
}

#[test]
fn links_of_the_documents_lead_to_files_and_headings() {
    let documents = documents();
    assert!(documents.len() > 10, "{documents:?}");
    for path in documents {
        let text = fs::read_to_string(&path).unwrap();
        let links = text.split("](").skip(1).map(|rest| rest.split(')').next().unwrap());
        for link in links.filter(|link| !link.contains("://")) {
            let (file, heading) = link.split_once('#').unwrap_or((link, ""));
            let target = if file.is_empty() {
                path.clone()
            } else {
                path.parent().unwrap().join(file)
            };
            assert!(target.exists(), "{}: {link}", path.display());
            if !heading.is_empty() {
                let text = fs::read_to_string(&target).unwrap();
                let mut headings = text.lines().filter_map(|line| line.strip_prefix('#'));
                let found = headings.any(|line| anchor(line.trim_start_matches('#')) == heading);
                assert!(found, "{}: {link}", path.display());
            }
        }
    }
}

#[test]
fn tests_that_the_documents_name_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let sources = ["tests", "src", "../src"].map(|dir| sources(&root.join(dir))).concat();
    let mut count = 0;
    for path in documents() {
        let text = fs::read_to_string(&path).unwrap();
        // `program::module::the_name_of_a_test`, or `…::the_name_of_a_test`.
        for code in text.split('`').skip(1).step_by(2) {
            let Some((_, name)) = code.rsplit_once("::") else {
                continue;
            };
            if name.contains('_')
                && !name.contains(|c: char| !c.is_ascii_lowercase() && !c.is_ascii_digit() && c != '_')
            {
                let exists = sources.contains(&format!("fn {name}(")) || sources.contains(&format!("mod {name}"));
                assert!(exists, "{}: {code}", path.display());
                count += 1;
            }
        }
    }
    assert!(count > 50, "{count} names");
}
