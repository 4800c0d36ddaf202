use std::fs;
use std::io::ErrorKind as IoKind;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::PathBuf;
use std::sync::{Mutex, mpsc};

use super::storage::Storage;
use super::*;

mod complete;
mod evict;
mod fetch;

const BLOCK: u64 = 4096;
const BLOCKS: u64 = 40;

fn key() -> FileKey {
    FileKey {
        label: "https://h/x".to_owned(),
        address: address_hash("https://h/x"),
        // The last block is shorter.
        len: BLOCKS * BLOCK - 1000,
        block: BLOCK,
        etag: Some("\"1\"".to_owned()),
        modified: None,
    }
}

fn content(number: u64) -> Vec<u8> {
    let len = key().block_len(number) as u64;
    (0..len).map(|n| (n * 7 + number * 31 + n / 256) as u8).collect()
}

/// Pseudorandom numbers.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % limit
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Which {
    Data,
    Map,
}

#[derive(Debug, Clone)]
enum Op {
    Write(Which, u64, Vec<u8>),
    Sync(Which),
}

/// Bytes in memory that note what is done to them.
struct Recorded {
    which: Which,
    bytes: Mutex<Vec<u8>>,
    log: Arc<Mutex<Vec<Op>>>,
}

impl Recorded {
    fn over(which: Which, bytes: Vec<u8>, log: &Arc<Mutex<Vec<Op>>>) -> Box<dyn Storage> {
        Box::new(Self {
            which,
            bytes: Mutex::new(bytes),
            log: Arc::clone(log),
        })
    }
}

impl Storage for Recorded {
    fn read(&self, buf: &mut [u8], at: u64) -> io::Result<()> {
        let bytes = self.bytes.lock().unwrap();
        let part = bytes.get(at as usize..at as usize + buf.len());
        buf.copy_from_slice(part.ok_or(IoKind::UnexpectedEof)?);
        Ok(())
    }

    fn write(&self, buf: &[u8], at: u64) -> io::Result<()> {
        self.bytes.lock().unwrap()[at as usize..at as usize + buf.len()].copy_from_slice(buf);
        self.log.lock().unwrap().push(Op::Write(self.which, at, buf.to_vec()));
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.log.lock().unwrap().push(Op::Sync(self.which));
        Ok(())
    }
}

fn empty(which: Which) -> Vec<u8> {
    let len = match which {
        Which::Data => key().len,
        Which::Map => HEADER + BLOCKS * ENTRY,
    };
    vec![0; len as usize]
}

fn opened(data: Vec<u8>, map: Vec<u8>, boot: u64) -> (TierFile, Arc<Mutex<Vec<Op>>>) {
    let log = Arc::<Mutex<_>>::default();
    let (data, map) = (
        Recorded::over(Which::Data, data, &log),
        Recorded::over(Which::Map, map, &log),
    );
    (TierFile::over(key(), data, map, None, boot, None), log)
}

/// Keeps neighbouring blocks as a fetch does.
fn keep_run(file: &TierFile, blocks: Range<u64>) {
    let mut writer = RunWriter::new(file, blocks.clone());
    blocks.for_each(|number| writer.push(&Block::new(content(number))));
}

/// Returns what a crash before operation `end` may leave of a file: what was synced, and any sectors of the rest.
fn after_crash(log: &[Op], which: Which, end: usize, random: &mut Random) -> Vec<u8> {
    let mut bytes = empty(which);
    let synced = log[..end]
        .iter()
        .rposition(|op| matches!(op, Op::Sync(w) if *w == which))
        .unwrap_or(0);
    for (number, op) in log[..end].iter().enumerate() {
        let Op::Write(w, at, data) = op else { continue };
        if *w != which {
            continue;
        }
        for byte_range in sectors(*at, data.len()) {
            let start = byte_range.start - *at as usize;
            let lost = number >= synced && random.below(2) == 0;
            if !lost {
                bytes[byte_range.clone()].copy_from_slice(&data[start..start + byte_range.len()]);
            }
        }
    }
    bytes
}

