//! Finds libnbd by pkg-config.

use std::process::ExitCode;

/// The release that the declarations were checked against.
const OLDEST: &str = "1.14";

fn main() -> ExitCode {
    println!("cargo::rerun-if-changed=build.rs");
    // docs.rs has no libnbd, and documentation needs none
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
