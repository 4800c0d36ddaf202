//! The built-in VMDK engine. Nothing in here trusts a byte of an image, and nothing opens a file but through a
//! [`crate::store::Store`].
#![forbid(unsafe_code)]

pub mod descriptor;
