//! What the integration tests share: a maker of VMDK variants, mounts that clean up after themselves.

pub mod harness;
pub mod make;
