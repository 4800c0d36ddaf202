//! Files in memory in the place of a folder: what the fuzzers open.

use std::collections::BTreeMap;
use std::sync::Arc;

use vmdkfuse::error::{Error, ErrorKind, Result};
use vmdkfuse::store::{Access, ExtentName, Identity, Store, StoredFile};

/// A folder in memory. It has no gate: what it does not hold is not found, whatever the name looks like.
#[derive(Debug, Clone, Default)]
pub struct MemoryStore {
    files: Arc<BTreeMap<Vec<u8>, Arc<[u8]>>>,
}

/// A file of a [`MemoryStore`].
#[derive(Debug, Clone)]
pub struct MemoryFile {
    label: String,
    /// Its place among the names of the store.
    number: u64,
    data: Arc<[u8]>,
    store: MemoryStore,
}

impl MemoryStore {
    /// A folder with these files; of several with one name the last one counts.
    pub fn new<N: Into<Vec<u8>>, D: Into<Arc<[u8]>>>(files: impl IntoIterator<Item = (N, D)>) -> Self {
        let files = files
            .into_iter()
            .map(|(name, data)| (name.into(), data.into()))
            .collect();
        Self { files: Arc::new(files) }
    }

    /// The file of that name.
    pub fn file(&self, name: &[u8]) -> Result<MemoryFile> {
        let label = String::from_utf8_lossy(name).into_owned();
        match self
            .files
            .iter()
            .zip(0..)
            .find(|((known, _), _)| known.as_slice() == name)
        {
            Some(((_, data), number)) => Ok(MemoryFile {
                label,
                number,
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
            Access::Read => Ok(Arc::new(self.file(name.as_bytes())?)),
            Access::Write => Err(Error::new(
                ErrorKind::ReadOnly,
                format!("{name}: these files are only read"),
            )),
        }
    }

    fn create(&self, name: &ExtentName) -> Result<Arc<dyn StoredFile>> {
        Err(Error::new(
            ErrorKind::ReadOnly,
            format!("{name}: these files are only read"),
        ))
    }

    fn remove(&self, name: &ExtentName, _: &Identity) -> Result<()> {
        Err(Error::new(
            ErrorKind::ReadOnly,
            format!("{name}: these files are only read"),
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
        let part = start.and_then(|start| self.data.get(start..start.checked_add(buf.len())?));
        match part {
            Some(part) => buf.copy_from_slice(part),
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
            file: (0, self.number),
            len: self.len(),
            mtime_ns: 0,
            ctime_ns: 0,
        }
    }

    fn detects_modification(&self) -> bool {
        true
    }

    fn allocated(&self) -> Result<u64> {
        Ok(self.len())
    }

    fn data_at(&self, offset: u64) -> Result<(bool, u64)> {
        Ok((true, self.len().saturating_sub(offset).max(1)))
    }

    fn label(&self) -> &str {
        &self.label
    }

    fn siblings(&self) -> Result<Arc<dyn Store>> {
        Ok(Arc::new(self.store.clone()))
    }
}
