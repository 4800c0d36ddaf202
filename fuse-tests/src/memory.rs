//! A read-only store whose files are in memory. The fuzzers open images from it, so that no file system is involved.

use std::collections::BTreeMap;
use std::sync::Arc;

use vmdkfuse::error::{Error, ErrorKind, Result};
use vmdkfuse::store::{Access, ExtentName, Identity, Store, StoredFile};

/// A store of files in memory, cheap to clone.
///
/// It needs no gate for names: no name, whatever it looks like, can lead to a file outside of the store.
#[derive(Debug, Clone, Default)]
pub struct MemoryStore {
    files: Arc<BTreeMap<Vec<u8>, Arc<[u8]>>>,
}

/// A file of a [`MemoryStore`].
#[derive(Debug, Clone)]
pub struct MemoryFile {
    label: String,
    /// Index of the file among the names of the store; serves as its inode number.
    index: u64,
    data: Arc<[u8]>,
    store: MemoryStore,
}

impl MemoryStore {
    /// Creates a store with these files. If a name occurs more than once, the last file wins.
    pub fn new<N: Into<Vec<u8>>, D: Into<Arc<[u8]>>>(files: impl IntoIterator<Item = (N, D)>) -> Self {
        let files = files
            .into_iter()
            .map(|(name, data)| (name.into(), data.into()))
            .collect();
        Self { files: Arc::new(files) }
    }

    /// Returns the file with this name, or [`ErrorKind::NotFound`].
    pub fn file(&self, name: &[u8]) -> Result<MemoryFile> {
        let label = String::from_utf8_lossy(name).into_owned();
        match self
            .files
            .iter()
            .zip(0..)
            .find(|((known, _), _)| known.as_slice() == name)
        {
            Some(((_, data), index)) => Ok(MemoryFile {
                label,
                index,
                data: Arc::clone(data),
                store: self.clone(),
            }),
            None => Err(Error::new(ErrorKind::NotFound, label)),
        }
    }
}

impl Store for MemoryStore {
    fn open(&self, name: &ExtentName, access: Access) -> Result<Arc<dyn StoredFile>> {
        match access {
            Access::Read | Access::Peek => Ok(Arc::new(self.file(name.as_bytes())?)),
            Access::Write => Err(Error::new(
                ErrorKind::ReadOnly,
                format!("{name}: a store in memory is read-only"),
            )),
        }
    }

    fn create(&self, name: &ExtentName) -> Result<Arc<dyn StoredFile>> {
        Err(Error::new(
            ErrorKind::ReadOnly,
            format!("{name}: a store in memory is read-only"),
        ))
    }

    fn remove(&self, name: &ExtentName, _: &Identity) -> Result<()> {
        Err(Error::new(
            ErrorKind::ReadOnly,
            format!("{name}: a store in memory is read-only"),
        ))
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }

    fn names(&self, most: usize) -> Result<Vec<ExtentName>> {
        self.files.keys().take(most).map(ExtentName::new).collect()
    }
}

impl StoredFile for MemoryFile {
    fn len(&self) -> u64 {
        self.data.len() as u64
    }

    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let start = usize::try_from(offset).ok();
        let bytes = start.and_then(|start| self.data.get(start..start.checked_add(buf.len())?));
        match bytes {
            Some(bytes) => buf.copy_from_slice(bytes),
            None => {
                let context = format!("{}: read of {} bytes at byte {offset}", self.label, buf.len());
                return Err(Error::corrupt(format!(
                    "{context}: the file ends at byte {}",
                    self.len()
                )));
            }
        }
        Ok(())
    }

    fn identity(&self) -> Result<Identity> {
        Ok(self.identity_at_open())
    }

    fn identity_at_open(&self) -> Identity {
        Identity {
            file: (0, self.index),
            start: 0,
            len: self.len(),
            mtime_ns: 0,
            ctime_ns: 0,
        }
    }

    // The bytes never change, so the identity is always up to date.
    fn detects_modification(&self) -> bool {
        true
    }

    fn allocated(&self) -> Result<u64> {
        Ok(self.len())
    }

    fn data_at(&self, offset: u64) -> Result<(bool, u64)> {
        Ok((true, self.len().saturating_sub(offset).max(1)))
    }

    fn check_named(&self) -> Result<()> {
        Ok(())
    }

    fn label(&self) -> &str {
        &self.label
    }

    fn siblings(&self) -> Result<Arc<dyn Store>> {
        Ok(Arc::new(self.store.clone()))
    }
}
