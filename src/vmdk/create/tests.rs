use std::fs;
use std::os::unix::fs::MetadataExt;

use super::text::{NO_CID, geometry, sibling};
use super::*;
use crate::block::{BlockRead, Content, Lba};
use crate::store::Access;
use crate::vmdk::VmdkDisk;
use crate::vmdk::descriptor::Descriptor;
use crate::vmdk::header::{DirectoryAt, HEAD_BYTES, Hosted, Role};
use crate::vmdk::test_store::{TestStore, head, name};

const KINDS: [CreateType; 7] = [
    CreateType::MonolithicSparse,
    CreateType::MonolithicFlat,
    CreateType::SplitSparse,
    CreateType::SplitFlat,
    CreateType::VmfsFlat,
    CreateType::VmfsThin,
    CreateType::StreamOptimized,
];

/// A little more than 2 GiB: the second piece ends inside of a grain.
const TWO_PIECES: u64 = PIECE + 1000;
/// 3 TiB.
const LARGE: u64 = 6 << 30;

fn disk(kind: CreateType, sectors: u64) -> NewDisk {
    NewDisk {
        sectors,
        kind,
        adapter: AdapterType::LsiLogic,
        hardware_version: 4,
    }
}

fn delta(sectors: u64) -> NewDelta {
    NewDelta {
        sectors,
        grain: 16,
        zeroed_grains: true,
        parent: None,
        ddb: Vec::new(),
    }
}

/// Returns the descriptor in a file, with dots instead of the random digits.
fn text_of(bytes: &[u8]) -> String {
    let start = bytes.windows(6).position(|at| at == b"# Disk").unwrap();
    let text = bytes[start..].split(|byte| *byte == 0).next().unwrap();
    let mask = |line: &str| {
        let random = line.starts_with("CID=") || line.contains("longContentID") || line.contains("ddb.uuid");
        let digit = |c: char| if random && c.is_ascii_hexdigit() { '.' } else { c };
        let (key, value) = line.split_once('=').filter(|_| random).unwrap_or(("", line));
        let eq = if random { "=" } else { "" };
        format!("{key}{eq}{}\n", value.chars().map(digit).collect::<String>())
    };
    String::from_utf8_lossy(text).lines().map(mask).collect()
}

#[track_caller]
fn assert_empty_and_clean(disk: &VmdkDisk, sectors: u64) {
    assert_eq!(disk.geometry().sectors, sectors);
    // Checking all tables of a large disk takes long in a debug build.
    if sectors < LARGE {
        let report = disk.check();
        assert_eq!(
            (report.error_count, report.leaks, &report.notes),
            (0, 0, &Vec::new()),
            "{:?}",
            report.errors
        );
    }
    for at in [0, sectors / 2, sectors - 1] {
        let mut sector = [1; SECTOR as usize];
        disk.read_at(Lba(at), &mut sector).unwrap();
        assert_eq!(sector, [0; SECTOR as usize], "sector {at}");
        assert_ne!(disk.content_at(Lba(at)).unwrap().0, Content::Data, "sector {at}");
    }
}

#[test]
fn new_disks_of_every_type_and_size_are_empty_and_clean() {
    for kind in KINDS {
        for sectors in [1, 127, 128, 129, 65_537, PIECE, TWO_PIECES, LARGE] {
            let store = TestStore::new();
            // A preallocated disk takes real space.
            let takes_room = matches!(
                kind,
                CreateType::VmfsFlat | CreateType::MonolithicFlat | CreateType::SplitFlat
            );
            let taken = takes_room && sectors > 65_537;
            let many = matches!(kind, CreateType::SplitSparse | CreateType::SplitFlat) && sectors == LARGE;
            if !taken && !many {
                create(&store, &name("x.vmdk"), &disk(kind, sectors)).unwrap();
                let created = store
                    .open_disk("x.vmdk")
                    .unwrap_or_else(|e| panic!("{kind:?} {sectors}: {e}"));
                if takes_room {
                    assert_eq!(created.geometry().sectors, sectors);
                } else {
                    assert_empty_and_clean(&created, sectors);
                }
            }
        }
    }
}

