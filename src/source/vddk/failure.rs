//! Errors of VDDK: their numbers, what they mean here, and what the user can do.

use super::abi::VixError;
use crate::error::{Error, ErrorKind};

/// Numbers of errors that code or hints refer to.
mod number {
    pub(super) const FAIL: u16 = 1;
    pub(super) const OUT_OF_MEMORY: u16 = 2;
    pub(super) const INVALID_ARG: u16 = 3;
    pub(super) const FILE_NOT_FOUND: u16 = 4;
    pub(super) const OBJECT_IS_BUSY: u16 = 5;
    pub(super) const NOT_SUPPORTED: u16 = 6;
    pub(super) const DISK_FULL: u16 = 8;
    pub(super) const FILE_READ_ONLY: u16 = 11;
    pub(super) const FILE_ACCESS: u16 = 13;
    pub(super) const ALREADY_LOCKED: u16 = 15;
    pub(super) const HOST_NOT_CONNECTED: u16 = 26;
    pub(super) const HOST_CONNECTION_LOST: u16 = 36;
    pub(super) const TOO_MANY_LOGONS: u16 = 3046;
    pub(super) const INVALID_AUTHENTICATION: u16 = 3047;
    pub(super) const VM_NOT_FOUND: u16 = 4000;
    /// The first and last error of the network below the library.
    pub(super) const NETWORK: (u16, u16) = (14007, 14011);
    pub(super) const HOST_SHUTDOWN: u16 = 14014;
    pub(super) const HOST_NOT_AVAILABLE: u16 = 14015;
    pub(super) const OUT_OF_RANGE: u16 = 16007;
    pub(super) const INVALID_CONNECTION: u16 = 16054;
    pub(super) const CANNOT_CONNECT: u16 = 18000;
}

/// Kind of trouble that an error means, which decides if an attempt is repeated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Trouble {
    /// The connection to the server is lost, or could not be made.
    Network,
    /// The host goes into maintenance or shuts down: it comes back much later.
    Maintenance,
    /// Anything else: an attempt to repeat it would fail again.
    Other,
}

/// A failed call of the library.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Failure {
    /// Name of the function.
    pub(super) function: &'static str,
    /// Result of the function.
    pub(super) error: VixError,
    /// Text of the library for it.
    pub(super) text: String,
}

/// Circumstances of a failed call, which the hint depends on.
#[derive(Debug, Clone)]
pub(super) struct Circumstances {
    /// Name of the disk.
    pub(super) disk: String,
    /// True if the disk is on a server.
    pub(super) remote: bool,
    /// Thumbprint that the user gave.
    pub(super) thumbprint: Option<String>,
    /// Version of the library.
    pub(super) version: u32,
    pub(super) writable: bool,
    pub(super) snapshot: bool,
}

/// Returns the number of an error: the upper bits are details for VMware.
fn number_of(error: VixError) -> u16 {
    (error & 0xffff) as u16
}

/// Classifies an error.
pub(super) fn trouble(error: VixError) -> Trouble {
    use number::*;
    match number_of(error) {
        // Apart from a lost network: such a host is away for minutes, and attempts in quick succession are in vain.
        HOST_SHUTDOWN | HOST_NOT_AVAILABLE => Trouble::Maintenance,
        HOST_NOT_CONNECTED | HOST_CONNECTION_LOST | INVALID_CONNECTION | CANNOT_CONNECT => Trouble::Network,
        n if (NETWORK.0..=NETWORK.1).contains(&n) => Trouble::Network,
        _ => Trouble::Other,
    }
}

/// Returns the number of the NBD error for a failed request.
pub(super) fn nbd_error(error: VixError) -> u32 {
    use number::*;
    let errno = match number_of(error) {
        OUT_OF_MEMORY => libc::ENOMEM,
        INVALID_ARG | OUT_OF_RANGE => libc::EINVAL,
        DISK_FULL => libc::ENOSPC,
        FILE_READ_ONLY => libc::EPERM,
        // The protocol knows a dozen errors. EIO says the least, and nothing wrong.
        _ => libc::EIO,
    };
    errno as u32
}

