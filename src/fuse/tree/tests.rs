use super::*;
use crate::fuse::testfs::disk_file;
use crate::test_disk::TestDisk;

fn disk(name: &str) -> Arc<DiskFile> {
    disk_file(name, TestDisk::new(8))
}

fn tree(names: &[&str], more: Vec<Box<dyn Names>>) -> Tree {
    Tree::new(MountKind::Dir, names.iter().map(|name| disk(name)).collect(), more)
}

/// Returns the entry at a path.
fn find(tree: &Tree, path: &[&str]) -> Option<Entry> {
    path.iter().try_fold(tree.entry(ROOT)?, |entry, name| match entry {
        Entry::Directory(_, directory) => directory.lookup(OsStr::new(name)).unwrap(),
        Entry::File(..) => None,
    })
}

fn listed(tree: &Tree, path: &[&str]) -> Vec<(u64, String)> {
    let Some(Entry::Directory(_, directory)) = find(tree, path) else {
        panic!("{path:?} is no directory");
    };
    let all = directory.list().unwrap();
    all.into_iter()
        .map(|l| (l.ino.0, l.name.into_string().unwrap()))
        .collect()
}

/// One name that leads to one disk, and to nothing else.
#[derive(Debug)]
struct OneName(&'static str, u64, Arc<DiskFile>);

impl Names for OneName {
    fn lookup(&self, name: &OsStr) -> Result<Option<Entry>> {
        Ok((name == self.0).then(|| Entry::File(INodeNo(self.1), Arc::clone(&self.2))))
    }

    fn list(&self) -> Result<Vec<Listed>> {
        Ok(vec![Listed {
            ino: INodeNo(self.1),
            kind: FileType::RegularFile,
            name: self.0.into(),
        }])
    }

    fn may_wait(&self) -> bool {
        true
    }
}

#[test]
fn a_slash_in_a_name_makes_directories_of_any_depth() {
    let tree = tree(
        &["top.raw", "a/b/c/one.raw", "a/two.raw", "a/b/c/three.raw"],
        Vec::new(),
    );
    let root = listed(&tree, &[]);
    assert_eq!((root[0].clone(), root[1].1.as_str()), ((2, "top.raw".into()), "a"));
    let inner: Vec<_> = listed(&tree, &["a", "b", "c"]).into_iter().collect();
    assert_eq!(inner, [(3, "one.raw".into()), (5, "three.raw".into())]);
    let Some(Entry::File(ino, file)) = find(&tree, &["a", "b", "c", "three.raw"]) else {
        panic!("not found");
    };
    assert_eq!((ino, file.config.name.to_str()), (INodeNo(5), Some("a/b/c/three.raw")));
    for (ino, path) in [(root[1].0, &["a"][..]), (listed(&tree, &["a"])[1].0, &["a", "b"])] {
        assert_eq!(
            tree.entry(INodeNo(ino)).unwrap().ino(),
            find(&tree, path).unwrap().ino()
        );
    }
    assert!(find(&tree, &["a", "one.raw"]).is_none() && find(&tree, &["top.raw", "x"]).is_none());
}

#[test]
fn an_entry_that_is_found_is_kept_until_the_kernel_has_returned_every_answer() {
    let more: Vec<Box<dyn Names>> = vec![Box::new(OneName("new.raw", 1 << 20, disk("new.raw")))];
    let tree = tree(&["old.raw"], more);
    let ino = INodeNo(1 << 20);
    assert!(tree.entry(ino).is_none(), "not looked up yet");
    let entry = find(&tree, &["new.raw"]).unwrap();
    for _ in 0..3 {
        tree.looked_up(&entry);
    }
    assert!(tree.forget(ino, 2).is_none() && tree.entry(ino).is_some());
    assert_eq!(tree.files().len(), 2);
    let Some(Entry::File(_, file)) = tree.forget(ino, 1) else {
        panic!("still known");
    };
    assert!(tree.entry(ino).is_none());
    assert_eq!(tree.files().len(), 2, "it is being closed");
    tree.closed(&file);
    assert_eq!(tree.files().len(), 1);
    // More than were counted, and an inode that was never known.
    assert!(tree.forget(ino, 1).is_none() && tree.forget(INodeNo(77), 1).is_none());
    // A fixed entry is never forgotten.
    tree.looked_up(&find(&tree, &["old.raw"]).unwrap());
    assert!(tree.forget(INodeNo(2), 1).is_none() && tree.entry(INodeNo(2)).is_some());
}

#[test]
fn a_name_of_an_earlier_provider_hides_that_of_a_later_one() {
    let more: Vec<Box<dyn Names>> = vec![
        Box::new(OneName("a.raw", 100, disk("a.raw"))),
        Box::new(OneName("b.raw", 101, disk("b.raw"))),
        Box::new(OneName("b.raw", 102, disk("b.raw"))),
    ];
    let tree = tree(&["a.raw"], more);
    assert_eq!(listed(&tree, &[]), [(2, "a.raw".into()), (101, "b.raw".into())]);
    assert_eq!(find(&tree, &["a.raw"]).unwrap().ino(), INodeNo(2));
    assert_eq!(find(&tree, &["b.raw"]).unwrap().ino(), INodeNo(101));
}

#[test]
fn fixed_names_are_answered_without_a_provider_that_may_wait() {
    let waiting: Vec<Box<dyn Names>> = vec![Box::new(OneName("new.raw", 100, disk("new.raw")))];
    let with = tree(&["old.raw"], waiting);
    let Some(Entry::Directory(_, root)) = with.entry(ROOT) else {
        panic!("no directory");
    };
    assert!(root.may_wait());
    assert!(matches!(root.lookup_at_once(OsStr::new("old.raw")), Some(Ok(Some(_)))));
    assert!(root.lookup_at_once(OsStr::new("new.raw")).is_none());
    let without = tree(&["old.raw"], Vec::new());
    let Some(Entry::Directory(_, root)) = without.entry(ROOT) else {
        panic!("no directory");
    };
    assert!(!root.may_wait());
    assert!(matches!(root.lookup_at_once(OsStr::new("new.raw")), Some(Ok(None))));
}

#[test]
fn an_open_directory_keeps_the_names_of_its_first_read() {
    let tree = tree(&["a.raw"], Vec::new());
    let (first, second) = (tree.open_directory(), tree.open_directory());
    assert_ne!(first, second);
    let names: Arc<[Listed]> = Arc::new([]);
    tree.set_listing(first, &names);
    assert!(tree.listing(first).is_some() && tree.listing(second).is_none());
    tree.close_directory(first);
    assert!(tree.listing(first).is_none());
}

#[test]
fn over_a_plain_file_the_root_is_the_disk() {
    let tree = Tree::new(MountKind::File, vec![disk("x.raw")], Vec::new());
    assert!(matches!(tree.entry(ROOT), Some(Entry::File(ROOT, _))));
    assert_eq!(tree.files().len(), 1);
}
