//! Descriptors with missing keys, with numbers that overflow, and with names that lead out of the folder.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::symlink;
use std::sync::Arc;

use anyhow::Result;
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;

use super::{Bad, Hostile};
use crate::make::ctx::{BASE_CID, Ctx};
use crate::make::model::{Joined, Layer, SECTOR};
use crate::make::valid::sparse::envelope;
use crate::make::write::{self, Descriptor};

/// Sectors of the flat file next to each descriptor.
const DATA: u64 = 2048;
/// Extent line that names that file.
const GOOD: &str = "RW 2048 FLAT \"data-flat.vmdk\" 0";

pub(super) const FILES: &[Hostile] = &[
    Hostile::warn("rdm_named", "vmfsRDM whose file is a copy of the data", |c| {
        readable(c, &Descriptor::new("vmfsRDM", ["RW 2048 VMFSRDM \"data-flat.vmdk\""]))
    }),
    Hostile::warn("no_create_type", "createType is missing", |c| {
        readable(
            c,
            &Descriptor {
                kind: None,
                ..Descriptor::new("", [GOOD])
            },
        )
    }),
    Hostile::reject("no_extents", "no extent line", |c| lines(c, "monolithicFlat", &[])),
    Hostile::warn("create_type_unknown", "createType is unknown", |c| {
        readable(c, &Descriptor::new("hologram", [GOOD]))
    }),
    Hostile::reject("extent_negative", "negative sector count", |c| {
        lines(c, "monolithicFlat", &["RW -2048 FLAT \"data-flat.vmdk\" 0"])
    }),
    Hostile::reject("extent_sum_wraps", "extent sizes add up past 2^64", |c| {
        lines(
            c,
            "twoGbMaxExtentFlat",
            &["RW 18446744073709551615 FLAT \"data-flat.vmdk\" 0", GOOD],
        )
    }),
    Hostile::reject("extent_bytes_wrap", "sector count times 512 passes 2^64", |c| {
        lines(c, "monolithicFlat", &["RW 36028797018963969 FLAT \"data-flat.vmdk\" 0"])
    }),
    Hostile::reject("flat_offset_wraps", "offset times 512 passes 2^63", |c| {
        lines(
            c,
            "monolithicFlat",
            &["RW 2048 FLAT \"data-flat.vmdk\" 36028797018963967"],
        )
    }),
    Hostile::eio(
        "flat_short",
        "the flat file is shorter than its extent",
        Some(DATA * SECTOR..1_048_576 * SECTOR),
        |c| {
            let bad = lines(c, "monolithicFlat", &["RW 1048576 FLAT \"data-flat.vmdk\" 0"])?;
            Ok(Bad::holding(bad.open, Arc::new(flat_layer(c).resized(1_048_576))))
        },
    ),
    Hostile::eio(
        "flat_offset_past_end",
        "the offset is past the end of the flat file",
        Some(0..DATA * SECTOR),
        |c| lines(c, "monolithicFlat", &["RW 2048 FLAT \"data-flat.vmdk\" 4096"]),
    ),
    Hostile::reject("quote_open", "the file name has no closing quote", |c| {
        lines(c, "monolithicFlat", &["RW 2048 FLAT \"data-flat.vmdk 0"])
    }),
    Hostile::reject("name_empty", "empty file name", |c| {
        lines(c, "monolithicFlat", &["RW 2048 FLAT \"\" 0"])
    }),
    Hostile::reject("name_4k", "file name of 5000 characters", |c| {
        lines(
            c,
            "monolithicFlat",
            &[&format!("RW 2048 FLAT \"{}\" 0", "x".repeat(5000))],
        )
    }),
    Hostile::warn("vmfs_with_offset", "VMFS extent with an offset (qemu refuses)", |c| {
        lines(c, "vmfs", &["RW 2048 VMFS \"data-flat.vmdk\" 1"])
    }),
    Hostile::policy("path_absolute", "extent is /etc/passwd", |c| {
        lines(c, "monolithicFlat", &["RW 1 FLAT \"/etc/passwd\" 0"])
    }),
    Hostile::policy("path_dotdot", "extent leaves the directory by ..", |c| {
        lines(
            c,
            "monolithicFlat",
            &[&format!("RW 1 FLAT \"{}etc/passwd\" 0", "../".repeat(16))],
        )
    }),
    Hostile::policy("path_device", "extent is an endless character device", |c| {
        lines(c, "fullDevice", &["RW 2048 FLAT \"/dev/zero\" 0"])
    }),
    Hostile::policy("path_url", "extent name that qemu takes for a protocol", |c| {
        lines(c, "monolithicFlat", &["RW 2048 FLAT \"nbd:localhost:10809\" 0"])
    }),
    Hostile::policy(
        "path_absolute_allowed",
        "extent with an absolute path to another folder, which may be allowed",
        |c| {
            let path = c.dir().canonicalize()?.join("outside").join("data-flat.vmdk");
            outside(c, &path.display().to_string())
        },
    ),
    Hostile::policy(
        "path_dotdot_allowed",
        "extent leads to another folder by .., which may be allowed",
        |c| outside(c, "../outside/data-flat.vmdk"),
    ),
    Hostile::policy(
        "path_symlink_allowed",
        "extent is a link to another folder, which may be allowed",
        |c| {
            let bad = outside(c, "link.vmdk")?;
            symlink("../outside/data-flat.vmdk", c.at("inside/link.vmdk"))?;
            Ok(bad)
        },
    ),
    Hostile::policy(
        "path_folder_symlink",
        "the folder in the extent's name is a link that leaves the directory",
        |c| {
            let bad = outside(c, "sub/data-flat.vmdk")?;
            symlink("../outside", c.at("inside/sub"))?;
            Ok(bad)
        },
    ),
    Hostile::policy("path_directory", "extent is a directory", |c| {
        let bad = lines(c, "monolithicFlat", &["RW 2048 FLAT \"sub\" 0"])?;
        c.subdir("sub")?;
        Ok(bad)
    }),
    Hostile::reject("extents_100000", "100,000 extent lines", |c| {
        lines(c, "custom", &vec!["RW 1 ZERO"; 100_000])
    }),
    Hostile::reject("encrypted", "encrypted disk: the flat file holds ciphertext", |c| {
        let plain = Descriptor::new("vmfs", ["RW 2048 VMFS \"data-flat.vmdk\""]);
        text(
            c,
            &Descriptor {
                header: vec!["encryptionKeys=\"vmware:key/fqid/x/y/z\""],
                ..plain
            },
        )
    }),
    Hostile::warn("flat_twice", "two extents share the same file range", |c| {
        let bad = lines(c, "twoGbMaxExtentFlat", &[GOOD, GOOD])?;
        let disk = Joined::new()
            .then(Arc::new(flat_layer(c)))
            .then(Arc::new(flat_layer(c)));
        Ok(Bad::holding(bad.open, Arc::new(disk)))
    }),
    Hostile::reject(
        "extent_is_descriptor",
        "a SPARSE extent names the text descriptor itself",
        |c| lines(c, "twoGbMaxExtentSparse", &["RW 2048 SPARSE \"disk.vmdk\""]),
    ),
    Hostile::policy(
        "path_symlink",
        "extent is a symbolic link that leaves the directory",
        |c| {
            symlink("/etc/passwd", c.at("data-flat.vmdk"))?;
            let text = Descriptor::new("monolithicFlat", ["RW 1 FLAT \"data-flat.vmdk\" 0"]);
            Ok(Bad::new(c.text("disk.vmdk", &text)?))
        },
    ),
    Hostile::policy("path_fifo", "extent is a FIFO: open blocks forever", |c| {
        mkfifo(&c.at("data-flat.vmdk"), Mode::S_IRUSR | Mode::S_IWUSR)?;
        Ok(Bad::new(
            c.text("disk.vmdk", &Descriptor::new("monolithicFlat", [GOOD]))?,
        ))
    }),
    Hostile::reject(
        "descriptor_endless",
        "descriptor text of 64 MiB without a line end",
        |c| {
            let open = c.at("disk.vmdk");
            let mut file = fs::File::create(&open)?;
            file.write_all(b"# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType=\"")?;
            let part = vec![b'A'; 1 << 20];
            for _ in 0..64 {
                file.write_all(&part)?;
            }
            Ok(Bad::new(open))
        },
    ),
    Hostile::reject(
        "wrapped_self",
        "KDMV header with capacity 0 whose descriptor names the file itself as SPARSE extent: infinite recursion",
        |c| {
            let text = Descriptor::new("twoGbMaxExtentSparse", ["RW 2048 SPARSE \"disk.vmdk\""]);
            Ok(Bad::new(write::put(c.at("disk.vmdk"), &envelope(&text, 512)?)?))
        },
    ),
    Hostile::reject(
        "wrapped_twice",
        "an envelope (capacity 0) whose extent is another envelope",
        |c| {
            let inner = Descriptor::new("monolithicFlat", [GOOD]);
            lines(c, "monolithicFlat", &[GOOD])?;
            write::put(c.at("inner.vmdk"), &envelope(&inner, 0)?)?;
            let outer = Descriptor::new("twoGbMaxExtentSparse", ["RW 2048 SPARSE \"inner.vmdk\""]);
            Ok(Bad::new(write::put(c.at("disk.vmdk"), &envelope(&outer, 0)?)?))
        },
    ),
    Hostile::warn("cid_twice", "two CID lines that differ", |c| {
        readable(
            c,
            &Descriptor {
                header: vec!["CID=00000099"],
                ..Descriptor::new("monolithicFlat", [GOOD])
            },
        )
    }),
    Hostile::reject("rdm_pointer", "vmfsRDMP whose mapping file is an empty pointer", |c| {
        write::put(c.at("disk-rdmp.vmdk"), b"")?;
        lines(c, "vmfsRDMP", &["RW 2048 VMFSRDM \"disk-rdmp.vmdk\""])
    }),
    Hostile::reject(
        "native_snapshot",
        "isNativeSnapshot=\"yes\": the array has the data, not the file",
        |c| {
            let layer = c.layer("delta", DATA, 1).over(c.base(DATA)?).write(7, 3);
            write::cowd(&c.at("disk-delta.vmdk"), &layer)?;
            let plain = Descriptor::new("vmfsSparse", ["RW 2048 VMFSSPARSE \"disk-delta.vmdk\""]);
            let native = Descriptor {
                header: vec!["isNativeSnapshot=\"yes\""],
                ..plain
            };
            Ok(Bad::new(c.text("disk.vmdk", &native.child(2, BASE_CID, "base.vmdk"))?))
        },
    ),
    Hostile::reject("not_a_vmdk", "noise in a file whose name ends in .vmdk", |c| {
        write::flat(&c.at("disk.vmdk"), &c.layer("noise", 64, 8).fill(0..8), 0)?;
        Ok(Bad::new(c.at("disk.vmdk")))
    }),
];

