//! Parents that are missing, wrong, cyclic or outside of the image's folder.

use std::sync::Arc;

use anyhow::Result;

use super::{Bad, Hostile};
use crate::make::ctx::{BASE_CID, Ctx};
use crate::make::model::Layer;
use crate::make::write::{self, Descriptor, Hosted, NO_PARENT};

pub(super) const FILES: &[Hostile] = &[
    Hostile::reject("parent_self", "the parent hint is the file itself", |c| {
        child(c, "disk.vmdk", Some("disk.vmdk"), 2, 2)
    }),
    Hostile::reject("parent_loop", "two files are each other's parent", |c| {
        child(c, "b.vmdk", Some("a.vmdk"), 1, 2)?;
        child(c, "a.vmdk", Some("b.vmdk"), 2, 1)
    }),
    Hostile::reject("parent_deep", "a chain of 600 links", deep),
    Hostile::policy("parent_absolute", "the parent is /etc/passwd", |c| {
        child(c, "disk.vmdk", Some("/etc/passwd"), BASE_CID, 2)
    }),
    Hostile::policy("parent_dotdot", "the parent hint leaves the directory by ..", |c| {
        child(
            c,
            "disk.vmdk",
            Some(&format!("{}etc/passwd", "../".repeat(16))),
            BASE_CID,
            2,
        )
    }),
    Hostile::policy(
        "parent_dotdot_allowed",
        "the parent hint leads to another folder by .., which may be allowed",
        |c| {
            c.subdir("inside")?;
            let base = c.base(8192)?;
            let bad = child(c, "inside/disk.vmdk", Some("../base.vmdk"), BASE_CID, 2)?;
            let content = empty(c).over(base);
            Ok(Bad {
                allow_dirs: vec![c.dir().to_owned()],
                content: Some(Arc::new(content)),
                ..bad
            })
        },
    ),
    Hostile::reject(
        "parent_cid_wrong",
        "parentCID does not match the CID of the parent (may be accepted on request)",
        |c| {
            let base = c.base(8192)?;
            let bad = child(c, "disk.vmdk", Some("base.vmdk"), 0xdead, 2)?;
            Ok(Bad::holding(bad.open, Arc::new(empty(c).over(base))))
        },
    ),
    Hostile::reject("parent_missing", "the parent does not exist", |c| {
        child(c, "disk.vmdk", Some("gone.vmdk"), BASE_CID, 2)
    }),
    Hostile::reject("parent_no_hint", "parentCID names a parent but there is no hint", |c| {
        child(c, "disk.vmdk", None, BASE_CID, 2)
    }),
    Hostile::warn(
        "parent_hint_without_cid",
        "parentCID says no parent, but there is a hint (qemu follows it)",
        |c| {
            c.base(8192)?;
            let bad = child(c, "disk.vmdk", Some("base.vmdk"), NO_PARENT, 2)?;
            Ok(Bad::holding(bad.open, Arc::new(empty(c))))
        },
    ),
    Hostile::reject(
        "parent_raw",
        "the parent is a raw file of the right size, not a VMDK",
        |c| {
            write::flat(&c.at("base.img"), &c.layer("base", 8192, 16).fill([0, 3]), 0)?;
            child(c, "disk.vmdk", Some("base.img"), BASE_CID, 2)
        },
    ),
];

/// Returns the child's own layer, which has no grains.
fn empty(c: &Ctx) -> Layer {
    c.layer("child", 8192, 128)
}

/// Writes a sparse child without grains of its own.
fn child(c: &Ctx, name: &str, hint: Option<&str>, parent_cid: u32, cid: u32) -> Result<Bad> {
    let (open, _) = c.sparse(name, &empty(c), &Hosted::default(), |text| Descriptor {
        cid,
        parent_cid,
        hint: hint.map(str::to_owned),
        ..text
    })?;
    Ok(Bad::new(open))
}

fn deep(c: &Ctx) -> Result<Bad> {
    c.base(8192)?;
    let (mut hint, mut parent) = (String::from("base.vmdk"), BASE_CID);
    let mut bad = Bad::new(c.at("base.vmdk"));
    for i in 0..600 {
        let (name, cid) = (format!("d{i:03}.vmdk"), 16 + i);
        bad = child(c, &name, Some(&hint), parent, cid)?;
        (hint, parent) = (name, cid);
    }
    Ok(bad)
}
