use proptest::prelude::*;

use super::*;
use crate::error::ErrorKind;
use crate::store::ExtentName;

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
        (d.version, d.create_type, d.cid),
        (1, CreateType::MonolithicFlat, Some(0x0123_abcd))
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
        (d.version, d.create_type, d.cid, sectors(&d)),
        (3, CreateType::Custom, Some(0xa454_774a), 17)
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
    corrupt("RW 0 FLAT \"x\" 0", "more than 0 sectors");
    corrupt("NOACCESS 0 SPARSE \"x\"", "more than 0 sectors");
    corrupt("RW 1 FLAT", "a file name in quotes");
    corrupt("RW 1 SPARSE x.vmdk", "a file name in quotes");
    corrupt("RW 1 SPARSE 'x.vmdk'", "a file name in quotes");
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
    refused(text("RW 1 VMFSRDM \"x\""), ErrorKind::Unsupported, "RDM pointer");
    refused(text("RW 1 vmfsraw \"x\""), ErrorKind::Unsupported, "RDM pointer");
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
    refused("", ErrorKind::Corrupt, "no createType");
}

#[test]
fn unknown_lines_are_refused() {
    for line in ["RWX 1 FLAT \"x\" 0", "W 1 FLAT \"x\"", "garbage", "=1", "two words = 1"] {
        refused(
            text(line),
            ErrorKind::Corrupt,
            "line 6: expected a comment, a setting or an extent",
        );
    }
}

#[test]
fn contradicting_duplicates_are_refused() {
    for (same, other) in [
        ("CID=123ABCD", "CID=0123abce"),
        ("parentcid=FFFFFFFF", "parentCID=00000000"),
        ("createtype=MonolithicFlat", "createType=\"vmfs\""),
        ("version=\"1\"", "version=3"),
    ] {
        parse(text(same));
        refused(text(other), ErrorKind::Corrupt, "line 6, ");
        refused(text(other), ErrorKind::Corrupt, "contradicts line");
    }
    refused(
        text("changeTrackPath=\"a\"\nchangeTrackPath=\"b\""),
        ErrorKind::Corrupt,
        "contradicts line 6",
    );
    parse(text("encoding=UTF-8\nencoding=\"utf8\""));
    refused(
        text("encoding=UTF-8\nencoding=\"GBK\""),
        ErrorKind::Corrupt,
        "contradicts line 6",
    );
}

#[test]
fn values_of_settings_are_checked() {
    for bad in [
        "CID=",
        "CID=123456789",
        "CID=xyz",
        "CID=-1",
        "parentCID=\"0\" 1",
        "CID=\"12",
    ] {
        let plain = "version=1\ncreateType=custom\nRW 1 ZERO\n";
        refused(format!("{plain}{bad}"), ErrorKind::Corrupt, "line 4, ");
    }
    assert_eq!(
        parse("version=\"2\" # why\ncreateType=custom\nRW 1 ZERO\nCID=0").cid,
        Some(0)
    );
    assert_eq!(parse("version=1\ncreateType=custom\nRW 1 ZERO").cid, None);
    refused(
        "version=4\ncreateType=custom\nRW 1 ZERO",
        ErrorKind::Unsupported,
        "line 1: expected version 1, 2 or 3",
    );
    refused("createType=custom\nRW 1 ZERO", ErrorKind::Corrupt, "no version");
    refused("version=1\nRW 1 ZERO", ErrorKind::Corrupt, "no createType");
    refused(
        "version=1\ncreateType=\"vhdx\"\nRW 1 ZERO",
        ErrorKind::Unsupported,
        "line 2: createType `vhdx`",
    );
}

