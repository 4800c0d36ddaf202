//! Build script: finds libnbd with pkg-config.

use std::process::ExitCode;

/// Oldest supported release: the one that the declarations were checked against.
const OLDEST: &str = "1.14";

fn main() -> ExitCode {
    println!("cargo::rerun-if-changed=build.rs");
    // docs.rs does not have libnbd, and rustdoc does not link.
    if std::env::var_os("DOCS_RS").is_some() {
        return ExitCode::SUCCESS;
    }
    match pkg_config::Config::new().atleast_version(OLDEST).probe("libnbd") {
        Ok(_) => ExitCode::SUCCESS,
        Err(e) => {
            println!("cargo::error=libnbd {OLDEST} or newer is needed (Debian: libnbd-dev and pkg-config): {e}");
            ExitCode::FAILURE
        }
    }
}
