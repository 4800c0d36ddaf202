//! `--check`: checks the tables of disks.

use serde::Serialize;

use super::{line, open_source, print};
use crate::config::{DiskConfig, Query};
use crate::error::{ErrorKind, Result};
use crate::overlay::open_overlay;
use crate::store::Access;
use crate::vmdk::CheckReport;
use crate::volume::open::verify_package;

/// Exit status of `--check` for disks whose only findings are leaked grains and unfinished entries.
const LEAKS: u8 = 3;
/// Exit status of `--check` if a disk is corrupt.
pub(super) const CORRUPT: u8 = 4;

/// Prints the findings for each disk (`--check`). Returns the exit status of the worst disk: 0 clean, 3 leaks only, 4
/// corrupt.
///
/// Errors: the first disk that cannot be opened ends the action, unless it is corrupt.
pub fn check(query: &Query) -> Result<u8> {
    let mut checked = Vec::new();
    for disk in &query.disks {
        checked.push(check_one(disk)?);
    }
    print(query.json, &checked, |out| {
        checked.iter().for_each(|c| check_text(c, out));
    })?;
    let status = |c: &CheckedDisk| match c.status {
        CheckStatus::Clean => 0,
        CheckStatus::Leaks => LEAKS,
        CheckStatus::Corrupt => CORRUPT,
    };
    // The numbers rise with the severity.
    Ok(checked.iter().map(status).max().unwrap_or(0))
}

/// Result of `--check` for one disk.
#[derive(Debug, Serialize)]
struct CheckedDisk {
    name: String,
    status: CheckStatus,
    #[serde(flatten)]
    report: CheckReport,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum CheckStatus {
    Clean,
    Leaks,
    Corrupt,
}

/// Checks one disk. An image that cannot be opened because it is damaged is a finding, not a failure of the check.
fn check_one(disk: &DiskConfig) -> Result<CheckedDisk> {
    let name = disk.name.to_string_lossy().into_owned();
    let report = match check_report(disk) {
        Ok(report) => report,
        // So that scripts see status 4 for a damaged header as well as for a damaged table.
        Err(e) if e.kind() == ErrorKind::Corrupt => CheckReport {
            errors: vec![e.to_string()],
            error_count: 1,
            ..CheckReport::default()
        },
        Err(e) => return Err(e),
    };
    let status = match (&report.error_count, report.leaks + report.unfinished) {
        // Unfinished entries count as leaks: the next open for writing completes them, and no data is lost.
        (0, 0) => CheckStatus::Clean,
        (0, _) => CheckStatus::Leaks,
        _ => CheckStatus::Corrupt,
    };
    Ok(CheckedDisk { name, status, report })
}

/// Checks a disk, and its overlay if it has one. Sources without tables of their own are always clean.
fn check_report(disk: &DiskConfig) -> Result<CheckReport> {
    let source = open_source(disk)?;
    let mut report = source.check();
    // The checksums of a package cover the file of its disk, so a mismatch is an error even where the tables are sound.
    for message in verify_package(disk)? {
        report.add_error(message);
    }
    if let Some(delta) = open_overlay(disk, &*source, Access::Read)? {
        // The base alone is checked without the overlay: what the overlay hides may be damaged all the same.
        report.add(delta.check());
    }
    Ok(report)
}

fn check_text(c: &CheckedDisk, out: &mut String) {
    for e in &c.report.errors {
        line!(out, "{}: error: {e}", c.name);
    }
    // The report keeps only the first errors in full; the count covers all of them.
    // Not below zero: every message is counted, and `CheckReport::add` only cuts messages off.
    let more = c.report.error_count - c.report.errors.len() as u64;
    if more > 0 {
        line!(out, "{}: and {more} more errors", c.name);
    }
    for n in &c.report.notes {
        line!(out, "{}: note: {n}", c.name);
    }
    let more = c.report.note_count - c.report.notes.len() as u64;
    if more > 0 {
        line!(out, "{}: and {more} more notes", c.name);
    }
    let verdict = match c.status {
        CheckStatus::Clean => "clean".to_owned(),
        CheckStatus::Leaks if c.report.unfinished > 0 => format!(
            "{} leaked grains, {} unfinished entries (completed when the disk is opened for writing), nothing else",
            c.report.leaks, c.report.unfinished
        ),
        CheckStatus::Leaks => format!("{} leaked grains, nothing else", c.report.leaks),
        CheckStatus::Corrupt => format!(
            "corrupt: {} errors, {} leaked grains",
            c.report.error_count, c.report.leaks
        ),
    };
    line!(out, "{}: {verdict} ({} grains checked)", c.name, c.report.grains);
}
