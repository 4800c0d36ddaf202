//! All combinations of facts against tables. A combination is a set of words, and a row of a table names the words that it
//! needs (`!word`: that must be absent).

use std::collections::BTreeSet;

use super::*;

type Words = BTreeSet<&'static str>;

/// Returns true if the combination has all words of a row.
fn matches(words: &Words, row: &str) -> bool {
    row.split_whitespace().all(|word| match word.strip_prefix('!') {
        Some(absent) => !words.contains(absent),
        None => words.contains(word),
    })
}

/// Answer to an open of the disk inode: the first row that fits.
const DISK: [(&str, &str); 10] = [
    ("write !writable", "EROFS"),
    ("cache=none", "Direct"),
    ("possible", "AcquireBacking"),
    ("held", "Passthrough"),
    ("held-old", "Passthrough"),
    ("view=required", "EIO"),
    ("view=wanted O_DIRECT", "DirectBesideView"),
    ("O_DIRECT", "Direct"),
    ("streaming", "Direct"),
    ("", "Cached"),
];

/// Answer to an open of the view inode.
const VIEW: [(&str, &str); 6] = [
    ("write", "EROFS"),
    ("ready !O_DIRECT", "Passthrough"),
    ("!rejected", "ESTALE"),
    ("backed O_DIRECT", "EINVAL"),
    ("backed", "Passthrough"),
    ("", "Direct"),
];

/// Properties of a served open, by any row that fits. The word of the mode belongs to the combination.
const DETAILS: [(&str, &[&str]); 6] = [
    (
        "DIRECT_IO",
        &[
            "Direct",
            "DirectBesideView",
            "Passthrough streaming",
            "Passthrough held-old",
            "Passthrough view-inode !ready",
            "Passthrough view-inode O_DIRECT",
        ],
    ),
    (
        "PARALLEL",
        &[
            "!view-inode Direct !sequential",
            "!view-inode DirectBesideView !sequential",
            "!view-inode Passthrough streaming !sequential",
        ],
    ),
    ("KEEP_CACHE", &["Cached current"]),
    ("NOFLUSH", &["!write"]),
    ("writes", &["write"]),
    ("dirties", &["write read !Passthrough"]),
];

/// Calls `each` with every combination of one choice from each list.
fn combine(choices: &[&[&'static str]], words: &Words, each: &mut dyn FnMut(&Words)) {
    let Some((first, rest)) = choices.split_first() else {
        return each(words);
    };
    for choice in *first {
        let mut words = words.clone();
        words.extend(choice.split_whitespace());
        combine(rest, &words, each);
    }
}

const ACCESS: [&[&str]; 3] = [&["read", "write", "read write"], &["", "append"], &["", "O_DIRECT"]];

fn access(words: &Words) -> Access {
    Access {
        writes: words.contains("write"),
        reads: words.contains("read"),
        appends: words.contains("append"),
        direct: words.contains("O_DIRECT"),
    }
}

/// Checks the plan of a combination against a table of answers and against [`DETAILS`].
fn check(words: &Words, inode: Inode, answers: &[(&'static str, &'static str)]) {
    let mut words = words.clone();
    if words.contains("write") && (!words.contains("read") || words.contains("append")) {
        words.insert("streaming");
    }
    let (_, expected) = *answers.iter().find(|(row, _)| matches(&words, row)).unwrap();
    let request = OpenRequest {
        access: access(&words),
        inode,
    };
    let decision = plan(&request);
    let serve = match decision {
        OpenPlan::Refuse(errno) => {
            let code = match errno {
                Errno::EROFS => "EROFS",
                Errno::EIO => "EIO",
                Errno::ESTALE => "ESTALE",
                Errno::EINVAL => "EINVAL",
                _ => "another errno",
            };
            return assert_eq!(code, expected, "{words:?}");
        }
        OpenPlan::AcquireBacking => return assert_eq!("AcquireBacking", expected, "{words:?}"),
        OpenPlan::Serve(serve) => serve,
    };
    assert_eq!(format!("{:?}", serve.mode), expected, "{words:?}");
    words.insert(expected);
    let flags = serve.flags();
    let shown = [
        flags.contains(FopenFlags::FOPEN_DIRECT_IO),
        flags.contains(FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES),
        flags.contains(FopenFlags::FOPEN_KEEP_CACHE),
        flags.contains(FopenFlags::FOPEN_NOFLUSH),
        serve.writes,
        serve.dirties,
    ];
    for ((detail, rows), shown) in DETAILS.iter().zip(shown) {
        let expected = rows.iter().any(|row| matches(&words, row));
        assert_eq!(shown, expected, "{detail} of {words:?}");
    }
    let handle = OpenHandle {
        mode: serve.mode,
        writes: serve.writes,
        dirties: serve.dirties,
        number: 7,
    };
    assert_eq!(OpenHandle::from(serve.handle(7)), handle, "{words:?}");
}

#[test]
fn every_open_of_a_disk_inode_is_served_as_the_table_says() {
    let facts: [&[&str]; 6] = [
        &["", "writable"],
        &["", "cache=none"],
        &["", "sequential"],
        &["", "current"],
        &["", "possible", "held", "held-old"],
        &["", "view=wanted", "view=required"],
    ];
    let mut count = 0;
    combine(&[&ACCESS[..], &facts].concat(), &Words::new(), &mut |words| {
        count += 1;
        let backing = [
            ("possible", Backing::Possible),
            ("held", Backing::Held { current: true }),
            ("held-old", Backing::Held { current: false }),
        ];
        let view = [
            ("view=wanted", ViewWish::Wanted),
            ("view=required", ViewWish::RequiredBacking),
        ];
        let facts = DiskFacts {
            writable: words.contains("writable"),
            uncached: words.contains("cache=none"),
            sequential: words.contains("sequential"),
            pages_are_current: words.contains("current"),
            backing: backing
                .into_iter()
                .find(|(word, _)| words.contains(word))
                .map_or(Backing::None, |b| b.1),
            view: view
                .into_iter()
                .find(|(word, _)| words.contains(word))
                .map_or(ViewWish::None, |v| v.1),
        };
        check(words, Inode::Disk(facts), &DISK);
    });
    assert_eq!(count, 12 * 16 * 4 * 3);
}

#[test]
fn every_open_of_a_view_inode_is_served_as_the_table_says() {
    let facts: [&[&str]; 4] = [&["view-inode"], &["", "ready"], &["", "backed"], &["", "rejected"]];
    let mut count = 0;
    combine(&[&ACCESS[..], &facts].concat(), &Words::new(), &mut |words| {
        count += 1;
        let facts = ViewFacts {
            is_ready: words.contains("ready"),
            has_backed_opens: words.contains("backed"),
            was_rejected: words.contains("rejected"),
        };
        check(words, Inode::View(facts), &VIEW);
    });
    assert_eq!(count, 12 * 8);
}

#[test]
fn flags_of_open_are_read_as_access_and_a_truncation_is_none_of_it() {
    let of = |flags: i32| Access::of(OpenFlags(flags));
    assert_eq!(of(libc::O_RDWR | libc::O_TRUNC), of(libc::O_RDWR));
    assert!(!of(libc::O_RDONLY).writes && of(libc::O_RDONLY).reads);
    assert!(of(libc::O_WRONLY).writes && !of(libc::O_WRONLY).reads);
    assert!(of(libc::O_RDWR | libc::O_DIRECT | libc::O_APPEND).direct);
    assert!(of(libc::O_RDWR | libc::O_APPEND).appends && of(libc::O_RDWR).reads && of(libc::O_RDWR).writes);
}
