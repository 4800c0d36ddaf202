//! Users that tests run as.

/// A user to run programs as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct User {
    /// User ID.
    pub uid: u32,
    /// Group ID.
    pub gid: u32,
}

/// Names the user that owns no file on Debian.
pub const NOBODY: User = User { uid: 65534, gid: 65534 };

/// Names a second unprivileged user, without a name and without a common group with [`NOBODY`].
pub const STRANGER: User = User { uid: 12345, gid: 12345 };