/// Splits a range of bytes at the sectors of a disk, each of which is written whole or not at all.
fn sectors(at: u64, len: usize) -> Vec<Range<usize>> {
    let (at, end) = (at as usize, at as usize + len);
    let mut cuts = vec![at];
    cuts.extend((at / 512 + 1..).map(|sector| sector * 512).take_while(|cut| *cut < end));
    cuts.push(end);
    cuts.windows(2).map(|pair| pair[0]..pair[1]).collect()
}

#[test]
fn no_crash_of_the_machine_leads_to_a_wrong_block() {
    let mut random = Random(5);
    let (mut served, mut lost) = (0u64, 0u64);
    for state in 0..1000 {
        let (file, log) = opened(empty(Which::Data), empty(Which::Map), 1);
        for _ in 0..BLOCKS * 2 {
            let first = random.below(BLOCKS as usize) as u64;
            let blocks = first..BLOCKS.min(first + 1 + random.below(6) as u64);
            match random.below(2) {
                0 => file.write(first, &content(first)),
                _ => keep_run(&file, blocks),
            }
            if random.below(8) == 0 {
                file.flush();
            }
        }
        drop(file);
        let log = log.lock().unwrap().clone();
        let end = random.below(log.len() + 1);
        let data = after_crash(&log, Which::Data, end, &mut random);
        let map = after_crash(&log, Which::Map, end, &mut random);
        let (after, _) = opened(data, map, 2);
        for number in 0..BLOCKS {
            match after.read(number) {
                Some(block) => {
                    assert!(block == content(number), "state {state}: block {number} is wrong");
                    served += 1;
                }
                None => lost += 1,
            }
            assert!(
                after.read(number).is_some() || !after.has(number),
                "a damaged block is forgotten"
            );
        }
    }
    assert!(served > 1000 && lost > 1000, "{served} served, {lost} lost");
}

#[test]
fn the_data_is_durable_before_an_entry_says_so() {
    let (file, log) = opened(empty(Which::Data), empty(Which::Map), 1);
    for number in 0..BLOCKS {
        file.write(number, &content(number));
        if number % 7 == 0 {
            file.flush();
        }
    }
    drop(file);
    let mut unsynced = Vec::new();
    for op in log.lock().unwrap().iter() {
        match op {
            Op::Write(Which::Data, at, _) => unsynced.push(at / BLOCK),
            Op::Sync(Which::Data) => unsynced.clear(),
            Op::Write(Which::Map, at, entries) => {
                for (number, entry) in ((at - HEADER) / ENTRY..).zip(entries.chunks(8)) {
                    let durable = entry[0] & 1 == 1;
                    assert!(!durable || !unsynced.contains(&number), "block {number}");
                }
            }
            Op::Sync(Which::Map) => {}
        }
    }
    assert!(unsynced.is_empty(), "the end syncs what is left");
}

#[test]
fn a_killed_process_loses_nothing() {
    let (file, log) = opened(empty(Which::Data), empty(Which::Map), 1);
    (0..BLOCKS).for_each(|number| file.write(number, &content(number)));
    let ops = log.lock().unwrap().clone();
    let (mut data, mut map) = (empty(Which::Data), empty(Which::Map));
    for op in ops {
        if let Op::Write(which, at, bytes) = op {
            let to = if which == Which::Data { &mut data } else { &mut map };
            to[at as usize..at as usize + bytes.len()].copy_from_slice(&bytes);
        }
    }
    let (after, _) = opened(data.clone(), map.clone(), 1);
    assert!((0..BLOCKS).all(|number| after.read(number) == Some(content(number))));
    let (rebooted, _) = opened(data, map, 2);
    assert!((0..BLOCKS).all(|number| rebooted.read(number).is_none()));
}

/// Storage without space.
struct Full;

impl Storage for Full {
    fn read(&self, buf: &mut [u8], _at: u64) -> io::Result<()> {
        buf.fill(0);
        Ok(())
    }

