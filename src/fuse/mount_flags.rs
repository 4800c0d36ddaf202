//! Mount flags by the names that mount(8) gives them.
//!
//! A flag that changes how the mount behaves reaches the kernel, or the mount fails: none is accepted and dropped. The
//! mount is always `nosuid` and `nodev`; `suid` and `dev` do not weaken that.

use nix::mount::MsFlags;

/// A flag's name, the bits that it sets, and those that it clears.
type Flag = (&'static str, MsFlags, MsFlags);

/// Update the times of a file in memory only; the crate has no name for it (MS_LAZYTIME, linux/mount.h).
const LAZYTIME: MsFlags = MsFlags::from_bits_retain(1 << 25);
/// Do not follow symbolic links in the mount (MS_NOSYMFOLLOW, linux/mount.h).
const NOSYMFOLLOW: MsFlags = MsFlags::from_bits_retain(1 << 8);

const NONE: MsFlags = MsFlags::empty();
const FLAGS: [Flag; 23] = [
    ("noexec", MsFlags::MS_NOEXEC, NONE),
    ("exec", NONE, MsFlags::MS_NOEXEC),
    ("nosuid", MsFlags::MS_NOSUID, NONE),
    ("suid", NONE, NONE),
    ("nodev", MsFlags::MS_NODEV, NONE),
    ("dev", NONE, NONE),
    ("sync", MsFlags::MS_SYNCHRONOUS, NONE),
    ("async", NONE, MsFlags::MS_SYNCHRONOUS),
    ("dirsync", MsFlags::MS_DIRSYNC, NONE),
    ("noatime", MsFlags::MS_NOATIME, NONE),
    ("atime", NONE, MsFlags::MS_NOATIME),
    ("nodiratime", MsFlags::MS_NODIRATIME, NONE),
    ("diratime", NONE, MsFlags::MS_NODIRATIME),
    ("relatime", MsFlags::MS_RELATIME, NONE),
    ("norelatime", NONE, MsFlags::MS_RELATIME),
    ("strictatime", MsFlags::MS_STRICTATIME, NONE),
    ("nostrictatime", NONE, MsFlags::MS_STRICTATIME),
    ("lazytime", LAZYTIME, NONE),
    ("nolazytime", NONE, LAZYTIME),
    ("nosymfollow", NOSYMFOLLOW, NONE),
    ("symfollow", NONE, NOSYMFOLLOW),
    ("silent", MsFlags::MS_SILENT, NONE),
    ("loud", NONE, MsFlags::MS_SILENT),
];

/// Options with a value that the kernel's security modules parse.
const CONTEXTS: [&str; 6] = [
    "context",
    "fscontext",
    "defcontext",
    "rootcontext",
    "seclabel",
    "smackfsroot",
];

/// Returns the flag called `name`, if there is one.
pub(crate) fn known(name: &str) -> Option<&'static str> {
    FLAGS.iter().map(|(flag, ..)| *flag).find(|flag| *flag == name)
}

/// Returns true if `name` is an option with a value for a security module of the kernel.
pub(crate) fn is_context(name: &str) -> bool {
    CONTEXTS.contains(&name)
}

/// Returns the bits for mount(2): of two flags that contradict each other the later one counts, as in mount(8).
pub(super) fn bits(names: &[&str], read_only: bool) -> MsFlags {
    let mut bits = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    bits.set(MsFlags::MS_RDONLY, read_only);
    for (_, set, clear) in names
        .iter()
        .filter_map(|name| FLAGS.iter().find(|(flag, ..)| flag == name))
    {
        bits = (bits - *clear) | *set;
    }
    bits
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_later_of_two_flags_counts_and_suid_weakens_nothing() {
        let always = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        assert_eq!(bits(&["suid", "dev", "exec"], false), always);
        assert_eq!(bits(&["noexec", "exec"], true), always | MsFlags::MS_RDONLY);
        let all = ["sync", "async", "sync", "noatime", "nodiratime", "lazytime"];
        let expected = always | MsFlags::MS_SYNCHRONOUS | MsFlags::MS_NOATIME | MsFlags::MS_NODIRATIME | LAZYTIME;
        assert_eq!(bits(&all, false), expected);
        assert!(known("noexec").is_some() && known("quota").is_none());
    }
}
