use proptest::prelude::*;

use super::*;
use crate::error::ErrorKind;
use crate::store::ExtentName;

mod names;
mod parents;

/// Returns a descriptor with one flat extent and the lines `more`.
fn text(more: &str) -> String {
    format!(
        "# Disk DescriptorFile\nversion=1\nCID=0123abcd\nparentCID=ffffffff\ncreateType=\"monolithicFlat\"\n{more}\n\
         RW 2048 FLAT \"disk-flat.vmdk\" 0\nddb.adapterType = \"ide\"\n"
    )
}

fn parse(text: impl AsRef<[u8]>) -> Descriptor {
    Descriptor::parse(text.as_ref()).unwrap()
}

#[track_caller]
fn refused(text: impl AsRef<[u8]>, kind: ErrorKind, fragment: &str) {
    let error = Descriptor::parse(text.as_ref()).unwrap_err();
    assert_eq!(error.kind(), kind, "{error}");
    assert!(
        error.to_string().contains(fragment),
        "`{error}` does not contain `{fragment}`"
    );
}

/// Returns the size of the disk.
fn sectors(descriptor: &Descriptor) -> u64 {
    descriptor.extents.iter().map(|extent| extent.sectors).sum()
}

#[test]
fn a_plain_descriptor_is_parsed() {
    let d = parse(text(""));
    assert_eq!(
        (d.version, d.create_type.as_str(), d.cid),
        (Some(1), "monolithicFlat", Some(0x0123_abcd))
    );
    assert_eq!(
        (d.parent.clone(), d.change_tracking.clone(), sectors(&d)),
        (None, None, 2048)
    );
    assert_eq!(d.ddb, [("adapterType".to_owned(), "ide".to_owned())]);
    assert_eq!(d.ddb_value("ADAPTERTYPE"), Some("ide"));
    let extent = &d.extents[0];
    assert_eq!(
        (extent.access, extent.sectors, extent.kind, extent.offset, extent.line),
        (ExtentAccess::ReadWrite, 2048, ExtentKind::Flat, 0, 7)
    );
    assert_eq!(extent.name.as_ref().unwrap().as_bytes(), b"disk-flat.vmdk");
}

#[test]
fn order_case_blanks_and_line_ends_are_irrelevant() {
    let d = parse(
        "\u{feff}\r\n \t# Description file created by VMDK stream converter\r\nddb.uuid = \"60 00\"\r\n\
         rw 5 flat \"b c.vmdk\" 7 partition-uuid device\r\nCREATETYPE = \"CUSTOM\" \r\n#DDB\r\n\tparentcid=FFFFFFFF \r\n\
         rdonly 3 Sparse \"s.vmdk\"\r\ncid=a454774a \r\nVERSION=3 \r\nnoAccess 0 ZERO\r\nNOACCESS 9 zero \"ignored\" 4\r\n\
         changetrackpath=\"x-ctk.vmdk\"\r\nRW=unknown settings are ignored",
    );
    assert_eq!(
        (d.version, d.create_type.as_str(), d.cid, sectors(&d)),
        (Some(3), "custom", Some(0xa454_774a), 17)
    );
    assert_eq!(d.change_tracking.as_deref(), Some("x-ctk.vmdk"));
    let seen: Vec<_> = d
        .extents
        .iter()
        .map(|e| (e.access, e.sectors, e.kind, e.offset))
        .collect();
    assert_eq!(
        seen,
        [
            (ExtentAccess::ReadWrite, 5, ExtentKind::Flat, 7),
            (ExtentAccess::ReadOnly, 3, ExtentKind::Sparse, 0),
            (ExtentAccess::None, 9, ExtentKind::Zero, 0)
        ]
    );
    assert_eq!(d.extents[0].name.as_ref().unwrap().as_bytes(), b"b c.vmdk");
    assert_eq!(d.extents[2].name, None);
}

