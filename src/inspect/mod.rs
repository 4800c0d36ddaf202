//! The actions that only look: `--info`, `--list`, `--map`, `--check`, `--dump`.
//!
//! Each makes a value that serde can write, and prints it as JSON or as text. A disk that can't be opened ends the
//! action: what was asked for can't be told.

use std::fmt::Write as _;
use std::io::{self, Write};
use std::sync::Arc;

use serde::Serialize;

use crate::block::{BlockRead, Content, Lba, SECTOR};
use crate::config::{DiskConfig, Query, SourceConfig};
use crate::error::{Error, Result};
use crate::overlay::{OverlayInfo, describe_overlay, open_overlay};
use crate::source::nbd;
use crate::store::Access;
use crate::vmdk::{self, CheckReport};
use crate::volume::{Description, Source, open_source};

/// Exit statuses of `--check` beside 0: what a script asks.
const LEAKS: u8 = 3;
const CORRUPT: u8 = 4;

/// `--info`: prints what each disk is.
pub fn info(query: &Query) -> Result<u8> {
    let described = query.disks.iter().map(describe).collect::<Result<Vec<_>>>()?;
    print(query.json, &described, |out| {
        for described in &described {
            match described {
                Described::Disk(d) => info_text(d, out),
                Described::Server(s) => server_text(s, out),
            }
        }
    })?;
    Ok(0)
}

/// `--list`: prints what each server offers.
pub fn list(query: &Query) -> Result<u8> {
    let servers = query.disks.iter().filter_map(|disk| match &disk.source {
        SourceConfig::Nbd(server) => Some(nbd::list(server)),
        SourceConfig::Local(_) => None,
    });
    let servers = servers.collect::<Result<Vec<_>>>()?;
    print(query.json, &servers, |out| {
        servers.iter().for_each(|s| server_text(s, out))
    })?;
    Ok(0)
}

/// What `--info` tells of a disk: of an NBD server's what the server says.
#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Described {
    Disk(Box<DescribedDisk>),
    Server(nbd::ServerInfo),
}

fn describe(disk: &DiskConfig) -> Result<Described> {
    match &disk.source {
        SourceConfig::Nbd(server) if server.dynamic => nbd::list(server).map(Described::Server),
        SourceConfig::Nbd(server) if disk.overlay.is_none() => nbd::info(server).map(Described::Server),
        _ => {
            let source = open_source(disk)?;
            let (mut described, delta) = (source.describe(disk), open_overlay(disk, &source, Access::Read)?);
            if let Some(delta) = delta.as_ref().filter(|_| !disk.read_only) {
                described.reason = delta.refuses_writing(false).map(|e| e.to_string());
                described.writable = described.reason.is_none();
            }
            let overlay = delta.as_ref().map(describe_overlay).transpose()?;
            Ok(Described::Disk(Box::new(DescribedDisk {
                disk: described,
                overlay,
            })))
        }
    }
}

