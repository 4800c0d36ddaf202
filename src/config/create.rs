//! Properties of a disk to create.

/// Properties of a VMDK to create.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CreateConfig {
    /// Size of the disk in bytes, a multiple of 512.
    pub size: u64,
    /// Layout of the VMDK's files.
    pub kind: CreateType,
    /// Adapter in the descriptor.
    pub adapter: AdapterType,
    /// Virtual hardware version in the descriptor.
    pub hardware_version: u32,
}

/// VMDK layouts that can be created.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CreateType {
    /// One sparse file with the descriptor inside.
    #[default]
    MonolithicSparse,
    /// A descriptor and one flat file.
    MonolithicFlat,
    /// A descriptor and sparse files of 2 GB at most.
    SplitSparse,
    /// A descriptor and flat files of 2 GB at most.
    SplitFlat,
    /// As on ESXi: a descriptor and one flat file, fully allocated.
    VmfsFlat,
    /// As on ESXi: a descriptor and one flat file that is sparse (thin provisioned).
    VmfsThin,
    /// One file of compressed grains, written once from start to end. A mount of it never delays writes.
    StreamOptimized,
}

/// Virtual disk adapters, as `ddb.adapterType` names them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum AdapterType {
    /// `ide`
    Ide,
    /// `buslogic`
    BusLogic,
    /// `lsilogic`
    #[default]
    LsiLogic,
    /// `legacyESX`
    LegacyEsx,
    /// `pvscsi`
    PvScsi,
}