#[test]
fn the_text_ends_at_the_first_nul() {
    let mut bytes = text("").into_bytes();
    bytes.extend(b"\0RW garbage after the end");
    assert_eq!(parse(&bytes), parse(text("")));
    bytes.resize(bytes.len() + lines::TEXT_MAX, b'x');
    assert_eq!(parse(&bytes), parse(text("")));
}

#[test]
fn invalid_extent_lines_are_refused() {
    let corrupt = |line: &str, fragment: &str| {
        refused(text(line), ErrorKind::Corrupt, fragment);
        refused(text(line), ErrorKind::Corrupt, "line 6: ");
    };
    corrupt("RW", "number of sectors");
    corrupt("RW -1 FLAT \"x\" 0", "not `-1`");
    corrupt("RW +1 FLAT \"x\" 0", "not `+1`");
    corrupt("RW 0x10 FLAT \"x\" 0", "not `0x10`");
    corrupt("RW 18446744073709551616 FLAT \"x\" 0", "number of sectors");
    corrupt("RW 18014398509481984 FLAT \"x\" 0", "number of sectors");
    corrupt("RW 1 FLAT", "a file name in quotes");
    corrupt("RW 1 FLAT my disk.img 0", "first sector in the file");
    corrupt("RW 1 SPARSE 'x.vmdk", "closing `\"`");
    corrupt("RW 1 FLAT \"\" 0", "empty");
    corrupt("RW 1 FLAT \"x 0", "closing `\"`");
    corrupt("RW 1 FLAT \"a\"b.vmdk\" 0", "first sector in the file");
    corrupt("RW 1 FLAT \"x\" -1", "first sector in the file");
    corrupt("RW 2 FLAT \"x\" 18014398509481982", "end before sector");
    corrupt("RW 1 VMFS \"x\" 1", "no offset, or 0");
    corrupt("RW 1 SPARSE \"x\" 1", "no offset, or 0");
    corrupt(&format!("RW 1 FLAT \"{}\" 0", "x".repeat(4096)), "4096 bytes");
    refused(
        text("RW 1 QCOW \"x\""),
        ErrorKind::Unsupported,
        "line 6: expected the extent type",
    );
}

#[test]
fn extent_lines_at_their_limits_are_accepted() {
    let first = |line: &str| parse(text(line)).extents[0].clone();
    assert_eq!(first("RW 1 VMFS \"x\" 0").offset, 0);
    assert_eq!(first("RW 1 FLAT \"x\"").offset, 0);
    assert_eq!(first("RW 1 FLAT \"x\" 18014398509481982").offset, MAX_SECTORS - 1);
    assert_eq!(
        first(&format!("RW 1 FLAT \"{}\" 0", "x".repeat(4095)))
            .name
            .unwrap()
            .as_bytes()
            .len(),
        4095
    );
    assert_eq!(first("RW 1 VMFSSPARSE \"x\"").kind, ExtentKind::VmfsSparse);
    assert_eq!(first("RW 1 SESPARSE \"x\"").kind, ExtentKind::SeSparse);
    assert_eq!(first("RW 1 VMFSRDM \"x\"").kind, ExtentKind::VmfsRdm);
    assert_eq!(first("RW 1 vmfsraw \"x\"").kind, ExtentKind::VmfsRaw);
    let most = format!("version=1\ncreateType=custom\nRW {MAX_SECTORS} ZERO");
    assert_eq!(sectors(&parse(&most)), MAX_SECTORS);
    refused(format!("{most}\nRW 1 ZERO"), ErrorKind::Corrupt, "together");
}

