//! What is told of an NBD server, in builds with and without the client.

use serde::Serialize;

/// What a server offers.
#[derive(Debug, Clone, Serialize)]
pub struct ServerInfo {
    /// Where it is.
    pub server: String,
    /// The variant of the protocol.
    pub protocol: String,
    /// Whether the connection is encrypted.
    pub tls: bool,
    /// Whether it gives structured replies.
    pub structured: bool,
    /// One or all of its exports.
    pub exports: Vec<ExportInfo>,
}

/// What a server says of an export.
#[derive(Debug, Clone, Serialize)]
pub struct ExportInfo {
    /// Its name, as far as it is text.
    pub export: String,
    /// The server's words about it.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub description: String,
    /// Bytes; 0 where nothing is known.
    pub size: u64,
    /// Minimum, preferred and maximum bytes of a request; 0: not said.
    pub block_sizes: [u64; 3],
    /// Names of its abilities, each with whether it has it.
    pub flags: Vec<(&'static str, bool)>,
    /// Metadata contexts.
    pub contexts: Vec<String>,
    /// Why nothing is known of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}
