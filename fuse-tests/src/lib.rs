//! What the integration tests share: a maker of VMDK variants, files in memory, and the entry points of the fuzzers.

pub mod fuzz;
pub mod harness;
pub mod make;
pub mod memory;
