//! Compressed grains: header, bounds, inflate.
//!
//! A grain is `u64 lba · u32 size` (or `u32 size` alone, in streams without markers), followed by `size` bytes of zlib
//! data. It starts at a sector border.
//!
//! The data are untrusted: the size is checked against the grain and the file before memory is taken, and inflating
//! stops at the size of a grain, so a decompression bomb yields an error.

use std::cell::RefCell;

use libdeflater::{DecompressionError, Decompressor};

use crate::block::SECTOR;
use crate::error::{Error, Result};
use crate::vmdk::extent::CompressedGrain;

/// Bytes of the first read if the length of the grain can't be guessed from the table.
const FIRST_READ: usize = 8 << 10;

thread_local! {
    /// Inflater and input buffer of each thread: expensive to create, cheap to keep.
    static TOOLS: RefCell<(Decompressor, Vec<u8>)> = RefCell::new((Decompressor::new(), Vec::new()));
}

/// Inflates `grain` into `out`, whose length is `grain.grain` or `grain.inside` sectors. If the grain inflates to its
/// `inside` sectors only, the rest of `out` is zero.
///
/// Errors: `Corrupt` for a wrong LBA, a size out of bounds, damaged data, a wrong checksum or length.
pub(crate) fn inflate(grain: &CompressedGrain<'_>, out: &mut [u8]) -> Result<()> {
    // Borrowed over the read: a store never inflates a grain of the engine, so the borrow is not taken twice. The
    // buffer keeps its size, for each thread at most 16 MiB, twice the largest grain.
    TOOLS.with_borrow_mut(|(decompressor, input)| {
        let (start, size) = load(grain, input)?;
        let body = input.get(start..start + size).unwrap_or_default();
        let whole = (grain.grain * SECTOR) as usize;
        let inside = (grain.inside * SECTOR) as usize;
        let got = if out.len() >= whole {
            decompressor.zlib_decompress(body, out)
        } else {
            // The last grain of an extent may be stored whole, which does not fit into `out`.
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
            Err(DecompressionError::BadData) => Err(damaged(
                grain,
                &format!("its {size} bytes are not an intact zlib stream"),
            )),
        }
    })
}

/// Reads header and body of the grain into `input`. Returns the position of the body in it and its length.
///
/// One read if the guess covers the grain, else a second one for the rest.
fn load(grain: &CompressedGrain<'_>, input: &mut Vec<u8>) -> Result<(usize, usize)> {
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
    input.resize(guess, 0);
    grain.file.read_exact_at(at, input)?;
    let size = check_header(grain, input)?;
    let end = header + size;
    // Compared before memory is taken for the body. `size` is at most 16 MiB here, so the sum fits.
    if end > left {
        return Err(damaged(
            grain,
            &format!(
                "its size is {size} bytes, expected at most {left} bytes with the header, up to the end of the file"
            ),
        ));
    }
    if end > guess {
        input.resize(end, 0);
        grain
            .file
            .read_exact_at(at + guess as u64, input.get_mut(guess..).unwrap_or_default())?;
    }
    Ok((header, size))
}

/// Checks the LBA and the size in the grain's header. Returns the size of the body.
fn check_header(grain: &CompressedGrain<'_>, bytes: &[u8]) -> Result<usize> {
    let mut rest = bytes;
    if grain.markers {
        let lba = take::<8>(&mut rest).map_or(0, u64::from_le_bytes);
        if lba != grain.lba {
            return Err(damaged(
                grain,
                &format!("its header has sector {lba} of the extent, expected {}", grain.lba),
            ));
        }
    }
    let size = take::<4>(&mut rest).map_or(0, u32::from_le_bytes);
    // Incompressible data grow a little when they are compressed. qemu and VirtualBox allow twice the grain.
    let most = 2 * grain.grain * SECTOR;
    if size == 0 || u64::from(size) > most {
        return Err(damaged(
            grain,
            &format!("its size is {size} bytes, expected 1 to {most}"),
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
    let at = grain.sector * SECTOR;
    Error::corrupt(format!("compressed grain of sector {} (byte {at}): {what}", grain.lba))
        .at_byte(at)
        .in_file(grain.file.label())
}
