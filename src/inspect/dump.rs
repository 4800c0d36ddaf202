//! `--dump`: prints the version and the capabilities of this build.

use serde::Serialize;

use super::{line, print};
use crate::error::Result;
use crate::source::nbd;
use crate::vmdk;

/// Prints versions, back ends and formats (`--dump`).
///
/// Errors: the version of libnbd cannot be read, or writing to standard output failed.
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
            line!(out, "{line}");
        }
    })?;
    Ok(0)
}

/// Back ends of this build.
const BACKENDS: &[&str] = if cfg!(feature = "nbd") {
    &["native", "https", "nbd"]
} else {
    &["native", "https"]
};

/// Result of `--dump`.
#[derive(Debug, Serialize)]
struct Build {
    name: &'static str,
    version: &'static str,
    backends: &'static [&'static str],
    /// Version of the loaded libnbd; `None` in a build without NBD.
    #[serde(skip_serializing_if = "Option::is_none")]
    libnbd: Option<String>,
    formats: [&'static str; 2],
    extents: [&'static str; 7],
    writable: [&'static str; 4],
    max_links: usize,
}
