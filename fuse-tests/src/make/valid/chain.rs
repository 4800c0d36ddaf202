//! Chains of children and parents.

use std::sync::Arc;

use anyhow::Result;

use super::Variant;
use crate::make::ctx::{BASE_CID, Ctx, Made};
use crate::make::model::{Content, Joined, Layer, Shifted};
use crate::make::write::{self, Descriptor, Hosted};

pub(super) const VARIANTS: &[Variant] = &[
    Variant::new(
        "chain3",
        "chain of three: flat base, two sparse children with 32 KiB and 8 KiB grains and zeroed grains",
        |c| three(c, "", "base.vmdk", "mid.vmdk"),
    ),
    Variant::new(
        "chain_subdir",
        "chain of three, the children in a subdirectory, relative hint ../base.vmdk",
        |c| {
            c.subdir("sub")?;
            let made = three(c, "sub/", "../base.vmdk", "mid.vmdk")?;
            Ok(Made {
                allow_dirs: vec![c.dir().to_owned()],
                ..made
            })
        },
    ),
    Variant::new(
        "chain_winpath",
        "chain of three, the hint is a Windows path; the base lies next to the child (fallback to the last name)",
        |c| three(c, "", "C:\\Virtual Machines\\old\\base.vmdk", "mid.vmdk"),
    ),
    Variant::new(
        "chain_winpath_all",
        "chain of three, both hints are Windows paths: a drive's in the child, a network share's in its parent",
        |c| three(c, "", "\\\\server\\share\\vm\\base.vmdk", "D:\\vm\\mid.vmdk"),
    ),
    Variant::new(
        "chain_esx_path",
        "chain of three, the hint is a path of ESX; the base lies next to the child (fallback to the last name)",
        |c| {
            three(
                c,
                "",
                "/vmfs/volumes/5c0e1a2b-11223344-5566-001122334455/vm/base.vmdk",
                "mid.vmdk",
            )
        },
    ),
    Variant::new(
        "chain_grown",
        "the parent is smaller than the child: zeroes past its end",
        grown,
    ),
    Variant::new(
        "chain_shrunk",
        "the parent is larger than the child: data past the child's end is ignored",
        shrunk,
    ),
    Variant::new(
        "chain_win_relative",
        "chain of three, the children in a subdirectory, the hint is ..\\base.vmdk with a backslash",
        |c| {
            c.subdir("sub")?;
            let made = three(c, "sub/", "..\\base.vmdk", "mid.vmdk")?;
            Ok(Made {
                allow_dirs: vec![c.dir().to_owned()],
                ..made
            })
        },
    ),
    Variant::new(
        "chain_split",
        "a child of three sparse extents over one flat parent: each extent lies over another part of the parent",
        |c| {
            let (disk, lines) = split_child(c, &[2048, 4096, 10_240])?;
            let text = Descriptor::new("twoGbMaxExtentSparse", lines).child(2, BASE_CID, "base.vmdk");
            Ok(Made::new(c.text("disk.vmdk", &text)?, Arc::new(disk)))
        },
    ),
    Variant::new(
        "chain_custom",
        "a child of sparse extents not a multiple of the grain, with a ZERO and a FLAT extent (which hide the parent)",
        custom,
    ),
    Variant::new(
        "chain40",
        "chain of 40 links with grains of 4 KiB to 64 KiB in turn, each with data of its own",
        forty,
    ),
];

/// Writes three links with three grain sizes; the children are in `folder` ("" or a name with a slash).
fn three(c: &Ctx, folder: &str, base_hint: &str, middle_hint: &str) -> Result<Made> {
    let base = c.flat_base("base", 16_384)?;
    let middle = Arc::new(c.layer("mid", 16_384, 64).over(base).write(10, 100).zero([30]));
    let top = c
        .layer("top", 16_384, 16)
        .over(Arc::clone(&middle) as _)
        .write(60, 3)
        .write(16_380, 4)
        .zero([1]);
    let name = format!("{folder}mid.vmdk");
    c.sparse(&name, &middle, &Hosted::zeroed(), |text| {
        text.child(0xb1, BASE_CID, base_hint)
    })?;
    let name = format!("{folder}top.vmdk");
    let (open, _) = c.sparse(&name, &top, &Hosted::zeroed(), |text| {
        text.child(0xb2, 0xb1, middle_hint)
    })?;
    Ok(Made::new(open, Arc::new(top)))
}