#[test]
fn the_length_of_the_text_is_limited() {
    refused(
        text(&format!("#{}", "x".repeat(lines::TEXT_MAX))),
        ErrorKind::Corrupt,
        "more than 1048576",
    );
    refused(
        text(&"\n".repeat(lines::LINES_MAX)),
        ErrorKind::Corrupt,
        "more than 65536 lines",
    );
    let lines_over = text(&"\n".repeat(lines::LINES_MAX)).lines().count() - lines::LINES_MAX;
    // The newline of the last line starts one more line, which is empty.
    parse(text(&"\n".repeat(lines::LINES_MAX - lines_over - 1)));
    let extents = parse(text(&"RW 1 ZERO\n".repeat(60_000))).extents;
    assert_eq!((extents.len(), extents[59_999].line), (60_001, 60_005));
}

#[test]
fn a_descriptor_without_extents_is_refused() {
    for extents in ["", "NOACCESS 0 ZERO\n", "# RW 1 ZERO\n"] {
        refused(
            format!("version=1\ncreateType=custom\n{extents}"),
            ErrorKind::Corrupt,
            "no extent",
        );
    }
    refused("", ErrorKind::Corrupt, "no extent");
}

/// Asserts that the text is read like the plain one, with a warning that contains `fragment`.
#[track_caller]
fn tolerated(text: impl AsRef<[u8]>, fragment: &str) {
    let d = parse(text);
    let extent = &d.extents[0];
    assert_eq!(
        (
            sectors(&d),
            extent.kind,
            extent.name.as_ref().unwrap().to_string().as_str()
        ),
        (2048, ExtentKind::Flat, "disk-flat.vmdk")
    );
    assert!(d.warnings.iter().any(|w| w.contains(fragment)), "{:?}", d.warnings);
}

#[test]
fn a_plain_descriptor_causes_no_warning() {
    assert_eq!(
        parse(text(
            "isNativeSnapshot=\"no\"\nencoding=\"windows-1252\"\nNOACCESS 0 ZERO"
        ))
        .warnings,
        [""; 0]
    );
}

#[test]
fn stray_lines_are_ignored_with_a_warning() {
    for line in [
        "garbage",
        "=1",
        "two words = 1",
        "Snapshot of 2019-03-01",
        "line two\"",
        "a flat disk",
    ] {
        tolerated(text(line), "line 6: ");
    }
    for comment in [
        "; RW 1 FLAT \"x\" 0",
        "// parentCID=1",
        "/* OpenSource Tools version. */",
        "[disk]",
    ] {
        assert_eq!(parse(text(comment)).warnings, [""; 0], "{comment}");
    }
    let many = parse(text(&"stray\n".repeat(1000))).warnings;
    assert!(many.len() < 20 && many.last().unwrap().contains("992 more"), "{many:?}");
}

#[test]
fn stray_lines_that_may_decide_bytes_are_refused() {
    for line in [
        "RWX 1 FLAT \"x\" 0",
        "W 1 FLAT \"x\"",
        "R W 1 SPARSE \"x\"",
        "RW1 flat \"x\"",
        "8 ZERO",
        "parentCID: 1",
        "parentFileNameHint \"x\"",
        "encryptionKeys",
    ] {
        refused(
            text(line),
            ErrorKind::Corrupt,
            "line 6: expected a comment, a setting or an extent",
        );
    }
}

#[test]
fn contradicting_duplicates_are_refused_where_they_decide_bytes() {
    parse(text("parentcid=FFFFFFFF"));
    for other in ["parentCID=00000000", "parentCID=0x0", "parentCID=what"] {
        refused(text(other), ErrorKind::Corrupt, "line 6, ");
        refused(text(other), ErrorKind::Corrupt, "contradicts line");
    }
    refused(
        text("parentFileNameHint=\"a\"\nparentFileNameHint=\"b\""),
        ErrorKind::Corrupt,
        "contradicts line 6",
    );
    for (same, other) in [
        ("CID=123ABCD", "CID=0123abce"),
        ("createtype=MonolithicFlat", "createType=\"vmfs\""),
        ("version=\"1\"", "version=3"),
    ] {
        assert_eq!(parse(text(same)).warnings, [""; 0]);
        tolerated(text(other), "contradicts line");
    }
    let first = parse(text("CID=1"));
    assert_eq!((first.cid, first.version), (Some(0x0123_abcd), Some(1)));
    assert_eq!(
        parse(text("changeTrackPath=\"a\"\nchangeTrackPath=\"b\""))
            .change_tracking
            .as_deref(),
        Some("a")
    );
}

