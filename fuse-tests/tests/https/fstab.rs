//! Lines of fstab whose disk is on a server, through the real mount(8) and umount(8).

use fuse_tests::harness::{Cmd, Scratch, need, need_qemu, need_root, program, qemu_img, raw_with_islands};

use crate::server::{PASSWORD, Server, USER, need_nginx, need_vsim};

/// "First fields that work: … `[datastore1] Fedora/Fedora.vmdk` with `server=` among the options, … an `https://…` URL"
#[test]
fn a_datastore_and_an_address_are_first_fields_of_fstab() {
    if !need_vsim() || !need_nginx() || !need_qemu() || !need_root() || !need("findmnt") {
        return;
    }
    let scratch = Scratch::new();
    let (files, raw) = (scratch.mkdir("files"), scratch.path("expected"));
    raw_with_islands(&raw, 8 << 20, 5);
    let image = scratch.mkdir("files/b c").join("x y.vmdk");
    let (raw, image) = (raw.to_str().unwrap(), image.to_str().unwrap());
    qemu_img(["convert", "-f", "raw", "-O", "vmdk", raw, image]);
    let login = scratch.write("login", format!("username={USER}\npassword={PASSWORD}\n"));
    Cmd::new("chmod").arg("600").arg(login).run().ok();
    // Each server has a certificate of its own.
    let (of_datastore, of_web) = (Scratch::new(), Scratch::new());
    let datastore = Server::vsim(&of_datastore, &files, &[]);
    let web = Server::nginx(&of_web, &files, "");
    Cmd::in_namespace()
        .args(["sh", "-c"])
        .arg(concat!(include_str!("../cli/install.sh"), include_str!("fstab.sh")))
        .arg("fstab.sh")
        .arg(scratch.root())
        .arg(program())
        .args([datastore.port.to_string(), datastore.thumbprint.clone()])
        .arg(web.port.to_string())
        .arg(&web.certificate)
        .run()
        .ok();
}
