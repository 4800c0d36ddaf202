//! `--map`: lists where a disk has data, holes and zeroes.
//!
//! The image determines how many ranges there are: a hostile one of a megabyte can describe billions. So they are
//! streamed, never collected, and a list ends after [`LIMIT`] ranges unless `limit=` says otherwise, with a line (in JSON:
//! `"complete": false`) that says where it stopped.

use std::io::{self, Write};
use std::sync::Arc;

use super::open_source;
use crate::block::{BlockRead, Content, Lba, SECTOR};
use crate::config::{DiskConfig, Query};
use crate::error::Result;
use crate::escape;
use crate::overlay::open_overlay;
use crate::process::output::written;
use crate::store::Access;

/// Default of `limit=`: a disk of 1 TiB in pieces of 1 MiB, about 60 MB of JSON.
const LIMIT: u64 = 1_000_000;

/// Prints the ranges of data, holes and zeroes of each disk (`--map`). For a disk with an overlay it prints the ranges
/// that the overlay has changed.
///
/// Errors: the first disk that cannot be opened or read ends the action. A closed pipe ends it without an error.
pub fn map(query: &Query) -> Result<u8> {
    // All disks are opened before the first line: a later error would follow output that looks complete.
    let sources = query.disks.iter().map(MappedDisk::open).collect::<Result<Vec<_>>>()?;
    let mut out = Listing {
        out: io::BufWriter::new(io::stdout().lock()),
        closed: false,
    };
    if query.json {
        map_json(&sources, &mut out)?;
    } else {
        map_text(&sources, &mut out)?;
    }
    out.flush()?;
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
    /// Maximum number of ranges to list.
    limit: u64,
}

impl MappedDisk {
    fn open(disk: &DiskConfig) -> Result<Self> {
        let source = open_source(disk)?;
        let delta = open_overlay(disk, &*source, Access::Read)?;
        Ok(Self {
            name: disk.name.to_string_lossy().into_owned(),
            holes: delta.is_none(),
            disk: delta.map_or_else(|| source.disk(), |delta| Arc::new(delta)),
            limit: match disk.map_limit {
                Some(0) => u64::MAX,
                limit => limit.unwrap_or(LIMIT),
            },
        })
    }
}

/// Continuation of a listing after a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    Range,
    Stop,
}

/// Standard output. Once its reader has closed it, writes do nothing.
struct Listing<W> {
    out: W,
    closed: bool,
}

impl<W: Write> Listing<W> {
    fn write(&mut self, text: &str) -> Result<Next> {
        let result = self.out.write_all(text.as_bytes());
        self.note(result)
    }

    fn flush(&mut self) -> Result<()> {
        let result = self.out.flush();
        self.note(result).map(drop)
    }

    fn note(&mut self, result: io::Result<()>) -> Result<Next> {
        match result {
            // The reader has seen enough, for example `head`: the rest need not be walked.
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => self.closed = true,
            other => written(other)?,
        }
        Ok(if self.closed { Next::Stop } else { Next::Range })
    }
}

/// Calls `each` with the ranges of a disk in ascending order, at most as many as its limit. Returns the start of the first
/// range that was left out; `None` if the list is complete, or `each` has stopped it.
///
/// The source reports a range in pieces; adjacent pieces with the same content are coalesced here.
fn for_each_range(mapped: &MappedDisk, mut each: impl FnMut(&ContentRange) -> Result<Next>) -> Result<Option<u64>> {
    let disk = &mapped.disk;
    let end = disk.geometry().sectors;
    let mut left = mapped.limit;
    let mut open: Option<ContentRange> = None;
    let mut at = 0;
    loop {
        let piece = if at < end {
            Some(disk.content_at(Lba(at))?)
        } else {
            None
        };
        // Coalesced before the range is counted, so that the limit does not depend on the pieces of the source.
        if let (Some((content, sectors)), Some(last)) = (piece, &mut open)
            && last.content == name(content)
        {
            last.length += sectors * SECTOR;
            at += sectors.max(1);
            continue;
        }
        // A hole of an overlay is dropped here and takes nothing of the limit.
        if let Some(last) = open.take().filter(|last| mapped.holes || last.content != HOLE) {
            if left == 0 {
                return Ok(Some(last.start));
            }
            left -= 1;
            if each(&last)? == Next::Stop {
                return Ok(None);
            }
        }
        let Some((content, sectors)) = piece else {
            return Ok(None);
        };
        open = Some(ContentRange {
            start: at * SECTOR,
            length: sectors * SECTOR,
            content: name(content),
        });
        // At least one sector, so that the loop ends whatever the source reports.
        at += sectors.max(1);
    }
}