#[test]
fn unknown_labels_stay_as_they_are() {
    let cid = |line: &str| parse(format!("version=1\ncreateType=custom\nRW 1 ZERO\n{line}"));
    for opaque in ["CID=", "CID=xyz", "CID=-1", "CID=\"12", "CID=4294967296"] {
        let d = cid(opaque);
        assert_eq!(d.cid, None, "{opaque}");
        assert!(d.warnings[0].contains("unknown value"), "{:?}", d.warnings);
    }
    for (spelled, number) in [
        ("CID=0xfffffffe", 0xffff_fffe),
        ("CID=00000000fffffffe", 0xffff_fffe),
        ("CID=3204984721", 3_204_984_721),
        ("CID=\"12ab\" # why", 0x12ab),
    ] {
        assert_eq!(cid(spelled).cid, Some(number), "{spelled}");
    }
    let version = |value: &str| parse(format!("version={value}\ncreateType=custom\nRW 1 ZERO"));
    for (value, number) in [
        ("1 # format", Some(1)),
        ("1.0", Some(1)),
        ("\"2\" # why", Some(2)),
        ("4", Some(4)),
        ("x", None),
    ] {
        assert_eq!(version(value).version, number, "{value}");
    }
    assert!(version("4").warnings[0].contains("version 4"));
    let none = parse("RW 1 ZERO");
    assert_eq!((none.version, none.create_type.as_str(), none.cid), (Some(1), "", None));
    assert_eq!(none.warnings.len(), 2);
    let odd = parse("version=1\ncreateType=\"twoGbMaxExtentThin\"\nRW 1 ZERO");
    assert_eq!(odd.create_type, "twoGbMaxExtentThin");
    assert!(odd.warnings[0].contains("twoGbMaxExtentThin"), "{:?}", odd.warnings);
}

#[test]
fn every_create_type_is_known_by_all_its_names() {
    for (usual, others) in CREATE_TYPES {
        for name in others.iter().chain([&usual]) {
            let d = parse(format!(
                "version=1\ncreateType=\"{}\"\nRW 1 ZERO",
                name.to_ascii_uppercase()
            ));
            assert_eq!((d.create_type.as_str(), d.warnings.len()), (usual, 0));
        }
    }
}

#[test]
fn other_quotes_and_blanks_are_read_alike() {
    let line = "RW 2048 FLAT \"disk-flat.vmdk\" 0";
    for (extent, fragment) in [
        ("RW 2048 FLAT 'disk-flat.vmdk' 0", "not in quotes"),
        ("RW 2048 FLAT disk-flat.vmdk 0", "not in quotes"),
        ("RW 2048 FLAT \u{201c}disk-flat.vmdk\u{201d} 0", "not in quotes"),
        ("RW 2048 FLAT \u{201e}disk-flat.vmdk\u{201c} 0", "not in quotes"),
        ("RW 2048 FLAT \u{ab}disk-flat.vmdk\u{bb} 0", "not in quotes"),
        ("RW 2048 FLAT \"disk-flat.vmdk\u{201d} 0", "not in quotes"),
        ("RW 0 FLAT \"x\" 0\nRW 2048 FLAT \"disk-flat.vmdk\" 0", "0 sectors"),
    ] {
        tolerated(text("").replace(line, extent), fragment);
    }
    let windows = [
        &b"RW 2048 FLAT \x93disk-flat.vmdk\x94 0\n"[..],
        b"version=1\ncreateType=\x94custom\x94\n",
    ]
    .concat();
    tolerated(windows, "not in quotes");
    let spaced = text("")
        .replace("FLAT ", "FLAT\u{a0}")
        .replace("RW ", "\u{3000}RW\u{2009}");
    assert_eq!(parse(spaced).extents.len(), 1);
    for value in ["'custom'", "\u{201d}custom\u{201d}", "\u{2018}custom\u{2019}"] {
        let d = parse(text(&format!("createType={value}")).replacen("createType=\"monolithicFlat\"\n", "", 1));
        assert_eq!(d.create_type, "custom", "{value}");
    }
    let apostrophe = text("").replace("\"disk-flat.vmdk\"", "'anna's disk.vmdk'");
    assert_eq!(
        parse(apostrophe).extents[0].name.as_ref().unwrap().to_string(),
        "anna's disk.vmdk"
    );
}