#[test]
fn only_preallocated_flat_files_take_space() {
    let store = TestStore::new();
    for (kind, file, taken) in [
        (CreateType::VmfsFlat, "a.vmdk", true),
        (CreateType::VmfsThin, "b.vmdk", false),
        (CreateType::MonolithicFlat, "c.vmdk", true),
    ] {
        create(&store, &name(file), &disk(kind, 2048)).unwrap();
        let flat = fs::metadata(store.path(&file.replace(".vmdk", "-flat.vmdk"))).unwrap();
        assert_eq!((flat.len(), flat.blocks() >= 2048), (1 << 20, taken), "{kind:?}");
    }
}

#[test]
fn files_have_the_names_that_vmware_uses() {
    for (kind, sectors, files) in [
        (CreateType::MonolithicSparse, TWO_PIECES, &["x.vmdk"][..]),
        (CreateType::StreamOptimized, TWO_PIECES, &["x.vmdk"]),
        (CreateType::MonolithicFlat, TWO_PIECES, &["x-flat.vmdk", "x.vmdk"]),
        (CreateType::VmfsThin, TWO_PIECES, &["x-flat.vmdk", "x.vmdk"]),
        (CreateType::SplitSparse, PIECE, &["x-s001.vmdk", "x.vmdk"]),
        (
            CreateType::SplitSparse,
            TWO_PIECES,
            &["x-s001.vmdk", "x-s002.vmdk", "x.vmdk"],
        ),
        (
            CreateType::SplitFlat,
            TWO_PIECES,
            &["x-f001.vmdk", "x-f002.vmdk", "x.vmdk"],
        ),
    ] {
        let store = TestStore::new();
        create(&store, &name("x.vmdk"), &disk(kind, sectors)).unwrap();
        assert_eq!(store.files(), files, "{kind:?}");
    }
    let beside = |text: &str| sibling(&name(text), "-flat.vmdk").map(|created| created.to_string());
    assert_eq!(beside("a b.VMDK").unwrap(), "a b-flat.vmdk");
    assert_eq!(beside("disk").unwrap(), "disk-flat.vmdk");
    assert_eq!(beside(".vmdk").unwrap(), ".vmdk-flat.vmdk");
    assert_eq!(beside("é.vmdk").unwrap(), "é-flat.vmdk");
    assert_eq!(
        beside("a\u{e9}\u{20ac}mdk").unwrap(),
        "a\u{e9}\u{20ac}mdk-flat.vmdk",
        "the name is split between characters"
    );
    for odd in [&b"a\".vmdk"[..], b"a\n.vmdk", b"\xff.vmdk"] {
        let error = sibling(&ExtentName::new(odd).unwrap(), "-flat.vmdk").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Usage, "{error}");
    }
}

#[test]
fn each_file_of_an_image_is_listed_once() {
    for kind in [
        CreateType::MonolithicSparse,
        CreateType::MonolithicFlat,
        CreateType::SplitSparse,
    ] {
        let store = TestStore::new();
        create(&store, &name("x.vmdk"), &disk(kind, TWO_PIECES)).unwrap();
        let mut listed: Vec<_> = store
            .open_disk("x.vmdk")
            .unwrap()
            .files()
            .iter()
            .map(|file| file.own_name())
            .collect();
        assert_eq!(
            listed.first().map(String::as_str),
            Some("x.vmdk"),
            "the descriptor is first"
        );
        listed.sort();
        assert_eq!(listed, store.files(), "{kind:?}");
    }
}