    fn write(&self, _buf: &[u8], _at: u64) -> io::Result<()> {
        Err(io::Error::from_raw_os_error(libc::ENOSPC))
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_full_file_system_only_means_that_nothing_is_kept() {
    let log = Arc::<Mutex<_>>::default();
    let map = Recorded::over(Which::Map, empty(Which::Map), &log);
    let file = TierFile::over(key(), Box::new(Full), map, None, 1, None);
    file.write(3, &content(3));
    assert!(!file.has(3) && file.read(3).is_none());
    // A fetch gathers no blocks that would be refused.
    let block = Block::new(content(4));
    let mut writer = RunWriter::new(&file, 4..9);
    writer.push(&block);
    assert_eq!(Arc::strong_count(&block), 1);
    drop(writer);
    let why = file.finish().unwrap_err().to_string();
    assert!(why.contains("No space left"), "{why}");
    drop(file);
    assert!(log.lock().unwrap().is_empty());
}

fn folder() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("cache");
    (dir, path)
}

fn fill(file: &TierFile) {
    (0..BLOCKS).for_each(|number| file.write(number, &content(number)));
}

/// Ends a file in this thread, after a flush that the thread of the tier has begun.
fn close(mut file: Arc<TierFile>) {
    loop {
        match Arc::try_unwrap(file) {
            Ok(file) => return drop(file),
            Err(in_flush) => file = in_flush,
        }
        std::thread::yield_now();
    }
}

#[test]
fn blocks_survive_and_a_changed_file_drops_them() {
    let (_dir, path) = folder();
    let tier = DiskTier::open(&path, None, true).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700);
    let file = tier.file(key()).unwrap();
    fill(&file);
    close(file);
    assert_eq!(tier.lookup(&key().address), Some(key()));
    let again = tier.file(key()).unwrap();
    assert!(again.complete().is_some());
    assert_eq!(again.verify(), (BLOCKS, 0));
    close(again);
    let changed = FileKey {
        etag: Some("\"2\"".to_owned()),
        ..key()
    };
    let new = tier.file(changed).unwrap();
    assert!(new.complete().is_none() && new.verify() == (0, 0));
    let unknown = FileKey { etag: None, ..key() };
    assert!(tier.file(unknown).is_err(), "a change would not be noticed");
}

#[test]
fn damaged_files_give_no_wrong_block() {
    let damages: [fn(&Path); 5] = [
        |data| flip(data, 5 * BLOCK + 17),
        |data| flip(&data.with_extension("map"), HEADER + 5 * ENTRY + 2),
        |data| {
            fs::File::options()
                .write(true)
                .open(data)
                .unwrap()
                .set_len(3 * BLOCK)
                .unwrap();
        },
        |data| fs::write(data.with_extension("map"), "a foreign file").unwrap(),
        |data| {
            fs::rename(data, data.with_extension("moved")).unwrap();
            symlink(data.with_extension("moved"), data).unwrap();
        },
    ];
    for (number, damage) in damages.iter().enumerate() {
        let (_dir, path) = folder();
        let tier = DiskTier::open(&path, None, true).unwrap();
        let file = tier.file(key()).unwrap();
        fill(&file);
        close(file);
        damage(&path.join(format!("{}.data", key().stem())));
        let file = tier.file(key()).unwrap();
        // A damaged checksum says nothing against the data.
        assert!(file.complete().is_none() || number == 1, "damage {number}");
        let present = (0..BLOCKS).filter_map(|block| Some((block, file.read(block)?)));
        let present: Vec<_> = present.collect();
        assert!(
            present.iter().all(|(block, data)| *data == content(*block)),
            "damage {number}"
        );
        assert!(present.len() < BLOCKS as usize, "damage {number}");
        fill(&file);
        assert_eq!(file.verify(), (BLOCKS, 0), "damage {number}");
    }
}

#[test]
fn a_file_that_was_cut_keeps_the_rest() {
    for (ending, cut, kept) in [("data", 3 * BLOCK, 3), ("map", HEADER + 5 * ENTRY, 5)] {
        let (_dir, path) = folder();
        let (tier, data) = completed(&path);
        let cut_file = fs::File::options().write(true).open(data.with_extension(ending));
        cut_file.unwrap().set_len(cut).unwrap();
        let file = tier.file(key()).unwrap();
        let read = |number| file.read(number).inspect(|data| assert_eq!(*data, content(number)));
        assert_eq!((0..BLOCKS).filter_map(read).count(), kept, "{ending}");
        fill(&file);
        file.finish().unwrap();
    }
}

