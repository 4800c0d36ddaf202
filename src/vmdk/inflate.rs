//! Compressed grains: header, bounds, inflate.
//!
//! A grain is `u64 lba · u32 size` (or `u32 size` alone, in streams without markers) and `size` bytes of zlib
//! data, in front of a sector border. Inflating is bounded by the grain: a stream that yields more is an attack.

use std::cell::RefCell;

use libdeflater::{DecompressionError, Decompressor};

use crate::block::SECTOR;
use crate::error::{Error, Result};
use crate::vmdk::extent::CompressedGrain;

/// What is read at first where nothing tells the length of the grain.
const FIRST_READ: usize = 8 << 10;

thread_local! {
    /// One inflater and one input buffer a thread: both are dear to make and cheap to keep.
    static TOOLS: RefCell<(Decompressor, Vec<u8>)> = RefCell::new((Decompressor::new(), Vec::new()));
}

/// Inflates `grain` into `out`, which is `grain.grain` or `grain.inside` sectors; what the grain does not fill
/// behind its `inside` sectors is zero.
///
/// Errors: `Corrupt` for a wrong LBA, a size out of bounds, damaged data, a wrong checksum or length.
pub(crate) fn inflate(grain: &CompressedGrain<'_>, out: &mut [u8]) -> Result<()> {
    TOOLS.with_borrow_mut(|(decompressor, packed)| {
        let (start, size) = load(grain, packed)?;
        let body = packed.get(start..start + size).unwrap_or_default();
        let whole = (grain.grain * SECTOR) as usize;
        let inside = (grain.inside * SECTOR) as usize;
        let got = if out.len() >= whole {
            decompressor.zlib_decompress(body, out)
        } else {
            // only the part inside of the extent is wanted, but the grain may be stored whole
            let mut full = vec![0; whole];
            let got = decompressor.zlib_decompress(body, &mut full);
            out.copy_from_slice(full.get(..out.len()).unwrap_or_default());
            got
        };
        match got {
            Ok(n) if n == whole || n == inside => {
                out.get_mut(n..).unwrap_or_default().fill(0);
                Ok(())
            }
            Ok(n) => Err(damaged(
                grain,
                &format!("inflates to {n} bytes, expected {whole} or {inside}"),
            )),
            Err(DecompressionError::InsufficientSpace) => Err(damaged(
                grain,
                &format!("inflates to more than the {whole} bytes of a grain"),
            )),
            Err(DecompressionError::BadData) => {
                Err(damaged(grain, &format!("{size} bytes that are no intact zlib stream")))
            }
        }
    })
}

/// Reads header and body of the grain into `packed`; where in it the body starts, and its length.
fn load(grain: &CompressedGrain<'_>, packed: &mut Vec<u8>) -> Result<(usize, usize)> {
    let at = grain.sector * SECTOR;
    let left = usize::try_from(grain.file.len().saturating_sub(at)).unwrap_or(usize::MAX);
    let header = if grain.markers { 12 } else { 4 };
    let guess = grain
        .likely_sectors
        .map_or(FIRST_READ, |s| (s * SECTOR) as usize)
        .min(left);
    if guess < header {
        return Err(damaged(grain, "the file ends inside of its header"));
    }
    packed.resize(guess, 0);
    grain.file.read_exact_at(at, packed)?;
    let size = check_header(grain, packed)?;
    let end = header + size;
    if end > left {
        return Err(damaged(
            grain,
            &format!("is said to be {size} bytes, but the file ends {left} bytes on"),
        ));
    }
    if end > guess {
        packed.resize(end, 0);
        grain
            .file
            .read_exact_at(at + guess as u64, packed.get_mut(guess..).unwrap_or_default())?;
    }
    Ok((header, size))
}

/// Checks LBA and size in the grain's header; the size of the body.
fn check_header(grain: &CompressedGrain<'_>, bytes: &[u8]) -> Result<usize> {
    let mut rest = bytes;
    if grain.markers {
        let lba = take::<8>(&mut rest).map_or(0, u64::from_le_bytes);
        if lba != grain.lba {
            return Err(damaged(
                grain,
                &format!("its header says sector {lba} of the extent, expected {}", grain.lba),
            ));
        }
    }
    let size = take::<4>(&mut rest).map_or(0, u32::from_le_bytes);
    // incompressible data grow a little; twice the grain is what qemu and VirtualBox allow
    let most = 2 * grain.grain * SECTOR;
    if size == 0 || u64::from(size) > most {
        return Err(damaged(
            grain,
            &format!("is said to be {size} bytes, expected 1 to {most}"),
        ));
    }
    Ok(size as usize)
}

fn take<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
    let (head, tail) = bytes.split_first_chunk::<N>()?;
    *bytes = tail;
    Some(*head)
}

fn damaged(grain: &CompressedGrain<'_>, what: &str) -> Error {
    Error::corrupt(format!(
        "{}: compressed grain of sector {} (byte {}): {what}",
        grain.file.label(),
        grain.lba,
        grain.sector * SECTOR
    ))
}
