//! Hints of parents, and the names that they may mean.

use super::*;

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
        (Some(1), "base disk.vmdk".to_owned())
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
    let sparse = "version=1\ncreateType=custom\nRW 1 SPARSE \"x\"\n";
    for hint in ["", "parentFileNameHint=\"\""] {
        refused(
            format!("{sparse}parentCID=fffffffe\n{hint}"),
            ErrorKind::Corrupt,
            "line 4: parentCID=fffffffe",
        );
        // Flat extents hide any parent.
        assert_eq!(parse(format!("{plain}parentCID=fffffffe\n{hint}")).parent, None);
    }
    for none in ["", "\"\"", "none"] {
        assert_eq!(parse(format!("{sparse}parentCID={none}")).parent, None);
    }
    refused(format!("{sparse}parentCID=what"), ErrorKind::Corrupt, "parentCID=what");
    let opaque = parse(format!("{sparse}parentCID=what\nparentFileNameHint=x"))
        .parent
        .unwrap();
    assert_eq!(opaque.cid, None, "fits no parent");
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
    assert_eq!(tries("../d/x.vmdk"), ["../d/x.vmdk", "x.vmdk"]);
    assert_eq!(tries("nbd:localhost:10809"), ["nbd:localhost:10809"]);
    assert_eq!(tries("/d/x.vmdk"), ["/d/x.vmdk", "x.vmdk", "../d/x.vmdk"]);
    assert_eq!(tries("/d/"), ["/d/"]);
    assert_eq!(
        tries("/vmfs/volumes/5f-1/d/x.vmdk"),
        ["x.vmdk", "../d/x.vmdk", "/vmfs/volumes/5f-1/d/x.vmdk"]
    );
    assert_eq!(
        tries("/vmfs/volumes/5f-1/x.vmdk"),
        ["x.vmdk", "/vmfs/volumes/5f-1/x.vmdk"]
    );
    assert_eq!(tries(r"C:\d\x.vmdk"), ["x.vmdk", "../d/x.vmdk"]);
    assert_eq!(tries("c:/d/x.vmdk"), ["x.vmdk", "../d/x.vmdk"]);
    assert_eq!(tries(r"\\host\share\x.vmdk"), ["x.vmdk", "../share/x.vmdk"]);
    assert_eq!(tries(r"\d\x.vmdk"), ["x.vmdk", "../d/x.vmdk"]);
    assert_eq!(tries(r"C:\"), [r"C:\"]);
    assert_eq!(tries(r"..\d\x.vmdk"), ["../d/x.vmdk", r"..\d\x.vmdk", "x.vmdk"]);
}

#[test]
fn parent_hints_are_decoded_before_they_are_split() {
    let tries = |hint: &[u8]| child(hint, "encoding=Shift_JIS").parent.unwrap().hint.candidates();
    let name = |text: &str, raw: &[u8]| ExtentName::new(text).unwrap().or_raw(raw).unwrap();
    assert_eq!(
        tries(b"C:\\d\\\x95\x5c.vmdk"),
        [
            name("表.vmdk", b"\x95\x5c.vmdk"),
            name("../d/表.vmdk", b"../d/\x95\x5c.vmdk")
        ]
    );
    assert_eq!(
        tries(b"\x95\x5c\\x.vmdk"),
        [
            name("表/x.vmdk", b"\x95\x5c/x.vmdk"),
            name("表\\x.vmdk", b"\x95\x5c\\x.vmdk"),
            name("x.vmdk", b"x.vmdk")
        ]
    );
    assert_eq!(tries(b"\x95\x5c.vmdk"), [name("表.vmdk", b"\x95\x5c.vmdk")]);
}