fn grown(c: &Ctx) -> Result<Made> {
    let base = c.base(2000)?;
    let top = c.layer("top", 5000, 128).over(base).write(10, 2).write(4000, 1);
    let (open, _) = c.sparse("disk.vmdk", &top, &Hosted::default(), |text| {
        text.child(2, BASE_CID, "base.vmdk")
    })?;
    Ok(Made::new(open, Arc::new(top)))
}

fn shrunk(c: &Ctx) -> Result<Made> {
    let base = c.base(8192)?;
    let top = c.layer("top", 1001, 16).over(base).write(10, 2).write(1000, 1);
    let (open, _) = c.sparse("disk.vmdk", &top, &Hosted::zeroed(), |text| {
        text.child(2, BASE_CID, "base.vmdk")
    })?;
    Ok(Made::new(open, Arc::new(top)))
}

/// Writes consecutive sparse extents over "base.vmdk"; returns the disk and the extent lines.
fn split_child(c: &Ctx, sizes: &[u64]) -> Result<(Joined, Vec<String>)> {
    let base = busy_base(c)?;
    let (mut disk, mut lines, mut at) = (Joined::new(), Vec::new(), 0);
    for (sectors, i) in sizes.iter().zip(1..) {
        let (name, part) = (
            format!("disk-s{i:03}.vmdk"),
            Arc::new(Shifted::new(Arc::clone(&base) as _, at)),
        );
        let layer = c
            .layer(&name, *sectors, 128)
            .over(part)
            .write(3, 2)
            .write(sectors - 1, 1)
            .zero([2]);
        write::hosted(&c.at(&name), &layer, None, &Hosted::zeroed())?;
        lines.push(format!("RW {sectors} SPARSE \"{name}\""));
        (disk, at) = (disk.then(Arc::new(layer)), at + sectors);
    }
    Ok((disk, lines))
}

fn custom(c: &Ctx) -> Result<Made> {
    let (mut disk, mut lines) = split_child(c, &[1000, 1001])?;
    let (flat, at) = (c.layer("flat", 500, 4).fill([0, 124]), 1000 + 1001 + 700 + 500);
    write::flat(&c.at("disk-f004.vmdk"), &flat, 0)?;
    let rest = Arc::new(Shifted::new(busy_base(c)?, at));
    let last = c.layer("last", 3000, 8).over(rest).write(2000, 9);
    write::hosted(&c.at("disk-s005.vmdk"), &last, None, &Hosted::default())?;
    disk = disk.then_zero(700).then(Arc::new(flat)).then(Arc::new(last));
    let more = [
        "RW 700 ZERO",
        "RW 500 FLAT \"disk-f004.vmdk\" 0",
        "RW 3000 SPARSE \"disk-s005.vmdk\"",
    ];
    lines.extend(more.map(str::to_owned));
    let text = Descriptor::new("custom", lines).child(2, BASE_CID, "base.vmdk");
    Ok(Made::new(c.text("disk.vmdk", &text)?, Arc::new(disk)))
}

/// Writes a flat disk "base.vmdk" of 8 MiB in which every other KiB has data, so that any wrong offset is detected.
fn busy_base(c: &Ctx) -> Result<Arc<Layer>> {
    let layer = c.layer("base", 16_384, 2).fill((0..8192).step_by(2));
    write::flat(&c.at("base-flat.vmdk"), &layer, 0)?;
    let text = Descriptor::new("monolithicFlat", ["RW 16384 FLAT \"base-flat.vmdk\" 0"]);
    c.text("base.vmdk", &text.cid(BASE_CID))?;
    Ok(Arc::new(layer))
}

fn forty(c: &Ctx) -> Result<Made> {
    const LINKS: u64 = 40;
    let mut parent: Arc<dyn Content> = c.flat_base("base", 32_768)?;
    let (mut open, mut cid, mut hint) = (c.at("base.vmdk"), BASE_CID, String::from("base.vmdk"));
    for i in 1..LINKS {
        let layer = c
            .layer(&format!("link{i}"), 32_768, 8 << (i % 5))
            .over(Arc::clone(&parent));
        // Some sectors that no other link has, and some that the next link hides in part.
        let layer = Arc::new(layer.write(i * 600 + 5, 3).write(20_000 + i * 17, 20));
        let (name, own) = (format!("disk-{i:06}.vmdk"), 0x100 + i as u32);
        (open, _) = c.sparse(&name, &layer, &Hosted::zeroed(), |text| {
            text.child(own, cid, hint.as_str())
        })?;
        (parent, cid, hint) = (layer, own, name);
    }
    Ok(Made::new(open, parent))
}
