//! Decides the format of a named file: by its name or `format=`. Its content can only make us refuse.
//!
//! A guest that owns a raw disk can write any bytes into it. If content chose the format, the guest could write a VMDK
//! descriptor there and so choose which files of the host are shown or written. So a name promises a format, and the
//! content is compared with that promise:
//!
//! ```text
//!   format=raw ──────────────────────────────────────────────► raw, whatever it holds
//!   format=vmdk, or a name with `.vmdk` among its parts ─ VMDK content? ─ yes ─► VMDK
//!                                                                └ no ──► refused: what it is, and the way on
//!   .raw .img .dd .bin .iso, no suffix, a block device ── any signature? ─ no ──► raw
//!                                                                └ yes ─► refused: what it is, and the way on
//!   any other suffix ────────────────────────────────────────► refused: say format=
//! ```

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::block::SECTOR;
use crate::config::{Format, LocalConfig};
use crate::error::{Error, ErrorKind, Result};
use crate::store::{StoredFile, shell_word as word};
use crate::vmdk::descriptor::ExtentKind;
use crate::vmdk::{self, FileKind, lost_descriptor};

/// Suffixes of raw images, in lower case.
const RAW_SUFFIXES: [&str; 5] = ["raw", "img", "dd", "bin", "iso"];

/// Bytes at the end of a file that hold the footer of a VHD or of a disk image of macOS.
const TAIL: u64 = 512;

/// A format that the engine reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DiskFormat {
    /// A VMDK: a descriptor, or an extent that stands for a disk.
    Vmdk,
    /// The bytes of the file are the bytes of the disk.
    Raw,
}