#[test]
fn line_ends_and_unicode_texts_are_read_alike() {
    let plain = text("");
    for (ends, number) in [("\n", 7), ("\r\n", 7), ("\r", 7), ("\r\r", 13)] {
        let d = parse(plain.replace('\n', ends));
        assert_eq!((sectors(&d), d.extents[0].line), (2048, number), "{ends:?}");
    }
    let utf16 = |to: fn(u16) -> [u8; 2], mark: bool| -> Vec<u8> {
        let text = format!("{}{plain}", if mark { "\u{feff}" } else { "" });
        text.encode_utf16().flat_map(to).collect()
    };
    for mark in [true, false] {
        for to in [u16::to_le_bytes, u16::to_be_bytes] {
            let bytes = utf16(to, mark);
            tolerated(&bytes, "UTF-16");
            assert!(looks_like(&bytes));
            assert!(cid_digits(&bytes).is_empty());
        }
    }
}

#[test]
fn names_of_the_disk_data_base_are_known_without_their_prefix() {
    let d = parse(text("geometry.heads = \"16\"\nUUID.parent=\"x\""));
    assert_eq!(
        (d.ddb_value("geometry.heads"), d.ddb_value("uuid.parent")),
        (Some("16"), Some("x"))
    );
    assert_eq!(d.warnings.len(), 2);
    refused(
        text("iofilters = \"vmwarevmcrypt\""),
        ErrorKind::Unsupported,
        "encrypted",
    );
}

#[test]
fn only_the_digits_of_a_cid_are_changed() {
    let digits = |line: &str| -> Vec<String> {
        let bytes = format!("version=1\nRW 1 ZERO\n{line}\n");
        let found = cid_digits(bytes.as_bytes());
        found.into_iter().map(|range| bytes[range].to_owned()).collect()
    };
    assert_eq!(digits("CID=0x12ab # why"), ["12ab"]);
    assert_eq!(digits("CID=\u{201c}12ab\u{201d}"), ["12ab"]);
    assert_eq!(digits("CID=3204984721"), ["3204984721"]);
    assert_eq!(digits("CID=opaque"), [""; 0]);
    assert_eq!(digits("CID=opaque\nCID=12"), ["12"]);
}

#[test]
fn unreadable_disks_are_reported_before_other_errors() {
    for line in [
        "encryptionKeys=\"vmware:key/list/(…)\"",
        "KEYID = \"x\"",
        "ddb.iofilters = \"a,VMwareVMcrypt\"",
    ] {
        refused(text(line), ErrorKind::Unsupported, "encrypted");
        refused(
            format!("version=7\nRW nonsense\n{line}"),
            ErrorKind::Unsupported,
            "encrypted",
        );
    }
    refused(
        text("ddb.iofilters = \"cache\"\nddb.iofilters = \"vmwarevmcrypt\""),
        ErrorKind::Unsupported,
        "encrypted",
    );
    parse(text("ddb.iofilters = \"cache\""));
    refused(
        text("isNativeSnapshot=\"YES\""),
        ErrorKind::Unsupported,
        "native snapshot",
    );
    parse(text("isNativeSnapshot=\"no\""));
}

