//! Memory that this process may take for indexes.
//!
//! The image determines the size of its index, and the pages of an index in memory can never be evicted. So an index takes
//! at most a quarter of what is available, by the smaller of two answers: that of the whole machine, and that of each
//! control group (container, service) that this process belongs to.

use std::fs;
use std::path::Path;

/// Divisor: an index takes at most this part of the available memory.
const PART: u64 = 4;

/// Returns the largest size of an index in bytes. An answer that cannot be read does not limit it.
pub(super) fn index_limit() -> u64 {
    let machine = fs::read_to_string("/proc/meminfo").ok();
    let machine = machine.and_then(|text| available(&text)).unwrap_or(u64::MAX);
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let free = free_in_groups(&groups, Path::new("/sys/fs/cgroup"));
    machine.min(free) / PART
}

/// Returns the bytes of `MemAvailable` in `/proc/meminfo`: free memory, and pages that can be evicted.
fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim()
        .strip_suffix("kB")?
        .trim()
        .parse::<u64>()
        .ok()?
        .checked_mul(1024)
}

/// Returns the bytes that the groups of this process leave free: the least of each group and its parents. `groups` is the
/// content of `/proc/self/cgroup`, `root` the folder where the groups are mounted.
fn free_in_groups(groups: &str, root: &Path) -> u64 {
    let mut least = u64::MAX;
    for line in groups.lines() {
        // `0::/PATH` is a group of version 2, `N:memory:/PATH` the one of version 1 that limits memory.
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else {
            continue;
        };
        let (base, limit, used) = if controllers.is_empty() {
            (root.to_owned(), "memory.max", "memory.current")
        } else if controllers.split(',').any(|name| name == "memory") {
            (root.join("memory"), "memory.limit_in_bytes", "memory.usage_in_bytes")
        } else {
            continue;
        };
        // Every group above limits this process as well. In a container the path may not exist below `root`; then
        // nothing is read, and the group does not limit.
        for group in Path::new(path.trim_start_matches('/')).ancestors() {
            let number = |name: &str| {
                fs::read_to_string(base.join(group).join(name))
                    .ok()?
                    .trim()
                    .parse::<u64>()
                    .ok()
            };
            // Without a limit the file holds the word `max`.
            if let (Some(limit), Some(used)) = (number(limit), number(used)) {
                least = least.min(limit.saturating_sub(used));
            }
        }
    }
    least
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_available_memory_is_read() {
        assert_eq!(
            available("MemTotal: 9 kB\nMemAvailable:    2048 kB\nX: 1 kB\n"),
            Some(2 << 20)
        );
        assert_eq!(available("MemTotal: 9 kB\n"), None);
        assert!(index_limit() > 0 && index_limit() < u64::MAX / PART);
    }

    #[test]
    fn the_least_of_a_group_and_its_parents_counts() {
        let root = tempfile::tempdir().unwrap();
        let put = |path: &str, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        put("a/b/memory.max", "max\n");
        put("a/b/memory.current", "10\n");
        assert_eq!(free_in_groups("0::/a/b\n", root.path()), u64::MAX);
        put("a/memory.max", "1000\n");
        put("a/memory.current", "400\n");
        assert_eq!(free_in_groups("0::/a/b\n", root.path()), 600);
        put("memory/c/memory.limit_in_bytes", "500\n");
        put("memory/c/memory.usage_in_bytes", "700\n");
        assert_eq!(free_in_groups("4:cpu:/x\n3:memory,x:/c\n0::/a/b\n", root.path()), 0);
        assert_eq!(free_in_groups("nothing", root.path()), u64::MAX);
    }
}