/// Promise of a file name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Promise<'a> {
    Vmdk,
    Raw,
    /// A package of VMDKs (`.ova`).
    Package,
    /// One piece of a file that was cut into several; the name without the piece's number.
    Piece(&'a str),
    /// A suffix that promises nothing that is read here.
    Other(&'a str),
}

/// Decides the format of `file`, which was opened by the path of `local`.
///
/// Errors: `Usage` where the name promises no format, or the content contradicts the promise. The error says what the
/// file is and names the command that gets the user further.
pub(crate) fn decide(local: &LocalConfig, file: &dyn StoredFile) -> Result<DiskFormat> {
    if local.is_package() {
        return decide_named(OsStr::new(&file.own_name()), local.format, file);
    }
    let name = local.path.file_name().unwrap_or(local.path.as_os_str());
    decide_named(name, local.format, file)
}

/// Decides the format of `file`, which was opened by a path or an address that ends with `name`; see [`decide`].
pub(crate) fn decide_named(name: &OsStr, format: Format, file: &dyn StoredFile) -> Result<DiskFormat> {
    let promise = match format {
        Format::Raw => return Ok(DiskFormat::Raw),
        Format::Vmdk => Promise::Vmdk,
        // The name of a block device is no promise of its owner: udev or LVM chose it.
        Format::Auto if file.is_device() => Promise::Raw,
        Format::Auto => promise_of(name),
    };
    let label = file.label().to_owned();
    let refuse = |why: String| Err(Error::new(ErrorKind::Usage, format!("{label}: {why}")));
    let head = vmdk::read_head(file)?;
    // Looked for first: a descriptor is text, and the search for foreign formats takes texts for what they quote.
    let is_vmdk = vmdk::file_kind(&head) != FileKind::Other;
    let foreign = if is_vmdk { None } else { foreign(&head, &tail_of(file)?) };
    // The order of these arms is the order of the reasons: what the file is tells the user more than what its name lacks.
    match (promise, foreign) {
        (Promise::Piece(whole), _) => refuse(format!(
            "the name is that of one piece of a split file; join the pieces first: cat {} > {}",
            word(whole) + ".*",
            word(whole)
        )),
        (_, Some(foreign)) => refuse(format!(
            "is {}, not a disk; {} (format=raw would show its bytes as they are)",
            foreign.name,
            (foreign.way_on)(&word(&label))
        )),
        (Promise::Vmdk, None) if is_vmdk => Ok(DiskFormat::Vmdk),
        (Promise::Vmdk, None) => Err(no_vmdk(file, name, format, &head)),
        (Promise::Raw, None) if is_vmdk => refuse(
            "holds a VMDK, but its name is that of a raw disk; say format=vmdk if you trust the file to name others, \
             or format=raw to show its bytes as they are"
                .to_owned(),
        ),
        (Promise::Raw, None) => Ok(DiskFormat::Raw),
        (Promise::Package, None) => {
            refuse("is no OVA package (a tar archive); say format=vmdk or format=raw".to_owned())
        }
        (Promise::Other(suffix), None) => refuse(format!(
            "the suffix .{} does not say what the file is; say format=vmdk or format=raw",
            suffix.escape_debug()
        )),
    }
}

/// The error for a file that promises a VMDK and holds none. A file of zeroes or without content is a damaged VMDK; any
/// other content is no VMDK at all.
fn no_vmdk(file: &dyn StoredFile, name: &OsStr, format: Format, head: &[u8]) -> Error {
    let label = file.label();
    let text = name.to_string_lossy().to_ascii_lowercase();
    // ESXi's names of files that hold the bytes of a disk, and of mappings to raw devices.
    let is_data = ["-flat.vmdk", "-rdm.vmdk", "-rdmp.vmdk"]
        .iter()
        .any(|end| text.ends_with(end));
    let usage = |why: String| Error::new(ErrorKind::Usage, format!("{label}: {why}"));
    // Where the user wrote format=vmdk, the name is no mistake to be explained.
    if is_data && format == Format::Auto && !head.is_empty() {
        let advice = lost_descriptor::advice(file, ExtentKind::Vmfs, file.len() / SECTOR);
        return usage(format!(
            "is the data of a VMDK, without its descriptor; say format=raw, or {advice}"
        ));
    }
    if let Some(stem) = text.strip_suffix("-ctk.vmdk") {
        return usage(format!(
            "is a map of changed blocks (a change-tracking file), not a disk; name {stem}.vmdk"
        ));
    }
    let found = match head {
        // An upload or a copy that has only begun.
        [] => "nothing: the file is empty",
        // What a crash leaves of a file whose length was written before its data.
        head if head.iter().all(|byte| *byte == 0) => "only zeroes",
        _ => {
            let data = text.strip_suffix(".vmdk").map_or_else(String::new, |stem| {
                format!("; where the descriptor is lost, {stem}-flat.vmdk may have the data: name it with format=raw")
            });
            return usage(format!(
                "byte 0: expected the header or the descriptor of a VMDK, found other bytes; if it is a raw disk, say \
                 format=raw{data}"
            ));
        }
    };
    Error::corrupt(format!(
        "{label}: byte 0: expected the header or the descriptor of a VMDK, found {found}; if it is a raw disk, say format=raw"
    ))
}

/// Returns the promise of a file name.
fn promise_of(name: &OsStr) -> Promise<'_> {
    let bytes = name.as_bytes();
    // Any part: backups are called `disk.vmdk.bak` and `disk.vmdk.1`, and must not become raw by that.
    let mut parts = bytes.split(|byte| *byte == b'.').skip(1);
    // A name that is not UTF-8 has none of the suffixes that are checked here.
    let suffix = Path::new(name).extension().map(|suffix| suffix.to_str().unwrap_or("?"));
    if let Some(piece) = suffix
        // Before `.vmdk` is looked for: `disk.vmdk.001` is a piece, whose first bytes are those of a whole VMDK.
        && is_piece(piece)
        && let Some(whole) = name
            .to_str()
            .and_then(|text| text.strip_suffix(piece)?.strip_suffix('.'))
    {
        return Promise::Piece(whole);
    }
    if parts.any(|part| part.eq_ignore_ascii_case(b"vmdk")) {
        return Promise::Vmdk;
    }
    match suffix {
        None => Promise::Raw,
        Some(suffix) if RAW_SUFFIXES.iter().any(|raw| suffix.eq_ignore_ascii_case(raw)) => Promise::Raw,
        Some(suffix) if suffix.eq_ignore_ascii_case("ova") => Promise::Package,
        Some(suffix) => Promise::Other(suffix),
    }
}

/// Returns true for `001`, `002` …, `aa`, `ab` …, `part1` …: what tools that cut files into pieces append.
fn is_piece(suffix: &str) -> bool {
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    (suffix.len() == 3 && digits(suffix))
        || (suffix.len() == 2 && suffix.starts_with('a') && suffix.bytes().all(|byte| byte.is_ascii_lowercase()))
        || suffix.strip_prefix("part").is_some_and(digits)
}

/// The end of a file, where some formats have their only signature; empty for a device.
fn tail_of(file: &dyn StoredFile) -> Result<Vec<u8>> {
    // The end of a device belongs to its user: a guest could write a signature there and so have the disk refused.
    let Some(at) = file.len().checked_sub(TAIL).filter(|_| !file.is_device()) else {
        return Ok(Vec::new());
    };
    let mut tail = vec![0; TAIL as usize];
    file.read_exact_at(at, &mut tail)?;
    Ok(tail)
}

/// A kind of file that is not a disk as it lies there.
struct Foreign {
    name: &'static str,
    /// The sentence that gets the user further, from the file's name as a word of a shell.
    way_on: fn(&str) -> String,
}

/// Position of a signature.
#[derive(Clone, Copy)]
enum At {
    Start(usize),
    /// Bytes from the start of the last 512.
    Tail(usize),
}