impl Failure {
    /// Returns the error for the user: the disk, the function, the text and number of the library, and a hint.
    pub(super) fn describe(&self, at: &Circumstances) -> Error {
        let Self { function, error, text } = self;
        let number = number_of(*error);
        let hint = hint(number, function, at);
        let hint = hint.map_or_else(String::new, |hint| format!("; {hint}"));
        let kind = match number {
            // Only the numbers whose meaning is certain: kinds decide what the daemon does, and texts what the user
            // reads.
            number::FILE_NOT_FOUND => ErrorKind::NotFound,
            number::ALREADY_LOCKED => ErrorKind::Busy,
            number::FILE_READ_ONLY => ErrorKind::ReadOnly,
            _ => ErrorKind::Os(libc::EIO),
        };
        Error::new(
            kind,
            format!("{}: {function}: {text} (VDDK error {number}){hint}", at.disk),
        )
    }
}

/// Returns what the user can do about an error.
fn hint(number: u16, function: &str, at: &Circumstances) -> Option<String> {
    use number::*;
    let opening = matches!(function, "VixDiskLib_Open" | "VixDiskLib_ConnectEx");
    let version = at.version;
    let text = match number {
        // The library reports a thumbprint that is missing or wrong as an unknown error.
        FAIL if opening && at.remote => {
            let given = at.thumbprint.as_deref().unwrap_or("not given");
            return Some(format!(
                "check thumbprint= ({given}): vmdkfuse --fingerprint server=HOST shows the one of the server"
            ));
        }
        FILE_ACCESS if at.remote && !at.snapshot => {
            "a disk of a running virtual machine is locked: take a snapshot, and give snapshot=moref"
        }
        // For writing the library creates a lock beside the disk, so the folder counts and not the file.
        FILE_ACCESS if !at.remote && at.writable => {
            "VDDK needs a folder that it can write its lock to: check its permissions, or add readonly=true"
        }
        ALREADY_LOCKED => "another program has the disk open: close it there, or add readonly=true",
        OUT_OF_MEMORY | OBJECT_IS_BUSY if at.remote => {
            "the host may have no memory left for NFC (48 MB in all): close other disks and backups of this host"
        }
        NOT_SUPPORTED if opening && at.remote => {
            return Some(format!(
                "VDDK {version} serves vSphere {} to {}, and no independent disks",
                version.saturating_sub(2),
                version + 1
            ));
        }
        VM_NOT_FOUND => "check vm=moref=ID",
        TOO_MANY_LOGONS => "close other sessions at the server",
        INVALID_AUTHENTICATION => "check user= and password=",
        HOST_SHUTDOWN | HOST_NOT_AVAILABLE => "the host is going into maintenance or shuts down",
        // Port 902 is that of NFC, by which the data come from the ESXi host: a login at vCenter may work where it is
        // blocked.
        n if at.remote && (trouble(n.into()) == Trouble::Network) => {
            "the server and every ESXi host must be reachable, port 902 too, and their names must be known to the DNS"
        }
        _ => return None,
    };
    Some(text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(remote: bool) -> Circumstances {
        Circumstances {
            disk: "[ds] x.vmdk".into(),
            remote,
            thumbprint: None,
            version: 8,
            writable: true,
            snapshot: false,
        }
    }

    #[test]
    fn errors_carry_the_text_the_number_and_a_hint() {
        for (function, error, remote, hint) in [
            ("VixDiskLib_Open", 1, true, "thumbprint= (not given)"),
            ("VixDiskLib_Open", 13, true, "snapshot=moref"),
            ("VixDiskLib_Open", 13, false, "readonly=true"),
            ("VixDiskLib_ReadAsync", 5, true, "NFC"),
            ("VixDiskLib_ConnectEx", 6, true, "vSphere 6 to 9"),
            ("VixDiskLib_Open", 0x1_0000 + 14009, true, "port 902"),
            ("VixDiskLib_ConnectEx", 18000, true, "DNS"),
        ] {
            let failure = Failure {
                function,
                error,
                text: "it failed".into(),
            };
            let text = failure.describe(&at(remote)).to_string();
            let start = format!("[ds] x.vmdk: {function}: it failed (VDDK error {})", error & 0xffff);
            assert!(text.starts_with(&start) && text.contains(hint), "{text}");
        }
    }

    #[test]
    fn lost_connections_and_maintenance_are_told_from_other_errors() {
        for (error, expected) in [
            (14011, Trouble::Network),
            (0x4_0000 + 36, Trouble::Network),
            (14014, Trouble::Maintenance),
            (14015, Trouble::Maintenance),
            (1, Trouble::Other),
            (14012, Trouble::Other),
        ] {
            assert_eq!(trouble(error), expected, "{error}");
        }
    }
}