#[test]
fn the_text_matches_that_of_vmware() {
    let store = TestStore::new();
    let requested = NewDisk {
        adapter: AdapterType::Ide,
        hardware_version: 13,
        ..disk(CreateType::SplitFlat, TWO_PIECES)
    };
    create(&store, &name("x.vmdk"), &requested).unwrap();
    let expected = "# Disk DescriptorFile\nversion=1\nencoding=\"UTF-8\"\nCID=........\nparentCID=ffffffff\n\
        isNativeSnapshot=\"no\"\ncreateType=\"twoGbMaxExtentFlat\"\n\n# Extent description\n\
        RW 4192256 FLAT \"x-f001.vmdk\" 0\nRW 1000 FLAT \"x-f002.vmdk\" 0\n\n# The Disk Data Base \n#DDB\n\n\
        ddb.adapterType = \"ide\"\nddb.geometry.cylinders = \"4159\"\nddb.geometry.heads = \"16\"\n\
        ddb.geometry.sectors = \"63\"\nddb.longContentID = \"................................\"\n\
        ddb.toolsVersion = \"2147483647\"\nddb.uuid = \".. .. .. .. .. .. .. ..-.. .. .. .. .. .. .. ..\"\n\
        ddb.virtualHWVersion = \"13\"\n";
    assert_eq!(text_of(&fs::read(store.path("x.vmdk")).unwrap()), expected);
    for (kind, create_type, line, more) in [
        (
            CreateType::MonolithicSparse,
            "monolithicSparse",
            "RW 9 SPARSE \"y.vmdk\"\n",
            "",
        ),
        (
            CreateType::StreamOptimized,
            "streamOptimized",
            "RDONLY 9 SPARSE \"generated-stream.vmdk\"\n",
            "",
        ),
        (
            CreateType::MonolithicFlat,
            "monolithicFlat",
            "RW 9 FLAT \"y-flat.vmdk\" 0\n",
            "",
        ),
        (
            CreateType::SplitSparse,
            "twoGbMaxExtentSparse",
            "RW 9 SPARSE \"y-s001.vmdk\"\n",
            "",
        ),
        (CreateType::VmfsFlat, "vmfs", "RW 9 VMFS \"y-flat.vmdk\"\n", ""),
        (
            CreateType::VmfsThin,
            "vmfs",
            "RW 9 VMFS \"y-flat.vmdk\"\n",
            "ddb.thinProvisioned = \"1\"\n",
        ),
    ] {
        let store = TestStore::new();
        create(&store, &name("y.vmdk"), &disk(kind, 9)).unwrap();
        let text = text_of(&fs::read(store.path("y.vmdk")).unwrap());
        assert!(text.contains(&format!("createType=\"{create_type}\"\n")), "{text}");
        assert!(text.contains(line) && text.contains(more), "{text}");
        assert_eq!(text.contains("thinProvisioned"), !more.is_empty(), "{text}");
    }
}

#[test]
fn cid_and_uuid_are_unique_and_consistent() {
    let store = TestStore::new();
    let read = |file: &str| {
        create(&store, &name(file), &disk(CreateType::MonolithicFlat, 1)).unwrap();
        Descriptor::parse(&fs::read(store.path(file)).unwrap()).unwrap()
    };
    let (a, b) = (read("a.vmdk"), read("b.vmdk"));
    for d in [&a, &b] {
        let cid = d.cid.unwrap();
        assert!(cid < 0xffff_fffe);
        assert!(d.ddb_value("longContentID").unwrap().ends_with(&format!("{cid:08x}")));
        let uuid = d.ddb_value("uuid").unwrap();
        assert!(
            uuid.starts_with("60 00 C2 9") && uuid.len() == 47 && uuid.as_bytes()[23] == b'-',
            "{uuid}"
        );
    }
    assert_ne!(a.cid, b.cid);
    assert_ne!(a.ddb_value("uuid"), b.ddb_value("uuid"));
}

