//! `--dump`: prints the version and the capabilities of this build.

use serde::Serialize;

use super::{line, print};
use crate::error::Result;
use crate::source::nbd;
use crate::vmdk;

/// Prints versions, back ends and formats (`--dump`).
///
/// Errors: writing to standard output failed.
pub fn dump(json: bool) -> Result<u8> {
    let libnbd = nbd::version();
    let build = Build {
        name: env!("CARGO_PKG_NAME"),
        version: env!("CARGO_PKG_VERSION"),
        backends: if libnbd.is_ok() {
            &["native", "https", "nbd"]
        } else {
            &["native", "https"]
        },
        libnbd_error: libnbd.as_ref().err().map(ToString::to_string),
        libnbd: libnbd.ok(),
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
        let libnbd_error = build.libnbd_error.as_ref().map(|error| format!("libnbd_error={error}"));
        let lines = [
            format!("{}={}", build.name, build.version),
            format!("backends={}", build.backends.join(",")),
            format!("formats={}", build.formats.join(",")),
            format!("extents={}", build.extents.join(",")),
            format!("writable={}", build.writable.join(",")),
            format!("max_links={}", build.max_links),
        ];
        for line in lines.into_iter().chain(libnbd).chain(libnbd_error) {
            line!(out, "{line}");
        }
    })?;
    Ok(0)
}

/// Result of `--dump`.
#[derive(Debug, Serialize)]
struct Build {
    name: &'static str,
    version: &'static str,
    /// Back ends that can be used on this machine.
    backends: &'static [&'static str],
    /// Version of the installed libnbd.
    #[serde(skip_serializing_if = "Option::is_none")]
    libnbd: Option<String>,
    /// Reason why there are no NBD disks on this machine.
    #[serde(skip_serializing_if = "Option::is_none")]
    libnbd_error: Option<String>,
    formats: [&'static str; 2],
    extents: [&'static str; 7],
    writable: [&'static str; 4],
    max_links: usize,
}
