//! `--dump`: prints the version and the capabilities of this build.

use std::path::Path;

use serde::Serialize;

use super::{line, print};
use crate::config::VddkLibrary;
use crate::error::Result;
use crate::source::nbd;
use crate::source::vddk::{self, LibraryDescription};
use crate::vmdk;

/// Prints versions, back ends and formats (`--dump`).
///
/// Errors: VMware's library cannot be loaded although the user named it, or writing to standard output failed.
pub fn dump(json: bool, library: &VddkLibrary) -> Result<u8> {
    let vddk = describe(library)?;
    // Loads the library, as only that shows whether its functions are all there.
    let libnbd = nbd::version();
    let build = Build {
        name: env!("CARGO_PKG_NAME"),
        version: env!("CARGO_PKG_VERSION"),
        // VDDK depends on libnbd too: its host process is an NBD server, to which this program connects.
        backends: if libnbd.is_ok() {
            &["native", "https", "nbd", "vddk"]
        } else {
            &["native", "https"]
        },
        libnbd_error: libnbd.as_ref().err().map(ToString::to_string),
        libnbd: libnbd.ok(),
        formats: ["vmdk", "raw"],
        // By the names that `--info` shows.
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
        vddk_default_libdir: vddk::DEFAULT_LIBDIR,
        vddk,
    };
    print(json, &build, |out| {
        let libnbd = build.libnbd.as_ref().map(|version| format!("libnbd={version}"));
        let libnbd_error = build.libnbd_error.as_ref().map(|error| format!("libnbd_error={error}"));
        // A name and a value for each line, without blanks around `=`: scripts read it.
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
        // The names of nbdkit's plugin, which scripts know.
        line!(out, "vddk_default_libdir={}", build.vddk_default_libdir);
        line!(out, "vddk_has_nfchostport=1");
        if let Some(library) = &build.vddk {
            line!(out, "vddk_library_version={}", library.version);
            line!(out, "vddk_dll={}", library.path);
            line!(
                out,
                "vddk_transport_modes={}",
                library.transports.as_deref().unwrap_or_default()
            );
            for function in &library.functions {
                line!(out, "{function}=1");
            }
        }
    })?;
    Ok(0)
}

/// Describes VMware's library, if the user named it or it is in the default folder.
fn describe(library: &VddkLibrary) -> Result<Option<LibraryDescription>> {
    match &library.libdir {
        Some(_) => vddk::describe(library).map(Some),
        // Not asked for: a library that cannot be loaded is no error.
        None if Path::new(vddk::DEFAULT_LIBDIR).is_dir() => Ok(vddk::describe(library).ok()),
        None => Ok(None),
    }
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
    vddk_default_libdir: &'static str,
    /// VMware's library, if the user named it or it is in the default folder.
    #[serde(skip_serializing_if = "Option::is_none")]
    vddk: Option<LibraryDescription>,
}