#[test]
fn geometry_depends_on_adapter_and_size() {
    use AdapterType::{BusLogic, Ide, LsiLogic, PvScsi};
    for (sectors, adapter, expected) in [
        // These four were written by ovftool and ESXi.
        (61_440, LsiLogic, (30, 64, 32)),
        (4096, LsiLogic, (2, 64, 32)),
        (937_703_088, LsiLogic, (58_369, 255, 63)),
        (1_048_576_000, PvScsi, (65_270, 255, 63)),
        (1, BusLogic, (1, 64, 32)),
        ((1 << 21) - 1, BusLogic, (1023, 64, 32)),
        (1 << 21, BusLogic, (512, 128, 32)),
        ((1 << 22) - 1, LsiLogic, (1023, 128, 32)),
        (1 << 22, LsiLogic, (261, 255, 63)),
        (1, Ide, (1, 16, 63)),
        (10_485_760, Ide, (10_402, 16, 63)),
        (16_514_064, Ide, (16_383, 16, 63)),
        (1 << 40, Ide, (16_383, 16, 63)),
    ] {
        assert_eq!(geometry(sectors, adapter), expected, "{sectors} {adapter:?}");
    }
}

#[test]
fn the_metadata_has_the_layout_that_vmware_uses() {
    let store = TestStore::new();
    create(&store, &name("x.vmdk"), &disk(CreateType::MonolithicSparse, 65_537)).unwrap();
    let bytes = fs::read(store.path("x.vmdk")).unwrap();
    let header = Hosted::parse(&bytes, bytes.len() as u64, Role::Header).unwrap();
    let expected = Hosted {
        version: 1,
        capacity: 65_537,
        grain: 128,
        descriptor: Some((1, 20)),
        entries_per_table: 512,
        redundant: Some(21),
        directory: DirectoryAt::Sector(30),
        overhead: 128,
        unclean: false,
        zeroed_grains: false,
        compressed: false,
        markers: false,
    };
    assert_eq!(header, expected);
    assert_eq!(bytes[8..12], 3u32.to_le_bytes(), "flags");
    let directory =
        |sector: usize| [0, 4].map(|at| u32::from_le_bytes(bytes[sector * 512 + at..][..4].try_into().unwrap()));
    assert_eq!((directory(21), directory(30)), ([22, 26], [31, 35]));
    assert_eq!(bytes.len(), 128 * 512, "nothing after the metadata");
    // A piece has no descriptor, so it does not open as a disk.
    create(&store, &name("y.vmdk"), &disk(CreateType::SplitSparse, 1)).unwrap();
    let piece = head(&store.path("y-s001.vmdk"), HEAD_BYTES);
    let header = Hosted::parse(&piece, 1 << 16, Role::Header).unwrap();
    assert_eq!(
        (header.descriptor, header.redundant, header.directory),
        (None, Some(1), DirectoryAt::Sector(6))
    );
    assert!(store.open_disk("y-s001.vmdk").is_err());
}

#[test]
fn impossible_sizes_are_refused_before_any_file_is_created() {
    let store = TestStore::new();
    let refused = |kind, sectors| {
        let error = create(&store, &name("x.vmdk"), &disk(kind, sectors)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Usage, "{error}");
        error.to_string()
    };
    for kind in KINDS {
        refused(kind, 0);
        refused(kind, MAX_SECTORS + 1);
        refused(kind, u64::MAX);
    }
    assert!(refused(CreateType::MonolithicSparse, MAX_SECTORS).contains("tables for 2199023255552 sectors at most"));
    assert!(refused(CreateType::StreamOptimized, (1 << 41) + 1).contains("tables for 2199023255552 sectors at most"));
    assert!(refused(CreateType::SplitSparse, MAX_SECTORS).contains("another create-type"));
    assert!(refused(CreateType::SplitFlat, PIECE << 15).contains("another create-type"));
    let error = create_delta(&store, &name("x.vmdk"), &delta(1 << 39)).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("grains of 16 sectors has tables for 274877906944"),
        "{error}"
    );
    assert_eq!(store.files(), [""; 0]);
}

