//! `--map`: lists where a disk has data, holes and zeroes.

use std::io::{self, Write};
use std::sync::Arc;

use super::written_to_stdout;
use crate::block::{BlockRead, Content, Lba, SECTOR};
use crate::config::Query;
use crate::error::Result;
use crate::overlay::open_overlay;
use crate::store::Access;
use crate::volume::open_source;

/// Prints the ranges of data, holes and zeroes of each disk (`--map`). For a disk with an overlay it prints the ranges
/// that the overlay has changed.
///
/// Errors: the first disk that cannot be opened or read ends the action.
pub fn map(query: &Query) -> Result<u8> {
    let open = |disk| {
        let source = open_source(disk)?;
        let name = disk.name.to_string_lossy().into_owned();
        Ok(match open_overlay(disk, &source, Access::Read)? {
            Some(delta) => MappedDisk {
                name,
                disk: Arc::new(delta),
                holes: false,
            },
            None => MappedDisk {
                name,
                disk: source.disk(),
                holes: true,
            },
        })
    };
    let sources = query.disks.iter().map(open).collect::<Result<Vec<_>>>()?;
    // Buffered and streamed: the image determines how many ranges there are, so they are never in memory together.
    let mut out = io::BufWriter::new(io::stdout().lock());
    let written = if query.json {
        map_json(&sources, &mut out)
    } else {
        map_text(&sources, &mut out)
    };
    written?;
    written_to_stdout(out.flush())?;
    Ok(0)
}

/// Name of the content of a hole in the output.
const HOLE: &str = "hole";

/// Range of bytes with one content.
#[derive(Debug, Clone, PartialEq, Eq)]
struct ContentRange {
    start: u64,
    length: u64,
    content: &'static str,
}

impl ContentRange {
    fn json(&self) -> serde_json::Value {
        serde_json::json!({ "start": self.start, "length": self.length, "content": self.content })
    }
}

/// Disk to map.
#[derive(Debug)]
struct MappedDisk {
    name: String,
    disk: Arc<dyn BlockRead>,
    /// True if holes are listed too: a hole of an overlay is an unchanged range of its base.
    holes: bool,
}

/// Calls `each` with the ranges of a disk in ascending order. The source reports a range in pieces; adjacent pieces
/// with the same content are coalesced here. The ranges are not collected: the image determines how many there are.
fn for_each_range(mapped: &MappedDisk, mut each: impl FnMut(ContentRange) -> io::Result<()>) -> Result<()> {
    let disk = &mapped.disk;
    let mut each = |s: ContentRange| {
        if mapped.holes || s.content != HOLE {
            each(s)
        } else {
            Ok(())
        }
    };
    let end = disk.geometry().sectors;
    let mut open: Option<ContentRange> = None;
    let mut at = 0;
    while at < end {
        let (content, sectors) = disk.content_at(Lba(at))?;
        let content = match content {
            Content::Data => "data",
            Content::Zero => "zero",
            Content::Hole => HOLE,
        };
        let (start, length) = (at * SECTOR, sectors * SECTOR);
        match &mut open {
            Some(last) if last.content == content => last.length += length,
            _ => {
                if let Some(last) = open.replace(ContentRange { start, length, content }) {
                    written_to_stdout(each(last))?;
                }
            }
        }
        // At least one sector, so that the loop ends whatever the source reports.
        at += sectors.max(1);
    }
    open.map_or(Ok(()), |last| written_to_stdout(each(last)))
}

fn map_text(disks: &[MappedDisk], out: &mut impl Write) -> Result<()> {
    for disk in disks {
        written_to_stdout(writeln!(
            out,
            "{}:\n  {:>16} {:>16}  content",
            disk.name, "start", "length"
        ))?;
        for_each_range(disk, |s| {
            writeln!(out, "  {:>16} {:>16}  {}", s.start, s.length, s.content)
        })?;
    }
    Ok(())
}

/// Prints the maps as a JSON array, written by hand so that the ranges need not be in memory together.
fn map_json(disks: &[MappedDisk], out: &mut impl Write) -> Result<()> {
    written_to_stdout(write!(out, "["))?;
    for (i, disk) in disks.iter().enumerate() {
        let comma = if i > 0 { "," } else { "" };
        written_to_stdout(write!(
            out,
            "{comma}\n {{\"name\": {}, \"map\": [",
            serde_json::Value::from(disk.name.as_str())
        ))?;
        let mut first = true;
        for_each_range(disk, |s| {
            let comma = if std::mem::take(&mut first) { "" } else { "," };
            write!(out, "{comma}\n  {}", s.json())
        })?;
        written_to_stdout(write!(out, "\n ]}}"))?;
    }
    written_to_stdout(writeln!(out, "\n]"))
}
