use super::*;
use crate::error::ErrorKind;

/// A descriptor of one flat extent, with `more` lines.
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
fn refused(text: impl AsRef<[u8]>, kind: ErrorKind, says: &str) {
    let error = Descriptor::parse(text.as_ref()).unwrap_err();
    assert_eq!(error.kind(), kind, "{error}");
    assert!(error.to_string().contains(says), "`{error}` does not say `{says}`");
}

#[test]
fn a_plain_descriptor() {
    let d = parse(text(""));
    assert_eq!((d.version, d.create_type, d.cid), (1, CreateType::MonolithicFlat, Some(0x0123_abcd)));
    assert_eq!((d.parent.clone(), d.change_tracking.clone(), d.sectors()), (None, None, 2048));
    assert_eq!(d.ddb, [("adapterType".to_owned(), "ide".to_owned())]);
    assert_eq!(d.ddb_value("ADAPTERTYPE"), Some("ide"));
    let extent = &d.extents[0];
    assert_eq!(
        (extent.access, extent.sectors, extent.kind, extent.offset, extent.line),
        (Access::ReadWrite, 2048, ExtentKind::Flat, 0, 7)
    );
    assert_eq!(extent.name.as_ref().unwrap().as_bytes(), b"disk-flat.vmdk");
}