/// `--map`: prints where data, holes and zeroes lie; of a disk with an overlay, what that one has changed.
pub fn map(query: &Query) -> Result<u8> {
    let sources = each(query, |disk, source| {
        let name = disk.name.to_string_lossy().into_owned();
        Ok(match open_overlay(disk, source, Access::Read)? {
            Some(delta) => Mapped {
                name,
                disk: Arc::new(delta),
                holes: false,
            },
            None => Mapped {
                name,
                disk: source.disk(),
                holes: true,
            },
        })
    })?;
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

/// `--check`: prints what is wrong with each disk. Status 0: clean; 3: leaks only; 4: corrupt.
pub fn check(query: &Query) -> Result<u8> {
    let mut checked = Vec::new();
    for disk in &query.disks {
        checked.push(check_one(disk)?);
    }
    print(query.json, &checked, |out| {
        checked.iter().for_each(|c| check_text(c, out))
    })?;
    let status = |c: &Checked| match c.status {
        Status::Clean => 0,
        Status::Leaks => LEAKS,
        Status::Corrupt => CORRUPT,
    };
    Ok(checked.iter().map(status).max().unwrap_or(0))
}

/// `--dump`: prints versions and back ends.
pub fn dump(json: bool) -> Result<u8> {
    let build = Build {
        name: env!("CARGO_PKG_NAME"),
        version: env!("CARGO_PKG_VERSION"),
        backends: BACKENDS,
        libnbd: nbd::version()?,
        formats: ["vmdk", "raw"],
        extents: [
            "FLAT",
            "VMFS",
            "ZERO",
            "SPARSE",
            "SPARSE (compressed)",
            "VMFSSPARSE",
            "SESPARSE",
        ],
        writable: ["raw", "FLAT", "VMFS", "SPARSE"],
        max_links: vmdk::MAX_LINKS,
    };
    print(json, &build, |out| {
        let libnbd = build.libnbd.as_ref().map(|version| format!("libnbd={version}"));
        let lines = [
            format!("{}={}", build.name, build.version),
            format!("backends={}", build.backends.join(",")),
            format!("formats={}", build.formats.join(",")),
            format!("extents={}", build.extents.join(",")),
            format!("writable={}", build.writable.join(",")),
            format!("max_links={}", build.max_links),
        ];
        for line in lines.into_iter().chain(libnbd) {
            out.push_str(&(line + "\n"));
        }
    })?;
    Ok(0)
}

/// The ways to a disk that this build has.
const BACKENDS: &[&str] = if cfg!(feature = "nbd") {
    &["native", "nbd"]
} else {
    &["native"]
};

#[derive(Debug, Serialize)]
struct Build {
    name: &'static str,
    version: &'static str,
    backends: &'static [&'static str],
    /// The version of the library that is there now.
    #[serde(skip_serializing_if = "Option::is_none")]
    libnbd: Option<String>,
    formats: [&'static str; 2],
    extents: [&'static str; 7],
    writable: [&'static str; 4],
    max_links: usize,
}

/// What a stretch of nothing is called.
const HOLE: &str = "hole";

/// A range of bytes of one content.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Stretch {
    start: u64,
    length: u64,
    content: &'static str,
}

impl Stretch {
    fn json(&self) -> serde_json::Value {
        serde_json::json!({ "start": self.start, "length": self.length, "content": self.content })
    }
}

#[derive(Debug, Serialize)]
struct DescribedDisk {
    #[serde(flatten)]
    disk: Description,
    #[serde(skip_serializing_if = "Option::is_none")]
    overlay: Option<OverlayInfo>,
}

/// A disk whose map is wanted.
#[derive(Debug)]
struct Mapped {
    name: String,
    disk: Arc<dyn BlockRead>,
    /// Holes are listed too.
    holes: bool,
}

#[derive(Debug, Serialize)]
struct Checked {
    name: String,
    status: Status,
    #[serde(flatten)]
    report: CheckReport,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Status {
    Clean,
    Leaks,
    Corrupt,
}

fn each<T>(query: &Query, what: impl Fn(&DiskConfig, &Source) -> Result<T>) -> Result<Vec<T>> {
    query.disks.iter().map(|disk| what(disk, &open_source(disk)?)).collect()
}

/// Gives `each` the stretches of a disk, one after the other. The source tells neighbours of one content in pieces;
/// they are joined here. Nothing is collected: how many stretches there are is up to the image.
fn stretches(mapped: &Mapped, mut each: impl FnMut(Stretch) -> io::Result<()>) -> Result<()> {
    let disk = &mapped.disk;
    let mut each = |s: Stretch| {
        if mapped.holes || s.content != HOLE {
            each(s)
        } else {
            Ok(())
        }
    };
    let end = disk.geometry().sectors;
    let mut open: Option<Stretch> = None;
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
                if let Some(last) = open.replace(Stretch { start, length, content }) {
                    written_to_stdout(each(last))?;
                }
            }
        }
        at += sectors.max(1);
    }
    open.map_or(Ok(()), |last| written_to_stdout(each(last)))
}