#[test]
fn messages_show_no_control_characters_and_are_short() {
    let error = Descriptor::parse(text(&format!("W 1 ZERO \x1b[2J{}", "x".repeat(5000))).as_bytes())
        .unwrap_err()
        .to_string();
    assert!(error.contains("\\u{1b}[2Jxxx") && error.len() < 200, "{error}");
}

#[test]
fn descriptors_are_distinguished_from_other_files() {
    for yes in [
        &b"# Disk DescriptorFile"[..],
        b"#disk descriptorfile\n\0\0",
        b"\n# any\r\n  \r\nVersion = 1\r\n",
        b"version=1\0\0\0",
        b"\xef\xbb\xbfversion=1",
        b"# a comment\nCID=1\nversion=1",
        b"[disk]\n# Disk DescriptorFile",
        b"RW 8 FLAT \"x\"",
        b"name=x\rcreateType=vmfs",
    ] {
        assert!(looks_like(yes), "{}", shown(yes));
    }
    for no in [
        &b""[..],
        b"\0# Disk DescriptorFile",
        b"versions=1",
        b"name=x\nversion=1",
        b".encoding = \"UTF-8\"\nconfig.version = \"8\"\nvirtualHW.version = \"10\"\n",
        b"a\nb\nc\nd\ne\n# Disk DescriptorFile",
        b"\x01\n# Disk DescriptorFile",
        b"version 1",
        b"KDMV\x01\0\0\0",
        b"# a comment\0\nversion=1",
    ] {
        assert!(!looks_like(no), "{}", shown(no));
    }
    let far = [b"#".repeat(PROBE), b"\nversion=1".to_vec()].concat();
    assert!(!looks_like(&far));
}

proptest! {
    #[test]
    fn arbitrary_bytes_do_not_panic(bytes in proptest::collection::vec(any::<u8>(), 0..2000)) {
        let _ = Descriptor::parse(&bytes);
        let _ = looks_like(&bytes);
    }

    #[test]
    fn mutated_descriptors_do_not_panic(
        encoding in prop_oneof![Just("UTF-8"), Just("Shift_JIS"), Just("GBK"), Just("windows-1252")],
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0..3u8), 1..12),
    ) {
        let valid = text(&format!(
            "encoding=\"{encoding}\"\nRW 9 SPARSE \"s 1.vmdk\"\nNOACCESS 0 ZERO\nparentFileNameHint=\"C:\\a\\b.vmdk\""
        ));
        let mut bytes = valid.replace("parentCID=ffffffff", "parentCID=1").into_bytes();
        for (index, byte, how) in changes {
            let at = index.index(bytes.len());
            match how {
                0 => bytes[at] = byte,
                1 => bytes.insert(at, byte),
                _ => { bytes.remove(at); }
            }
        }
        if let Ok(d) = Descriptor::parse(&bytes) {
            prop_assert!(!d.extents.is_empty() && (1..=MAX_SECTORS).contains(&sectors(&d)));
            if let Some(link) = d.parent {
                prop_assert!(link.cid != Some(NO_CID) && !link.hint.candidates().is_empty());
            }
        }
    }

    #[test]
    fn parsing_returns_what_was_written(
        extents in proptest::collection::vec((1..1u64 << 40, 0..1u64 << 40, "[^\"\\x00\r\n]{1,40}"), 1..20),
        cid in any::<u32>(),
    ) {
        let mut written = format!("version=1\ncreateType=\"custom\"\nCID={cid:x}\n");
        for (sectors, offset, name) in &extents {
            written += &format!("RW {sectors} FLAT \"{name}\" {offset}\n");
        }
        let d = parse(written);
        prop_assert_eq!(d.cid, Some(cid));
        let read: Vec<_> = d.extents.into_iter().map(|e| (e.sectors, e.offset, e.name.unwrap())).collect();
        let expected: Vec<_> =
            extents.into_iter().map(|(s, o, n)| (s, o, ExtentName::new(n).unwrap())).collect();
        prop_assert_eq!(read, expected);
    }
}
