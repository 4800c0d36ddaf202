//! Raw images that contain a file system, for tests that read files through a mount.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use super::model::{Content, Layer, SECTOR};

/// Folders of mkfs.ext4, for users whose PATH has no sbin.
const SBIN: [&str; 3] = ["/usr/sbin", "/sbin", "/usr/local/sbin"];

/// Returns the path of mkfs.ext4, if it is installed.
pub fn mkfs_ext4() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(SBIN.iter().map(PathBuf::from));
    folders
        .map(|folder| folder.join("mkfs.ext4"))
        .find(|program| program.is_file())
}

/// Writes an ext4 image of `bytes` (whole sectors) with the files of `folder`; needs no privileges.
pub fn ext4(image: &Path, bytes: u64, folder: &Path) -> Result<()> {
    ensure!(bytes.is_multiple_of(SECTOR), "{bytes} bytes are not whole sectors");
    let program = mkfs_ext4().context("mkfs.ext4 is missing (package e2fsprogs)")?;
    fs::File::create(image)?.set_len(bytes)?;
    let output = Command::new(program)
        .args(["-q", "-F", "-L", "vmdkfuse", "-E", "lazy_itable_init=0,nodiscard", "-d"])
        .args([folder, image])
        .output()?;
    if !output.status.success() {
        bail!(
            "mkfs.ext4 on {}: {}",
            image.display(),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(())
}

/// Writes sample files into a new folder: a text, a folder with an empty file, and 1 MiB of noise.
pub fn sample_files(folder: &Path, seed: u64) -> Result<()> {
    fs::create_dir_all(folder.join("sub"))?;
    fs::write(folder.join("hello.txt"), "Hello from inside the disk.\n")?;
    fs::write(folder.join("sub/empty"), "")?;
    let noise = Layer::new(seed, "file", 2048, 2048).fill([0]).read(0, 2048);
    fs::write(folder.join("sub/noise.bin"), noise)?;
    Ok(())
}

/// Reads a raw image (whole sectors) into a layer, which can then be written as a VMDK.
pub fn layer_of(image: &Path, grain: u64) -> Result<Layer> {
    let raw = fs::read(image).with_context(|| image.display().to_string())?;
    ensure!(
        (raw.len() as u64).is_multiple_of(SECTOR),
        "{} is not whole sectors",
        image.display()
    );
    Ok(Layer::from_raw("image", grain, &raw))
}