/// Signatures at fixed positions, from the formats' specifications or the sources of the programs that write them.
const SIGNATURES: &[(At, &[u8], Foreign)] = &[
    (
        At::Start(257),
        b"ustar",
        Foreign {
            name: "a tar archive (an OVA, as a rule)",
            way_on: |f| format!("unpack it: tar xf {f}"),
        },
    ),
    (
        At::Start(0),
        b"\x1f\x8b\x08",
        Foreign {
            name: "compressed by gzip",
            way_on: |f| format!("unpack it: gunzip -k {f}"),
        },
    ),
    (
        At::Start(0),
        b"\xfd7zXZ\0",
        Foreign {
            name: "compressed by xz",
            way_on: |f| format!("unpack it: unxz -k {f}"),
        },
    ),
    (
        At::Start(0),
        b"\x28\xb5\x2f\xfd",
        Foreign {
            name: "compressed by zstd",
            way_on: |f| format!("unpack it: unzstd {f}"),
        },
    ),
    (
        At::Start(0),
        b"\x04\x22\x4d\x18",
        Foreign {
            name: "compressed by lz4",
            way_on: |f| format!("unpack it: unlz4 {f}"),
        },
    ),
    (
        At::Start(0),
        b"\x89LZO\0",
        Foreign {
            name: "compressed by lzop",
            way_on: |f| format!("unpack it: lzop -d {f}"),
        },
    ),
    (
        At::Start(0),
        b"LZIP",
        Foreign {
            name: "compressed by lzip",
            way_on: |f| format!("unpack it: lzip -dk {f}"),
        },
    ),
    (
        At::Start(0),
        b"PK\x03\x04",
        Foreign {
            name: "a zip archive",
            way_on: |f| format!("unpack it: unzip {f}"),
        },
    ),
    (
        At::Start(0),
        b"PK\x05\x06",
        Foreign {
            name: "an empty zip archive",
            way_on: |f| format!("look into it: unzip -l {f}"),
        },
    ),
    (
        At::Start(0),
        b"7z\xbc\xaf\x27\x1c",
        Foreign {
            name: "a 7z archive",
            way_on: |f| format!("unpack it: 7z x {f}"),
        },
    ),
    (
        At::Start(0),
        b"Rar!\x1a\x07",
        Foreign {
            name: "a RAR archive",
            way_on: |f| format!("unpack it: unrar x {f}"),
        },
    ),
    (
        At::Start(0),
        b"MSCF\0\0\0\0",
        Foreign {
            name: "a cabinet archive",
            way_on: |f| format!("unpack it: cabextract {f}"),
        },
    ),
    (
        At::Start(0),
        b"MSWIM\0\0\0",
        Foreign {
            name: "a Windows image (WIM)",
            way_on: |f| format!("mount it: wimmount {f}"),
        },
    ),
    (
        At::Start(0),
        b"QFI\xfb",
        Foreign {
            name: "a qcow2 image",
            way_on: |f| by_qemu(f, "qcow2"),
        },
    ),
    (
        At::Start(0),
        b"QED\0",
        Foreign {
            name: "a QED image",
            way_on: |f| by_qemu(f, "qed"),
        },
    ),
    (
        At::Start(0x40),
        b"\x7f\x10\xda\xbe",
        Foreign {
            name: "a VDI image",
            way_on: |f| by_qemu(f, "vdi"),
        },
    ),
    (
        At::Start(0),
        b"vhdxfile",
        Foreign {
            name: "a VHDX image",
            way_on: |f| by_qemu(f, "vhdx"),
        },
    ),
    (
        At::Start(0),
        b"conectix",
        Foreign {
            name: "a VHD image",
            way_on: |f| by_qemu(f, "vpc"),
        },
    ),
    (
        At::Tail(0),
        b"conectix",
        Foreign {
            name: "a VHD image",
            way_on: |f| by_qemu(f, "vpc"),
        },
    ),
    (
        At::Tail(0),
        b"koly",
        Foreign {
            name: "a disk image of macOS (DMG)",
            way_on: |f| by_qemu(f, "dmg"),
        },
    ),
    (
        At::Start(0),
        b"WithoutFreeSpace",
        Foreign {
            name: "a Parallels image",
            way_on: |f| by_qemu(f, "parallels"),
        },
    ),
    (
        At::Start(0),
        b"WithouFreSpacExt",
        Foreign {
            name: "a Parallels image",
            way_on: |f| by_qemu(f, "parallels"),
        },
    ),
    (
        At::Start(0),
        b"Bochs Virtual HD Image",
        Foreign {
            name: "a Bochs image",
            way_on: |f| by_qemu(f, "bochs"),
        },
    ),
    (
        At::Start(0),
        b"EVF\x09\x0d\x0a\xff\0",
        Foreign {
            name: "an EnCase image (E01)",
            way_on: by_ewf,
        },
    ),
    (
        At::Start(0),
        b"EVF2\x0d\x0a\x81\0",
        Foreign {
            name: "an EnCase image (Ex01)",
            way_on: by_ewf,
        },
    ),
    (
        At::Start(0),
        b"LVF\x09\x0d\x0a\xff\0",
        Foreign {
            name: "an EnCase image (L01)",
            way_on: by_ewf,
        },
    ),
    (
        At::Start(0),
        b"AFF10\x0d\x0a\0",
        Foreign {
            name: "an AFF image",
            way_on: |f| format!("mount it: affuse {f} MNT"),
        },
    ),
    (
        At::Start(0),
        b"%PDF-",
        Foreign {
            name: "a PDF document",
            way_on: |_| "name the disk".to_owned(),
        },
    ),
    (
        At::Start(0),
        b"\x7fELF",
        Foreign {
            name: "a program",
            way_on: |_| "name the disk".to_owned(),
        },
    ),
];