fn name(content: Content) -> &'static str {
    match content {
        Content::Data => "data",
        Content::Zero => "zero",
        Content::Hole => HOLE,
    }
}

fn map_text(disks: &[MappedDisk], out: &mut Listing<impl Write>) -> Result<()> {
    for disk in disks {
        let name = escape::printable(&disk.name);
        out.write(&format!("{name}:\n  {:>16} {:>16}  content\n", "start", "length"))?;
        let cut = for_each_range(disk, |s| {
            out.write(&format!("  {:>16} {:>16}  {}\n", s.start, s.length, s.content))
        })?;
        if let Some(from) = cut {
            let limit = disk.limit;
            out.write(&format!(
                "  cut off after {limit} ranges, the rest from byte {from} on is not listed: limit=N lists more, limit=0 all\n"
            ))?;
        }
        if out.closed {
            break;
        }
    }
    Ok(())
}

/// Prints the maps as a JSON array, written by hand so that the ranges need not be in memory together.
fn map_json(disks: &[MappedDisk], out: &mut Listing<impl Write>) -> Result<()> {
    out.write("[")?;
    for (i, disk) in disks.iter().enumerate() {
        let comma = if i > 0 { "," } else { "" };
        let name = escape::json(&serde_json::Value::from(disk.name.as_str()).to_string());
        out.write(&format!("{comma}\n {{\"name\": {name}, \"map\": ["))?;
        let mut first = true;
        let cut = for_each_range(disk, |s| {
            let comma = if std::mem::take(&mut first) { "" } else { "," };
            out.write(&format!("{comma}\n  {}", s.json()))
        })?;
        let rest = cut.map_or_else(String::new, |from| format!(", \"next\": {from}"));
        out.write(&format!("\n ], \"complete\": {}{rest}}}", cut.is_none()))?;
        if out.closed {
            break;
        }
    }
    out.write("\n]\n").map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::Geometry;

    /// A disk of alternating sectors of data and holes.
    #[derive(Debug)]
    struct Alternating(u64);

    impl BlockRead for Alternating {
        fn geometry(&self) -> Geometry {
            Geometry {
                sectors: self.0,
                granule: 1,
                preferred: 1,
            }
        }

        fn read_at(&self, _at: Lba, _buf: &mut [u8]) -> Result<()> {
            Ok(())
        }

        fn content_at(&self, at: Lba) -> Result<(Content, u64)> {
            let content = if at.0.is_multiple_of(2) {
                Content::Data
            } else {
                Content::Hole
            };
            Ok((content, 1))
        }

        fn is_zero(&self, _at: Lba, _sectors: u64) -> bool {
            false
        }
    }

    fn mapped(sectors: u64, limit: u64) -> Vec<MappedDisk> {
        vec![MappedDisk {
            name: "a\nb.raw".to_owned(),
            disk: Arc::new(Alternating(sectors)),
            holes: true,
            limit,
        }]
    }

    fn listing<W>(out: W) -> Listing<W> {
        Listing { out, closed: false }
    }

    #[test]
    fn a_list_ends_at_its_limit_and_says_so() {
        let lists = |limit| {
            let (mut json, mut text) = (listing(Vec::new()), listing(Vec::new()));
            map_json(&mapped(6, limit), &mut json).unwrap();
            map_text(&mapped(6, limit), &mut text).unwrap();
            let json: serde_json::Value = serde_json::from_slice(&json.out).unwrap();
            (json[0].clone(), String::from_utf8(text.out).unwrap())
        };
        for limit in 1..=5 {
            let (json, text) = lists(limit);
            assert_eq!(json["map"].as_array().unwrap().len() as u64, limit);
            assert_eq!(
                (&json["complete"], json["next"].as_u64()),
                (&false.into(), Some(limit * SECTOR))
            );
            assert!(text.contains(&format!(
                "cut off after {limit} ranges, the rest from byte {}",
                limit * SECTOR
            )));
        }
        let (json, text) = lists(6);
        assert_eq!((&json["complete"], &json["name"]), (&true.into(), &"a\nb.raw".into()));
        assert!(
            json.get("next").is_none() && !text.contains("cut off") && text.starts_with("a\\nb.raw:\n"),
            "{text}"
        );
        assert_eq!(text.lines().count(), 8);
    }

    #[test]
    fn a_closed_pipe_ends_the_list_without_an_error() {
        /// A pipe without a reader.
        struct Closed;

        impl Write for Closed {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::BrokenPipe.into())
            }

            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }

        // A disk that cannot be listed to its end in any time.
        map_text(&mapped(u64::MAX >> 9, u64::MAX), &mut listing(Closed)).unwrap();
        map_json(&mapped(u64::MAX >> 9, u64::MAX), &mut listing(Closed)).unwrap();
    }
}
