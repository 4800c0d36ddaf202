use std::fs;
use std::path::Path;

use super::*;
use crate::store::{Access, OpenPolicy, open_user_path};

/// Writes an archive of members with these contents. Returns the package, or the error.
fn package(dir: &Path, members: &[(&str, &[u8])]) -> Result<Package> {
    let path = dir.join("x.ova");
    let mut archive = tar::Builder::new(fs::File::create(&path).unwrap());
    for (name, content) in members {
        let mut header = tar::Header::new_ustar();
        header.set_size(content.len() as u64);
        archive.append_data(&mut header, name, *content).unwrap();
    }
    archive.into_inner().unwrap().sync_all().unwrap();
    of(&path)
}

fn of(path: &Path) -> Result<Package> {
    open(open_user_path(
        path,
        Arc::new(OpenPolicy::new(Vec::new(), true)),
        Access::Read,
    )?)
}

const OVF: &str = r#"<?xml version="1.0"?><Envelope xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1"><References>
    <File ovf:id="f1" ovf:href="one.vmdk"/><File ovf:href="two.vmdk" ovf:id="f2"/><File ovf:id="iso" ovf:href="x.iso"/>
    </References><DiskSection><Disk ovf:diskId="d2" ovf:fileRef="f2"/><Disk ovf:fileRef="f1"/><Disk ovf:diskId="empty"/>
    </DiskSection></Envelope>"#;

#[test]
fn disks_have_the_order_of_the_description_and_read_as_they_lie_there() {
    let dir = tempfile::tempdir().unwrap();
    let members: [(&str, &[u8]); 4] = [
        ("a.ovf", OVF.as_bytes()),
        ("one.vmdk", b"first"),
        ("two.vmdk", b"second"),
        ("x.iso", b"iso"),
    ];
    let package = package(dir.path(), &members).unwrap();
    assert_eq!(package.disks(), ["two.vmdk", "one.vmdk"]);
    let file = package.disk(Some("two.vmdk")).unwrap();
    let mut content = [0; 6];
    file.read_exact_at(0, &mut content).unwrap();
    assert_eq!((file.len(), &content), (6, b"second"));
    // The next member is not a part of it.
    assert_eq!(
        file.read_exact_at(1, &mut content).unwrap_err().kind(),
        ErrorKind::Corrupt
    );
    let several = package.disk(None).unwrap_err().to_string();
    assert!(
        several.contains("two.vmdk, one.vmdk") && several.contains("member="),
        "{several}"
    );
    assert!(
        package
            .disk(Some("x.iso"))
            .unwrap_err()
            .to_string()
            .contains("has no disk x.iso")
    );
}

#[test]
fn without_a_description_every_vmdk_is_a_disk() {
    let dir = tempfile::tempdir().unwrap();
    let long = format!("{}/disk.vmdk", "d".repeat(150));
    let package = package(dir.path(), &[(&long, b"x"), ("notes.txt", b"y")]).unwrap();
    assert_eq!(package.disks(), [long]);
    assert_eq!(package.disk(Some("disk.vmdk")).unwrap().own_name(), "disk.vmdk");
}

#[test]
fn compressed_and_cut_disks_are_refused_with_the_command_that_helps() {
    let dir = tempfile::tempdir().unwrap();
    let package_of = |members: &[(&str, &[u8])]| package(dir.path(), members);
    let e = package_of(&[("disk.vmdk.gz", b"\x1f\x8b\x08")])
        .unwrap()
        .disk(None)
        .unwrap_err();
    assert!(
        e.kind() == ErrorKind::Unsupported && e.to_string().contains("| gunzip > disk.vmdk"),
        "{e}"
    );
    let cut = OVF.replace("ovf:id=\"f1\"", "ovf:id=\"f1\" ovf:chunkSize=\"1000\"");
    let e = package_of(&[("a.ovf", cut.as_bytes())]).unwrap_err();
    assert!(e.to_string().contains("cat one.vmdk.*"), "{e}");
}

#[test]
fn digests_find_a_changed_member() {
    let dir = tempfile::tempdir().unwrap();
    let sum: String = digest::digest(&digest::SHA256, b"content")
        .as_ref()
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect();
    let list = format!("SHA256(disk.vmdk)= {sum}\n");
    let good = package(dir.path(), &[("disk.vmdk", b"content"), ("x.mf", list.as_bytes())]).unwrap();
    assert_eq!(good.verify(Some("disk.vmdk")).unwrap(), Vec::<String>::new());
    let bad = package(dir.path(), &[("disk.vmdk", b"CONTENT"), ("x.mf", list.as_bytes())]).unwrap();
    let wrong = bad.verify(None).unwrap();
    assert!(
        wrong.len() == 1 && wrong[0].contains("differs from its digest"),
        "{wrong:?}"
    );
}

#[test]
fn a_hostile_list_of_digests_or_disks_costs_no_more_than_its_text() {
    let dir = tempfile::tempdir().unwrap();
    let zeroes = "0".repeat(40);
    let list = format!("SHA1(disk.vmdk)= {zeroes}\n").repeat(1000) + &"x\n".repeat(1000);
    let package_of = |members: &[(&str, &[u8])]| package(dir.path(), members).unwrap();
    let bad = package_of(&[("disk.vmdk", b"content"), ("x.mf", list.as_bytes())]);
    let wrong = bad.verify(None).unwrap();
    assert_eq!(wrong.len(), MAX_MESSAGES + 1);
    assert!(
        wrong[0].contains("differs") && wrong[1].contains("lists disk.vmdk twice"),
        "{wrong:?}"
    );
    let short = package_of(&[("disk.vmdk", b"content"), ("x.mf", b"SHA1(disk.vmdk)= 00\n")]);
    assert!(short.verify(None).unwrap()[0].contains("cannot read the line"));
    let twice = OVF.replace("fileRef=\"f1\"", "fileRef=\"f2\"");
    let one = package_of(&[("a.ovf", twice.as_bytes()), ("two.vmdk", b"second")]);
    assert_eq!(one.disks(), ["two.vmdk"]);
    assert!(one.disk(None).is_ok());
}

#[test]
fn damaged_and_hostile_archives_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.ova");
    let refused = |members: &[(&str, &[u8])]| package(dir.path(), members).unwrap_err().to_string();
    assert!(refused(&[("a.vmdk", b"1"), ("a.vmdk", b"2")]).contains("two members"));
    assert!(refused(&[]).contains("no members"));
    assert!(refused(&[("a.ovf", b"<a><b></a>")]).contains("is no XML"));
    // A member that claims more than the file has.
    package(dir.path(), &[("a.vmdk", &[7; 4096])]).unwrap();
    let whole = fs::read(&path).unwrap();
    fs::write(&path, &whole[..2048]).unwrap();
    assert!(of(&path).unwrap_err().to_string().contains("the file ends at 2048"));
    fs::write(&path, vec![0x55; 4096]).unwrap();
    assert!(of(&path).is_err());
    // A long name of 1 GiB, which must not be read into memory.
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::GNULongName);
    header.set_size(1 << 30);
    header.set_path("././@LongLink").unwrap();
    header.set_cksum();
    fs::write(&path, header.as_bytes()).unwrap();
    fs::File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(2 << 30)
        .unwrap();
    assert!(of(&path).unwrap_err().to_string().contains("bytes of headers"));
}
