use super::*;
use crate::config::LocalConfig;
use crate::test_disk::TestDisk;

fn state() -> State {
    State {
        way: Way::Building,
        backing: None,
        passed: 0,
        direct: 0,
        turned: None,
        waited_for: Vec::new(),
    }
}

#[test]
fn numbers_of_nodes_lead_to_the_disk() {
    let disk = INodeNo(2);
    assert!(!is_view(disk) && is_view(view_of(disk)));
    assert_eq!((disk_of(view_of(disk)), disk_of(disk)), (disk, disk));
}

#[test]
fn who_is_turned_away_twice_in_a_row_gets_what_there_is() {
    let mut s = state();
    let now = Instant::now();
    assert_eq!(s.answer(true, 7, now), Answer::Again);
    assert_eq!(s.answer(true, 8, now), Answer::Again, "another one");
    assert_eq!(s.answer(true, 7, now), Answer::Ask { with_backing: false });
    s.passed = 1;
    assert_eq!(s.answer(true, 8, now), Answer::Refuse);
    assert_eq!(s.answer(false, 9, now), Answer::Again);
    assert_eq!(s.answer(false, 9, now), Answer::Ask { with_backing: true });
    assert_eq!(s.passed, 2, "the kernel was given the file once more");
    for _ in 0..3 {
        assert_eq!(
            s.answer(true, 0, now),
            Answer::Again,
            "nobody knows whether it is the same one"
        );
    }
}

#[test]
fn who_came_again_by_the_name_is_turned_away_the_next_time_too() {
    let mut s = state();
    let now = Instant::now();
    assert_eq!(s.answer(true, 7, now), Answer::Again);
    s.served(true, 7);
    assert_eq!((s.direct, s.waited_for.len()), (1, 0));
    assert_eq!(s.answer(true, 7, now), Answer::Again);
}

#[test]
fn the_name_waits_for_direct_opens_for_who_was_turned_away_and_a_second() {
    let mut s = state();
    let begun = Instant::now();
    assert!(!s.is_turned(begun));
    assert_eq!(s.answer(true, 7, begun), Answer::Again);
    assert!(s.is_turned(begun + SETTLE * 2), "7 has not come again");
    assert!(!s.is_turned(begun + COME_AGAIN), "and will not");
    s.served(true, 7);
    assert!(s.is_turned(begun + COME_AGAIN), "it is open");
    s.direct = 0;
    assert!(s.is_turned(begun + SETTLE / 2) && !s.is_turned(begun + SETTLE));
}

#[test]
fn those_who_never_come_again_are_forgotten() {
    let mut s = state();
    let begun = Instant::now();
    for pid in 1..=MOST_TURNED as u32 + 5 {
        assert_eq!(s.answer(true, pid, begun), Answer::Again);
    }
    assert_eq!(s.waited_for.len(), MOST_TURNED);
    assert_eq!(s.answer(true, 9999, begun + COME_AGAIN), Answer::Again);
    assert_eq!(s.waited_for.len(), 1);
}

#[test]
fn a_required_view_that_can_not_be_is_an_error_that_says_why() {
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
        let switch = Arc::new(KernelViewNode::new(&config(mode), &volume, MountKind::Dir));
        assert!(!switch.is_wanted());
        let done = Builder::default().required(&[(switch, Arc::clone(&volume))], MountKind::Dir);
        assert_eq!(done.is_ok(), good);
        if let Err(e) = done {
            assert!(e.to_string().contains("x.raw: kernel-view=required") && e.to_string().contains("cache=none"));
        }
    }
}
