//! Properties of an NBD server for `--list` and `--info`, in builds with and without the client.

use serde::Serialize;

/// Properties of a server and of its exports. The field names are the keys of the JSON output.
#[derive(Debug, Clone, Serialize)]
pub struct ServerInfo {
    /// Address of the server, without secrets.
    pub server: String,
    /// Name of the protocol variant, as libnbd reports it.
    pub protocol: String,
    /// True if the connection is encrypted.
    pub tls: bool,
    /// True if the server supports structured replies.
    pub structured: bool,
    /// Exports: the requested one, or all that the server lists.
    pub exports: Vec<ExportInfo>,
}

/// Properties of an export.
#[derive(Debug, Clone, Serialize)]
pub struct ExportInfo {
    /// Name of the export. Bytes that are not UTF-8 are replaced.
    pub export: String,
    /// Description by the server; empty if there is none.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub description: String,
    /// Size in bytes; 0 if it is not known.
    pub size: u64,
    /// Minimum, preferred and maximum length of a request in bytes; 0 if the server does not report one.
    pub block_sizes: [u64; 3],
    /// Flags: the name of each and its value.
    pub flags: Vec<(&'static str, bool)>,
    /// Names of the metadata contexts.
    pub contexts: Vec<String>,
    /// Reason why the properties are not known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}