#[test]
fn few_blocks_of_a_large_file_are_found_between_the_holes_of_its_map() {
    let (_dir, path) = folder();
    let tier = DiskTier::open(&path, None, true).unwrap();
    let large = FileKey {
        len: BLOCK << 20,
        ..key()
    };
    let file = tier.file(large).unwrap();
    let numbers = [0, 1, 8191, 8192, 70_000, (1 << 20) - 1];
    numbers
        .iter()
        .for_each(|number| file.write(*number, &[*number as u8; BLOCK as usize]));
    assert_eq!(file.verify(), (6, 0));
    let mut found = 0;
    file.verify_rest(|bytes| found += bytes);
    assert_eq!(found, 6 * BLOCK);
    let (mut at, mut missing) = (0, Vec::new());
    while let Some(range) = file.missing_from(at) {
        at = range.end;
        missing.push((range.start / BLOCK, range.end / BLOCK));
    }
    assert_eq!(missing, [(2, 8191), (8193, 70_000), (70_001, (1 << 20) - 1)]);
}

fn flip(path: &Path, at: u64) {
    let file = fs::File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
}

/// Returns the path of the data file of a complete file in a new folder.
fn completed(path: &Path) -> (Arc<DiskTier>, PathBuf) {
    let tier = DiskTier::open(path, None, true).unwrap();
    let file = tier.file(key()).unwrap();
    fill(&file);
    file.finish().unwrap();
    close(file);
    let data = path.join(format!("{}.data", key().stem()));
    (tier, data)
}

#[test]
fn folders_of_others_and_links_are_refused() {
    let (dir, path) = folder();
    assert!(DiskTier::open(&path, None, false).is_err(), "does not exist");
    fs::create_dir(&path).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o750)).unwrap();
    let error = DiskTier::open(&path, None, true).unwrap_err().to_string();
    assert!(error.contains("chmod 700"), "{error}");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).unwrap();
    let link = dir.path().join("link");
    symlink(&path, &link).unwrap();
    assert!(DiskTier::open(&link, None, true).is_err());
}

/// Storage whose sync lasts until the test ends it.
struct SlowSync {
    bytes: Box<dyn Storage>,
    begun: Mutex<mpsc::Sender<()>>,
    end: Mutex<mpsc::Receiver<()>>,
}

impl Storage for SlowSync {
    fn read(&self, buf: &mut [u8], at: u64) -> io::Result<()> {
        self.bytes.read(buf, at)
    }

    fn write(&self, buf: &[u8], at: u64) -> io::Result<()> {
        self.bytes.write(buf, at)
    }

    fn sync(&self) -> io::Result<()> {
        let _ = self.begun.lock().unwrap().send(());
        let _ = self.end.lock().unwrap().recv();
        self.bytes.sync()
    }
}

#[test]
fn neither_readers_nor_writers_wait_for_a_flush() {
    let log = Arc::<Mutex<_>>::default();
    let ((begun, has_begun), (end, wait)) = (mpsc::channel(), mpsc::channel());
    let data = SlowSync {
        bytes: Recorded::over(Which::Data, empty(Which::Data), &log),
        begun: Mutex::new(begun),
        end: Mutex::new(wait),
    };
    let map = Recorded::over(Which::Map, empty(Which::Map), &log);
    let queue = Arc::<FlushQueue<_>>::default();
    let file = Arc::new_cyclic(|this| {
        let flusher = Some((Arc::clone(&queue), this.clone()));
        TierFile::over(key(), Box::new(data), map, None, 1, flusher)
    });
    fill(&file);
    has_begun.recv_timeout(Duration::from_secs(60)).unwrap();
    assert!((0..BLOCKS).all(|number| file.read(number) == Some(content(number))));
    drop(end);
    queue.close();
}