/// An image that can't be opened because it is damaged is a finding and not a failure of the check.
fn check_one(disk: &DiskConfig) -> Result<Checked> {
    let name = disk.name.to_string_lossy().into_owned();
    let report = match report_of(disk) {
        Ok(report) => report,
        Err(e) if e.kind() == crate::error::ErrorKind::Corrupt => CheckReport {
            errors: vec![e.to_string()],
            error_count: 1,
            ..CheckReport::default()
        },
        Err(e) => return Err(e),
    };
    let status = match (&report.error_count, report.leaks + report.unfinished) {
        (0, 0) => Status::Clean,
        (0, _) => Status::Leaks,
        _ => Status::Corrupt,
    };
    Ok(Checked { name, status, report })
}

/// What a check finds in a disk, and in its overlay where it has one.
fn report_of(disk: &DiskConfig) -> Result<CheckReport> {
    let source = open_source(disk)?;
    let mut report = match &source {
        Source::Vmdk(vmdk) => vmdk::check(vmdk),
        Source::Raw(..) | Source::Nbd(_) | Source::Stream(_) => CheckReport::default(),
    };
    if let Some(delta) = open_overlay(disk, &source, Access::Read)? {
        report.add(vmdk::check(&delta));
    }
    Ok(report)
}

/// Prints JSON, or the text that `text` makes. A reader that went away is no error.
fn print(json: bool, value: &impl Serialize, text: impl FnOnce(&mut String)) -> Result<()> {
    let mut out = String::new();
    if json {
        out = serde_json::to_string_pretty(value)
            .map_err(|e| Error::new(crate::error::ErrorKind::Usage, format!("writing JSON: {e}")))?;
        out.push('\n');
    } else {
        text(&mut out);
    }
    match io::stdout().lock().write_all(out.as_bytes()) {
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => written_to_stdout(other),
    }
}

fn written_to_stdout(result: io::Result<()>) -> Result<()> {
    result.map_err(|e| Error::io("writing to standard output", e))
}

/// Writing to a `String` cannot fail.
macro_rules! line {
    ($out:expr, $($arg:tt)*) => {{ let _ = writeln!($out, $($arg)*); }};
}

fn info_text(described: &DescribedDisk, out: &mut String) {
    let d = &described.disk;
    line!(out, "{}: {}", d.name, d.file);
    line!(out, "  format    {}", d.format);
    line!(out, "  size      {} bytes ({} sectors)", d.size, d.size / SECTOR);
    if let Some(vmdk) = &d.vmdk {
        line!(out, "  type      {}", vmdk.create_type);
        for e in &vmdk.extents {
            let file = e.file.as_deref().unwrap_or("-");
            let grain = e.grain.map_or_else(String::new, |g| format!(", grains of {g} bytes"));
            line!(
                out,
                "  extent    {} {} sectors {}{grain}: {file}",
                e.access,
                e.sectors,
                e.kind
            );
        }
        for (i, link) in vmdk.chain.iter().enumerate() {
            let cid = link.cid.as_deref().unwrap_or("none");
            let parent = link
                .parent_cid
                .as_ref()
                .map_or_else(String::new, |p| format!(", parent {p}"));
            let unclean = if link.unclean {
                ", was not closed after writing"
            } else {
                ""
            };
            line!(
                out,
                "  link {i:<4} {} CID {cid}{parent}{unclean}: {}",
                link.create_type,
                link.file
            );
        }
    }
    line!(out, "  read by   {}", d.read_by);
    if let Some(overlay) = &described.overlay {
        let parent = overlay.parent_cid.as_deref().unwrap_or("none");
        let unclean = if overlay.unclean {
            ", was not closed after writing"
        } else {
            ""
        };
        let commit = if overlay.unfinished_commit {
            ", a commit was begun and not finished"
        } else {
            ""
        };
        let file = &overlay.file;
        line!(
            out,
            "  overlay   {} bytes changed, parent {parent}{unclean}{commit}: {file}",
            overlay.changed
        );
    }
    let reason = d.reason.as_ref().map_or_else(String::new, |r| format!(": {r}"));
    line!(out, "  writable  {}{reason}", if d.writable { "yes" } else { "no" });
}

