//! Table of the functions of VDDK: their names, and their addresses in a loaded library.

#![allow(unsafe_code)] // Finds functions of a C library.

use std::ffi::{c_char, c_void};

use super::abi::{
    BlockList, CompletionFunction, ConnectParams, Connection, CreateParams, Handle, Info, LogFunction, VixError,
    vddk_functions,
};
use crate::foreign_library::function_table;

vddk_functions!(function_table {
    /// Functions of VDDK.
    #[allow(dead_code, reason = "--dump lists the functions that are not called here, too")]
    pub(super) struct Api;
});
