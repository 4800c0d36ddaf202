//! Entry points of the fuzzers: bytes in, nothing out. None of them may panic, take more than 256 MiB, or more than
//! a second for a MiB of input.
//!
//! ```text
//!   descriptor   the bytes are the text; all files that it names exist
//!   header       the bytes are an extent, named by a good descriptor
//!   image        the bytes are the file that the user names
//! ```
//! What opens is read at its borders, walked for holes, and checked.

use std::sync::Arc;

use vmdkfuse::block::{BlockRead, Lba, SECTOR};
use vmdkfuse::vmdk::descriptor::{Descriptor, looks_like};
use vmdkfuse::vmdk::{self, OpenOptions, VmdkDisk};
use vmdkfuse::volume::{MAX_READ, ReadBuffer, Seek, Volume};

use crate::memory::MemoryStore;

/// What the descriptor is called.
const DISK: &[u8] = b"disk.vmdk";
/// Files that are made for the names in a descriptor; more names than that are left missing.
const NAMES: usize = 64;
/// Bytes of each.
const FLAT: usize = 64 << 10;
/// Steps of a walk over holes and data.
const STEPS: usize = 64;

/// The bytes are the text of a descriptor. Every file that it names exists and is zero, every parent is a good disk.
pub fn descriptor(data: &[u8]) {
    looks_like(data);
    let Ok(text) = Descriptor::parse(data) else { return };
    let flat: Arc<[u8]> = vec![0; FLAT].into();
    let names = text.extents.iter().filter_map(|e| e.name.as_ref()).take(NAMES);
    let mut files: Vec<(Vec<u8>, Arc<[u8]>)> = names
        .map(|name| (name.as_bytes().to_vec(), Arc::clone(&flat)))
        .collect();
    if let Some(parent) = &text.parent {
        let good = format!(
            "# Disk DescriptorFile\nversion=1\nCID={:08x}\nparentCID=ffffffff\ncreateType=\"custom\"\nRW 64 ZERO\n",
            parent.cid
        );
        let hints = parent.hint.candidates().into_iter();
        files.extend(hints.map(|name| (name.as_bytes().to_vec(), good.as_bytes().into())));
    }
    files.push((DISK.to_vec(), data.into()));
    open(&MemoryStore::new(files));
}

/// The bytes are an extent file, named by good descriptors of each kind and of several sizes.
pub fn header(data: &[u8]) {
    let extent: Arc<[u8]> = data.into();
    for (kind, sectors) in [("SESPARSE", 1), ("VMFSSPARSE", 8000), ("SPARSE", 1 << 24)] {
        let text = format!(
            "# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType=\"custom\"\nRW {sectors} {kind} \"extent\"\n"
        );
        let files: [(&[u8], Arc<[u8]>); 2] = [(DISK, text.into_bytes().into()), (b"extent", Arc::clone(&extent))];
        open(&MemoryStore::new(files));
    }
}

/// The bytes are the file that the user names; it stands alone.
pub fn image(data: &[u8]) {
    vmdk::file_kind(data);
    open(&MemoryStore::new([(DISK, data)]));
}

/// Opens the disk and uses it if it opens.
fn open(store: &MemoryStore) {
    let Ok(file) = store.file(DISK) else { return };
    match VmdkDisk::open(Arc::new(file), OpenOptions::default()) {
        Ok(disk) => exercise(&Arc::new(disk)),
        Err(e) => assert!(!e.to_string().is_empty(), "an error says what is wrong"),
    }
}

/// Reads, walks and checks a disk. Errors are fine; what is said about one sector must not contradict itself.
fn exercise(disk: &Arc<VmdkDisk>) {
    disk.info();
    let image = Volume::new(Arc::clone(disk) as Arc<dyn BlockRead>, disk.files());
    let end = image.len();
    let mut scratch = ReadBuffer::new();
    for offset in [
        0,
        511,
        end / 2,
        end.saturating_sub(MAX_READ as u64),
        end.saturating_sub(1),
        end,
    ] {
        if let Ok(bytes) = image.read(offset, MAX_READ, &mut scratch) {
            assert_eq!(
                bytes.len() as u64,
                (end - offset).min(MAX_READ as u64),
                "a read is whole"
            );
        }
    }
    for start in [0, end / 2] {
        walk(disk, start / SECTOR);
        seek(&image, start);
    }
    // errors are expected here; that it ends is the point
    vmdk::check(disk);
}

fn walk(disk: &VmdkDisk, mut at: u64) {
    let end = disk.geometry().sectors;
    for _ in 0..STEPS {
        if at >= end {
            return;
        }
        let Ok((content, sectors)) = disk.content_at(Lba(at)) else {
            return;
        };
        assert!((1..=end - at).contains(&sectors), "{sectors} sectors at {at} of {end}");
        let mut one = [1; SECTOR as usize];
        if content.is_zero() && disk.read_at(Lba(at), &mut one).is_ok() {
            assert_eq!(one, [0; SECTOR as usize], "sector {at} is said to be zero");
        }
        at += sectors;
    }
}

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
