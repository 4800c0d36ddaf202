//! Configuration of a source: one variant for each back end.

use super::https::HttpsConfig;
use super::local::LocalConfig;
use super::nbd::NbdConfig;
use super::source_settings::SourceSettings;
use super::vddk::VddkConfig;

/// Source of a disk. `volume/open.rs` alone opens it; everything else asks its [`settings`](Self::settings).
#[derive(Debug, Clone, PartialEq)]
pub enum SourceConfig {
    /// Files on this machine: a VMDK, which the native engine reads, or a raw image.
    Local(LocalConfig),
    /// An export of an NBD server.
    Nbd(NbdConfig),
    /// Files on a web server, which are only read.
    Https(Box<HttpsConfig>),
    /// A disk that VMware's VDDK opens.
    Vddk(Box<VddkConfig>),
}

impl SourceConfig {
    /// Returns the settings, whatever the back end is.
    pub fn settings(&self) -> &dyn SourceSettings {
        match self {
            Self::Local(local) => local,
            Self::Nbd(server) => server,
            Self::Https(disk) => &**disk,
            Self::Vddk(disk) => &**disk,
        }
    }

    pub(super) fn settings_mut(&mut self) -> &mut dyn SourceSettings {
        match self {
            Self::Local(local) => local,
            Self::Nbd(server) => server,
            Self::Https(disk) => &mut **disk,
            Self::Vddk(disk) => &mut **disk,
        }
    }

    /// Returns a name of the source for messages; see [`SourceSettings::label`].
    pub fn label(&self) -> String {
        self.settings().label()
    }

    /// Returns the configuration of a local disk, or `None` for other sources.
    pub fn local(&self) -> Option<&LocalConfig> {
        match self {
            Self::Local(local) => Some(local),
            _ => None,
        }
    }
}