#[test]
fn existing_files_are_not_touched_and_partial_images_are_removed() {
    for (taken, kind) in [
        ("x.vmdk", CreateType::MonolithicSparse),
        ("x.vmdk", CreateType::StreamOptimized),
        ("x.vmdk", CreateType::VmfsFlat),
        ("x-flat.vmdk", CreateType::MonolithicFlat),
        ("x-s002.vmdk", CreateType::SplitSparse),
        ("x-f001.vmdk", CreateType::SplitFlat),
    ] {
        let store = TestStore::new();
        fs::write(store.path(taken), "mine").unwrap();
        let error = create(&store, &name("x.vmdk"), &disk(kind, TWO_PIECES)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Os(libc::EEXIST), "{error}");
        assert!(
            error.to_string().contains(taken) && error.to_string().contains("never takes the place"),
            "{error}"
        );
        assert_eq!(store.files(), [taken], "{kind:?}");
        assert_eq!(fs::read(store.path(taken)).unwrap(), b"mine");
    }
}

#[test]
fn a_failure_at_any_step_leaves_no_files() {
    for kind in KINDS {
        let mut steps = 0;
        loop {
            let store = TestStore::new();
            store.allow(steps);
            // A preallocated disk is small, as it takes real space.
            let sectors = if kind == CreateType::VmfsFlat { 9 } else { TWO_PIECES };
            match create(&store, &name("x.vmdk"), &disk(kind, sectors)) {
                Ok(()) => break,
                Err(e) => {
                    assert_eq!(e.kind(), ErrorKind::Os(libc::ENOSPC), "{e}");
                    assert_eq!(store.files(), [""; 0], "{kind:?} after {steps} steps");
                }
            }
            steps += 1;
        }
        assert!(steps >= 6, "{kind:?}: {steps} steps");
    }
}

#[test]
fn a_delta_reads_its_parent_and_keeps_its_descriptor_values() {
    let store = TestStore::new();
    create(&store, &name("base.vmdk"), &disk(CreateType::MonolithicFlat, 4096)).unwrap();
    fs::write(store.path("base-flat.vmdk"), vec![7; 4096 * 512]).unwrap();
    let cid = Descriptor::parse(&fs::read(store.path("base.vmdk")).unwrap())
        .unwrap()
        .cid
        .unwrap();
    let ddb = vec![("vmdkfuse.state".to_owned(), "00000000".to_owned())];
    let parent = Some(DeltaParent {
        cid,
        hint: "base.vmdk".to_owned(),
    });
    let requested = NewDelta {
        parent,
        ddb,
        ..delta(4096)
    };
    create_delta(&store, &name("x.vmdk"), &requested).unwrap();
    let opened = store.open_disk("x.vmdk").unwrap();
    let mut sector = [0; SECTOR as usize];
    opened.read_at(Lba(4095), &mut sector).unwrap();
    assert_eq!(sector, [7; SECTOR as usize]);
    assert_eq!(opened.check().error_count, 0);
    let bytes = fs::read(store.path("x.vmdk")).unwrap();
    let header = Hosted::parse(&bytes, bytes.len() as u64, Role::Header).unwrap();
    assert_eq!(
        (header.version, header.grain, header.zeroed_grains, header.overhead % 16),
        (2, 16, true, 0)
    );
    let text = text_of(&bytes);
    for line in [
        format!("parentCID={cid:08x}\n"),
        "createType=\"monolithicSparse\"\nparentFileNameHint=\"base.vmdk\"\n".to_owned(),
        "RW 4096 SPARSE \"x.vmdk\"\n".to_owned(),
        "ddb.vmdkfuse.state = \"00000000\"\n".to_owned(),
    ] {
        assert!(text.contains(&line), "{line} is not in:\n{text}");
    }
}

