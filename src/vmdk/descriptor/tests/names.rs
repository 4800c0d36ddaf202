//! Encodings of names.

use super::*;

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
        ("windows-949-2000", b"\xb0\xa1.vmdk", "가.vmdk"),
        ("ibm-943_P15A-2003", b"\x95\x5c.vmdk", "表.vmdk"),
        ("ibm-5348_P100-1997", b"caf\xe9.vmdk", "café.vmdk"),
        ("windows-1250-2000", b"\xb9.vmdk", "ą.vmdk"),
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
fn an_unknown_encoding_matters_only_for_names_that_are_not_ascii() {
    // The last ones are known, but not supersets of ASCII.
    for label in [
        "klingon",
        "windows-9999",
        "IBM437",
        "cp850",
        "replacement",
        "iso-2022-jp",
    ] {
        tolerated(text(&format!("encoding=\"{label}\"")), "the encoding");
        refused(
            text(&format!("encoding=\"{label}\"\nRW 1 FLAT \"é\"")),
            ErrorKind::Unsupported,
            "line 7: the name `é` is not ASCII",
        );
    }
    for label in [
        "",
        "UTF-16",
        "utf-16le",
        "US-ASCII",
        "ANSI_X3.4-1968",
        "\u{201d}UTF-8\u{201d}",
    ] {
        parse(text(&format!("encoding={label}")));
    }
    parse(text("encoding=UTF-8\nencoding=\"utf8\"\nRW 1 FLAT \"é\""));
    parse(text("encoding=UTF-8\nencoding=\"GBK\""));
    refused(
        text("encoding=UTF-8\nencoding=\"GBK\"\nRW 1 FLAT \"é\""),
        ErrorKind::Unsupported,
        "not ASCII",
    );
}
