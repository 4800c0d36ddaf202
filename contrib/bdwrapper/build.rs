//! Sets the soname, by which existing start scripts and linked programs know the library.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,libvmware-bdwrapper.so.0");
}
