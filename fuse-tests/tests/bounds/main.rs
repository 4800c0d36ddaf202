//! Time and memory that a hostile input may cost: fuzzers' entry points and measured limits.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed step of a test is a panic that names it"
)]

mod fuzz;
mod hostile_cost;
