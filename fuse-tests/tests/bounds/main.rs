//! Bounds on the time and memory that a hostile input may cost: entry points of the fuzzers, and worst-case images.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed step of a test is a panic that names it"
)]

mod fuzz;
mod hostile_cost;
