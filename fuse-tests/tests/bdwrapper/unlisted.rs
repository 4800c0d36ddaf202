//! Everything that is not listed passes the library untouched.

use fuse_tests::harness::{LoopDevice, Scratch};

use crate::fixture::{Listed, compile, in_namespace, ready, sparse, wrapped};

/// "unlisted descriptors give the same results, bytes and errno as without the library"
#[test]
fn results_for_unlisted_files_are_those_without_the_library() {
    if !ready() {
        return;
    }
    let scratch = Scratch::new();
    let program = compile(&scratch, "unlisted", &[]);
    let listed = LoopDevice::attach(&sparse(&scratch, "listed.raw", 1 << 20));
    let other = LoopDevice::attach(&sparse(&scratch, "other.raw", 2 << 20));
    let disks = [
        Listed {
            name: "/dev/hdx",
            target: listed.path().to_owned(),
        },
        Listed {
            name: "/dev/sd/file",
            target: scratch.path("listed.raw"),
        },
    ];
    // Every run works in the same folder, which is empty at its start.
    let run = |command: fuse_tests::harness::Cmd| {
        let folder = scratch.mkdir("work");
        let outcome = command.arg(&program).arg(&folder).arg(other.path()).run().ok();
        std::fs::remove_dir_all(&folder).expect("removing the folder");
        outcome
    };
    let expected = run(in_namespace(&scratch, &disks)).stdout;
    // The library logs the names of the list at the start, and nothing afterwards.
    for (level, lines) in [(0, 0), (1000, disks.len())] {
        let outcome = run(wrapped(&scratch, &disks, level));
        assert_eq!(outcome.stderr.lines().count(), lines, "{outcome}");
        for (line, expected) in outcome.stdout.lines().zip(expected.lines()) {
            assert_eq!(line, expected, "at level {level}");
        }
        assert_eq!(outcome.stdout.lines().count(), expected.lines().count());
    }
}
