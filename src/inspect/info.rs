//! `--info`: describes disks, and the exports of NBD servers.

use serde::Serialize;

use super::{line, open_source, print, server_text};
use crate::block::SECTOR;
use crate::config::{DiskConfig, Query};
use crate::error::Result;
use crate::overlay::{OverlayInfo, describe_overlay, open_overlay};
use crate::source::ServerInfo;
use crate::store::Access;
use crate::vmdk::DiskInfo;
use crate::volume::{self, Description};

/// Prints the format, the size and the files of each disk (`--info`); for an NBD server, its exports.
///
/// Errors: the first disk that cannot be opened ends the action.
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

/// Result of `--info` for one disk. For an NBD export it is the answer of the server.
#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Described {
    Disk(Box<DescribedDisk>),
    Server(ServerInfo),
}

fn describe(disk: &DiskConfig) -> Result<Described> {
    match volume::server(&disk.source) {
        // The server itself was named and no export of it, so all are described.
        Some(server) if disk.source.settings().is_dynamic() => return server.list().map(Described::Server),
        Some(server) if disk.overlay.is_none() => return server.info().map(Described::Server),
        _ => {}
    }
    // The overlay is opened over the source, as it only fits this one; opened alone it could belong to any.
    let source = open_source(disk)?;
    let mut described = volume::describe(disk, &*source);
    let delta = open_overlay(disk, &*source, Access::Read)?;
    // With an overlay, writes go to the delta: it decides alone if the disk is writable.
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

/// Disk that this process opened itself, with its overlay.
#[derive(Debug, Serialize)]
struct DescribedDisk {
    #[serde(flatten)]
    disk: Description,
    #[serde(skip_serializing_if = "Option::is_none")]
    overlay: Option<OverlayInfo>,
}

fn info_text(described: &DescribedDisk, out: &mut String) {
    let d = &described.disk;
    line!(out, "{}: {}", d.name, d.file);
    line!(out, "  format    {}", d.format);
    line!(out, "  size      {} bytes ({} sectors)", d.size, d.size / SECTOR);
    if let Some(vmdk) = &d.vmdk {
        vmdk_text(vmdk, out);
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

/// Appends the extents and links of a VMDK.
fn vmdk_text(vmdk: &DiskInfo, out: &mut String) {
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
    // The newest link is number 0.
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
            "  link {i:<4} {} {} sectors, CID {cid}{parent}{unclean}: {}",
            link.create_type,
            link.size / SECTOR,
            link.file
        );
    }
    for warning in &vmdk.warnings {
        line!(out, "  warning   {warning}");
    }
}
