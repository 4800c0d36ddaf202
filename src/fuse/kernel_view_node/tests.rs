use super::*;
use crate::config::LocalConfig;
use crate::fuse::kernel_view_builder::Builder;
use crate::test_disk::TestDisk;

/// Decides on an open for reading.
fn served(s: &mut NodeState, direct: bool, pid: u32, now: Instant) -> OpenPlan {
    let access = Access {
        writes: false,
        reads: true,
        appends: false,
        direct,
    };
    s.plan_open(access, pid, now)
}

const LOOKUP_AGAIN: OpenPlan = OpenPlan::Refuse(Errno::ESTALE);

fn by_daemon(mode: OpenMode) -> OpenPlan {
    OpenPlan::Serve(ServePlan {
        mode,
        direct_io: true,
        parallel_writes: false,
        keep_pages: false,
        writes: false,
        dirties: false,
    })
}

fn state() -> NodeState {
    NodeState {
        view_state: ViewState::Building,
        backing: None,
        passthrough_opens: 0,
        direct_opens: 0,
        last_rejected: None,
        expected_retries: Vec::new(),
    }
}

#[test]
fn both_inodes_map_to_the_disk() {
    let disk = INodeNo(2);
    assert!(!is_view_inode(disk) && is_view_inode(view_inode_of(disk)));
    assert_eq!((disk_inode_of(view_inode_of(disk)), disk_inode_of(disk)), (disk, disk));
}

#[test]
fn a_process_rejected_twice_in_a_row_gets_an_answer() {
    let mut s = state();
    let now = Instant::now();
    assert_eq!(served(&mut s, true, 7, now), LOOKUP_AGAIN);
    assert_eq!(served(&mut s, true, 8, now), LOOKUP_AGAIN, "another process");
    assert_eq!(served(&mut s, true, 7, now), by_daemon(OpenMode::Direct));
    s.passthrough_opens = 1;
    assert_eq!(served(&mut s, true, 8, now), OpenPlan::Refuse(Errno::EINVAL));
    assert_eq!(served(&mut s, false, 9, now), LOOKUP_AGAIN);
    assert_eq!(served(&mut s, false, 9, now), by_daemon(OpenMode::Passthrough));
    assert_eq!(s.passthrough_opens, 2, "the kernel was given the file once more");
    for _ in 0..3 {
        assert_eq!(
            served(&mut s, true, 0, now),
            LOOKUP_AGAIN,
            "PID 0 does not identify a process"
        );
    }
}

#[test]
fn a_retry_by_the_name_makes_the_next_open_rejected_again() {
    let mut s = state();
    let now = Instant::now();
    assert_eq!(served(&mut s, true, 7, now), LOOKUP_AGAIN);
    s.disk_inode_opened(true, 7);
    assert_eq!((s.direct_opens, s.expected_retries.len()), (1, 0));
    assert_eq!(served(&mut s, true, 7, now), LOOKUP_AGAIN);
}

#[test]
fn the_name_keeps_the_disk_inode_for_direct_opens_expected_retries_and_a_second() {
    let mut s = state();
    let begun = Instant::now();
    assert!(!s.keeps_disk_inode(begun));
    assert_eq!(served(&mut s, true, 7, begun), LOOKUP_AGAIN);
    assert!(
        s.keeps_disk_inode(begun + DISK_INODE_TIME * 2),
        "process 7 has not retried"
    );
    assert!(!s.keeps_disk_inode(begun + RETRY_TIMEOUT), "the retry timed out");
    s.disk_inode_opened(true, 7);
    assert!(s.keeps_disk_inode(begun + RETRY_TIMEOUT), "it is open");
    s.direct_opens = 0;
    assert!(s.keeps_disk_inode(begun + DISK_INODE_TIME / 2) && !s.keeps_disk_inode(begun + DISK_INODE_TIME));
}

#[test]
fn processes_that_never_retry_are_forgotten() {
    let mut s = state();
    let begun = Instant::now();
    for pid in 1..=MAX_EXPECTED_RETRIES as u32 + 5 {
        assert_eq!(served(&mut s, true, pid, begun), LOOKUP_AGAIN);
    }
    assert_eq!(s.expected_retries.len(), MAX_EXPECTED_RETRIES);
    assert_eq!(served(&mut s, true, 9999, begun + RETRY_TIMEOUT), LOOKUP_AGAIN);
    assert_eq!(s.expected_retries.len(), 1);
}

#[test]
fn a_required_view_that_is_impossible_is_an_error_with_the_reason() {
    let config = |mode| {
        let view = ViewConfig {
            mode,
            ..ViewConfig::default()
        };
        let local = LocalConfig {
            view,
            ..LocalConfig::new("/x")
        };
        DiskConfig {
            cache: Some(PageCache::None),
            ..DiskConfig::new("x.raw", crate::config::SourceConfig::Local(local))
        }
    };
    let volume = Arc::new(Volume::new(Arc::new(TestDisk::new(8)), Vec::new()));
    for (mode, good) in [
        (KernelView::Auto, true),
        (KernelView::Off, true),
        (KernelView::Required, false),
    ] {
        let node = Arc::new(KernelViewNode::new(&config(mode), &volume, MountKind::Dir));
        assert!(!node.is_wanted());
        let done = Builder::default().required(&[(node, Arc::clone(&volume))], MountKind::Dir);
        assert_eq!(done.is_ok(), good);
        if let Err(e) = done {
            assert!(e.to_string().contains("x.raw: kernel-view=required") && e.to_string().contains("cache=none"));
        }
    }
}
