//! Entry points of the fuzzers. Each takes arbitrary bytes and returns nothing; none may panic, use more than 256 MiB
//! of memory, or take more than a second for each MiB of input.
//!
//! ```text
//!   descriptor   the input is the text of a descriptor; all files that it names exist
//!   header       the input is an extent, named by a valid descriptor
//!   image        the input is the file that the user names
//! ```
//! A disk that opens is read at its borders, walked for holes, and checked.

use std::sync::Arc;

use vmdkfuse::block::{BlockRead, Lba, SECTOR};
use vmdkfuse::vmdk::descriptor::{Descriptor, looks_like};
use vmdkfuse::vmdk::{self, OpenOptions, VmdkDisk};
use vmdkfuse::volume::{MAX_READ, ReadBuffer, Seek, Volume};

use crate::memory::MemoryStore;

/// Name of the descriptor in the store.
const DISK: &[u8] = b"disk.vmdk";
/// Largest number of extent files that are created for a descriptor; the files of further names do not exist.
const MAX_EXTENTS: usize = 64;
/// Bytes of each extent file.
const EXTENT_LEN: usize = 64 << 10;
/// Largest number of steps of a walk over holes and data.
const MAX_STEPS: usize = 64;

/// Opens `data` as the text of a descriptor.
///
/// The first 64 extents that it names exist and hold zeroes; every parent that it names is a valid disk.
pub fn descriptor(data: &[u8]) {
    looks_like(data);
    let Ok(descriptor_text) = Descriptor::parse(data) else {
        return;
    };
    let flat: Arc<[u8]> = vec![0; EXTENT_LEN].into();
    let names = descriptor_text
        .extents
        .iter()
        .filter_map(|e| e.name.as_ref())
        .take(MAX_EXTENTS);
    let mut files: Vec<(Vec<u8>, Arc<[u8]>)> = names
        .map(|name| (name.as_bytes().to_vec(), Arc::clone(&flat)))
        .collect();
    if let Some(parent) = &descriptor_text.parent {
        let valid = format!(
            "# Disk DescriptorFile\nversion=1\nCID={:08x}\nparentCID=ffffffff\ncreateType=\"custom\"\nRW 64 ZERO\n",
            parent.cid.unwrap_or(0)
        );
        let hints = parent.hint.candidates().into_iter();
        files.extend(hints.map(|name| (name.as_bytes().to_vec(), valid.as_bytes().into())));
    }
    files.push((DISK.to_vec(), data.into()));
    open(&MemoryStore::new(files));
}

/// Opens `data` as an extent file, named by valid descriptors of each sparse type and of several sizes.
pub fn header(data: &[u8]) {
    let extent: Arc<[u8]> = data.into();
    for (kind, sectors) in [("SESPARSE", 1), ("VMFSSPARSE", 8000), ("SPARSE", 1 << 24)] {
        let descriptor_text = format!(
            "# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType=\"custom\"\nRW {sectors} {kind} \"extent\"\n"
        );
        let files: [(&[u8], Arc<[u8]>); 2] = [
            (DISK, descriptor_text.into_bytes().into()),
            (b"extent", Arc::clone(&extent)),
        ];
        open(&MemoryStore::new(files));
    }
}

/// Opens `data` as the file that the user names; no other file exists.
pub fn image(data: &[u8]) {
    vmdk::file_kind(data);
    open(&MemoryStore::new([(DISK, data)]));
}

/// Opens the disk, and exercises it if that succeeds.
fn open(store: &MemoryStore) {
    let Ok(file) = store.file(DISK) else { return };
    match VmdkDisk::open(Arc::new(file), OpenOptions::default()) {
        Ok(disk) => exercise(&Arc::new(disk)),
        Err(e) => assert!(!e.to_string().is_empty(), "the error has no text"),
    }
}

/// Reads, walks and checks a disk.
///
/// Errors are allowed. Two answers about the same sector must not contradict each other.
fn exercise(disk: &Arc<VmdkDisk>) {
    disk.info();
    let image = Volume::new(Arc::clone(disk) as Arc<dyn BlockRead>, disk.files());
    let end = image.len();
    let mut buffer = ReadBuffer::new();
    for offset in [
        0,
        511,
        end / 2,
        end.saturating_sub(MAX_READ as u64),
        end.saturating_sub(1),
        end,
    ] {
        if let Ok(bytes) = image.read(offset, MAX_READ, &mut buffer) {
            assert_eq!(
                bytes.len() as u64,
                (end - offset).min(MAX_READ as u64),
                "a successful read is complete"
            );
        }
    }
    for start in [0, end / 2] {
        walk(disk, start / SECTOR);
        seek(&image, start);
    }
    // A damaged image may have any number of errors; the fuzzer only requires that the check ends.
    disk.check();
}

/// Queries the mapping from sector `at` on and reads one sector of each range that is reported as zero.
fn walk(disk: &VmdkDisk, mut at: u64) {
    let end = disk.geometry().sectors;
    for _ in 0..MAX_STEPS {
        if at >= end {
            return;
        }
        let Ok((content, sectors)) = disk.content_at(Lba(at)) else {
            return;
        };
        assert!((1..=end - at).contains(&sectors), "{sectors} sectors at {at} of {end}");
        let mut one = [1; SECTOR as usize];
        if content.is_zero() && disk.read_at(Lba(at), &mut one).is_ok() {
            assert_eq!(
                one, [0; SECTOR as usize],
                "sector {at} is reported as zero but reads as data"
            );
        }
        at += sectors;
    }
}

/// Seeks to the next data and then to the next hole from byte `at`; the results must lie in `at..=len`.
fn seek(image: &Volume, mut at: u64) {
    for what in [Seek::Data, Seek::Hole] {
        match image.seek(at, what) {
            Ok(Some(found)) => {
                assert!((at..=image.len()).contains(&found), "{found} from {at}");
                at = found;
            }
            _ => return,
        }
    }
}
