//! Store for tests: a temporary folder, and a budget of changes after which every change fails.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tempfile::TempDir;

use crate::error::{Error, ErrorKind, Result};
use crate::store::fault_injection::Watched;
use crate::store::{Access, ExtentName, Identity, LocalStore, OpenPolicy, Store, StoredFile};
use crate::vmdk::{OpenOptions, VmdkDisk};

/// Returns the name of a file of the store.
pub(super) fn name(text: &str) -> ExtentName {
    ExtentName::new(text).unwrap()
}

/// Temporary folder with the number of changes of its files that still succeed.
#[derive(Debug)]
pub(super) struct TestStore {
    dir: TempDir,
    inner: LocalStore,
    budget: Arc<AtomicU64>,
}

impl TestStore {
    pub(super) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let policy = OpenPolicy::new(Vec::new(), true);
        let inner = LocalStore::new(dir.path(), Arc::new(policy)).unwrap();
        Self {
            dir,
            inner,
            budget: Arc::new(AtomicU64::new(u64::MAX)),
        }
    }

    /// Sets the number of changes that succeed from now on: files created, writes, changed lengths, syncs. Removing a
    /// file always succeeds.
    pub(super) fn allow(&self, changes: u64) {
        self.budget.store(changes, Ordering::Relaxed);
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Returns the names in the folder, sorted.
    pub(super) fn files(&self) -> Vec<String> {
        let names = std::fs::read_dir(self.dir.path()).unwrap();
        let mut names: Vec<_> = names
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    /// Opens an image of the store for reading.
    pub(super) fn open_disk(&self, text: &str) -> Result<VmdkDisk> {
        VmdkDisk::open(self.inner.open(&name(text), Access::Read)?, OpenOptions::default())
    }
}

/// Takes one change off the budget.
fn spend(budget: &AtomicU64, label: &str) -> Result<()> {
    match budget.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)) {
        Ok(_) => Ok(()),
        Err(_) => Err(Error::new(
            ErrorKind::Os(libc::ENOSPC),
            format!("{label}: no space is left"),
        )),
    }
}

impl Store for TestStore {
    fn open(&self, name: &ExtentName, access: Access) -> Result<Arc<dyn StoredFile>> {
        self.inner.open(name, access)
    }

    fn create(&self, name: &ExtentName) -> Result<Arc<dyn StoredFile>> {
        spend(&self.budget, "create")?;
        let (file, budget) = (self.inner.create(name)?, Arc::clone(&self.budget));
        let label = file.label().to_owned();
        Ok(Arc::new(Watched::new(file, move |_| spend(&budget, &label))))
    }

    fn remove(&self, name: &ExtentName, identity: &Identity) -> Result<()> {
        self.inner.remove(name, identity)
    }

    fn sync(&self) -> Result<()> {
        spend(&self.budget, "sync")?;
        self.inner.sync()
    }

    fn names(&self, most: usize) -> Result<Vec<ExtentName>> {
        self.inner.names(most)
    }
}

/// Returns the first bytes of a file.
pub(super) fn head(path: &Path, len: usize) -> Vec<u8> {
    let mut bytes = std::fs::read(path).unwrap();
    bytes.truncate(len);
    bytes
}
