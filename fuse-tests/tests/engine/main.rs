//! Tests of the engine as a library: properties compared with a plain model, crash states, regressions.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed step of a test is a panic that names it"
)]

mod crash_search;
mod lock_free;
mod model;
mod regressions;
mod runs;