/// The way on by qemu's own reader of the format.
fn by_qemu(file: &str, format: &str) -> String {
    format!("serve it by qemu: vmdkfuse MNT command=qemu-nbd arg=-f arg={format} arg={file}")
}

/// The way on by libewf.
fn by_ewf(file: &str) -> String {
    format!("mount it: ewfmount {file} MNT")
}

/// Returns the kind of a file that is no disk as it lies there, by the signatures at its start and end.
fn foreign(head: &[u8], tail: &[u8]) -> Option<&'static Foreign> {
    let has = |at: At, signature: &[u8]| {
        let (bytes, at) = match at {
            At::Start(at) => (head, at),
            At::Tail(at) => (tail, at),
        };
        bytes.get(at..).is_some_and(|bytes| bytes.starts_with(signature))
    };
    let fixed = SIGNATURES
        .iter()
        .find(|(at, signature, _)| has(*at, signature))
        .map(|(_, _, foreign)| foreign);
    fixed.or_else(|| bzip2(head)).or_else(|| text(head))
}

/// bzip2 has a digit in its signature.
fn bzip2(head: &[u8]) -> Option<&'static Foreign> {
    const BZIP2: Foreign = Foreign {
        name: "compressed by bzip2",
        way_on: |f| format!("unpack it: bunzip2 -k {f}"),
    };
    let block = [0x31, 0x41, 0x59, 0x26, 0x53, 0x59];
    let is = head.starts_with(b"BZh") && head.get(3).is_some_and(u8::is_ascii_digit) && head.get(4..10) == Some(&block);
    is.then_some(&BZIP2)
}

/// Texts that lie beside disks: OVF, VMX, VirtualBox's and libvirt's XML, a web page that was saved in place of a disk.
fn text(head: &[u8]) -> Option<&'static Foreign> {
    const OVF: Foreign = Foreign {
        name: "an OVF description",
        way_on: |_| "name the .vmdk that it lists".to_owned(),
    };
    const VMX: Foreign = Foreign {
        name: "the settings of a virtual machine (VMX)",
        way_on: |_| "name the .vmdk after fileName in it".to_owned(),
    };
    const PAGE: Foreign = Foreign {
        name: "a web page",
        way_on: |_| "download the disk again (was a login needed?)".to_owned(),
    };
    const XML: Foreign = Foreign {
        name: "an XML text",
        way_on: |_| "name the disk that it lists".to_owned(),
    };
    // A byte order mark and blanks, as editors on Windows write them.
    let start = head.strip_prefix(b"\xef\xbb\xbf").unwrap_or(head).trim_ascii_start();
    // Bounded: a head may be one long line.
    let lower = start
        .get(..start.len().min(2048))
        .unwrap_or_default()
        .to_ascii_lowercase();
    let holds = |what: &str| lower.windows(what.len()).any(|part| part == what.as_bytes());
    if lower.starts_with(b"<!doctype html") || lower.starts_with(b"<html") {
        return Some(&PAGE);
    }
    if lower.starts_with(b"<?xml") || lower.starts_with(b"<envelope") {
        return Some(if holds("<envelope") || holds(":envelope") {
            &OVF
        } else {
            &XML
        });
    }
    // A disk whose first sector quotes a .vmx line has zeroes around it, and is no text.
    let is_text = !start.is_empty() && !start.iter().take(256).any(|byte| *byte == 0);
    let vmx = [".encoding", "config.version", "virtualhw.version", "#!/usr/bin/vmware"];
    (is_text
        && vmx
            .iter()
            .any(|key| lower.starts_with(key.as_bytes()) || holds(&format!("\n{key}"))))
    .then_some(&VMX)
}