/// As `nbdinfo` shows it. Names and words of the server are shown without what a terminal would obey.
fn server_text(s: &nbd::ServerInfo, out: &mut String) {
    let yes = |yes: bool| if yes { "yes" } else { "no" };
    line!(out, "{}:", s.server);
    line!(
        out,
        "  protocol  {}, {} TLS",
        s.protocol,
        if s.tls { "with" } else { "without" }
    );
    line!(
        out,
        "  replies   {}",
        if s.structured { "structured" } else { "simple" }
    );
    for e in &s.exports {
        line!(out, "  export \"{}\":", e.export.escape_debug());
        if !e.description.is_empty() {
            line!(out, "    description      {}", e.description.escape_debug());
        }
        if let Some(error) = &e.error {
            line!(out, "    error            {}", error.escape_debug());
            continue;
        }
        line!(out, "    size             {} bytes", e.size);
        for (flag, is) in &e.flags {
            line!(out, "    {flag:16} {}", yes(*is));
        }
        for (name, size) in ["minimum", "preferred", "maximum"].iter().zip(e.block_sizes) {
            let size = if size == 0 {
                "not said".to_owned()
            } else {
                format!("{size} bytes")
            };
            line!(out, "    block_size {name:9} {size}");
        }
        if !e.contexts.is_empty() {
            line!(out, "    contexts         {}", e.contexts.join(", ").escape_debug());
        }
    }
}

fn map_text(disks: &[Mapped], out: &mut impl Write) -> Result<()> {
    for disk in disks {
        written_to_stdout(writeln!(
            out,
            "{}:\n  {:>16} {:>16}  content",
            disk.name, "start", "length"
        ))?;
        stretches(disk, |s| {
            writeln!(out, "  {:>16} {:>16}  {}", s.start, s.length, s.content)
        })?;
    }
    Ok(())
}

fn map_json(disks: &[Mapped], out: &mut impl Write) -> Result<()> {
    written_to_stdout(write!(out, "["))?;
    for (i, disk) in disks.iter().enumerate() {
        let comma = if i > 0 { "," } else { "" };
        written_to_stdout(write!(
            out,
            "{comma}\n {{\"name\": {}, \"map\": [",
            serde_json::Value::from(disk.name.as_str())
        ))?;
        let mut first = true;
        stretches(disk, |s| {
            let comma = if std::mem::take(&mut first) { "" } else { "," };
            write!(out, "{comma}\n  {}", s.json())
        })?;
        written_to_stdout(write!(out, "\n ]}}"))?;
    }
    written_to_stdout(writeln!(out, "\n]"))
}

fn check_text(c: &Checked, out: &mut String) {
    for e in &c.report.errors {
        line!(out, "{}: error: {e}", c.name);
    }
    let more = c.report.error_count - c.report.errors.len() as u64;
    if more > 0 {
        line!(out, "{}: and {more} errors more", c.name);
    }
    for n in &c.report.notes {
        line!(out, "{}: note: {n}", c.name);
    }
    let verdict = match c.status {
        Status::Clean => "clean".to_owned(),
        Status::Leaks if c.report.unfinished > 0 => format!(
            "{} leaked grains, {} unfinished entries (completed when it is opened for writing), nothing else",
            c.report.leaks, c.report.unfinished
        ),
        Status::Leaks => format!("{} leaked grains, nothing else", c.report.leaks),
        Status::Corrupt => format!(
            "corrupt: {} errors, {} leaked grains",
            c.report.error_count, c.report.leaks
        ),
    };
    line!(out, "{}: {verdict} ({} grains looked at)", c.name, c.report.grains);
}

/// The file that a disk comes from, for messages.
pub fn source_name(disk: &DiskConfig) -> String {
    disk.source.label()
}