#[test]
fn every_create_type_is_known_by_all_its_names() {
    for (name, kind) in CREATE_TYPES {
        let d = parse(format!(
            "version=1\ncreateType=\"{}\"\nRW 1 ZERO",
            name.to_ascii_uppercase()
        ));
        assert_eq!(d.create_type, kind);
        let usual = CREATE_TYPES.iter().find(|(_, k)| *k == kind).unwrap().0;
        assert_eq!(kind.to_string(), usual);
    }
    for name in DEVICE_MAPS {
        let text = format!("version=1\ncreateType=\"{name}\"\nRW 1 VMFSRDM \"x-rdm.vmdk\"");
        refused(text, ErrorKind::Unsupported, "RDM pointer");
    }
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

/// Returns the descriptor of a child with that hint and the lines `more`.
fn child(hint: &[u8], more: &str) -> Descriptor {
    let head = format!("version=1\nparentCID=1\ncreateType=custom\nRW 1 ZERO\n{more}\nparentFileNameHint=\"");
    parse([head.as_bytes(), hint, b"\"\n"].concat())
}

#[test]
fn parents_are_parsed() {
    let link = child(b"base disk.vmdk", "").parent.unwrap();
    assert_eq!(
        (link.cid, link.hint.name().to_string()),
        (1, "base disk.vmdk".to_owned())
    );
    let plain = "version=1\ncreateType=custom\nRW 1 ZERO\n";
    assert_eq!(
        parse(format!("{plain}parentCID=ffffffff\nparentFileNameHint=\"x\"")).parent,
        None
    );
    assert_eq!(
        parse(format!("{plain}parentCID=ffffffff\nparentFileNameHint=\"\"")).parent,
        None
    );
    refused(
        format!("{plain}parentCID=fffffffe"),
        ErrorKind::Corrupt,
        "line 4: parentCID=fffffffe",
    );
    refused(
        format!("{plain}parentCID=1\nparentFileNameHint=\"\""),
        ErrorKind::Corrupt,
        "line 5, parentFileNameHint",
    );
    refused(
        format!("{plain}parentCID=1\nparentFileNameHint=\"x"),
        ErrorKind::Corrupt,
        "closing",
    );
    refused(
        format!("{plain}parentFileNameHint=\"x\""),
        ErrorKind::Corrupt,
        "line 4: a parentFileNameHint",
    );
}

#[test]
fn candidates_of_a_parent_hint() {
    let tries = |hint: &str| -> Vec<String> {
        let candidates = child(hint.as_bytes(), "").parent.unwrap().hint.candidates();
        candidates.iter().map(ToString::to_string).collect()
    };
    assert_eq!(tries("x.vmdk"), ["x.vmdk"]);
    assert_eq!(tries("../d/x.vmdk"), ["../d/x.vmdk"]);
    assert_eq!(tries("nbd:localhost:10809"), ["nbd:localhost:10809"]);
    assert_eq!(tries("/d/x.vmdk"), ["/d/x.vmdk", "x.vmdk"]);
    assert_eq!(tries("/d/"), ["/d/"]);
    assert_eq!(tries("/vmfs/volumes/5f-1/d/x.vmdk"), ["x.vmdk", "../d/x.vmdk"]);
    assert_eq!(tries("/vmfs/volumes/5f-1/x.vmdk"), ["x.vmdk"]);
    assert_eq!(tries(r"C:\d\x.vmdk"), ["x.vmdk"]);
    assert_eq!(tries("c:/d/x.vmdk"), ["x.vmdk"]);
    assert_eq!(tries(r"\\host\share\x.vmdk"), ["x.vmdk"]);
    assert_eq!(tries(r"\d\x.vmdk"), ["x.vmdk"]);
    assert_eq!(tries(r"C:\"), [r"C:\"]);
    assert_eq!(tries(r"..\d\x.vmdk"), ["../d/x.vmdk", r"..\d\x.vmdk"]);
}

#[test]
fn names_are_decoded_and_keep_their_bytes() {
    for (label, bytes, decoded) in [
        ("windows-1252", &b"caf\xe9.vmdk"[..], "café.vmdk"),
        ("windows-1251", b"\xe4\xe8\xf1\xea.vmdk", "диск.vmdk"),
        // 表 is 95 5c and 能 is 94 5c: the second byte is a `\`.
        ("Shift_JIS", b"\x95\x5c \x94\x5c.vmdk", "表 能.vmdk"),
        ("windows-932", b"\x95\x5c.vmdk", "表.vmdk"),
        ("GBK", b"\xb4\xc5\xc5\xcc.vmdk", "磁盘.vmdk"),
        ("cp936", b"\xb4\xc5\xc5\xcc.vmdk", "磁盘.vmdk"),
        // 功 is a5 5c.
        ("Big5", b"\xa5\x5c.vmdk", "功.vmdk"),
        ("950", b"\xa5\x5c.vmdk", "功.vmdk"),
    ] {
        let head = "version=1\ncreateType=custom\nRW 1 SPARSE \"";
        let tail = "\"\nddb.comment = \"";
        let end = format!("\"\nENCODING=\"{label}\"\n");
        let d = parse([head.as_bytes(), bytes, tail.as_bytes(), bytes, end.as_bytes()].concat());
        let name = d.extents[0].name.clone().unwrap();
        assert_eq!(name.as_bytes(), decoded.as_bytes(), "{label}");
        assert_eq!(
            name.raw_path().unwrap().as_os_str().as_encoded_bytes(),
            bytes,
            "{label}"
        );
        assert_eq!(d.ddb_value("comment"), Some(decoded), "{label}");
    }
}

#[test]
fn utf8_is_the_default_and_invalid_utf8_is_kept() {
    for encoding in ["", "encoding=\"UTF-8\"\n"] {
        for bytes in ["диск.vmdk".as_bytes(), b"caf\xe9.vmdk"] {
            let head = format!("version=1\ncreateType=custom\n{encoding}RW 1 SPARSE \"");
            let name = parse([head.as_bytes(), bytes, b"\""].concat()).extents[0]
                .name
                .clone()
                .unwrap();
            assert_eq!((name.as_bytes(), name.raw_path()), (bytes, None));
        }
    }
}

#[test]
fn unknown_and_non_ascii_encodings_are_refused() {
    // The last two are known, but not supersets of ASCII.
    for label in ["klingon", "", "windows-9999", "replacement", "utf-16le", "iso-2022-jp"] {
        refused(
            text(&format!("encoding=\"{label}\"")),
            ErrorKind::Corrupt,
            "line 6, encoding: expected an encoding",
        );
    }
}

#[test]
fn parent_hints_are_decoded_before_they_are_split() {
    let tries = |hint: &[u8]| child(hint, "encoding=Shift_JIS").parent.unwrap().hint.candidates();
    let name = |text: &str, raw: &[u8]| ExtentName::new(text).unwrap().or_raw(raw).unwrap();
    assert_eq!(tries(b"C:\\d\\\x95\x5c.vmdk"), [name("表.vmdk", b"\x95\x5c.vmdk")]);
    assert_eq!(
        tries(b"\x95\x5c\\x.vmdk"),
        [
            name("表/x.vmdk", b"\x95\x5c/x.vmdk"),
            name("表\\x.vmdk", b"\x95\x5c\\x.vmdk")
        ]
    );
    assert_eq!(tries(b"\x95\x5c.vmdk"), [name("表.vmdk", b"\x95\x5c.vmdk")]);
}

#[test]
fn messages_show_no_control_characters_and_are_short() {
    let error = Descriptor::parse(text(&format!("\x1b[2J{}", "x".repeat(5000))).as_bytes())
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
    ] {
        assert!(looks_like(yes), "{}", shown(yes));
    }
    for no in [
        &b""[..],
        b"\0# Disk DescriptorFile",
        b"# a comment\nCID=1\nversion=1",
        b"versions=1",
        b"version 1",
        b"KDMV\x01\0\0\0",
        b"# a comment\0\nversion=1",
        b"text\n# Disk DescriptorFile",
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
                prop_assert!(link.cid != NO_CID && !link.hint.candidates().is_empty());
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
