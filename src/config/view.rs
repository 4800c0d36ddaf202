//! Configuration of the kernel view of a disk.

use std::path::PathBuf;

/// Settings of the kernel view of a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ViewConfig {
    /// Use of the kernel view.
    pub mode: KernelView,
    /// Size limit of the index, in bytes. A disk that is not one flat file needs an index.
    pub size: u64,
    /// Folder of the index. `None`: the index is kept in memory.
    pub dir: Option<PathBuf>,
}

impl Default for ViewConfig {
    fn default() -> Self {
        Self {
            mode: KernelView::Auto,
            size: 256 << 20,
            dir: None,
        }
    }
}

/// Use of the kernel view.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KernelView {
    /// Used if the kernel and the image allow it.
    #[default]
    Auto,
    /// Never used.
    Off,
    /// Always used: the mount fails if it is not possible.
    Required,
}