/// Returns the content of the flat file next to each descriptor.
fn flat_layer(c: &Ctx) -> Layer {
    c.layer("data", DATA, 16).fill([0, 3, 127])
}

/// Writes a descriptor with a small flat file next to it.
fn text(c: &Ctx, text: &Descriptor) -> Result<Bad> {
    write::flat(&c.at("data-flat.vmdk"), &flat_layer(c), 0)?;
    Ok(Bad::new(write::put(c.at("disk.vmdk"), text.text().as_bytes())?))
}

/// As [`text`], for a descriptor whose peculiarity decides no byte: if it is read, then as its flat file.
fn readable(c: &Ctx, descriptor: &Descriptor) -> Result<Bad> {
    let bad = text(c, descriptor)?;
    Ok(Bad::holding(bad.open, Arc::new(flat_layer(c))))
}

/// Writes a usual descriptor with this createType and these extent lines.
fn lines(c: &Ctx, create_type: &'static str, lines: &[&str]) -> Result<Bad> {
    text(c, &Descriptor::new(create_type, lines.iter().copied()))
}

/// Writes a disk in the folder "inside" whose only extent `name` leads to a file in the folder "outside".
fn outside(c: &Ctx, name: &str) -> Result<Bad> {
    let folder = c.subdir("outside")?;
    c.subdir("inside")?;
    let layer = flat_layer(c);
    write::flat(&folder.join("data-flat.vmdk"), &layer, 0)?;
    let text = Descriptor::new("monolithicFlat", [format!("RW 2048 FLAT \"{name}\" 0")]);
    let bad = Bad::holding(c.text("inside/disk.vmdk", &text)?, Arc::new(layer));
    Ok(Bad {
        allow_dirs: vec![folder],
        ..bad
    })
}
