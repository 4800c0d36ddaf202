//! streamOptimized extents.

use std::sync::Arc;

use anyhow::Result;

use super::Variant;
use crate::make::ctx::{Ctx, Made};
use crate::make::model::Content;
use crate::make::write::{self, Descriptor, Stream};

pub(super) const VARIANTS: &[Variant] = &[
    Variant::new(
        "stream_footer",
        "streamOptimized as VMware writes it: GD_AT_END, markers in order, footer, end; partial last grain kept short",
        |c| {
            let layer = c.layer("stream", 140_001, 128).fill([0, 1, 2, 511, 512, 700, 1093]);
            Ok(c.stream_of(layer, "generated-stream.vmdk", &Stream::default())?.made())
        },
    ),
    Variant::new(
        "stream_padded",
        "streamOptimized: the partial last grain is padded to a whole grain, as VirtualBox does; nominal size below the header capacity",
        padded,
    ),
    Variant::new(
        "stream_progress_marker",
        "streamOptimized with marker type 4 between the grains and tables, whole tables missing",
        |c| {
            let layer = c.layer("stream", 5 << 16, 128).fill([3, 512, 2048, 2559]);
            Ok(c.stream_of(
                layer,
                "disk.vmdk",
                &Stream {
                    progress: true,
                    ..Stream::default()
                },
            )?
            .made())
        },
    ),
    Variant::new(
        "stream_no_footer",
        "streamOptimized without footer: the first header has the directory offset, grains follow it in the file",
        |c| without_footer(c, true),
    ),
    Variant::new(
        "stream_no_lba",
        "compressed grains without markers (flag bit 17 clear): 4-byte size in front (open-vmdk, dissect); qemu expects bare zlib",
        |c| without_footer(c, false),
    ),
    Variant::new(
        "stream_gap_run",
        "streamOptimized: two grains, nine missing tables, then 40 grains in sequence across a table end (read-ahead)",
        |c| {
            let run = 11 * 512 - 20..11 * 512 + 20;
            let layer = c.layer("stream", 12 << 16, 128).fill([0, 1]).fill(run);
            Ok(c.stream_of(layer, "disk.vmdk", &Stream::default())?.made())
        },
    ),
    Variant::new(
        "stream_grain_16",
        "streamOptimized with grains of 8 KiB, seven tables of which three are missing",
        |c| {
            let layer = c
                .layer("stream", 50_003, 16)
                .fill([0, 511, 512, 1600, 3125])
                .fill(2560..2600);
            Ok(c.stream_of(layer, "disk.vmdk", &Stream::default())?.made())
        },
    ),
    Variant::new(
        "stream_trailing_blanks",
        "streamOptimized: blanks after most values, as VMware's stream writer puts them, and another first line",
        trailing_blanks,
    ),
];

fn padded(c: &Ctx) -> Result<Made> {
    let layer = c.layer("stream", 140_001, 128).fill([0, 600, 1093]);
    let text = Descriptor::new("streamOptimized", ["RDONLY 140001 SPARSE \"disk.vmdk\""]);
    let text = Descriptor { encoding: None, ..text };
    let whole = layer.clone().resized(layer.sectors().next_multiple_of(128));
    let options = Stream {
        short_last: false,
        ..Stream::default()
    };
    let open = c.at("disk.vmdk");
    write::stream(&open, &whole, &text.bytes()?, &options)?;
    Ok(Made::new(open, Arc::new(layer)))
}

fn trailing_blanks(c: &Ctx) -> Result<Made> {
    let layer = c.layer("stream", 8192, 128).fill([0, 1, 63]);
    let text = Descriptor {
        encoding: None,
        first: "# Description file created by VMDK stream converter",
        ..Descriptor::new("streamOptimized", ["RDONLY 8192 SPARSE \"generated-stream.vmdk\" "])
    };
    let text = text
        .text()
        .replace("version=1", "version=1 ")
        .replace("CID=1234abcd", "CID=1234abcd ");
    let open = c.at("disk.vmdk");
    write::stream(
        &open,
        &layer,
        text.as_bytes(),
        &Stream {
            desc_len: 2,
            ..Stream::default()
        },
    )?;
    Ok(Made::new(open, Arc::new(layer)))
}

fn without_footer(c: &Ctx, lba_header: bool) -> Result<Made> {
    let layer = c.layer("stream", 8192, 128).fill([0, 2, 63]);
    let text = Descriptor::new("streamOptimized", ["RW 8192 SPARSE \"disk.vmdk\""]);
    let options = Stream {
        footer: false,
        desc_len: 20,
        lba_header,
        ..Stream::default()
    };
    let open = c.at("disk.vmdk");
    write::stream(&open, &layer, &text.bytes()?, &options)?;
    Ok(Made::new(open, Arc::new(layer)))
}
