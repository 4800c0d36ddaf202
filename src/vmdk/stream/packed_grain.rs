//! Compressed grains of a stream.

use libdeflater::{CompressionLvl, Compressor};

use crate::block::SECTOR;
use crate::error::{Error, Result};

/// Sectors of a grain: 64 KiB, the grain size of all streams in the field.
pub(super) const GRAIN: u64 = 128;
pub(super) const GRAIN_BYTES: usize = (GRAIN * SECTOR) as usize;
/// Maximum number of threads that compress: the window has too few grains to keep more of them busy.
const MAX_THREADS: usize = 8;
/// Compression level: zlib's default. libdeflate needs a fraction of zlib's time for the same size.
const LEVEL: i32 = 6;
/// Bytes of the header of a compressed grain: its LBA (u64) and the size of its compressed data (u32).
pub(super) const GRAIN_HEADER: usize = 12;

/// Compresses grains in parallel and puts a header before each. The result is empty for a grain that is all zeroes. The
/// last grain may be partial: it is padded with zeroes.
pub(super) fn compress(first: u64, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
    let grains: Vec<(u64, &[u8])> = (first..).zip(bytes.chunks(GRAIN_BYTES)).collect();
    let threads = std::thread::available_parallelism()
        .map_or(1, usize::from)
        .min(MAX_THREADS);
    let share = grains.len().div_ceil(threads).max(1);
    let Some((own, others)) = grains.split_at_checked(share.min(grains.len())) else {
        return Ok(Vec::new());
    };
    std::thread::scope(|scope| {
        let spawn = |part| {
            std::thread::Builder::new()
                .name("pack".to_owned())
                .spawn_scoped(scope, move || compress_all(part))
        };
        let others: Vec<_> = others.chunks(share).map(|part| (part, spawn(part))).collect();
        let mut compressed = compress_all(own)?;
        for (part, thread) in others {
            // If a thread could not be spawned, or panicked, this thread compresses its part.
            let done = thread.ok().and_then(|thread| thread.join().ok());
            compressed.extend(done.unwrap_or_else(|| compress_all(part))?);
        }
        Ok(compressed)
    })
}

fn compress_all(grains: &[(u64, &[u8])]) -> Result<Vec<Vec<u8>>> {
    let level = CompressionLvl::new(LEVEL).unwrap_or_default();
    let mut compressor = Compressor::new(level);
    grains
        .iter()
        .map(|(number, grain)| compress_one(&mut compressor, *number, grain))
        .collect()
}

fn compress_one(compressor: &mut Compressor, number: u64, grain: &[u8]) -> Result<Vec<u8>> {
    if is_zero(grain) {
        return Ok(Vec::new());
    }
    let mut whole = Vec::new();
    let grain = if grain.len() == GRAIN_BYTES {
        grain
    } else {
        // The last grain of the disk is stored whole too: all readers accept that.
        whole.extend_from_slice(grain);
        whole.resize(GRAIN_BYTES, 0);
        &whole
    };
    let mut out = vec![0; GRAIN_HEADER + compressor.zlib_compress_bound(GRAIN_BYTES)];
    let body = out.get_mut(GRAIN_HEADER..).unwrap_or_default();
    let size = compressor
        .zlib_compress(grain, body)
        .map_err(|e| Error::corrupt(format!("compressing grain {number}: {e}")))?;
    let header = [
        (number * GRAIN).to_le_bytes().as_slice(),
        (size as u32).to_le_bytes().as_slice(),
    ]
    .concat();
    out.get_mut(..GRAIN_HEADER).unwrap_or_default().copy_from_slice(&header);
    out.truncate(GRAIN_HEADER + size);
    Ok(out)
}

/// Returns true if all bytes are zero. Chunks without an early exit let the compiler vectorize the loop.
fn is_zero(bytes: &[u8]) -> bool {
    bytes
        .chunks(64)
        .all(|chunk| chunk.iter().fold(0, |all, byte| all | byte) == 0)
}
