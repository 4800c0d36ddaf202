//! Fetches beside other processes.

use super::*;

/// Server that answers at once, up to block `broken`.
#[derive(Debug)]
struct Origin {
    deadline: Duration,
    broken: u64,
}

impl Origin {
    fn within(deadline: Duration) -> Arc<Self> {
        let broken = u64::MAX;
        Arc::new(Self { deadline, broken })
    }
}

impl Fetch for Origin {
    fn len(&self) -> u64 {
        key().len
    }

    fn block(&self) -> u64 {
        BLOCK
    }

    fn max_run(&self) -> u64 {
        BLOCKS
    }

    fn deadline(&self) -> Duration {
        self.deadline
    }

    fn fetch(&self, blocks: Range<u64>, each: &mut (dyn FnMut(Block) + Send)) -> Result<()> {
        let whole = blocks.start..blocks.end.min(self.broken);
        whole.for_each(|number| each(Block::new(content(number))));
        match blocks.end > self.broken {
            true => Err(Error::corrupt("the line is cut")),
            false => Ok(()),
        }
    }
}

/// Returns a fetch of a file with every other block, and the locks of another process that does not go on.
fn beside_a_hanging_process(path: &Path, deadline: Duration) -> (Arc<TieredFetch>, Lock) {
    let open = || DiskTier::open(path, None, true).unwrap().file(key()).unwrap();
    let (other, file) = (open(), open());
    (0..BLOCKS)
        .step_by(2)
        .for_each(|number| file.write(number, &content(number)));
    let forever = Instant::now() + Duration::from_secs(3600);
    let lock = other.lock(0..BLOCKS, forever, &AtomicBool::new(false)).unwrap();
    (
        Arc::new(TieredFetch::new(Origin::within(deadline), file)),
        lock.unwrap(),
    )
}

/// Fetches all blocks in a thread, which has a minute.
fn fetch_all(fetch: &Arc<TieredFetch>) -> mpsc::Receiver<Result<usize>> {
    let (fetch, (done, result)) = (Arc::clone(fetch), mpsc::channel());
    std::thread::spawn(move || {
        let mut count = 0;
        let fetched = fetch.fetch(0..BLOCKS, &mut |_| count += 1);
        let _ = done.send(fetched.map(|()| count));
    });
    result
}

#[test]
fn a_process_that_hangs_with_its_locks_is_waited_for_once() {
    let (_dir, path) = folder();
    let (fetch, _lock) = beside_a_hanging_process(&path, Duration::from_secs(4));
    let fetched = fetch_all(&fetch).recv_timeout(Duration::from_secs(60));
    assert_eq!(fetched.expect("20 waits").unwrap(), BLOCKS as usize);
}

#[test]
fn a_wait_for_another_process_ends_when_the_disk_is_closed() {
    let (_dir, path) = folder();
    let (mut fetch, _lock) = beside_a_hanging_process(&path, Duration::from_secs(7200));
    Arc::get_mut(&mut fetch).unwrap().shared_wait = Duration::from_secs(1800);
    let result = fetch_all(&fetch);
    fetch.close();
    let fetched = result.recv_timeout(Duration::from_secs(60)).expect("it waits on");
    assert!(fetched.unwrap_err().to_string().contains("closed"));
}

#[test]
fn a_reader_that_gets_the_last_block_finds_all_of_them_kept() {
    let (_dir, path) = folder();
    let file = DiskTier::open(&path, None, true).unwrap().file(key()).unwrap();
    let fetch = TieredFetch::new(Origin::within(Duration::from_secs(60)), Arc::clone(&file));
    let mut missing = Vec::new();
    let mut note = |_| missing.push(file.missing_from(0));
    fetch.fetch(0..BLOCKS, &mut note).unwrap();
    assert_eq!((missing.len() as u64, missing.last()), (BLOCKS, Some(&None)));
}

#[test]
fn the_blocks_before_an_error_are_kept() {
    let (_dir, path) = folder();
    let file = DiskTier::open(&path, None, true).unwrap().file(key()).unwrap();
    let origin = Origin {
        broken: 7,
        ..*Origin::within(Duration::from_secs(60))
    };
    let fetch = TieredFetch::new(Arc::new(origin), Arc::clone(&file));
    let mut passed = 0;
    fetch.fetch(0..BLOCKS, &mut |_| passed += 1).unwrap_err();
    assert_eq!((passed, file.missing_from(0)), (7, Some(7 * BLOCK..key().len)));
    assert!((0..7).all(|number| file.read(number) == Some(content(number))));
}

#[test]
fn a_long_fetch_keeps_its_blocks_while_it_goes_on() {
    const MIB: u64 = 1 << 20;
    let long = FileKey { len: 3 * MIB, ..key() };
    let (_dir, path) = folder();
    let file = DiskTier::open(&path, None, true).unwrap().file(long).unwrap();
    let block = Block::new(vec![1; BLOCK as usize]);
    let blocks = 3 * MIB / BLOCK;
    let mut writer = RunWriter::new(&file, 0..blocks);
    for number in 1..blocks {
        writer.push(&block);
        // Sooner on a machine so busy that the time has passed.
        let kept = file.missing_from(0).map_or(0, |missing| missing.start);
        assert!(kept + MIB > number * BLOCK, "{kept} bytes of {number} blocks");
    }
}
