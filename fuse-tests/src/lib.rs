//! Shared code of the integration tests: a generator of VMDK variants, crashes of a simulated store, files in memory,
//! models of written disks, the black-box harness, and the entry points of the fuzzers.

pub mod crash;
pub mod fuzz;
pub mod harness;
pub mod make;
pub mod memory;
pub mod model;
