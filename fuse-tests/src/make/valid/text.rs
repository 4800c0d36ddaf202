//! Unusual descriptors of ordinary flat disks.

use std::sync::Arc;

use anyhow::Result;

use super::Variant;
use crate::make::ctx::{BASE_CID, Ctx, Made};
use crate::make::model::Joined;
use crate::make::write::{self, Descriptor};

pub(super) const VARIANTS: &[Variant] = &[
    Variant::new(
        "crlf_descriptor",
        "descriptor with CR LF line ends, blanks around '=' and at line ends, unusual letter case",
        |c| {
            let layer = c.flat_base("data", 4096)?;
            let text = Descriptor {
                eol: "\r\n",
                ..Descriptor::new("monolithicFlat", ["rw 4096 flat \"data-flat.vmdk\" 0"])
            };
            let text = text
                .text()
                .replace("createType=", "CREATETYPE = ")
                .replace("version=1", "version=1 ");
            Ok(Made::new(write::put(c.at("disk.vmdk"), text.as_bytes())?, layer))
        },
    ),
    Variant::new(
        "crlf_plain",
        "descriptor with CR LF line ends and nothing else unusual",
        |c| {
            let layer = c.flat_base("data", 4096)?;
            let text = Descriptor {
                eol: "\r\n",
                ..Descriptor::new("monolithicFlat", ["RW 4096 FLAT \"data-flat.vmdk\" 0"])
            };
            Ok(Made::new(c.text("disk.vmdk", &text.cid(BASE_CID))?, layer))
        },
    ),
    Variant::new("utf8_names", "UTF-8 file names with blanks", |c| {
        named(c, "disque n° 1 été 磁盘.vmdk", "disque n° 1 été 磁盘", "UTF-8")
    }),
    Variant::new(
        "enc_windows1252",
        "descriptor in windows-1252; the extent file has the UTF-8 name",
        |c| named(c, "disk.vmdk", "Größe café", "windows-1252"),
    ),
    Variant::new(
        "enc_shift_jis",
        "descriptor in Shift_JIS; one character has 0x5c as its second byte",
        |c| named(c, "disk.vmdk", "ディスク表示", "Shift_JIS"),
    ),
    Variant::new("enc_gbk", "descriptor in GBK", |c| {
        named(c, "disk.vmdk", "虚拟磁盘", "GBK")
    }),
    Variant::new("enc_big5", "descriptor in Big5", |c| {
        named(c, "disk.vmdk", "虛擬磁碟功", "Big5")
    }),
    Variant::new(
        "text_any_order",
        "extents, disk database and settings in another order, a short CID, a first line without a blank (AWS export)",
        |c| {
            let text = "#Disk DescriptorFile\n\nversion=1\nRW 4096 FLAT \"data-flat.vmdk\" 0\nddb.adapterType = \"ide\"\n\
                        parentCID=ffffffff\n# CID=99\ncreateType=\"monolithicFlat\"\nCID=abc\n";
            let layer = c.flat_base("data", 4096)?;
            Ok(Made::new(write::put(c.at("disk.vmdk"), text.as_bytes())?, layer))
        },
    ),
    Variant::new(
        "extent_words",
        "extent lines with tabs, with words after the offset, a ZERO extent with a name, an empty NOACCESS placeholder",
        |c| {
            let layer = c.flat_base("data", 4096)?;
            let lines = [
                "RW\t4096  FLAT \"data-flat.vmdk\" 0 partitionUUID 01234567 device \"x\"",
                "NOACCESS 0 ZERO",
                "RW 64 ZERO \"nothing.vmdk\"",
            ];
            let disk = Joined::new().then(layer).then_zero(64);
            Ok(Made::new(
                c.text("disk.vmdk", &Descriptor::new("custom", lines))?,
                Arc::new(disk),
            ))
        },
    ),
    Variant::new(
        "extent_default_offset",
        "FLAT without an offset (0), and VMFS with an explicit 0",
        |c| {
            let layer = c.flat_base("data", 4096)?;
            let lines = ["RW 4096 FLAT \"data-flat.vmdk\"", "RW 4096 VMFS \"data-flat.vmdk\" 0"];
            let disk = Joined::new().then(Arc::clone(&layer) as _).then(layer);
            Ok(Made::new(
                c.text("disk.vmdk", &Descriptor::new("custom", lines))?,
                Arc::new(disk),
            ))
        },
    ),
    Variant::new(
        "alias_2gb",
        "the alternative spelling 2GbMaxExtentFlat of the type",
        |c| {
            let layer = c.flat_base("data", 4096)?;
            let text = Descriptor::new("2GbMaxExtentFlat", ["RW 4096 FLAT \"data-flat.vmdk\" 0"]);
            Ok(Made::new(c.text("disk.vmdk", &text)?, layer))
        },
    ),
];

/// Writes a flat disk whose descriptor is in `encoding`; the extent file has the UTF-8 name.
fn named(c: &Ctx, open: &str, stem: &str, encoding: &'static str) -> Result<Made> {
    let layer = c.layer("data", 4096, 16).fill([0, 255]);
    write::flat(&c.at(&format!("{stem}-flat.vmdk")), &layer, 0)?;
    let text = Descriptor::new("monolithicFlat", [format!("RW 4096 FLAT \"{stem}-flat.vmdk\" 0")]);
    let open = c.text(
        open,
        &Descriptor {
            encoding: Some(encoding),
            ..text
        },
    )?;
    Ok(Made::new(open, Arc::new(layer)))
}