#[test]
fn a_delta_without_a_parent_opens_as_an_empty_disk() {
    let store = TestStore::new();
    create_delta(
        &store,
        &name("x.vmdk"),
        &NewDelta {
            zeroed_grains: false,
            ..delta(70_001)
        },
    )
    .unwrap();
    let opened = store.open_disk("x.vmdk").unwrap();
    assert_empty_and_clean(&opened, 70_001);
    let bytes = head(&store.path("x.vmdk"), HEAD_BYTES);
    assert_eq!((bytes[4], bytes[8]), (1, 3), "version and flags");
}

#[test]
fn a_long_hint_gets_enough_descriptor_sectors() {
    let store = TestStore::new();
    let hint = format!("{}/base.vmdk", "d".repeat(12_000));
    let requested = NewDelta {
        parent: Some(DeltaParent {
            cid: 1,
            hint: hint.clone(),
        }),
        ..delta(1)
    };
    create_delta(&store, &name("x.vmdk"), &requested).unwrap();
    let text = text_of(&fs::read(store.path("x.vmdk")).unwrap());
    assert!(text.contains(&hint) && text.ends_with("\"\n"), "{text}");
}

#[test]
fn values_that_a_descriptor_cannot_hold_are_refused() {
    let store = TestStore::new();
    let parent = |cid, hint: &str| {
        Some(DeltaParent {
            cid,
            hint: hint.to_owned(),
        })
    };
    let ddb = |key: &str, value: &str| vec![(key.to_owned(), value.to_owned())];
    for requested in [
        NewDelta {
            parent: parent(1, "a\"b"),
            ..delta(1)
        },
        NewDelta {
            parent: parent(1, "a\nb"),
            ..delta(1)
        },
        NewDelta {
            parent: parent(NO_CID, "a"),
            ..delta(1)
        },
        NewDelta {
            ddb: ddb("key", "a\"b"),
            ..delta(1)
        },
        NewDelta {
            ddb: ddb("ke\ny", "v"),
            ..delta(1)
        },
        NewDelta { grain: 4, ..delta(1) },
        NewDelta { grain: 24, ..delta(1) },
        NewDelta { grain: 0, ..delta(1) },
    ] {
        let error = create_delta(&store, &name("x.vmdk"), &requested).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Usage, "{requested:?}: {error}");
    }
    assert_eq!(store.files(), [""; 0]);
}

#[test]
fn removal_by_identity_spares_another_file_under_the_name() {
    let store = TestStore::new();
    let created = store.create(&name("x")).unwrap();
    fs::rename(store.path("x"), store.path("y")).unwrap();
    fs::write(store.path("x"), "another").unwrap();
    let error = store.remove(&name("x"), &created.identity_at_open()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
    assert_eq!(store.files(), ["x", "y"]);
    store.remove(&name("y"), &created.identity_at_open()).unwrap();
    assert_eq!(store.files(), ["x"]);
    assert!(store.remove(&name("y"), &created.identity_at_open()).is_err());
    assert!(store.open(&name("x"), Access::Read).is_ok());
}

#[test]
fn the_descriptor_of_a_stream_fits_one_sector() {
    for (sectors, adapter) in [(1, AdapterType::Ide), (MAX_SECTORS, AdapterType::LegacyEsx)] {
        let disk = NewDisk {
            sectors,
            kind: CreateType::StreamOptimized,
            adapter,
            hardware_version: u32::MAX,
        };
        let extent = NewExtent {
            access: ExtentAccess::ReadOnly,
            sectors,
            kind: ExtentKind::Sparse,
            name: STREAM_NAME.to_owned(),
        };
        let text = NewText::stream(&disk, extent).to_text();
        assert!(text.len() <= SECTOR as usize, "{} bytes: {text}", text.len());
        assert!(Descriptor::parse(text.as_bytes()).unwrap().warnings.is_empty());
    }
}
